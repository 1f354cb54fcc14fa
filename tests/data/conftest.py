"""Small datasets in RecBole's atomic files, and configurations for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from atomic_files import INTER_HEADER, random_interactions, write_atomic

from recbole_llm.config.configurator import Config
from recbole_llm.data.ctr import CTRDataset


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """``make_config(model='DIN', dataset='toy', **keys)`` for data under ``tmp_path``, in the ctr task."""

    def make(model: str = "DIN", dataset: str = "toy", **keys) -> Config:
        settings = {
            "task": "ctr",
            "train_neg_sample_args": None,
            "min_history": 3,
            "id_history_length": 5,
            "checkpoint_dir": str(tmp_path / "saved"),
            "show_progress": False,
            **keys,
        }
        settings.setdefault("data_path", str(tmp_path))
        return Config(model, dataset, config_dict=settings)

    return make


@pytest.fixture
def toy(tmp_path: Path, make_config) -> Callable[..., CTRDataset]:
    """``toy(rows, **keys)``: an unbuilt dataset of the given (or random) interactions."""

    def make(rows: Iterable[Iterable] | None = None, header: str = INTER_HEADER, **keys) -> CTRDataset:
        write_atomic(tmp_path, "toy", "inter", header, random_interactions() if rows is None else rows)
        return CTRDataset(make_config(**keys))

    return make


@pytest.fixture(scope="session")
def ml100k() -> CTRDataset:
    """The packaged ml-100k under our protocol."""
    keys = {"task": "ctr", "train_neg_sample_args": None, "id_history_length": 20}
    return CTRDataset(Config("DIN", "ml-100k", config_dict=keys))


@pytest.fixture(scope="session")
def ml100k_splits(ml100k: CTRDataset) -> list[CTRDataset]:
    """Its train, valid and test rows. Shared by tests: do not change them."""
    return ml100k.build()
