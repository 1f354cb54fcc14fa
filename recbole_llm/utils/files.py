"""Files that several processes share: whole or not there, and made by one of them."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, made: Path | None = None) -> Iterator[None]:
    """Only one process at a time may make ``path``; the others wait, and look again whether it is there.

    A process that ends, however it ends, gives its lock back. What is there needs no lock, and may lie in a folder that
    cannot be written. A folder that is filled file by file is there with its last one, ``made``.

    Raises:
        ValueError: if the folder of ``path``, which is in a cache, cannot be written.
    """
    if (made or path).exists():
        yield
        return
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        logger.info("another process is making %s, waiting for it", path)
        lock.acquire()
    except OSError as error:
        raise ValueError(
            f"the cache folder {path.parent} cannot be written ({error}): set cache_dir, or RECBOLE_LLM_CACHE, to "
            "another"
        ) from error
    try:
        yield
    finally:
        lock.release()


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let ``write(file)`` fill a temporary file beside ``path``, then move it into place; folders are made.

    Whatever ends ``write`` early, Ctrl-C included, removes the temporary file and leaves ``path`` as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not mkstemp, whose files nobody else may read.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path` atomically; what JSON cannot hold becomes plain, numbers that are not finite null."""
    dropped: list[str] = []
    held = plain(content, "", dropped)
    if dropped:
        logger.warning("%s: not a finite number, written as null: %s", path.name, ", ".join(dropped))
    text = json.dumps(held, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def plain(value: Any, where: str = "", dropped: list[str] | None = None) -> Any:
    """`value` as JSON holds it: enums by name, tuples as lists, what has no JSON form as its `str`.

    Args:
        where: the keys that lead to it.
        dropped: takes the place of every number that is not finite, which becomes None; by default they stay.
    """
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    elif isinstance(value, torch.Tensor):
        value = value.detach().cpu().tolist()
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isfinite(value) or dropped is None:
            return value
        dropped.append(where)
        return None
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}".lstrip("."), dropped) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{i}]", dropped) for i, item in enumerate(value)]
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value)
