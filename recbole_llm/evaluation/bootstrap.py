"""Intervals by the bootstrap over users, and paired differences of models from the same draws.

Rows of one user are not independent, so whole users are drawn with replacement: a replicate gives each row
the number of times its user was drawn as weight. Every metric is then a weighted one, and nothing is copied
or sorted again:

    LogLoss, ACC    sum_u w_u S_u / sum_u w_u n_u          S_u the user's sum of losses or hits, n_u its rows
    GAUC            sum_u w_u P_u AUC_u / sum_u w_u P_u     over users with both classes
    AUC             from one sort by score, see `PairOrder`
    HR, NDCG, MRR   sum_u w_u S_u / sum_u w_u n_u          S_u the user's sum of gains, see `ranking`

All models share the draws, so that the difference of two models is taken within each replicate (paired).
Intervals are percentile intervals (Efron & Tibshirani 1993, chapter 13). With `jackknife=True` the metrics
without each user are kept too, exact and without copies of the rows, for BCa intervals (`method="bca"`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from recbole_llm.evaluation.metrics import (
    PairOrder,
    UndefinedMetric,
    accuracy,
    auc,
    logloss,
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
"""With fewer distinct users than this an interval would be an invention, and none is given."""
MAX_UNDEFINED = 0.05
"""Share of replicates without a value (one class drawn) above which no interval is given."""
_CHUNK_WEIGHTS = 2_000_000
"""Replicates are worked off in chunks of this many user weights: 16 MB, whatever the number of users."""
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
        result = {"value": self.value, "low": self.low, "high": self.high}
        return result | {"reason": self.reason} if self.reason else result


@dataclass
class Bootstrap:
    """Replicates of every metric of every model; ask it for intervals of models and of differences.

    Attributes:
        values: name -> metric -> value on the rows themselves, None if undefined.
        replicates: name -> metric -> [samples] float64, NaN where the draw leaves it undefined.
        reasons: name -> metric -> why the value is undefined.
        usable_users: metric -> number of users that can move it (for GAUC: those with both classes; for a
            ratio: those with anything below the line).
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
        self._check_method(method)
        reason = self.reasons[name].get(metric)
        if reason is not None:
            return Interval(None, reason=reason)
        jackknife = self.jackknife[name][metric] if method == "bca" else None
        return self._interval(self.values[name][metric], self.replicates[name][metric], metric, jackknife)

    def difference(self, name: str, reference: str, metric: str, method: str = "percentile") -> Interval:
        """The metric of `name` minus that of `reference`, paired by draw; `method` as in `interval`."""
        self._check_method(method)
        for one in (name, reference):
            reason = self.reasons[one].get(metric)
            if reason is not None:
                return Interval(None, reason=f"{one}: {reason}")
        jackknife = None
        if method == "bca":
            jackknife = self.jackknife[name][metric] - self.jackknife[reference][metric]
        return self._interval(
            self.values[name][metric] - self.values[reference][metric],
            self.replicates[name][metric] - self.replicates[reference][metric],
            metric,
            jackknife,
        )

    def to_dict(self, reference: str | None = None, method: str = "percentile") -> dict:
        """For the json: how it was drawn, every model's intervals, and every difference to `reference`.

        Returns:
            {unit, users, rows, samples, seed, level, models: {name: {metric: interval}},
            differences: {'name - reference': {metric: interval}}}, and {method} first unless 'percentile'.
        """
        names = list(self.values)
        return ({"method": method} if method != "percentile" else {}) | {
            "unit": "user",
            "users": self.users,
            "rows": self.rows,
            "samples": self.samples,
            "seed": self.seed,
            "level": self.level,
            "models": {n: {m: self.interval(n, m, method).to_dict() for m in self.metrics} for n in names},
            "differences": {
                f"{n} - {reference}": {
                    m: self.difference(n, reference, m, method).to_dict() for m in self.metrics
                }
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
            result.replicates[group] = {
                m: np.mean([self.replicates[name][m] for name in members], axis=0) for m in defined
            }
            if self.jackknife:
                result.jackknife[group] = {
                    m: np.mean([self.jackknife[name][m] for name in members], axis=0) for m in defined
                }
        return result

    def _check_method(self, method: str) -> None:
        if method not in METHODS:
            raise ValueError(f"there is no method {method!r} for intervals; there are {list(METHODS)}")
        if method == "bca" and not self.jackknife:
            raise ValueError("the method 'bca' needs the jackknife: draw the bootstrap with jackknife=True")

    def _interval(
        self, value: float, replicates: np.ndarray, metric: str, jackknife: np.ndarray | None = None
    ) -> Interval:
        """A BCa interval where there are jackknife values, else a percentile interval."""
        tail = (1 - self.level) / 2
        usable = self.usable_users[metric]
        if usable < MIN_USERS:
            which = f"{usable} users{_USABLE.get(metric, '')}"
            return Interval(value, reason=f"no interval: only {which}, fewer than {MIN_USERS}")
        if self.samples * tail < 1:
            return Interval(
                value, reason=f"no interval: {self.samples} samples are too few for {self.level:.0%}"
            )
        undefined = np.isnan(replicates)
        if undefined.mean() > MAX_UNDEFINED:
            return Interval(
                value,
                reason=f"no interval: undefined in {undefined.sum()} of {undefined.size} bootstrap samples",
            )
        if jackknife is not None:
            without = np.isnan(jackknife).sum()
            if without:
                return Interval(
                    value, reason=f"no BCa interval: undefined without any one of {without} users"
                )
            try:
                return Interval(value, *bca_interval(value, replicates[~undefined], jackknife, self.level))
            except UndefinedMetric as error:
                return Interval(value, reason=str(error))
        low, high = np.quantile(replicates[~undefined], [tail, 1 - tail])
        return Interval(value, float(low), float(high))


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
        users: [rows] the user of each row, any sortable dtype. The draws depend only on the set of users, `n`
            and `seed`.
        labels: [rows] 0 or 1.
        scores: model name -> [rows]; LogLoss and ACC are undefined for a model whose scores leave [0, 1].
        metrics: out of 'auc', 'logloss', 'acc', 'gauc'.
        n: number of replicates; 0 gives the values without intervals.
        seed: of the draws.
        level: of the intervals.
        jackknife: whether to keep the metrics without each user, which BCa intervals need.

    Raises:
        ValueError: on an unknown metric, unequal lengths, NaN scores, or labels other than 0 and 1.
    """
    metrics = tuple(metric.lower() for metric in metrics)
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown:
        raise ValueError(f"bootstrap knows no metric {unknown}; it knows {list(METRICS)}")
    _check_draws(n, level)
    if not scores:
        raise ValueError("bootstrap was given no model's scores")
    labels = np.asarray(labels)
    names, codes = user_codes(users, labels.size)
    result = Bootstrap(names.size, labels.size, n, seed, level, metrics)
    statistics: dict[str, dict[str, _Statistic]] = {}
    for name, score in scores.items():
        result.values[name], result.reasons[name], statistics[name] = {}, {}, {}
        for metric in metrics:
            try:
                result.values[name][metric] = _VALUE[metric](codes, score, labels)
                statistics[name][metric] = _STATISTIC[metric](
                    codes, np.asarray(score, np.float64), labels == 1
                )
            except UndefinedMetric as error:
                result.values[name][metric], result.reasons[name][metric] = None, str(error)
    positive = np.bincount(codes[labels == 1], minlength=names.size) > 0
    negative = np.bincount(codes[labels != 1], minlength=names.size) > 0
    result.usable_users = {
        m: int((positive & negative).sum()) if m == "gauc" else names.size for m in metrics
    }
    _replicate(result, statistics)
    if jackknife:
        _leave_out(result, statistics)
    return result


def bootstrap_ranks(
    users: np.ndarray,
    ranks: Mapping[str, np.ndarray],
    metrics: Sequence[str] = RANK_METRICS,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    jackknife: bool = False,
) -> Bootstrap:
    """`bootstrap` for rankings with one target per row, paired by user in the same way.

    Args:
        users: [rows] the user of each row; the draws are those of `bootstrap` for the same users, `n` and
            `seed`.
        ranks: model name -> [rows] rank of the target, as `target_ranks` gives it.
        metrics: hr@k, ndcg@k, mrr@k with any k.
        n: number of replicates; 0 gives the values without intervals.
        seed: of the draws.
        level: of the intervals.
        jackknife: whether to keep the metrics without each user, which BCa intervals need.

    Raises:
        ValueError: on an unknown metric, unequal lengths, no rows, or ranks that are no whole numbers from 1
            on.
    """
    metrics = tuple(dict.fromkeys(metric.lower() for metric in metrics))
    ratios = {}
    for name, rank in ranks.items():
        gains = {metric: row_rank_metric(metric, rank) for metric in metrics}
        ratios[name] = {metric: (gain, np.ones(gain.size)) for metric, gain in gains.items()}
    return bootstrap_ratios(users, ratios, n=n, seed=seed, level=level, jackknife=jackknife)


def bootstrap_ratios(
    users: np.ndarray,
    ratios: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]],
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    jackknife: bool = False,
) -> Bootstrap:
    """The bootstrap of any metrics of the form sum of `top` / sum of `bottom` over the rows.

    Args:
        users: [rows] the user of each row.
        ratios: model name -> metric -> (top [rows], bottom [rows] >= 0); the same metrics for every model. A
            user counts as able to move a metric if some model has a positive `bottom` in his rows.
        n, seed, level, jackknife: as in `bootstrap`.

    Raises:
        ValueError: if lengths or metrics differ, or there are no models or no rows.
    """
    _check_draws(n, level)
    if not ratios:
        raise ValueError("bootstrap was given no models")
    metrics = tuple(next(iter(ratios.values())))
    users = np.asarray(users)
    names, codes = user_codes(users, users.size)
    if not users.size:
        raise UndefinedMetric("there are no rows to evaluate")
    result = Bootstrap(names.size, users.size, n, seed, level, metrics)
    statistics: dict[str, dict[str, _Statistic]] = {}
    usable = {metric: np.zeros(names.size, bool) for metric in metrics}
    for name, of_model in ratios.items():
        if tuple(of_model) != metrics:
            raise ValueError(f"{name} has the metrics {list(of_model)}, but others have {list(metrics)}")
        result.values[name], result.reasons[name], statistics[name] = {}, {}, {}
        for metric, (top, bottom) in of_model.items():
            top, bottom = np.asarray(top, np.float64), np.asarray(bottom, np.float64)
            if not top.shape == bottom.shape == users.shape:
                raise ValueError(
                    f"{name}, {metric}: {users.size} rows have users, but the values have the shapes "
                    f"{top.shape} and {bottom.shape}"
                )
            below = np.bincount(codes, weights=bottom)
            usable[metric] |= below > 0
            if not below.any():
                reason = f"{metric}: no user{_USABLE.get(metric, '')}"
                result.values[name][metric], result.reasons[name][metric] = None, reason
                continue
            result.values[name][metric] = float(top.sum() / bottom.sum())
            statistics[name][metric] = _Ratio(np.bincount(codes, weights=top), below)
    result.usable_users = {metric: int(of_metric.sum()) for metric, of_metric in usable.items()}
    _replicate(result, statistics)
    if jackknife:
        _leave_out(result, statistics)
    return result


def _check_draws(n: int, level: float) -> None:
    if n < 0 or not 0 < level < 1:
        raise ValueError(f"bootstrap needs n >= 0 and 0 < level < 1, not n={n}, level={level}")


def _replicate(result: Bootstrap, statistics: Mapping[str, Mapping[str, _Statistic]]) -> None:
    """Fills `result.replicates`: the same draws of users for every statistic of every model."""
    result.replicates |= {
        name: {metric: np.empty(result.samples) for metric in of_model}
        for name, of_model in statistics.items()
    }
    generator = np.random.default_rng(result.seed)
    chunk = max(1, _CHUNK_WEIGHTS // max(1, result.users))
    for begin in range(0, result.samples, chunk):
        weights = _draw(generator, result.users, min(chunk, result.samples - begin))
        for name, of_model in statistics.items():
            for metric, statistic in of_model.items():
                result.replicates[name][metric][begin : begin + len(weights)] = statistic(weights)


def _leave_out(result: Bootstrap, statistics: Mapping[str, Mapping[str, _Statistic]]) -> None:
    """Fills `result.jackknife`: every statistic of every model without each of the users."""
    result.jackknife |= {
        name: {metric: statistic.leave_one_out() for metric, statistic in of_model.items()}
        for name, of_model in statistics.items()
    }


def _draw(generator: np.random.Generator, n_users: int, n: int) -> np.ndarray:
    """[n, n_users] float64: how often each user was drawn, each row summing to n_users."""
    return np.stack(
        [
            np.bincount(generator.integers(0, n_users, n_users), minlength=n_users).astype(np.float64)
            for _ in range(n)
        ]
    )


class _Statistic:
    """A weighted metric of fixed rows: user weights [n, n_users] -> [n] values, NaN where undefined."""

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def leave_one_out(self) -> np.ndarray:
        """[n_users] the metric without each user: weights of 1, and 0 for that user."""
        raise NotImplementedError


class _Ratio(_Statistic):
    """sum_u w_u top_u / sum_u w_u bottom_u."""

    def __init__(self, top: np.ndarray, bottom: np.ndarray) -> None:
        self.top, self.bottom = top, bottom.astype(np.float64)

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        return _divide(weights @ self.top, weights @ self.bottom)

    def leave_one_out(self) -> np.ndarray:
        return _divide(self.top.sum() - self.top, self.bottom.sum() - self.bottom)


class _WeightedAUC(_Statistic):
    """AUC with the row weights of the replicate; exact, since all sums are integers below 2^53."""

    def __init__(self, codes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> None:
        pairs = PairOrder(scores, labels)
        self.positive_users, self.negative_users = codes[pairs.positives], codes[pairs.negatives]
        self.below, self.not_above = pairs.below, pairs.not_above
        self.rows = codes, scores, labels

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        result = np.empty(len(weights))
        for i, weight in enumerate(weights):
            running = np.concatenate([[0.0], np.cumsum(weight[self.negative_users])])
            positive = weight[self.positive_users]
            ordered = positive @ (running[self.below] + running[self.not_above])
            result[i] = _divide(ordered, 2 * positive.sum() * running[-1])
        return result

    def leave_one_out(self) -> np.ndarray:
        """All ordered pairs less those with a row of the user; pairs within the user are taken off once."""
        per_user = user_auc(*self.rows)
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


def _divide(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(bottom > 0, np.divide(top, bottom), np.nan)


def _mean_by_user(codes: np.ndarray, per_row: np.ndarray) -> _Ratio:
    return _Ratio(np.bincount(codes, weights=per_row), np.bincount(codes))


def _weighted_gauc(codes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> _Ratio:
    per_user = user_auc(codes, scores, labels)
    weight = np.where(per_user.defined, per_user.positives, 0)
    return _Ratio(np.where(per_user.defined, per_user.auc, 0.0) * weight, weight)


_VALUE = {
    "auc": lambda users, scores, labels: auc(scores, labels),
    "logloss": lambda users, scores, labels: logloss(scores, labels),
    "acc": lambda users, scores, labels: accuracy(scores, labels),
    "gauc": lambda users, scores, labels: mean_user_auc(user_auc(users, scores, labels)),
}
_STATISTIC = {
    "auc": _WeightedAUC,
    "logloss": lambda codes, scores, labels: _mean_by_user(codes, row_logloss(scores, labels)),
    "acc": lambda codes, scores, labels: _mean_by_user(codes, row_accuracy(scores, labels)),
    "gauc": _weighted_gauc,
}
