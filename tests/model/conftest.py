"""Settings of small labelled runs with the tiny backbone, and what tests of several models do with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import TEXT

from recbole_llm.config.configurator import Config
from recbole_llm.experiment.llm_assembly import assemble
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.trainer.llm_trainer import LLMTrainer

LENS = {"epochs": 2, "embedding_size": 8, "mlp_hidden_size": [16, 8], "attention_hidden_size": [8]}


@pytest.fixture(scope="session")
def ctr_cache(tmp_path_factory) -> Path:
    """Lenses, item vectors and zero-shot scores, shared by the tests that ask for the same."""
    return tmp_path_factory.mktemp("ctr_cache")


@pytest.fixture
def ctr(toy_data, ctr_cache, tmp_path, monkeypatch) -> dict:
    """``config_dict`` of a small run of the ctr task on the dataset ``toy``, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    return {
        "data_path": str(toy_data),
        "cache_dir": str(ctr_cache),
        "text": TEXT,
        "backbone": "tiny",
        "few_shot": 24,
        "eval_rows": 20,
        "text_history_length": 5,
        "train_batch_size": 8,
        "micro_batch_size": 4,
        "lens_config": LENS,
        "bootstrap_samples": 20,
        "show_progress": False,
        "learning_rate": 0.01,
    }


@pytest.fixture
def parts_of(ctr):
    """``parts_of(model, **options)``: a freshly assembled run, its model in evaluation mode."""

    def build(model: str, **options):
        parts = assemble(Config(model, "toy", config_dict={**ctr, **options}))
        parts.model.eval()
        return parts

    return build


@pytest.fixture
def disturb():
    """``disturb(model, size)``: give every trained parameter a value of its own, as a training would."""

    def change(model, size: float = 0.3) -> None:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for group in model.parameter_groups().values():
                for parameter in group.values():
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                    parameter.add_(size * noise)

    return change


@pytest.fixture
def rows_of():
    """``rows_of(result)``: the columns of ``test_rows.npz``."""

    def read(result: dict) -> dict[str, np.ndarray]:
        with np.load(Path(result["path"]).with_name("test_rows.npz"), allow_pickle=False) as file:
            return dict(file)

    return read


@pytest.fixture
def broken_and_resumed(ctr, parts_of, tmp_path):
    """``broken_and_resumed(model, steps, **options)``: a run broken off after so many optimizer steps, then resumed."""

    def run(model: str, steps: int, **options) -> dict:
        parts = parts_of(model, **options)
        folder = tmp_path / "broken"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(parts.config.as_dict()))
        trainer = LLMTrainer(parts.config, parts.model, run_folder=folder, identities=parts.identities)
        update, left = trainer._update, iter(range(steps))

        def stop_in_time() -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            update()

        trainer._update = stop_in_time
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(parts.train_data, parts.valid_data, saved=True)
        return run_recbole_llm(model, "toy", config_dict={**ctr, **options, "resume": str(folder)})

    return run
