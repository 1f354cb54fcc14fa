"""LensPrompt: the prompt says what the lens predicts of the row, and the model is a plain LoRA."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import write_dataset

from recbole_llm.data.prompts.ctr import CTR_TEMPLATE
from recbole_llm.quick_start import load_data_and_model, run_recbole_llm
from recbole_llm.utils.yaml_files import load_yaml, properties_dir

SAID = re.compile(r"likes it with probability (\d\.\d\d)\.\nWill the viewer")


def said(parts, rows) -> list[str]:
    """The number in each prompt, of its text and of its token ids."""
    found = []
    for i, ids in enumerate(parts.model.encode(rows).input_ids):
        text = parts.prompts.text(rows, i)
        assert parts.backbone.tokenizer.decode(ids) == text
        found += SAID.findall(text)
    return found


def test_prompts_say_the_sigmoid_of_the_lens_logit_to_two_decimals(parts_of):
    parts = parts_of("LensPrompt", eval_rows=60)
    for part in (parts.train, parts.test):
        rows = part[np.arange(len(part))]
        _, logit = parts.lens.represent(rows)
        expected = [f"{p:.2f}" for p in (1 / (1 + np.exp(-logit.double().numpy()))).tolist()]
        assert said(parts, rows) == expected and len(set(expected)) > 3


def test_the_score_is_that_of_the_row_in_any_company(parts_of):
    parts = parts_of("LensPrompt")
    together = said(parts, parts.test[np.arange(20)])
    assert said(parts, parts.test[np.arange(20)[::-1].copy()]) == together[::-1]
    assert [said(parts, parts.test[[i]])[0] for i in range(20)] == together


def test_extreme_scores_are_said_and_none_is_missing_from_the_sample_of_lines(parts_of):
    parts = parts_of("LensPrompt")
    rows = parts.test[np.arange(1)]
    for score, text in ((0.0049, "0.00"), (0.734, "0.73"), (0.9951, "1.00")):
        parts.prompts.lens_scores = lambda rows, score=score: torch.tensor([score])
        assert said(parts, rows) == [text]
    sample = [line[1] for line in parts.prompts._sample() if line[0] == "lens_score"]
    assert sample == [f"{cent / 100:.2f}" for cent in range(101)]


def test_everything_else_of_the_prompt_is_that_of_ctr(parts_of):
    parts, plain = (
        parts_of("LensPrompt"),
        parts_of("TALLRec", prompt="ctr", lens=None, lens_config=None),
    )
    rows = parts.test[np.arange(5)]
    for i in range(5):
        lines = parts.prompts.text(rows, i).splitlines()
        assert "\n".join([*lines[:-2], lines[-1]]) == plain.prompts.text(rows, i)


def test_the_update_is_a_plain_lora_and_the_lens_reaches_the_score_by_the_prompt_alone(parts_of, disturb):
    parts = parts_of("LensPrompt")
    disturb(parts.model)
    layer = parts.model.adapter.model.get_decoder().layers[0].self_attn.v_proj.double()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(2, 3, a.shape[1], dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ layer.base_layer.weight.T + 2 * x @ a.T @ b.T)
    layer.float()
    rows = parts.test[np.arange(8)]
    honest = parts.model.predict(rows)
    parts.prompts.lens_scores = lambda rows: torch.full((len(rows),), 0.5)
    assert (parts.model.predict(rows) - honest).abs().max() > 1e-6
    truth = parts.lens.probability(rows)
    parts.prompts.lens_scores = lambda rows: truth
    parts.lens.represent = None  # would fail if it were asked
    assert torch.equal(parts.model.predict(rows), honest)


def test_titles_that_look_like_a_placeholder_stay_text(ctr, parts_of, tmp_path):
    data = write_dataset(tmp_path / "data")
    items = data / "toy" / "toy.item"
    head, *lines = items.read_text().splitlines()
    changed = [re.sub(r"^(\d+)\t[^\t]*", r"\1\tThe {lens_score} of [item vector] \1", line) for line in lines]
    items.write_text("\n".join([head, *changed]) + "\n")
    parts = parts_of("LensPrompt", data_path=str(data))
    rows = parts.test[np.arange(3)]
    assert len(said(parts, rows)) == 3
    text = parts.prompts.text(rows, 0)
    assert text.count("{lens_score} of [item vector]") == 6  # five earlier films and the next one


def test_run_is_written_and_read(ctr, rows_of):
    result = run_recbole_llm("LensPrompt", "toy", config_dict=ctr)
    parts, rows = load_data_and_model(Path(result["path"]).parent), rows_of(result)
    batches = [batch[0] for batch in parts.test_data]
    scores = torch.cat([parts.model.predict(batch) for batch in batches])
    np.testing.assert_array_equal(scores.numpy(), rows["model_score"])
    assert [number for batch in batches for number in said(parts, batch)] == [
        f"{p:.2f}" for p in rows["lens_score"].tolist()
    ]


def test_a_resumed_run_ends_as_an_unbroken_one(ctr, broken_and_resumed, rows_of):
    unbroken = run_recbole_llm("LensPrompt", "toy", config_dict={**ctr, "zero_shot": False})
    resumed = broken_and_resumed("LensPrompt", 2, zero_shot=False)
    assert resumed["trained_on"] == unbroken["trained_on"]
    assert np.array_equal(rows_of(resumed)["model_score"], rows_of(unbroken)["model_score"])


def test_dry_run_shows_three_prompts_with_their_scores(ctr):
    text = run_recbole_llm("LensPrompt", "toy", config_dict={**ctr, "dry_run": True})["dry_run"]
    assert text.count("--- prompt of few_shot sample") == len(SAID.findall(text)) == 3


def test_without_a_lens_there_is_nothing_to_say(ctr):
    with pytest.raises(ValueError, match="prompt: ctr_lens states the lens's score, but lens is ~"):
        run_recbole_llm("LensPrompt", "toy", config_dict={**ctr, "lens": None, "lens_config": None})


def test_a_prompt_without_the_score_would_be_another_model(ctr):
    with pytest.raises(ValueError, match="prompt: ctr does not state the lens's score"):
        run_recbole_llm("LensPrompt", "toy", config_dict={**ctr, "prompt": "ctr"})


def test_a_line_of_the_lens_without_its_number_is_refused():
    template = load_yaml(properties_dir() / "prompt" / "ctr_lens.yaml")
    with pytest.raises(ValueError, match="mine: lens_score must hold {lens_score}"):
        CTR_TEMPLATE.check({**template, "lens_score": "It is likely."}, "mine")


def test_the_placeholder_belongs_to_its_line(ctr, tmp_path):
    template = load_yaml(properties_dir() / "prompt" / "ctr_lens.yaml")
    template["question"] = "Like it, at {lens_score}? Answer:"
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(f"{key}: {value!r}" for key, value in template.items()))
    with pytest.raises(ValueError, match=r"mine\.yaml: question has no value for \['lens_score'\]"):
        run_recbole_llm("LensPrompt", "toy", config_dict={**ctr, "prompt": str(path)})
