"""Atomic writing."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from recbole_llm.utils.files import locked, write_atomically


def test_a_file_is_replaced_as_a_whole_and_folders_are_made(tmp_path: Path):
    path = tmp_path / "a" / "b.json"
    for content in (b"old", b"new"):
        write_atomically(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content and os.listdir(path.parent) == ["b.json"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_is_cut_off_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type):
    path = tmp_path / "b.json"
    path.write_bytes(b"old")

    def write(file) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(error):
        write_atomically(path, write)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["b.json"]


def test_one_makes_it_and_the_others_wait(tmp_path: Path):
    path, order, inside = tmp_path / "made" / "lens", [], threading.Event()

    def second() -> None:
        inside.wait()
        with locked(path):
            order.append(path.exists())

    thread = threading.Thread(target=second)
    thread.start()
    with locked(path):
        inside.set()
        thread.join(timeout=0.3)
        assert thread.is_alive()
        path.mkdir()
    thread.join(timeout=30)
    assert order == [True]
    with locked(path), locked(path):  # nothing is left to be made, so nobody waits
        order.append(None)
    assert order == [True, None]


def test_a_folder_that_is_still_being_filled_is_waited_for(tmp_path: Path):
    folder = tmp_path / "lens"
    folder.mkdir()
    done, entered = threading.Event(), []

    def second() -> None:
        with locked(folder, folder / "last.json"):
            entered.append((folder / "last.json").exists())
        done.set()

    with locked(folder, folder / "last.json"):
        thread = threading.Thread(target=second)
        thread.start()
        assert not done.wait(timeout=0.3)
        (folder / "last.json").touch()
    thread.join(timeout=30)
    assert entered == [True]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_others_may_read_what_the_umask_lets_them(tmp_path: Path):
    before = os.umask(0o022)
    try:
        write_atomically(tmp_path / "b.json", lambda file: file.write(b"x"))
    finally:
        os.umask(before)
    assert (tmp_path / "b.json").stat().st_mode & 0o777 == 0o644
