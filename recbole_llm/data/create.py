"""The dataset of a run."""

from __future__ import annotations

from recbole.config import Config
from recbole.data import create_dataset as create_recbole_dataset
from recbole.data.dataset import Dataset

from recbole_llm.data.ctr import CTRDataset
from recbole_llm.data.next_item import NextItemDataset
from recbole_llm.data.recbole_files import check_files


def create_dataset(config: Config) -> Dataset:
    """The dataset of a run: the one of the key ``task``, or RecBole's choice where ``task`` is ``~``."""
    made = {"ctr": CTRDataset, "next_item": NextItemDataset}.get(config["task"])
    if made is None:
        check_files(config)
        return create_recbole_dataset(config)
    return made(config)
