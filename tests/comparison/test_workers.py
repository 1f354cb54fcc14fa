"""Runs side by side, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from recbole_llm.comparison.workers import OUTPUT_FILE, device_of, side_by_side, work

COMMAND = (sys.executable, __file__)
"""This file, as the program of a process: see its end."""


@dataclass
class Job:
    arguments: dict
    folder: Path

    @property
    def config(self) -> dict:
        return {"device": torch.device("cpu")}

    def __str__(self) -> str:
        return self.arguments["model"]


def jobs(folder: Path, names: list[str]) -> list[Job]:
    made = [
        Job({"model": name, "config_dict": {"epochs": 3}}, folder / f"{number}-{name}")
        for number, name in enumerate(names)
    ]
    for job in made:
        job.folder.mkdir(parents=True)
    return made


def act(arguments: dict, folder: Path) -> None:
    """What the processes of these tests do."""
    name = arguments["model"]
    print("hello from", name, arguments["config_dict"], flush=True)
    if name == "fails":
        raise ValueError("no such lens")
    if name == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "threads").write_text(str(torch.get_num_threads()))
    if name == "waits":
        (folder / "pid").write_text(str(os.getpid()))
        try:
            time.sleep(300)
        finally:
            (folder / "kept").touch()


def test_every_run_has_an_end_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    runs = jobs(tmp_path, ["works", "dies", "fails", "works"])
    ended = dict((run.folder.name, error) for run, error in side_by_side(iter(runs), 2, COMMAND))
    assert ended["0-works"] is None and ended["3-works"] is None
    assert ended["2-fails"] == "ValueError: no such lens"
    assert "killed by SIGKILL" in ended["1-dies"] and OUTPUT_FILE in ended["1-dies"]
    assert (tmp_path / "0-works" / "threads").read_text() == "2"
    output = (tmp_path / "0-works" / OUTPUT_FILE).read_text()
    assert "hello from works {'epochs': 3, 'device': 'cpu'}\n" in output


PARENT = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from recbole_llm.comparison.workers import side_by_side
    from test_workers import COMMAND, jobs

    if __name__ == "__main__":
        list(side_by_side(jobs(Path({folder!r}), ["waits", "waits"]), 2, COMMAND))
"""


def start_waiting(folder: Path) -> tuple[subprocess.Popen, list[int]]:
    script = folder / "parent.py"
    script.write_text(textwrap.dedent(PARENT.format(tests=str(Path(__file__).parent), folder=str(folder))))
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,  # so that the signal reaches the parent alone
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    files = [folder / f"{number}-waits" / "pid" for number in range(2)]
    deadline = time.monotonic() + 200
    while not all(file.is_file() and file.read_text() for file in files):
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    return parent, [int(file.read_text()) for file in files]


def is_gone(pid: int) -> bool:
    """Whether the process has ended, be it that nobody has asked for its status yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def end_without_their_parent(pids: list[int]) -> bool:
    deadline = time.monotonic() + 60
    while not all(map(is_gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return all(map(is_gone, pids))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_processes_end_with_a_parent_that_is_killed(tmp_path):
    parent, pids = start_waiting(tmp_path)
    parent.kill()
    parent.wait()
    assert end_without_their_parent(pids)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_an_interrupt_reaches_every_process_and_is_waited_for(tmp_path):
    parent, pids = start_waiting(tmp_path)
    parent.send_signal(signal.SIGINT)
    assert parent.wait(timeout=60) != 0
    assert all((tmp_path / f"{number}-waits" / "kept").is_file() for number in range(2))
    assert end_without_their_parent(pids)


def test_gpus_are_taken_in_turn_unless_one_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = [device_of({"device": torch.device("cuda")}, slot).index for slot in range(4)]
    assert found == [0, 1, 0, 1]
    assert device_of({"device": torch.device("cuda:1")}, 0).index == 1
    assert device_of({"device": torch.device("cpu")}, 3) == torch.device("cpu")


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1]), act))
