"""All interactions, sorted by user and time, kept once and shared by every split.

A sample's history is a slice of these arrays, so nothing of size samples x history length is ever stored::

    position     0   1   2   3   4   5   6   7
    user         1   1   1   1   1   2   2   2
    item_ids    10  14  11  17  12  10  13  11         user_start = [0, 0, 5, 8]
                                 ^
    user 0 is RecBole's padding;
    the sample (user 1, item 12) lies at position 4, its ``history_end``: its history is positions [0, 4)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass
class HistoryIndex:
    """The sorted interactions.

    Attributes:
        item_ids: internal item ids, int64 ``[n]``.
        labels: 0/1 labels, float32 ``[n]``; ``None`` if the task has none.
        timestamps: exact times, float64 ``[n]`` (RecBole's own are float32).
        ratings: raw ratings ("stars"), float32 ``[n]``; ``None`` if the data has none.
        user_start: int64 ``[n_users + 1]``; user ``u`` owns positions ``[user_start[u], user_start[u + 1])``.
        ties: ``'order'``: everything before the sample counts as its history; ``'strict'``: nothing that carries
            the sample's own timestamp does.
        row_start: int64 ``[n]``, the first position each sample's history may use (``history_scope: split``);
            ``None``: from the user's first interaction on.
        negatives: for each interaction another item, int64 ``[n]``; ``None`` where no model learns from them.
        opens_split: which interactions are their user's first validation sample, or his first test sample, bool
            ``[n]``; ``None`` before the samples are split.
    """

    item_ids: np.ndarray
    labels: np.ndarray | None
    timestamps: np.ndarray
    ratings: np.ndarray | None
    user_start: np.ndarray
    ties: str = "order"
    row_start: np.ndarray | None = None
    negatives: np.ndarray | None = None
    opens_split: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.ties not in ("order", "strict"):
            raise ValueError(f"history_ties: {self.ties!r} is neither 'order' nor 'strict'")

    @classmethod
    def from_time_order(
        cls,
        user_ids: np.ndarray,
        item_ids: np.ndarray,
        labels: np.ndarray | None,
        timestamps: np.ndarray,
        ratings: np.ndarray | None,
        *,
        n_users: int,
        ties: str = "order",
    ) -> tuple[HistoryIndex, np.ndarray]:
        """Group interactions that are in time order (arrays ``[n]``) by user.

        Returns:
            The index, and for each interaction, in the order given, its position in the index, int64 ``[n]``.
        """
        by_user = np.argsort(user_ids, kind="stable")
        position = np.empty(len(by_user), dtype=np.int64)
        position[by_user] = np.arange(len(by_user))
        user_start = np.zeros(n_users + 1, dtype=np.int64)
        np.cumsum(np.bincount(user_ids, minlength=n_users), out=user_start[1:])
        index = cls(
            item_ids=item_ids[by_user].astype(np.int64),
            labels=None if labels is None else labels[by_user].astype(np.float32),
            timestamps=timestamps[by_user].astype(np.float64),
            ratings=None if ratings is None else ratings[by_user].astype(np.float32),
            user_start=user_start,
            ties=ties,
        )
        return index, position

    def __len__(self) -> int:
        return len(self.item_ids)

    @cached_property
    def tie_start(self) -> np.ndarray:
        """For each position the first one of the same user with the same timestamp, int64 ``[n]``."""
        new = np.ones(len(self), dtype=bool)
        new[1:] = self.timestamps[1:] != self.timestamps[:-1]
        starts = self.user_start[:-1]
        new[starts[starts < len(self)]] = True
        return np.maximum.accumulate(np.where(new, np.arange(len(self)), 0))

    def draw_negatives(self, n_items: int, seed: int) -> None:
        """Draw :attr:`negatives` uniformly from all items but the interaction's own, as RecBole does for DIEN."""
        drawn = np.random.default_rng(seed).integers(1, n_items - 1, len(self))
        self.negatives = drawn + (drawn >= self.item_ids)

    def bounds(self, user_ids: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The slice ``[start, end)`` each sample may look at, under ``ties`` and ``row_start``.

        Args:
            user_ids: ``[B]``.
            ends: ``[B]`` each sample's own position; or the end of the user's interactions for a sample that is
                still to come, whose history is all of them.
        """
        start, own = self.user_start[user_ids], ends < self.user_start[user_ids + 1]
        inside = np.where(own, ends, 0)
        if self.row_start is not None:
            start = np.where(own, self.row_start[inside], start)
        if self.ties == "strict":
            ends = np.where(own, self.tie_start[inside], ends)
        return start, np.maximum(ends, start)
