"""Conventional models go on after their last validated epoch, and end as if nothing had happened."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from recbole.trainer import Trainer

from recbole_llm import quick_start
from recbole_llm.trainer.checkpoint import CheckpointError, load_checkpoint
from recbole_llm.trainer.conventional_trainer import EpochTraining

SMALL = {"hidden_size": 8, "inner_size": 8, "n_heads": 1, "n_layers": 1}
MODELS = {
    "labelled rows": ("DIN", {"task": "ctr", "embedding_size": 8, "mlp_hidden_size": [8]}),
    "pairs, drawn": ("BPR", {"task": "ctr", "embedding_size": 8}),
    "next item": ("SASRec", {"task": "next_item", **SMALL}),
    "next item, masked by chance": ("BERT4Rec", {"task": "next_item", **SMALL}),
    "RecBole's own protocol": ("BPR", {"embedding_size": 8}),
}


def interrupt_at(monkeypatch, validation: int) -> None:
    """Ctrl-C in that validation, from 1: after the training of its epoch, before anything of it is kept."""
    validate, seen = Trainer._valid_epoch, []

    def interrupted(*args, **kwargs):
        seen.append(True)
        if len(seen) == validation:
            raise KeyboardInterrupt
        return validate(*args, **kwargs)

    monkeypatch.setattr(Trainer, "_valid_epoch", interrupted)


def run(model: str, settings: dict, **changes) -> dict:
    return quick_start.run_recbole_llm(model, "toy", config_dict={**settings, **changes})


def run_folder(settings: dict) -> Path:
    (folder,) = (path.parent for path in Path(settings["output_dir"]).glob("*/last.safetensors"))
    return folder


@pytest.fixture
def settings(toy_settings, tmp_path):
    return {
        **toy_settings,
        "epochs": 4,
        "stopping_step": 10,
        "bootstrap_samples": 0,
        "train_batch_size": 64,
        "output_dir": str(tmp_path / "runs"),
    }


@pytest.mark.parametrize("case", MODELS)
def test_ends_as_if_it_had_not_been_interrupted(case, settings, tmp_path, monkeypatch, caplog):
    model, options = MODELS[case]
    settings = settings | options
    unbroken = run(model, settings, output_dir=str(tmp_path / "unbroken"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), caplog.at_level(logging.WARNING):
        interrupt_at(patch, 3)
        run(model, settings)
    folder = run_folder(settings)
    assert f"--resume={folder}" in caplog.text
    _, kept = load_checkpoint(folder / "last.safetensors")
    assert kept["epoch"] == 1 and len(kept["curve"]) == 2

    resumed = run(model, settings, resume=str(folder))
    assert Path(resumed["path"]).parent == folder
    assert resumed["metrics"] == unbroken["metrics"] and resumed["metrics"]["test"]
    assert resumed["seconds"]["fit"] > kept["seconds"] > 0
    folders = [Path(result["path"]).parent for result in (unbroken, resumed)]
    if options.get("task"):
        there, here = (np.load(folder / "test_rows.npz") for folder in folders)
        assert all(np.array_equal(there[name], here[name]) for name in there.files)
    # The best epoch may be an early one; the last one shows that everything went on as it would have.
    (there, _), (here, _) = (load_checkpoint(folder / "last.safetensors") for folder in folders)
    torch.testing.assert_close(here, there, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("changes", [{"epochs": 2}, {"epochs": 9, "stopping_step": 0, "learning_rate": 0.5}])
def test_a_training_that_had_ended_is_not_trained_further(settings, tmp_path, monkeypatch, changes):
    """Killed between training and test, by its last epoch or by early stopping."""
    settings = settings | MODELS["labelled rows"][1] | changes
    unbroken = run("DIN", settings, output_dir=str(tmp_path / "unbroken"))
    run("DIN", settings)
    folder = run_folder(settings)
    (folder / "result.json").unlink()
    _, kept = load_checkpoint(folder / "last.safetensors")
    assert kept["epoch"] < 8
    monkeypatch.setattr(Trainer, "_train_epoch", lambda *a, **k: pytest.fail("trained further"))
    resumed = run("DIN", settings, resume=True)
    assert resumed["metrics"] == unbroken["metrics"]


def test_metrics_of_a_finished_training_know_its_rows(settings):
    """RecBole's ``fit`` also tells the evaluator about the training rows, which some metrics count."""
    settings = (
        settings | MODELS["RecBole's own protocol"][1] | {"metrics": ["ItemCoverage", "AveragePopularity"]}
    )
    settings |= {"valid_metric": "ItemCoverage@10", "topk": [10]}
    whole = run("BPR", settings)
    (run_folder(settings) / "result.json").unlink()
    assert run("BPR", settings, resume=True)["metrics"] == whole["metrics"]


def test_a_comparison_goes_on_in_the_middle_of_a_model(settings, monkeypatch):
    settings.pop("output_dir")
    models, options = ["Pop", "DIN"], {**settings, **MODELS["labelled rows"][1], "bootstrap_samples": 20}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 4)  # Pop has one
        quick_start.compare_models(models, "toy", config_dict=options)
    trained, train = [], Trainer._train_epoch
    monkeypatch.setattr(
        Trainer,
        "_train_epoch",
        lambda self, data, epoch, **k: trained.append(epoch) or train(self, data, epoch, **k),
    )
    found = quick_start.compare_models(models, "toy", config_dict=options)
    assert trained == [2, 3] and not found["failed"]


def test_other_settings_and_damaged_files_are_refused(settings, monkeypatch):
    settings = settings | MODELS["labelled rows"][1]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 2)
        run("DIN", settings)
    with pytest.raises(CheckpointError, match="learning_rate: 0.001 there, 0.5 here"):
        run("DIN", settings, resume=True, learning_rate=0.5)
    file = run_folder(settings) / "last.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        run("DIN", settings, resume=True)


def test_other_rows_are_refused(settings, monkeypatch):
    settings = settings | MODELS["labelled rows"][1]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 2)
        run("DIN", settings)
    monkeypatch.setattr("recbole_llm.experiment.conventional.data_hash", lambda rows: "of other rows")
    with pytest.raises(CheckpointError, match="data: .* this run of other rows"):
        run("DIN", settings, resume=True)


def test_what_has_more_state_than_is_kept_starts_anew(settings, monkeypatch):
    """Never half a state: a model with attributes of its own (RecBole's ``other_parameter``), a trainer of its own."""
    monkeypatch.setattr(EpochTraining, "can_be_kept", property(lambda self: False))
    result = run("DIN", settings | MODELS["labelled rows"][1])
    assert not (Path(result["path"]).parent / "last.safetensors").exists()
    config = json.loads(Path(result["path"]).read_text())["config"]
    assert config["model"] == "DIN"
