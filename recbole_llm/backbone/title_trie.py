"""Titles as a tree of tokens, cut into pieces that go through a language model at once.

Nodes are numbered depth first: whatever stretch of that order is taken as a piece, only the ancestors of its first
node are missing. How the tree is scored: :mod:`recbole_llm.backbone.titles`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TriePiece:
    """A part of the tree that goes through the model at once.

    Attributes:
        nodes: [q] nodes to compute, in depth-first order.
        n_ancestors: the first so many are ancestors of the rest, computed again for their keys and values.
    """

    nodes: np.ndarray
    n_ancestors: int


class TitleTrie:
    """The answers as a tree whose nodes are tokens, numbered depth first.

    Every distinct beginning of an answer is one node (and one edge, from its parent to it). Equal answers
    share all their nodes and stay distinct titles; an answer may end in the middle of another.

    Args:
        titles: n arrays of token ids, none empty.

    Attributes:
        n_titles: n.
        n_edges: number of nodes m.
        tokens: [m] the token of each node.
        parents: [m] the node before it; -1 is the prompt.
        depth: [m] the number of tokens before it, 0 for a first token.
        ends: [m] the nodes below node i, and i itself, are ``range(i, ends[i])``.
        leaf: [n] the node of each title's last token.
        lengths: [n] number of tokens.

    Raises:
        ValueError: no title, an empty one, or one that is not a list of token ids.
    """

    def __init__(self, titles: Sequence[np.ndarray]) -> None:
        arrays = [np.asarray(title) for title in titles]
        if not arrays:
            raise ValueError("a trie needs at least one title, got none")
        for number, array in enumerate(arrays):
            if array.size == 0:
                raise ValueError(f"title {number} has no tokens: an answer has at least its terminator")
            if array.ndim != 1 or array.dtype.kind not in "iu" or array.min() < 0:
                raise ValueError(
                    f"title {number} must be a list of token ids of at least 0, got {array.dtype} of shape "
                    f"{array.shape}: {array.ravel()[:8].tolist()}"
                )
        self.n_titles = len(arrays)
        self.lengths = np.array([len(array) for array in arrays], dtype=np.int64)

        filled = np.full((self.n_titles, int(self.lengths.max())), -1, dtype=np.int32)
        filled[np.arange(filled.shape[1]) < self.lengths[:, None]] = np.concatenate(arrays)
        order = np.lexsort(filled.T[::-1])  # a title comes right before those that go on where it ends
        filled = filled[order]
        # A token is a new node if it, or one before it, differs from the title before.
        new = np.ones_like(filled, dtype=bool)
        np.logical_or.accumulate(filled[1:] != filled[:-1], axis=1, out=new[1:])
        new &= filled >= 0
        numbers = np.full(filled.shape, -1, dtype=np.int32)
        numbers[new] = np.arange(new.sum())
        # Titles with a common beginning stand together: it is the latest node made in that column.
        path = np.maximum.accumulate(numbers, axis=0)

        rows, self.depth = np.nonzero(new)
        self.n_edges = len(rows)
        self.tokens = filled[new].astype(np.int64)
        self.parents = np.where(self.depth > 0, path[rows, self.depth - 1], -1).astype(np.int64)
        self.leaf = np.empty(self.n_titles, dtype=np.int64)
        self.leaf[order] = path[np.arange(self.n_titles), self.lengths[order] - 1]

        sizes = np.ones(self.n_edges, dtype=np.int64)
        for nodes in reversed(self.levels()[1:]):
            np.add.at(sizes, self.parents[nodes], sizes[nodes])
        self.ends = np.arange(self.n_edges) + sizes

        self._by_parent = np.argsort(self.parents, kind="stable")
        self._sorted_parents = self.parents[self._by_parent]
        self._inner = np.flatnonzero(sizes > 1)

    def levels(self) -> list[np.ndarray]:
        """The nodes of each depth."""
        by_depth = np.argsort(self.depth, kind="stable")
        return np.split(by_depth, np.cumsum(np.bincount(self.depth))[:-1])

    def children(self, nodes: np.ndarray) -> np.ndarray:
        """All children of a stretch of nodes.

        Args:
            nodes: ``[-1]``, or consecutive ones of the nodes that have children.
        """
        start = np.searchsorted(self._sorted_parents, nodes[0])
        end = np.searchsorted(self._sorted_parents, nodes[-1], side="right")
        return self._by_parent[start:end]

    def sees(self, nodes: np.ndarray) -> np.ndarray:
        """[q, q] whether column j is row i or an ancestor of it."""
        rows, columns = nodes[:, None], nodes[None, :]
        return (columns <= rows) & (rows < self.ends[nodes][None, :])

    def chunks(self, max_nodes: int) -> list[TriePiece]:
        """Cuts the tree into pieces of at most ``max_nodes`` computed nodes, in depth-first order.

        Each node with children is computed in one piece, and again in those that begin below it. With pieces
        much larger than titles are long that is a few per cent more.

        Raises:
            ValueError: the longest title alone has more than ``max_nodes`` computed nodes.
        """
        inner = self._inner
        if len(inner) and max_nodes <= (deepest := int(self.depth[inner].max())):
            raise ValueError(
                f"max_nodes {max_nodes} is too small: the longest title alone needs {deepest + 1} nodes"
            )
        pieces = []
        start = 0
        while start < len(inner):
            above = self._ancestors(inner[start])
            end = min(start + max_nodes - len(above), len(inner))
            pieces.append(TriePiece(np.concatenate([above, inner[start:end]]), len(above)))
            start = end
        return pieces

    def chains(self) -> list[TriePiece]:
        """Cuts the tree into paths, each from a first token to a node whose children are all leaves.

        For models that take positions from a padding mask alone: a path behind the prompt is plain text. Nodes that
        paths share are computed once for each.
        """
        pieces, last = [], -1
        for end in self._inner[~np.isin(self._inner, self.parents[self._inner])]:
            path = np.append(self._ancestors(end), end)
            pieces.append(TriePiece(path, int(np.searchsorted(path, last, side="right"))))
            last = int(end)
        return pieces

    def _ancestors(self, node: int) -> np.ndarray:
        found = []
        while (node := int(self.parents[node])) >= 0:
            found.append(node)
        return np.array(found[::-1], dtype=np.int64)
