"""Output where the encoding of the terminal lacks characters."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import write_dataset

from recbole_llm.cli import main
from recbole_llm.utils.text_output import write_any_text

REPOSITORY = Path(__file__).resolve().parents[2]


def arguments(folder: Path, option: str) -> list[str]:
    """Of a small run on titles in several scripts."""
    data = write_dataset(folder / "data")
    items = data / "toy" / "toy.item"
    items.write_text(items.read_text(encoding="utf-8").replace("River", "Река → 川"), encoding="utf-8")
    found = ["--model=TALLRec", "--dataset=toy", f"--data_path={data}", f"--cache_dir={folder / 'cache'}"]
    found += ["--backbone=tiny", "--device=cpu", "--few_shot=8", "--eval_rows=20", "--bootstrap_samples=20"]
    found += ["--show_progress=False", "--lens=~", "--state=debug", option]
    return [*found, "--text={title: movie_title, year: release_year, genre: class}"]


def check_output(status: int, told: str, option: str) -> None:
    assert status == 0, told[-3000:]
    assert "Traceback" not in told and "Logging error" not in told
    if option == "--dry_run":
        assert "\\u0420\\u0435\\u043a\\u0430 \\u2192" in told


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
@pytest.mark.parametrize("option", ["--dry_run", "--compare_with=Pop"])
def test_a_run_ends_whatever_the_terminal_can_show(encoding, option, tmp_cwd, monkeypatch):
    screen = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(screen, encoding=encoding, write_through=True))
    status = main(arguments(tmp_cwd, option))
    check_output(status, screen.getvalue().decode(encoding), option)


def test_so_does_a_process_of_its_own(tmp_path):
    command = [sys.executable, str(REPOSITORY / "run_recbole_llm.py"), *arguments(tmp_path, "--dry_run")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, timeout=300, check=False
    )
    check_output(done.returncode, (done.stdout + done.stderr).decode("ascii"), "--dry_run")


def test_log_files_take_any_text(tmp_path):
    handler = logging.FileHandler(tmp_path / "run.log", encoding="ascii")
    write_any_text([handler.stream, io.StringIO(), None])
    handler.emit(logging.LogRecord("test", logging.INFO, "", 0, "Река", None, None))
    handler.close()
    assert (tmp_path / "run.log").read_text(encoding="ascii") == "\\u0420\\u0435\\u043a\\u0430\n"
