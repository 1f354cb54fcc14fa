"""Searches: spaces, draws, trials that never read test rows, and what is chosen."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from recbole_llm import cli, quick_start
from recbole_llm.comparison import running
from recbole_llm.comparison.search import draw_trials, read_space


def space_file(folder: Path, text: str, name: str = "space") -> Path:
    path = folder / f"{name}.hyper"
    path.write_text(text)
    return path


def test_a_file_of_recboles_form_is_read(tmp_path):
    text = """learning_rate choice [0.01,0.005]   # a comment
    hidden choice ['[64, 32]','[8]']

    dropout_prob uniform 0.0,0.5
    reg_weight loguniform -12,-4
    train_batch_size quniform 32, 256, 32
    """
    space = read_space(space_file(tmp_path, text))
    assert space.pop("dropout_prob").support() == (0, 0.5)
    assert space.pop("reg_weight").support() == pytest.approx((math.exp(-12), math.exp(-4)))
    assert space == {
        "learning_rate": [0.01, 0.005], "hidden": ["[64, 32]", "[8]"], "train_batch_size": list(range(32, 257, 32)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rate", "line 1: .* is not 'key kind values'"),
        ("learning_rate normal 0,1", "with a kind of choice"),
        ("learning_rate choice 0.1", "choice needs a list"),
        ("learning_rate choice []", "choice needs a list"),
        ("learning_rate uniform 0.1", "uniform needs numbers low,high"),
        ("learning_rate uniform 2,1", "uniform needs numbers low,high"),
        ("b quniform 1,2,0", "quniform needs numbers low,high,step"),
        ("b uniform __import__('os'),1", "uniform needs numbers"),
        ("b uniform 0,1\nb uniform 0,1", "line 2: .* is given twice"),
        ("b quniform 1,2,4", "no multiple of the step"),
        ("# nothing", "names no hyper-parameter"),
    ],
)
def test_lines_that_cannot_be_read_are_named(line, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_space(space_file(tmp_path, line))


def test_a_space_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"search: there is no file .*none\.hyper"):
        read_space(tmp_path / "none.hyper")


@given(seed=st.integers(0, 99), trials=st.integers(1, 12))
def test_draws_are_within_their_bounds_all_different_and_the_same_again(seed, trials):
    space = {
        "a": stats.uniform(0, 0.5), "b": stats.loguniform(math.exp(-3), math.exp(2)),
        "c": [32, 64, 96, 128], "d": ("x", "y"),
    }  # fmt: skip
    found = draw_trials(space, trials, seed, "DIN")
    assert len(found) == trials and found == draw_trials(space, trials, seed, "DIN")
    assert len({json.dumps(values) for values in found}) == trials
    for values in found:
        assert 0 <= values["a"] <= 0.5 and 0.0497 < values["b"] < 7.39
        assert values["c"] in (32, 64, 96, 128) and isinstance(values["c"], int)
        assert values["d"] in ("x", "y")
    assert draw_trials(space, 12, seed, "DIN") != draw_trials(space, 12, seed, "SASRec")


def test_a_grid_no_larger_than_the_budget_is_tried_whole():
    space = {"a": [1, 2], "b": [3, 4, 5]}
    assert draw_trials(space, 6, 0, "m") == [{"a": a, "b": b} for a in (1, 2) for b in (3, 4, 5)]
    assert len(draw_trials(space, 4, 0, "m")) == 4
    assert len(draw_trials({"a": [1, 2, 3]}, 10, 0, "m")) == 3  # there are no more


def test_quniform_is_the_multiples_of_the_step_within_the_bounds(tmp_path):
    text = "b quniform 32,250,32\nd quniform 0.1,0.3,0.1\nsame uniform 0.5,0.5\nfixed loguniform 0,0"
    space = read_space(space_file(tmp_path, text))
    assert space == {
        "b": [32, 64, 96, 128, 160, 192, 224],
        "d": [0.1, 0.2, 0.3],
        "same": [0.5],
        "fixed": [1.0],
    }


@pytest.fixture
def settings(toy_settings):
    lens = {"epochs": 1, "embedding_size": 8, "mlp_hidden_size": [8], "attention_hidden_size": [8]}
    return {
        **toy_settings,
        "layout": "prompt",
        "few_shot": 32,
        "eval_rows": 40,
        "bootstrap_samples": 40,
        "zero_shot": False,
        "lens_config": lens,
        "trials": 2,
    }


def test_trials_read_no_test_sample_and_the_best_on_validation_is_compared(settings, tmp_path):
    space_file(tmp_path, "learning_rate choice [0.1, 1e-9]\n", "DIN")
    space_file(tmp_path, "learning_rate loguniform -9,-3\nlora_r choice [2, 4]\n", "RecLoRA")
    options = {**settings, "search": str(tmp_path)}
    models = ["Pop", "DIN epochs=2", "RecLoRA"]
    found = quick_start.compare_models(models, "toy", config_dict=options)
    assert not found["failed"] and [line["name"] for line in found["models"]][:3] == models
    folder = Path(found["files"][0]).parent
    report = json.loads((folder / "search.json").read_text())
    assert report["reads_of_test_rows"] == 0 and set(report["models"]) == {"DIN epochs=2", "RecLoRA"}
    for text, searched in report["models"].items():
        assert len(searched["trials"]) == 2
        best = max(searched["trials"], key=lambda trial: trial["valid"])
        assert searched["chosen"] == best["values"] and searched["valid"] == best["valid"]
        for trial in searched["trials"]:
            assert not (folder / trial["folder"] / "test_rows.npz").exists()
            result = json.loads((folder / trial["folder"] / "result.json").read_text())
            assert result["metrics"]["test"] == {} and result["intervals"] is None
        (line,) = (line for line in found["models"] if line["name"] == text)
        config = json.loads((Path(line["paths"][0]) / "result.json").read_text())["config"]
        assert {key: config[key] for key in best["values"]} == best["values"]

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    quick_start.compare_models(models, "toy", config_dict=options)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}


def test_trials_of_all_models_share_the_processes(settings, tmp_path, monkeypatch):
    """That processes give what one after another gives is tested with the comparison's own runs."""
    asked = []

    def in_one_process(runs, nproc):
        runs = list(runs)
        asked.append(([str(run) for run in runs], nproc))
        return running.one_by_one(runs)

    monkeypatch.setattr(running, "side_by_side", in_one_process)
    file = space_file(tmp_path, "learning_rate choice [0.1, 1e-9]\n")
    options = {**settings, "search": str(file), "nproc": 2, "epochs": 1}
    quick_start.compare_models(["DIN", "DeepFM"], "toy", config_dict={**options, "task": "ctr"})
    (trials, nproc), (runs, _) = asked
    assert nproc == 2 and len(runs) == 2
    assert [name.split(",")[0] for name in trials] == ["DIN", "DIN", "DeepFM", "DeepFM"]


def test_a_single_run_that_reads_no_test_sample_says_so(settings, capsys):
    given = {k: v for k, v in settings.items() if k in ("data_path", "cache_dir", "show_progress")}
    arguments = [f"--{key}={value}" for key, value in given.items()]
    arguments += ["--model=DIN", "--dataset=toy", "--task=ctr", "--epochs=1", "--read_test=False"]
    assert cli.main(arguments) == 0
    told = capsys.readouterr().out
    assert "the test split was not read" in told and "auc 0." in told
    assert not list(Path("saved").glob("*/test_rows.npz"))


def test_a_search_without_validation_or_of_a_key_that_is_set_is_refused(settings, tmp_path):
    file = space_file(tmp_path, "learning_rate choice [0.1, 0.01]")
    options = {**settings, "search": str(file)}
    with pytest.raises(ValueError, match="eval_step: 0, so there is nothing to choose by"):
        quick_start.compare_models(["RecLoRA", "DIN"], "toy", config_dict={**options, "eval_step": 0})
    with pytest.raises(ValueError, match="already sets learning_rate"):
        quick_start.compare_models(["DIN learning_rate=0.5", "RecLoRA"], "toy", config_dict=options)
    bad = space_file(tmp_path, "learning_rat choice [0.1, 0.01]")
    with pytest.raises(ValueError, match="did you mean learning_rate"):
        quick_start.compare_models(["DIN", "RecLoRA"], "toy", config_dict={**options, "search": str(bad)})
