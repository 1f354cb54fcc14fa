"""Configuration: precedence, parsing, our defaults, and one clear error for everything that cannot be."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from recbole.config import Config as RecBoleConfig
from recbole.data import create_dataset, data_preparation
from recbole.evaluator import metric_types
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.trainer import Trainer
from recbole.utils import InputType, ModelType, argument_list

import recbole_llm.config.configurator as config_module
from recbole_llm import registry
from recbole_llm.config.command_line import parse_command_line, parse_value
from recbole_llm.config.configurator import Config
from recbole_llm.config.device import SIZES, resolve_auto_sizes
from recbole_llm.config.keys import KEYS, RECBOLE_KEYS
from recbole_llm.config.model_spec import ModelSpec
from recbole_llm.config.recbole_defaults import keys_in_source
from recbole_llm.utils import yaml_files
from recbole_llm.utils.yaml_files import PROPERTIES, RECBOLE_PROPERTIES, load_yaml, properties_dir


class RecLoRA(SequentialRecommender):
    """Stands for the model, whose module needs transformers: only its name and its type matter here."""

    input_type = InputType.POINTWISE
    spec = ModelSpec("llm", tasks=("ctr",), probability=True)


class TALLRec(RecLoRA):
    """Likewise."""


def ours(*arguments: str, model: type | str = RecLoRA, dataset: str = "ml-100k", **keys) -> Config:
    return Config(model, dataset, config_dict=keys, cmd_line=list(arguments))


# -------------------- the yaml files


def yaml_lines(path: Path) -> dict[str, str]:
    """The line of each top-level key."""
    found = (re.match(r"([A-Za-z_]\w*):", line) for line in path.read_text().splitlines())
    return {match.group(1): match.string for match in found if match}


def test_overall_yaml_documents_exactly_our_keys():
    recbole = {*yaml_lines(RECBOLE_PROPERTIES / "overall.yaml"), "normalize_all"}
    recbole |= {*yaml_lines(RECBOLE_PROPERTIES / "dataset" / "sample.yaml")}
    assert set(yaml_lines(PROPERTIES / "overall.yaml")) - recbole == set(KEYS)


@pytest.mark.parametrize(
    "path", sorted(PROPERTIES.glob("model/*.yaml")) + [PROPERTIES / "overall.yaml"], ids=str
)
def test_every_key_has_type_and_meaning_and_a_legal_value(path):
    values = load_yaml(path)
    for key, line in yaml_lines(path).items():
        assert re.search(r"# \((int|float|str|bool|dict|list)[^)]*\) \S+ .*\.$", line), f"{path}: {line}"
        known = (KEYS | RECBOLE_KEYS).get(key)
        assert known is None or known.accepts(values[key]), f"{path}: {line}"


def test_published_defaults():
    config = ours(layout="prompt")
    published = {
        "mixer": "factor",
        "gate": "mlp60",
        "num_experts": 16,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "temperature": 5,
        "lens": "DIN",
        "gate_scope": "user_item",
        "id_history_length": 60,
        "MAX_ITEM_LIST_LENGTH": 60,
        "text_history_length": 10,
        "learner": "adamw",
        "learning_rate": 1e-3,
        "epochs": 1,
        "weight_decay": 0,
        "train_batch_size": 32,
        "micro_batch_size": 16,
        "eval_batch_size": 64,
        "few_shot": 1024,
        "eval_rows": None,
        "task": "ctr",
        "threshold": {"rating": 4},
        "lens_residual": False,
        "normalize_all": False,
        "valid_metric": "AUC",
    }
    assert {key: config[key] for key in published} == published
    assert config["MODEL_TYPE"] == ModelType.SEQUENTIAL
    assert config["eval_args"] == {
        "split": {"RS": [0.8, 0.1, 0.1]},
        "order": "TO",
        "group_by": None,
        "mode": {"valid": "labeled", "test": "labeled"},
    }
    assert config["train_neg_sample_args"]["distribution"] == "none"


def test_defaults_are_streams_and_the_stack_with_the_lens():
    config = ours()
    assert (config["layout"], config["lens"], config["gate_scope"]) == ("stream", "Stream", "user_item")
    assert config["lens_residual"] and config["residual_rows"] == config["valid_rows"] == 2048
    assert (config["few_shot"], config["few_shot_by"], config["eval_rows"]) == (8192, "user", None)
    plain = ours(mixer="identity", lens=None)  # a default that has nothing to add is no error
    assert plain["lens_residual"] is False


@pytest.mark.parametrize(
    ("prompt", "options", "layout"),
    [
        ("movie_ctr", {}, "prompt"),
        ("ctr", {}, "prompt"),
        ("stream_ctr", {}, "stream"),
        ("movie_ctr", {"layout": "stream"}, "stream"),
    ],
)
def test_the_template_tells_the_layout_unless_it_is_set(tmp_path, caplog, prompt, options, layout):
    mine = tmp_path / "mine.yaml"
    mine.write_text((PROPERTIES / "prompt" / f"{prompt}.yaml").read_text())
    for template in (prompt, str(mine)):
        config = Config("TALLRec", "ml-100k", config_dict={"prompt": template, **options})
        assert (config["layout"], config["prompt"]) == (layout, template)
    assert (config["few_shot_by"] == "sample") == (layout == "prompt")
    assert ("layout: prompt, since the template" in caplog.text) == (layout == "prompt")


def test_the_paper_s_protocol_is_one_file():
    config = Config("RecLoRA", "ml-1m", ["paper_reclora"])
    assert (config["layout"], config["lens"], config["lens_residual"]) == ("prompt", "DIN", False)
    assert (config["few_shot"], config["few_shot_by"], config["train_batch_size"]) == (70000, "sample", 256)


def test_tallrec_is_plain_lora_beside_a_lens():
    config = ours(model=TALLRec)
    assert (config["mixer"], config["gate"], config["lens"]) == ("identity", None, "DIN")
    assert ours(model=TALLRec, lens=None)["lens"] is None


@pytest.mark.parametrize("model", [RecLoRA, TALLRec])
def test_default_prompts_exist(model):
    assert (PROPERTIES / "prompt" / f"{ours(model=model)['prompt']}.yaml").is_file()


def test_properties_dir_of_a_checkout_and_of_an_installed_package(monkeypatch, tmp_path):
    assert (properties_dir() / "overall.yaml").is_file()
    package = tmp_path / "recbole_llm"
    shutil.copytree(PROPERTIES, package / "properties")
    monkeypatch.setattr(yaml_files, "__file__", str(package / "utils" / "yaml_files.py"))
    assert properties_dir() == package / "properties"
    shutil.move(package / "properties", tmp_path / "properties")
    assert properties_dir() == tmp_path / "properties"


# -------------------- the command line


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("5E4", 50000.0),
        ("-2", -2),
        ("0.1", 0.1),
        ("True", True),
        ("true", True),
        ("False", False),
        ("None", None),
        ("~", None),
        ("null", None),
        ("adam", "adam"),
        ("", ""),
        ("'a b'", "a b"),
        ("[1, 2]", [1, 2]),
        ("['AUC','LogLoss']", ["AUC", "LogLoss"]),
        ("[AUC, LogLoss]", ["AUC", "LogLoss"]),
        ("(1, 2)", (1, 2)),
        ("{'rating': 4}", {"rating": 4}),
        ("{rating: 4}", {"rating": 4}),
        ("{a: [1, {b: ~}]}", {"a": [1, {"b": None}]}),
        ("0,1", (0, 1)),
        ("a=b", "a=b"),
        ("a: b", "a: b"),
        ("- a", "- a"),
        ("x # y", "x # y"),
        ("[a", "[a"),
        ("2020-01-01", "2020-01-01"),
        ("!!python/name:os.system", "!!python/name:os.system"),
        ("&a *a", "&a *a"),
        ("os.getcwd()", "os.getcwd()"),
        ("1/0", "1/0"),
        ("__import__('os').abort()", "__import__('os').abort()"),
        ("[" * 5000, "[" * 5000),
        ("@", "@"),
        ("%", "%"),
    ],
)
def test_values_are_literals_and_never_run(text, value):
    parsed = parse_value(text)
    assert parsed == value and type(parsed) is type(value)


def test_nothing_is_evaluated(monkeypatch, tmp_path):
    target = tmp_path / "ran"
    code = f"open({str(target)!r}, 'w').close()"
    config = ours(f"--run_name={code}", output_dir=code)
    assert config["run_name"] == code and config["output_dir"] == code
    with pytest.raises(ValueError, match="epochs="):
        ours(f"--epochs={code}")
    assert not target.exists()


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("output_dir", "2024", "2024"), ("run_name", "None", None), ("backbone", "1e5", "1e5"),
        ("backbone", "'tiny'", "tiny"), ("resume", "true", True), ("resume", "runs/a=b", "runs/a=b"),
        ("device", "cuda:1", "cuda:1"), ("data_path", "../shared/data", "../shared/data"),
    ],
)  # fmt: skip
def test_keys_that_hold_text_get_text(key, text, value):
    assert parse_command_line([f"--{key}={text}"]) == {key: value}


def test_forms_of_the_command_line():
    line = [
        "--model",
        "SASRec",
        "-d",
        "ml-1m",
        "--dry_run",
        "--lens_residual",
        "--show_progress",
        "--top_k=2",
    ]
    assert parse_command_line(line) == {
        "model": "SASRec",
        "dataset": "ml-1m",
        "dry_run": True,
        "lens_residual": True,
        "show_progress": True,
        "top_k": 2,
    }
    assert parse_command_line(["--save_dataset", "--epochs=2", "--epochs=2"]) == {
        "save_dataset": True,
        "epochs": 2,
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--epochs", "3"], "write --epochs=3 instead of --epochs 3"),
        (["--dry_run", "true"], "write --dry_run=true"),
        (["--epochs"], "--epochs needs a value"),
        (["--topk"], "--topk needs a value"),
        (["epochs=3"], "write --epochs=3"),
        (["--learning-rate=0.1"], "write --learning_rate=0.1"),
        (["stray"], "'stray'; write --key=value"),
        (["-x"], "'-x'; write --key=value"),
        (["--epochs=1", "--epochs=2"], "--epochs is given twice, as 1 and 2"),
    ],
)
def test_other_forms_are_refused(line, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_command_line(line)


def test_pytest_s_arguments_are_not_read(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest", "--maxfail=1", "--epochs=99"])
    assert ours()["epochs"] == 1


# -------------------- precedence


def test_precedence(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(
        "lora_r: 1\nepochs: 1e1\ntemperature: 1e-2\nlearning_rate: 1e-5\nseed: 1\n".replace("1e1", "10")
    )
    second.write_text("lora_r: 2\nepochs: 20\nlearning_rate: 2.e-5\n")
    config = Config(
        RecLoRA,
        "ml-100k",
        [first, str(second)],
        {"lora_r": 3, "epochs": "30"},
        [f"--config_files={first}", "--lora_r=4"],
    )
    assert (config["lora_r"], config["epochs"], config["learning_rate"]) == (4, 30, 2e-5)
    assert (config["temperature"], config["seed"], config["num_experts"]) == (0.01, 1, 16)
    assert config.origins["lora_r"] == "command line" and config.origins["epochs"] == "config_dict"
    assert config.origins["learning_rate"] == f"file {second}"


def test_config_files_of_the_command_line(tmp_path):
    for name, rank in (("a.yaml", 1), ("b.yaml", 2)):
        (tmp_path / name).write_text(f"lora_r: {rank}\n")
    assert ours(f"--config_files={tmp_path}/a.yaml {tmp_path}/b.yaml")["lora_r"] == 2
    assert Config(cmd_line=["--model=DIN", "--dataset=ml-100k"])["model"] == "DIN"


def test_the_caller_s_dict_and_recbole_s_lists_stay(monkeypatch):
    given = {
        "model": "DIN",
        "dataset": "ml-100k",
        "epochs": "3",
        "train_neg_sample_args": {"distribution": "uniform"},
    }
    before = copy.deepcopy(given)
    arguments, floats = list(argument_list.dataset_arguments), yaml.FullLoader.yaml_implicit_resolvers["1"]
    Config(config_dict=given)
    assert given == before
    assert argument_list.dataset_arguments == arguments
    assert yaml.FullLoader.yaml_implicit_resolvers["1"] == floats


def test_dataset_yaml_text_and_ctr(monkeypatch, tmp_path):
    properties = tmp_path / "properties"
    shutil.copytree(PROPERTIES, properties)
    (properties / "dataset").mkdir(exist_ok=True)
    text = "text: {title: '{movie_title}'}\n"
    for name in ("ml-100k", "shop"):
        (properties / "dataset" / f"{name}.yaml").write_text(
            text + "TIME_FIELD: when\nctr: {threshold: {rating: 3}, min_history: 2}\n"
        )
    monkeypatch.setattr(config_module, "PROPERTIES", properties)
    config = ours()
    assert (config["threshold"], config["min_history"], config["TIME_FIELD"]) == ({"rating": 3}, 2, "when")
    assert config["text"] == {"title": "{movie_title}"} and "ctr" not in config
    assert ours("--threshold={stars: 4}")["threshold"] == {"stars": 4}

    recbole = Config("DIN", "ml-100k")  # RecBole has its own yaml for ml-100k, ...
    assert (recbole["threshold"], recbole["TIME_FIELD"]) == (None, "timestamp") and recbole["text"]
    assert Config("DIN", "shop")["TIME_FIELD"] == "when"  # ... and none for this one
    labelled = Config("DIN", "ml-100k", cmd_line=["--task=ctr"])
    assert (labelled["threshold"], labelled["min_history"], labelled["TIME_FIELD"]) == (
        {"rating": 3},
        2,
        "when",
    )

    mine = tmp_path / "mine.yaml"
    mine.write_text("min_history: 4\nctr: {threshold: {rating: 5}, min_history: 3}\n")
    config = Config(RecLoRA, "ml-100k", [mine])
    assert (config["threshold"], config["min_history"]) == ({"rating": 5}, 4)
    mine.write_text("ctr: {treshold: {rating: 5}}\n")
    with pytest.raises(ValueError, match="treshold .*did you mean threshold"):
        Config(RecLoRA, "ml-100k", [mine])


# -------------------- RecBole's models


@pytest.mark.parametrize("model", ["DIN", "SASRec", "DeepFM", "LightGCN"])
def test_recbole_models_keep_recbole_s_defaults(monkeypatch, model):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # RecBole's own Config overwrites it
    mine = Config(
        model, "ml-100k"
    )  # first: it applies the repairs without which stock RecBole fails on NumPy 2
    # Stock RecBole raises for a plain SASRec.
    stock = RecBoleConfig(
        model, "ml-100k", config_dict={"train_neg_sample_args": None} if model == "SASRec" else None
    )
    different = {k for k, v in stock.final_config_dict.items() if v != mine[k]} - {
        "data_path",
        "gpu_id",
        "use_gpu",
    }
    assert different <= {"device"}
    assert Path(mine["data_path"]).samefile(stock["data_path"])
    assert mine["task"] is None
    assert set(mine.final_config_dict) - set(stock.final_config_dict) <= {*KEYS, "text"}


def test_train_neg_sample_args_of_a_ce_model():
    with pytest.raises(ValueError, match="train_neg_sample_args"):
        Config("SASRec", "ml-100k", config_dict={"train_neg_sample_args": {"distribution": "uniform"}})
    assert (
        Config("SASRec", "ml-100k", cmd_line=["--loss_type=BPR"])["train_neg_sample_args"]["sample_num"] == 1
    )


def test_task_ctr_puts_a_recbole_model_on_our_protocol():
    config = Config("DIN", "ml-100k", cmd_line=["--task=ctr", "--id_history_length=7"])
    mine = ours()
    for key in (
        "eval_args",
        "threshold",
        "train_neg_sample_args",
        "normalize_all",
        "metrics",
        "valid_metric",
    ):
        assert config[key] == mine[key], key
    assert config["MAX_ITEM_LIST_LENGTH"] == 7
    assert config["train_batch_size"] == 2048 and config["learner"] == "adam"  # RecBole's own training


@pytest.mark.parametrize(
    "model, repeatable", [("BPR", False), ("LightGCN", False), ("GRU4Rec --loss_type=BPR", True)]
)
def test_models_that_learn_pairs_sample_their_negatives_in_task_ctr(model, repeatable):
    name, *changes = model.split()
    config = Config(name, "ml-100k", cmd_line=["--task=ctr", *changes])
    assert config["train_neg_sample_args"]["distribution"] == "uniform"
    assert config["repeatable"] is repeatable


def test_llm_keys_without_effect_are_told(caplog):
    Config("DIN", "ml-100k", cmd_line=["--lora_r=4", "--epochs=1"])
    assert "DIN is a model of RecBole: lora_r has no effect on it" in caplog.text


@pytest.mark.parametrize("model", ["DIN", "SASRec", "DeepFM", "LightGCN"])
def test_recbole_models_train_and_evaluate(model, atomic_data, tmp_cwd):
    keys = {
        "data_path": str(atomic_data), "epochs": 1, "show_progress": False, "device": "cpu",
        "load_col": None, "threshold": {"rating": 3} if model == "DeepFM" else None,
    }  # fmt: skip
    config = Config(model, "small", config_dict=keys)
    train_data, valid_data, test_data = data_preparation(config, create_dataset(config))
    trainer = Trainer(config, config.model_class(config, train_data._dataset))
    trainer.fit(train_data, valid_data, saved=True, show_progress=False)
    result = trainer.evaluate(test_data, load_best_model=True)
    assert all(np.isfinite(value) for value in result.values()) and config["valid_metric"].lower() in result


# -------------------- errors


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--lora_rr=8", r"lora_rr \(command line\): did you mean lora_r\?"),
        ("--dryrun", r"dryrun \(command line\): did you mean dry_run\?"),
        ("--Learning_Rate=0.1", "did you mean learning_rate"),
        (
            "--hidden_size=8",
            "RecBole's .*RecLoRA does not read; for the lens write lens_config: {hidden_size: ",
        ),
        ("--qqqqqq=1", "properties/overall.yaml lists"),
    ],
)
def test_unknown_keys(argument, message):
    with pytest.raises(ValueError, match=message):
        ours(argument)


def test_unknown_keys_of_files_and_dicts(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("bakcbone: tiny\nepochs: 1\n")
    with pytest.raises(ValueError, match=rf"bakcbone \(file {file}\): did you mean backbone") as raised:
        Config(RecLoRA, "ml-100k", [file], {"num_expert": 3})
    assert "num_expert (config_dict): did you mean num_experts?" in str(raised.value)


def test_keys_that_only_the_model_reads_are_known():
    assert "LABEL_FIELD" in keys_in_source(registry.get_model("DIN"))
    assert "LABEL_FIELD" not in keys_in_source(registry.get_model("SASRec"))
    assert Config("SASRec", "ml-100k", cmd_line=["--hidden_size=8"])["hidden_size"] == 8
    assert Config("SASRecF", "ml-100k", cmd_line=["--selected_features=[class]"])["selected_features"] == [
        "class"
    ]

    class Mine(SequentialRecommender):
        input_type = InputType.POINTWISE

        def __init__(self, config, dataset):
            super().__init__(config, dataset)
            self.width = config["my_width"]

    assert Config(Mine, "ml-100k", config_dict={"my_width": 3})["my_width"] == 3


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("few_shot", -1, "an int >= 0 or a share in (0, 1) or one of auto or ~"),
        ("few_shot", -5, "an int >= 0"),
        ("few_shot", 1.5, "share in (0, 1)"),
        ("few_shot", 1.0, "share in (0, 1)"),
        ("few_shot", True, "an int >= 0"),
        ("few_shot", "many", "an int >= 0"),
        ("eval_rows", 0.5, "an int >= 1 or one of auto or ~"),
        ("lora_r", 0, "an int >= 1"),
        ("lora_r", 8.0, "an int >= 1"),
        ("lora_r", None, "an int >= 1"),
        ("temperature", 0, "a number > 0"),
        ("temperature", float("nan"), "a number > 0"),
        ("lora_dropout", 1.0, "a number in [0, 1)"),
        ("gate", "mlp61", "one of mlp60, linear"),
        ("mixer", "sum", "one of identity"),
        ("lens_residual", 1, "true or false"),
        ("target_modules", "q_proj", "a list, each entry a str"),
        ("target_modules", [], "a list"),
        ("target_modules", [1], "a list"),
        ("lens_config", [1], "a dict"),
        ("device", "gpu", "auto, cpu, cuda or cuda:N"),
        ("backbone", None, "a str"),
        ("backbone", "", "a str"),
        ("dtype", "fp32", "float32"),
        ("learner", "adamm", "adamw"),
        ("learning_rate", "fast", "a number > 0"),
        ("learning_rate", -1, "a number > 0"),
        ("epochs", 1.5, "an int >= 0"),
        ("threshold", {"rating": "high"}, "each value a number"),
        ("threshold", 4, "a dict"),
        ("task", "rank", "one of ctr"),
        ("text_history_length", -1, "an int >= 0"),
        ("warmup_ratio", 1, "a number in [0, 1)"),
        ("metrics", [], "a list"),
    ],
)
def test_values_out_of_range(key, value, expected):
    with pytest.raises(ValueError, match=re.escape(expected)) as raised:
        ours(**{key: value})
    assert f"{key}={value!r} (config_dict): expected" in str(raised.value)


@pytest.mark.parametrize("value", [1, 0.5, 2048, None])
def test_few_shot_may_be_a_count_a_share_or_all(value):
    assert ours(few_shot=value)["few_shot"] == value


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mixer": "identity", "gate": "linear"}, "one plain LoRA has nothing to mix"),
        (
            {"mixer": "identity", "gate": None, "tune_lens": True, "lens_residual": False},
            "nothing that is trained reads the lens",
        ),
        ({"gate": None}, "mixer='factor' (default) needs a gate"),
        ({"mixer": "expert"}, "lora_r=8 (default) is not divisible by num_experts=16"),
        ({"top_k": 17}, "top_k=17 (config_dict) is more than num_experts=16"),
        ({"mixer": "dense", "top_k": 2}, "no experts to choose from"),
        ({"lens": None}, "mixer='factor' (default) needs a lens"),
        (
            {"lens": None, "mixer": "identity", "lens_residual": True},
            "lens_residual=True (config_dict) needs a lens",
        ),
        ({"lens": None, "mixer": "identity", "lens_rows": "without_few_shot"}, "lens_rows="),
        (
            {"lens": None, "mixer": "identity", "text_retrieval": "semantic", "semantic_vectors": "lens"},
            "needs a lens",
        ),
        ({"lens": "DIM"}, "is not a sequential model of RecBole: did you mean"),
        ({"lens": "LightGCN"}, "is not a sequential model of RecBole"),
        (
            {"lens": "SASRec", "gate_scope": "user_item"},
            "lens='SASRec' (config_dict) does not see the target",
        ),
        ({"id_retrieval": "semantic", "gate_scope": "user"}, "no state made from it is the user's alone"),
        ({"id_retrieval": "semantic", "semantic_vectors": "lens"}, "only the trained lens can choose"),
        ({"lens_rows": "without_few_shot", "few_shot": None}, "no samples would be left for the lens"),
        ({"quantization": "4bit", "device": "cpu"}, "quantization='4bit' (config_dict) needs a CUDA device"),
        ({"dtype": "float16", "device": "cpu"}, "dtype='float16' (config_dict) needs a CUDA device"),
        ({"eval_args": {"mode": "full"}}, "set mode: labeled"),
        ({"eval_args": {"mode": "labeled", "sort": "TO"}}, "sort is not one of split"),
        ({"metrics": ["AUC", "Hit"]}, "Hit rank candidates"),
        ({"metrics": ["AUCC"]}, "no metric named 'AUCC': did you mean AUC?"),
        ({"metrics": ["LogLoss"]}, "valid_metric='AUC' (default) is not among metrics=['LogLoss']"),
        ({"valid_metric": "AUC@10"}, "AUC has no @k"),
        ({"MAX_ITEM_LIST_LENGTH": 5, "id_history_length": 6}, "are the same length"),
        ({"task": None}, "RecLoRA needs task: ctr"),
    ],
)
def test_combinations_that_cannot_be(keys, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ours(**keys)


@pytest.mark.parametrize(
    ("model", "task", "key", "value", "reader"),
    [
        (RecLoRA, "ctr", "two_stage", 20, "next_item"),
        (RecLoRA, "ctr", "rank_history", False, "next_item"),
        ("Stream", "ctr", "eval_mode", "full", "next_item"),
        ("DIN", "ctr", "num_negatives", 5, "next_item"),
        ("iLoRA", "next_item", "residual_rows", 100, "ctr"),
    ],
)
def test_keys_of_the_other_task_have_no_effect_and_are_refused(model, task, key, value, reader):
    default = Config(model, "ml-100k", config_dict={"task": task})[key]
    assert Config(model, "ml-100k", config_dict={"task": task, key: default})[key] == default
    with pytest.raises(
        ValueError,
        match=rf"^{key}={value!r} \(config_dict\) has no effect in the {task} task, only in {reader}: leave",
    ):
        Config(model, "ml-100k", config_dict={"task": task, key: value})


def test_a_saved_run_with_a_key_of_the_other_task_is_read_without_it():
    saved = Config("Stream", "ml-100k", config_dict={"task": "ctr"}).as_dict()
    assert Config.from_dict({**saved, "eval_mode": "full"}).as_dict() == saved


def test_recbole_s_own_combinations():
    with pytest.raises(ValueError, match="must name one of topk"):
        Config("SASRec", "ml-100k", config_dict={"topk": [5]})
    with pytest.raises(ValueError, match="is not among metrics"):
        Config("SASRec", "ml-100k", config_dict={"metrics": ["Recall"]})


def test_derived_values():
    assert ours(mixer="identity")["gate"] is None
    assert ours(lens="SASRec")["gate_scope"] == "user"
    assert ours(gate_scope="user")["gate_scope"] == "user"
    assert ours(id_retrieval="semantic", lens="SASRec")["gate_scope"] == "user_item"
    assert ours(layout="prompt", train_batch_size=4)["micro_batch_size"] == 4
    assert ours(MAX_ITEM_LIST_LENGTH=5)["id_history_length"] == 5
    assert ours(mixer="expert", num_experts=4)["lora_r"] == 8


def test_missing_things(tmp_path):
    with pytest.raises(ValueError, match="no model given: write --model=NAME"):
        Config()
    with pytest.raises(ValueError, match="no dataset given"):
        Config("DIN")
    with pytest.raises(FileNotFoundError, match="no config file at nowhere.yaml"):
        Config("DIN", "ml-100k", ["nowhere.yaml"])
    for content, message in (
        ("a: [1", "not valid YAML"),
        ("- a", "must hold 'key: value' lines, not a list"),
    ):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(ValueError, match=message):
            Config("DIN", "ml-100k", [tmp_path / "bad.yaml"])


@pytest.mark.parametrize(
    ("name", "near"),
    [("SASrec", "SASRec"), ("reclora", "RecLoRA"), ("TallRec", "TALLRec"), ("LightGCM", "LightGCN")],
)
def test_unknown_model(name, near):
    with pytest.raises(ValueError, match=f"did you mean .*{near}"):
        Config(name, "ml-100k")


# -------------------- metrics


def test_gauc_on_labelled_rows():
    config = ours(valid_metric="GAUC")
    assert config["metrics"] == ["AUC", "LogLoss", "ACC", "LabeledGAUC"] and config["valid_metric_bigger"]
    assert config["valid_metric"] == "GAUC"  # the key of the result is gauc
    assert ours(valid_metric="LabeledGAUC")["valid_metric"] == "GAUC"
    assert ours(metrics="GAUC", valid_metric="gauc")["metrics"] == ["LabeledGAUC"]
    assert {"acc", "labeledgauc"} <= set(metric_types)
    ranked = Config("DIN", "ml-100k", config_dict={"metrics": ["GAUC"], "valid_metric": "GAUC"})
    assert ranked["metrics"] == ["GAUC"]  # candidates are ranked: RecBole's own


# -------------------- data_path


def test_data_path(atomic_data, tmp_path):
    config = Config("BPR", "small", cmd_line=[f"--data_path={atomic_data}"])
    assert config["data_path"] == str(atomic_data / "small")
    assert Config("BPR", "small", config_dict={"data_path": f"{atomic_data}/small"})["data_path"].endswith(
        "data/small"
    )
    assert Config("BPR", "ml-1m")["data_path"] == os.path.join("dataset", "ml-1m")
    assert Config("BPR", "ml-1m", cmd_line=["--data_path=../x"])["data_path"] == os.path.join("../x", "ml-1m")


def test_data_path_of_ml_100k(atomic_data, caplog):
    caplog.set_level("INFO")
    packaged = Config("BPR", "ml-100k")["data_path"]
    assert (Path(packaged) / "ml-100k.inter").is_file()
    assert Config("BPR", "ml-100k", cmd_line=[f"--data_path={atomic_data}"])["data_path"] == packaged
    assert "using the copy inside RecBole" in caplog.text
    (atomic_data / "ml-100k").mkdir()
    assert Config("BPR", "ml-100k", cmd_line=[f"--data_path={atomic_data}"])["data_path"] == str(
        atomic_data / "ml-100k"
    )


# -------------------- device


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU{index}")
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("arguments", "device"),
    [
        ([], "cuda"),
        (["--device=auto"], "cuda"),
        (["--device=cpu"], "cpu"),
        (["--device=cuda"], "cuda"),
        (["--device=cuda:1"], "cuda:1"),
        (["--use_gpu=False"], "cpu"),
        (["--gpu_id="], "cpu"),
        (["--gpu_id=~"], "cpu"),
        (["--gpu_id=1"], "cuda:1"),
        (["--gpu_id=1,0"], "cuda:1"),
        (["--gpu_id=0", "--device=cuda:1"], "cuda:1"),
    ],
)
def test_device_with_two_gpus(two_gpus, monkeypatch, arguments, device):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    config = Config("BPR", "ml-100k", cmd_line=arguments)
    assert config["device"] == torch.device(device)
    assert config["use_gpu"] == (device != "cpu")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"
    assert two_gpus == ([torch.device(device)] if ":" in device else [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--device=cuda:7"],
            r"device='cuda:7' \(command line\): no such device; torch sees cuda:0 GPU0, cuda:1 GPU1",
        ),
        (["--gpu_id=7"], r"gpu_id=7 \(command line\): no such device"),
        (["--device=cuda", "--use_gpu=False"], "contradicts use_gpu=False"),
    ],
)
def test_devices_that_are_not_there(two_gpus, arguments, message):
    with pytest.raises(ValueError, match=message):
        Config("BPR", "ml-100k", cmd_line=arguments)


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_asked_for_and_absent(no_gpu, device):
    with pytest.raises(ValueError, match=rf"device='{device}' .*sees no CUDA device .*use --device=cpu"):
        Config("BPR", "ml-100k", cmd_line=[f"--device={device}"])


def test_auto_without_gpu_is_told(no_gpu, caplog, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    caplog.set_level("INFO")
    config = Config("BPR", "ml-100k", cmd_line=["--gpu_id=0"])
    assert config["device"] == torch.device("cpu") and config["use_gpu"] is False
    assert "sees no CUDA device" in caplog.text
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


# -------------------- out


@pytest.mark.parametrize("model", [RecLoRA, "SASRec", "DeepFM"])
def test_as_dict_is_json_and_from_dict_reads_it(model, monkeypatch):
    config = Config(model, "ml-100k", config_dict={"seed": 7, "topk": [10, 20]})
    values = json.loads(json.dumps(config.as_dict()))
    assert values["device"] == str(config["device"]) and values["MODEL_TYPE"] == config["MODEL_TYPE"].name
    if isinstance(model, str):
        again = Config.from_dict(values)
    else:
        known = {"RecLoRA": model}
        monkeypatch.setattr(
            config_module, "get_model", lambda name: known.get(name) or registry.get_model(name)
        )
        again = Config.from_dict(values)
    assert again.as_dict() == values


def test_config_survives_pickling():
    config = Config("SASRec", "ml-100k")
    assert pickle.loads(pickle.dumps(config, protocol=4))["hidden_size"] == 64


# -------------------- registry


def test_registry():
    assert sorted(registry.BUILT_IN_MODELS) == [
        "CoLLM",
        "HLLM",
        "LLaRA",
        "LensPrompt",
        "MoRec",
        "ReLLa",
        "ReLLaX",
        "RecLoRA",
        "SIM",
        "Stream",
        "TALLRec",
        "TALLRecNext",
        "TitleKNN",
        "iLoRA",
    ]
    models = registry.recbole_models()
    assert {"DIN", "SASRec", "DeepFM", "LightGCN", "Pop"} <= set(models)
    assert len(models) > 90
    assert registry.get_model("Pop").type == ModelType.TRADITIONAL


def test_a_protocol_is_found_by_its_name():
    config = Config("LLaRA", "ml-100k", config_file_list=["paper_ilora"])
    assert config["min_rating"] == 3 and config["user_split"] == [8, 1, 1] and config["generate"]
    with pytest.raises(FileNotFoundError, match="paper_ilara"):
        Config("LLaRA", "ml-100k", config_file_list=["paper_ilara"])


def test_auto_sizes_follow_the_device_and_the_user_wins():
    config = Config("LLaRA", "ml-100k", config_dict={"layout": "prompt", "device": "cpu", "eval_rows": 50})
    assert config["few_shot"] == SIZES["cpu"]["few_shot"] and config["eval_rows"] == 50


def test_auto_micro_batches_fill_the_device_and_the_user_wins():
    streams = {"layout": "stream", "device": "cpu"}
    found = {
        "labels": Config("RecLoRA", "ml-100k", config_dict=streams)["micro_batch_size"],
        "titles": Config("iLoRA", "ml-100k", config_dict=streams)["micro_batch_size"],
        "few labels a step": Config(
            "RecLoRA", "ml-100k", config_dict={**streams, "max_prompt_tokens": 64, "train_batch_size": 10}
        )["micro_batch_size"],
        "set": Config("RecLoRA", "ml-100k", config_dict={**streams, "micro_batch_size": 5})[
            "micro_batch_size"
        ],
    }
    assert found == {"labels": 1, "titles": 2, "few labels a step": 10, "set": 5}
    on_cuda = {"device": torch.device("cuda"), "max_prompt_tokens": 384, "train_batch_size": 128}
    on_cuda["micro_batch_size"] = "auto"
    resolve_auto_sizes(on_cuda)
    assert on_cuda["micro_batch_size"] == 21


# -------------------- other people's data


def test_a_text_section_changes_single_keys(tmp_path):
    yaml_file = tmp_path / "mine.yaml"
    yaml_file.write_text("text: {noun: movie, user: critic}\n")
    config = Config(RecLoRA, "ml-1m", [yaml_file], cmd_line=["--text={noun: picture}"])
    text = load_yaml(PROPERTIES / "dataset" / "ml-1m.yaml")["text"]
    assert config["text"] == {**text, "noun": "picture", "user": "critic"}
    assert Config.from_dict(config.as_dict())["text"] == config.as_dict()["text"]


def test_sampled_negatives_are_ignored_with_a_warning(caplog):
    config = ours(train_neg_sample_args={"distribution": "uniform", "sample_num": 1})
    assert config["train_neg_sample_args"]["distribution"] == "none"
    assert "train_neg_sample_args" in caplog.text and "is ignored" in caplog.text


def test_recboles_models_load_all_columns_of_own_data():
    assert Config("SASRec", "shop")["load_col"] is None
    assert Config("SASRec", "ml-100k")["load_col"] == {"inter": ["user_id", "item_id", "rating", "timestamp"]}
    assert Config("SASRec", "shop", config_dict={"load_col": {"inter": ["user_id"]}})["load_col"] == {
        "inter": ["user_id"]
    }
