"""Whole runs on a small dataset with the tiny backbone: every model, lens and gate scope; resuming; loading."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from synthetic import TEXT, write_dataset

from recbole_llm.backbone.store import DEFAULT_BACKBONE
from recbole_llm.cli import main
from recbole_llm.config.configurator import Config
from recbole_llm.data.create import create_dataset
from recbole_llm.experiment.conventional import ConventionalExperiment
from recbole_llm.experiment.splits import prepare_splits
from recbole_llm.model.answer_ctr import AnswerCTR
from recbole_llm.quick_start import load_data_and_model, run_recbole_llm
from recbole_llm.registry import get_model
from recbole_llm.trainer.checkpoint import CheckpointError, load_checkpoint
from recbole_llm.trainer.llm_trainer import LLMTrainer

REPOSITORY = Path(__file__).resolve().parent.parent
LENS = {"epochs": 2, "embedding_size": 8, "mlp_hidden_size": [16, 8], "attention_hidden_size": [8]}
STREAM_LENS = {"epochs": 2, "hidden_size": 8, "inner_size": 8, "n_heads": 1, "n_layers": 1, "id_size": 8}
SEQUENCE_LENS = {"epochs": 2, "hidden_size": 8, "inner_size": 8, "n_heads": 1, "n_layers": 1}


@pytest.fixture
def settings(toy_settings):
    return {
        **toy_settings,
        "layout": "prompt",
        "few_shot": 48,
        "train_batch_size": 16,
        "micro_batch_size": 8,
        "lens_config": LENS,
        "bootstrap_samples": 50,
        "learning_rate": 0.01,
    }


def rows_of(result: dict) -> dict[str, np.ndarray]:
    with np.load(Path(result["path"]).parent / "test_rows.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


CASES = {
    "RecLoRA, DIN, user_item": ("RecLoRA", {}),
    "RecLoRA, DIN, user": ("RecLoRA", {"gate_scope": "user"}),
    "RecLoRA, SASRec": ("RecLoRA", {"lens": "SASRec", "lens_config": SEQUENCE_LENS}),
    "RecLoRA, GRU4Rec": (
        "RecLoRA",
        {"lens": "GRU4Rec", "lens_config": {"epochs": 2, "hidden_size": 8, "embedding_size": 8}},
    ),
    "RecLoRA + residual": ("RecLoRA", {"lens_residual": True}),
    "RecLoRA, without_few_shot": ("RecLoRA", {"lens_rows": "without_few_shot"}),
    "RecLoRA, expert": ("RecLoRA", {"mixer": "expert", "num_experts": 4}),
    "RecLoRA, output, top 2": ("RecLoRA", {"mixer": "output", "num_experts": 4, "top_k": 2}),
    "RecLoRA, dense": ("RecLoRA", {"mixer": "dense"}),
    "RecLoRA, semantic text": ("RecLoRA", {"text_retrieval": "semantic"}),
    "RecLoRA, semantic by the lens": ("RecLoRA", {"text_retrieval": "semantic", "semantic_vectors": "lens"}),
    "RecLoRA, semantic ids": ("RecLoRA", {"id_retrieval": "semantic", "id_history_length": 6}),
    "RecLoRA, recent and semantic text": ("RecLoRA", {"text_retrieval": "mixed"}),
    "RecLoRA, gate on state and logit": ("RecLoRA", {"gate_inputs": "state_and_logit"}),
    "RecLoRA, gate penalties": ("RecLoRA", {"gate_balance": 0.1, "gate_entropy": -0.1}),
    "RecLoRA, lens tuned": ("RecLoRA", {"tune_lens": True, "gate_scope": "user"}),
    "RecLoRA, streams": (
        "RecLoRA",
        {
            "layout": "stream",
            "lens": "Stream",
            "lens_config": STREAM_LENS,
            "zero_shot": True,
            "few_shot_by": "sample",
        },
    ),
    "TALLRec": ("TALLRec", {"lens": None, "lens_config": None}),
    "TALLRec beside DIN": ("TALLRec", {"lens": "DIN"}),
}


@pytest.mark.parametrize("case", CASES)
def test_run(case, settings):
    model, options = CASES[case]
    result = run_recbole_llm(model, "toy", config_dict={**settings, **options})
    saved = json.loads(Path(result["path"]).read_text())
    rows = rows_of(result)
    assert saved["model"] == model and saved["rows"]["few_shot"] == 48
    assert len(rows["label"]) == saved["rows"]["test"] == 80
    for part in ("valid", "test"):
        assert {"auc", "logloss", "acc", "gauc"} <= saved["metrics"][part].keys()
    compared = {"zero_shot_score"} | ({"lens_score"} if saved["lens"] else set())
    assert compared <= rows.keys()
    assert not np.array_equal(rows["model_score"], rows["zero_shot_score"])  # training changed something
    assert ((rows["model_score"] > 0) & (rows["model_score"] < 1)).all()


def test_the_same_run_gives_the_same_scores(settings, tmp_path):
    config = {**settings, "cache_dir": str(tmp_path / "cache")}
    first, second = (run_recbole_llm("RecLoRA", "toy", config_dict=config) for _ in range(2))
    assert second["lens"]["from_cache"] and not first["lens"]["from_cache"]
    a, b = rows_of(first), rows_of(second)
    assert all(np.array_equal(a[name], b[name]) for name in a)


def logit(p: np.ndarray) -> np.ndarray:
    return np.log(p) - np.log1p(-p)


def test_residual_starts_at_the_lens_and_a_little_of_the_language_model(settings):
    config = {**settings, "lens_residual": True, "learning_rate": 1e-12, "residual_learning_rate": 1e-12}
    rows = rows_of(run_recbole_llm("RecLoRA", "toy", config_dict=config))
    expected = logit(rows["lens_score"]) + 0.1 * logit(rows["zero_shot_score"])
    np.testing.assert_allclose(logit(rows["model_score"]), expected, atol=1e-5)


@pytest.mark.parametrize("residual", [False, True])
def test_a_tuned_lens_is_trained_apart_from_the_one_that_is_compared_with(settings, residual):
    frozen = run_and_load(settings, lens_residual=residual)
    parts = run_and_load(settings, lens_residual=residual, tune_lens=True, lens_learning_rate=0.01)
    assert np.array_equal(parts.saved_rows["lens_score"], frozen.saved_rows["lens_score"])
    assert not np.array_equal(parts.saved_rows["model_score"], frozen.saved_rows["model_score"])
    scores = torch.cat([parts.model.predict(batch[0]) for batch in parts.test_data])
    np.testing.assert_array_equal(scores.double().numpy(), parts.saved_rows["model_score"])
    before, after = dict(parts.lens.model.named_parameters()), dict(parts.model.lens.model.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # The state comes from below the last layer; only the residual reads the lens's logit.
    assert "attention.dense.weight" in changed
    assert ("dnn_predict_layers.weight" in changed) == residual


def test_a_tuned_lens_that_hardly_moves_changes_nothing(settings):
    still = {"tune_lens": True, "lens_learning_rate": 1e-12}
    frozen, tuned = (rows_of(run_recbole_llm("RecLoRA", "toy", config_dict={**settings, **change}))
                     for change in ({}, still))  # fmt: skip
    np.testing.assert_allclose(tuned["model_score"], frozen["model_score"], atol=1e-6)


def test_scores_do_not_depend_on_the_batch(settings):
    parts = run_and_load(settings)
    everything = parts.test[torch.arange(len(parts.test))]
    together = parts.model.predict(everything)
    parts.model.micro_batch_size = 1
    alone = parts.model.predict(everything)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    shuffled = torch.randperm(len(parts.test), generator=torch.Generator().manual_seed(1))
    parts.model.micro_batch_size = 7
    torch.testing.assert_close(
        parts.model.predict(parts.test[shuffled]), together[shuffled], atol=1e-4, rtol=0
    )


def run_and_load(settings, **options):
    result = run_recbole_llm("RecLoRA", "toy", config_dict={**settings, **options})
    parts = load_data_and_model(Path(result["path"]).parent)
    parts.saved_rows = rows_of(result)
    return parts


def test_a_loaded_run_gives_the_saved_scores(settings):
    parts = run_and_load(settings)
    scores = torch.cat([parts.model.predict(batch[0]) for batch in parts.test_data])
    np.testing.assert_array_equal(scores.double().numpy(), parts.saved_rows["model_score"])


def test_a_run_of_other_data_is_refused(settings, tmp_path):
    result = run_recbole_llm("RecLoRA", "toy", config_dict=settings)
    other = write_dataset(tmp_path / "other", length=24)
    with pytest.raises(ValueError, match="is missing: data or configuration are not those that its DIN-"):
        load_data_and_model(Path(result["path"]).parent, data_path=str(other))


def test_gradients_are_those_of_the_whole_batch(settings):
    parts = run_and_load(settings, gate_dropout=0.0, gate="linear")
    batch = parts.train[torch.arange(16)]
    gradients = []
    for size in (16, 3):
        parts.model.micro_batch_size = size
        parts.model.zero_grad()
        parts.model.train()
        parts.model.calculate_loss(batch).backward()
        gradients.append({n: p.grad.clone() for n, p in parts.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    trained = {id(p) for group in parts.model.parameter_groups().values() for p in group.values()}
    assert {n for n, p in parts.model.named_parameters() if id(p) in trained} == gradients[0].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], atol=1e-6, rtol=1e-4)


def test_the_lens_stays_in_evaluation_mode(settings):
    parts = run_and_load(settings)
    parts.model.train()
    assert not any(module.training for module in parts.lens.modules())


def start(settings, *extra: str) -> subprocess.Popen:
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    return subprocess.Popen(
        [
            sys.executable,
            str(REPOSITORY / "run_recbole_llm.py"),
            "--model=RecLoRA",
            "--dataset=toy",
            *arguments,
            *extra,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_checkpoint(process: subprocess.Popen, folder: Path, step: int) -> None:
    """Wait until a run in ``folder`` has finished the given optimizer step."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        for file in folder.glob("RecLoRA-toy-*/last.safetensors"):
            meta = load_checkpoint(file)[1]
            if meta["epoch"] * 12 + meta["step"] >= step:
                return
        time.sleep(0.02)
    raise AssertionError("the run never got there")


class Killed(BaseException):
    """Ends a training where it stands; nothing but a ``finally`` sees it, as nothing sees SIGKILL."""


@pytest.mark.parametrize("by_signal", [True, False])
def test_killed_in_the_middle_of_an_epoch_then_resumed(settings, tmp_path, monkeypatch, by_signal):
    config = {
        **settings,
        "tune_lens": by_signal,
        "train_batch_size": 4,
        "epochs": 3,
        "checkpoint_seconds": 0,
        "zero_shot": False,
    }
    unbroken = rows_of(run_recbole_llm("RecLoRA", "toy", config_dict=config))
    config["output_dir"] = str(tmp_path / "killed")
    if by_signal:
        process = start(config)
        wait_for_checkpoint(process, tmp_path / "killed", step=17)
        process.kill()
        process.wait()
    else:
        update, steps = LLMTrainer._update, []

        def killed(self):
            steps.append(1)
            if len(steps) == 18:
                raise Killed
            update(self)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(LLMTrainer, "_update", killed)
            run_recbole_llm("RecLoRA", "toy", config_dict=config)
    (last,) = (tmp_path / "killed").glob("*/last.safetensors")
    earlier = load_checkpoint(last)[1]["seconds"]
    resumed = run_recbole_llm("RecLoRA", "toy", config_dict={**config, "resume": True})
    assert resumed["seconds"]["fit"] > earlier["fit"] >= earlier["train"] > 0
    assert np.array_equal(rows_of(resumed)["model_score"], unbroken["model_score"])


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("RecLoRA", {"lens_config": LENS, "score_valid": True}),
        (
            "iLoRA",
            {
                "lens_config": SEQUENCE_LENS,
                "compare_with": None,
                "micro_batch_size": 16,
                "few_shot": 32,
                "scoring_batch_size": 4,
            },
        ),
    ],
)
def test_an_interrupted_evaluation_resumes(settings, tmp_path, monkeypatch, model, options):
    config = {**settings, "eval_batch_size": 16, **options}
    target = get_model(model).__mro__[1]
    scored, stop_at, score_rows = [], [], target.score_rows

    def interrupt(self, interaction):
        scored.append(interaction["row_id"].tolist())
        if len(scored) in stop_at:
            raise KeyboardInterrupt
        return score_rows(self, interaction)

    monkeypatch.setattr(target, "score_rows", interrupt)
    unbroken = run_recbole_llm(model, "toy", config_dict={**config, "cache_dir": str(tmp_path / "other")})
    batches = list(scored)
    scored.clear()
    stop_at.append(len(batches) - 2)  # in the test
    # A cache of its own: one that tests share has scores of the untrained model from batches of other sizes.
    config |= {"output_dir": str(tmp_path / "interrupted"), "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(KeyboardInterrupt):
        run_recbole_llm(model, "toy", config_dict=config)
    (folder,) = (tmp_path / "interrupted").glob("*/scores")
    assert any(folder.iterdir())
    resumed = run_recbole_llm(model, "toy", config_dict={**config, "resume": True})
    scored.pop(stop_at[0] - 1)
    assert scored == batches
    assert not folder.exists()
    before, after = rows_of(unbroken), rows_of(resumed)
    assert [name for name in before if not np.array_equal(before[name], after[name])] == []
    assert resumed["metrics"] == unbroken["metrics"]


def test_the_untrained_model_is_not_scored_twice(settings, tmp_path, monkeypatch):
    settings["cache_dir"] = str(tmp_path / "cache")
    config = {**settings, "eval_batch_size": 16, "checkpoint_seconds": 0}
    scored, untrained = [], AnswerCTR.predict_untrained

    def interrupt(self, interaction):
        scored.append(interaction["row_id"].tolist())
        if len(scored) == 4:
            raise KeyboardInterrupt
        return untrained(self, interaction)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerCTR, "predict_untrained", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_recbole_llm("RecLoRA", "toy", config_dict=config)
        result = run_recbole_llm("RecLoRA", "toy", config_dict=config)
    assert len(scored) == 6 and scored[3] == scored[4]
    assert {path.suffix for path in (Path(settings["cache_dir"]) / "zero_shot").glob("[!.]*")} == {
        ".npy",
        ".sha256",
    }
    whole = run_recbole_llm(
        "RecLoRA", "toy", config_dict={**config, "cache_dir": settings["cache_dir"] + "2"}
    )
    assert np.array_equal(rows_of(whole)["zero_shot_score"], rows_of(result)["zero_shot_score"])


def test_interrupt_saves_and_says_how_to_resume(settings, tmp_path):
    config = {
        **settings,
        "train_batch_size": 4,
        "epochs": 40,
        "zero_shot": False,
        "output_dir": str(tmp_path / "out"),
    }
    process = start(config)
    wait_for_checkpoint(process, tmp_path / "out", step=12)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 130, output
    folder = re.search(r"--resume=(\S+)", output).group(1)
    assert (Path(folder) / "last.safetensors").is_file()
    assert "Traceback" not in output


def test_resuming_with_another_configuration_is_refused(settings, tmp_path):
    run_recbole_llm("RecLoRA", "toy", config_dict=settings)
    with pytest.raises(CheckpointError, match="temperature"):
        run_recbole_llm("RecLoRA", "toy", config_dict={**settings, "temperature": 2.0, "resume": True})


def test_dry_run_shows_the_run_and_trains_nothing(settings, capsys, tmp_path):
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    assert main(["--model=RecLoRA", "--dataset=toy", *arguments, "--dry_run"]) == 0
    output = capsys.readouterr().out
    for expected in ("800", "640 / 80 / 80", "prompt tokens", "memory estimate", "label balance"):
        assert expected in output
    assert output.count("--- prompt of few_shot sample") == 3
    assert not list(tmp_path.glob("saved/*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"few_shot": 10_000}, "few_shot"),
        ({"target_modules": ["q_porj"]}, "q_porj"),
        ({"backbone": "/nowhere/model"}, "/nowhere/model"),
        ({"threshold": {"rating": 0}}, "threshold: rating >= 0"),
        ({"max_prompt_tokens": 16}, "max_prompt_tokens"),
        ({"data_path": "/nowhere"}, "/nowhere"),
        ({"temprature": 5.0}, "temperature"),
        ({"device": "cuda:7"}, "cuda"),
        ({"text": {**TEXT, "title": "no_such_column"}}, "no_such_column"),
    ],
)
def test_bad_input_gets_one_clear_error(settings, options, message, capsys):
    arguments = [f"--{key}={value}" for key, value in {**settings, **options}.items()]
    assert main(["--model=RecLoRA", "--dataset=toy", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def test_a_loss_that_is_not_finite_names_the_batch_and_keeps_the_checkpoint(settings, monkeypatch):
    from recbole_llm.model.answer_ctr import AnswerCTR

    healthy = AnswerCTR.loss
    calls = []

    def loss(self, batch):
        calls.append(1)
        return healthy(self, batch) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(AnswerCTR, "loss", loss)
    with pytest.raises(ValueError, match=r"nan in epoch 0, batch 1 .*last\.safetensors") as error:
        run_recbole_llm("RecLoRA", "toy", config_dict=settings)
    assert Path(re.search(r"\S+last\.safetensors", str(error.value)).group()).is_file()


def test_an_output_folder_that_cannot_be_written_is_found_before_any_work(settings, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(OSError, match="output folder"):
        run_recbole_llm("RecLoRA", "toy", config_dict={**settings, "output_dir": str(blocked)})


@pytest.mark.parametrize("model", ["DIN", "SASRec", "DeepFM", "LightGCN"])
def test_models_of_recbole_run_on_ml_100k(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"epochs": 1, "train_batch_size": 4096, "show_progress": False, "bootstrap_samples": 0}
    small |= {"MAX_ITEM_LIST_LENGTH": 5} if model in ("DIN", "SASRec") else {}
    small |= {"mlp_hidden_size": [8]} if model == "DIN" else {}
    small |= {"hidden_size": 8, "inner_size": 8, "n_layers": 1, "n_heads": 1} if model == "SASRec" else {}
    result = run_recbole_llm(model, "ml-100k", config_dict=small)
    assert Path(result["path"]).is_file()
    assert all(0 <= value <= 2 for value in result["metrics"]["test"].values())


@pytest.mark.parametrize(
    "model",
    [
        "DIN",
        "DIEN",
        "SASRec",
        "GRU4Rec",
        "Caser",
        "BERT4Rec",
        "DeepFM",
        "AutoInt",
        "DCNV2",
        "LightGCN",
        "BPR",
        "Pop",
    ],
)
def test_models_of_recbole_on_labelled_rows_have_all_four_metrics(model, settings):
    keep = ("data_path", "show_progress", "bootstrap_samples")
    config = {key: settings[key] for key in keep} | {"task": "ctr", "epochs": 2, "eval_rows": 40}
    result = run_recbole_llm(model, "toy", config_dict=config)
    assert {"auc", "logloss", "acc", "gauc"} == set(result["metrics"]["test"])
    assert result["intervals"]["models"]["model"]["auc"]["low"] is not None
    # The very rows of our models, whatever the kind of model.
    ours = prepare_splits(Config("TALLRec", "toy", config_dict={**settings, "eval_rows": 40}))
    np.testing.assert_array_equal(rows_of(result)["row_id"], ours.test.inter_feat["row_id"].numpy())


def test_a_model_of_recbole_learns_from_the_few_shot_rows_alone(settings, caplog):
    keep = ("data_path", "show_progress", "bootstrap_samples", "few_shot")
    given = {key: settings[key] for key in keep} | {"task": "ctr", "train_rows": "few_shot"}
    learned_from = ConventionalExperiment.assemble(Config("DIN", "toy", config_dict=given)).train
    ours = prepare_splits(Config("TALLRec", "toy", config_dict=settings))
    np.testing.assert_array_equal(learned_from.inter_feat["row_id"], ours.train.inter_feat["row_id"])
    result = run_recbole_llm("DIN", "toy", config_dict={**given, "epochs": 1})
    assert result["rows"]["train"] == result["rows"]["few_shot"] == settings["few_shot"]
    (warning,) = (r.getMessage() for r in caplog.records if "optimizer steps an epoch" in r.getMessage())
    assert f"makes 1 optimizer steps an epoch of {settings['few_shot']} labels, at most 1 in all" in warning
    with pytest.raises(ValueError, match="train_rows.* is for conventional models"):
        Config("RecLoRA", "toy", config_dict={**settings, "train_rows": "few_shot"})


def test_a_model_of_recbole_that_is_never_validated_says_so(settings, caplog):
    keep = ("data_path", "show_progress", "bootstrap_samples")
    config = {key: settings[key] for key in keep} | {"task": "ctr", "epochs": 2}
    run_recbole_llm("DeepFM", "toy", config_dict=config)
    assert "nothing is validated" not in caplog.text
    run_recbole_llm("DeepFM", "toy", config_dict={**config, "eval_step": 0})
    assert "all 2 epochs are trained, and the last one is tested" in caplog.text


def test_context_aware_models_see_neither_rating_nor_history(settings):
    config = Config("DeepFM", "toy", config_dict={"data_path": settings["data_path"], "task": "ctr"})
    dataset = create_dataset(config)
    train, *_ = dataset.build()
    assert "item_id_list" not in train.fields()
    model = config.model_class(config, train).eval()
    batch = train[np.arange(8)]
    assert "rating" in batch and "item_id_list" not in batch
    before = model.predict(batch)
    batch["rating"] = 6 - batch["rating"]
    torch.testing.assert_close(model.predict(batch), before, rtol=0, atol=0)


def test_liked_rows_are_those_with_label_one_and_so_is_their_matrix(settings):
    config = Config("LightGCN", "toy", config_dict={"data_path": settings["data_path"], "task": "ctr"})
    train, *_ = create_dataset(config).build()
    liked = train.liked()
    assert len(liked) == int(train.inter_feat["label"].sum())
    assert bool((liked.inter_feat["label"] == 1).all())
    table = pd.read_csv(Path(settings["data_path"]) / "toy" / "toy.inter", sep="\t")
    good = {
        (str(user), str(item))
        for user, item, rating in table.iloc[:, :3].itertuples(index=False)
        if rating >= config["threshold"]["rating"]
    }
    matrix = liked.inter_matrix()
    users, items = liked.id2token("user_id", matrix.row), liked.id2token("item_id", matrix.col)
    pairs = set(zip(users, items, strict=True))
    assert pairs and pairs <= good


@pytest.mark.smollm2
def test_smollm2_end_to_end(settings):
    small = {
        "few_shot": 8,
        "eval_rows": 12,
        "text_history_length": 4,
        "train_batch_size": 8,
        "learning_rate": 1e-3,
    }
    small |= {"lens_config": {**LENS, "epochs": 1}, "backbone": DEFAULT_BACKBONE, "cache_dir": None}
    result = run_recbole_llm("RecLoRA", "toy", config_dict={**settings, **small})
    rows = rows_of(result)
    assert result["backbone"]["name"] == "smollm2-135m-instruct"
    assert len(rows["model_score"]) == 12
    assert np.abs(rows["model_score"] - rows["zero_shot_score"]).max() > 1e-4


def test_comparison_on_labelled_rows_is_paired_and_bounds_every_model(settings):
    options = {**settings, "eval_rows": 40, "compare_with": ["TALLRec", "DIN epochs=1"]}
    result = run_recbole_llm("RecLoRA", "toy", config_dict=options)
    first, *others = (rows_of(found) for found in result["compared"])
    for rows in others:
        order, mine = np.argsort(rows["row_id"]), np.argsort(first["row_id"])
        np.testing.assert_array_equal(rows["label"][order], first["label"][mine])
    comparison = json.loads((Path(result["path"]).parent / "compare.json").read_text())
    by_name = {d["b"]: d for d in comparison["differences"] if d["metric"] == "auc"}
    assert {"TALLRec", "DIN epochs=1", "lens DIN"} <= by_name.keys()
    assert {d["test"] for d in by_name.values()} == {"DeLong, clustered by user (AUC)"}
    mine, theirs = (found["metrics"]["test"]["auc"] for found in result["compared"][:2])
    assert by_name["TALLRec"]["value"] == pytest.approx(mine - theirs)
