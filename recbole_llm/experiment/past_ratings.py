"""What a user's earlier ratings alone tell of the next one: how much of a score needs no text and no item.

A language model that reads `Fargo:4`, `Heat:2`, .. also reads how this user rates at the moment. This reference reads
nothing else: a logistic regression on five averages, fitted on the labels that tune the language model.
"""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from recbole_llm.data.dataset import HISTORY_END, HistoryDataset
from recbole_llm.data.history import HistoryIndex
from recbole_llm.utils.fields import ROW_ID

LENGTHS = (None, 50, 10, 3, 1)
"""Averages are over so many of a user's latest earlier interactions; ``None``: over all of them."""
UNFITTED = 10
"""Of these the one that stands alone where nothing can be fitted."""


def past_ratings_scores(train: HistoryDataset, test: HistoryDataset) -> np.ndarray:
    """Probability of the label 1 from the user's earlier ratings (from labels, where there are no ratings).

    Without training samples, or with one class of labels in them, it is the average of the last ``UNFITTED``, as a
    share of the scale, of these and two more ratings: the lowest and the highest one.

    Args:
        train: the samples whose labels it may learn from.
        test: the samples to score, ``n`` of them.

    Returns:
        float64 ``[n]``.
    """
    features = _averages_of(test)
    _, once = np.unique(train.inter_feat[ROW_ID].numpy(), return_index=True)
    train = train.subset(
        once
    )  # the same fit whatever the layout's order, and where mixed_training shows samples twice
    labels = train.inter_feat[train.label_field].numpy()
    if len(np.unique(labels)) < 2:
        return (UNFITTED * features[:, LENGTHS.index(UNFITTED)] + 1) / (UNFITTED + 2)
    fitted = make_pipeline(StandardScaler(), LogisticRegression()).fit(_averages_of(train), labels)
    return fitted.predict_proba(features)[:, 1]


def averages(history: HistoryIndex, users: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Averages of the ratings that users gave before their samples, as shares of the scale.

    Args:
        users: ``[n]``.
        ends: ``[n]``, each sample's position in the history.

    Returns:
        float64 ``[n, len(LENGTHS)]`` in [0, 1]; 0.5 for a sample without any.
    """
    values = history.ratings if history.ratings is not None else history.labels
    assert values is not None  # the labelled task has labels
    low, high = float(values.min()), float(values.max())
    shares = (values.astype(np.float64) - low) / (high - low or 1.0)
    sums = np.concatenate([[0.0], np.cumsum(shares)])
    first, end = history.bounds(users, ends)
    columns = []
    for length in LENGTHS:
        start = first if length is None else np.maximum(first, end - length)
        n = end - start
        columns.append(np.where(n > 0, (sums[end] - sums[start]) / np.maximum(n, 1), 0.5))
    return np.stack(columns, axis=1)


def _averages_of(samples: HistoryDataset) -> np.ndarray:
    rows = samples.inter_feat
    return averages(samples.history, rows[samples.uid_field].numpy(), rows[HISTORY_END].numpy())
