"""Prompts: what both tasks share, and the prompts of each task."""
