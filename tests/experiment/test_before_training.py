"""Whatever can be refused is refused before the lens is trained."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import pytest
import transformers as hf
import yaml
from synthetic import write_dataset

from recbole_llm.backbone.tiny import tiny_tokenizer
from recbole_llm.cli import main
from recbole_llm.quick_start import compare_models, run_recbole_llm
from recbole_llm.utils.yaml_files import PROPERTIES, load_yaml


@pytest.fixture
def settings(toy_settings, monkeypatch) -> dict:
    def train(*arguments):
        pytest.fail("the lens is trained")

    monkeypatch.setattr("recbole_llm.lens.fit._train", train)
    return {**toy_settings, "layout": "prompt", "few_shot": 8, "eval_rows": 20, "bootstrap_samples": 0}


def changed_template(tmp_path: Path, name: str, **changes) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**load_yaml(PROPERTIES / "prompt" / f"{name}.yaml"), **changes}))
    return str(path)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    {
        "max_prompt_tokens": ("RecLoRA", {"max_prompt_tokens": 16}, "max_prompt_tokens: 16 is too small"),
        "listed candidates": ("LLaRA", {"max_prompt_tokens": 40}, "max_prompt_tokens: 40 is too small"),
        "target_modules": ("RecLoRA", {"target_modules": ["q_porj"]}, "'q_porj' matches no layer"),
        "lora_layers": ("iLoRA", {"lora_layers": [0, 99]}, r"lora_layers: \[0, 99\] of a model with"),
        "wandb": ("RecLoRA", {"log_wandb": True}, "needs the package wandb"),
        "clip_grad_norm": ("iLoRA", {"clip_grad_norm": {"max_nrom": 1}}, "must hold max_norm"),
        "metrics": ("RecLoRA", {"metrics": ["AUC", "Recal"]}, "did you mean RECALL"),
        "metrics of the other task": ("RecLoRA", {"metrics": ["AUC", "NDCG"]}, "rank candidates"),
        "valid_metric": ("iLoRA", {"valid_metric": "NDCG@7"}, "must name one of topk"),
        "lens_config": ("RecLoRA", {"lens_config": {"hidden": 3}}, "has no key 'hidden'"),
        "learner": ("RecLoRA", {"learner": "adamm"}, "expected one of adam"),
    }.values(),
)
def test_it_is_refused_before_the_lens_is_trained(model, changes, message, settings):
    with pytest.raises(ValueError, match=message):
        run_recbole_llm(model, "toy", config_dict={**settings, **changes})


def test_answer_words_that_begin_alike(settings, tmp_path):
    prompt = changed_template(tmp_path, "ctr", answers=[" zq one", " zq two"])
    with pytest.raises(ValueError, match="begin with the same token"):
        run_recbole_llm("RecLoRA", "toy", config_dict={**settings, "prompt": prompt})


def test_one_title_that_alone_is_too_long_is_found_among_all_samples(settings, tmp_path):
    data = write_dataset(tmp_path / "long")
    item = data / "toy" / "toy.item"
    item.write_text(item.read_text().replace("River Stone", "zq " * 190))
    given = {**settings, "data_path": str(data), "text": {**settings["text"], "max_title_length": None}}
    with pytest.raises(
        ValueError, match=r"max_prompt_tokens: 250 is too small: the prompt for user \d+ and item 21"
    ):
        run_recbole_llm("RecLoRA", "toy", config_dict={**given, "max_prompt_tokens": 250, "eval_rows": None})


@pytest.mark.parametrize("model", ["RecLoRA", "iLoRA"])
def test_a_context_that_is_too_short(model, settings, tmp_path):
    tokenizer = tiny_tokenizer(None, (" Yes", " No"), 1024)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 256}
    hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    given = {**settings, "backbone": str(tmp_path / "gpt2")}
    with pytest.raises(ValueError, match="has 256 learned positions.*set max_prompt_tokens to at most 2"):
        run_recbole_llm(model, "toy", config_dict={**given, "max_prompt_tokens": 257})


SPACES = (None, "learning_rate choise [0.1]\n", "learning_rate choice [\n", "lr choice [0.1]\n")


@pytest.mark.parametrize("content", SPACES)
def test_search_files(content, settings, tmp_path):
    path = tmp_path / "space.hyper"
    if content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError)):
        compare_models(["RecLoRA", "TALLRec"], "toy", config_dict={**settings, "search": str(path)})


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_an_output_that_cannot_show_a_title_is_no_reason_to_stop(encoding, settings, tmp_path, monkeypatch):
    data = write_dataset(tmp_path / "kana")
    item = data / "toy" / "toy.item"
    item.write_text(item.read_text().replace("River", "千と千尋"), encoding="utf-8")
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    given = {**settings, "data_path": str(data), "dry_run": True, "zero_shot": False}
    given.pop("text")
    arguments = [f"--{key}={value}" for key, value in given.items()]
    assert main(["--model=TALLRec", "--dataset=toy", *arguments]) == 0
    out.flush()
    assert "dry run" in out.buffer.getvalue().decode(encoding)


def test_warnings_about_projections_come_once(settings, tmp_path, caplog):
    tokenizer = tiny_tokenizer(None, (" Yes", " No"), 1024)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 512}
    hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    with caplog.at_level(logging.WARNING):
        run_recbole_llm(
            "TALLRec", "toy", config_dict={**settings, "backbone": str(tmp_path / "gpt2"), "dry_run": True}
        )
    assert sum("target_modules" in record.getMessage() for record in caplog.records) == 1
