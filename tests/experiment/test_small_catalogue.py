"""Next-item data with fewer items than ``num_negatives`` and ``topk`` ask for."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from synthetic import write_dataset

from recbole_llm.config.configurator import Config
from recbole_llm.data.candidates import most_negatives
from recbole_llm.experiment.conventional import ConventionalExperiment
from recbole_llm.experiment.splits import prepare_splits
from recbole_llm.quick_start import compare_models, load_data_and_model, run_recbole_llm

ITEMS, LENGTH = 14, 9
LENS = {"epochs": 1, "hidden_size": 8, "inner_size": 8, "n_heads": 1, "n_layers": 1}


@pytest.fixture
def settings(toy_settings, tmp_path) -> dict:
    """Every user has met 9 of 14 items, so that 5 can be negatives of a test sample."""
    return {
        **toy_settings,
        "data_path": str(write_dataset(tmp_path / "small", n_users=8, n_items=ITEMS, length=LENGTH)),
        "bootstrap_samples": 0,
        "few_shot": 8,
        "lens_config": LENS,
        "zero_shot": False,
        "compare_with": None,
    }


def columns(result: dict) -> dict[str, np.ndarray]:
    with np.load(Path(result["path"]).with_name("test_rows.npz"), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def test_there_are_as_many_negatives_as_every_sample_can_have_for_every_model(settings, caplog):
    ours = run_recbole_llm("iLoRA", "toy", config_dict=settings)
    warnings = [r.getMessage() for r in caplog.records if r.getMessage().startswith("num_negatives:")]
    assert len(warnings) == 1 and "5 negatives per sample instead of 19: of the 14 items" in warnings[0]
    told = json.loads(Path(ours["path"]).read_text())["candidate_items"]["negatives"]
    assert (told["asked"], told["used"]) == (19, 5) and told["reason"] in warnings[0]
    theirs = run_recbole_llm(
        "Pop",
        "toy",
        config_dict={key: settings[key] for key in ("data_path", "cache_dir", "bootstrap_samples")}
        | {"task": "next_item"},
    )
    mine, others = columns(ours), columns(theirs)
    assert mine["candidates"].shape[1] == 6
    np.testing.assert_array_equal(mine["candidates"], others["candidates"])
    assert ours["rows"]["candidates"]["max"] == 6
    loaded = load_data_and_model(Path(ours["path"]).parent)
    assert loaded.candidates["test"].items.shape[1] == 6


def test_a_number_that_is_possible_stays(settings, caplog):
    splits = prepare_splits(Config("iLoRA", "toy", config_dict={**settings, "num_negatives": 5}))
    drawable = splits.dataset.ranked_items
    assert most_negatives(splits.full_test, drawable, 5) == (5, None)
    most, user = most_negatives(splits.full_test, drawable, 6)
    assert most == 5 and user is not None
    seen = splits.full_test.history.item_ids[splits.full_test.history.user_start[user] :][:LENGTH]
    assert drawable.sum() - len(np.unique(seen)) == 5


def test_a_sample_without_any_negative_is_refused_before_the_lens_is_trained(settings, monkeypatch, tmp_path):
    monkeypatch.setattr("recbole_llm.lens.fit._train", lambda *_: pytest.fail("the lens is trained"))
    data = write_dataset(tmp_path / "tiny", n_users=6, n_items=LENGTH, length=LENGTH)
    with pytest.raises(ValueError, match="has met all, so.*set eval_mode: full"):
        run_recbole_llm("iLoRA", "toy", config_dict={**settings, "data_path": str(data)})


@pytest.mark.parametrize("model", ["iLoRA", "SASRec"])
def test_topk_is_capped_at_the_catalogue_and_says_so(model, settings, caplog):
    own = settings if model == "iLoRA" else {k: settings[k] for k in ("data_path", "bootstrap_samples")}
    given = {**own, "task": "next_item", "eval_mode": "full", "topk": [5, 10, 50], "valid_metric": "NDCG@50"}
    result = run_recbole_llm(model, "toy", config_dict={**given, "epochs": 1})
    assert (
        "topk: [5, 10, 50] becomes [5, 10, 14], as toy has 14 items to rank; valid_metric: NDCG@14"
        in caplog.text
    )
    assert result["topk"] == {"asked": [5, 10, 50], "used": [5, 10, 14], "valid_metric": "NDCG@14"}
    assert result["metrics"]["test"]["hit@14"] == 1 and "hit@50" not in result["metrics"]["test"]
    assert result["config"]["topk"] == [5, 10, 50]  # the same command resumes it


def test_a_search_finds_the_capped_metric(settings, tmp_path):
    (tmp_path / "space.hyper").write_text("learning_rate choice [0.1, 0.01]\n")
    given = {k: settings[k] for k in ("data_path", "cache_dir", "bootstrap_samples", "show_progress")}
    given |= {"task": "next_item", "eval_mode": "full", "topk": [50], "valid_metric": "HIT@50", "epochs": 1}
    found = compare_models(
        ["BPR", "Pop"], "toy", config_dict={**given, "search": str(tmp_path / "space.hyper")}
    )
    assert not found["failed"] and len(found["models"]) == 2


def test_negatives_that_recbole_draws_are_called_what_they_are(settings, caplog, tmp_path):
    data = Path(settings["data_path"]) / "toy" / "toy.item"
    with data.open("a") as file:
        file.write("".join(f"{item}\tNobody {item}\t1999\tDrama\n" for item in range(100, 140)))
    given = {k: settings[k] for k in ("data_path", "bootstrap_samples", "show_progress")}
    parts = ConventionalExperiment.assemble(
        Config("BPR", "toy", config_dict={**given, "task": "next_item", "eval_mode": "uni9"})
    )
    assert "negatives are drawn from all 54 items, 40 of which nobody met" in caplog.text
    assert parts.dataset.facts()["candidate_items"] == {"which": "all", "items": 54, "catalogue": 54}
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        ConventionalExperiment.assemble(Config("BPR", "toy", config_dict={**given, "task": "next_item"}))
    assert "nobody met" not in caplog.text
