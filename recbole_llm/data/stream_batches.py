"""Chunks of users' streams as RecBole's Trainer takes them, for models with one vector per interaction.

The chunks are those of :class:`~recbole_llm.data.streams.StreamCutter`, each interaction costing 1. A batch holds where
they lie in :class:`~recbole_llm.data.history.HistoryIndex` and which of their interactions are targets, nothing else:

    history      0   1   2   3   4   5   6   7   8   9      user_start = [0, 0, 4, 10]
    chunk a                      4   5   6                  user 2, low 4, high 7, targets  [ F  T  T  . ]
    chunk b                              6   7   8   9      user 2, low 6, high 10, targets [ F  F  T  T ]
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from recbole.data.interaction import Interaction

from recbole_llm.data.dataset import HISTORY_END, HistoryDataset, table
from recbole_llm.data.history import HistoryIndex
from recbole_llm.data.streams import Chunk, StreamCutter, optimizer_steps

LOW, HIGH, TARGETS = "stream_low", "stream_high", "stream_targets"
"""Fields of a batch: a chunk is ``[low, high)``, positions of the history, int64 ``[B]``; targets bool ``[B, S]``."""


def vector_cutter(config, history: HistoryIndex) -> StreamCutter:
    """Cuts streams into chunks of ``stream_length`` interactions, ``stream_context`` of them before the first target.

    Raises:
        ValueError: if the context is longer than half a chunk, or histories are no streams (``history_scope: split``
            and ready-made splits).
    """
    length, context = config["stream_length"], config["stream_context"]
    if context > length // 2:
        raise ValueError(
            f"stream_context: {context} is more than half of stream_length: {length}; set it lower"
        )
    if config["benchmark_filename"] is not None:
        raise ValueError(
            "benchmark_filename: samples of ready-made splits have a history of their own each, which is no stream of "
            f"a user; {config['model']} needs eval_args or user_split instead, or layout: prompt with lens: DIN"
        )
    return StreamCutter(history, budget=length, lead=context, context=context)


def chunk_start(begin: np.ndarray, positions: np.ndarray, length: int, context: int) -> np.ndarray:
    """Where the evaluation chunks of positions begin, ``[B]``: those of :class:`StreamCutter` at a cost of 1 each.

    Also of positions behind a user's last interaction, where an interaction is still to come.

    Args:
        begin: ``[B]`` the users' first positions.
        positions: ``[B]``.
        length, context: of the chunks.
    """
    place, stride = positions - begin, length - context
    return begin + np.where(place < length, 0, 1 + (place - length) // stride) * stride


class VectorStreamLoader:
    """Training samples in chunks, every sample once per epoch; in the place of RecBole's TrainDataLoader.

    Interactions that are no samples (too early, of another split, or not drawn by ``few_shot``) are read, but are no
    targets.

    Args:
        config: ``stream_length``, ``stream_context``, ``train_batch_size`` (the least number of targets per optimizer
            step) and ``seed``.
        rows: the training samples.

    Attributes:
        generator: draws the number that stands for an epoch, on which all cuts and the order depend; its state is part
            of a checkpoint.

    Raises:
        ValueError: if there are no samples, or from :func:`vector_cutter`.
    """

    shuffle = True

    def __init__(self, config, rows: HistoryDataset) -> None:
        self.dataset = self._dataset = rows
        self.targets = np.sort(rows.inter_feat[HISTORY_END].numpy())
        if not len(self.targets):
            raise ValueError(f"{rows.dataset_name} has no training samples; check min_history and eval_args")
        self.cutter = vector_cutter(config, rows.history)
        self.user_field, self.labels = config["USER_ID_FIELD"], config["train_batch_size"]
        self.seed = config["seed"]
        self.generator = torch.Generator().manual_seed(self.seed)

    def __len__(self) -> int:
        """Optimizer steps of an epoch; cuts differ between epochs, so it may be a few less."""
        return -(-len(self.targets) // self.labels)

    def __iter__(self) -> Iterator[Interaction]:
        epoch = int(torch.randint(2**31, (), generator=self.generator))
        chunks = self.cutter.training_chunks(self.targets, self.seed, epoch)
        return map(self.collate, optimizer_steps(chunks, self.labels, self.seed, epoch))

    def collate(self, chunks: list[Chunk]) -> Interaction:
        """The batch of some chunks."""
        low = np.array([chunk.start for chunk in chunks])
        sizes = np.array([len(chunk) for chunk in chunks])
        targets = np.zeros((len(chunks), sizes.max()), dtype=bool)
        for row, chunk in enumerate(chunks):
            targets[row, chunk.target_places] = True
        users = np.array([chunk.user for chunk in chunks])
        return table({self.user_field: users, LOW: low, HIGH: low + sizes, TARGETS: targets})
