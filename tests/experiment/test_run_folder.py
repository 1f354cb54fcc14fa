"""Which run ``resume`` finds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from recbole_llm.config.configurator import Config
from recbole_llm.experiment.run_folder import find_run
from recbole_llm.trainer.checkpoint import CheckpointError


def interrupted(root: Path, model: str, dataset: str, age: int) -> Path:
    """The folder of a run that was interrupted so many seconds ago."""
    folder = root / f"{model}-{dataset}-20260101-000000"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model": model, "dataset": dataset}))
    last = folder / "last.safetensors"
    last.write_bytes(b"")
    os.utime(last, (10**9 - age, 10**9 - age))
    return folder


def test_the_newest_run_of_exactly_this_dataset_is_resumed(tmp_path, toy_settings):
    mine = interrupted(tmp_path, "TALLRec", "toy", age=100)
    interrupted(tmp_path, "TALLRec", "toy-small", age=10)  # its name begins alike, and it is newer
    interrupted(tmp_path, "ReLLa", "toy", age=5)
    config = Config("TALLRec", "toy", config_dict={**toy_settings, "resume": True})
    assert find_run(tmp_path, config) == mine
    newer = tmp_path / "renamed by its owner"
    interrupted(tmp_path / "other", "TALLRec", "toy", age=1).rename(newer)
    assert find_run(tmp_path, config) == newer


def test_no_run_of_this_dataset_is_said(tmp_path, toy_settings):
    interrupted(tmp_path, "TALLRec", "toy-small", age=10)
    broken = interrupted(tmp_path, "TALLRec", "toy", age=10)
    (broken / "config.json").write_text("{")
    config = Config("TALLRec", "toy", config_dict={**toy_settings, "resume": True})
    with pytest.raises(CheckpointError, match="no run of TALLRec on toy with a checkpoint"):
        find_run(tmp_path, config)
