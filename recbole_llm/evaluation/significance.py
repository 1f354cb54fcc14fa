"""Tests of significance, BCa intervals, calibration and groups: what a comparison of recommenders needs.

    delong                           AUCs of two models on the same samples
    mcnemar                          two models' hits (HR@1, accuracy) on the same samples
    paired_permutation               mean differences of anything, clustered by user
    holm                             many tests at once
    bca_interval                     bootstrap intervals corrected for bias and skewness
    calibration                      reliability curve and expected calibration error
    quantile_groups, metric_by_group any metric by length of history, activity of users or popularity of items

`delong` and `mcnemar` treat samples as independent unless told otherwise. Samples of one user are not: pass `users` to
`delong`, and use `mcnemar` where every user has one sample. What has no answer on good data raises `UndefinedMetric`,
bad data a plain ValueError, as in `metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import binomtest, norm, rankdata

from recbole_llm.evaluation.metrics import (
    UndefinedMetric,
    _check,
    _check_probabilities,
    _check_two_classes,
    user_codes,
)


class DeLong(NamedTuple):
    """Two AUCs on the same samples, and the test of their difference."""

    auc_a: float
    auc_b: float
    difference: float
    """auc_a - auc_b."""
    covariance: np.ndarray
    """[2, 2] of (auc_a, auc_b)."""
    standard_error: float
    """Of the difference."""
    p_value: float | None
    """Two-sided; None where the AUCs differ and their difference has no variance (two models that both
    separate the classes perfectly, one of them inverted)."""


def delong(
    labels: np.ndarray, score_a: np.ndarray, score_b: np.ndarray, users: np.ndarray | None = None
) -> DeLong:
    """The paired test of two AUCs on the same samples (DeLong, DeLong & Clarke-Pearson, Biometrics 44, 1988).

    With P positives and N negatives, V_i the share of negatives that positive i beats and V_j the share of
    positives that beat negative j (ties count half), both means of V are the AUC, and

        cov(AUC_a, AUC_b) = cov_i(V_i^a, V_i^b) / P + cov_j(V_j^a, V_j^b) / N
        z = (AUC_a - AUC_b) / sqrt(var_a + var_b - 2 cov),        p = 2 Phi(-|z|)

    All V come from midranks in O(n log n) (Sun & Xu, IEEE Signal Processing Letters 21, 2014). With `users`,
    the V of a user count as one observation, positives and negatives together (Obuchowski, Biometrics 53,
    1997): with X_u the sum of V_i - AUC over u's positives, Y_u the same over u's negatives, and U, U_P, U_N
    the numbers of users, of those with a positive and of those with a negative,

        cov = U_P / (U_P - 1) sum_u X_u^a X_u^b / P^2 + U_N / (U_N - 1) sum_u Y_u^a Y_u^b / N^2
              + U / (U - 1) sum_u (X_u^a Y_u^b + Y_u^a X_u^b) / (P N)

    which is DeLong's where every sample has its own user.

    Args:
        labels: [n] 0 or 1.
        score_a, score_b: [n] any real numbers, higher meaning more likely positive; or [s, n], s runs of one
            method (seeds), whose mean AUC is tested: its V are the means of the runs' V.
        users: [n] the user of each sample, any sortable dtype; None treats samples as independent.

    Raises:
        UndefinedMetric: if a class is missing or has a single sample (with `users`: samples of a single user).
        ValueError: on unequal lengths, NaN scores, or labels other than 0 and 1.
    """
    auc, covariance, variance = _auc_covariance(labels, {"score_a": score_a, "score_b": score_b}, users)
    difference = float(auc[0] - auc[1])
    error = float(np.sqrt(max(variance, 0.0)))
    p_value = 1.0 if difference == 0 else float(2 * norm.sf(abs(difference) / error)) if error > 0 else None
    return DeLong(float(auc[0]), float(auc[1]), difference, covariance, error, p_value)


def _auc_covariance(
    labels: np.ndarray, scores: Mapping[str, np.ndarray], users: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """AUCs [k], their covariance [k, k], and the variance of the first AUC minus the last.

    The V are kept as whole numbers, twice the number of pairs, and the difference has components of its own:
    models that order the samples alike differ by exactly 0 with variance exactly 0.
    """
    wins, losses = [], []
    for name, score in scores.items():
        of_runs = []
        for run in np.atleast_2d(score):
            try:
                run, positive = _check(run, labels)
            except ValueError as error:
                raise type(error)(f"{name} and labels: {error}") from error
            _check_two_classes(positive, "AUC")
            among_all = rankdata(run)
            of_runs.append(
                (
                    2 * (among_all[positive] - rankdata(run[positive])),
                    2 * (positive.sum() - among_all[~positive] + rankdata(run[~positive])),
                )
            )
        wins.append(np.mean([won for won, _ in of_runs], axis=0))
        losses.append(np.mean([lost for _, lost in of_runs], axis=0))
    beats, beaten = np.array([*wins, wins[0] - wins[-1]]), np.array([*losses, losses[0] - losses[-1]])
    n_positive, n_negative = beats.shape[1], beaten.shape[1]
    codes = np.arange(positive.size) if users is None else user_codes(users, positive.size)[1]
    n_users = int(codes.max()) + 1

    def by_user(components: np.ndarray, rows: np.ndarray, what: str) -> tuple[np.ndarray, int]:
        owners = codes[rows]
        n_owners = np.unique(owners).size
        if n_owners < 2:
            unit = "sample" if users is None else "user"
            raise UndefinedMetric(f"DeLong's variance needs {what} of at least two {unit}s, but there is one")
        # Means first, as whole numbers over a count: equal components then deviate by exactly 0.
        deviations = components - components.mean(axis=1, keepdims=True)
        return np.stack([np.bincount(owners, weights=d, minlength=n_users) for d in deviations]), n_owners

    x, owners_x = by_user(beats, positive, "positives")
    y, owners_y = by_user(beaten, ~positive, "negatives")
    cross = x @ y.T
    covariance = owners_x / (owners_x - 1) * (x @ x.T) + owners_y / (owners_y - 1) * (y @ y.T)
    covariance += n_users / (n_users - 1) * (cross + cross.T)
    pairs = 2.0 * n_positive * n_negative
    covariance /= pairs**2
    return beats[:-1].sum(axis=1) / pairs, covariance[:-1, :-1], float(covariance[-1, -1])


def mcnemar(hits_a: np.ndarray, hits_b: np.ndarray) -> float:
    """Two-sided p-value of the exact paired test of two hit rates (McNemar, Psychometrika 12, 1947), such as HR@1.

    Under the null hypothesis each sample on which the models disagree favours either model with probability 1/2:
    only_a ~ Binomial(only_a + only_b, 1/2).

    Args:
        hits_a, hits_b: [n] bool, or 0 and 1; the same independent samples in the same order.

    Raises:
        UndefinedMetric: if there are no samples.
        ValueError: on unequal lengths or values other than 0 and 1.
    """
    a, b = np.asarray(hits_a), np.asarray(hits_b)
    if a.ndim != 1 or a.shape != b.shape or not np.isin([a, b], (0, 1)).all():
        raise ValueError(f"mcnemar needs two vectors of 0 and 1 of one length, not {a.shape} and {b.shape}")
    if not a.size:
        raise UndefinedMetric("there are no samples to evaluate")
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0


def paired_permutation(users: np.ndarray, differences: np.ndarray, n: int = 9999, seed: int = 0) -> float:
    """Two-sided p-value of a mean paired difference by a sign-flip permutation test, clustered by user.

    If neither of two models is better, the sum of a user's differences is as likely as its negative. p is the share of
    ``n`` random assignments of signs, and of the one observed, whose sum is at least as far from 0 (Phipson & Smyth,
    Stat. Appl. Genet. Mol. Biol. 9, 2010); it is never 0. ``scipy.stats.permutation_test`` on the sums by user tests
    the same hypothesis, but from other draws and with twice the smaller tail as p: saved p-values would change.

    Args:
        users: [samples] the user of each.
        differences: [samples] gain of one model minus gain of the other (means over seeds, for instance).
        n: number of random assignments.

    Raises:
        UndefinedMetric: if there are no samples.
        ValueError: on unequal lengths or differences that are not finite.
    """
    differences = np.asarray(differences, np.float64)
    if not differences.size:
        raise UndefinedMetric("there are no samples to evaluate")
    if not np.isfinite(differences).all():
        raise ValueError("paired_permutation: not all differences are finite")
    _, codes = user_codes(users, differences.size)
    sums = np.bincount(codes, weights=differences)
    observed = abs(sums.sum())
    tolerance = 1e-9 * max(1.0, np.abs(sums).sum())  # sums in another order differ in their last digits
    generator, as_far = np.random.default_rng(seed), 1
    step = max(1, 4_000_000 // sums.size)
    for begin in range(0, n, step):
        signs = generator.integers(0, 2, (min(step, n - begin), sums.size), dtype=np.int8) * 2 - 1
        as_far += int((np.abs(signs @ sums) >= observed - tolerance).sum())
    return as_far / (n + 1)


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """p-values adjusted for their number by Holm's step-down method (Scand. J. Statistics 6, 1979).

    With the m p-values in ascending order, adjusted_(i) = max over j <= i of min(1, (m - j + 1) p_(j)).
    Rejecting where the adjusted value is at most alpha keeps the chance of any false rejection at alpha,
    whatever the dependence.

    Args:
        p_values: name -> p-value; None for a test without an answer stays None and is not counted.

    Returns:
        The same keys in the same order.

    Raises:
        ValueError: if a p-value is not within [0, 1].

    >>> holm({"lens": 0.01, "prompt": None, "gate": 0.02})
    {'lens': 0.02, 'prompt': None, 'gate': 0.02}
    """
    known = {name: p for name, p in p_values.items() if p is not None}
    for name, p in known.items():
        if not 0 <= p <= 1:
            raise ValueError(f"holm: the p-value of {name!r} is {p}, which is not within [0, 1]")
    adjusted: dict[str, float | None] = dict.fromkeys(p_values)
    running = 0.0
    for i, name in enumerate(sorted(known, key=known.__getitem__)):
        running = max(running, min(1.0, (len(known) - i) * known[name]))
        adjusted[name] = float(running)
    return adjusted


def bca_interval(
    value: float, replicates: np.ndarray, jackknife: np.ndarray, level: float = 0.95
) -> tuple[float, float]:
    """The bias-corrected and accelerated bootstrap interval (Efron, JASA 82, 1987).

    With z0 = Phi^-1(share of replicates below the value, ties being half), d_i the mean of the jackknife
    values minus the i-th, and a = sum d^3 / (6 (sum d^2)^(3/2)), the ends are the quantiles of the replicates
    at

        Phi(z0 + (z0 + z) / (1 - a (z0 + z)))        z = Phi^-1((1 -+ level) / 2)

    Args:
        value: the statistic on all observations.
        replicates: [samples] the statistic on bootstrap samples.
        jackknife: [observations] the statistic without each observation, the unit being that of the
            bootstrap: `Bootstrap.jackknife` leaves out one user at a time.

    Raises:
        UndefinedMetric: if all replicates lie on one side of the value, or an end lies beyond the extreme
            replicates.
        ValueError: on a level outside (0, 1), and on values that are not finite.
    """
    replicates, jackknife = np.asarray(replicates, np.float64), np.asarray(jackknife, np.float64)
    if not 0 < level < 1 or replicates.size < 1 or jackknife.size < 2:
        raise ValueError(
            f"bca_interval needs replicates, 2 or more jackknife values and 0 < level < 1, not {replicates.size}, "
            f"{jackknife.size} and level={level}"
        )
    if not (np.isfinite(value) and np.isfinite(replicates).all() and np.isfinite(jackknife).all()):
        raise ValueError(
            "bca_interval: the value, or one of the replicates or jackknife values, is not finite"
        )
    # Sums in another order differ in their last digits; such replicates are ties.
    tied = np.abs(replicates - value) <= 1e-12 * np.abs(replicates).max()
    share = float(np.where(tied, 0.5, replicates < value).mean())
    if share in (0.0, 1.0):
        side = "above" if share == 0 else "below"
        raise UndefinedMetric(
            f"no BCa interval: all {replicates.size} replicates lie {side} the value {value:g}"
        )
    deviations = jackknife.mean() - jackknife
    scale = (deviations**2).sum() ** 1.5
    acceleration = (deviations**3).sum() / (6 * scale) if scale > 0 else 0.0
    z0, tail = norm.ppf(share), norm.ppf((1 - level) / 2)
    shifted = z0 + np.array([tail, -tail])
    stretch = 1 - acceleration * shifted
    ends = norm.cdf(z0 + shifted / stretch) if (stretch > 0).all() else np.array([0.0, 1.0])
    if min(ends[0], 1 - ends[1]) * replicates.size < 1:
        raise UndefinedMetric(
            f"no BCa interval: it would end beyond the {replicates.size} replicates (bias {z0:.3g}, "
            f"acceleration {acceleration:.3g}); draw more samples"
        )
    low, high = np.quantile(replicates, ends)
    return float(low), float(high)


class Calibration(NamedTuple):
    """Reliability curve by ascending probability, all arrays [at most bins], and its one-number summary."""

    predicted: np.ndarray
    """Mean probability of the bin's samples."""
    observed: np.ndarray
    """Share of positives among them."""
    counts: np.ndarray
    ece: float
    """Expected calibration error."""


def calibration(labels: np.ndarray, probabilities: np.ndarray, bins: int = 10) -> Calibration:
    """Reliability curve over bins of equal mass, and ECE = sum_b (n_b / n) |observed_b - predicted_b|.

    Bins of equal mass (Nixon et al., arXiv 1904.01685) estimate every share of positives about equally well, also where
    a model gives nearly all samples one probability. Samples of one probability stay in one bin, so that their order
    does not matter; empty bins are dropped. Chance alone makes the ECE of a perfectly calibrated model positive, of
    the order sqrt(bins / n): compare models on the same samples and bins.

    Args:
        labels: [n] 0 or 1.
        probabilities: [n] of 1.
        bins: how many, at most.

    Raises:
        UndefinedMetric: if there are no samples or `probabilities` leave [0, 1].
        ValueError: on bad labels, NaN, unequal lengths, or fewer than one bin.
    """
    p, positive = _check_probabilities(probabilities, labels, "calibration")
    binned = pd.DataFrame({"p": p, "positive": positive.astype(float)}).groupby(_mass_bins(p, bins))
    mean, counts = binned.mean(), binned.size().to_numpy()
    predicted, observed = mean["p"].to_numpy(), mean["positive"].to_numpy()
    return Calibration(predicted, observed, counts, float(np.abs(observed - predicted) @ counts / p.size))


def quantile_groups(values: np.ndarray, n: int) -> np.ndarray:
    """[samples] the name of each sample's group, of up to `n` of about equal size: '5-12', or '5' for one value.

    Equal values stay in one group, so that groups do not depend on the order of the samples; where many values are
    equal, groups differ in size and may be fewer. (`pandas.qcut` cuts at interpolated values: ties move its groups.)

    >>> quantile_groups([1, 1, 2, 3, 8, 9], 3).tolist()
    ['1', '1', '2-3', '2-3', '8-9', '8-9']

    Args:
        values: [samples] finite numbers: length of history, interactions of the user or item, and so on.
        n: number of groups, at most.

    Raises:
        UndefinedMetric: if there are no samples.
        ValueError: if values are no vector of finite numbers or `n` is below 1.
    """
    values = np.asarray(values)
    if not values.size:
        raise UndefinedMetric("there are no samples to group")
    if values.ndim != 1 or values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise ValueError(
            f"quantile_groups needs a vector of finite numbers, not {values.dtype}, {values.shape}"
        )
    codes = _mass_bins(values, n)
    bounds = pd.Series(values).groupby(codes).agg(["min", "max"])
    names = [str(low) if low == high else f"{low}-{high}" for low, high in bounds.itertuples(index=False)]
    return np.array(names)[codes]


class GroupMetric(NamedTuple):
    """A metric on the samples of one group; where the value is None, `reason` says why."""

    value: float | None
    samples: int
    reason: str | None = None


def metric_by_group(
    groups: np.ndarray, metric: Callable[..., float], *columns: np.ndarray
) -> dict[str, GroupMetric]:
    """Any metric on each group's samples: `metric_by_group(quantile_groups(length, 4), auc, scores, labels)`.

    Args:
        groups: [samples] any sortable values, one group per value, named by it.
        metric: called with the group's samples of every column, in the order given.
        columns: [samples, ...] what `metric` takes.

    Returns:
        Name of the group -> value and number of samples, in order. `UndefinedMetric` (one class in a group) becomes a
        reason.

    Raises:
        ValueError: if the metric finds the data bad; it then names the group.
    """
    arrays = [np.asarray(column) for column in columns]
    result = {}
    for name, places in pd.Series(np.asarray(groups)).groupby(np.asarray(groups)).indices.items():
        try:
            found = GroupMetric(float(metric(*(array[places] for array in arrays))), len(places))
        except UndefinedMetric as error:
            found = GroupMetric(None, len(places), str(error))
        except ValueError as error:
            raise ValueError(f"group {name}: {error}") from error
        result[str(name)] = found
    return result


def _mass_bins(values: np.ndarray, n: int) -> np.ndarray:
    """[samples] 0, 1, ...: which n-th of the samples each value's midrank falls into, numbered without gaps."""
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise ValueError(f"the number of bins or groups must be an int >= 1, not {n!r}")
    double_rank = np.rint(2 * rankdata(values)).astype(np.int64)
    return np.unique((double_rank - 1) * n // (2 * values.size), return_inverse=True)[1]
