"""The metrics against scikit-learn, with ties, and through RecBole's own Evaluator."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from formulas import logloss
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.evaluator import Collector, Evaluator
from recbole.evaluator import register as recbole_register
from recbole.evaluator.collector import DataStruct
from recbole.evaluator.register import Register
from recbole.utils import EvaluatorType
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from recbole_llm.evaluation.metrics import (
    UndefinedMetric,
    accuracy,
    auc,
    gauc,
    labeled_metrics,
    register_metrics,
    user_auc,
)


@pytest.fixture(autouse=True)
def registered():
    register_metrics()


def brute_gauc(users, scores, labels) -> float | None:
    total = weight = 0.0
    for user in set(users.tolist()):
        mine = users == user
        if 0 < labels[mine].sum() < mine.sum():
            total += labels[mine].sum() * roc_auc_score(labels[mine], scores[mine])
            weight += labels[mine].sum()
    return total / weight if weight else None


def config(*metrics: str) -> dict:
    return {"metrics": list(metrics), "metric_decimal_place": 12, "topk": [1]}


def struct(users, scores, labels) -> DataStruct:
    data = DataStruct()
    data.set("data.user", torch.as_tensor(users))
    data.set("rec.score", torch.as_tensor(scores))
    data.set("data.label", torch.as_tensor(labels, dtype=torch.float32))
    return data


# Few distinct scores, so that ties within and across classes and users are the rule.
row = st.tuples(st.integers(0, 6), st.integers(0, 5), st.booleans())


@settings(max_examples=200, deadline=None)
@given(st.lists(row, min_size=2, max_size=60))
def test_auc_and_gauc_equal_brute_force_under_ties(rows):
    users, scores, labels = (np.array(column) for column in zip(*rows, strict=True))
    scores, labels = scores / 5, labels.astype(int)
    if 0 < labels.sum() < labels.size:
        assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-14)
    else:
        with pytest.raises(UndefinedMetric, match="both classes"):
            auc(scores, labels)
    expected = brute_gauc(users, scores, labels)
    if expected is None:
        with pytest.raises(UndefinedMetric, match="both classes"):
            gauc(users, scores, labels)
    else:
        assert gauc(users, scores, labels) == pytest.approx(expected, abs=1e-14)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=2, max_size=40))
def test_logloss_and_accuracy_equal_sklearn(rows):
    p, labels = (np.array(column) for column in zip(*rows, strict=True))
    labels = labels.astype(int)
    clipped = np.clip(p, 1e-15, 1 - 1e-15)
    assert logloss(p, labels) == pytest.approx(log_loss(labels, clipped, labels=[0, 1]), rel=1e-12)
    assert accuracy(p, labels) == accuracy_score(labels, p > 0.5)


def test_auc_is_exact_where_float32_would_round():
    # 30,000 x 30,000 pairs: a float32 sum of pairs is off in the 8th digit, ours is a ratio of integers.
    generator = np.random.default_rng(0)
    scores = generator.normal(size=60_000).astype(np.float32).round(2)
    labels = np.arange(60_000) % 2
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores.astype(np.float64)), abs=1e-15)


def test_float32_scores_are_widened_before_the_logarithm():
    p = np.array([1e-7, 0.3], dtype=np.float32)
    assert logloss(p, np.array([0, 1])) == pytest.approx(
        -(np.log1p(-np.float64(p[0])) + np.log(np.float64(p[1]))) / 2, rel=1e-14
    )


def test_user_auc_gives_each_user_and_tells_who_has_one_class():
    users = np.array(["b", "a", "b", "a", "c", "b"])
    scores = np.array([0.1, 0.7, 0.9, 0.7, 0.4, 0.5])
    labels = np.array([0, 1, 1, 0, 1, 1])
    result = user_auc(users, scores, labels)
    assert result.users.tolist() == ["a", "b", "c"]
    np.testing.assert_array_equal(result.auc, [0.5, 1.0, np.nan])
    assert result.positives.tolist() == [1, 2, 1] and result.negatives.tolist() == [1, 1, 0]
    assert gauc(users, scores, labels) == pytest.approx((1 * 0.5 + 2 * 1.0) / 3)
    assert gauc(users.astype(object), scores, labels) == gauc(users, scores, labels)


def test_users_left_out_are_counted_and_logged(caplog):
    with caplog.at_level(logging.INFO, logger="recbole_llm"):
        gauc(np.array([1, 1, 2, 2, 2]), np.array([0.1, 0.2, 0.3, 0.4, 0.5]), np.array([0, 1, 1, 1, 1]))
    assert "1 of 2 users (3 of 5 samples) have only one class" in caplog.text


@pytest.mark.parametrize("metric", [auc, logloss, accuracy])
def test_bad_data_is_refused(metric):
    with pytest.raises(ValueError, match="1 of 2 scores are NaN, the first at sample 1"):
        metric(np.array([0.1, np.nan]), np.array([0, 1]))
    with pytest.raises(ValueError, match=r"labels must be 0 or 1.*`threshold`"):
        metric(np.array([0.1, 0.2]), np.array([0, 4]))
    with pytest.raises(ValueError, match="one length"):
        metric(np.array([0.1]), np.array([0, 1]))
    with pytest.raises(UndefinedMetric, match="no samples"):
        metric(np.array([]), np.array([]))


def test_users_of_another_length_are_refused():
    with pytest.raises(ValueError, match="there are 2 samples"):
        gauc(np.array([1]), np.array([0.1, 0.2]), np.array([0, 1]))


@pytest.mark.parametrize("metric", [logloss, accuracy])
def test_scores_that_are_no_probabilities_have_no_logloss_or_accuracy(metric):
    with pytest.raises(UndefinedMetric, match=r"range from -1 to 3.*sigmoid"):
        metric(np.array([-1.0, 3.0]), np.array([0, 1]))


def test_registering_twice_changes_nothing_and_stays_in_place():
    before = dict(recbole_register.metrics_dict)
    from recbole.config.configurator import metric_types  # what Config looks names up in

    register_metrics()
    assert recbole_register.metrics_dict == before
    assert metric_types["acc"] is metric_types["labeledgauc"] is EvaluatorType.VALUE
    assert (
        recbole_register.metrics_dict["gauc"].__module__ == "recbole.evaluator.metrics"
    )  # theirs is untouched
    assert "acc" not in recbole_register.smaller_metrics


def test_all_four_through_recbole_evaluator_equal_sklearn():
    generator = np.random.default_rng(1)
    users, labels = generator.integers(0, 20, 400), generator.integers(0, 2, 400)
    scores = generator.random(400).round(2).astype(np.float32)
    chosen = config("AUC", "LogLoss", "ACC", "LabeledGAUC")
    assert Register(chosen).need("data.user")
    result = Evaluator(chosen).evaluate(struct(users, scores, labels))
    wide = scores.astype(np.float64)
    assert list(result) == ["auc", "logloss", "acc", "gauc"]
    assert result["auc"] == pytest.approx(roc_auc_score(labels, wide), abs=1e-11)
    assert result["logloss"] == pytest.approx(log_loss(labels, np.clip(wide, 1e-15, 1 - 1e-15)), abs=1e-11)
    assert result["acc"] == pytest.approx(accuracy_score(labels, wide > 0.5), abs=1e-11)
    assert result["gauc"] == pytest.approx(brute_gauc(users, wide, labels), abs=1e-11)
    # RecBole's AUC and LogLoss and ours are the same numbers, so tables and evaluator agree.
    assert result["auc"] == pytest.approx(auc(scores, labels), abs=1e-11)
    assert result["logloss"] == pytest.approx(logloss(scores, labels), abs=1e-11)


def test_undefined_metrics_are_nan_with_a_warning_in_recbole(caplog):
    result = Evaluator(config("ACC", "LabeledGAUC")).evaluate(struct([1, 1], [0.5, 7.0], [1, 1]))
    assert np.isnan(result["acc"]) and np.isnan(result["gauc"])
    assert "no" not in result and "reported as NaN" in caplog.text


def test_labeled_gauc_with_the_stock_collector_says_what_to_do():
    data = DataStruct()
    data.set("rec.score", torch.tensor([0.1]))
    data.set("data.label", torch.tensor([1.0]))
    assert not hasattr(Collector, "rows")
    with pytest.raises(ValueError, match="RowCollector"):
        Evaluator(config("LabeledGAUC")).evaluate(data)


def test_labeled_metrics_renames_gauc_only():
    assert labeled_metrics(["AUC", "gauc", "ACC"]) == ["AUC", "LabeledGAUC", "ACC"]
