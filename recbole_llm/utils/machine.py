"""What numbers are made with: versions, the machine, and the memory that a process has used."""

from __future__ import annotations

import logging
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import recbole_llm

try:
    import resource
except ImportError:  # Windows
    resource = None

logger = logging.getLogger(__name__)

_PACKAGES = ("torch", "transformers", "peft", "recbole", "numpy", "pandas")


def environment() -> dict[str, dict[str, Any]]:
    """What the numbers were made with.

    Returns:
        {versions: {python, torch, ..., recbole_llm},
        machine: {system, processor, cores, memory_bytes, gpus: [names]}};
        a package without metadata has the version None.
    """
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    versions["recbole_llm"] = recbole_llm.__version__  # of this code, installed or run from its folder
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
    machine = {
        "system": platform.system(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if hasattr(os, "sysconf")
        else None,
        "gpus": gpus,
    }
    return {"versions": versions, "machine": machine}


def peak_memory() -> dict[str, int | None]:
    """The most memory this process has held so far.

    Returns:
        host_bytes: peak resident size, None where the system does not report it.
        gpu_bytes: the most that torch has allocated on one GPU, None if it has used none.
    """
    host = None
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss starts at the size of the process that started this one; VmHWM does not
        peak = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        host = int(peak[0]) * 1024 if peak else None
    if host is None and resource is not None:
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if platform.system() == "Darwin" else 1024
        )
    gpu = None
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        gpu = max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return {"host_bytes": host, "gpu_bytes": gpu}


def reset_peak_memory() -> None:
    """Let :func:`peak_memory` count from now on, where the system can; else it returns the process's peak so far."""
    counter = Path("/proc/self/clear_refs")
    try:
        counter.write_text("5")  # Linux: VmHWM restarts at the present size (proc(5))
    except OSError:
        logger.debug("the system does not let the peak of memory be reset", exc_info=True)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
