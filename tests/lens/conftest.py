"""A toy dataset for the lens, and configurations of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from recbole_llm.config.configurator import Config
from recbole_llm.data.ctr import CTRDataset


def _synthetic():
    path = Path(__file__).resolve().parents[1] / "synthetic.py"
    spec = importlib.util.spec_from_file_location("toy_data_of_lens_tests", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _synthetic().write_dataset(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def configure(toy_folder: Path) -> Callable[..., Config]:
    """``configure(lens="SASRec", ...)``: the configuration of a run on the toy dataset."""

    def make(**given) -> Config:
        network = {"embedding_size": 8, "mlp_hidden_size": [16, 12], "attention_hidden_size": [6]}
        lens_config = {"epochs": 2, "train_batch_size": 64, **given.pop("lens_config", network)}
        values = {
            "data_path": str(toy_folder),
            "layout": "prompt",
            "id_history_length": 8,
            "device": "cpu",
            "show_progress": False,
            "seed": 3,
            "lens_config": lens_config,
            "text": {},
            **given,
        }
        return Config(model="RecLoRA", dataset="toy", config_dict=values)

    return make


@pytest.fixture(scope="session")
def splits(configure: Callable[..., Config]) -> list[CTRDataset]:
    return CTRDataset(configure()).build()


@pytest.fixture(scope="session")
def train(splits: list[CTRDataset]) -> CTRDataset:
    return splits[0]


@pytest.fixture(scope="session")
def valid(splits: list[CTRDataset]) -> CTRDataset:
    return splits[1]
