"""Every program of ``make bench`` runs to its end; what it measures with ``--tiny`` says nothing."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = re.search(r"^bench:.*\n\tfor name in ([\w ]+);", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_make_bench_names_programs():
    assert PROGRAMS and len(PROGRAMS[1].split()) >= 5


@pytest.mark.parametrize("name", PROGRAMS[1].split() if PROGRAMS else [])
def test_it_runs(name, tmp_path, monkeypatch, capsys):
    """In this process, which has imported everything; ``data_scale`` has further ones."""
    file = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--tiny", "--json", str(file)])
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")
    found = json.loads(file.read_text())
    assert found["benchmark"] == name and len(found["rows"]) >= 3
    assert found["rows"][0]["what"] in capsys.readouterr().out
