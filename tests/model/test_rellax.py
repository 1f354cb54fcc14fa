"""ReLLaX: a matrix of the lens's state between A and B, both trained together or A and B taken from another run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recbole_llm.quick_start import load_data_and_model, run_recbole_llm
from recbole_llm.trainer.checkpoint import CheckpointError, load_checkpoint
from recbole_llm.trainer.llm_trainer import LLMTrainer


@pytest.fixture
def source(ctr) -> Path:
    """The folder of a finished ReLLa."""
    result = run_recbole_llm("ReLLa", "toy", config_dict={**ctr, "zero_shot": False, "output_dir": "source"})
    return Path(result["path"]).parent.resolve()


def projections(model):
    """Every adapted projection of a model."""
    for layer in model.adapter.model.get_decoder().layers:
        yield from (layer.self_attn.q_proj, layer.self_attn.v_proj)


def test_margins_are_those_of_the_plain_llm_with_w0_plus_s_b_m_a(parts_of, disturb):
    parts, plain = parts_of("ReLLaX"), parts_of("TALLRec")
    disturb(parts.model)
    parts.model.double(), plain.model.double()
    r, scale = 8, 16 / 8
    rows = parts.test[np.arange(3)]
    for batch in parts.model.micro_batches(rows):
        with torch.no_grad():
            found = parts.model.logits(batch)
        z = parts.lens.represent(batch.interaction)[0].double()
        for row in range(len(batch.rows)):
            for adapted, bare in zip(projections(parts.model), projections(plain.model), strict=True):
                norm, first, _, last = adapted.lora_gate["default"].net
                h = F.layer_norm(z[row], z.shape[-1:], norm.weight, norm.bias)
                delta = last.weight @ F.gelu(first.weight @ h + first.bias) + last.bias
                m = torch.eye(r, dtype=torch.float64) + delta.view(r, r)
                a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
                bare.base_layer.weight.data = (adapted.base_layer.weight + scale * b @ m @ a).detach()
            alone = next(plain.model.micro_batches(rows[batch.rows[row] : batch.rows[row] + 1]))
            alone.input_ids, alone.lengths = batch.input_ids[[row]], batch.lengths[[row]]
            with torch.no_grad():
                expected = plain.model.margin(alone, adapted=False)
            # The head is read in float32.
            torch.testing.assert_close(found[[row]], expected, atol=1e-5, rtol=1e-5)
    states = [gate.net[-1].weight.abs().max() for gate in parts.model.adapter._gates().values()]
    assert min(states) > 0  # the matrices differ from the identity


def test_training_starts_as_the_run_it_takes_a_and_b_from(parts_of, source):
    parts = parts_of("ReLLaX", lora_from=str(source))
    trained, _ = load_checkpoint(source / "best.safetensors")
    state = parts.model.trained_state()
    lora = [name for name in trained if name.endswith((".lora_A", ".lora_B"))]
    assert lora and all(torch.equal(state[name], trained[name]) for name in lora)
    loaded = load_data_and_model(source)
    rows = parts.test[np.arange(len(parts.test))]
    torch.testing.assert_close(parts.model.predict(rows), loaded.model.predict(rows), atol=1e-6, rtol=0)
    assert (parts.model.predict(rows) - parts.model.predict_untrained(rows)).abs().max() > 1e-5


def test_only_the_gate_moves_where_a_and_b_are_given(parts_of, source, tmp_path):
    parts = parts_of("ReLLaX", lora_from=str(source), weight_decay=0.1)
    assert set(parts.model.parameter_groups()) == {"gate"}
    before = {name: tensor.clone() for name, tensor in parts.model.named_parameters()}
    trainer = LLMTrainer(parts.config, parts.model, run_folder=tmp_path, identities=parts.identities)
    trainer._train_epoch(parts.train_data, 0)
    moved = {name for name, p in parts.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_gate" in name for name in moved)
    assert not any(p.requires_grad for p in parts.model.adapter.lora_parameters().values())


def test_a_and_b_are_trained_with_the_gate_by_default(parts_of, tmp_path):
    parts = parts_of("ReLLaX")
    assert set(parts.model.parameter_groups()) == {"lora", "gate"}
    before = {name: tensor.clone() for name, tensor in parts.model.trained_state().items()}
    trainer = LLMTrainer(parts.config, parts.model, run_folder=tmp_path, identities=parts.identities)
    trainer._train_epoch(parts.train_data, 0)
    after = parts.model.trained_state()
    for kind in ("lora_A", "lora_B", "lora_gate"):
        assert all(not torch.equal(after[name], before[name]) for name in before if kind in name), kind


def test_run_from_another_is_read_without_it(ctr, rows_of, source):
    result = run_recbole_llm("ReLLaX", "toy", config_dict={**ctr, "lora_from": str(source)})
    shutil.rmtree(source)
    parts, rows = load_data_and_model(Path(result["path"]).parent), rows_of(result)
    scores = torch.cat([parts.model.predict(batch[0]) for batch in parts.test_data])
    np.testing.assert_array_equal(scores.numpy(), rows["model_score"])
    assert result["trained_parameters"].keys() == {"gate"} and "lora_from" in result["identities"]


@pytest.mark.parametrize("given", [False, True])
def test_a_resumed_run_ends_as_an_unbroken_one(given, ctr, broken_and_resumed, rows_of, source):
    options = {"zero_shot": False, "lora_from": str(source) if given else None}
    unbroken = run_recbole_llm("ReLLaX", "toy", config_dict={**ctr, **options})
    resumed = broken_and_resumed("ReLLaX", 2, **options)
    assert np.array_equal(rows_of(resumed)["model_score"], rows_of(unbroken)["model_score"])


def test_a_run_whose_source_has_changed_is_not_resumed(ctr, broken_and_resumed, source, monkeypatch):
    from recbole_llm.trainer import warm_start

    digests = iter(["one", "two"])
    monkeypatch.setattr(warm_start.PlainLora, "sha256", property(lambda lora: next(digests)))
    with pytest.raises(CheckpointError, match="lora_from: checkpoint one, this run two"):
        broken_and_resumed("ReLLaX", 2, lora_from=str(source))


def test_dry_run_shows_three_prompts(ctr, source):
    options = {**ctr, "dry_run": True, "lora_from": str(source)}
    text = run_recbole_llm("ReLLaX", "toy", config_dict=options)["dry_run"]
    assert text.count("--- prompt of few_shot sample") == 3
    assert "mixer dense" in text and "trained parameters gate" in text


def edited(source: Path, **changes) -> None:
    file = source / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (shutil.rmtree, {}, "is no finished run of recbole_llm: it has no config.json"),
        (lambda f: (f / "best.safetensors").unlink(), {}, "it has no best.safetensors"),
        (lambda f: (f / "result.json").unlink(), {}, "it has no result.json"),
        (lambda f: (f / "best.safetensors").write_bytes(b"x"), {}, "is damaged"),
        (lambda f: edited(f, mixer="factor"), {}, "mixer=factor; a plain LoRA"),
        (None, {"lora_r": 4}, "lora_r: 8 there, 4 here"),
        (None, {"lora_alpha": 8}, "lora_alpha: 16 there, 8 here"),
        (
            None,
            {"target_modules": ["q_proj"]},
            r"target_modules: \['q_proj', 'v_proj'\] there, \['q_proj'\] here",
        ),
        (None, {"seed": 3}, "was tuned on another backbone"),  # seeds the tiny backbone
        (None, {"mixer": "factor"}, "fit mixer: identity and dense only"),
    ],
)
def test_a_source_that_does_not_fit_gets_one_clear_error(spoil, options, message, ctr, source):
    if spoil is not None:
        spoil(source)
    with pytest.raises(ValueError, match=message):
        run_recbole_llm("ReLLaX", "toy", config_dict={**ctr, "lora_from": str(source), **options})


def test_a_source_tuned_on_another_split_is_reported(parts_of, source, caplog):
    parts_of("ReLLaX", lora_from=str(source))
    assert not [record for record in caplog.records if "samples that are tested here" in record.message]
    other = {"split": {"RS": [0.7, 0.1, 0.2]}, "order": "TO", "group_by": None}
    parts_of("ReLLaX", lora_from=str(source), eval_args={**other, "mode": "labeled"})
    assert [record for record in caplog.records if "samples that are tested here" in record.message]
