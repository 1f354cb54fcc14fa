"""The metrics of labelled (CTR) evaluation: plain NumPy functions, and the two of them that RecBole lacks.

RecBole 1.2.1 has AUC and LogLoss for labelled samples, but no accuracy, and its GAUC only ranks candidates: requested
together with labelled samples it fails. `register_metrics` adds `ACC` and `LabeledGAUC` to RecBole's
own evaluator registry, so that `metrics: [AUC, LogLoss, ACC, LabeledGAUC]` works for every model that RecBole
can evaluate.

All arithmetic is float64. AUCs are sums of integers (twice the number of ordered pairs) and one division, so
they are exact for any number of ties. One rule holds for what cannot be computed:

* the functions raise `UndefinedMetric` (a ValueError) when a metric has no value on good data (one class
  only, no samples, scores that are no probabilities), and a plain ValueError on bad data (NaN scores, labels
  other than 0 and 1);
* the two RecBole metrics turn `UndefinedMetric` into NaN and a logged warning, as RecBole's AUC does;
* `bootstrap` and the report turn it into None with the reason beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from recbole.evaluator import register as recbole_register
from recbole.evaluator.base_metric import AbstractMetric, LossMetric
from recbole.utils import EvaluatorType

logger = logging.getLogger(__name__)

LOG_EPS = 1e-15
"""Probabilities are kept this far from 0 and 1 before the logarithm, as RecBole's LogLoss does."""


class UndefinedMetric(ValueError):
    """The metric has no value on these samples, though the samples themselves are valid."""


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, a tie being half.

    Args:
        scores: [n] any real numbers, higher meaning more likely positive.
        labels: [n] 0 or 1.

    Raises:
        UndefinedMetric: if only one class is present.
    """
    scores, labels = _check(scores, labels)
    _check_two_classes(labels, "AUC")
    pairs = PairOrder(scores, labels)
    return float((pairs.below + pairs.not_above).sum()) / (2 * pairs.positives.size * pairs.negatives.size)


def accuracy(p: np.ndarray, labels: np.ndarray, threshold: float = 0.5) -> float:
    """Share of samples where `p > threshold` agrees with the label (a probability of exactly 0.5 predicts 0).

    Raises:
        UndefinedMetric: if `p` leaves [0, 1] or there are no samples.
    """
    return float(row_accuracy(p, labels, threshold).mean())


def gauc(users: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> float:
    """AUC within each user, averaged with the user's number of positives as weight.

        GAUC = sum_u P_u AUC_u / sum_u P_u        over users with at least one positive and one negative

    That is RecBole's definition, so the figures compare with its ranking GAUC. (The DIN paper, arXiv
    1706.06978, weights by impressions, that is by the user's samples.) Users with one class have no AUC; they
    are left out, and their number is logged.

    Args:
        users: [n] one id per sample, any dtype NumPy can sort.
        scores: [n]; labels: [n] 0 or 1.

    Raises:
        UndefinedMetric: if no user has both classes.
    """
    per_user = user_auc(users, scores, labels)
    value = mean_user_auc(per_user)
    left_out = ~per_user.defined
    if left_out.any():
        n_rows = per_user.positives + per_user.negatives
        logger.info(
            "GAUC: %d of %d users (%d of %d samples) have only one class and are left out",
            left_out.sum(),
            left_out.size,
            n_rows[left_out].sum(),
            n_rows.sum(),
        )
    return value


class UserAUC(NamedTuple):
    """Per-user AUC, users in sorted order, all arrays [n_users]."""

    users: np.ndarray
    auc: np.ndarray
    """float64, NaN where the user has one class."""
    positives: np.ndarray
    negatives: np.ndarray

    @property
    def defined(self) -> np.ndarray:
        """True for users with both classes."""
        return (self.positives > 0) & (self.negatives > 0)


def user_auc(users: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> UserAUC:
    """AUC of every user in one sort, by the rank-sum formula with average ranks for ties.

    AUC_u = (sum of the ranks of u's positives - P_u (P_u + 1) / 2) / (P_u N_u), ranks counted from 1 within
    the user.
    """
    scores, labels = _check(scores, labels)
    names, codes = user_codes(users, scores.size)
    n_users = names.size
    order = np.lexsort((scores, codes))
    code, score, positive = codes[order], scores[order], labels[order]
    new_user = np.diff(code, prepend=-1) != 0
    new_value = new_user.copy()
    new_value[1:] |= score[1:] != score[:-1]
    start = np.flatnonzero(new_value)
    end = np.append(start[1:], score.size)
    tie = np.cumsum(new_value) - 1
    # Twice the average rank of a run of ties over positions start..end-1 is (start + 1) + end: an integer.
    double_rank = (start + end + 1)[tie] - 2 * np.flatnonzero(new_user)[code]
    n_positive = np.bincount(code[positive], minlength=n_users)
    n_negative = np.bincount(code, minlength=n_users) - n_positive
    rank_sum = np.bincount(code[positive], weights=double_rank[positive], minlength=n_users)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = (rank_sum - n_positive * (n_positive + 1)) / (2 * n_positive * n_negative)
    value[(n_positive == 0) | (n_negative == 0)] = np.nan
    return UserAUC(names, value, n_positive, n_negative)


def mean_user_auc(per_user: UserAUC) -> float:
    """GAUC from the users' AUCs; see `gauc`.

    Raises:
        UndefinedMetric: if no user has both classes.
    """
    defined = per_user.defined
    if not defined.any():
        raise UndefinedMetric(f"GAUC: none of the {defined.size} users has both classes")
    weights = per_user.positives[defined]
    return float(per_user.auc[defined] @ weights / weights.sum())


class PairOrder:
    """Where each positive stands among the negatives: all an AUC needs, for any weights of the samples.

    With sample weights w and C the running sum of the negatives' weights in the order of their scores (C[0] =
    0),

        AUC = sum_i w_i (C[below_i] + C[not_above_i]) / (2 W_pos W_neg)        i over the positives

    Attributes:
        positives: [P] indices of the positives, in ascending order of score.
        negatives: [N] indices of the negatives, in ascending order of score.
        below: [P] how many negatives score strictly lower than this positive.
        not_above: [P] how many negatives score at most as high as this positive.
    """

    def __init__(self, scores: np.ndarray, labels: np.ndarray) -> None:
        positive, negative = np.flatnonzero(labels), np.flatnonzero(~labels)
        self.positives = positive[np.argsort(scores[positive], kind="stable")]
        self.negatives = negative[np.argsort(scores[negative], kind="stable")]
        self.below = np.searchsorted(scores[self.negatives], scores[self.positives], side="left")
        self.not_above = np.searchsorted(scores[self.negatives], scores[self.positives], side="right")


def row_logloss(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[n] float64: -log(probability given to the label) of each sample, `p` [n] being the probability of 1.

    Note:
        `p` is clipped to [1e-15, 1 - 1e-15], as in RecBole. A float32 sigmoid is exactly 1 from a logit of
        about 17 on, and one such sample that is wrong costs 34.5: pass float64 probabilities where possible.

    Raises:
        UndefinedMetric: if `p` leaves [0, 1] or there are no samples.
    """
    p, labels = _check_probabilities(p, labels, "LogLoss")
    p = np.clip(p, LOG_EPS, 1 - LOG_EPS)
    return -np.log(np.where(labels, p, 1 - p))


def row_accuracy(p: np.ndarray, labels: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """[n] bool, whether each sample is classified correctly; see `accuracy`."""
    p, labels = _check_probabilities(p, labels, "ACC")
    return (p > threshold) == labels


def user_codes(users: np.ndarray, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct users, sorted, and each sample's index among them."""
    users = np.asarray(users)
    if users.shape != (n_rows,):
        raise ValueError(f"users has the shape {users.shape}, but there are {n_rows} samples")
    if users.dtype == object:  # RecBole's tokens
        users = users.astype(str)
    return np.unique(users, return_inverse=True)


def _check(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores as [n] float64 and labels as [n] bool, or a ValueError that says what is wrong."""
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            f"scores and labels must be two vectors of one length, not {scores.shape} and {labels.shape}"
        )
    if not scores.size:
        raise UndefinedMetric("there are no samples to evaluate")
    if np.isnan(scores).any():
        missing = np.isnan(scores)
        raise ValueError(
            f"{missing.sum()} of {missing.size} scores are NaN, the first at sample {missing.argmax()}"
        )
    positive = labels == 1
    if not (positive | (labels == 0)).all():
        bad = labels[~(positive | (labels == 0))][0]
        raise ValueError(
            f"labels must be 0 or 1, but there is {bad!r}; set `threshold` to turn ratings into labels"
        )
    return scores, positive


def _check_probabilities(p: np.ndarray, labels: np.ndarray, metric: str) -> tuple[np.ndarray, np.ndarray]:
    p, labels = _check(p, labels)
    if p.min() < 0 or p.max() > 1:
        raise UndefinedMetric(
            f"{metric} needs probabilities, but the scores range from {p.min():g} to {p.max():g}; "
            "use AUC alone or put a sigmoid on the model's scores"
        )
    return p, labels


def _check_two_classes(labels: np.ndarray, metric: str) -> None:
    if labels.all() or not labels.any():
        raise UndefinedMetric(
            f"{metric} needs both classes, but all {labels.size} labels are {int(labels[0])}"
        )


class ACC(LossMetric):
    """Accuracy of labelled samples at a probability of 0.5, as a RecBole metric named `ACC`; see `accuracy`."""

    def calculate_metric(self, dataobject):
        """Returns {'acc': value}, NaN with a warning if the scores are no probabilities."""
        return self.output_metric("acc", dataobject)

    def metric_info(self, preds, trues):
        """Accuracy of preds [n] against trues [n]."""
        return _or_nan(accuracy, preds, trues)


class LabeledGAUC(AbstractMetric):
    """GAUC of labelled samples, as a RecBole metric named `LabeledGAUC` with the result key `gauc`; see `gauc`.

    It needs each sample's user, which `RowCollector` puts into 'data.user' and RecBole's own Collector does not.
    """

    metric_type = EvaluatorType.VALUE
    metric_need = ["rec.score", "data.label", "data.user"]

    def calculate_metric(self, dataobject):
        """Returns {'gauc': value}, NaN with a warning if no user has both classes."""
        if "data.user" not in dataobject:
            raise ValueError(
                "LabeledGAUC needs the user of each sample, which RecBole's own Collector does not keep: "
                "set trainer.eval_collector = recbole_llm.evaluation.RowCollector(config)"
            )
        users, scores, labels = (
            dataobject.get(name).reshape(-1).numpy() for name in ("data.user", "rec.score", "data.label")
        )
        return {"gauc": round(_or_nan(gauc, users, scores, labels), self.decimal_place)}


def register_metrics() -> None:
    """Adds `ACC` and `LabeledGAUC` to RecBole's metric registry, in place; calling it again changes nothing.

    RecBole's Config, Register and Evaluator all look names up in these dicts, which other modules hold by
    reference.
    """
    for metric in (ACC, LabeledGAUC):
        name = metric.__name__.lower()
        recbole_register.metrics_dict[name] = metric
        recbole_register.metric_information[name] = metric.metric_need
        recbole_register.metric_types[name] = metric.metric_type


def labeled_metrics(names: Sequence[str]) -> list[str]:
    """The metric names for labelled evaluation: a user's `GAUC` becomes `LabeledGAUC`, the rest stays.

    The result key is `gauc` either way, so `valid_metric` must be `GAUC`, never `LabeledGAUC`.

    >>> labeled_metrics(["AUC", "GAUC"])
    ['AUC', 'LabeledGAUC']
    """
    return ["LabeledGAUC" if name.lower() == "gauc" else name for name in names]


def _or_nan(metric, *arrays: np.ndarray) -> float:
    try:
        return metric(*arrays)
    except UndefinedMetric as error:
        logger.warning("%s; reported as NaN", error)
        return float("nan")
