"""The frozen causal language model: loading it, reading answers from it, scoring titles with it."""
