"""The long-short modality retriever: which earlier interactions a lens (long) or a prompt (short) sees.

Every retriever answers ``positions``: for each sample up to ``k`` positions in the :class:`HistoryIndex`, in
time order and padded with -1 at the end. None of them ever returns the sample itself or anything after it.

Reference: Zhu et al. "Lifelong Personalized Low-Rank Adaptation of Large Language Models for Recommendation"
(RecLoRA), arXiv 2408.03533; the semantic retrieval is that of Lin et al. "ReLLa", WWW 2024.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from recbole_llm.data.history import HistoryIndex

# Up to this many items all cosines are computed once (268 MB at most); beyond it, per sample.
MAX_ITEMS_FOR_A_TABLE = 8192
# Cosines that agree in so many decimals are ties: float32 products differ in the last bits with the order of
# summation.
COSINE_DECIMALS = 5


class Retriever:
    """Common part: the history and the number of interactions to return."""

    def __init__(self, history: HistoryIndex, k: int):
        if k < 0:
            raise ValueError(f"a history length must not be negative, got {k}")
        self.history = history
        self.k = k

    def positions(self, user_ids: np.ndarray, item_ids: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Which interactions to show.

        Args:
            user_ids: ``[B]`` internal user ids.
            item_ids: ``[B]`` internal ids of the target items.
            ends: ``[B]`` the samples' ``history_end``.

        Returns:
            int64 ``[B, k]``: positions in the history, ascending in time, -1 pads at the end.
        """
        raise NotImplementedError


class RecentRetriever(Retriever):
    """The last ``k`` interactions before the sample."""

    def positions(self, user_ids: np.ndarray, item_ids: np.ndarray, ends: np.ndarray) -> np.ndarray:
        start, end = self.history.bounds(user_ids, ends)
        found = np.maximum(start, end - self.k)[:, None] + np.arange(self.k)
        return np.where(found < end[:, None], found, -1)


class ShuffledRetriever(Retriever):
    """What another retriever chooses, in a random order that a sample keeps: a control for what the order is worth.

    A model that is no worse with it does not read histories as sequences (Kim et al., "Lost in Sequence", KDD 2025).
    """

    def __init__(self, retriever: Retriever, seed: int):
        super().__init__(retriever.history, retriever.k)
        self.retriever, self.seed = retriever, seed

    def positions(self, user_ids: np.ndarray, item_ids: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """As of the other retriever, ``[B, k]``, but not ascending in time."""
        found = self.retriever.positions(user_ids, item_ids, ends)
        for row, end in zip(found, ends, strict=True):
            n = int((row >= 0).sum())
            row[:n] = np.random.default_rng([self.seed, int(end)]).permutation(row[:n])
        return found


class SemanticRetriever(Retriever):
    """The ``k`` earlier interactions whose items are most similar to the target, put back into time order.

    Similarity is the cosine of item vectors; among equals the more recent interaction wins.

    Args:
        item_vectors: ``[n_items, d]``, row 0 is the padding item; a row of zeros is equally far from
            everything.

    Raises:
        ValueError: if the vectors do not cover the items, or are not finite.
    """

    def __init__(self, history: HistoryIndex, k: int, item_vectors: np.ndarray):
        super().__init__(history, k)
        vectors = np.asarray(item_vectors, dtype=np.float32)
        n_items = int(history.item_ids.max(initial=0)) + 1
        if vectors.ndim != 2 or len(vectors) < n_items:
            raise ValueError(
                f"item vectors of shape {vectors.shape} do not cover the {n_items} items of the history"
            )
        if not np.isfinite(vectors).all():
            raise ValueError("item vectors for semantic retrieval hold NaN or infinite values")
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        self._unit = vectors / np.where(norms > 0, norms, 1)
        small = len(vectors) <= MAX_ITEMS_FOR_A_TABLE
        self._cosine = np.round(self._unit @ self._unit.T, COSINE_DECIMALS) if small else None

    def _similarities(self, target: int, items: np.ndarray) -> np.ndarray:
        if self._cosine is not None:
            return self._cosine[target, items]
        return np.round(self._unit[items] @ self._unit[target], COSINE_DECIMALS)

    def positions(self, user_ids: np.ndarray, item_ids: np.ndarray, ends: np.ndarray) -> np.ndarray:
        return self.positions_within(item_ids, *self.history.bounds(user_ids, ends))

    def positions_within(self, item_ids: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """:meth:`positions`, chosen from the slices ``[start, stop)`` of the history, each ``[B]``."""
        found = np.full((len(item_ids), self.k), -1, dtype=np.int64)
        for row, (target, start, end) in enumerate(zip(item_ids, starts, stops, strict=True)):
            if end - start > self.k:
                newest_first = self._similarities(target, self.history.item_ids[start:end])[::-1]
                # A stable sort of the reversed slice leaves the more recent of two equals in front.
                best = np.argsort(-newest_first, kind="stable")[: self.k]
                found[row] = np.sort(end - 1 - best)
            else:
                found[row, : end - start] = np.arange(start, end)
        return found


class MixedRetriever(Retriever):
    """The latest interactions, and of those before them the most similar to the target, all in time order.

    Args:
        k: how many to return: ``k - k // 2`` by time, ``k // 2`` by similarity.
        item_vectors: as of :class:`SemanticRetriever`.
    """

    def __init__(self, history: HistoryIndex, k: int, item_vectors: np.ndarray):
        super().__init__(history, k)
        self._recent = RecentRetriever(history, k - k // 2)
        self._semantic = SemanticRetriever(history, k // 2, item_vectors)

    def positions(self, user_ids: np.ndarray, item_ids: np.ndarray, ends: np.ndarray) -> np.ndarray:
        recent = self._recent.positions(user_ids, item_ids, ends)
        if not self.k // 2:
            return recent
        start, _ = self.history.bounds(user_ids, ends)
        # Before the first of the recent ones; where there is none, there is nothing before it either.
        first = np.where(recent[:, 0] >= 0, recent[:, 0], start)
        earlier = self._semantic.positions_within(item_ids, start, first)
        found = np.concatenate([earlier, recent], axis=1)
        padding_last = np.argsort(found < 0, axis=1, kind="stable")
        return np.take_along_axis(found, padding_last, axis=1)


class CategoryRetriever(Retriever):
    """The last ``k`` earlier interactions whose items share a category with the target; fewer, or none, if so.

    Reference: the hard search of Pi et al. "Search-based User Interest Modeling" (SIM), CIKM 2020, there with one
    category per item. Here items may have several, and one in common is enough.

    Args:
        categories: the categories of every item, by internal id; an item without any shares none.

    Raises:
        ValueError: if the categories do not cover the items, or no item of the history has one.
    """

    def __init__(self, history: HistoryIndex, k: int, categories: Sequence[Collection[str]]):
        super().__init__(history, k)
        n_items = int(history.item_ids.max(initial=0)) + 1
        if len(categories) < n_items:
            raise ValueError(
                f"categories of {len(categories)} items do not cover the {n_items} of the history"
            )
        numbers: dict[str, int] = {}
        for names in categories:
            for name in names:
                numbers.setdefault(name, len(numbers))
        self._member = np.zeros((len(categories), len(numbers)), dtype=bool)
        for item, names in enumerate(categories):
            self._member[item, [numbers[name] for name in names]] = True
        if not self._member[history.item_ids].any():
            raise ValueError(
                "id_retrieval: category needs items with categories, and no item of the history has one; name "
                "their column in text.genre, or set id_retrieval: semantic"
            )

    def positions(self, user_ids: np.ndarray, item_ids: np.ndarray, ends: np.ndarray) -> np.ndarray:
        found = np.full((len(user_ids), self.k), -1, dtype=np.int64)
        starts, stops = self.history.bounds(user_ids, ends)
        for row, (target, start, end) in enumerate(zip(item_ids, starts, stops, strict=True)):
            wanted = np.flatnonzero(self._member[target])
            earlier = self.history.item_ids[start:end]
            shared = self._member[earlier[:, None], wanted].any(axis=1)
            latest = start + np.flatnonzero(shared)[max(0, shared.sum() - self.k) :]
            found[row, : len(latest)] = latest
        return found
