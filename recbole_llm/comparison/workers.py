"""Runs of a comparison side by side, each in a process of its own (``nproc``).

A process is our own command, ``python -m recbole_llm.comparison.workers FOLDER``, which reads the run's configuration
from its folder (:mod:`recbole_llm.utils.processes`). A run that dies, even by SIGKILL, takes no other run with it. On
GPUs the runs take turns over the devices; on a CPU each gets an equal part of the threads. What several runs need (a
lens, the vectors of titles) is made by the first and awaited by the others (:func:`recbole_llm.utils.files.locked`).
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import recbole_llm
from recbole_llm.config.configurator import Config
from recbole_llm.experiment.run import run_one
from recbole_llm.utils import processes
from recbole_llm.utils.files import write_json

COMMAND = (sys.executable, "-m", "recbole_llm.comparison.workers")
logger = logging.getLogger(__name__)


def side_by_side(runs: Iterable[Any], nproc: int) -> Iterator[tuple[Any, str | None]]:
    """Run everything, at most ``nproc`` at a time.

    Args:
        runs: with ``config``, ``arguments`` and ``folder``; the folders exist.
        nproc: how many processes.

    Yields:
        Each run as it ends, and why it failed, ``None`` if it did not.

    Raises:
        KeyboardInterrupt: after all processes have ended; they have kept what they had.
    """
    threads = max(1, torch.get_num_threads() // nproc)
    for run, status in processes.side_by_side(runs, nproc, lambda run, slot: start(run, slot, threads)):
        yield run, processes.what_went_wrong(Path(run.folder), status)


def device_of(config: Config, slot: int) -> torch.device:
    """The device of the process in a slot: GPUs in turn, unless the configuration names one."""
    device = config["device"]
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", slot % torch.cuda.device_count())
    return device


def start(run: Any, slot: int, threads: int) -> subprocess.Popen:
    """Start a run in a slot, with so many threads where it is on a CPU."""
    device, folder = device_of(run.config, slot), Path(run.folder)
    values = {**run.arguments["config_dict"], "device": str(device)}
    write_json(folder / processes.JOB_FILE, {**run.arguments, "config_dict": values})
    package = str(Path(recbole_llm.__file__).parents[1])
    environment = {"PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    if device.type == "cpu":
        environment["OMP_NUM_THREADS"] = str(threads)
    logger.info(
        "%s: in process %d, on %s, output in %s", run, slot + 1, device, folder / processes.OUTPUT_FILE
    )
    return processes.start_job(COMMAND, folder, environment)


if __name__ == "__main__":
    job = Path(sys.argv[1])
    sys.exit(processes.work(job, lambda arguments, folder: run_one(Config(**arguments), folder)))
