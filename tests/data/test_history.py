"""The index of all interactions: the items drawn beside them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm.data.history import HistoryIndex


def index_of(items: np.ndarray) -> HistoryIndex:
    n = len(items)
    return HistoryIndex.from_time_order(
        np.ones(n, dtype=np.int64), items, None, np.arange(n, dtype=float), None, n_users=2
    )[0]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=40), st.integers(0, 3))
def test_negatives_are_other_items(items, seed):
    index = index_of(np.array(items))
    index.draw_negatives(6, seed)
    assert (index.negatives != index.item_ids).all()
    assert ((index.negatives >= 1) & (index.negatives <= 5)).all()


def test_every_other_item_is_drawn_as_a_negative():
    items = np.repeat(np.arange(1, 5), 3000)
    index = index_of(items)
    index.draw_negatives(5, 0)
    for item in range(1, 5):
        counts = np.bincount(index.negatives[index.item_ids == item], minlength=5)
        assert counts[item] == 0 and (counts[[i for i in range(1, 5) if i != item]] > 850).all()
