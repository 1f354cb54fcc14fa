"""Ranking evaluation with one target per sample: from scores to the target's rank, from ranks to metrics.

A sample is a user with one next item, the target. A model scores candidates, all items or a few, and every metric
follows from one number per sample:

    rank = 1 + number of other candidates whose score is at least the target's

Ties thus count against the model. With a sort, ties would be broken by the position of the target in memory: a
model that gives every item the same score would be perfect in RecBole's evaluator wherever the target comes first.
Here the target is last. Ties are real: two items of one title get one score from a language model, and
half-precision scores coincide often.

    HR@k    1 if rank <= k, else 0
    NDCG@k  1 / log2(rank + 1) if rank <= k, else 0        the ideal DCG of a single target is 1
    MRR@k   1 / rank if rank <= k, else 0

averaged over all samples, in float64. Without ties they equal RecBole's Hit, NDCG and MRR.
"""

from __future__ import annotations

import re

import numpy as np
import torch

RANK_METRICS = ("hr@1", *(f"{name}@{k}" for name in ("hr", "ndcg", "mrr") for k in (5, 10, 20)))
"""What is computed unless one asks for others. At 1 all three are the same."""
_NAME = re.compile(r"(hr|ndcg|mrr)@([1-9][0-9]*)")


def target_ranks(scores: torch.Tensor | np.ndarray, targets: torch.Tensor | np.ndarray) -> torch.Tensor:
    """The rank of each sample's target among its candidates, 1 being best; ties count against the model.

    Args:
        scores: [B, n_items], -inf for whatever is not a candidate.
        targets: [B] column of each sample's target.

    Returns:
        [B] int64, on the device of `scores`.

    Raises:
        ValueError: if the shapes do not fit, a score is NaN, or a target is no candidate (it is out of
            range or has the score -inf).
    """
    scores = torch.as_tensor(scores).detach()
    targets = torch.as_tensor(targets, device=scores.device).long()
    if scores.dim() != 2 or targets.shape != scores.shape[:1]:
        raise ValueError(
            f"ranking needs scores [samples, items] and one target per sample, not {tuple(scores.shape)} "
            f"and {tuple(targets.shape)}"
        )
    if not len(scores):
        return targets
    if targets.min() < 0 or targets.max() >= scores.shape[1]:
        raise ValueError(
            f"the targets {int(targets.min())}..{int(targets.max())} leave the {scores.shape[1]} columns"
        )
    missing = torch.isnan(scores).any(dim=1)
    if missing.any():
        raise ValueError(
            f"the model gave NaN scores in {int(missing.sum())} of {len(missing)} samples, "
            f"the first being sample {int(missing.int().argmax())} of the batch"
        )
    own = scores.gather(1, targets[:, None])
    outside = own[:, 0] == -torch.inf
    if outside.any():
        row = int(outside.int().argmax())
        raise ValueError(
            f"the target of {int(outside.sum())} of {len(outside)} samples has the score -inf, which marks what "
            f"is no candidate; the first is item {int(targets[row])} in sample {row} of the batch: put the "
            "target among the candidates and give it a finite score"
        )
    return (scores >= own).sum(dim=1)  # the target is >= itself: that is the 1


def row_rank_metric(metric: str, ranks: np.ndarray) -> np.ndarray:
    """[n] float64: what each sample contributes to a metric such as 'hr@1', 'ndcg@10' or 'mrr@10'.

    Raises:
        ValueError: on an unknown metric, or ranks that are no whole numbers from 1 on.
    """
    kind, k = parse_rank_metric(metric)
    ranks = _check_ranks(ranks)
    gain = {
        "hr": lambda: np.ones(ranks.size),
        "ndcg": lambda: 1 / np.log2(ranks + 1),
        "mrr": lambda: 1 / ranks,
    }[kind]()
    return np.where(ranks <= k, gain, 0.0)


def parse_rank_metric(metric: str) -> tuple[str, int]:
    """'NDCG@10' -> ('ndcg', 10).

    Raises:
        ValueError: if it is none of hr@k, ndcg@k and mrr@k with a whole k from 1 on.
    """
    found = _NAME.fullmatch(metric.lower())
    if found is None:
        raise ValueError(
            f"there is no rank metric {metric!r}; there are hr@k, ndcg@k and mrr@k, such as 'hr@1'"
        )
    return found[1], int(found[2])


def _check_ranks(ranks: np.ndarray) -> np.ndarray:
    ranks = np.asarray(ranks)
    if ranks.ndim != 1 or (ranks.size and (ranks.dtype.kind not in "iu" or ranks.min() < 1)):
        raise ValueError(
            f"ranks must be a vector of whole numbers from 1 on, not {ranks.dtype} of the shape {ranks.shape}"
            + (f" with {ranks.min()}" if ranks.size and ranks.dtype.kind in "iuf" else "")
        )
    return ranks
