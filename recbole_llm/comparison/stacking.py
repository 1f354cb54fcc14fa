"""The plainest way to use a lens and a language model together: a logistic regression on their two logits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from recbole_llm.evaluation.metrics import UndefinedMetric

LARGEST_LOGIT = 30.0
"""Beyond this a float64 probability says nothing more, and 1 would be infinite."""


def stacked(
    valid: Mapping[str, np.ndarray], test: Mapping[str, np.ndarray], columns: tuple[str, ...]
) -> np.ndarray:
    """``sigmoid(w . logits + c)``, with ``w, c`` of the greatest likelihood on validation rows.

    What a method gains over this is not merely that two sources know more than one. Without regularisation, but for one
    too weak to be seen (1e-6) that keeps separable rows finite.

    Args:
        valid: ``label`` and the columns, probabilities ``[m]``.
        test: the columns ``[n]``.
        columns: which to stack.

    Returns:
        Probabilities ``[n]``.

    Raises:
        UndefinedMetric: if the validation rows have one class only.
    """
    if len(np.unique(valid["label"])) < 2:
        raise UndefinedMetric("the validation rows have one class only: nothing can be fitted on them")

    def logits(rows: Mapping[str, np.ndarray]) -> np.ndarray:
        of_each = np.stack([logit(np.asarray(rows[column], np.float64)) for column in columns], axis=1)
        return np.clip(of_each, -LARGEST_LOGIT, LARGEST_LOGIT)

    fitted = LogisticRegression(C=1e6, max_iter=1000, tol=1e-8).fit(logits(valid), valid["label"])
    return expit(fitted.decision_function(logits(test)))
