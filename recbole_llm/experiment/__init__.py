"""One run: assembly, training, evaluation and result, for LLM recommenders and conventional models alike."""
