"""Retrievers against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from recbole_llm.data import retriever
from recbole_llm.data.history import HistoryIndex
from recbole_llm.data.retriever import (
    CategoryRetriever,
    MixedRetriever,
    RecentRetriever,
    SemanticRetriever,
    ShuffledRetriever,
)

N_USERS, N_ITEMS = 4, 6


@st.composite
def histories(draw, ties: str) -> tuple[HistoryIndex, np.ndarray]:
    """Random interactions in time order with many equal timestamps: index, its input, positions."""
    n = draw(st.integers(1, 40))
    users = np.array(draw(st.lists(st.integers(1, N_USERS - 1), min_size=n, max_size=n)))
    items = np.array(draw(st.lists(st.integers(1, N_ITEMS - 1), min_size=n, max_size=n)))
    times = np.sort(np.array(draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)), dtype=float))
    index, position = HistoryIndex.from_time_order(
        users, items, items % 2, times, items % 5, n_users=N_USERS, ties=ties
    )
    return index, users, items, times, position


def brute_force(users, times, row: int, ties: str) -> list[int]:
    """Earlier rows of the same user, by their place in time order."""
    return [
        other
        for other in range(row)
        if users[other] == users[row] and (ties == "order" or times[other] < times[row])
    ]


@pytest.mark.parametrize("ties", ["order", "strict"])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), k=st.integers(0, 7))
def test_recent_is_the_last_k_earlier_interactions(ties, data, k):
    index, users, items, times, position = data.draw(histories(ties))
    found = RecentRetriever(index, k).positions(users, items, position)
    assert found.shape == (len(users), k) and found.dtype == np.int64
    for row in range(len(users)):
        expected = position[brute_force(users, times, row, ties)][-k:] if k else []
        assert found[row].tolist() == [*expected, *[-1] * (k - len(expected))]


@pytest.mark.parametrize("ties", ["order", "strict"])
@pytest.mark.parametrize("table", [True, False])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), k=st.integers(1, 7), seed=st.integers(0, 5))
def test_semantic_is_the_k_most_similar_in_time_order(ties, table, data, k, seed):
    index, users, items, times, position = data.draw(histories(ties))
    # Few values, so that different items are often equally similar.
    vectors = np.random.default_rng(seed).integers(0, 2, (N_ITEMS, 3)).astype(np.float32)
    previous = retriever.MAX_ITEMS_FOR_A_TABLE
    retriever.MAX_ITEMS_FOR_A_TABLE = previous if table else 0
    try:
        found = SemanticRetriever(index, k, vectors).positions(users, items, position)
    finally:
        retriever.MAX_ITEMS_FOR_A_TABLE = previous

    def cosine(a: int, b: int) -> float:
        norm = np.linalg.norm(vectors[a]) * np.linalg.norm(vectors[b])
        return round(float(vectors[a] @ vectors[b]) / norm, 5) if norm else 0.0

    for row in range(len(users)):
        earlier = brute_force(users, times, row, ties)
        best = sorted(earlier, key=lambda other: (-cosine(items[other], items[row]), -other))[:k]
        expected = position[sorted(best)].tolist()
        assert found[row].tolist() == [*expected, *[-1] * (k - len(expected))]


CATEGORIES = [(), ("a",), ("a", "b"), ("b", "c"), ("c",), ()]  # of items 0 to 5; nobody shares with the last


@pytest.mark.parametrize("ties", ["order", "strict"])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), k=st.integers(0, 7))
def test_category_is_the_last_k_that_share_one(ties, data, k):
    index, users, items, times, position = data.draw(histories(ties))
    assume((items != 5).any())
    found = CategoryRetriever(index, k, CATEGORIES).positions(users, items, position)
    assert found.shape == (len(users), k) and found.dtype == np.int64
    for row in range(len(users)):
        wanted = set(CATEGORIES[items[row]])
        same = [o for o in brute_force(users, times, row, ties) if wanted & set(CATEGORIES[items[o]])]
        expected = position[same].tolist()[-k:] if k else []
        assert found[row].tolist() == [*expected, *[-1] * (k - len(expected))]


def test_categories_that_cannot_be_searched_are_refused():
    one, two = np.array([1]), np.array([2])
    index, _ = HistoryIndex.from_time_order(one, two, np.zeros(1), np.zeros(1), None, n_users=2)
    with pytest.raises(ValueError, match="categories of 2 items do not cover the 3"):
        CategoryRetriever(index, 2, [(), ("a",)])
    with pytest.raises(ValueError, match=r"no item of the history has one; name their column in text\.genre"):
        CategoryRetriever(index, 2, [(), ("a",), ()])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), k=st.integers(1, 7))
def test_nothing_at_or_after_the_target_is_ever_returned(data, k):
    for ties in ("order", "strict"):
        index, users, items, times, position = data.draw(histories(ties))
        semantic = SemanticRetriever(index, k, np.eye(N_ITEMS))
        category = CategoryRetriever(index, k, [("all",)] * N_ITEMS)
        for found in (semantic, category, RecentRetriever(index, k)):
            positions = found.positions(users, items, position)
            shown, row = positions[positions >= 0], np.nonzero(positions >= 0)[0]
            assert (shown < position[row]).all()
            assert (shown >= index.user_start[users[row]]).all()
            if ties == "strict":
                assert (index.timestamps[shown] < times[row]).all()


def test_changing_the_future_changes_no_history():
    """Retrieval for a row must not depend on anything that happens at or after it."""
    rng = np.random.default_rng(0)
    users, items, times = np.ones(50, int), rng.integers(1, 9, 50), np.arange(50.0)
    vectors, target = rng.normal(size=(9, 4)), 30
    seen = []
    for future in (items, np.concatenate([items[: target + 1], rng.integers(1, 9, 19)])):
        index, position = HistoryIndex.from_time_order(users, future, future % 2, times, None, n_users=2)
        found = SemanticRetriever(index, 5, vectors).positions(
            users[:1], future[target : target + 1], position[target : target + 1]
        )
        seen.append(index.item_ids[found].tolist())
    assert seen[0] == seen[1]


def test_a_row_to_come_has_all_interactions_as_history():
    index, _ = HistoryIndex.from_time_order(
        np.array([1, 2, 1]), np.array([1, 2, 3]), np.zeros(3), np.arange(3.0), None, n_users=3, ties="strict"
    )
    ends = index.user_start[
        [2, 3]
    ]  # the end of user 1 is a position of user 2; that of user 2 is past the arrays
    assert RecentRetriever(index, 2).positions(np.array([1, 2]), np.array([5, 5]), ends).tolist() == [
        [0, 1],
        [2, -1],
    ]


@pytest.mark.parametrize(
    ("vectors", "message"),
    [(np.zeros((2, 3)), "do not cover"), (np.zeros(9), "do not cover"), (np.full((9, 2), np.nan), "NaN")],
)
def test_impossible_vectors_are_refused(vectors, message):
    index, _ = HistoryIndex.from_time_order(
        np.array([1]), np.array([5]), np.zeros(1), np.zeros(1), None, n_users=2
    )
    with pytest.raises(ValueError, match=message):
        SemanticRetriever(index, 2, vectors)


def test_settings_are_checked():
    empty = np.zeros(0, dtype=int)
    with pytest.raises(ValueError, match="history_ties"):
        HistoryIndex.from_time_order(empty, empty, empty, empty, None, n_users=1, ties="none")
    index, _ = HistoryIndex.from_time_order(empty, empty, empty, empty, None, n_users=1)
    with pytest.raises(ValueError, match="negative"):
        RecentRetriever(index, -1)


@pytest.mark.parametrize("ties", ["order", "strict"])
@settings(deadline=None, max_examples=40)
@given(data=st.data(), k=st.integers(1, 7), seed=st.integers(0, 9))
def test_mixed_is_the_latest_and_the_most_similar_of_those_before(ties, data, k, seed):
    index, users, items, times, position = data.draw(histories(ties))
    vectors = np.random.default_rng(seed).normal(size=(N_ITEMS, 3))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    found = MixedRetriever(index, k, vectors).positions(users, items, position)
    for row, target in enumerate(items):
        earlier = brute_force(users, times, row, ties)
        cut = max(0, len(earlier) - (k - k // 2))
        before, latest = earlier[:cut], earlier[cut:]
        nearest = sorted(before, key=lambda r: (-round(float(unit[items[r]] @ unit[target]), 5), -r))[
            : k // 2
        ]
        expected = position[np.array(sorted(nearest) + latest, dtype=int)].tolist()
        assert found[row].tolist() == expected + [-1] * (k - len(expected))


@settings(deadline=None, max_examples=30)
@given(data=st.data(), k=st.integers(1, 6), seed=st.integers(0, 9))
def test_shuffled_is_the_same_history_in_an_order_that_stays(data, k, seed):
    index, users, items, _, ends = data.draw(histories("order"))
    recent, shuffled = RecentRetriever(index, k), ShuffledRetriever(RecentRetriever(index, k), seed)
    plain, mixed = (retriever.positions(users, items, ends) for retriever in (recent, shuffled))
    np.testing.assert_array_equal(np.sort(plain, axis=1), np.sort(mixed, axis=1))
    np.testing.assert_array_equal(plain < 0, mixed < 0)  # padding stays at the end
    order = np.random.default_rng(1).permutation(len(users))  # a row keeps its order, in whatever batch
    np.testing.assert_array_equal(shuffled.positions(users[order], items[order], ends[order]), mixed[order])


def test_shuffling_changes_long_histories():
    users, n = np.zeros(60, dtype=int), 60
    index, position = HistoryIndex.from_time_order(
        users, np.arange(n), np.zeros(n), np.arange(n), None, n_users=1
    )
    found = ShuffledRetriever(RecentRetriever(index, 10), 0).positions(
        users[20:], np.arange(20, n), position[20:]
    )
    assert (np.diff(found, axis=1) < 0).any(axis=1).mean() > 0.9
