"""HLLM: the language model's layers as a user model, its controls, and what of it is saved."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig

from recbole_llm import quick_start
from recbole_llm.backbone.tiny import tiny_backbone
from recbole_llm.config.configurator import Config
from recbole_llm.config.model_spec import class_for
from recbole_llm.data.create import create_dataset
from recbole_llm.data.stream_batches import VectorStreamLoader
from recbole_llm.experiment.conventional import ConventionalExperiment, llm_arguments
from recbole_llm.model.hllm import HLLM, LabelledHLLM
from recbole_llm.model.llm_user_model import LLMUserModel

SMALL = {
    "stream_length": 8,
    "stream_context": 3,
    "hidden_size": 8,
    "n_layers": 1,
    "inner_size": 8,
    "id_size": 4,
    "train_batch_size": 64,
    "backbone_layers": 1,
    "epochs": 1,
    "bootstrap_samples": 10,
}
LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])


def user_model(**options) -> LLMUserModel:
    torch.manual_seed(3)
    model = tiny_backbone()[0].requires_grad_(False).eval()
    values = {"layers": 1, "pretrained": True, "lora": LORA, **options}
    return LLMUserModel(model, **values).eval()


@pytest.mark.parametrize("lora", [LORA, None])
@pytest.mark.parametrize("pretrained", [True, False])
def test_user_model_is_causal_and_knows_no_padding(lora, pretrained):
    model = user_model(lora=lora, pretrained=pretrained)
    x = torch.randn(3, 7, model.width)
    states = model(x)
    assert states.shape == x.shape
    torch.testing.assert_close(model(x[1:2, :4])[0], states[1, :4], rtol=0, atol=1e-5)
    changed = x.clone()
    changed[:, 4] += 1
    after = model(changed)
    torch.testing.assert_close(after[:, :4], states[:, :4], rtol=0, atol=1e-5)
    assert (after[:, 4:] - states[:, 4:]).abs().amax(dim=-1).min() > 1e-5


def test_the_first_layers_are_the_language_model_s():
    whole = tiny_backbone()[0].eval()
    model = user_model(layers=None)
    x = torch.randn(2, 5, model.width)
    scaled = model.gain.detach() * x
    expected = whole.base_model(inputs_embeds=scaled, use_cache=False).last_hidden_state
    torch.testing.assert_close(model(x), expected)  # a LoRA starts at nothing
    assert float(model.gain) == pytest.approx(float(whole.get_input_embeddings().weight.std()))
    assert not torch.allclose(user_model(layers=1)(x), expected)
    assert not torch.allclose(user_model(layers=None, pretrained=False)(x), expected)


def test_what_is_trained():
    def trained(model) -> set[str]:
        return {name for name, value in model.named_parameters() if value.requires_grad}

    names = trained(user_model())
    assert "gain" in names and all("lora_" in name for name in names - {"gain"}) and len(names) == 5
    full = trained(user_model(lora=None))
    assert any("mlp" in name for name in full) and not any("embed" in name for name in full)


def test_too_many_layers():
    with pytest.raises(ValueError, match="backbone_layers: 5, but the backbone has 2 layers"):
        user_model(layers=5)


def built(toy_settings: dict, **changes):
    options = {**toy_settings, **SMALL, "device": "cpu", **changes}
    config = Config("HLLM", "toy", config_dict=options)
    splits = create_dataset(config).build()
    torch.manual_seed(0)
    arguments, backbone, _ = llm_arguments(config, splits[0])
    return class_for(HLLM, config["task"])(config, splits[0], **arguments), splits, config, backbone


@pytest.mark.parametrize("task", ["next_item", "ctr"])
@pytest.mark.parametrize("who", ["small", "random", "backbone"])
def test_controls_have_no_weights_of_the_language_model(toy_settings, who, task):
    model, (train, *_), config, _ = built(toy_settings, user_model=who, task=task)
    assert type(model) is (LabelledHLLM if task == "ctr" else HLLM)
    pretrained = tiny_backbone(train.item_texts(), seed=config["seed"])[0].base_model.layers[0]
    weight = pretrained.mlp.up_proj.weight
    same = [
        name
        for name, value in model.named_parameters()
        if value.shape == weight.shape and value.equal(weight)
    ]
    assert bool(same) == (who == "backbone")
    loss = model.calculate_loss(next(iter(VectorStreamLoader(config, train))))
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


@pytest.mark.parametrize("who", ["random", "backbone"])
def test_state_is_restored_without_the_backbone_s_own_weights(toy_settings, who):
    model, (_, _, test), *_ = built(toy_settings, user_model=who, eval_mode="full")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 5)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any("mlp" in name and "lora" not in name for name in state) == (who == "random")
    torch.manual_seed(9)
    other, *_ = built(toy_settings, user_model=who, eval_mode="full")
    other.load_state_dict(state)
    batch = test[:5]
    torch.testing.assert_close(
        other.eval().full_sort_predict(batch), model.eval().full_sort_predict(batch), rtol=0, atol=0
    )
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({name: tensor for name, tensor in state.items() if "gain" not in name})


def test_items_are_known_by_vectors_or_ids_or_both(toy_settings):
    both, *_, backbone = built(toy_settings)
    assert both.inputs.items.project is not None and both.inputs.items.ids is not None
    assert backbone["name"] == "tiny"
    ids, *_, none = built(toy_settings, item_vectors=False)
    assert ids.inputs.items.project is None and none is None  # no language model is loaded at all
    titles, *_ = built(toy_settings, id_size=0)
    assert titles.inputs.items.ids is None
    with pytest.raises(ValueError, match="an item needs at least one of"):
        built(toy_settings, id_size=0, item_vectors=False)


@pytest.mark.parametrize(
    "options", [{"eval_mode": "full"}, {"eval_mode": "candidates", "user_model": "backbone"}, {"task": "ctr"}]
)
def test_a_run(toy_settings, options):
    result = quick_start.run_recbole_llm("HLLM", "toy", config_dict={**toy_settings, **SMALL, **options})
    saved = json.loads(Path(result["path"]).read_text())
    assert saved["backbone"]["name"] == "tiny"
    column = "model_score" if options.get("task") == "ctr" else "model_rank"
    with np.load(Path(result["path"]).with_name("test_rows.npz")) as rows:
        assert len(rows[column]) == saved["rows"]["test"]
    assert saved["trained_parameters"]["model"] > 0


@pytest.mark.parametrize("task", ["next_item", "ctr"])
def test_validation_samples_are_bounded_where_the_user_model_costs_layers_of_a_language_model(
    toy_settings, task
):
    def validated(who: str) -> dict:
        given = {**toy_settings, **SMALL, "task": task, "user_model": who, "valid_rows": 7, "device": "cpu"}
        return ConventionalExperiment.assemble(Config("HLLM", "toy", config_dict=given)).sizes

    assert validated("backbone")["valid"] == validated("random")["valid"] == 7
    assert validated("small")["valid"] == validated("small")["valid_available"] > 7
