"""Users' interactions in chunks, for models that learn from every interaction of a sequence at once.

A stream is what a user did, in time order; with ``history_scope: split`` or ready-made splits it is the part that a
sample's history may use. A chunk has at most ``length`` interactions; where it does not begin its stream, the first
``context`` of them are only read:

    position        0  1  2  3  4  5  6  7  8  9          length 5, context 2
    training        [0  1  2] [.  .  3  4  5] [.  .  6  7  8] [.  .  9]       cut at random, differently in each epoch
    evaluation      [0  1  2  3  4] [.  .  5  6  7] [.  .  8  9]              always the same for a position

So a position's context does not depend on which other samples are scored.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import numpy as np
import torch
from recbole.data.interaction import Interaction

from recbole_llm.data.dataset import HISTORY_END, HistoryDataset

logger = logging.getLogger(__name__)

START, LOW, HIGH, TARGETS = "stream_start", "stream_low", "stream_high", "stream_targets"
"""Fields of a batch of chunks: where the stream and the chunk begin, where the chunk ends (positions in
:class:`~recbole_llm.data.history.HistoryIndex`, int64 ``[B]``), and which interactions are targets, bool ``[B, S]``."""

POOL = 32
"""Batches whose chunks are sorted by length together: enough for little padding, few enough for mixed batches."""


def check_chunks(length: int, context: int) -> None:
    """Raises ValueError if no interaction of a chunk would be a target."""
    if not 0 <= context < length:
        raise ValueError(f"stream_context: {context} must be at least 0 and below stream_length: {length}")


def chunk_start(start: np.ndarray, position: np.ndarray, length: int, context: int) -> np.ndarray:
    """Where the evaluation chunk of each position begins, ``[B]``; ``start`` is where its stream does."""
    place = position - start
    number = np.where(place < length, 0, 1 + (place - length) // (length - context))
    return start + np.maximum(number * (length - context), 0)


def cut(start: int, end: int, length: int, context: int, first: int) -> list[tuple[int, int, int]]:
    """The training chunks of the stream ``[start, end)`` as ``(low, first target, high)``.

    Args:
        start, end: positions.
        length: most interactions in a chunk.
        context: of them, only read where the chunk does not begin the stream.
        first: size of the first chunk, in ``[1, length]``. A stream that fits into one chunk is not cut.
    """
    if end - start <= length:
        return [(start, start, end)]
    chunks = [(start, start, start + first)]
    for at in range(start + first, end, length - context):
        chunks.append((max(start, at - context), at, min(at + length - context, end)))
    return chunks


class StreamLoader:
    """Chunks of the streams of training samples, many users per optimizer step; in the place of a TrainDataLoader.

    Chunks are cut at random places in each epoch and bucketed by length. Interactions that are no samples (too early,
    of another split, or not drawn by ``few_shot``) are read but no targets.

    Args:
        config: ``stream_length``, ``stream_context``, ``train_batch_size`` (interactions of a step, padding included;
            a step has at least one chunk) and ``seed``.
        rows: the training samples.

    Attributes:
        generator: draws cuts and order; its state is part of a checkpoint.
        labels: how many targets an epoch has.

    Raises:
        ValueError: if the context leaves no target, or there are no samples.
    """

    shuffle = True

    def __init__(self, config, rows: HistoryDataset) -> None:
        self.length, self.context = config["stream_length"], config["stream_context"]
        check_chunks(self.length, self.context)
        self.budget = config["train_batch_size"]
        self.user_field = config["USER_ID_FIELD"]
        self.dataset = self._dataset = rows
        self.generator = torch.Generator().manual_seed(config["seed"])
        users = rows.inter_feat[self.user_field].numpy()
        ends = rows.inter_feat[HISTORY_END].numpy()
        if not len(ends):
            raise ValueError(f"{rows.dataset_name} has no training samples; check min_history and eval_args")
        self.is_target = np.zeros(len(rows.history), dtype=bool)
        self.is_target[ends] = True
        self.labels = int(self.is_target.sum())
        starts, _ = rows.history.bounds(users, ends)
        by_start = np.lexsort((ends, starts))
        self.starts, first = np.unique(starts[by_start], return_index=True)
        last = np.append(first[1:], len(ends)) - 1
        self.ends = ends[by_start][last] + 1
        self.users = users[by_start][last]

    def __len__(self) -> int:
        """Steps of an epoch, about: cuts and padding differ between epochs."""
        return max(1, -(-int((self.ends - self.starts).sum()) // self.budget))

    def _random(self, low: int, high: int, size: int) -> np.ndarray:
        return torch.randint(low, high, (size,), generator=self.generator).numpy()

    def chunks(self) -> np.ndarray:
        """The chunks of one epoch that have a target, int64 ``[n, 5]``: stream, start, low, first target, high."""
        first = self._random(1, self.length + 1, len(self.starts))
        found = [
            (stream, start, *chunk)
            for stream, (start, end) in enumerate(zip(self.starts.tolist(), self.ends.tolist(), strict=True))
            for chunk in cut(start, end, self.length, self.context, int(first[stream]))
        ]
        chunks = np.array(found, dtype=np.int64)
        before = np.concatenate([[0], np.cumsum(self.is_target)])
        return chunks[before[chunks[:, 4]] > before[chunks[:, 3]]]

    def batches(self, chunks: np.ndarray) -> list[np.ndarray]:
        """``chunks`` in random batches of similar lengths, each within the budget or of one chunk."""
        sizes = chunks[:, 4] - chunks[:, 2]
        order = torch.randperm(len(chunks), generator=self.generator).numpy()
        pools = np.searchsorted(
            np.cumsum(sizes[order]), np.arange(POOL * self.budget, sizes.sum(), POOL * self.budget)
        )
        batches = []
        for pool in np.split(order, np.unique(pools)):
            batch: list[int] = []
            for chunk in pool[np.argsort(-sizes[pool], kind="stable")].tolist():
                if batch and sizes[batch[0]] * (len(batch) + 1) > self.budget:
                    batches.append(np.array(batch))
                    batch = []
                batch.append(chunk)
            if batch:
                batches.append(np.array(batch))
        shuffled = torch.randperm(len(batches), generator=self.generator).tolist()
        return [chunks[batches[number]] for number in shuffled]

    def __iter__(self) -> Iterator[Interaction]:
        started, read, steps = time.monotonic(), 0, 0
        for batch in self.batches(self.chunks()):
            stream, start, low, first, high = batch.T
            positions = low[:, None] + np.arange((high - low).max())
            inside = (positions >= first[:, None]) & (positions < high[:, None])
            targets = inside & self.is_target[np.where(inside, positions, 0)]
            steps, read = steps + 1, read + int((high - low).sum())
            fields = {
                self.user_field: self.users[stream],
                START: start,
                LOW: low,
                HIGH: high,
                TARGETS: targets,
            }
            yield Interaction({name: torch.from_numpy(values) for name, values in fields.items()})
        seconds = max(time.monotonic() - started, 1e-9)
        logger.info(
            "%d steps, %s labels of %d users, %s interactions read: %.0f labels a second",
            *(steps, f"{self.labels:,}", len(np.unique(self.users)), f"{read:,}", self.labels / seconds),
        )
