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

from recbole_llm.utils.text_output import write_any_text

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
@pytest.mark.parametrize("option", ["--dry_run", "--compare_with=Pop"])
def test_a_run_ends_whatever_the_terminal_can_show(encoding, option, tmp_path):
    data = write_dataset(tmp_path / "data")
    items = data / "toy" / "toy.item"
    items.write_text(items.read_text(encoding="utf-8").replace("River", "Река → 川"), encoding="utf-8")
    command = [sys.executable, str(REPOSITORY / "run_recbole_llm.py"), "--model=TALLRec", "--dataset=toy"]
    command += [f"--data_path={data}", f"--cache_dir={tmp_path / 'cache'}", "--backbone=tiny", "--device=cpu"]
    command += [
        "--few_shot=8",
        "--eval_rows=20",
        "--bootstrap_samples=20",
        "--show_progress=False",
        "--lens=~",
    ]
    command += ["--text={title: movie_title, year: release_year, genre: class}", "--state=debug", option]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, timeout=300, check=False
    )
    told = (done.stdout + done.stderr).decode(encoding)
    assert done.returncode == 0, told[-3000:]
    assert "Traceback" not in told and "Logging error" not in told
    if option == "--dry_run":
        assert "\\u0420\\u0435\\u043a\\u0430 \\u2192" in told


def test_log_files_take_any_text(tmp_path):
    handler = logging.FileHandler(tmp_path / "run.log", encoding="ascii")
    write_any_text([handler.stream, io.StringIO(), None])
    handler.emit(logging.LogRecord("test", logging.INFO, "", 0, "Река", None, None))
    handler.close()
    assert (tmp_path / "run.log").read_text(encoding="ascii") == "\\u0420\\u0435\\u043a\\u0430\n"
