"""Runs of a comparison side by side, each in a process of its own (``nproc``).

A run that dies, even by the system's hand, takes no other run with it. On GPUs the runs take turns over the devices; on
a CPU each gets an equal part of the threads. What a run prints goes to ``output.log`` in its folder. What several runs
need (a lens, the vectors of titles) is made by the first and waited for by the others
(:func:`recbole_llm.utils.files.locked`).
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch

from recbole_llm.config.configurator import Config

logger = logging.getLogger(__name__)

OUTPUT_FILE = "output.log"
Run = TypeVar("Run")


@dataclass
class _Child:
    run: Any
    process: BaseProcess
    message: Connection
    slot: int


def side_by_side(
    runs: Iterable[Run], run_one: Callable[[Config, Path], dict], nproc: int
) -> Iterator[tuple[Run, str | None]]:
    """Run everything, at most ``nproc`` at a time.

    Args:
        runs: with ``config`` and ``folder``; the folders exist.
        run_one: trains and tests one configuration in a given folder; a function that a new process can import.
        nproc: how many processes.

    Yields:
        Each run as it ends, and why it failed, ``None`` if it did not.

    Raises:
        KeyboardInterrupt: after all processes have ended; what they had is kept by themselves.
    """
    context = multiprocessing.get_context("spawn")  # the only one that CUDA works with
    threads = max(1, torch.get_num_threads() // nproc)
    waiting, running, free = iter(runs), [], list(range(nproc))
    try:
        while True:
            while free and (run := next(waiting, None)) is not None:
                running.append(_start(context, run, run_one, free.pop(0), threads))
            if not running:
                return
            ended = wait([child.process.sentinel for child in running])
            for child in [child for child in running if child.process.sentinel in ended]:
                child.process.join()
                running.remove(child)
                free.append(child.slot)
                yield child.run, _what_went_wrong(child)
    except KeyboardInterrupt:
        for child in running:
            if child.process.is_alive():
                os.kill(child.process.pid, signal.SIGINT)
        for child in running:
            child.process.join()
        raise
    finally:
        for child in running:  # left by another exception than Ctrl-C
            child.process.kill()


def device_of(config: Config, slot: int) -> torch.device:
    """The device of the process in a slot: GPUs in turn, unless the configuration names one."""
    device = config["device"]
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", slot % torch.cuda.device_count())
    return device


def _start(context, run, run_one: Callable, slot: int, threads: int) -> _Child:
    config: Config = run.config
    device = device_of(config, slot)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_work, args=(run_one, config, run.folder, device, threads, sender), name=str(run)
    )
    logger.info("%s: in process %d, on %s, output in %s", run, slot + 1, device, run.folder / OUTPUT_FILE)
    process.start()
    sender.close()
    return _Child(run, process, receiver, slot)


def _what_went_wrong(child: _Child) -> str | None:
    if child.process.exitcode == 0:
        return None
    try:
        return child.message.recv()
    except EOFError:
        how = child.process.exitcode
        how = f"killed by {signal.Signals(-how).name}" if how < 0 else f"ended with status {how}"
        return f"the process was {how}; see {child.run.folder / OUTPUT_FILE}"


def _work(
    run_one: Callable, config: Config, folder: Path, device: torch.device, threads: int, sender: Connection
) -> None:
    """The life of one process. Ends with status 1 and a message if the run fails, 130 if it is interrupted."""
    with open(folder / OUTPUT_FILE, "a", buffering=1, encoding="utf-8") as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C in a terminal reaches the command alone, which passes it on: once, not twice
    # Nothing may go on in a folder whose command is gone: the command repeated would run the same there.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(threads)
    config.final_config_dict["device"] = device
    try:
        run_one(config, folder)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # told by the command and its report; the run's log has the traceback
        logger.exception("the run failed")
        sender.send(f"{type(error).__name__}: {error}")
        sys.exit(1)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
