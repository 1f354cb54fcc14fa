"""The device of a run, and the sizes that depend on it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from recbole_llm.utils.distributed import join, launched

logger = logging.getLogger(__name__)

SIZES: dict[str, dict[str, int | None]] = {
    "cpu": {"few_shot": 128, "eval_rows": 200},
    "cuda": {"few_shot": 8192, "eval_rows": None},
}
"""What ``auto`` stands for by the kind of device; chosen by run time alone."""

MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
"""What ``micro_batch_size: auto`` fills with prompts or chunks of full length: a CPU is no faster with more."""


def choose_device(wanted: str, user: Mapping[str, Any], said: Callable[[str], str]) -> torch.device:
    """The device of the key ``device``; where it is ``auto``, RecBole's ``use_gpu: False`` and ``gpu_id`` decide.

    Args:
        wanted: the value of ``device``.
        user: what the user set.
        said: ``key=value (origin)`` of a key, for messages.

    Raises:
        ValueError: for a device that does not exist, or settings that contradict each other.
    """
    gpu_id = user.get("gpu_id", 0)
    gpu_id = str(gpu_id[0] if isinstance(gpu_id, (tuple, list)) and gpu_id else gpu_id).split(",")[0].strip()
    off = [
        said(key)
        for key, is_off in (
            ("use_gpu", user.get("use_gpu") is False),
            ("gpu_id", "gpu_id" in user and (user["gpu_id"] is None or gpu_id in ("", "()", "[]", "-1"))),
        )
        if is_off
    ]
    if off:
        if wanted.startswith("cuda"):
            raise ValueError(f"{said('device')} contradicts {off[0]}: leave one of them out")
        logger.info("device: cpu, because of %s", off[0])
        return torch.device("cpu")
    if wanted == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        if wanted == "auto":
            logger.info("device: cpu (torch %s sees no CUDA device)", torch.__version__)
            return torch.device("cpu")
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU-only build"
        raise ValueError(
            f"{said('device')}: torch {torch.__version__}, {build}, sees no CUDA device "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}); use --device=cpu"
        )
    key = "device"
    if wanted == "auto" and "gpu_id" in user:
        key, wanted = "gpu_id", f"cuda:{gpu_id}"
    if wanted in ("auto", "cuda"):
        return torch.device("cuda")
    index = wanted.removeprefix("cuda:")
    if not index.isdigit() or int(index) >= count:
        seen = ", ".join(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(count))
        raise ValueError(f"{said(key)}: no such device; torch sees {seen}")
    device = torch.device("cuda", int(index))
    torch.cuda.set_device(device)
    return device


def join_launched(final: dict[str, Any], model: str, is_llm: bool) -> None:
    """Become one process of several that ``torchrun`` has started: local rank r takes cuda:r, or a share of the CPU.

    Raises:
        ValueError: if there are more processes than GPUs, or the run cannot be shared among processes.
    """
    processes, local = launched(), int(os.environ.get("LOCAL_RANK", 0))
    if not is_llm:
        raise ValueError(
            f"{model} is no LLM recommender: {processes.count} processes of torchrun can train those alone; start it "
            "without torchrun"
        )
    if final["gate"] == "cnn" and final["mixer"] != "identity":
        raise ValueError(
            "gate: cnn normalises over a micro-batch and keeps running statistics, which several processes would not "
            "share; set gate: cnn_groupnorm, or start it without torchrun"
        )
    pieces = -(-final["train_batch_size"] // final["micro_batch_size"])
    if final["layout"] == "prompt" and pieces < processes.count:
        raise ValueError(
            f"train_batch_size: {final['train_batch_size']} in micro-batches of {final['micro_batch_size']} "
            f"(micro_batch_size) gives {pieces} to {processes.count} processes: set micro_batch_size to "
            f"{max(1, final['train_batch_size'] // processes.count)} or less, or start fewer processes"
        )
    device = final["device"]
    if device.type == "cuda":
        if device.index is None:
            if local >= torch.cuda.device_count():
                raise ValueError(
                    f"process {local} of torchrun on this machine needs the device cuda:{local}; torch sees "
                    f"{torch.cuda.device_count()} CUDA devices: start as many processes as there are GPUs"
                )
            device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    join(device)
    final["device"] = device
    if not processes.is_first:
        final.update(state="error", show_progress=False)


def join_process_group(final: dict[str, Any]) -> None:
    """Become one process of several, as RecBole's ``run(..., nproc=N)`` starts them: rank r takes cuda:r.

    Raises:
        ValueError: if this rank has no device.
    """
    rank = final["local_rank"]
    if not torch.cuda.is_available() or rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {rank} of nproc={final['nproc']} needs the device cuda:{rank}; torch sees "
            f"{torch.cuda.device_count()} CUDA devices"
        )
    torch.distributed.init_process_group(
        backend="nccl",
        rank=rank + final["offset"],
        world_size=final["world_size"],
        init_method=f"tcp://{final['ip']}:{final['port']}",
    )
    torch.cuda.set_device(rank)
    final.update(device=torch.device("cuda", rank), single_spec=False)
    if rank != 0:
        final.update(state="error", show_progress=False, verbose=False)


def resolve_auto_sizes(final: dict[str, Any]) -> None:
    """Replace ``auto`` of :data:`SIZES`, and of ``micro_batch_size``, by the size for the device, in place."""
    kind = "cuda" if final["device"].type == "cuda" else "cpu"
    if final.get("micro_batch_size") == "auto":
        fitting = max(1, MICRO_BATCH_TOKENS[kind] // final["max_prompt_tokens"])
        final["micro_batch_size"] = min(fitting, final["train_batch_size"])
        logger.info("micro_batch_size: %d (auto, on %s)", final["micro_batch_size"], final["device"].type)
    for key, value in SIZES[kind].items():
        if final.get(key) == "auto":
            final[key] = value
            logger.info("%s: %s (auto, on %s)", key, value or "all", final["device"].type)
