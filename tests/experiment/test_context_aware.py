"""Models that learn from labels, where there are none: in the next-item task, and on data without them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recbole_llm.config.configurator import Config
from recbole_llm.experiment.conventional import ConventionalExperiment
from recbole_llm.quick_start import run_recbole_llm

SMALL = {"embedding_size": 4, "mlp_hidden_size": [8], "epochs": 1, "num_negatives": 3, "bootstrap_samples": 0}


@pytest.fixture
def settings(toy_data, tmp_cwd) -> dict:
    return {
        **SMALL,
        "data_path": str(toy_data),
        "cache_dir": str(tmp_cwd / "cache"),
        "task": "next_item",
        "device": "cpu",
        "eval_rows": 20,
        "show_progress": False,
    }


@pytest.mark.parametrize("model", ["DeepFM", "FM", "AutoInt", "WideDeep", "xDeepFM", "DSSM", "DIN"])
def test_they_rank_the_stored_candidates(model, settings):
    known = SMALL.keys() - {"epochs", "num_negatives", "bootstrap_samples"}
    if model in ("FM", "DSSM", "AutoInt", "xDeepFM"):
        settings = {
            key: value for key, value in settings.items() if key not in known or key == "embedding_size"
        }
    result = run_recbole_llm(model, "toy", config_dict=settings)
    with np.load(Path(result["path"]).with_name("test_rows.npz")) as rows:
        assert rows["candidate_scores"].shape == (20, 4)
        assert len(np.unique(rows["candidate_scores"])) > 20


def test_they_learn_targets_against_sampled_items(settings):
    parts = ConventionalExperiment.assemble(Config("DeepFM", "toy", config_dict=settings))
    batch = next(iter(parts.train_data))
    labels, items, users = batch["label"], batch["item_id"], batch["user_id"]
    half = len(labels) // 2
    assert (labels[:half] == 1).all() and (labels[half:] == 0).all()
    assert (users[:half] == users[half:]).all() and (items[:half] != items[half:]).all()
    given = {**settings, "train_neg_sample_args": {"distribution": "uniform", "sample_num": 3}}
    batch = next(iter(ConventionalExperiment.assemble(Config("DeepFM", "toy", config_dict=given)).train_data))
    assert batch["label"].mean() == 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"DeepFM learns from labels, and toy has no column 'label' .*threshold, e\.g\. \{rating: 4\}"),
        (
            {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}},
            "DeepFM is evaluated on labels",
        ),
        (
            {"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"}},
            r"eval_args=.* with metrics=.*value-based",
        ),
    ],
)
def test_without_labels_they_are_refused_before_training(options, message, settings, monkeypatch):
    monkeypatch.setattr("recbole.trainer.Trainer._train_epoch", lambda *_, **__: pytest.fail("it is trained"))
    own = {key: settings[key] for key in ("data_path", "epochs", "device", "show_progress")}
    with pytest.raises(ValueError, match=message):
        run_recbole_llm("DeepFM", "toy", config_dict={**own, **options})
    result_of = {**own, **options, "threshold": {"rating": 4}}
    if not options:
        monkeypatch.undo()
        assert run_recbole_llm("DeepFM", "toy", config_dict=result_of)["metrics"]["test"]
