"""Chunks of streams as batches of RecBole's Trainer: every sample once, the order part of a checkpoint."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_llm.data.dataset import HISTORY_END
from recbole_llm.data.history import HistoryIndex
from recbole_llm.data.stream_batches import (
    HIGH,
    LOW,
    TARGETS,
    VectorStreamLoader,
    chunk_start,
    vector_cutter,
)

CONFIG = {
    "stream_length": 8,
    "stream_context": 3,
    "train_batch_size": 12,
    "seed": 1,
    "USER_ID_FIELD": "user_id",
    "benchmark_filename": None,
    "model": "Stream",
}


def history_of(lengths: list[int]) -> HistoryIndex:
    users = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    n = len(users)
    ones = np.ones(n)
    return HistoryIndex.from_time_order(
        users, np.arange(1, n + 1), ones, np.arange(n, dtype=float), ones, n_users=len(lengths) + 1
    )[0]


def rows_of(lengths: list[int], targets: np.ndarray) -> SimpleNamespace:
    """As much of a dataset as the loader reads."""
    columns = {HISTORY_END: torch.from_numpy(targets)}
    return SimpleNamespace(history=history_of(lengths), inter_feat=columns, dataset_name="some")


def targets_of(batch) -> list[int]:
    positions = batch[LOW][:, None] + torch.arange(batch[TARGETS].shape[1])
    return positions[batch[TARGETS]].tolist()


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_every_sample_is_a_target_once_and_nothing_else_is(lengths, random):
    n = sum(lengths)
    targets = np.array(sorted(random.sample(range(n), random.randint(1, n))))
    loader = VectorStreamLoader(CONFIG, rows_of(lengths, targets))
    starts = loader.cutter.history.user_start
    found, steps = [], 0
    for batch in loader:
        steps += 1
        found += targets_of(batch)
        users, low, high = (batch[name].numpy() for name in ("user_id", LOW, HIGH))
        assert (starts[users] <= low).all() and (high <= starts[users + 1]).all()
        assert (high - low <= 8).all() and batch[TARGETS].shape[1] == (high - low).max()
        assert all(
            batch[TARGETS][row, size - 1] for row, size in enumerate(high - low)
        )  # it ends with a target
    assert sorted(found) == targets.tolist()
    assert steps <= len(loader)


def test_epochs_are_cut_elsewhere_and_the_generator_brings_them_back():
    loader = VectorStreamLoader(CONFIG, rows_of([60, 45, 70], np.arange(175)))

    def epoch() -> list:
        return [(batch[LOW].tolist(), batch[HIGH].tolist()) for batch in loader]

    first, state = epoch(), loader.generator.get_state()
    second, third = epoch(), epoch()
    assert first != second != third
    loader.generator.set_state(state)
    assert epoch() == second
    assert max(len(set(batch["user_id"].tolist())) for batch in loader) > 1  # several users in a step


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=5),
    st.integers(2, 14),
    st.integers(0, 7),
)
def test_the_chunk_of_a_position_is_that_of_evaluation(lengths, length, context):
    context = min(context, length // 2)
    history = history_of(lengths)
    config = {**CONFIG, "stream_length": length, "stream_context": context}
    positions = np.arange(len(history))
    expected = np.empty(len(history), dtype=np.int64)
    for chunk in vector_cutter(config, history).evaluation_chunks(positions):
        expected[chunk.targets] = chunk.start
    owners = np.repeat(np.arange(len(lengths) + 1), np.diff(history.user_start))
    assert np.array_equal(chunk_start(history.user_start[owners], positions, length, context), expected)


def test_bad_input():
    with pytest.raises(ValueError, match="stream_context: 5 is more than half of stream_length: 8"):
        vector_cutter({**CONFIG, "stream_context": 5}, history_of([9]))
    with pytest.raises(ValueError, match="benchmark_filename: samples of ready-made splits"):
        vector_cutter({**CONFIG, "benchmark_filename": ["a", "b", "c"]}, history_of([9]))
    with pytest.raises(ValueError, match="has no training samples"):
        VectorStreamLoader(CONFIG, rows_of([9], np.zeros(0, dtype=np.int64)))
