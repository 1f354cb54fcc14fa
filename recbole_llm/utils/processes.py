"""Jobs side by side, each in a process of its own, which ends with the process that started it.

Only the standard library is imported here: what a job needs is the job's own business.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

JOB_FILE = "run.json"
"""The arguments of a job, in its folder."""
OUTPUT_FILE = "output.log"
ERROR_FILE = "error.txt"
Job = TypeVar("Job")
logger = logging.getLogger(__name__)


def side_by_side(
    jobs: Iterable[Job], nproc: int, start: Callable[[Job, int], subprocess.Popen]
) -> Iterator[tuple[Job, int]]:
    """Run everything, at most ``nproc`` at a time.

    Args:
        jobs: taken one by one, each when there is room for it.
        nproc: how many processes.
        start: ``start(job, slot)`` starts a job (:func:`start_job`) in one of the slots ``0 ... nproc - 1``.

    Yields:
        Each job as it ends, and the status of its process.

    Raises:
        KeyboardInterrupt: after all processes have ended; they have kept what they had.
    """
    waiting, free = iter(jobs), list(range(nproc))
    running: dict[int, tuple[Job, subprocess.Popen]] = {}
    try:
        while True:
            while free and (job := next(waiting, None)) is not None:
                slot = free.pop(0)
                running[slot] = job, start(job, slot)
            if not running:
                return
            for slot, (job, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    free.append(slot)
                    process.communicate()  # closes what it read from
                    yield job, process.returncode
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


def start_job(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> subprocess.Popen:
    """Start ``command FOLDER``, which calls :func:`work`; its output goes to ``output.log`` in the folder."""
    (folder / ERROR_FILE).unlink(missing_ok=True)
    with open(folder / OUTPUT_FILE, "ab") as output:
        return subprocess.Popen(
            [*command, str(folder)],
            stdin=subprocess.PIPE,  # closed when this process ends, however it ends: see `work`
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,  # Ctrl-C in a terminal reaches the command alone, which passes it on once
        )


def what_went_wrong(folder: Path, status: int) -> str | None:
    """Why the job in a folder failed, by what it left and the status of its process; ``None`` if it did not."""
    if status == 0:
        return None
    with suppress(FileNotFoundError):
        return (folder / ERROR_FILE).read_text(encoding="utf-8")
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return f"the process was {how}; see {folder / OUTPUT_FILE}"


def work(folder: Path, run: Callable[[dict[str, Any], Path], Any]) -> int:
    """The life of one process; returns 1 if the job failed and 130 if it was interrupted."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # No job may continue in a folder whose command is gone: the command repeated would run the same there.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        run(json.loads((folder / JOB_FILE).read_text(encoding="utf-8")), folder)
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
