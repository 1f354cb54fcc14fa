"""The reference that reads a user's earlier ratings and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from recbole_llm.data.dataset import HISTORY_END
from recbole_llm.data.history import HistoryIndex
from recbole_llm.experiment.past_ratings import LENGTHS, averages, past_ratings_scores
from recbole_llm.experiment.table import result_table
from recbole_llm.quick_start import load_data_and_model, run_recbole_llm


def history_of(ratings: list[list[float]], ties: str = "order") -> HistoryIndex:
    """One list of ratings per user; user 0 is padding, and two neighbours each have the same time."""
    sizes = [len(own) for own in ratings]
    n = sum(sizes)
    return HistoryIndex(
        item_ids=np.ones(n, dtype=np.int64),
        labels=None,
        timestamps=np.concatenate([np.arange(size) // 2 for size in sizes]).astype(float),
        ratings=np.concatenate(ratings).astype(np.float32),
        user_start=np.concatenate([[0, 0], np.cumsum(sizes)]),
        ties=ties,
    )


@settings(deadline=None)
@given(
    ratings=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=70), min_size=1, max_size=4),
    ties=st.sampled_from(["order", "strict"]),
)
def test_averages_are_those_of_a_loop(ratings, ties):
    history = history_of(ratings, ties)
    low, high = min(map(min, ratings)), max(map(max, ratings))
    users, ends, expected, start = [], [], [], 0
    for user, own in enumerate(ratings, 1):
        for place in range(len(own)):
            before = own[: place - place % 2] if ties == "strict" else own[:place]
            line = []
            for length in LENGTHS:
                part = before if length is None else before[-length:]
                line.append((np.mean(part) - low) / ((high - low) or 1) if part else 0.5)
            users.append(user)
            ends.append(start + place)
            expected.append(line)
        start += len(own)
    np.testing.assert_allclose(averages(history, np.array(users), np.array(ends)), expected, atol=1e-9)


def test_own_and_later_ratings_are_not_read():
    history = history_of([[3, 5, 1, 4], [2, 2, 5]])
    before = averages(history, np.array([1]), np.array([2]))
    history.ratings[2:] = [1.0, 5.0, 1.0, 5.0, 3.0]
    assert np.array_equal(averages(history, np.array([1]), np.array([2])), before)
    history.ratings[1] = 1.0
    assert not np.array_equal(averages(history, np.array([1]), np.array([2])), before)


@pytest.fixture
def run(toy_settings):
    """``run(**options)``: the loaded run, its saved columns in the order of ``parts.test``, and its result."""

    def made(**options):
        config = {**toy_settings, "device": "cpu", "layout": "prompt", "epochs": 1, "bootstrap_samples": 20}
        result = run_recbole_llm(
            "TALLRec", "toy", config_dict={**config, "few_shot": 24, "eval_rows": 20, **options}
        )
        parts = load_data_and_model(result["path"].removesuffix("/result.json"))
        with np.load(Path(result["path"]).with_name("test_rows.npz")) as file:
            rows = dict(file)
        place = {row: number for number, row in enumerate(rows["row_id"].tolist())}
        order = [place[row] for row in parts.test.inter_feat["row_id"].tolist()]
        return parts, rows["past_ratings_score"][order], result

    return made


def features(parts, samples) -> np.ndarray:
    rows = samples.inter_feat
    return averages(parts.dataset.history, rows["user_id"].numpy(), rows[HISTORY_END].numpy())


@pytest.mark.parametrize("layout", ["prompt", "stream"])
def test_a_run_has_it_beside_its_model(run, layout):
    parts, column, result = run(layout=layout)
    assert result["names"]["past_ratings"] == "past ratings"
    assert 0 < result["intervals"]["models"]["past_ratings"]["auc"]["value"] < 1
    mine, theirs = features(parts, parts.train), features(parts, parts.test)
    mean, spread = mine.mean(0), mine.std(0)
    spread[spread == 0] = 1
    fitted = LogisticRegression().fit((mine - mean) / spread, parts.train.inter_feat["label"].numpy())
    expected = expit((theirs - mean) / spread @ fitted.coef_[0] + fitted.intercept_[0])
    np.testing.assert_allclose(column, expected, atol=1e-6)


def test_without_labels_it_is_the_average_of_the_last_ten_and_never_sure(run):
    parts, column, _ = run(few_shot=0)
    np.testing.assert_allclose(column, (10 * features(parts, parts.test)[:, 2] + 1) / 12, atol=1e-12)
    assert 0 < column.min() and column.max() < 1  # at 0 or 1 a single sample decides LogLoss
    assert np.array_equal(past_ratings_scores(parts.train, parts.test), column)


def test_order_and_repetition_of_the_training_samples_do_not_matter(run):
    parts, _, _ = run()
    expected = past_ratings_scores(parts.train, parts.test)
    others = parts.train.mixed(), parts.train.subset(np.arange(len(parts.train))[::-1].copy())
    for train in others:  # mixed_training shows each sample twice; else two models would have two references
        assert np.array_equal(past_ratings_scores(train, parts.test), expected)


@pytest.mark.parametrize(
    "options", [{}, {"lens": "DIN", "lens_config": {"epochs": 1}, "lens_residual": True}]
)
def test_the_table_says_what_the_llm_has_over_it(run, options):
    _, _, result = run(eval_rows=None, **options)
    alone = "llm" if options else "model"
    difference = result["intervals"]["differences"][f"{alone} - past_ratings"]
    values = result["intervals"]["models"]
    for metric in ("auc", "gauc"):
        gain = values[alone][metric]["value"] - values["past_ratings"][metric]["value"]
        assert difference[metric]["value"] == pytest.approx(gain, abs=1e-12)
    (line,) = (line for line in result_table(result).split("\n") if " - past ratings: AUC " in line)
    assert line.startswith(f"{result['names'][alone]} - past ratings: AUC {difference['auc']['value']:+.4f}")
    assert f"GAUC {difference['gauc']['value']:+.4f}" in line
