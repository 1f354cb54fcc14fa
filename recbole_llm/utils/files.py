"""Files that several processes share: whole or not there, and made by one of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

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
