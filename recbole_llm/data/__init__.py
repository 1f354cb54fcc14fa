"""Atomic files to labelled rows, histories, and token ids."""

from recbole_llm.data.dataset import CTRDataset, draw_rows
from recbole_llm.data.history import HistoryIndex
from recbole_llm.data.prompt import (
    EncodedPrompts,
    PromptBuilder,
    check_prompt_config,
    load_prompt_config,
    tokenize_inert,
)
from recbole_llm.data.retriever import RecentRetriever, Retriever, SemanticRetriever
from recbole_llm.data.text import ItemText, TextSettings, UserText, natural_order

__all__ = [
    "CTRDataset",
    "EncodedPrompts",
    "HistoryIndex",
    "ItemText",
    "PromptBuilder",
    "RecentRetriever",
    "Retriever",
    "SemanticRetriever",
    "TextSettings",
    "UserText",
    "check_prompt_config",
    "draw_rows",
    "load_prompt_config",
    "natural_order",
    "tokenize_inert",
]
