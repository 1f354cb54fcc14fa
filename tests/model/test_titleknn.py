"""TitleKNN against its equation, written out in loops; runs of both tasks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import TEXT

from recbole_llm.config.configurator import Config
from recbole_llm.data.create import create_dataset
from recbole_llm.experiment.conventional import llm_arguments
from recbole_llm.model.titleknn import TitleKNN
from recbole_llm.quick_start import run_recbole_llm

K = 6


@pytest.fixture
def settings(toy_settings):
    return {**toy_settings, "id_history_length": K, "bootstrap_samples": 10, "device": "cpu"}


def rows_and_model(settings: dict, **given):
    config = Config("TitleKNN", "toy", config_dict={**settings, **given})
    train = create_dataset(config).build()[0]
    vectors = np.random.default_rng(0).normal(size=(train.item_num, 5)) + 3  # far from centred
    return train, TitleKNN(config, train, item_vectors=vectors), vectors


def similarity(train, vectors: np.ndarray, row: int, item: int, labelled: bool, centered: bool) -> float:
    v = vectors - vectors[1:].mean(axis=0) if centered else vectors
    user, end = (int(train.inter_feat[field][row]) for field in ("user_id", "history_end"))
    total, history = 0.0, train.history
    positions = range(max(int(history.user_start[user]), end - K), end)
    for position in positions:
        other = history.item_ids[position]
        cosine = v[other] @ v[item] / np.linalg.norm(v[other]) / np.linalg.norm(v[item])
        sign = (1 if history.ratings[position] >= 4 else -1) if labelled else 1
        total += sign * cosine
    return total / len(positions)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("task", ["next_item", "ctr"])
def test_scores_are_the_equation(settings, task, centered):
    train, model, vectors = rows_and_model(settings, task=task, center_vectors=centered)
    rows = [0, 7, 300, 600]
    batch = train[rows]
    assert (batch["item_id_list"][0] == 0).any() and (batch["item_id_list"][2] != 0).all()
    exact, single, every = model.forward(batch), model.predict(batch), model.full_sort_predict(batch)
    assert every.shape == (4, train.item_num)
    for place, row in enumerate(rows):
        for item in (int(batch["item_id"][place]), 1, 17):
            s = similarity(train, vectors, row, item, task == "ctr", centered)
            assert float(every[place, item]) == pytest.approx((1 + s) / 2 if task == "ctr" else s, abs=1e-6)
        s = similarity(train, vectors, row, int(batch["item_id"][place]), task == "ctr", centered)
        assert float(exact[place]) == pytest.approx(s, abs=1e-12)
    own = every.gather(1, batch["item_id"][:, None]).squeeze(1)
    torch.testing.assert_close(single, own, rtol=0, atol=1e-6)


def test_a_row_without_history_has_no_similarity(settings):
    train, model, _ = rows_and_model(settings)
    batch = train[[0]]
    batch["item_id_list"] = torch.zeros_like(batch["item_id_list"])
    assert model.predict(batch).tolist() == [0.0]


@pytest.mark.parametrize("options", [{}, {"eval_mode": "full"}, {"task": "ctr"}], ids=str)
def test_run(settings, options):
    result = run_recbole_llm("TitleKNN", "toy", config_dict={**settings, **options})
    saved = json.loads(Path(result["path"]).read_text())
    metric = "auc" if options.get("task") == "ctr" else "ndcg@10"
    assert 0 < saved["metrics"]["test"][metric] <= 1 and 0 < saved["metrics"]["valid"][metric] <= 1
    assert saved["backbone"]["name"] == "tiny" and len(saved["backbone"]["sha256"]) == 64
    assert saved["task"] == options.get("task", "next_item")
    with np.load(Path(result["path"]).with_name("test_rows.npz")) as file:
        if metric == "auc":
            assert ((file["model_score"] > 0) & (file["model_score"] < 1)).all()
            assert len(np.unique(file["model_score"])) > 70
        else:
            found = file["candidates"]
            assert (set(found) == {50}) if options else (found.shape == (len(file["user"]), 20))


def test_titles_tell_taste_where_the_data_says_so(settings):
    """Users of the toy data like genres, and vectors that are nothing but the genre find what they like."""
    config = Config("TitleKNN", "toy", config_dict={**settings, "task": "ctr", "id_history_length": 20})
    _, _, test = create_dataset(config).build()
    genres = test.item_text().genres
    names = sorted(set(genres[1:]))
    vectors = np.array([[genre == name for name in names] for genre in genres], dtype=float)
    batch = test[np.arange(len(test))]
    score, label = TitleKNN(config, test, item_vectors=vectors).predict(batch), batch["label"].bool()
    assert (score[label][:, None] > score[~label]).double().mean() > 0.7


def test_vectors_are_computed_once_for_weights_and_texts(settings, monkeypatch):
    config = Config("TitleKNN", "toy", config_dict=settings)
    dataset = create_dataset(config)
    dataset.build()
    first = llm_arguments(config, dataset)[0]["item_vectors"]
    monkeypatch.setattr(
        "recbole_llm.experiment.assembly.mean_pooled_vectors", lambda *a, **k: pytest.fail("again")
    )
    np.testing.assert_array_equal(llm_arguments(config, dataset)[0]["item_vectors"], first)
    assert first.shape[0] == dataset.item_num and np.isfinite(first).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": None}, "TitleKNN needs task: next_item or ctr"),
        ({"center_vectors": 3}, "center_vectors=3 .*expected true or false"),
        ({"lora_r": 4}, "lora_r=4 .*TitleKNN does not read this"),
        ({"centre_vectors": True}, "did you mean center_vectors"),
        ({"text": {**TEXT, "title": None}}, "TitleKNN reads the titles of items"),
        ({"dtype": "float16"}, "dtype='float16' .* needs a CUDA device"),
        ({"backbone": "/nowhere/model"}, "/nowhere/model"),
    ],
)
def test_bad_input_gets_one_clear_error(settings, given, message):
    with pytest.raises((ValueError, OSError), match=message):
        run_recbole_llm("TitleKNN", "toy", config_dict={**settings, **given})
