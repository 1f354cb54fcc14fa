"""The example that RecBole users know runs on finished runs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "case_study_example.py"


@pytest.mark.parametrize("name", ["SASRec", "TALLRec stream"])
def test_the_example_prints_the_best_items_twice(name, finished, tmp_cwd, capsys):
    main = runpy.run_path(str(EXAMPLE))["main"]
    main([str(finished(name)), "4", "2"])
    out = capsys.readouterr().out
    assert "recbole_llm's recommend" in out and out.rstrip().splitlines()[-1].split()[:2] == ["2", "5"]
    main([str(finished(name))])
    out = capsys.readouterr().out
    assert "RecBole's full_sort_topk" in out and "51) (samples, items)" in out


def test_without_a_run_it_says_how_to_call_it():
    with pytest.raises(SystemExit, match="python examples/case_study_example.py RUN"):
        runpy.run_path(str(EXAMPLE))["main"]([])
