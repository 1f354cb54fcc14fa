"""Files that several processes share: whole or not there, and made by one of them."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file

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
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        with suppress(OSError):  # the folder may not be writable any more
            temporary.unlink(missing_ok=True)


def not_written(path: Path, error: Exception) -> OSError:
    """The error to raise for a file that could not be written; an earlier one of its name is intact."""
    why = getattr(error, "strerror", None) or error
    before = "; what was there before is intact" if path.exists() else ""
    return OSError(f"cannot write {path}: {why}{before}")


# ---------------------------------------------------------------------- reading what may be damaged


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: naming the file, if it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no JSON: {error}") from error


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file; nothing is unpickled.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: naming the file, if it is damaged; every array has a checksum.
    """
    try:
        content = path.read_bytes()
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        # Entries after a damaged one are passed over in silence: their number is at the end of the archive.
        end = content.rfind(b"PK\x05\x06")
        if int.from_bytes(content[end + 10 : end + 12], "little") != len(found):
            raise ValueError("an array is missing")
        return found
    except FileNotFoundError:
        raise
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged or no npz file: {error}") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: naming the file, if it is damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise
    except (SafetensorError, *DAMAGED) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


DAMAGED = (
    ValueError, KeyError, EOFError, AttributeError, TypeError, IndexError, OSError, RuntimeError, NotImplementedError,
    struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What libraries raise while they read a file with a few wrong bytes."""


# ---------------------------------------------------------------------- arrays in a cache


def save_array(path: Path, values: np.ndarray) -> None:
    """Keep an array in a cache, and beside it the SHA-256 of its file."""
    content = io.BytesIO()
    np.save(content, values)
    write_atomically(path, lambda file: file.write(content.getvalue()))
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    write_atomically(_digest_file(path), lambda file: file.write(digest.encode()))


def load_array(path: Path) -> np.ndarray | None:
    """What :func:`save_array` kept; ``None`` if there is nothing, or if it is damaged, which is logged."""
    if not path.is_file():
        return None
    try:
        content, digest = path.read_bytes(), _digest_file(path)
        if digest.is_file() and digest.read_text() != hashlib.sha256(content).hexdigest():
            raise ValueError("its SHA-256 is not the one it was saved with")
        return np.load(io.BytesIO(content), allow_pickle=False)
    except DAMAGED as error:
        logger.warning("%s is damaged and is made again: %s", path, error)
        return None


def _digest_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


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
