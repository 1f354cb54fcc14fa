"""A finished run is not read with other titles, another template or other words."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from recbole_llm.quick_start import load_data_and_model, run_recbole_llm
from recbole_llm.trainer.checkpoint import CheckpointError
from recbole_llm.utils.yaml_files import properties_dir


def test_what_changed_is_named(toy_settings, toy_data, tmp_path):
    data, prompt = tmp_path / "data", tmp_path / "mine.yaml"
    shutil.copytree(toy_data, data)
    shutil.copy(properties_dir() / "prompt" / "ctr.yaml", prompt)
    keys = {
        "lens": None,
        "layout": "prompt",
        "few_shot": 8,
        "eval_rows": 8,
        "zero_shot": False,
        "bootstrap_samples": 0,
        "device": "cpu",
    }
    keys |= {"prompt": str(prompt), "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]}}
    result = run_recbole_llm("TALLRec", "toy", config_dict={**toy_settings, **keys, "data_path": str(data)})
    assert result["data"]["dropped"] == {} and result["candidate_items"]["which"] == "seen"
    folder = Path(result["path"]).parent
    load_data_and_model(folder, device="cpu")

    with pytest.raises(CheckpointError, match="another template and another profiles"):
        load_data_and_model(folder, device="cpu", text={**toy_settings["text"], "noun": "song"})
    old = prompt.read_text()
    prompt.write_text(old.replace("Next {noun}", "Another {noun}"))
    with pytest.raises(CheckpointError, match="was trained with another template than"):
        load_data_and_model(folder, device="cpu")
    prompt.write_text(old)
    item = data / "toy" / "toy.item"
    item.write_text(item.read_text().replace("\tRiver", "\tLake"))
    with pytest.raises(CheckpointError, match="titles"):
        load_data_and_model(folder, device="cpu")


@pytest.mark.parametrize("model", ["TitleKNN", "MoRec"])
def test_titles_belong_to_what_is_made_of_their_vectors(model, toy_settings, toy_data, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(toy_data, data)
    keys = {
        "task": "next_item",
        "eval_rows": 8,
        "bootstrap_samples": 0,
        "device": "cpu",
        "data_path": str(data),
    }
    keys |= {"epochs": 1, "num_negatives": 3}
    settings = {**toy_settings, **keys, "output_dir": str(tmp_path / "out")}
    result = run_recbole_llm(model, "toy", config_dict=settings)
    folder = Path(result["path"]).parent
    load_data_and_model(folder, device="cpu")
    item = data / "toy" / "toy.item"
    item.write_text(item.read_text().replace("\tRiver", "\tLake"))
    with pytest.raises(CheckpointError, match="another titles than"):
        load_data_and_model(folder, device="cpu")
    with pytest.raises(CheckpointError, match="titles: checkpoint"):
        run_recbole_llm(model, "toy", config_dict={**settings, "resume": str(folder)})
