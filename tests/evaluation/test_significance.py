"""Tests of significance against brute force, other libraries, published numbers and simulations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from formulas import logloss, rank_metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score

from recbole_llm.evaluation.bootstrap import bootstrap, bootstrap_ranks
from recbole_llm.evaluation.metrics import UndefinedMetric, accuracy, auc, gauc
from recbole_llm.evaluation.significance import (
    bca_interval,
    calibration,
    delong,
    holm,
    mcnemar,
    metric_by_group,
    quantile_groups,
)


def structural_components(labels, scores):
    """V of every positive and negative from all pairs, one by one."""
    positives, negatives = scores[labels == 1], scores[labels == 0]
    wins = (positives[:, None] > negatives) + 0.5 * (positives[:, None] == negatives)
    return wins.mean(axis=1), wins.mean(axis=0)


def delong_by_pairs(labels, *scores):
    """DeLong, DeLong & Clarke-Pearson 1988: AUCs and covariance."""
    v10, v01 = zip(*(structural_components(labels, s) for s in scores), strict=True)
    covariance = np.cov(v10) / len(v10[0]) + np.cov(v01) / len(v01[0])
    return [v.mean() for v in v10], covariance


def obuchowski_by_pairs(labels, users, a, b):
    """Obuchowski 1997: the covariance of two AUCs with rows clustered by user, as its sums over clusters."""
    (xa, ya), (xb, yb) = structural_components(labels, a), structural_components(labels, b)
    of_x, of_y = users[labels == 1], users[labels == 0]
    m, n = len(of_x), len(of_y)
    s10 = s01 = s11 = s11_swapped = 0.0
    for user in np.unique(users):
        x, y = of_x == user, of_y == user
        dxa, dxb = xa[x].sum() - x.sum() * xa.mean(), xb[x].sum() - x.sum() * xb.mean()
        dya, dyb = ya[y].sum() - y.sum() * ya.mean(), yb[y].sum() - y.sum() * yb.mean()
        s10 += dxa * dxb
        s01 += dya * dyb
        s11 += dxa * dyb
        s11_swapped += dya * dxb
    i10, i01, i = len(np.unique(of_x)), len(np.unique(of_y)), len(np.unique(users))
    s10, s01 = s10 * i10 / ((i10 - 1) * m), s01 * i01 / ((i01 - 1) * n)
    s11, s11_swapped = s11 * i / (i - 1), s11_swapped * i / (i - 1)
    return s10 / m + s01 / n + s11 / (m * n) + s11_swapped / (m * n)


def paired(generator, n=200, shift_a=1.0, shift_b=1.0):
    """Labels and two models' scores that share half of their noise."""
    labels = np.arange(n) % 2
    noise = generator.normal(size=(3, n))
    return labels, shift_a * labels + noise[0] + noise[1], shift_b * labels + noise[0] + noise[2]


def by_user(generator, n_users=40, per_user=10):
    """Rows whose labels and scores, of both models alike, hang together within a user."""
    users = np.repeat(np.arange(n_users), per_user)
    labels = (generator.random(users.size) < generator.beta(1, 1, n_users)[users]).astype(int)
    a, b = (
        labels + 1.5 * generator.normal(size=n_users)[users] + generator.normal(size=users.size) for _ in "ab"
    )
    return users, labels, a, b


# DeLong


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 5)), min_size=4, max_size=40))
def test_delong_equals_all_pairs_with_ties(rows):
    a, b, users = (np.array(column) for column in zip(*rows, strict=True))
    labels = np.arange(len(rows)) % 2
    result = delong(labels, a / 4, b / 4)
    aucs, covariance = delong_by_pairs(labels, a, b)
    np.testing.assert_allclose([result.auc_a, result.auc_b], aucs, rtol=1e-14)
    np.testing.assert_allclose(
        [result.auc_a, result.auc_b], [roc_auc_score(labels, a), roc_auc_score(labels, b)], rtol=1e-12
    )
    np.testing.assert_allclose(result.covariance, covariance, atol=1e-14)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert result.standard_error**2 == pytest.approx(variance, abs=1e-14)
    assert result.difference == result.auc_a - result.auc_b
    if result.difference and variance > 1e-12:
        assert result.p_value == pytest.approx(2 * stats.norm.cdf(-abs(aucs[0] - aucs[1]) / variance**0.5))
    own = delong(labels, a, b, users=np.arange(len(rows)))
    np.testing.assert_allclose(own.covariance, covariance, atol=1e-14)
    if min(len(np.unique(users[labels == c])) for c in (0, 1)) > 1:
        clustered = delong(labels, a, b, users=users)
        for i, one in enumerate((a, b)):
            for j, two in enumerate((a, b)):
                truth = obuchowski_by_pairs(labels, users, one, two)
                assert clustered.covariance[i, j] == pytest.approx(truth, abs=1e-14)


def test_delong_ignores_the_order_of_rows_and_monotone_changes_and_is_antisymmetric():
    labels, a, b = paired(np.random.default_rng(0))
    order = np.random.default_rng(1).permutation(labels.size)
    result, moved = delong(labels, a, b), delong(labels[order], np.exp(a[order]), b[order])
    assert (moved.auc_a, moved.auc_b) == (result.auc_a, result.auc_b)
    assert moved.p_value == pytest.approx(result.p_value, rel=1e-12)
    swapped = delong(labels, b, a)
    assert swapped.difference == -result.difference and swapped.p_value == pytest.approx(result.p_value)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_model_against_itself_differs_by_nothing(grouped):
    users, labels, a, _ = by_user(np.random.default_rng(2))
    result = delong(labels, a, 3 * a - 1, users if grouped else None)
    assert (result.difference, result.standard_error, result.p_value) == (0.0, 0.0, 1.0)
    assert result.covariance[0, 0] == result.covariance[0, 1] > 0


def test_p_values_are_uniform_where_nothing_differs_and_small_where_something_does():
    generator = np.random.default_rng(3)
    null = np.array([delong(*paired(generator)).p_value for _ in range(600)])
    assert stats.kstest(null, "uniform").pvalue > 0.01
    assert 0.03 <= (null < 0.05).mean() <= 0.07
    planted = [delong(*paired(generator, shift_a=2.0)).p_value for _ in range(100)]
    assert np.mean(np.array(planted) < 0.05) > 0.9


def test_rows_of_one_user_need_the_users():
    generator = np.random.default_rng(4)
    p_values = []
    for _ in range(200):
        users, labels, a, b = by_user(generator)
        p_values.append([delong(labels, a, b, users).p_value, delong(labels, a, b).p_value])
    rejected = (np.array(p_values) < 0.05).mean(axis=0)
    assert 0.02 <= rejected[0] <= 0.09
    assert rejected[1] > 0.25


def test_the_variance_by_user_is_that_of_the_bootstrap_over_users():
    users, labels, a, b = by_user(np.random.default_rng(5), n_users=200)
    drawn = bootstrap(users, labels, {"a": a, "b": b}, ["auc"], n=1500)
    replicates = [drawn.replicates[name]["auc"] for name in "ab"]
    result = delong(labels, a, b, users)
    np.testing.assert_allclose(np.sqrt(np.diag(result.covariance)), np.std(replicates, axis=1), rtol=0.08)
    assert result.standard_error == pytest.approx(np.std(replicates[0] - replicates[1]), rel=0.08)


def test_where_delong_has_no_answer():
    perfect = delong([0, 0, 1, 1], [1, 2, 3, 4], [4, 3, 2, 1])
    assert perfect.difference == 1.0 and perfect.standard_error == 0.0 and perfect.p_value is None
    with pytest.raises(UndefinedMetric, match="both classes"):
        delong([1, 1, 1], [1, 2, 3], [1, 2, 3])
    with pytest.raises(UndefinedMetric, match="positives of at least two samples"):
        delong([0, 0, 1], [1, 2, 3], [3, 2, 1])
    with pytest.raises(UndefinedMetric, match="negatives of at least two users"):
        delong([0, 0, 1, 1], [1, 2, 3, 4], [4, 3, 2, 1], users=["u", "u", "u", "v"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 1, 2], [1, 2, 3], [1, 2, 3]), "labels must be 0 or 1"),
        (([0, 1, 1], [1, 2, 3], [1, 2]), r"score_b and labels: .*\(2,\) and \(3,\)"),
        (
            ([0, 1, 1], [1, 2, 3], [1, np.nan, 3]),
            "score_b and labels: 1 of 3 scores are NaN, the first at sample 1",
        ),
        (([0, 1, 1, 0], [1, 2, 3, 4], [4, 3, 2, 1], [1, 2]), "users has the shape"),
    ],
)
def test_delong_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        delong(*arguments)


# McNemar


def hits(both, only_a, only_b, neither):
    a = np.repeat([1, 1, 0, 0], [both, only_a, only_b, neither])
    return a, np.repeat([1, 0, 1, 0], [both, only_a, only_b, neither])


@pytest.mark.parametrize(
    ("table", "p"),
    [
        ((1, 1, 7, 12), 0.0703),  # airway hyper-responsiveness, Fagerland et al. 2013: p = 0.070
        ((59, 6, 16, 80), 0.0525),  # by hand: 2 * (1 + 22 + 231 + 1540 + 7315 + 26334 + 74613) / 2^22
    ],
)
def test_mcnemar_gives_published_and_hand_made_p_values(table, p):
    assert mcnemar(*hits(*table)) == pytest.approx(p, abs=5e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 3), st.integers(1, 3))
def test_mcnemar_is_the_binomial_test_of_the_discordant_rows(only_a, only_b, both, neither):
    a, b = hits(both, only_a, only_b, neither)
    order = np.random.default_rng(0).permutation(a.size)
    p_value = mcnemar(a[order], b[order] == 1)
    tail = sum(stats.binom.pmf(k, only_a + only_b, 0.5) for k in range(min(only_a, only_b) + 1))
    assert p_value == pytest.approx(min(1.0, 2 * tail), rel=1e-9)
    assert mcnemar(b, a) == pytest.approx(p_value)


def test_mcnemar_keeps_its_level_and_finds_what_is_planted():
    generator = np.random.default_rng(8)
    null = [mcnemar(*(generator.random((2, 300)) < 0.3)) for _ in range(300)]
    assert 0.01 <= np.mean(np.array(null) < 0.05) <= 0.07  # exact, hence conservative
    planted = [mcnemar(generator.random(300) < 0.45, generator.random(300) < 0.3) for _ in range(100)]
    assert np.mean(np.array(planted) < 0.05) > 0.85


def test_mcnemar_of_a_model_with_itself_and_of_bad_data():
    a = hits(2, 3, 4, 5)[0]
    assert mcnemar(a, a) == 1
    for bad in ([1, 0.5], [1], [[1, 0]]):
        with pytest.raises(ValueError, match="two vectors of 0 and 1 of one length"):
            mcnemar([1, 0], bad)
    with pytest.raises(UndefinedMetric):
        mcnemar([], [])


# Holm


def test_holm_gives_published_values():
    # The ten p-values that statsmodels compares with R's multtest, and R's answers.
    p_values = [
        0.838541367553,
        0.642193923795,
        0.680845947633,
        0.967833824309,
        0.71626938238,
        0.177096952723,
        5.23656777208e-05,
        0.0202732688798,
        0.00028140506198,
        0.0149877310796,
    ]
    adjusted = holm({str(i): p for i, p in enumerate(p_values)})
    assert list(adjusted) == [str(i) for i in range(10)]
    truth = [1, 1, 1, 1, 1, 1, 5.23656777208e-04, 0.1419128822, 2.53264555782e-03, 0.1199018486368]
    np.testing.assert_allclose(list(adjusted.values()), truth, rtol=1e-9)


def test_holm_never_falls_and_leaves_none_alone():
    # 4 * 0.005, 3 * 0.01, 2 * 0.03, and 0.04 raised to the value before it.
    adjusted = holm({"a": 0.01, "b": None, "c": 0.04, "d": 0.03, "e": 0.005})
    assert adjusted.pop("b") is None
    assert adjusted == pytest.approx({"a": 0.03, "c": 0.06, "d": 0.06, "e": 0.02})
    assert list(adjusted) == ["a", "c", "d", "e"]
    assert holm({}) == {} and holm({"a": None}) == {"a": None} and holm({"a": 0.2}) == {"a": 0.2}
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="'lens'"):
            holm({"gate": 0.1, "lens": bad})


# BCa


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_bca_equals_scipy_on_the_mean_of_skewed_data(level):
    sample = np.random.default_rng(9).exponential(size=25)
    truth = stats.bootstrap(
        (sample,),
        np.mean,
        confidence_level=level,
        n_resamples=999,
        method="BCa",
        rng=np.random.default_rng(0),
    )
    replicates = truth.bootstrap_distribution
    low, high = bca_interval(sample.mean(), replicates, (sample.sum() - sample) / 24, level)
    assert (low, high) == pytest.approx(tuple(truth.confidence_interval), rel=1e-9)
    plain = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    assert low > plain[0] + 0.01 and high > plain[1] + 0.01  # so that the agreement says something


def test_bca_without_bias_and_skewness_is_the_percentile_interval():
    replicates = np.arange(-500, 501) / 500
    low, high = bca_interval(0.0, replicates, np.array([-1.0, 0.0, 1.0]), 0.9)
    assert (low, high) == pytest.approx(tuple(np.quantile(replicates, [0.05, 0.95])), abs=1e-12)
    assert bca_interval(0.1 + 0.2, np.full(100, 0.3), np.full(5, 0.3)) == (0.3, 0.3)


def test_bca_says_where_it_has_no_answer():
    replicates, jackknife = np.linspace(0, 1, 101), np.linspace(0, 1, 11)
    with pytest.raises(UndefinedMetric, match="all 101 replicates lie below the value 2"):
        bca_interval(2.0, replicates, jackknife)
    with pytest.raises(UndefinedMetric, match="draw more samples"):
        bca_interval(0.95, replicates, jackknife)
    with pytest.raises(ValueError, match="is not finite"):
        bca_interval(0.5, np.where(np.arange(101) == 3, np.nan, replicates), jackknife)
    with pytest.raises(ValueError, match="2 or more jackknife"):
        bca_interval(0.5, replicates, np.ones(1))
    with pytest.raises(ValueError, match="level=95"):
        bca_interval(0.5, replicates, jackknife, level=95)


def labelled(n_users=30, seed=10):
    users, labels, a, b = by_user(np.random.default_rng(seed), n_users=n_users, per_user=7)
    return users, labels, *(np.clip(np.round(1 / (1 + np.exp(-s)), 1), 0.1, 0.9) for s in (a, b))  # ties


def test_the_jackknife_is_the_metric_without_each_user():
    users, labels, a, b = labelled()
    users = np.array([f"u{u:02}" for u in users])
    drawn = bootstrap(users, labels, {"a": a, "b": b}, n=0, jackknife=True)
    ranks = 1 + (10 * a).astype(int)
    ranked = bootstrap_ranks(users, {"m": ranks}, ["hr@5", "ndcg@10"], n=0, jackknife=True)
    for i, user in enumerate(np.unique(users)):
        rest = users != user
        for name, score in (("a", a), ("b", b)):
            row = (score[rest], labels[rest])
            truth = {"auc": auc(*row), "logloss": logloss(*row), "acc": accuracy(*row)}
            truth["gauc"] = gauc(users[rest], *row)
            found = {metric: values[i] for metric, values in drawn.jackknife[name].items()}
            assert found == pytest.approx(truth, rel=1e-12)
        found = {metric: values[i] for metric, values in ranked.jackknife["m"].items()}
        assert found == pytest.approx(rank_metrics(ranks[rest], ["hr@5", "ndcg@10"]), rel=1e-12)


def test_bootstrap_gives_bca_intervals_when_asked_and_else_what_it_gave():
    users, labels, a, b = labelled()
    plain = bootstrap(users, labels, {"a": a, "b": b}, n=1000)
    drawn = bootstrap(users, labels, {"a": a, "b": b}, n=1000, jackknife=True)
    assert plain.to_dict("a") == drawn.to_dict("a") and not plain.jackknife
    for metric in ("auc", "logloss", "acc", "gauc"):
        found, by_percentile = drawn.interval("a", metric, method="bca"), drawn.interval("a", metric)
        truth = bca_interval(
            found.value, drawn.replicates["a"][metric], drawn.jackknife["a"][metric], level=0.95
        )
        assert (found.low, found.high) == truth != (by_percentile.low, by_percentile.high)
        difference = drawn.difference("b", "a", metric, method="bca")
        truth = bca_interval(
            drawn.values["b"][metric] - drawn.values["a"][metric],
            drawn.replicates["b"][metric] - drawn.replicates["a"][metric],
            drawn.jackknife["b"][metric] - drawn.jackknife["a"][metric],
        )
        assert (difference.low, difference.high) == truth
        same = drawn.difference("a", "a", metric, method="bca")
        assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="jackknife=True"):
        plain.interval("a", "auc", method="bca")
    with pytest.raises(ValueError, match="no method 'BCA'"):
        drawn.difference("b", "a", "auc", method="BCA")


def test_a_bca_interval_that_hangs_on_one_user_is_not_given():
    users = np.repeat(np.arange(40), 3)
    labels = np.ones(users.size, int)
    labels[:2] = 0  # one user has all negatives: a third of all draws leave him out
    drawn = bootstrap(users, labels, {"m": np.linspace(0, 1, users.size)}, ["auc"], n=100, jackknife=True)
    assert np.flatnonzero(np.isnan(drawn.jackknife["m"]["auc"])).tolist() == [0]
    assert "undefined in" in drawn.interval("m", "auc", method="bca").reason
    drawn.replicates["m"]["auc"] = np.linspace(0.9, 1, 100)
    assert "undefined without any one of 1 users" in drawn.interval("m", "auc", method="bca").reason
    perfect = bootstrap_ranks(users, {"m": np.ones(users.size, int)}, ["hr@1"], n=100, jackknife=True)
    found = perfect.interval("m", "hr@1", method="bca")
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


# Calibration


def test_calibration_of_a_handful_of_rows():
    result = calibration([0, 1, 1, 0, 1, 1], [0.9, 0.1, 0.3, 0.2, 0.8, 0.7], bins=2)
    np.testing.assert_allclose(result.predicted, [0.2, 0.8])
    np.testing.assert_allclose(result.observed, [2 / 3, 2 / 3])
    assert result.counts.tolist() == [3, 3]
    assert result.ece == pytest.approx((2 / 3 - 0.2) / 2 + (0.8 - 2 / 3) / 2)


def test_calibration_equals_sklearn_on_quantile_bins():
    generator = np.random.default_rng(11)
    p = generator.random(1000) ** 2
    labels = (generator.random(1000) < p).astype(int)
    result = calibration(labels, p, bins=8)
    observed, predicted = calibration_curve(labels, p, n_bins=8, strategy="quantile")
    np.testing.assert_allclose(result.observed, observed)
    np.testing.assert_allclose(result.predicted, predicted)
    assert result.counts.tolist() == [125] * 8
    assert result.ece == pytest.approx(np.abs(observed - predicted).mean())


def test_calibration_bins_do_not_depend_on_the_order_of_tied_rows():
    p = np.repeat([0.1, 0.5, 0.9], [2, 16, 2])
    labels = np.arange(20) % 2
    result, turned = calibration(labels, p, bins=4), calibration(labels[::-1], p[::-1], bins=4)
    assert result.counts.tolist() == turned.counts.tolist() == [2, 16, 2]
    np.testing.assert_allclose(result.predicted, [0.1, 0.5, 0.9])
    np.testing.assert_allclose(result.observed, turned.observed)
    assert result.ece == pytest.approx((2 * 0.4 + 0 + 2 * 0.4) / 20)


def test_ece_is_small_for_true_probabilities_and_right_for_wrong_ones():
    generator = np.random.default_rng(12)
    p = generator.uniform(0.2, 0.6, 20_000)
    labels = (generator.random(p.size) < p).astype(int)
    assert calibration(labels, p).ece < 0.02
    assert calibration(labels, p + 0.3).ece == pytest.approx(0.3, abs=0.015)


def test_calibration_refuses_bad_data():
    with pytest.raises(UndefinedMetric, match="calibration needs probabilities"):
        calibration([0, 1], [0.5, 1.5])
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        calibration([0, 3], [0.5, 0.5])
    for bins in (0, 2.5, True):
        with pytest.raises(ValueError, match="must be an int >= 1"):
            calibration([0, 1], [0.5, 0.5], bins=bins)


# Groups


def test_quantile_groups_are_of_equal_size_without_ties():
    values = np.random.default_rng(13).permutation(103)
    wanted = np.array(["0-25", "26-50", "51-76", "77-102"])
    assert (
        quantile_groups(values, 4).tolist()
        == wanted[np.searchsorted([26, 51, 77], values, side="right")].tolist()
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(1, 8))
def test_quantile_groups_keep_equal_values_together_in_order(values, n):
    groups, values = quantile_groups(values, n), np.array(values)
    assert len(set(groups)) <= n
    spans = []
    for name in set(groups):
        inside = values[groups == name]
        low, high = inside.min(), inside.max()
        assert name == (f"{low}" if low == high else f"{low}-{high}")
        spans.append((low, high))
    spans.sort()
    assert all(below[1] < above[0] for below, above in itertools.pairwise(spans))


def test_metric_by_group_is_the_metric_on_the_rows():
    users, labels, a, _ = labelled()
    history = np.random.default_rng(14).integers(1, 60, users.size)
    found = metric_by_group(quantile_groups(history, 3), gauc, users, a, labels)
    assert sum(group.samples for group in found.values()) == users.size
    for name, group in found.items():
        low, high = (int(end) for end in name.split("-"))
        rows = (low <= history) & (history <= high)
        assert group == (gauc(users[rows], a[rows], labels[rows]), rows.sum(), None)
    values = {group.value for group in found.values()}
    assert len(values) == len(found) == 3


def test_metric_by_group_takes_any_groups_and_states_reasons():
    found = metric_by_group(np.array(["f", "m", "f", "m"]), auc, [0.1, 0.2, 0.3, 0.4], [0, 1, 1, 1])
    assert list(found) == ["f", "m"]
    assert found["f"] == (1.0, 2, None)
    assert found["m"].value is None and found["m"].samples == 2 and "both classes" in found["m"].reason
    with pytest.raises(ValueError, match="group m: 1 of 2 scores are NaN"):
        metric_by_group(np.array(["f", "m", "f", "m"]), auc, [0.1, 0.2, 0.3, np.nan], [0, 1, 1, 1])


def test_groups_refuse_bad_data():
    for bad in ([1.0, np.nan, 2.0], ["a", "b"], [[1]]):
        with pytest.raises(ValueError, match="needs a vector of finite numbers"):
            quantile_groups(bad, 2)
    with pytest.raises(ValueError, match="must be an int >= 1, not 0"):
        quantile_groups([1, 2], 0)
    with pytest.raises(UndefinedMetric):
        quantile_groups([], 2)
