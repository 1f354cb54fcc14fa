"""The models: each file is a short composition of data, lens, adapter and backbone."""
