"""Checkpoints of what was trained: one safetensors file, nothing pickled.

A file holds tensors (adapter, optimizer moments, random-number states) and, in the safetensors header, one json text
with everything else: the place in the training run and the identities of what the tensors belong to. It is written to
a temporary name and moved into place, so that a killed run leaves the previous checkpoint whole.
"""

from __future__ import annotations

import json
import os
import random
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from recbole_llm.utils.files import DAMAGED, not_written
from recbole_llm.utils.hashing import hash_tensors

FORMAT = 2
READABLE = (1, FORMAT)
"""Format 1 has no hash of its content."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used here; the message says which identity differs."""


def save_checkpoint(path: Path, tensors: dict[str, Tensor], meta: dict) -> None:
    """Write ``tensors`` and ``meta`` (json-able) to ``path`` atomically, with a hash of both.

    Raises:
        OSError: naming the file, if it cannot be written; an earlier one is intact.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = {"format": FORMAT, **meta}
    header = {"recbole_llm": json.dumps({**content, "sha256": _content_hash(held, content)})}
    temporary = path.with_name(path.name + ".partial")
    try:
        save_file(held, str(temporary), metadata=header)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise not_written(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _content_hash(tensors: dict[str, Tensor], content: dict) -> str:
    """Hash of everything in a checkpoint, so that a single wrong bit is found."""
    shapes = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in sorted(tensors.items())}
    return hash_tensors(tensors, json.dumps([content, shapes], sort_keys=True))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Read what :func:`save_checkpoint` wrote.

    Raises:
        CheckpointError: if the file is missing, damaged, no checkpoint of recbole_llm, or of another format.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        # Read once: safetensors opens a path twice, and a run that is still training may replace the file between.
        content = path.read_bytes()
        tensors = load(content)
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length]).get("__metadata__", {}).get("recbole_llm")
        meta = json.loads(header) if header is not None else None
    except (SafetensorError, RecursionError, *DAMAGED) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from error
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of recbole_llm")
    if meta.get("format") not in READABLE:
        raise CheckpointError(
            f"{path} has checkpoint format {meta.get('format')}, this version reads format {FORMAT}; "
            f"it was written by recbole_llm {meta.get('version', '?')}"
        )
    digest = meta.pop("sha256", None)
    if meta["format"] > 1 and digest != _content_hash(tensors, meta):
        raise CheckpointError(f"{path} is damaged: its content has not the SHA-256 that it was saved with")
    return tensors, meta


def joined(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of several parts as one dict with names ``part/name``."""
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def parted(tensors: Mapping[str, Tensor]) -> defaultdict[str, dict[str, Tensor]]:
    """Inverse of :func:`joined`; a part that is not there is empty."""
    parts: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for full_name, tensor in tensors.items():
        part, name = full_name.split("/", 1)
        parts[part][name] = tensor
    return parts


def check_identity(saved: dict[str, str], current: dict[str, str], path: Path) -> None:
    """Compare what a checkpoint belongs to with what this run has.

    Raises:
        CheckpointError: naming every identity that differs, with both values.
    """
    different = [
        f"{key}: checkpoint {saved.get(key, 'absent')}, this run {current.get(key, 'absent')}"
        for key in sorted({*saved, *current})
        if saved.get(key) != current.get(key)
    ]
    if different:
        raise CheckpointError(f"checkpoint {path} does not fit this run:\n  " + "\n  ".join(different))


ORIGIN = ("model", "data", "backbone", "lens", "template", "titles", "profiles", "prompt version")
"""What a model that is loaded must have been trained with, by the names of its identities."""


def check_origin(folder: Path, saved: dict[str, str], here: dict[str, str]) -> None:
    """Refuse to load a trained model under other data or prompts, or with another backbone or lens.

    Raises:
        CheckpointError: naming what differs.
    """
    names = [name for name in ORIGIN if saved.get(name) != here.get(name)]
    if "data" in names and "lens" in names:
        names.remove("lens")  # it is trained on the data
    if names:
        raise CheckpointError(
            f"{folder} was trained with another {' and another '.join(names)} than there is now: restore what it was "
            "trained with (data_path names the data), or train again"
        )


def rng_state() -> dict[str, Tensor]:
    """Random-number states of python, numpy and torch (CPU and every CUDA device) as tensors."""
    # NumPy gives a dict only where it is asked for one.
    numpy_state = cast(tuple[str, np.ndarray, int, int, float], np.random.get_state())
    kind, keys, position, has_gauss, gauss = numpy_state
    version, internal, gauss_next = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy.keys": torch.from_numpy(keys.astype(np.int64)),
        "numpy.rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
        "python.internal": torch.tensor(internal, dtype=torch.int64),
        "python.gauss": torch.tensor(float("nan") if gauss_next is None else gauss_next, dtype=torch.float64),
    }
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        state[f"cuda.{index}"] = torch.cuda.get_rng_state(index)
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Inverse of :func:`rng_state`; CUDA states are set on the devices that exist."""
    torch.set_rng_state(state["torch"])
    position, has_gauss, gauss = state["numpy.rest"].tolist()
    keys = state["numpy.keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    gauss_next = state["python.gauss"].item()
    internal = tuple(state["python.internal"].tolist())
    random.setstate((3, internal, None if np.isnan(gauss_next) else gauss_next))
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda.{index}" in state:
            torch.cuda.set_rng_state(state[f"cuda.{index}"], index)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Tensor]:
    """The optimizer's state as ``{parameter name}/{key}`` tensors; ``names`` maps ``id(parameter)`` to its name."""
    return {
        f"{names[id(parameter)]}/{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], names: dict[int, str]
) -> None:
    """Inverse of :func:`optimizer_tensors`."""
    parameters = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    optimizer.state.clear()
    for full_name, value in tensors.items():
        name, key = full_name.rsplit("/", 1)
        parameter = parameters[name]
        # Adam keeps its step counter on the CPU; the moments live where the parameter lives.
        optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)
