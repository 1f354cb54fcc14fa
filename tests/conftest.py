"""What every test may count on: its own arguments and log handlers, two threads, a small dataset."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from synthetic import TEXT, write_dataset

if "RECBOLE_LLM_TEST_GPU" not in os.environ:  # equal numbers run to run are a processor's
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # several workers share the cores: one thread each, their children's included
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """The machines that run these tests have two cores; more threads only make the timing uneven."""
    most = int(os.environ.get("OMP_NUM_THREADS", "2"))
    torch.set_num_threads(min(most, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """RecBole's own Config reads ``sys.argv``: pytest's options must not become configuration."""
    monkeypatch.setattr(sys, "argv", ["pytest"])


@pytest.fixture(autouse=True)
def own_log_handlers() -> Iterator[None]:
    """RecBole's ``init_logger`` adds handlers to the root logger, one of them with an open file."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [h for h in root.handlers if h not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


@pytest.fixture
def tmp_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder: RecBole writes ``log/``, ``log_tensorboard/`` and ``saved/`` into it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data_path`` of the dataset ``toy`` of ``synthetic.py``."""
    return write_dataset(tmp_path_factory.mktemp("toy_data"))


@pytest.fixture(scope="session")
def toy_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lenses, item vectors and zero-shot scores, shared by the tests that ask for the same."""
    return tmp_path_factory.mktemp("toy_cache")


@pytest.fixture
def toy_settings(toy_data: Path, toy_cache: Path, tmp_cwd: Path) -> dict:
    """What every small run on ``toy`` with the tiny backbone has in common; in a working folder of its own."""
    return {
        "data_path": str(toy_data),
        "cache_dir": str(toy_cache),
        "text": TEXT,
        "backbone": "tiny",
        "show_progress": False,
    }


@pytest.fixture
def atomic_data(tmp_path: Path) -> Path:
    """A folder with a small dataset ``small`` in RecBole's atomic files, to be given as ``data_path``.

    12 users with 15 interactions each over 20 items, written in reverse time order. Timestamps are one second
    apart in the year 2001; float32 rounds them to 64 seconds.
    """
    folder = tmp_path / "data" / "small"
    folder.mkdir(parents=True)
    rows = [
        f"u{user}\ti{(7 * user + 3 * step) % 20}\t{1 + (user + step**2) % 5}\t{10**9 + 12 * step + user}"
        for user in range(12)
        for step in range(15)
    ]
    files = {
        "inter": ["user_id:token\titem_id:token\trating:float\ttimestamp:float", *reversed(rows)],
        "user": ["user_id:token\tgender:token", *(f"u{user}\t{'FM'[user % 2]}" for user in range(12))],
        "item": [
            "item_id:token\tmovie_title:token_seq\trelease_year:token",
            *(f"i{item}\tTitle of {item}\t{1980 + item}" for item in range(20)),
        ],
    }
    for suffix, lines in files.items():
        (folder / f"small.{suffix}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder.parent
