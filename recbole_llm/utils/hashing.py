"""SHA-256 of files and of named tensors: what identifies weights, data and runs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm


def hash_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks; large files show a progress bar."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    bar = tqdm(
        total=size, unit="B", unit_scale=True, desc=f"hash {path.name}", disable=size < 2**31, leave=False
    )
    with path.open("rb") as file, bar:
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor], *texts: str) -> str:
    """Hexadecimal SHA-256 of texts and of named tensors of any dtype, in the order of their names.

    >>> hash_tensors({"weight": torch.zeros(2)}, "a text")[:16]
    '0dc62752da224f5d'
    """
    digest = hashlib.sha256("\n".join(texts).encode())
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(name.encode() + flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
