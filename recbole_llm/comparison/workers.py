"""Runs of a comparison side by side, each in a process of its own (``nproc``).

A process is our own command, ``python -m recbole_llm.comparison.workers FOLDER``, which reads the run's configuration
from its folder. A run that dies, even by SIGKILL, takes no other run with it. On GPUs the runs take turns over the
devices; on a CPU each gets an equal part of the threads. The output of a run goes to ``output.log`` in its folder. What
several runs need (a lens, the vectors of titles) is made by the first and awaited by the others
(:func:`recbole_llm.utils.files.locked`).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

import recbole_llm
from recbole_llm.config.configurator import Config
from recbole_llm.experiment.run import run_one
from recbole_llm.utils.files import write_json

OUTPUT_FILE = "output.log"
RUN_FILE = "run.json"
ERROR_FILE = "error.txt"
COMMAND = (sys.executable, "-m", "recbole_llm.comparison.workers")
Run = TypeVar("Run")
logger = logging.getLogger(__name__)


def side_by_side(
    runs: Iterable[Run], nproc: int, command: Sequence[str] = COMMAND
) -> Iterator[tuple[Run, str | None]]:
    """Run everything, at most ``nproc`` at a time.

    Args:
        runs: with ``config``, ``arguments`` and ``folder``; the folders exist.
        nproc: how many processes.
        command: of a process; the run's folder is appended.

    Yields:
        Each run as it ends, and why it failed, ``None`` if it did not.

    Raises:
        KeyboardInterrupt: after all processes have ended; they have kept what they had.
    """
    threads = max(1, torch.get_num_threads() // nproc)
    waiting, free = iter(runs), list(range(nproc))
    running: dict[int, tuple[Run, subprocess.Popen]] = {}
    try:
        while True:
            while free and (run := next(waiting, None)) is not None:
                slot = free.pop(0)
                running[slot] = run, _start(run, slot, threads, command)
            if not running:
                return
            for slot, (run, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    free.append(slot)
                    process.stdin.close()
                    yield run, _what_went_wrong(run, process.returncode)
            time.sleep(0.1)
    except KeyboardInterrupt:
        for _, process in running.values():
            process.send_signal(signal.SIGINT)
        for _, process in running.values():
            process.wait()
        raise
    finally:
        for _, process in running.values():  # left by another exception than Ctrl-C
            process.kill()


def device_of(config: Config, slot: int) -> torch.device:
    """The device of the process in a slot: GPUs in turn, unless the configuration names one."""
    device = config["device"]
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", slot % torch.cuda.device_count())
    return device


def _start(run: Any, slot: int, threads: int, command: Sequence[str]) -> subprocess.Popen:
    device, folder = device_of(run.config, slot), Path(run.folder)
    values = {**run.arguments["config_dict"], "device": str(device)}
    write_json(folder / RUN_FILE, {**run.arguments, "config_dict": values})
    (folder / ERROR_FILE).unlink(missing_ok=True)
    package = str(Path(recbole_llm.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    if device.type == "cpu":
        environment["OMP_NUM_THREADS"] = str(threads)
    logger.info("%s: in process %d, on %s, output in %s", run, slot + 1, device, folder / OUTPUT_FILE)
    with open(folder / OUTPUT_FILE, "ab") as output:
        return subprocess.Popen(
            [*command, str(folder)],
            stdin=subprocess.PIPE,  # closed when this process ends, however it ends: see `work`
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C in a terminal reaches the command alone, which passes it on once
        )


def _what_went_wrong(run: Any, status: int) -> str | None:
    if status == 0:
        return None
    with suppress(FileNotFoundError):
        return (Path(run.folder) / ERROR_FILE).read_text(encoding="utf-8")
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return f"the process was {how}; see {Path(run.folder) / OUTPUT_FILE}"


def work(folder: Path, run: Callable[[dict[str, Any], Path], Any]) -> int:
    """The life of one process; returns 1 if the run failed and 130 if it was interrupted."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # No run may continue in a folder whose command is gone: the command repeated would run the same there.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        run(json.loads((folder / RUN_FILE).read_text(encoding="utf-8")), folder)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # reported by the command; the output has the traceback
        logger.exception("the run failed")
        (folder / ERROR_FILE).write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        return 1
    return 0


def _end_with_parent() -> None:
    os.read(0, 1)  # nothing is ever written: the pipe ends with the process that holds its other end
    os._exit(1)


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1]), lambda arguments, folder: run_one(Config(**arguments), folder)))
