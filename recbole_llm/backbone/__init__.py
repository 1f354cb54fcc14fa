"""Loading a causal language model with its tokenizer, and reading answers from it.

This room knows torch and transformers, and nothing of RecBole.
"""

from recbole_llm.backbone.answers import answer_logits, answer_token_ids, mean_pooled_vectors, pad_right
from recbole_llm.backbone.loader import Backbone, load_backbone, resolve_dtype
from recbole_llm.backbone.store import DEFAULT_BACKBONE, default_cache_dir
from recbole_llm.backbone.titles import (
    TitleScores,
    TitleTrie,
    TriePiece,
    answer_log_likelihood,
    generate_titles,
    score_titles,
)

__all__ = [
    "DEFAULT_BACKBONE",
    "Backbone",
    "TitleScores",
    "TitleTrie",
    "TriePiece",
    "answer_log_likelihood",
    "answer_logits",
    "answer_token_ids",
    "default_cache_dir",
    "generate_titles",
    "load_backbone",
    "mean_pooled_vectors",
    "pad_right",
    "resolve_dtype",
    "score_titles",
]
