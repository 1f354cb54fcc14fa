"""The simplest way to combine recommenders: a logistic regression on their logits, fitted on validation samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import cross_val_predict

from recbole_llm.evaluation.metrics import UndefinedMetric

LARGEST_LOGIT = 30.0
"""Beyond this a float64 probability has no further information, and the logit of 1 would be infinite."""
MOST_MODELS = 3
"""The size up to which :func:`best_stack` tries sets of models."""


class Stack(NamedTuple):
    """A fitted stack.

    Attributes:
        probabilities: ``[n]`` of the test samples.
        weights: one per score column, on the logits.
        intercept: the constant.
    """

    probabilities: np.ndarray
    weights: np.ndarray
    intercept: float


def stack(
    labels: np.ndarray, valid: Sequence[np.ndarray], test: Sequence[np.ndarray], columns: Sequence[str] = ()
) -> Stack:
    """``sigmoid(w . logits + c)``, with ``w, c`` of maximum likelihood on validation samples (penalty 1e-6).

    What a method gains over this is more than the combination of several sources.

    Args:
        labels: ``[m]`` of the validation samples.
        valid: the probabilities ``[m]`` of each model on them.
        test: the probabilities ``[n]`` of the same models on the test samples.
        columns: the models' names, for errors.

    Raises:
        UndefinedMetric: if the validation samples have one class only, or a column holds no probabilities.
    """
    if len(np.unique(labels)) < 2:
        raise UndefinedMetric("the validation samples have one class only: a stack cannot be fitted on them")
    fitted = _regression().fit(_logits(valid, columns), labels)
    probabilities = expit(fitted.decision_function(_logits(test, columns)))
    return Stack(probabilities, fitted.coef_[0], float(fitted.intercept_[0]))


def best_stack(labels: np.ndarray, valid: Mapping[str, np.ndarray]) -> tuple[str, ...] | None:
    """The two or three models whose stack has the least log loss on validation samples, by 5-fold cross-validation.

    Args:
        labels: ``[m]``.
        valid: model -> probabilities ``[m]``.

    Returns:
        The models' names; None if there are fewer than two models with probabilities, or fewer than 5 samples of a
        class.
    """
    valid = {name: p for name, p in valid.items() if p.min() >= 0 and p.max() <= 1}
    if len(valid) < 2 or np.unique(labels).size < 2 or np.unique(labels, return_counts=True)[1].min() < 5:
        return None
    losses = {}
    for size in range(2, min(MOST_MODELS, len(valid)) + 1):
        for names in combinations(valid, size):
            logits = _logits([valid[name] for name in names], names)
            predicted = cross_val_predict(_regression(), logits, labels, cv=5, method="predict_proba")
            losses[names] = log_loss(labels, predicted[:, 1])
    return min(losses, key=losses.__getitem__)


def _regression() -> LogisticRegression:
    # C=1e6 is no regularisation to 1e-6, and keeps the weights of separable samples finite.
    return LogisticRegression(C=1e6, max_iter=1000, tol=1e-8)


def _logits(columns: Sequence[np.ndarray], names: Sequence[str]) -> np.ndarray:
    """``[samples, models]``"""
    values = np.asarray(columns, np.float64)
    outside = ((values < 0) | (values > 1)).any(axis=1)
    if outside.any():
        place = int(outside.argmax())
        name = names[place] if len(names) > place else f"column {place}"
        raise UndefinedMetric(f"{name}: the scores are no probabilities, so they cannot be stacked")
    return np.clip(logit(values), -LARGEST_LOGIT, LARGEST_LOGIT).T
