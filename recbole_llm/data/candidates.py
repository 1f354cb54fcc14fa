"""Candidates: for each sample the target item among sampled others, drawn once and used by every model.

    CandidateSet.items[row]   ->   [ 911, 35, 1204, 17, ... ]   the target (here 17) lies somewhere among the negatives

A sample's draw depends on nothing but (seed, purpose, row_id) and on what may be drawn for it, so any subset of
samples, on any machine, has the same candidates. That takes random numbers that are *computed* from (seed, purpose,
row_id, i) instead of taken from a stream that all samples share: SplitMix64, Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014. Drawing without replacement, with weights w, is drawing with replacement
and passing over what came before; samples for which that takes too long are finished by an exponential race, which has
the same distribution: of waiting times -log(u_i) / w_i the shortest win (Efraimidis and Spirakis, "Weighted random
sampling with a reservoir", 2006).
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.data.dataset import HISTORY_END, HistoryDataset
from recbole_llm.utils.fields import ROW_ID
from recbole_llm.utils.files import DAMAGED, write_atomically

logger = logging.getLogger(__name__)

KINDS = ("uniform", "popularity", "hard")
# Part of the file's name: to be raised when the same arguments come to give other candidates.
VERSION = 1
# Samples x items looked at together; the largest arrays hold eight bytes for each.
CELLS = 4_000_000
_DRAW, _RACE, _ORDER = 1, 2, 3  # the purposes that one sample needs random numbers for


@dataclass(frozen=True)
class CandidateSet:
    """The candidates of some samples.

    Attributes:
        row_ids: the samples' ``row_id``, int64 ``[n]``, each once.
        items: internal item ids, int64 ``[n, C]``: the target and ``C - 1`` negatives, in the order shown to models.
        targets: the samples' own items, int64 ``[n]``.

    Raises:
        ValueError: if the shapes do not fit, a sample comes twice, or a sample's candidates are not distinct items
            (0 is padding) with the target among them.
    """

    row_ids: np.ndarray
    items: np.ndarray
    targets: np.ndarray

    def __post_init__(self) -> None:
        rows = len(self.row_ids)
        if self.items.ndim != 2 or len(self.items) != rows or self.targets.shape != (rows,):
            raise ValueError(
                f"candidates of shape {self.items.shape} and targets of shape {self.targets.shape} do not fit "
                f"{rows} samples"
            )
        if len(np.unique(self.row_ids)) < rows:
            raise ValueError("candidates: a row_id comes more than once")
        ascending = np.sort(self.items, axis=1)
        wrong = (self.items == self.targets[:, None]).sum(axis=1) != 1
        wrong |= (ascending[:, 1:] == ascending[:, :-1]).any(axis=1) | (ascending[:, :1] < 1).any(axis=1)
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"candidates of row_id {self.row_ids[row]}: {self.items[row].tolist()} are not distinct items with the "
                f"target {self.targets[row]} among them"
            )

    def __len__(self) -> int:
        return len(self.row_ids)

    @cached_property
    def _by_row_id(self) -> np.ndarray:
        return np.argsort(self.row_ids)

    def find(self, row_ids: np.ndarray) -> np.ndarray:
        """Where samples are in this set, ``[B]``.

        Raises:
            ValueError: naming a sample that is not in the set.
        """
        row_ids, order = np.asarray(row_ids), self._by_row_id
        place = np.searchsorted(self.row_ids, row_ids, sorter=order)
        found = order[np.minimum(place, len(order) - 1)] if len(order) else np.zeros_like(place)
        known = self.row_ids[found] == row_ids if len(order) else np.zeros(len(row_ids), dtype=bool)
        if not known.all():
            missing = row_ids[~known]
            raise ValueError(
                f"there are no candidates for row_id {missing[0]} (nor for {len(missing) - 1} others of the "
                f"{len(row_ids)} samples asked for); they were drawn for {len(self)} other samples"
            )
        return found

    def of(self, row_ids: np.ndarray) -> np.ndarray:
        """The candidates of samples, in the stored order.

        Args:
            row_ids: ``[B]``.

        Returns:
            int64 ``[B, C]``.

        Raises:
            ValueError: naming a sample that is not in the set.
        """
        return self.items[self.find(row_ids)]

    @cached_property
    def sha256(self) -> str:
        """Identity of samples, candidates and their order."""
        return _digest(self.row_ids, self.items, self.targets)

    def save(self, path: Path) -> None:
        """Write an npz file (nothing pickled), atomically."""
        columns = {name: getattr(self, name) for name in ("row_ids", "items", "targets")}
        digest = np.array(self.sha256)
        write_atomically(path, lambda file: np.savez_compressed(file, **columns, sha256=digest))

    @classmethod
    def load(cls, path: Path) -> CandidateSet:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged or not a file of candidates.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                found = cls(*(file[name].astype(np.int64) for name in ("row_ids", "items", "targets")))
                intact = str(file["sha256"]) == found.sha256
        except FileNotFoundError:
            raise
        except DAMAGED as error:
            raise ValueError(f"{path} is damaged or no file of candidates ({error}); delete it") from error
        if not intact:
            raise ValueError(f"{path} is damaged: its SHA-256 is not the one it was saved with; delete it")
        return found


def draw_candidates(
    rows: HistoryDataset,
    *,
    num_negatives: int,
    kind: str,
    seed: int,
    purpose: str,
    item_counts: np.ndarray | None = None,
    item_scores: Callable[[Interaction], Tensor] | None = None,
    scores_identity: str | None = None,
    allowed: np.ndarray | None = None,
    cache_dir: Path | None = None,
) -> CandidateSet:
    """Draw negatives beside each sample's target: without replacement, none from the sample's history.

    What may be drawn is every item that ``allowed`` has, but the padding, the target and what the sample's history
    holds (all of it, as ``rows.history.bounds`` gives it, not only what a model is shown). Later interactions of the
    user may be drawn: nothing of the future is looked at.

    Args:
        rows: a dataset of samples, for example one split.
        num_negatives: how many to draw for each sample.
        kind: ``uniform``; ``popularity``: proportionally to ``item_counts``; ``hard``: the items with the highest
            ``item_scores``, the lower id first among equals.
        seed: the seed of the draw.
        purpose: what the samples are for, e.g. ``'test'``; other purposes get other draws.
        item_counts: of ``popularity``: how often each item occurs in training, ``[n_items]``; an item with 0 is
            never drawn. Not read by other kinds.
        item_scores: of ``hard``: takes a joined batch of ``B`` samples and returns ``[B, n_items]``; an item with -inf
            is never drawn. Its last bits may depend on how the samples are batched, and with them which of two all but
            equal items is drawn.
        allowed: which items may be drawn, a mask ``[n_items]``, e.g. ``dataset.ranked_items``; ``None``: all.
        scores_identity: of ``hard``: what tells these ``item_scores`` from others, needed for ``cache_dir``.
        cache_dir: keep the result in ``cache_dir/candidates/<hash>.npz``, named by what determines it, and take
            it from there the next time; ``None`` keeps nothing.

    Returns:
        The candidates in the order of ``rows``, the target at a random place among them.

    Raises:
        ValueError: if an argument is missing or does not fit, or a sample has too few items left to draw from.
    """
    n_items, weights = rows.item_num, None
    if (
        not isinstance(num_negatives, (int, np.integer))
        or isinstance(num_negatives, bool)
        or num_negatives < 1
    ):
        raise ValueError(f"num_negatives: {num_negatives!r} is not a count of items (an int >= 1)")
    if kind == "uniform":
        weights = np.ones(n_items)
    elif kind == "popularity":
        weights = _checked_counts(item_counts, n_items)
    elif kind != "hard":
        raise ValueError(f"kind of candidates: {kind!r} is none of {', '.join(KINDS)}")
    elif item_scores is None:
        raise ValueError("candidates of kind hard are an item scorer's best items: item_scores is missing")
    elif cache_dir is not None and not scores_identity:
        raise ValueError("hard candidates in cache_dir are told apart by scores_identity, which is missing")
    if allowed is not None and allowed.shape != (n_items,):
        raise ValueError(
            f"allowed: a mask of shape {allowed.shape} does not fit {n_items} items (padding included)"
        )
    if weights is not None:
        weights[0] = 0
        if allowed is not None:
            weights[~allowed] = 0

    feat = rows.inter_feat
    fields = (ROW_ID, rows.uid_field, rows.iid_field, HISTORY_END)
    row_ids, users, targets, ends = (feat[field].numpy().astype(np.int64) for field in fields)
    starts, stops = rows.history.bounds(users, ends)
    path = None
    if cache_dir is not None:
        settings = f"{VERSION} {kind} {int(num_negatives)} {n_items} {int(seed)} {purpose!r} "
        settings += str(scores_identity) if kind == "hard" else ""
        extra = () if weights is None else (weights,)
        if weights is None and allowed is not None and not allowed[1:].all():
            extra = (allowed,)
        name = _digest(row_ids, targets, starts, stops, rows.history.item_ids, *extra, settings=settings)
        path = Path(cache_dir) / "candidates" / f"{name}.npz"
        if path.is_file():
            try:
                found = CandidateSet.load(path)
                logger.info(
                    "candidates of %s samples (%s, %s) from %s", f"{len(rows):,}", purpose, kind, path
                )
                return found
            except ValueError as error:
                logger.warning("candidates are drawn again: %s", error)

    keys = _row_keys(seed, purpose, row_ids)
    items = np.empty((len(row_ids), 1 + num_negatives), dtype=np.int64)
    size = max(1, CELLS // max(n_items, _tries(num_negatives)))
    for first in range(0, len(row_ids), size):
        part = slice(first, first + size)
        taken = _taken(starts[part], stops[part], targets[part], rows.history.item_ids, n_items)
        if weights is None and item_scores is not None:
            scores = item_scores(rows[np.arange(len(row_ids))[part]])
            barred = taken if allowed is None else taken | ~allowed
            drawn, left = _best(_checked_scores(scores, taken.shape), barred, num_negatives)
        else:
            drawn, left = _draw(keys[part], taken, cast(np.ndarray, weights), num_negatives)
        if drawn is None:
            row = first + int(left.argmin())
            user = rows.id2token(rows.uid_field, int(users[row]))
            raise ValueError(
                f"candidates of {rows.dataset_name}: num_negatives asks for {num_negatives}, but of the "
                f"{n_items - 1} items only {left.min()} can be drawn ({kind}) for user {user} (row_id "
                f"{row_ids[row]}), whose history holds {stops[row] - starts[row]} interactions; set it lower"
            )
        items[part, 0], items[part, 1:] = targets[part], drawn
    order = np.argsort(_random(keys[:, None], _ORDER, np.arange(1 + num_negatives)), axis=1, kind="stable")
    found = CandidateSet(row_ids, np.take_along_axis(items, order, axis=1), targets)
    logger.info(
        "%s candidates (%s) drawn for each of %s samples (%s), sha256 %s",
        items.shape[1],
        kind,
        f"{len(found):,}",
        purpose,
        found.sha256[:16],
    )
    if path is not None:
        found.save(path)
    return found


def most_negatives(rows: HistoryDataset, drawable: np.ndarray, wanted: int) -> tuple[int, int | None]:
    """How many negatives each of the samples can have, at most ``wanted``.

    Args:
        rows: a dataset of samples.
        drawable: which items may be negatives, a mask ``[n_items]``.
        wanted: samples that can have so many are not looked at closely.

    Returns:
        The number, and the internal id of the user that has the fewest; ``None`` if all can have ``wanted``.
    """
    feat = rows.inter_feat
    users, targets, ends = (
        feat[field].numpy().astype(np.int64) for field in (rows.uid_field, rows.iid_field, HISTORY_END)
    )
    starts, stops = rows.history.bounds(users, ends)
    few = np.flatnonzero(drawable.sum() - (stops - starts) - 1 < wanted)  # histories may repeat their items
    most, user = wanted, None
    size = max(1, CELLS // rows.item_num)
    for first in range(0, len(few), size):
        part = few[first : first + size]
        taken = _taken(starts[part], stops[part], targets[part], rows.history.item_ids, rows.item_num)
        left = (drawable & ~taken).sum(axis=1)
        if left.min() < most:
            most, user = int(left.min()), int(users[part[left.argmin()]])
    return most, user


# ---------------------------------------------------------------------- drawing


def _taken(
    starts: np.ndarray, stops: np.ndarray, targets: np.ndarray, item_ids: np.ndarray, n_items: int
) -> np.ndarray:
    """What must not be drawn: padding, target and history, bool ``[B, n_items]``."""
    lengths = stops - starts
    row = np.repeat(np.arange(len(starts)), lengths)
    position = np.arange(lengths.sum()) + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
    taken = np.zeros((len(starts), n_items), dtype=bool)
    taken[row, item_ids[position]] = True
    taken[np.arange(len(targets)), targets] = True
    taken[:, 0] = True
    return taken


def _tries(count: int) -> int:
    """How often to draw with replacement before the race."""
    return count + count // 2 + 8


def _draw(
    keys: np.ndarray, taken: np.ndarray, weights: np.ndarray, count: int
) -> tuple[np.ndarray | None, np.ndarray]:
    """Draw ``count`` items for each sample, one after the other, proportionally to the weights of what is left.

    Args:
        keys: the samples' random keys, uint64 ``[B]``.
        taken: bool ``[B, n_items]``.
        weights: ``[n_items]``, not negative.

    Returns:
        Items ``[B, count]`` and how many each sample could choose from (where counted); no items if that is too few.
    """
    rows, tries = len(keys), _tries(count)
    cumulative = np.cumsum(weights)
    unit = _unit(keys[:, None], _DRAW, np.arange(tries))
    drawn = np.searchsorted(cumulative, unit * cumulative[-1], side="right")
    order = np.argsort(drawn, axis=1, kind="stable")
    ascending = np.take_along_axis(drawn, order, axis=1)
    same = np.zeros(drawn.shape, dtype=bool)
    same[:, 1:] = ascending[:, 1:] == ascending[:, :-1]
    repeated = np.empty_like(same)
    np.put_along_axis(repeated, order, same, axis=1)

    good = ~repeated & ~taken[np.arange(rows)[:, None], drawn]
    place = np.cumsum(good, axis=1) - 1
    row, column = np.nonzero(good & (place < count))
    items = np.zeros((rows, count), dtype=np.int64)
    items[row, place[row, column]] = drawn[row, column]

    short = np.flatnonzero(items[:, -1] == 0)
    left = np.full(rows, np.iinfo(np.int64).max)
    if len(short):
        free = ~taken[short] & (weights > 0)
        left[short] = free.sum(axis=1)
        if (left < count).any():
            return None, left
        free[np.arange(len(short))[:, None], items[short]] = False
        missing = count - (items[short] > 0).sum(axis=1)
        most = int(missing.max())
        # Not a division by a weight of 0, whose items do not run.
        pace = np.where(weights > 0, weights, 1)
        waiting = -np.log1p(-_unit(keys[short][:, None], _RACE, np.arange(len(weights)))) / pace
        waiting[~free] = np.inf
        winners = np.argpartition(waiting, most - 1, axis=1)[:, :most]
        by_time = np.argsort(np.take_along_axis(waiting, winners, axis=1), axis=1, kind="stable")
        winners = np.take_along_axis(winners, by_time, axis=1)
        turn = np.arange(count) - (count - missing)[:, None]
        won = np.take_along_axis(winners, np.maximum(turn, 0), axis=1)
        items[short] = np.where(turn >= 0, won, items[short])
    return items, left


def _best(scores: np.ndarray, taken: np.ndarray, count: int) -> tuple[np.ndarray | None, np.ndarray]:
    """The ``count`` highest scores of each sample that are not taken, the lower id first among equals.

    Args:
        scores: ``[B, n_items]``.
        taken: bool ``[B, n_items]``.

    Returns:
        Items ``[B, count]`` ascending, and how many each sample could choose from; no items if that is too few.
    """
    scores = np.where(taken, -np.inf, scores)
    left = (scores > -np.inf).sum(axis=1)
    if (left < count).any():
        return None, left
    lowest = np.partition(scores, -count, axis=1)[:, -count, None]
    above, equal = scores > lowest, scores == lowest
    chosen = above | (equal & (np.cumsum(equal, axis=1) <= count - above.sum(axis=1, keepdims=True)))
    return np.nonzero(chosen)[1].reshape(len(scores), count), left


def _checked_counts(item_counts: np.ndarray | None, n_items: int) -> np.ndarray:
    """A float64 copy of the counts."""
    if item_counts is None:
        raise ValueError("candidates of kind popularity are drawn by training counts: item_counts is missing")
    counts = np.array(item_counts, dtype=np.float64)
    if counts.shape != (n_items,):
        raise ValueError(f"item_counts of shape {counts.shape} do not fit {n_items} items (padding included)")
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError("item_counts holds negative or infinite values or NaN")
    return counts


def _checked_scores(scores: Tensor | np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    found = scores.detach().float().cpu().numpy() if isinstance(scores, Tensor) else np.asarray(scores)
    if found.shape != shape:
        raise ValueError(
            f"item_scores gave scores of shape {found.shape}, expected [samples, items] = {shape}"
        )
    if np.isnan(found).any():
        raise ValueError("item_scores gave NaN")
    return found


# ---------------------------------------------------------------------- random numbers and hashes


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64: the output that follows on the state ``x``, uint64 of any shape."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _row_keys(seed: int, purpose: str, row_ids: np.ndarray) -> np.ndarray:
    """One random key for each sample, uint64 ``[n]``."""
    start = np.array([int(seed) % 2**64, zlib.crc32(purpose.encode())], dtype=np.uint64)
    key = _mix(_mix(start[:1]) ^ start[1:])
    return _mix(key ^ row_ids.astype(np.uint64))


def _random(keys: np.ndarray, use: int, numbers: np.ndarray) -> np.ndarray:
    """Random uint64 for keys and numbers, broadcast against each other."""
    return _mix(_mix(keys ^ np.uint64(use)) ^ numbers.astype(np.uint64))


def _unit(keys: np.ndarray, use: int, numbers: np.ndarray) -> np.ndarray:
    """The same as float64 in [0, 1)."""
    return (_random(keys, use, numbers) >> np.uint64(11)) * 2.0**-53


def _digest(*arrays: np.ndarray, settings: str = "") -> str:
    """Sha256 of settings, shapes and contents."""
    digest = hashlib.sha256(settings.encode())
    for array in arrays:
        digest.update(f" {array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
