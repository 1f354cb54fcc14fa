"""Jobs side by side, each in a process of its own; these import the standard library alone, and start at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from recbole_llm.utils.processes import JOB_FILE, OUTPUT_FILE, side_by_side, start_job, what_went_wrong, work

PROGRAM = (sys.executable, __file__)
"""This file, as the program of a process: see its end."""


def jobs(folder: Path, names: list[str]) -> list[Path]:
    """A folder for each job, which is called ``NUMBER-NAME``."""
    folders = [folder / f"{number}-{name}" for number, name in enumerate(names)]
    for job, name in zip(folders, names, strict=True):
        job.mkdir(parents=True)
        (job / JOB_FILE).write_text(json.dumps({"name": name, "epochs": 3}))
    return folders


def start(folder: Path, slot: int) -> subprocess.Popen:
    return start_job(PROGRAM, folder, {"SLOT": str(slot), "PYTHONPATH": os.pathsep.join(sys.path)})


def act(arguments: dict, folder: Path) -> None:
    """What the processes of these tests do."""
    name = arguments["name"]
    print("hello from", name, arguments["epochs"], flush=True)
    if name == "fails":
        raise ValueError("no such lens")
    if name == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "slot").write_text(os.environ["SLOT"])
    if name == "waits":
        (folder / "pid").write_text(str(os.getpid()))
        try:
            time.sleep(300)
        finally:
            (folder / "kept").touch()


def test_every_job_has_an_end_of_its_own(tmp_path):
    folders = jobs(tmp_path, ["works", "dies", "fails", "works"])
    ended = {job.name: what_went_wrong(job, status) for job, status in side_by_side(folders, 2, start)}
    assert ended["0-works"] is None and ended["3-works"] is None
    assert ended["2-fails"] == "ValueError: no such lens"
    assert "killed by SIGKILL" in ended["1-dies"] and OUTPUT_FILE in ended["1-dies"]
    assert {(tmp_path / f"{number}-works" / "slot").read_text() for number in (0, 3)} <= {"0", "1"}
    assert (tmp_path / "0-works" / OUTPUT_FILE).read_text() == "hello from works 3\n"
    assert "Traceback" in (tmp_path / "2-fails" / OUTPUT_FILE).read_text()


def test_an_error_of_an_earlier_try_is_forgotten(tmp_path):
    (folder,) = jobs(tmp_path, ["fails"])
    assert [what_went_wrong(*ended) for ended in side_by_side([folder], 1, start)] == [
        "ValueError: no such lens"
    ]
    (folder / JOB_FILE).write_text(json.dumps({"name": "works", "epochs": 3}))
    assert [what_went_wrong(*ended) for ended in side_by_side([folder], 1, start)] == [None]
    assert what_went_wrong(folder, 3) == f"the process was ended with status 3; see {folder / OUTPUT_FILE}"


PARENT = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from recbole_llm.utils.processes import side_by_side
    from test_processes import jobs, start

    if __name__ == "__main__":
        list(side_by_side(jobs(Path({folder!r}), ["waits", "waits"]), 2, start))
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


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1]), act))
