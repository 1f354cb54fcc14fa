"""Intervals by the bootstrap over users, and paired differences of models from the same draws.

Samples of one user are not independent, so whole users are drawn with replacement. A replicate weighs each sample by
the number of times its user was drawn; every metric is then a weighted one, and nothing is copied or sorted again:

    LogLoss, ACC    sum_u w_u S_u / sum_u w_u n_u          S_u the user's sum of losses or hits, n_u its samples
    GAUC            sum_u w_u P_u AUC_u / sum_u w_u P_u     over users with both classes
    AUC             from one sort by score, see `PairOrder`
    HR, NDCG, MRR   sum_u w_u S_u / sum_u w_u n_u          S_u the user's sum of gains, see `ranking`

All models share the draws, so that the difference of two models is taken within each replicate (paired). Intervals are
percentile intervals (Efron & Tibshirani 1993, chapter 13). With `jackknife=True` the metrics without each user are kept
too, exact and without copies of the samples, for BCa intervals (`method="bca"`). `scipy.stats.bootstrap` draws single
observations and evaluates a statistic on copies of them, which for AUC means one sort per replicate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from recbole_llm.evaluation.metrics import (
    PairOrder,
    UndefinedMetric,
    auc,
    mean_user_auc,
    row_accuracy,
    row_logloss,
    user_auc,
    user_codes,
)
from recbole_llm.evaluation.ranking import RANK_METRICS, row_rank_metric
from recbole_llm.evaluation.significance import bca_interval

METRICS = ("auc", "logloss", "acc", "gauc")
METHODS = ("percentile", "bca")
MIN_USERS = 10
"""With fewer distinct users there are too few for a reliable interval, and none is given."""
MAX_UNDEFINED = 0.05
"""Share of replicates without a value (one class drawn) above which no interval is given."""
_CHUNK_WEIGHTS = 2_000_000
"""Replicates are computed in chunks of this many user weights: 16 MB, whatever the number of users."""
_USABLE = {"gauc": " with both classes", "hit_ratio_valid": " with a valid answer"}
"""Which users can move a metric, where not all can."""


@dataclass
class Interval:
    """A value with its interval; where `low` and `high` are None, `reason` says why."""

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = None

    def to_dict(self) -> dict[str, float | str | None]:
        """For the json: value, low, high and, only where there is one, reason."""
        result: dict[str, float | str | None] = {"value": self.value, "low": self.low, "high": self.high}
        return result | {"reason": self.reason} if self.reason else result


@dataclass
class Bootstrap:
    """Replicates of every metric of every model; ask it for intervals of models and of differences.

    Attributes:
        values: name -> metric -> value on the samples themselves, None if undefined.
        replicates: name -> metric -> [samples] float64, NaN where the draw leaves it undefined.
        reasons: name -> metric -> why the value is undefined.
        usable_users: metric -> number of users that can move it (for GAUC: those with both classes; for a
            ratio: those with a positive denominator).
        jackknife: name -> metric -> [users] float64, the metric without each user in sorted order, NaN where
            that leaves it undefined; empty unless asked for.
    """

    users: int
    rows: int
    samples: int
    seed: int
    level: float
    metrics: tuple[str, ...]
    values: dict[str, dict[str, float | None]] = field(default_factory=dict)
    replicates: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    reasons: dict[str, dict[str, str]] = field(default_factory=dict)
    usable_users: dict[str, int] = field(default_factory=dict)
    jackknife: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    def interval(self, name: str, metric: str, method: str = "percentile") -> Interval:
        """The metric of one model; `method` is 'percentile' or 'bca', which needs the jackknife."""
        return self._contrast([name], metric, method)

    def difference(self, name: str, reference: str, metric: str, method: str = "percentile") -> Interval:
        """The metric of `name` minus that of `reference`, paired by draw; `method` as in `interval`."""
        return self._contrast([name, reference], metric, method)

    def to_dict(self, *references: str) -> dict:
        """For the json: how it was drawn, every model's intervals, and every difference to each of `references`.

        Returns:
            {unit, users, rows, samples, seed, level, models: {name: {metric: interval}},
            differences: {'name - reference': {metric: interval}}}.
        """
        names = list(self.values)
        return {
            "unit": "user",
            "users": self.users,
            "rows": self.rows,
            "samples": self.samples,
            "seed": self.seed,
            "level": self.level,
            "models": {n: {m: self.interval(n, m).to_dict() for m in self.metrics} for n in names},
            "differences": {
                f"{n} - {reference}": {m: self.difference(n, reference, m).to_dict() for m in self.metrics}
                for reference in references
                for n in names
                if reference in self.values and n != reference
            },
        }

    def averaged(self, groups: Mapping[str, Sequence[str]]) -> Bootstrap:
        """The same draws with groups of models in the place of models, such as one method's runs with several seeds.

        A group's value, replicates and jackknife are the means of its members': its intervals are over users, for
        the mean of just these runs.

        Args:
            groups: group name -> names of models, at least one each. A metric that is undefined for one member is
                undefined for the group.
        """
        result = replace(self, values={}, replicates={}, reasons={}, jackknife={})
        for group, members in groups.items():
            result.reasons[group] = {m: r for name in members for m, r in self.reasons[name].items()}
            defined = [m for m in self.metrics if m not in result.reasons[group]]
            result.values[group] = dict.fromkeys(result.reasons[group]) | {
                m: float(np.mean([self.values[name][m] for name in members])) for m in defined
            }
            for single, mean in ((self.replicates, result.replicates), (self.jackknife, result.jackknife)):
                if single:
                    mean[group] = {m: np.mean([single[name][m] for name in members], axis=0) for m in defined}
        return result

    def _contrast(self, names: Sequence[str], metric: str, method: str) -> Interval:
        """The interval of the first model, less the second if there is one."""
        if method not in METHODS:
            raise ValueError(f"there is no method {method!r} for intervals; there are {list(METHODS)}")
        if method == "bca" and not self.jackknife:
            raise ValueError("the method 'bca' needs the jackknife: draw the bootstrap with jackknife=True")
        for name in names:
            if reason := self.reasons[name].get(metric):
                return Interval(None, reason=reason if len(names) == 1 else f"{name}: {reason}")

        def contrast(of: Mapping[str, Mapping[str, Any]]) -> Any:
            first, *rest = (of[name][metric] for name in names)
            return first - rest[0] if rest else first

        jackknife = contrast(self.jackknife) if method == "bca" else None
        return self._interval(contrast(self.values), contrast(self.replicates), metric, jackknife)

    def _interval(
        self, value: float, replicates: np.ndarray, metric: str, jackknife: np.ndarray | None = None
    ) -> Interval:
        """A BCa interval where there are jackknife values, else a percentile interval."""
        try:
            return Interval(value, *self._bounds(value, replicates, metric, jackknife))
        except UndefinedMetric as error:
            return Interval(value, reason=str(error))

    def _bounds(
        self, value: float, replicates: np.ndarray, metric: str, jackknife: np.ndarray | None
    ) -> tuple[float, float]:
        tail, usable, undefined = (1 - self.level) / 2, self.usable_users[metric], np.isnan(replicates)
        if usable < MIN_USERS:
            which = f"{usable} users{_USABLE.get(metric, '')}"
            raise UndefinedMetric(f"no interval: only {which}, fewer than {MIN_USERS}")
        if self.samples * tail < 1:
            raise UndefinedMetric(f"no interval: {self.samples} samples are too few for {self.level:.0%}")
        if undefined.mean() > MAX_UNDEFINED:
            drawn = f"{undefined.sum()} of {undefined.size} bootstrap samples"
            raise UndefinedMetric(f"no interval: undefined in {drawn}")
        if jackknife is None:
            low, high = np.quantile(replicates[~undefined], [tail, 1 - tail])
            return float(low), float(high)
        if without := np.isnan(jackknife).sum():
            raise UndefinedMetric(f"no BCa interval: undefined without any one of {without} users")
        return bca_interval(value, replicates[~undefined], jackknife, self.level)


class Statistic:
    """A metric of fixed samples under user weights.

    Attributes:
        value: with all weights 1.
        usable: [users] bool, which of them can move it.
    """

    value: float
    usable: np.ndarray

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """User weights [n, users] -> [n] values, NaN where undefined."""
        raise NotImplementedError

    def leave_one_out(self) -> np.ndarray:
        """[users] the metric without each user: weights of 1, and 0 for that user."""
        raise NotImplementedError


class Ratio(Statistic):
    """sum_u w_u top_u / sum_u w_u bottom_u, from the sums of each user [users]; undefined if all `bottom` are 0."""

    def __init__(self, metric: str, top: np.ndarray, bottom: np.ndarray, value: float | None = None) -> None:
        self.top, self.bottom, self.usable = top, bottom.astype(np.float64), bottom > 0
        if not self.usable.any():
            raise UndefinedMetric(f"{metric}: no user{_USABLE.get(metric, '')}")
        self.value = float(top.sum() / bottom.sum()) if value is None else value

    @classmethod
    def of_samples(cls, metric: str, codes: np.ndarray, top: np.ndarray, bottom: np.ndarray) -> Ratio:
        """From the terms of each sample [n], in float64."""
        top, bottom = np.asarray(top, np.float64), np.asarray(bottom, np.float64)
        if not top.shape == bottom.shape == codes.shape:
            raise ValueError(
                f"{metric}: {codes.size} samples have users, but the values have the shapes {top.shape} and "
                f"{bottom.shape}"
            )
        value = float(top.sum() / bottom.sum()) if bottom.any() else None
        return cls(metric, np.bincount(codes, weights=top), np.bincount(codes, weights=bottom), value)

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        return _divide(weights @ self.top, weights @ self.bottom)

    def leave_one_out(self) -> np.ndarray:
        return _divide(self.top.sum() - self.top, self.bottom.sum() - self.bottom)


class WeightedAUC(Statistic):
    """AUC with the sample weights of the replicate; exact, since all sums are integers below 2^53."""

    def __init__(self, codes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> None:
        self.value = auc(scores, labels)
        scores, labels = np.asarray(scores, np.float64), np.asarray(labels) == 1
        pairs = PairOrder(scores, labels)
        self.positive_users, self.negative_users = codes[pairs.positives], codes[pairs.negatives]
        self.below, self.not_above = pairs.below, pairs.not_above
        self.samples = codes, scores, labels
        self.usable = np.ones(codes.max() + 1, bool)

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        result = np.empty(len(weights))
        for i, weight in enumerate(weights):
            running = np.concatenate([[0.0], np.cumsum(weight[self.negative_users])])
            positive = weight[self.positive_users]
            ordered = positive @ (running[self.below] + running[self.not_above])
            result[i] = _divide(ordered, 2 * positive.sum() * running[-1])
        return result

    def leave_one_out(self) -> np.ndarray:
        """All ordered pairs less those with a sample of the user; pairs within the user are subtracted once."""
        per_user = user_auc(*self.samples)
        positives, negatives = per_user.positives, per_user.negatives
        within = np.where(per_user.defined, np.rint(2 * positives * negatives * per_user.auc), 0)
        place = np.arange(self.negative_users.size)
        won = self.below + self.not_above
        lost = sum(
            won.size - np.searchsorted(bound, place, side="right") for bound in (self.below, self.not_above)
        )
        by_positive = np.bincount(self.positive_users, weights=won, minlength=positives.size)
        by_negative = np.bincount(self.negative_users, weights=lost, minlength=positives.size)
        rest = won.sum() - by_positive - by_negative + within
        return _divide(rest, 2.0 * (won.size - positives) * (place.size - negatives))


def labelled_statistic(metric: str, codes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> Statistic:
    """One of `METRICS` of scores [n] against labels [n]; `codes` [n] are the users, 0 to users - 1.

    Raises:
        UndefinedMetric: if the metric has no value on these samples.
    """
    if metric == "auc":
        return WeightedAUC(codes, scores, labels)
    if metric == "gauc":
        per_user = user_auc(codes, scores, labels)
        weight = np.where(per_user.defined, per_user.positives, 0)
        value = mean_user_auc(per_user)
        return Ratio(metric, np.where(per_user.defined, per_user.auc, 0.0) * weight, weight, value)
    per_sample = {"logloss": row_logloss, "acc": row_accuracy}[metric](scores, labels)
    return Ratio.of_samples(metric, codes, per_sample, np.ones(codes.size))


def bootstrap(
    users: np.ndarray,
    labels: np.ndarray,
    scores: Mapping[str, np.ndarray],
    metrics: Sequence[str] = METRICS,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    jackknife: bool = False,
) -> Bootstrap:
    """Draws the users `n` times and computes every metric of every model on each draw.

    Args:
        users: [samples] the user of each sample, any sortable dtype. The draws depend only on the set of users, `n`
            and `seed`.
        labels: [samples] 0 or 1.
        scores: model name -> [samples]; LogLoss and ACC are undefined for a model whose scores leave [0, 1].
        metrics: out of 'auc', 'logloss', 'acc', 'gauc'.
        n: number of replicates; 0 gives the values without intervals.
        seed: of the draws.
        jackknife: whether to keep the metrics without each user, which BCa intervals need.

    Raises:
        ValueError: on an unknown metric, unequal lengths, NaN scores, or labels other than 0 and 1.
    """
    metrics = tuple(metric.lower() for metric in metrics)
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown:
        raise ValueError(f"bootstrap knows no metric {unknown}; it knows {list(METRICS)}")
    labels = np.asarray(labels)
    return _draw(
        users,
        labels.size,
        {name: dict.fromkeys(metrics, score) for name, score in scores.items()},
        lambda metric, codes, score: labelled_statistic(metric, codes, score, labels),
        (n, seed, level, jackknife),
    )


def bootstrap_ranks(
    users: np.ndarray,
    ranks: Mapping[str, np.ndarray],
    metrics: Sequence[str] = RANK_METRICS,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    jackknife: bool = False,
) -> Bootstrap:
    """`bootstrap` for rankings with one target per sample, paired by user in the same way.

    Args:
        users: [samples] the user of each; the draws are those of `bootstrap` for the same users, `n` and `seed`.
        ranks: model name -> [samples] rank of the target, as `target_ranks` gives it.
        metrics: hr@k, ndcg@k, mrr@k with any k.
        n, seed, level, jackknife: as in `bootstrap`.

    Raises:
        ValueError: on an unknown metric, unequal lengths, no samples, or ranks that are no whole numbers from 1 on.
    """
    ratios = {
        name: {m.lower(): (row_rank_metric(m, rank), np.ones(len(rank))) for m in metrics}
        for name, rank in ranks.items()
    }
    return bootstrap_ratios(users, ratios, n, seed, level, jackknife)


def bootstrap_ratios(
    users: np.ndarray,
    ratios: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]],
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    jackknife: bool = False,
) -> Bootstrap:
    """The bootstrap of any metrics of the form sum of `top` / sum of `bottom` over the samples.

    Args:
        users: [samples] the user of each.
        ratios: model name -> metric -> (top [samples], bottom [samples] >= 0); the same metrics for every model. A
            user counts as able to move a metric if some model has a positive `bottom` in one of its samples.
        n, seed, level, jackknife: as in `bootstrap`.

    Raises:
        ValueError: if lengths or metrics differ, or there are no models or no samples.
    """
    users = np.asarray(users)
    if not users.size and ratios:
        raise UndefinedMetric("there are no samples to evaluate")
    return _draw(
        users,
        users.size,
        ratios,
        lambda metric, codes, terms: Ratio.of_samples(metric, codes, *terms),
        (n, seed, level, jackknife),
    )


def _draw(
    users: np.ndarray,
    size: int,
    models: Mapping[str, Mapping[str, Any]],
    statistic_of: Callable[[str, np.ndarray, Any], Statistic],
    how: tuple[int, int, float, bool],
) -> Bootstrap:
    """The core of all three: one statistic per model and metric, then the same draws of users for all of them."""
    n, seed, level, jackknife = how
    if n < 0 or not 0 < level < 1:
        raise ValueError(f"bootstrap needs n >= 0 and 0 < level < 1, not n={n}, level={level}")
    if not models:
        raise ValueError("bootstrap was given no models")
    names, codes = user_codes(users, size)
    metrics = tuple(next(iter(models.values())))
    result = Bootstrap(names.size, size, n, seed, level, metrics)
    statistics: dict[str, dict[str, Statistic]] = {}
    usable = {metric: np.zeros(names.size, bool) for metric in metrics}
    for name, of_model in models.items():
        if tuple(of_model) != metrics:
            raise ValueError(f"{name} has the metrics {list(of_model)}, but others have {list(metrics)}")
        result.values[name], result.reasons[name], statistics[name] = {}, {}, {}
        for metric, data in of_model.items():
            try:
                statistic = statistics[name][metric] = statistic_of(metric, codes, data)
                result.values[name][metric] = statistic.value
                usable[metric] |= statistic.usable
            except UndefinedMetric as error:
                result.values[name][metric], result.reasons[name][metric] = None, str(error)
        result.replicates[name] = {metric: np.empty(n) for metric in statistics[name]}
        if jackknife:
            result.jackknife[name] = {m: s.leave_one_out() for m, s in statistics[name].items()}
    result.usable_users = {metric: int(of_metric.sum()) for metric, of_metric in usable.items()}
    generator = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_WEIGHTS // max(1, names.size))
    for begin in range(0, n, chunk):
        drawn = (generator.integers(0, names.size, names.size) for _ in range(min(chunk, n - begin)))
        # [replicates, users]: how often each user was drawn
        weights = np.stack([np.bincount(draw, minlength=names.size).astype(np.float64) for draw in drawn])
        for name, of_model in statistics.items():
            for metric, statistic in of_model.items():
                result.replicates[name][metric][begin : begin + len(weights)] = statistic(weights)
    return result


def _divide(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(bottom > 0, np.divide(top, bottom), np.nan)
