"""Users' interactions as sequences in which every interaction can be a target.

A *chunk* is a run of one user's interactions in time order. What each interaction is rendered as (a line of text, an
embedding) and what it costs (tokens, or 1) is left to the caller::

    position      0   1   2   3   4   5   6   7   8   9        of one user, in the HistoryIndex
    sample                            x   x       x   x        of the training split, drawn by few_shot
                      |-----------|---------------|
    a chunk           context      body: the samples in it are its targets (5, 6 and 8)

The body of one chunk begins where the body of the one before ends, so that every sample is the target of exactly one
chunk. A target sees everything before it in its chunk, with the true stars, and nothing else. A chunk ends with its
last target.

- **Training.** The user's interactions are cut from his first one to his last sample. Where the first body ends is
  drawn for each user from ``(seed, epoch)``, so that every epoch cuts elsewhere, and a sample meets histories of all
  lengths from ``lead`` on.
- **Evaluation.** The user's interactions are cut from his first one on, always in the same places, which depend on no
  later interaction and no draw. Where a split begins (``openings``) a body does, too: what comes before is shown as
  context only, and no more of it. So the score of a sample is a function of the sample and the split. Context is
  ``context`` interactions, so that histories are as long as those of training, without its shortest ones.

In both, context takes at most half of the budget, so that a chunk always has room for targets.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from recbole.data.dataloader import TrainDataLoader
from recbole.data.interaction import Interaction

from recbole_llm.data.dataset import HISTORY_END, HistoryDataset, table
from recbole_llm.data.history import HistoryIndex

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chunk:
    """A run of one user's interactions.

    Attributes:
        user: internal user id.
        start: position of the first interaction in the :class:`HistoryIndex`.
        targets: positions to be predicted, int64 ``[k]``, ascending; the last one ends the chunk.
        item: what stands at the last position instead of what the history has there, if anything: an interaction that
            may still come. Internal id; ``None``: all is as in the history.
    """

    user: int
    start: int
    targets: np.ndarray
    item: int | None = None

    @property
    def positions(self) -> np.ndarray:
        """Positions of all interactions of the chunk, int64 ``[S]``."""
        return np.arange(self.start, self.targets[-1] + 1)

    @property
    def target_places(self) -> np.ndarray:
        """Where in the chunk its targets are, int64 ``[k]`` in ``[0, S)``."""
        return self.targets - self.start

    def items(self, history: HistoryIndex) -> np.ndarray:
        """Internal item ids of all interactions, int64 ``[S]``."""
        positions = self.positions
        if self.item is None:
            return history.item_ids[positions]
        return np.append(history.item_ids[positions[:-1]], self.item)

    def __len__(self) -> int:
        return int(self.targets[-1]) + 1 - self.start


class StreamCutter:
    """Cuts users' interactions into chunks.

    Args:
        budget: what a chunk may cost.
        costs: what each interaction costs, int ``[n]``, at least 1; ``None``: 1 each.
        prefix_costs: what precedes the interactions of a user's chunk costs, int ``[n_users]``; ``None``: nothing.
        openings: interactions that a body of an evaluation chunk begins with, wherever else it is cut, bool ``[n]``;
            ``None``: none.
        lead: interactions before the body of a training chunk.
        context: interactions before the body of an evaluation chunk, at least ``lead``.
        unit: what costs are counted in, for messages.

    Raises:
        ValueError: if histories are bounded by their split (``history_scope: split``), an interaction does not fit into
            a chunk, ``openings`` are those of another history, or ``context`` is less than ``lead``.
    """

    def __init__(
        self,
        history: HistoryIndex,
        *,
        budget: int,
        costs: np.ndarray | None = None,
        prefix_costs: np.ndarray | None = None,
        openings: np.ndarray | None = None,
        lead: int = 5,
        context: int = 25,
        unit: str = "interactions",
    ) -> None:
        if history.row_start is not None:
            raise ValueError(
                "history_scope: split, or ready-made lists (benchmark_filename), hides interactions from a sample, and "
                "a stream shows all earlier ones; set history_scope: all, or layout: prompt"
            )
        if not 0 <= lead <= context:
            raise ValueError(
                f"a training chunk shows at least {lead} earlier interactions and an evaluation chunk {context}: "
                "evaluation must not show shorter histories than training"
            )
        n, n_users = len(history), len(history.user_start) - 1
        costs = np.ones(n, dtype=np.int64) if costs is None else np.asarray(costs, dtype=np.int64)
        prefix = np.zeros(n_users, dtype=np.int64) if prefix_costs is None else np.asarray(prefix_costs)
        owners = np.repeat(np.arange(n_users), np.diff(history.user_start))
        needed = costs + prefix[owners]
        if n and needed.max() > budget:
            worst = int(needed.argmax())
            raise ValueError(
                f"a chunk of {budget} {unit} is too small: the interaction of user {owners[worst]} with item "
                f"{history.item_ids[worst]} (internal ids) needs {needed[worst]}, {prefix[owners[worst]]} of them "
                "for what precedes it; allow longer chunks or shorter titles"
            )
        openings = np.zeros(n, dtype=bool) if openings is None else openings
        if len(openings) != n:
            raise ValueError(f"openings of {len(openings):,} interactions for a history of {n:,}")
        self.history, self.openings, self.lead, self.context = history, openings, lead, context
        self._room = budget - prefix  # of each user's chunks
        self._before = np.concatenate([[0], np.cumsum(costs)])  # cost of all interactions before a position
        self._owners = owners
        self._windows: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    # ------------------------------------------------------------------ cutting

    def _costs(self, user: int, end: int) -> np.ndarray:
        """Cost of all interactions before each of a user's, up to that at ``end``, ``[m + 1]``."""
        return self._before[self.history.user_start[user] : end + 1]

    def _first_shown(self, before: np.ndarray, room: int, body: int, n_context: int) -> int:
        """First of at most ``n_context`` interactions before ``body`` that cost at most half of the room."""
        least = before[body] - room // 2
        return max(0, body - n_context, min(body, int(np.searchsorted(before, least))))

    def _cut(
        self,
        user: int,
        before: np.ndarray,
        n_context: int,
        first_share: float = 1.0,
        openings: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cut a user's interactions: first position shown and end of the body of each chunk, each ``[n_chunks]``.

        Args:
            user: whose.
            before: of :meth:`_costs`; where it ends is where the last chunk does.
            n_context: interactions before the body.
            first_share: of the room, given to the first body.
            openings: which of the user's interactions must begin a body, bool; ``None``: only the first.
        """
        begin, whole, last = int(self.history.user_start[user]), int(self._room[user]), len(before) - 1
        forced = np.array([last]) if openings is None else np.append(np.flatnonzero(openings[:last]), last)
        starts: list[int] = []
        ends: list[int] = []
        body = 0
        while body < last:
            first = self._first_shown(before, whole, body, n_context)
            room = int(whole * (1.0 if starts else first_share))  # a float would convert all costs
            stop = int(np.searchsorted(before, before[first] + room, side="right")) - 1
            if stop <= body:  # the next interaction is too long to stand behind this context
                first = max(first, int(np.searchsorted(before, before[body + 1] - whole)))
            stop = min(max(stop, body + 1), int(forced[np.searchsorted(forced, body, side="right")]))
            starts.append(begin + first)
            ends.append(begin + stop)
            body = stop
        return np.array(starts, dtype=np.int64), np.array(ends, dtype=np.int64)

    def _evaluation_cut(self, user: int, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        openings = self.openings[self.history.user_start[user] : self.history.user_start[user + 1]]
        return self._cut(user, before, self.context, openings=openings)

    def _checked(self, targets: np.ndarray) -> np.ndarray:
        targets = np.unique(np.asarray(targets, dtype=np.int64))
        if len(targets) and not 0 <= targets[0] <= targets[-1] < len(self.history):
            raise ValueError("targets of a stream must be positions of the history")
        return targets

    def training_chunks(self, targets: np.ndarray, seed: int, epoch: int) -> list[Chunk]:
        """Chunks in which every target occurs once, for one epoch.

        Args:
            targets: positions of the samples that are to be learned from, in any order.
            seed, epoch: all that the cuts of a user depend on, beside his interactions.

        Returns:
            Chunks by user and time.
        """
        targets = self._checked(targets)
        rng = np.random.default_rng([seed, epoch, zlib.crc32(b"stream")])
        shares = rng.random(len(self._room))
        chunks = []
        for user, mine in self._by_user(targets):
            starts, ends = self._cut(user, self._costs(user, int(mine[-1]) + 1), self.lead, shares[user])
            chunks += self._chunks(user, mine, starts, ends)
        return chunks

    def evaluation_chunks(self, targets: np.ndarray) -> list[Chunk]:
        """Chunks in which every target occurs once and sees what it sees beside any other targets.

        Args:
            targets: positions of the samples to be scored, in any order.

        Returns:
            Chunks by user and time.
        """
        chunks = []
        for user, mine in self._by_user(self._checked(targets)):
            if user not in self._windows:
                end = int(self.history.user_start[user + 1])
                self._windows[user] = self._evaluation_cut(user, self._costs(user, end))
            chunks += self._chunks(user, mine, *self._windows[user])
        return chunks

    def appended_chunk(self, user: int, end: int, item: int, cost: int) -> Chunk:
        """The evaluation chunk of an item that stands at ``end`` of a user's stream, as if it came next there.

        The chunk is that which :meth:`evaluation_chunks` would give if the history had this interaction.

        Args:
            user: internal id.
            end: position; behind the user's last interaction for one that is still to come.
            item: internal id.
            cost: of this interaction.

        Raises:
            ValueError: if the interaction does not fit into a chunk.
        """
        if cost > self._room[user]:
            raise ValueError(
                f"an interaction of user {user} with item {item} (internal ids) needs {cost} and a chunk has room for "
                f"{self._room[user]}; allow longer chunks or shorter titles"
            )
        before = self._costs(user, end)
        starts, _ = self._evaluation_cut(user, np.append(before, before[-1] + cost))
        return Chunk(user, int(starts[-1]), np.array([end]), item)

    def _by_user(self, targets: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Users and their targets; ``targets`` are ascending, as are the users of positions."""
        users, first = np.unique(self._owners[targets], return_index=True)
        return list(zip(users.tolist(), np.split(targets, first[1:]), strict=True)) if len(users) else []

    @staticmethod
    def _chunks(user: int, targets: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> list[Chunk]:
        of_chunk = np.searchsorted(ends, targets, side="right")
        places, first = np.unique(of_chunk, return_index=True)
        parts = np.split(targets, first[1:])
        return [
            Chunk(user, int(starts[place]), part) for place, part in zip(places.tolist(), parts, strict=True)
        ]

    def cost(self, chunk: Chunk) -> int:
        """What the interactions of a chunk cost, without what precedes them."""
        return int(self._before[chunk.targets[-1] + 1] - self._before[chunk.start])


def draw_by_user(users: np.ndarray, size: int | float, seed: int, purpose: str = "few_shot") -> np.ndarray:
    """Draw whole users until there are enough samples; of the last user his first ones.

    In a chunk of many targets a label costs a few tokens; drawn one by one, most labels would need a chunk of their
    own. Draws are nested, as those of :func:`recbole_llm.data.dataset.draw_rows`.

    Args:
        users: the user of each sample, ``[n]``.
        size: a count, or a share in (0, 1).
        seed: the run's seed.
        purpose: what the samples are for; other purposes get other users.

    Returns:
        Ascending indices, int64.

    Raises:
        ValueError: if there are fewer samples.
    """
    count = max(1, round(size * len(users))) if isinstance(size, float) else size
    if count > len(users):
        raise ValueError(f"{purpose}: {count:,} samples are asked for, but there are only {len(users):,}")
    names, owner = np.unique(users, return_inverse=True)
    rank = np.random.default_rng([seed, zlib.crc32(f"{purpose} users".encode())]).permutation(len(names))
    return np.sort(np.argsort(rank[owner], kind="stable")[:count])


def interactions_at(
    dataset: HistoryDataset,
    positions: np.ndarray,
    users: np.ndarray | None = None,
    items: np.ndarray | None = None,
) -> Interaction:
    """Any interactions as a batch of samples with their histories, as a lens reads them.

    Unlike samples of a split they may have fewer earlier interactions than ``min_history``, or none; an empty history
    is one padding item, as everywhere (:meth:`HistoryDataset.join`). Nothing at or after an interaction's own place is
    part of its history.

    Args:
        positions: positions in its history, ``[n]``.
        users, items: whose and of what they are, ``[n]``; by default as the history has it. Needed for interactions
            that are still to come.
    """
    history = dataset.history
    if users is None:
        users = np.searchsorted(history.user_start, positions, side="right") - 1
    if items is None:
        items = history.item_ids[positions]
    return dataset.join(table({dataset.uid_field: users, dataset.iid_field: items, HISTORY_END: positions}))


def others_positions(
    history: HistoryIndex, positions: np.ndarray, users: np.ndarray | None = None
) -> np.ndarray:
    """For each interaction one of the next user, the same for it at every time: whose states gate ``shuffled`` reads.

    Args:
        history: the interactions of all users.
        positions: positions in it, ``[n]``.
        users: whose they are, ``[n]``; only needed for an interaction still to come, at the end of its user's.
    """
    start = history.user_start
    others = np.flatnonzero(np.diff(start))
    owner = np.searchsorted(start, positions, side="right") - 1 if users is None else users
    donor = others[(np.searchsorted(others, owner) + 1) % len(others)]
    return start[donor] + (positions - start[owner]) % (start[donor + 1] - start[donor])


def interactions_of(dataset: HistoryDataset, chunks: Sequence[Chunk]) -> Interaction:
    """All interactions of some chunks, one after another, as :func:`interactions_at` gives them."""
    return interactions_at(
        dataset,
        np.concatenate([chunk.positions for chunk in chunks]),
        np.repeat([chunk.user for chunk in chunks], [len(chunk) for chunk in chunks]),
        np.concatenate([chunk.items(dataset.history) for chunk in chunks]),
    )


def stored(history: HistoryIndex, users: np.ndarray, items: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Which samples are interactions of the history, bool ``[B]``; the others stand where one may still come."""
    inside = np.minimum(ends, len(history) - 1)
    return (ends < history.user_start[users + 1]) & (history.item_ids[inside] == items)


def visible_until(history: HistoryIndex, chunk: Chunk) -> np.ndarray | None:
    """For each interaction of a chunk how many of those before it it may see, int64 ``[S]``.

    Args:
        history: its ``ties`` decide: with ``strict`` an interaction sees none that carries its own timestamp.
        chunk: some interactions.

    Returns:
        Interaction ``j`` may see the interactions ``[0, found[j])`` of the chunk, and itself. ``None`` where that is
        all before it, so that plain causal attention is exact.
    """
    if history.ties == "order":
        return None
    positions, end = chunk.positions, history.user_start[chunk.user + 1]
    # What comes behind the user's last interaction has a time of its own.
    found = np.where(positions < end, history.tie_start[np.minimum(positions, len(history) - 1)], positions)
    found = np.maximum(found - chunk.start, 0)
    return None if np.array_equal(found, np.arange(len(chunk))) else found


def attention_inputs(
    places: Sequence[np.ndarray], until: Sequence[np.ndarray | None]
) -> dict[str, torch.Tensor]:
    """Mask and positions for sequences whose interactions must not all see what stands before them.

    With ``history_ties: strict`` a token of interaction j sees the header, the interactions ``[0, n_j)`` with an
    earlier timestamp, and j itself up to its own place. Its position id counts what it sees: it is the token's place in
    the text without the interactions that are hidden from it.

    Args:
        places: of each sequence, which interaction each token belongs to, -1 for the header, ``[T_i]``.
        until: the numbers ``n_j`` of each sequence as :func:`visible_until` gives them.

    Returns:
        ``attention_mask`` bool ``[b, 1, T, T]`` and ``position_ids`` int64 ``[b, T]``; nothing where plain causal
        attention is exact, which is faster.
    """
    if all(found is None for found in until):
        return {}
    width = max(map(len, places))
    mask = np.zeros((len(places), 1, width, width), dtype=bool)
    position = np.tile(np.arange(width), (len(places), 1))
    for row, (of, seen) in enumerate(zip(places, until, strict=True)):
        seen, n = np.arange(of.max() + 1) if seen is None else seen, len(of)
        last_seen = np.where(of < 0, 0, seen[np.maximum(of, 0)])
        earlier = of[None, :] < last_seen[:, None]  # the header, -1, is before all
        own = (of[None, :] == of[:, None]) & np.tri(n, dtype=bool)
        mask[row, 0, :n, :n] = np.where((of < 0)[:, None], own, earlier | own)
        mask[row, 0, np.arange(n, width), np.arange(n, width)] = (
            True  # padding sees itself: no row without a key
        )
        position[row, :n] = mask[row, 0, :n, :n].sum(axis=1) - 1
    return {"attention_mask": torch.from_numpy(mask), "position_ids": torch.from_numpy(position)}


def optimizer_steps(chunks: Sequence[Chunk], labels: int, seed: int, epoch: int) -> list[list[Chunk]]:
    """Chunks in random order, as many per optimizer step as it takes to have at least ``labels`` targets.

    Counting targets and not chunks keeps the gradient's noise, and so the learning rate that suits it, the same for
    short chunks and long ones. The last step may have fewer.
    """
    rng = np.random.default_rng([seed, epoch, zlib.crc32(b"steps")])
    steps: list[list[Chunk]] = []
    held = labels
    for place in rng.permutation(len(chunks)).tolist():
        if held >= labels:
            steps.append([])
            held = 0
        steps[-1].append(chunks[place])
        held += len(chunks[place].targets)
    return steps


@dataclass
class StreamBatch:
    """The chunks of one optimizer step.

    Attributes:
        chunks: the chunks.
        interaction: the samples that are their targets, chunk by chunk, with the dataset's own fields alone.
    """

    chunks: list[Chunk]
    interaction: Interaction

    def __len__(self) -> int:
        return len(self.interaction)


class StreamLoader(TrainDataLoader):
    """Training samples in chunks; every sample once per epoch.

    Args:
        config: the run's configuration; ``train_batch_size`` is the least number of targets per optimizer step.
        dataset: the samples to learn from.
        cutter: cuts them into chunks.
    """

    def __init__(self, config, dataset: HistoryDataset, cutter: StreamCutter) -> None:
        super().__init__(config, dataset, None)  # the order is that of `epoch_batches`
        self.cutter, self._seed = cutter, config["seed"]
        self._labels = config["train_batch_size"]
        positions = dataset.inter_feat[HISTORY_END].numpy()
        self._order = np.argsort(positions, kind="stable")
        self._positions = positions[self._order]

    def epoch_batches(self, epoch: int) -> list[list[Chunk]]:
        """The chunks of each optimizer step of an epoch; depends on the seed and ``epoch`` alone."""
        chunks = self.cutter.training_chunks(self._positions, self._seed, epoch)
        steps = optimizer_steps(chunks, self._labels, self._seed, epoch)
        shown = sum(map(len, chunks))
        users = [len({chunk.user for chunk in step}) for step in steps]
        logger.info(
            "epoch %d: %s labels of %s users in %s chunks of %.1f interactions (%.1f%% of them context only, without "
            "a label to learn); %s optimizer steps of at least %s labels, %.1f users each",
            epoch,
            f"{len(self._positions):,}",
            f"{len({chunk.user for chunk in chunks}):,}",
            f"{len(chunks):,}",
            shown / max(1, len(chunks)),
            100 * (1 - len(self._positions) / max(1, shown)),
            f"{len(steps):,}",
            f"{self._labels:,}",
            np.mean(users) if users else 0.0,
        )
        return steps

    def collate_fn(self, chunks: list[Chunk]) -> StreamBatch:
        """The samples of some chunks."""
        targets = np.concatenate([chunk.targets for chunk in chunks])
        found = self._order[np.searchsorted(self._positions, targets)]
        return StreamBatch(chunks, self._dataset.__getitem__(found, join=False))
