"""Atomic files to labelled rows, histories, and token ids."""

from recbole_llm.data.candidates import CandidateDataLoader, CandidateSet, draw_candidates
from recbole_llm.data.dataset import CTRDataset, HistoryDataset, draw_rows
from recbole_llm.data.history import HistoryIndex
from recbole_llm.data.next_item import NextItemDataset
from recbole_llm.data.prompt import PromptBuilder, check_prompt_config, load_prompt_config
from recbole_llm.data.prompt_lines import EncodedPrompts, item_token_ids, tokenize_inert
from recbole_llm.data.retriever import (
    CategoryRetriever,
    MixedRetriever,
    RecentRetriever,
    Retriever,
    SemanticRetriever,
    ShuffledRetriever,
)
from recbole_llm.data.text import ItemText, TextSettings, UserText, natural_order
from recbole_llm.data.title_prompt import (
    TitlePromptBuilder,
    check_title_prompt_config,
    load_title_prompt_config,
)

__all__ = [
    "CTRDataset",
    "CandidateDataLoader",
    "CandidateSet",
    "CategoryRetriever",
    "EncodedPrompts",
    "HistoryDataset",
    "HistoryIndex",
    "ItemText",
    "MixedRetriever",
    "NextItemDataset",
    "PromptBuilder",
    "RecentRetriever",
    "Retriever",
    "SemanticRetriever",
    "ShuffledRetriever",
    "TextSettings",
    "TitlePromptBuilder",
    "UserText",
    "check_prompt_config",
    "check_title_prompt_config",
    "draw_candidates",
    "draw_rows",
    "item_token_ids",
    "load_prompt_config",
    "load_title_prompt_config",
    "natural_order",
    "tokenize_inert",
]
