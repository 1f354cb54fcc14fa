"""Atomic files for the tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]


def data_folder() -> Path:
    """Where ml-1m may lie: ``RECBOLE_LLM_DATA``, else ``../shared/data`` beside the repository."""
    return Path(os.environ.get("RECBOLE_LLM_DATA") or REPOSITORY.parent / "shared" / "data")


def write_atomic(folder: Path, name: str, suffix: str, header: str, rows: Iterable[Iterable]) -> Path:
    """Write ``folder/name/name.suffix``, cells as they are; returns its path."""
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    lines = [header.replace(" ", "\t"), *("\t".join(map(str, row)) for row in rows)]
    path = target / f"{name}.{suffix}"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


INTER_HEADER = "user_id:token item_id:token rating:float timestamp:float"


def random_interactions(seed: int = 0, users: int = 30, items: int = 15, ties: bool = True) -> list[tuple]:
    """(user, item, rating, timestamp) in the order of a file that nobody sorted; seconds in the year 2001."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        length = int(rng.integers(4, items))
        times = rng.integers(0, 8, length) if ties else rng.permutation(500)[:length] * users + user
        for item, time in zip(rng.permutation(items)[:length], times, strict=True):
            rows.append((f"{user + 1}", f"{item + 1}", int(rng.integers(1, 6)), 1_000_000_000 + int(time)))
    return [rows[i] for i in rng.permutation(len(rows))]
