"""Training: LLM trainer, conventional trainer, checkpoints, score cache, warm start."""
