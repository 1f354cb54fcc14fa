"""Chunks of users' interactions: every sample once, nothing later shown, the same cuts for everybody."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_llm.data.dataset import HISTORY_END
from recbole_llm.data.history import HistoryIndex
from recbole_llm.data.streams import Chunk, StreamCutter, StreamLoader, optimizer_steps, visible_until


def history_of(lengths: list[int], ties: str = "order", times: np.ndarray | None = None) -> HistoryIndex:
    """Users 1, 2, ... with so many interactions each; every item is another one."""
    users = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    n = len(users)
    times = np.arange(n, dtype=float) if times is None else times
    ones = np.ones(n)
    return HistoryIndex.from_time_order(
        users, np.arange(1, n + 1), ones, times, ones, n_users=len(lengths) + 1, ties=ties
    )[0]


@st.composite
def cases(draw):
    """A history, a cutter of it and targets."""
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    history = history_of(lengths)
    costs = np.array(draw(st.lists(st.integers(1, 9), min_size=len(history), max_size=len(history))))
    prefix = np.array(draw(st.lists(st.integers(0, 6), min_size=len(lengths) + 1, max_size=len(lengths) + 1)))
    lead = draw(st.integers(0, 4))
    openings = np.array(draw(st.lists(st.booleans(), min_size=len(history), max_size=len(history))))
    cutter = StreamCutter(
        history,
        openings=openings & draw(st.booleans()),
        budget=draw(st.integers(15, 60)),
        costs=costs,
        prefix_costs=prefix,
        lead=lead,
        context=lead + draw(st.integers(0, 10)),
    )
    chosen = draw(st.lists(st.booleans(), min_size=len(history), max_size=len(history)))
    return cutter, np.flatnonzero(chosen), costs, prefix


def both(cutter: StreamCutter, targets: np.ndarray) -> list[list[Chunk]]:
    return [cutter.training_chunks(targets, seed=3, epoch=1), cutter.evaluation_chunks(targets)]


@settings(deadline=None)
@given(cases())
def test_every_target_once_within_the_budget_and_one_user(case):
    cutter, targets, costs, prefix = case
    start = cutter.history.user_start
    for chunks in both(cutter, targets):
        found = np.concatenate([chunk.targets for chunk in chunks]) if chunks else np.array([], dtype=int)
        assert np.array_equal(np.sort(found), targets)
        for chunk in chunks:
            assert start[chunk.user] <= chunk.start <= chunk.targets[0]
            assert chunk.targets[-1] < start[chunk.user + 1]
            assert chunk.positions[-1] == chunk.targets[-1]  # nothing after the last target
            spent = costs[chunk.positions].sum()
            assert spent == cutter.cost(chunk)
            assert spent + prefix[chunk.user] <= cutter._room[chunk.user] + prefix[chunk.user]


@settings(deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_a_target_s_evaluation_context_depends_on_no_other_target(case, random):
    cutter, targets, *_ = case
    starts = {
        int(t): chunk.start for chunk in cutter.evaluation_chunks(targets) for t in chunk.targets.tolist()
    }
    some = np.array([t for t in targets.tolist() if random.random() < 0.3], dtype=np.int64)
    for chunk in cutter.evaluation_chunks(some):
        assert all(starts[int(t)] == chunk.start for t in chunk.targets)


@settings(deadline=None)
@given(cases(), st.integers(1, 30))
def test_later_interactions_do_not_move_the_cuts_of_evaluation(case, more):
    cutter, targets, costs, prefix = case
    history = cutter.history
    last_user = len(history.user_start) - 2
    lengths = np.diff(history.user_start)[1:].tolist()
    lengths[-1] += more
    longer = StreamCutter(
        history_of(lengths),
        openings=np.concatenate([cutter.openings, np.zeros(more, dtype=bool)]),
        budget=int(cutter._room[last_user] + prefix[last_user]),
        costs=np.concatenate([costs, np.ones(more, dtype=int)]),
        prefix_costs=prefix,
        lead=cutter.lead,
        context=cutter.context,
    )
    before = [(c.start, c.targets.tolist()) for c in cutter.evaluation_chunks(targets)]
    after = [(c.start, c.targets.tolist()) for c in longer.evaluation_chunks(targets)]
    assert before == after


def test_contexts_are_those_asked_for():
    cutter = StreamCutter(history_of([200]), budget=55, lead=5, context=25)
    everything = np.arange(200)
    for chunks, wanted in zip(both(cutter, everything), (5, 25), strict=True):
        for chunk in chunks[1:]:
            assert chunk.target_places[0] == wanted
        assert chunks[0].start == 0 and chunks[0].target_places[0] == 0
        assert max(map(len, chunks)) == 55


def test_evaluation_begins_a_body_where_a_split_does():
    openings = np.zeros(230, dtype=bool)
    openings[[140, 200, 215]] = True  # the first test sample of user 1; all samples of user 2 are held out
    cutter = StreamCutter(history_of([200, 30]), openings=openings, budget=55, lead=5, context=25)
    held_out = np.concatenate([np.arange(140, 200), np.arange(205, 230)])
    shown = [(c.start, int(c.targets[0]), int(c.targets[-1])) for c in cutter.evaluation_chunks(held_out)]
    assert shown == [(115, 140, 169), (145, 170, 199), (200, 205, 214), (200, 215, 229)]
    everything = np.arange(230)
    plain = StreamCutter(history_of([200, 30]), budget=55, lead=5, context=25)
    for epoch in range(3):  # training is cut as ever
        chunks, expected = (
            [(chunk.start, chunk.targets.tolist()) for chunk in of.training_chunks(everything, 1, epoch)]
            for of in (cutter, plain)
        )
        assert chunks == expected


def test_openings_of_another_history_are_refused():
    with pytest.raises(ValueError, match="openings of 4 interactions for a history of 5"):
        StreamCutter(history_of([5]), openings=np.zeros(4, dtype=bool), budget=10)


def test_training_meets_the_histories_of_evaluation():
    cutter = StreamCutter(history_of([300] * 4), budget=40, lead=3, context=20)
    seen = {
        place
        for epoch in range(30)
        for chunk in cutter.training_chunks(np.arange(1200), 0, epoch)
        for place in chunk.target_places.tolist()
    }
    asked = {p for chunk in cutter.evaluation_chunks(np.arange(1200)) for p in chunk.target_places.tolist()}
    assert asked <= seen


def test_training_cuts_depend_on_seed_and_epoch_alone():
    cutter = StreamCutter(history_of([120, 90, 77]), budget=30)
    targets = np.arange(287)

    def cuts(seed, epoch, of=targets):
        return {
            (c.user, c.start) for c in cutter.training_chunks(of, seed, epoch) if not c.target_places[0] == 0
        }

    assert cuts(1, 0) == cuts(1, 0)
    assert cuts(1, 0) != cuts(1, 1) and cuts(1, 0) != cuts(2, 0)
    third = targets[targets >= 210]
    assert cuts(1, 0, third) == {cut for cut in cuts(1, 0) if cut[0] == 3}


def test_samples_that_were_not_drawn_are_context():
    cutter = StreamCutter(history_of([100]), budget=30, lead=5)
    (chunk,) = cutter.training_chunks(np.array([60]), 0, 0)
    assert chunk.targets.tolist() == [60] and chunk.start < 60 and len(chunk) <= 30


def test_users_without_a_target_give_no_chunk():
    cutter = StreamCutter(history_of([1, 30, 1]), budget=20)
    assert {c.user for chunks in both(cutter, np.array([5, 9])) for c in chunks} == {2}
    assert both(cutter, np.array([], dtype=int)) == [[], []]


def test_one_interaction_per_user():
    cutter = StreamCutter(history_of([1, 1, 1]), budget=20)
    for chunks in both(cutter, np.arange(3)):
        assert [(c.user, c.start, c.targets.tolist()) for c in chunks] == [
            (1, 0, [0]),
            (2, 1, [1]),
            (3, 2, [2]),
        ]


def test_a_long_interaction_takes_the_place_of_its_context():
    costs = np.array([2] * 10 + [18] + [2] * 10)
    cutter = StreamCutter(history_of([21]), budget=20, costs=costs, lead=4, context=4)
    chunk = next(c for c in cutter.evaluation_chunks(np.arange(21)) if 10 in c.targets)
    assert chunk.start == 9 and chunk.targets.tolist() == [10]


def test_an_interaction_longer_than_a_chunk_is_an_error():
    with pytest.raises(ValueError, match=r"a chunk of 20 tokens is too small.*item 3 .*needs 23, 4 of them"):
        StreamCutter(
            history_of([5]),
            budget=20,
            costs=np.array([1, 1, 19, 1, 1]),
            prefix_costs=np.array([0, 4]),
            unit="tokens",
        )


def test_split_scope_is_refused():
    history = history_of([5])
    history.row_start = np.zeros(5, dtype=np.int64)
    with pytest.raises(ValueError, match="history_scope: split"):
        StreamCutter(history, budget=10)


def test_evaluation_with_less_context_than_training_is_refused():
    with pytest.raises(ValueError, match="must not show shorter histories"):
        StreamCutter(history_of([5]), budget=10, lead=5, context=4)


def test_targets_outside_of_the_history_are_refused():
    with pytest.raises(ValueError, match="positions of the history"):
        StreamCutter(history_of([5]), budget=10).evaluation_chunks(np.array([5]))


def test_strict_ties_hide_what_carries_the_same_timestamp():
    times = np.array([0.0, 1, 1, 1, 2, 3])
    chunk = Chunk(1, 0, np.array([5]))
    assert visible_until(history_of([6], "strict", times), chunk).tolist() == [0, 1, 1, 1, 4, 5]
    assert visible_until(history_of([6], "strict", times), Chunk(1, 2, np.array([4]))).tolist() == [0, 0, 2]
    assert visible_until(history_of([6], "order", times), chunk) is None
    assert visible_until(history_of([6], "strict"), chunk) is None


@given(st.lists(st.integers(1, 9), max_size=40), st.integers(1, 20), st.integers(0, 3))
def test_steps_hold_every_chunk_and_enough_labels(sizes, labels, epoch):
    chunks = [Chunk(1, 10 * i, 10 * i + np.arange(size)) for i, size in enumerate(sizes)]
    steps = optimizer_steps(chunks, labels, 0, epoch)
    assert sorted(c.start for step in steps for c in step) == [c.start for c in chunks]
    for step in steps[:-1]:
        held = [len(c.targets) for c in step]
        assert sum(held) >= labels > sum(held[:-1])


# ------------------------------------------------------------------ with a dataset


def test_loader_gives_every_sample_once_per_epoch(toy, caplog):
    train, *_ = toy(train_batch_size=16).build()
    some = train.subset(np.arange(0, len(train), 3))
    loader = StreamLoader(train.config, some, StreamCutter(train.history, budget=8, lead=2, context=3))
    caplog.set_level("INFO")
    for epoch in range(2):
        steps = loader.epoch_batches(epoch)
        batches = [loader.collate_fn(step) for step in steps]
        assert all(len(batch) >= 16 for batch in batches[:-1])
        rows = np.concatenate([batch.interaction["row_id"].numpy() for batch in batches])
        assert np.array_equal(np.sort(rows), some.inter_feat["row_id"].numpy())
        for batch in batches:
            targets = np.concatenate([chunk.targets for chunk in batch.chunks])
            assert np.array_equal(batch.interaction[HISTORY_END].numpy(), targets)
    assert f"epoch 0: {len(some)} labels of" in caplog.text


def test_loader_without_samples(toy):
    train, *_ = toy().build()
    nothing = train.subset(np.array([], dtype=np.int64))
    loader = StreamLoader(train.config, nothing, StreamCutter(train.history, budget=8, lead=2, context=3))
    assert loader.epoch_batches(0) == []


@pytest.mark.parametrize("seed", range(4))
def test_an_appended_item_has_the_chunk_that_it_would_have_in_the_history(seed):
    rng = np.random.default_rng(seed)
    costs, prefix = rng.integers(1, 9, 60), np.array([0, 3, 2])
    opens = np.isin(np.arange(60), rng.integers(0, 30, 2))
    sizes = {"budget": 30, "lead": 1, "context": 4, "prefix_costs": prefix}
    for size in range(1, 40):
        opens[size - 1] = False  # what comes next begins no split
        shorter = np.delete(np.arange(size + 5), size - 1)  # without the last interaction of user 1
        whole = StreamCutter(
            history_of([size, 5]), costs=costs[: size + 5], openings=opens[: size + 5], **sizes
        )
        cutter = StreamCutter(
            history_of([size - 1, 5]), costs=costs[shorter], openings=opens[shorter], **sizes
        )
        (expected,) = whole.evaluation_chunks(np.array([size - 1]))
        found = cutter.appended_chunk(1, size - 1, 7, int(costs[size - 1]))
        assert (found.start, found.targets.tolist()) == (expected.start, expected.targets.tolist())
        assert found.items(cutter.history)[-1] == 7 and len(found) == len(expected)
    with pytest.raises(ValueError, match="needs 28 and a chunk has room for 27"):
        cutter.appended_chunk(1, 3, 7, 28)
