"""Models with their changes: one tokenizer for lists of models and for the keys behind a name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm import cli
from recbole_llm.comparison.plan import make_plan
from recbole_llm.config.command_line import parse_model, slug, split_models
from recbole_llm.config.configurator import Config

CHANGE = st.from_regex(r"[a-z]{1,5}=(\[q_proj, v_proj\]|'a, b'|\{x: 1, y: \[2, 3\]\}|3|~)", fullmatch=True)
MODEL = st.builds(lambda name, changes: " ".join([name, *changes]), st.from_regex(r"[A-Z][a-z]{1,5}", fullmatch=True),
                  st.lists(CHANGE, max_size=3, unique_by=lambda change: change.partition("=")[0]))  # fmt: skip


@given(st.lists(MODEL, min_size=1))
def test_blanks_and_commas_in_brackets_and_quotes_separate_nothing(models):
    assert split_models(", ".join(models)) == models
    for model in models:
        name, values = parse_model(model)
        assert len(values) == model.count("=") and name == model.split()[0]


def test_changes_behind_the_name():
    text = "RecLoRA target_modules=[q_proj, v_proj] lens_config={epochs: 2, embedding_size: 8} run_name='a b'"
    name, values = parse_model(text)
    assert name == "RecLoRA" and values == {
        "target_modules": ["q_proj", "v_proj"],
        "lens_config": {"epochs": 2, "embedding_size": 8},
        "run_name": "a b",
    }
    assert slug("iLoRA gate=uniform") == "iLoRA-gate=uniform"


@pytest.mark.parametrize("text", ["RecLoRA target_modules=[q_proj", "RecLoRA run_name='a", "RecLoRA x=1]"])
def test_what_is_not_closed_is_refused(text):
    for parse in (split_models, parse_model):
        with pytest.raises(ValueError, match="brackets and quotes must be closed"):
            parse(text)


def test_the_command_says_so_in_one_line(capsys):
    assert cli.main(["--model=RecLoRA target_modules=[q_proj"]) == 2
    assert capsys.readouterr().err.startswith("error: cannot read 'RecLoRA target_modules=[q_proj'")


def test_a_single_run_and_a_comparison_read_the_same_changes(tmp_path):
    text = "RecLoRA target_modules=[q_proj, v_proj] lora_r=4"
    config = Config(text, "ml-100k", cmd_line=["--lora_r=16"])
    assert config["model"] == "RecLoRA" and config["target_modules"] == ["q_proj", "v_proj"]
    assert config["lora_r"] == 4 and config.origins["lora_r"] == f"model {text!r}"
    assert Config(cmd_line=[f"--model={text}", "--dataset=ml-100k"])["lora_r"] == 4
    with pytest.raises(ValueError, match=r"lora_rr \(model 'RecLoRA lora_rr=4'\): did you mean lora_r"):
        Config("RecLoRA lora_rr=4", "ml-100k")
    plan = make_plan([text, "TALLRec"], "ml-100k", config_dict={"output_dir": str(tmp_path)})
    assert plan.runs[0].config["target_modules"] == ["q_proj", "v_proj"]
