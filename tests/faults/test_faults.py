"""A few kills, faults and damaged caches; ``make faults`` tries every stage."""

from __future__ import annotations

import random
import signal

import pytest
from break_and_repeat import break_and_repeat
from kill_and_resume import PATIENCE, difference, finish, kill
from runs import SCENARIOS, Run, prepared_data


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The dataset and the wheels."""
    return prepared_data(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def unbroken(places, tmp_path_factory) -> dict:
    """The outcome of an undisturbed run of each kind."""
    found = {}
    for name in ("CTR", "next item"):
        run = Run(SCENARIOS[name], tmp_path_factory.mktemp("unbroken"), *places)
        status, _ = finish(run)
        assert status == 0, run.output()
        found[name] = run.outcome()
        assert found[name]
    return found


@pytest.mark.parametrize(("name", "stage"), [("CTR", "unpack"), ("next item", "tuning")])
def test_a_killed_run_is_resumed_to_the_same_scores(name, stage, places, unbroken, tmp_path):
    run = Run(SCENARIOS[name], tmp_path / "run", *places)
    assert kill(run, stage, 0, 0.02, random.Random(0)) != "end"
    assert finish(run)[0] == 0, run.output()
    assert difference(run.outcome(), unbroken[name]) == ""


@pytest.mark.parametrize(("name", "stage"), [("CTR", "report"), ("next item", "test")])
def test_so_is_one_killed_at_the_beginning_of_a_short_stage(name, stage, places, unbroken, tmp_path):
    run = Run(SCENARIOS[name], tmp_path / "run", *places)
    process = run.start(("killed", stage))
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    assert run.stages()[-1][0] == stage and not run.outcome()
    assert finish(run)[0] == 0, run.output()
    assert difference(run.outcome(), unbroken[name]) == ""


@pytest.mark.parametrize(
    ("name", "fault", "stage"),
    [
        ("CTR", "full disk", "lens"),
        ("next item", "full disk", "tuning"),
        ("CTR", "read-only folders", "download"),
        ("next item", "read-only folders", "report"),
    ],
)
def test_a_disk_that_cannot_be_written_is_one_error(name, fault, stage, places, unbroken, tmp_path):
    run = Run(SCENARIOS[name], tmp_path / "run", *places)
    said, wrong = break_and_repeat(run, fault, stage, unbroken[name])
    assert not wrong, run.output()
    assert "cannot" in said


def test_two_processes_share_one_cold_cache(places, unbroken, tmp_path):
    cache = tmp_path / "cache"
    runs = [Run(SCENARIOS["CTR"], tmp_path / str(n), *places, cache=cache) for n in range(2)]
    processes = [run.start() for run in runs]
    for process in processes:
        process.join(300)
    for run, process in zip(runs, processes, strict=True):
        assert process.exitcode == 0, run.output()
        assert difference(run.outcome(), unbroken["CTR"]) == ""
    assert len(list((cache / "lens").glob("DIN-*/lens.json"))) == 1
    assert not list(cache.rglob("*.partial")) and not list(cache.glob(".tmp-*"))
