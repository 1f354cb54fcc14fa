"""The splits of a dataset, and which samples of a split a run uses."""

from __future__ import annotations

import zlib

import numpy as np

from recbole_llm.data.atomic_dataset import SPLITS
from recbole_llm.data.dataset import HistoryDataset


def build_splits(dataset: HistoryDataset) -> list[HistoryDataset]:
    """The train, valid and test split of a dataset, none of them empty.

    Raises:
        ValueError: naming the split that is missing.
    """
    splits = dataset.build()
    empty = [name for name, split in zip(SPLITS, splits, strict=False) if not len(split)] + list(
        SPLITS[len(splits) :]
    )
    if empty:
        raise ValueError(
            f"{dataset.dataset_name} has no samples in the {empty[0]} split (samples: {[len(s) for s in splits]}); "
            "give eval_args.split shares for train, valid and test, such as {RS: [0.8, 0.1, 0.1]} or "
            "{LS: valid_and_test}, and check min_history"
        )
    return splits


def draw_rows(n_rows: int, size: int | float | None, seed: int, purpose: str) -> np.ndarray:
    """Draw samples without replacement, once per (seed, purpose).

    Draws are nested: with one seed and purpose, the samples of ``size=512`` are among those of ``size=1024``.

    Args:
        n_rows: how many samples there are.
        size: a count (int), a share in (0, 1) (float), or ``None`` for all samples.
        seed: the run's seed.
        purpose: what the samples are for, e.g. ``'few_shot'``; other purposes get other samples.

    Returns:
        Ascending indices, int64.

    Raises:
        ValueError: if ``size`` is larger than the data, or not a count or share.
    """
    if size is None:
        return np.arange(n_rows)
    if isinstance(size, float) and 0 < size < 1:
        count = max(1, round(size * n_rows))
    elif isinstance(size, (int, np.integer)) and not isinstance(size, bool) and size >= 1:
        count = int(size)
    else:
        raise ValueError(
            f"{purpose}: {size!r} is neither a count of samples (an int >= 1) nor a share in (0, 1)"
        )
    if count > n_rows:
        raise ValueError(f"{purpose}: {count:,} samples are asked for, but there are only {n_rows:,}")
    generator = np.random.default_rng([seed, zlib.crc32(purpose.encode())])
    return np.sort(generator.permutation(n_rows)[:count])
