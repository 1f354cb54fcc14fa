"""The bootstrap over users: exact weights, paired draws, honest intervals."""

from __future__ import annotations

import numpy as np
import pytest
from formulas import logloss, rank_metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from recbole_llm.evaluation import bootstrap as module
from recbole_llm.evaluation.bootstrap import bootstrap, bootstrap_ranks
from recbole_llm.evaluation.metrics import accuracy, auc, gauc, user_codes

VALUES = {
    "auc": lambda u, s, y: auc(s, y),
    "logloss": lambda u, s, y: logloss(s, y),
    "acc": lambda u, s, y: accuracy(s, y),
    "gauc": gauc,
}


def data(n_users=40, per_user=12, seed=0, shift=1.0):
    generator = np.random.default_rng(seed)
    users = np.repeat(np.arange(n_users), per_user)
    labels = generator.integers(0, 2, users.size)
    logit = shift * (labels - 0.5) + generator.normal(size=n_users)[users] + generator.normal(size=users.size)
    return users, labels, np.round(1 / (1 + np.exp(-logit)), 2)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.booleans()), min_size=1, max_size=40),
    st.lists(st.integers(0, 3), min_size=5, max_size=5),
)
def test_weighted_auc_equals_sklearn_sample_weight(rows, weights):
    users, scores, labels = (np.array(column) for column in zip(*rows, strict=True))
    names, codes = user_codes(users, users.size)
    weights = np.array(weights, dtype=np.float64)[: names.size]
    per_row = weights[codes]
    if len(set(labels)) == 2:
        value = module.labelled_statistic("auc", codes, scores / 4, labels)(weights[None])[0]
        if per_row[labels].sum() and per_row[~labels].sum():
            assert value == pytest.approx(roc_auc_score(labels, scores, sample_weight=per_row), abs=1e-14)
        else:
            assert np.isnan(value)


@pytest.mark.parametrize("metric", VALUES)
def test_a_replicate_equals_the_metric_on_the_samples_drawn(metric):
    users, labels, scores = data()
    weights = np.bincount(np.random.default_rng(3).integers(0, 40, 40), minlength=40)
    rows = np.concatenate([np.flatnonzero(users == u) for u in range(40) for _ in range(weights[u])])
    copy = np.concatenate([[c] * 12 for c in range(weights.sum())])  # a user drawn twice counts as two users
    value = module.labelled_statistic(metric, users, scores, labels == 1)(weights[None].astype(np.float64))[0]
    assert value == pytest.approx(VALUES[metric](copy, scores[rows], labels[rows]), abs=1e-12)


def test_values_are_those_of_the_plain_metrics():
    users, labels, scores = data()
    result = bootstrap(users, labels, {"m": scores}, n=50)
    for metric, value in VALUES.items():
        assert result.values["m"][metric] == value(users, scores, labels)
        interval = result.interval("m", metric)
        assert interval.low < interval.value < interval.high and interval.reason is None


def test_a_model_against_itself_is_exactly_zero():
    users, labels, scores = data()
    result = bootstrap(users, labels, {"a": scores, "b": scores.copy()}, n=100)
    for metric in VALUES:
        difference = result.difference("a", "b", metric)
        assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0)


def test_draws_are_shared_seeded_and_independent_of_order_and_of_other_models():
    users, labels, scores = data()
    other = data(seed=9)[2]
    both = bootstrap(users, labels, {"a": scores, "b": other}, n=60, seed=5)
    alone = bootstrap(users, labels, {"b": other}, n=60, seed=5)
    order = np.random.default_rng(0).permutation(users.size)
    moved = bootstrap(users[order], labels[order], {"b": other[order]}, n=60, seed=5)
    for metric in VALUES:
        np.testing.assert_array_equal(both.replicates["b"][metric], alone.replicates["b"][metric])
        np.testing.assert_allclose(moved.replicates["b"][metric], alone.replicates["b"][metric], rtol=1e-12)
    reseeded = bootstrap(users, labels, {"b": other}, n=60, seed=6)
    assert (reseeded.replicates["b"]["auc"] != alone.replicates["b"]["auc"]).any()


def test_chunks_do_not_change_the_draws(monkeypatch):
    users, labels, scores = data()
    whole = bootstrap(users, labels, {"m": scores}, n=45)
    monkeypatch.setattr(module, "_CHUNK_WEIGHTS", 400)
    pieces = bootstrap(users, labels, {"m": scores}, n=45)
    for metric in VALUES:
        np.testing.assert_allclose(whole.replicates["m"][metric], pieces.replicates["m"][metric], rtol=1e-13)


def test_a_planted_difference_is_found_and_pairing_narrows_it():
    users, labels, scores = data(n_users=150)
    generator = np.random.default_rng(1)
    logit = np.log((scores + 0.01) / (1.01 - scores))
    better = 1 / (1 + np.exp(-(logit + 0.3 * (labels - 0.5))))
    noise = 1 / (1 + np.exp(-(logit + 0.01 * generator.normal(size=users.size))))
    result = bootstrap(users, labels, {"base": scores, "better": better, "same": noise}, n=400)
    found, nothing = result.difference("better", "base", "auc"), result.difference("same", "base", "auc")
    assert 0 < found.low < found.value < found.high
    assert nothing.low < 0 < nothing.high
    own = result.interval("base", "auc")
    assert found.high - found.low < 0.3 * (own.high - own.low)
    assert result.difference("better", "base", "logloss").high < 0


def test_intervals_cover_the_truth_by_user_and_not_by_row():
    # Every user's 8 samples are identical: there are 60 observations, not 480.
    # AUC of N(1, 1) against N(0, 1) is Phi(1 / sqrt 2).
    truth = 0.7602499389065233
    generator = np.random.default_rng(7)
    by_user = by_row = 0
    runs = 100
    for run in range(runs):
        label = np.arange(60) % 2
        score = generator.normal(size=60) + label
        users, labels, scores = np.repeat(np.arange(60), 8), np.repeat(label, 8), np.repeat(score, 8)
        one = bootstrap(users, labels, {"m": scores}, ["auc"], n=200, seed=run).interval("m", "auc")
        two = bootstrap(np.arange(480), labels, {"m": scores}, ["auc"], n=200, seed=run).interval("m", "auc")
        by_user += one.low <= truth <= one.high
        by_row += two.low <= truth <= two.high
    assert 0.89 <= by_user / runs <= 0.99
    assert by_row / runs < 0.75


def test_too_few_users_give_no_interval_but_a_reason():
    users, labels, scores = data(n_users=9)
    result = bootstrap(users, labels, {"a": scores, "b": scores}, n=100)
    for found in (result.interval("a", "auc"), result.difference("a", "b", "auc")):
        assert found.low is found.high is None and "only 9 users" in found.reason
    assert result.interval("a", "auc").value == auc(scores, labels)


def test_gauc_counts_only_users_with_both_classes():
    users, labels, scores = data(n_users=40)
    labels[users >= 8] = 1
    result = bootstrap(users, labels, {"m": scores}, n=100)
    assert "only 8 users with both classes" in result.interval("m", "gauc").reason
    assert result.interval("m", "acc").low is not None


def test_a_metric_undefined_in_many_draws_gives_no_interval():
    users, labels, scores = data(n_users=30)
    labels[:] = 1
    labels[users == 3] = 0  # a third of the draws miss user 3
    found = bootstrap(users, labels, {"m": scores}, ["auc"], n=200).interval("m", "auc")
    assert found.value is not None and found.low is None and "undefined in" in found.reason


def test_one_class_and_raw_scores_are_none_with_a_reason():
    users, labels, scores = data()
    result = bootstrap(users, np.ones_like(labels), {"m": scores}, n=50)
    assert result.interval("m", "auc").value is None and "both classes" in result.interval("m", "auc").reason
    raw = bootstrap(users, labels, {"raw": scores * 9 - 4, "p": scores}, n=50)
    assert raw.interval("raw", "logloss").value is None and "sigmoid" in raw.interval("raw", "logloss").reason
    assert raw.interval("raw", "auc").value == raw.interval("p", "auc").value
    difference = raw.difference("p", "raw", "acc")
    assert difference.value is None and difference.reason.startswith("raw: ")


def test_too_few_samples_give_no_interval():
    users, labels, scores = data()
    for n in (0, 20):
        found = bootstrap(users, labels, {"m": scores}, n=n).interval("m", "auc")
        assert found.value is not None and found.low is None and f"{n} samples" in found.reason


def test_wrong_arguments_are_named():
    users, labels, scores = data()
    with pytest.raises(ValueError, match="ndcg"):
        bootstrap(users, labels, {"m": scores}, ["ndcg"])
    with pytest.raises(ValueError, match="n=-1"):
        bootstrap(users, labels, {"m": scores}, n=-1)
    with pytest.raises(ValueError, match="no model"):
        bootstrap(users, labels, {})
    with pytest.raises(ValueError, match="one length"):
        bootstrap(users, labels, {"m": scores[1:]})


RANK_METRICS = ("hr@1", "hr@5", "ndcg@5", "mrr@10")


def rank_data(n_users=40, per_user=3, seed=0):
    generator = np.random.default_rng(seed)
    users = np.repeat(np.arange(n_users), per_user)
    level = generator.integers(1, 12, n_users)[users]
    return users, np.clip(level + generator.integers(-3, 4, users.size), 1, 20)


def test_rank_replicates_equal_the_metrics_of_the_samples_drawn():
    users, ranks = rank_data()
    result = bootstrap_ranks(users, {"m": ranks}, RANK_METRICS, n=5, seed=8)
    assert result.values["m"] == pytest.approx(rank_metrics(ranks, RANK_METRICS), abs=1e-14)
    generator = np.random.default_rng(8)  # the draws, as `bootstrap` documents them: n users out of n
    for replicate in range(5):
        drawn = generator.integers(0, 40, 40)
        copied = np.concatenate([ranks[users == user] for user in drawn])
        for metric, value in rank_metrics(copied, RANK_METRICS).items():
            assert result.replicates["m"][metric][replicate] == pytest.approx(value, abs=1e-12)


def test_rank_draws_are_those_of_the_labelled_bootstrap():
    users, ranks = rank_data()
    labels, scores = np.arange(users.size) % 2, np.where(ranks == 1, 1.0, 0.0)
    hits = np.where(labels == 1, scores, 1 - scores)  # predict so that a hit is a right row
    labelled = bootstrap(users, labels, {"m": hits}, ["acc"], n=40, seed=2)
    ranked = bootstrap_ranks(users, {"m": ranks}, ["HR@1"], n=40, seed=2)
    np.testing.assert_allclose(ranked.replicates["m"]["hr@1"], labelled.replicates["m"]["acc"], atol=1e-14)


def test_rank_differences_are_paired():
    users, ranks = rank_data(n_users=200)
    generator = np.random.default_rng(1)
    better = np.maximum(1, ranks - generator.integers(0, 3, ranks.size))
    result = bootstrap_ranks(users, {"base": ranks, "better": better, "copy": ranks.copy()}, n=400)
    found, own = result.difference("better", "base", "ndcg@10"), result.interval("base", "ndcg@10")
    assert 0 < found.low < found.value < found.high
    assert found.high - found.low < 0.6 * (own.high - own.low)
    nothing = result.difference("copy", "base", "hr@1")
    assert (nothing.value, nothing.low, nothing.high) == (0.0, 0.0, 0.0)


def test_rank_intervals_cover_the_truth_by_user():
    # Five copies of each user's one rank: 80 observations of HR@1 = 0.3, not 400.
    generator = np.random.default_rng(5)
    covered, runs = 0, 200
    for run in range(runs):
        ranks = np.repeat(np.where(generator.random(80) < 0.3, 1, 7), 5)
        one = bootstrap_ranks(np.repeat(np.arange(80), 5), {"m": ranks}, ["hr@1"], n=200, seed=run)
        interval = one.interval("m", "hr@1")
        covered += interval.low <= 0.3 <= interval.high
    assert 0.89 <= covered / runs <= 0.99


def test_rank_arguments_are_checked():
    users, ranks = rank_data()
    few = bootstrap_ranks(users[:12], {"m": ranks[:12]}, n=50).interval("m", "hr@1")
    assert few.low is None and few.reason == "no interval: only 4 users, fewer than 10"
    with pytest.raises(ValueError, match="no rank metric 'auc'"):
        bootstrap_ranks(users, {"m": ranks}, ["auc"])
    with pytest.raises(ValueError, match=r"120 samples have users.*\(119,\)"):
        bootstrap_ranks(users, {"m": ranks[1:]})
    with pytest.raises(ValueError, match="whole numbers from 1 on"):
        bootstrap_ranks(users, {"m": ranks - 5})
    with pytest.raises(ValueError, match="no models"):
        bootstrap_ranks(users, {})
    with pytest.raises(ValueError, match="no samples"):
        bootstrap_ranks(np.array([], int), {"m": np.array([], int)})
    with pytest.raises(ValueError, match="level=2"):
        bootstrap_ranks(users, {"m": ranks}, level=2)
    with pytest.raises(ValueError, match="b has the metrics"):
        one = np.ones(users.size)
        module.bootstrap_ratios(users, {"a": {"x": (one, one)}, "b": {"y": (one, one)}})
