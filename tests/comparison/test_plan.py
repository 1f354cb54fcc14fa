"""Comparisons through the command line: what is planned, what is run, what is repeated, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import TEXT

from recbole_llm import cli, quick_start
from recbole_llm.comparison import running
from recbole_llm.comparison.controls import control_models
from recbole_llm.comparison.plan import make_plan
from recbole_llm.comparison.report import report
from recbole_llm.config.command_line import parse_model, split_models
from recbole_llm.config.configurator import Config

LENS = {"epochs": 1, "embedding_size": 8, "mlp_hidden_size": [16, 8], "attention_hidden_size": [8]}


@pytest.fixture
def settings(toy_settings):
    return {
        **toy_settings,
        "layout": "prompt",
        "few_shot": 32,
        "eval_rows": 60,
        "eval_step": 0,
        "lens_config": LENS,
        "bootstrap_samples": 60,
    }


def compared(models: list[str], settings: dict, **more) -> dict:
    return quick_start.compare_models(models, "toy", config_dict={**settings, **more})


def lines(comparison: dict) -> dict[str, dict]:
    return {line["name"]: line for line in comparison["models"]}


# ---------------------------------------------------------------------- plans


@given(
    st.lists(
        st.from_regex(r"[A-Za-z]{1,8}( k=(\[1, 2\]|'a,b'|\{x: 1,y: 2\}|3))?", fullmatch=True), min_size=1
    )
)
def test_models_are_split_at_commas_outside_of_brackets_and_quotes(models):
    assert split_models(",".join(models)) == models


def test_a_plan_has_every_model_with_every_seed_on_the_samples_of_the_first_llm_recommender(settings):
    plan = make_plan(
        ["DIN", "TALLRec lora_r=4", "RecLoRA"], "toy", config_dict={**settings, "seeds": 2, "epochs": 3}
    )
    assert [(run.text, run.config["seed"]) for run in plan.runs] == [
        (text, seed) for seed in (2020, 2021) for text in ("DIN", "TALLRec lora_r=4", "RecLoRA")
    ]
    din, tallrec, reclora = (run.config for run in plan.runs[:3])
    assert din["task"] == "ctr" and din["min_history"] == tallrec["min_history"] == 5
    assert [c["lora_r"] for c in (tallrec, reclora)] == [4, 8] and tallrec["prompt"] != reclora["prompt"]
    assert {c["epochs"] for c in (din, tallrec, reclora)} == {3}  # given for all
    assert din["train_batch_size"] == 2048 and reclora["train_batch_size"] == 32  # each model's own
    assert len({run.config["eval_seed"] for run in plan.runs}) == 1
    assert plan.subject == "RecLoRA"


def test_the_default_of_a_single_run_to_compare_with_others_is_not_taken_over(settings):
    plan = make_plan(["Pop", "iLoRA"], "toy", config_dict={**settings, "lens_config": None})
    assert [run.text for run in plan.runs] == ["Pop", "iLoRA"]
    assert all(not run.config["compare_with"] for run in plan.runs)


def test_the_folder_depends_on_what_holds_for_all_and_not_on_the_list_of_models(settings):
    def folder(models: list[str], **more) -> Path:
        return make_plan(models, "toy", config_dict={**settings, **more}).folder

    first = folder(["DIN", "RecLoRA"])
    assert folder(["DIN", "RecLoRA", "TALLRec"], seeds=3) == first
    assert folder(["DIN", "RecLoRA"], few_shot=16) != first
    assert folder(["DIN", "RecLoRA"], eval_rows=30) != first
    assert folder(["DIN", "RecLoRA"], preset="quick") != first


def test_a_preset_reaches_every_model_and_what_is_given_wins(settings):
    given = {key: value for key, value in settings.items() if key not in ("few_shot", "eval_step")}
    plan = make_plan(["DIN", "DIN epochs=2", "RecLoRA"], "toy", config_dict={**given, "preset": "quick"})
    din, shorter, reclora = (run.config for run in plan.runs)
    assert (din["epochs"], shorter["epochs"], reclora["epochs"]) == (5, 2, 1)
    assert (reclora["few_shot"], reclora["text_history_length"], reclora["zero_shot"]) == (512, 5, False)
    assert {c["eval_rows"] for c in (din, shorter, reclora)} == {60}


def test_a_preset_serves_a_single_run_too_and_single_models_of_it_win(settings, tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text("models: {llm: {lora_r: 4}, RecLoRA: {lora_r: 2}}\n")
    for model, rank in (("RecLoRA", 2), ("TALLRec", 4)):
        assert Config(model, "toy", config_dict={**settings, "preset": str(own)})["lora_r"] == rank


def test_a_preset_reaches_the_llm_keys_that_a_conventional_model_reads(settings, tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text("models: {MoRec: {backbone: my-model}, classical: {lora_r: 3}}\n")
    given = {"data_path": settings["data_path"], "preset": str(own)}
    config = Config("MoRec", "toy", config_dict=given)
    assert config["backbone"] == "my-model" and config["lora_r"] is None


BAD = {
    "models of two tasks": (["RecLoRA", "iLoRA"], {}, "different tasks .*ctr: RecLoRA; next_item: iLoRA"),
    "a misspelt model": (["RecLoRA", "RecLora2"], {}, "did you mean RecLoRA"),
    "no task": (["Pop", "DIN"], {}, "--task=ctr or --task=next_item"),
    "a key that no model knows": (["RecLoRA", "DIN"], {"lora_rr": 3}, "did you mean lora_r"),
    "other rows for one": (["RecLoRA", "DIN eval_rows=3"], {}, "must be the same for all"),
    "twice the same": (["DIN", "RecLoRA", "DIN"], {}, "'DIN' is given twice"),
    "an unknown subject": (["RecLoRA", "DIN"], {"subject": "Din"}, "none of the models RecLoRA, DIN"),
    "an unknown preset": (["RecLoRA", "DIN"], {"preset": "quik"}, "did you mean quick"),
    "controls of a plain LoRA": (["TALLRec"], {"controls": True}, "nothing to control"),
    "no changes after the name": (["RecLoRA", "DIN epochs"], {}, "write 'NAME key=value'"),
    "redrawn negatives": (["iLoRA", "Pop"], {"eval_mode": "uni9", "lens_config": None}, "other negatives"),
    "test samples unread": (["RecLoRA", "DIN"], {"read_test": False}, "leaves no scores to compare"),
    "a conflict of one model": (["RecLoRA", "TALLRec"], {"gate": "uniform"}, "nothing to mix"),
}


@pytest.mark.parametrize(("models", "change", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_before_anything_is_computed(models, change, message, settings):
    with pytest.raises(ValueError, match=message):
        make_plan(models, "toy", config_dict={**settings, **change})


def test_an_error_names_where_the_value_was_written(settings, tmp_path):
    def refused(models, *arguments):
        with pytest.raises(ValueError) as raised:
            make_plan(models, "toy", config_dict=settings, cmd_line=arguments)
        return str(raised.value)

    (file := tmp_path / "mine.yaml").write_text("top_k: 17\n")
    assert "top_k=17 (command line) is more than" in refused(["RecLoRA", "DIN"], "--top_k=17")
    assert "n_heads=0 (command line): expected" in refused(["RecLoRA", "Stream"], "--n_heads=0")
    assert f"top_k=17 (file {file}) is more than" in refused(["RecLoRA", "DIN"], f"--config_files={file}")
    assert "top_k=17 (model 'RecLoRA top_k=17') is more" in refused(["RecLoRA", "RecLoRA top_k=17"])
    assert "num_expert (command line): did you mean" in refused(["RecLoRA", "DIN"], "--num_expert=4")


# ---------------------------------------------------------------------- controls


def test_streams_have_no_shuffled_history_as_a_control():
    config = Config("RecLoRA", "ml-100k")
    assert config["layout"] == "stream"
    assert not [control for control in control_models(config, "RecLoRA") if "shuffle_history" in control]


def test_controls_keep_the_scale_and_reach_the_parameters_of_all_experts():
    for model, ranks, scale in (("RecLoRA", [8, 128], 2), ("iLoRA", [2, 8], 16)):
        config = Config(model, "ml-100k")
        texts = control_models(config, model)
        plain = [parse_model(text)[1] for text in texts if "mixer=identity" in text]
        assert [change["lora_r"] for change in plain] == ranks
        assert {change["lora_alpha"] / change["lora_r"] for change in plain} == {scale}
        for text in texts:  # every one of them can be run
            name, changes = parse_model(text)
            Config(name, "ml-100k", config_dict=changes)
        assert sum("gate=" in text and "gate=~" not in text for text in texts) == 3
        assert sum("score_valid" in text for text in texts) == (model == "RecLoRA")


@pytest.mark.parametrize(
    "changes",
    [
        {"gate_balance": 0.1, "gate_entropy": -0.1},
        {"top_k": 4},
        {"tune_lens": True, "lens_residual": False},
        {"tune_lens": True, "lens_residual": True},
    ],
)
def test_controls_leave_out_what_belongs_to_the_experts(changes):
    for text in control_models(Config("RecLoRA", "ml-100k", config_dict=changes), "RecLoRA"):
        name, of_control = parse_model(text)
        config = Config(name, "ml-100k", config_dict={**changes, **of_control})
        if config["mixer"] == "identity":  # the lens is still read through the residual
            assert config["tune_lens"] == (changes.get("tune_lens", False) and config["lens_residual"])


def test_controls_are_of_the_model_as_it_was_asked_for(settings):
    plan = make_plan(["RecLoRA lora_r=4 num_experts=2"], "toy", config_dict={**settings, "controls": True})
    ranks = [run.config["lora_r"] for run in plan.runs if run.config["mixer"] == "identity"]
    assert ranks == [4, 8]


def test_built_in_conventional_models_set_their_task(settings):
    of_llms = ("few_shot", "eval_step", "lens_config", "layout")
    given = {key: value for key, value in settings.items() if key not in of_llms}
    plan = make_plan(["SIM", "Pop"], "toy", config_dict=given)
    assert {run.config["task"] for run in plan.runs} == {"ctr"}


def test_controls_are_run_and_the_report_has_the_stack(settings):
    found = compared(["RecLoRA"], settings, controls=True, zero_shot=False)
    names = list(lines(found))
    assert found["subject"] == "RecLoRA" and not found["failed"]
    assert {"RecLoRA gate=uniform", "RecLoRA shuffle_history=True", "RecLoRA obfuscate_titles=True"} < set(
        names
    )
    assert any(name.startswith("stack of lens DIN and RecLoRA mixer=identity") for name in names)
    about = {d["b"] for d in found["differences"]}
    assert about == set(names) - {"RecLoRA"} and len(found["sentences"]) == len(about)
    obfuscated = next(p for p in found["prompts"] if "obfuscate" in p["model"])
    assert "Next film: Item " in obfuscated["text"]


# ---------------------------------------------------------------------- runs


def test_a_comparison_writes_its_report_and_is_continued_where_it_was_killed(settings, monkeypatch):
    ran, run_one = [], running.run_one

    def interrupted(config, folder):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(config["run_name"])
        return run_one(config, folder)

    monkeypatch.setattr(running, "run_one", interrupted)
    models = ["Pop", "DIN epochs=1", "RecLoRA"]
    with pytest.raises(KeyboardInterrupt):
        compared(models, settings, seeds=2)
    monkeypatch.setattr(running, "run_one", lambda c, f: (ran.append(c["run_name"]), run_one(c, f))[1])
    found = compared(models, settings, seeds=2)
    assert ran == ["Pop", "DIN epochs=1", "RecLoRA", "Pop", "DIN epochs=1", "RecLoRA"]
    assert found["seeds"] == [2020, 2021] and not found["failed"]
    assert all(line["seeds"] == [2020, 2021] for line in found["models"])
    assert [Path(file).suffix for file in found["files"]] == [".json", ".csv", ".md", ".tex", ".html"]
    reclora = lines(found)["RecLoRA"]
    assert reclora["cost"]["trained_parameters"] > 0 and reclora["cost"]["peak_memory_gib"] > 0
    assert set(reclora["groups"]) == {"history length", "user activity", "item popularity"}
    assert lines(found)["Pop"]["kind"] == "classical"
    gates = found["gates"]
    assert len(gates["users"]) == len(gates["values"]) == found["rows"]["users"]
    np.testing.assert_allclose(np.sum(gates["values"], axis=1), 1, atol=1e-3)

    # The saved scores alone give the same report, and nothing is run again.
    again = report(Path(found["files"][0]).parent)
    for key in ("models", "differences", "sentences"):
        assert again[key] == found[key]
    assert compared(models, settings, seeds=2)["models"] == found["models"] and len(ran) == 6
    # One more model joins the finished ones.
    compared([*models, "TALLRec"], settings, seeds=2)
    assert ran[6:] == ["TALLRec", "TALLRec"]


def test_side_by_side_gives_what_one_after_another_gives(settings, tmp_path):
    models = ["Pop", "RecLoRA", "GRU4Rec loss_type=XX"]
    found = {}
    for nproc in (1, 2):  # each with a cache of its own
        there = {"output_dir": str(tmp_path / f"by {nproc}"), "cache_dir": str(tmp_path / f"cache {nproc}")}
        found[nproc] = compared(models, settings, nproc=nproc, **there)
    assert [line["metrics"] for line in found[1]["models"]] == [
        line["metrics"] for line in found[2]["models"]
    ]
    assert [entry["name"] for entry in found[2]["failed"]] == ["GRU4Rec loss_type=XX"]
    assert found[1]["failed"] == found[2]["failed"]


def test_conventional_models_that_score_validation_samples_have_their_best_stack(settings):
    models = ["DIN epochs=1", "DeepFM epochs=1"]
    found = compared(models, settings, task="ctr", score_valid=True)
    assert not found["failed"] and list(lines(found)) == [*models, "best conventional stack"]
    assert any("weights DIN epochs=1 " in note and "DeepFM epochs=1 " in note for note in found["notes"])


def test_processes_are_for_comparisons(settings):
    with pytest.raises(ValueError, match="nproc: 2 spreads the runs of a comparison"):
        quick_start.run_recbole_llm("Pop", "toy", config_dict={**settings, "nproc": 2})


def test_a_failing_model_is_reported_and_the_others_continue(settings, capsys):
    arguments = [f"--{key}={value}" for key, value in settings.items() if key not in ("text", "lens_config")]
    arguments += [f"--text={TEXT}", "--dataset=toy", "--model=GRU4Rec loss_type=XX,Pop", "--task=ctr"]
    assert cli.main(arguments) == 1
    told = capsys.readouterr().out
    assert "failed:" in told and "loss_type" in told and "Pop" in told


def test_scores_that_were_lost_and_other_versions_and_settings_are_named(settings, monkeypatch):
    found = compared(["Pop", "DIN epochs=1"], settings, task="ctr")
    folder = Path(found["files"][0]).parent
    run = folder / "Pop-seed2020"
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**result, "config": {**result["config"], "min_history": 2}}))
    with pytest.raises(
        ValueError, match=r"Pop, seed 2020 with other settings \(min_history 2 there, 5 here\)"
    ):
        compared(["Pop", "DIN epochs=1"], settings, task="ctr")
    (run / "result.json").write_text(json.dumps(result))
    (run / "test_rows.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"Pop-seed2020 holds no test_rows.npz"):
        report(folder)
    monkeypatch.setattr(running.recbole_llm, "__version__", "99")
    with pytest.raises(ValueError, match="was made by recbole_llm .*, this is 99"):
        compared(["Pop", "DIN epochs=1"], settings, task="ctr")


def test_models_of_the_next_item_task_share_candidates(settings):
    found = compared(["Pop", "SASRec epochs=1", "TALLRecNext", "iLoRA"], {**settings, "lens_config": None})
    assert found["leading"] == "hr@1" and not found["failed"]
    popularity = lines(found)
    # RecBole's Pop is the popularity reference on the same candidates; the reference keeps its own name.
    assert (
        popularity["Pop"]["metrics"]["hr@1"]["values"]
        == popularity["popularity"]["metrics"]["hr@1"]["values"]
    )


def test_dry_run_of_a_comparison_lists_its_runs(settings, capsys):
    arguments = [f"--{key}={value}" for key, value in settings.items() if key not in ("text", "lens_config")]
    assert cli.main([*arguments, "--dataset=toy", "--model=Pop,RecLoRA", "--seeds=2", "--dry_run"]) == 0
    told = capsys.readouterr().out
    assert "4 runs on toy" in told and "RecLoRA, seed 2021" in told
    assert not Path("saved").exists()
