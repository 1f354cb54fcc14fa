"""The adapter on a whole (tiny, random) language model."""

import logging
import math
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from recbole_llm.adapter.config import AdapterConfig
from recbole_llm.adapter.personalized import attach_adapter

GATED = ["expert", "factor", "output", "dense"]
SLICED = ["expert", "factor", "output"]


def logits(adapter, ids, z):
    adapter.set_instance(z)
    return adapter.peft_model(ids).logits


def train_step(adapter, ids, z):
    """Loss and gradients of one step."""
    adapter.set_instance(z)
    loss = adapter.peft_model(ids).logits.square().mean()
    loss.backward()
    parameters = adapter.lora_parameters() | adapter.gate_parameters()
    return loss, {name: p.grad.clone() for name, p in parameters.items()}


def stock_lora(base, r, alpha, factors, **settings):
    """PEFT's own plain LoRA with the given ``{projection: (A, B)}``."""
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], **settings)
    plain = get_peft_model(base, config)
    with torch.no_grad():
        for name, (a, b) in factors.items():
            layer = plain.get_base_model().get_submodule(name)
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
    return plain.eval()


def factors_of(adapter):
    parameters = adapter.lora_parameters()
    names = [name.removesuffix(".lora_A") for name in parameters if name.endswith(".lora_A")]
    return {name: (parameters[f"{name}.lora_A"], parameters[f"{name}.lora_B"]) for name in names}


# ---------------------------------------------------------------------- the formula


@pytest.mark.parametrize("gate", ["mlp60", "linear", "random"])
@pytest.mark.parametrize("mixer", SLICED)
def test_projection_is_the_sum_over_experts(adapted, batch, mixer, gate):
    _, z = batch
    adapter = adapted(mixer, gate=gate, lora_alpha=3.0)
    layer = adapter.model.model.layers[0].self_attn.v_proj
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    adapter.set_instance(z)
    got = layer(x) - layer.base_layer(x)

    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    width = 1 if mixer == "expert" else 4  # r = 4 cut into 4, or 4 experts of 4
    experts = [(a[k * width : (k + 1) * width], b[:, k * width : (k + 1) * width]) for k in range(4)]
    for i, g in enumerate(adapter.gate_values()["model.layers.0.self_attn.v_proj"]):
        if mixer == "factor":
            a_z = sum(g[k] * experts[k][0] for k in range(4))
            b_z = sum(g[k] * experts[k][1] for k in range(4))
            expected = x[i] @ a_z.T @ b_z.T
        else:
            expected = sum(g[k] * (x[i] @ experts[k][0].T @ experts[k][1].T) for k in range(4))
        torch.testing.assert_close(got[i], (3.0 / width) * expected)


def test_dense_projection_is_b_m_a(adapted, batch):
    _, z = batch
    adapter = adapted("dense", lora_alpha=3.0)
    layer = adapter.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    adapter.set_instance(z)
    got = layer(x) - layer.base_layer(x)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    matrices = torch.eye(4) + layer.lora_gate["default"].net(z).reshape(3, 4, 4)
    torch.testing.assert_close(got, torch.stack([x[i] @ (b @ matrices[i] @ a).T for i in range(3)]) * 3 / 4)
    assert (matrices - torch.eye(4)).abs().max() > 0.1  # not the start


@pytest.mark.parametrize("mixer", SLICED)
def test_one_expert_is_plain_lora(adapted, model, batch, mixer):
    ids, z = batch
    adapter = adapted(mixer, num_experts=1, lora_alpha=5.0)
    plain = stock_lora(model(), 4, 5.0, factors_of(adapter))
    torch.testing.assert_close(logits(adapter, ids, z), plain(ids).logits)
    with adapter.disabled():  # and the adapter matters
        assert (adapter.peft_model(ids).logits - plain(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("mixer", SLICED)
def test_lora_dropout_is_pefts(adapted, model, batch, mixer):
    ids, z = batch
    adapter = adapted(mixer, num_experts=1, lora_alpha=5.0, lora_dropout=0.4)
    plain = stock_lora(model(), 4, 5.0, factors_of(adapter), lora_dropout=0.4)
    still = logits(adapter, ids, z)
    adapter.peft_model.train(), plain.train()
    torch.manual_seed(0)
    dropped = logits(adapter, ids, z)
    torch.manual_seed(0)
    torch.testing.assert_close(dropped, plain(ids).logits)
    assert (dropped - still).abs().max() > 1e-2


def test_identity_is_pefts_own_lora(adapted, model, batch):
    ids, _ = batch
    adapter = adapted("identity", lora_alpha=5.0)
    plain = stock_lora(model(), 4, 5.0, factors_of(adapter))
    assert torch.equal(logits(adapter, ids, None), plain(ids).logits)
    assert adapter.gate_parameters() == {} and adapter.gate_values() == {}


def test_uniform_gate_is_plain_lora(adapted, model, batch):
    ids, z = batch
    adapter = adapted("expert", gate="uniform", lora_alpha=5.0)  # (alpha / (r / K)) / K = alpha / r
    plain = stock_lora(model(), 4, 5.0, factors_of(adapter))
    torch.testing.assert_close(logits(adapter, ids, z), plain(ids).logits)

    adapter = adapted("factor", gate="uniform", lora_alpha=5.0)
    averaged = {
        name: (a.unflatten(0, (4, 4)).mean(0), b.unflatten(1, (4, 4)).mean(1))
        for name, (a, b) in factors_of(adapter).items()
    }
    torch.testing.assert_close(logits(adapter, ids, z), stock_lora(model(), 4, 5.0, averaged)(ids).logits)


@pytest.mark.parametrize("mixer", ["identity", *GATED])
def test_training_starts_at_the_base_model(model, batch, mixer):
    ids, z = batch
    base = model()
    expected = base(ids).logits
    settings = {"instance_size": z.shape[1], "num_experts": 4, "r": 4}
    adapter = attach_adapter(base, AdapterConfig(mixer=mixer, **settings))
    assert torch.equal(logits(adapter, ids, z), expected)
    for name, p in adapter.lora_parameters().items():
        if name.endswith(
            "lora_A"
        ):  # each r x d_in block uniform in +-1/sqrt(d_in), whatever the number of rows
            assert 0.2 < p.abs().max() <= 16**-0.5
            assert abs(p.std().item() - (3 * 16) ** -0.5) < 0.03
        else:
            assert not p.any()


# ---------------------------------------------------------------------- instances


@pytest.mark.parametrize("mixer", GATED)
def test_a_row_does_not_depend_on_the_others(adapted, batch, mixer):
    ids, z = batch
    adapter = adapted(mixer)
    together = logits(adapter, ids, z)
    torch.testing.assert_close(logits(adapter, ids[1:2], z[1:2]), together[1:2])
    others = z.clone()
    others[[0, 2]] = torch.randn(2, z.shape[1], dtype=z.dtype)
    torch.testing.assert_close(logits(adapter, ids, others)[1], together[1])
    others[1] *= -1  # but it does depend on its own
    assert (logits(adapter, ids, others)[1] - together[1]).abs().max() > 1e-3


def test_shuffled_gate_sees_the_previous_row(adapted, batch, caplog):
    ids, z = batch
    shuffled, honest = adapted("factor", gate="shuffled"), adapted("factor", gate="mlp60")
    honest.load_state_dict(shuffled.state_dict())
    torch.testing.assert_close(logits(shuffled, ids, z), logits(honest, ids, z[[2, 0, 1]]))
    with caplog.at_level(logging.WARNING):
        shuffled.set_instance(z[:1])
    assert "batch of one row" in caplog.text


@pytest.mark.parametrize("mixer", GATED)
def test_shared_gate(adapted, batch, mixer):
    ids, z = batch
    adapter, separate = adapted(mixer, share_gate=True), adapted(mixer)
    assert len(separate.gate_parameters()) == 4 * len(adapter.gate_parameters())
    assert all(name.startswith("lora_gate.") for name in adapter.gate_parameters())
    logits(adapter, ids, z), logits(separate, ids, z)
    if mixer != "dense":
        first, *rest = adapter.gate_values().values()
        assert len(rest) == 3 and all(torch.equal(first, other) for other in rest)
        first, *rest = separate.gate_values().values()
        assert not any(torch.allclose(first, other) for other in rest)


def test_gate_values_are_those_of_the_last_forward(adapted, batch):
    ids, z = batch
    adapter = adapted("output", top_k=2)
    assert adapter.gate_values() == {}
    logits(adapter, ids, z)
    values = adapter.gate_values()
    assert sorted(values) == sorted(factors_of(adapter))
    for value in values.values():
        assert value.shape == (3, 4) and not value.requires_grad
        assert (value > 0).sum(-1).tolist() == [2, 2, 2]


@pytest.mark.parametrize("share_gate", [False, True])
@pytest.mark.parametrize("mixer", ["factor", "expert"])
def test_the_mean_gate_is_that_of_all_projections_without_a_forward_pass(adapted, batch, mixer, share_gate):
    ids, z = batch
    adapter = adapted(mixer, share_gate=share_gate)
    mean = adapter.mean_gate(z)
    logits(adapter, ids, z)
    expected = torch.stack(list(adapter.gate_values().values())).mean(dim=0)
    torch.testing.assert_close(mean, expected.to(mean.dtype))


def test_without_experts_there_is_no_mean_gate(adapted, batch):
    assert adapted("dense").mean_gate(batch[1]) is None


def test_the_gate_penalty_is_its_formula_and_moves_the_gates(adapted, batch):
    adapter = adapted("factor", temperature=1.0)
    with pytest.raises(ValueError, match="call set_instance before"):
        adapter.gate_penalty(1.0, 1.0)
    adapter.set_instance(batch[1])
    expected = 0.0
    for gate in adapter._gates().values():
        g = gate(batch[1]).double()
        mean = g.mean(0)
        variation = mean.var(correction=0) / mean.mean() ** 2
        entropy = torch.distributions.Categorical(probs=g).entropy().mean()
        expected += (2.0 * variation + 0.5 * (math.log(4) - entropy)) / len(adapter._gates())
    found = adapter.gate_penalty(2.0, 0.5)
    torch.testing.assert_close(found.double(), expected)
    found.backward()
    assert all(p.grad is not None for p in adapter.gate_parameters().values())
    assert all(p.grad is None for p in adapter.lora_parameters().values())


def test_equal_weights_have_no_penalty(adapted, batch):
    adapter = adapted("factor", gate="uniform")
    adapter.set_instance(batch[1])
    assert float(adapter.gate_penalty(1.0, 1.0)) == pytest.approx(0, abs=1e-6)


def test_instance_from_inference_mode_can_be_trained_with(adapted, batch):
    ids, z = batch
    with torch.inference_mode():
        from_lens = z * 1
    adapter = adapted("factor")
    _, grads = train_step(adapter, ids, from_lens)
    assert all(g.isfinite().all() for g in grads.values())


def test_missing_instance(adapted, batch):
    with pytest.raises(ValueError, match="no instance: call set_instance"):
        adapted("factor").peft_model(batch[0])


def test_forgotten_instance(adapted, batch):
    ids, z = batch
    adapter = adapted("factor")
    logits(adapter, ids, z)
    with pytest.raises(ValueError, match="no instance"):
        logits(adapter, ids, None)


@pytest.mark.parametrize("rows", [1, 2])
def test_batch_of_another_size(adapted, batch, rows):
    ids, z = batch
    with pytest.raises(
        ValueError, match=f"batch size 3, but set_instance was given {rows} rows.*repeat_inter"
    ):
        logits(adapted("expert"), ids, z[:rows])


def test_input_without_batch_axis(adapted, batch):
    adapter = adapted("expert")
    adapter.set_instance(batch[1])
    with pytest.raises(ValueError, match=r"q_proj.*\[batch, tokens, features\]"):
        adapter.model.model.layers[0].self_attn.q_proj(torch.zeros(3, 16, dtype=torch.float64))


@pytest.mark.parametrize("z", [torch.zeros(3, 7), torch.zeros(6), torch.zeros(3, 6, dtype=torch.long)])
def test_wrong_instance(adapted, z):
    with pytest.raises(ValueError, match=r"floating-point tensor \[batch, 6\]"):
        adapted("dense").set_instance(z)


def test_two_models_in_one_process(adapted, batch):
    ids, z = batch
    one, two = adapted("factor"), adapted("expert", seed=5)
    alone = logits(one, ids, z)
    one.set_instance(z)
    two.set_instance(-z[:2])
    two.peft_model(ids[:2])
    torch.testing.assert_close(one.peft_model(ids).logits, alone)


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("share_gate", [False, True])
@pytest.mark.parametrize("mixer", GATED)
def test_gradients_reach_bank_and_gate_and_nothing_else(adapted, batch, mixer, share_gate):
    ids, z = batch
    adapter = adapted(mixer, share_gate=share_gate)
    adapter.peft_model.train()
    train_step(adapter, ids, z)
    ours = adapter.lora_parameters() | adapter.gate_parameters()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in ours.values())
    trained = {id(p) for p in adapter.peft_model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in ours.values()}
    assert all(p.grad is None for p in adapter.peft_model.parameters() if id(p) not in trained)


@pytest.mark.parametrize("gate", ["mlp60", "uniform"])
@pytest.mark.parametrize("mixer", GATED)
def test_gradient_checkpointing_changes_nothing(adapted, batch, mixer, gate):
    ids, z = batch
    adapter = adapted(mixer, gate=gate, gate_dropout=0.3, lora_dropout=0.2)
    adapter.peft_model.train()
    torch.manual_seed(0)
    loss, grads = train_step(adapter, ids, z)
    adapter.peft_model.zero_grad()
    adapter.model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    loss_again, grads_again = train_step(adapter, ids, z)
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


@pytest.mark.parametrize("gate", ["mlp60", "random"])
def test_checkpointing_with_two_instances_before_backward_is_refused(adapted, batch, gate):
    """The recomputation would take the second instance for both, shapes agree, gradients would be wrong."""
    ids, z = batch
    adapter = adapted("factor", gate=gate)
    adapter.peft_model.train()
    both = logits(adapter, ids, z).square().mean() + logits(adapter, ids, -z).square().mean()
    both.backward()  # right without checkpointing
    adapter.model.gradient_checkpointing_enable({"use_reentrant": False})
    both = logits(adapter, ids, z).square().mean() + logits(adapter, ids, -z).square().mean()
    with pytest.raises(ValueError, match="before the next set_instance"):
        both.backward()


@pytest.mark.parametrize("mixer", ["identity", *GATED])
def test_bfloat16_base_keeps_a_float32_adapter(adapted, batch, mixer):
    ids, z = batch
    adapter = adapted(mixer, dtype=torch.bfloat16)
    adapter.peft_model.train()
    parameters = adapter.lora_parameters() | adapter.gate_parameters()
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert adapter.model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert logits(adapter, ids, z.float()).dtype == torch.bfloat16
    _, grads = train_step(adapter, ids, z.float())
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads.values())

    layer = adapter.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 5, 16).bfloat16()
    with torch.no_grad():
        got = layer(x) - layer.base_layer(x)
        doubled = layer.double()
        expected = doubled(x.double()) - doubled.base_layer(x.double())
    torch.testing.assert_close(got.double(), expected, rtol=0.05, atol=0.05)


def test_bfloat16_base_keeps_a_float32_random_gate(adapted):
    """PEFT casts parameters back to float32, but not buffers."""
    tensors = adapted("factor", gate="random", dtype=torch.bfloat16).state_dict()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("mixer", ["identity", *GATED])
def test_autocast(adapted, batch, mixer):
    ids, z = batch
    adapter = adapted(mixer, dtype=torch.float32)
    adapter.peft_model.train()
    exact = logits(adapter, ids, z.float()).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = logits(adapter, ids, z.float())
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.1 * exact.abs().max().item())
    rough.float().square().mean().backward()
    parameters = adapter.lora_parameters() | adapter.gate_parameters()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in parameters.values())


@pytest.mark.parametrize("mixer", ["factor", "output", "dense"])
def test_torch_compile(adapted, batch, mixer):
    ids, z = batch
    adapter = adapted(mixer)
    adapter.peft_model.train()
    loss, grads = train_step(adapter, ids, z)
    other = logits(adapter, ids, -z).detach()
    adapter.peft_model.zero_grad()
    for layer in adapter.model.model.layers:
        layer.compile(backend="eager")
    loss_again, grads_again = train_step(adapter, ids, z)
    torch.testing.assert_close(loss_again, loss)
    torch.testing.assert_close(grads_again, grads)
    torch.testing.assert_close(logits(adapter, ids, -z), other)  # the instance is not baked in
    assert len(adapter.gate_values()) == (0 if mixer == "dense" else 4)
    torch._dynamo.reset()


def test_disabled_is_the_base_model(adapted, model, batch):
    ids, z = batch
    adapter = adapted("factor")
    frozen = next(iter(adapter.gate_parameters().values()))
    frozen.requires_grad_(False)
    with adapter.disabled():
        assert torch.equal(adapter.peft_model(ids).logits, model()(ids).logits)
    assert (logits(adapter, ids, z) - model()(ids).logits).abs().max() > 1e-2
    assert not frozen.requires_grad
    others = list((adapter.lora_parameters() | adapter.gate_parameters()).values())
    assert sum(p.requires_grad for p in others) == len(others) - 1
    assert not adapter.model.lm_head.weight.requires_grad


def test_disabled_ends_with_an_error_inside(adapted, batch):
    adapter = adapted("factor")
    with pytest.raises(KeyError), adapter.disabled():
        raise KeyError
    assert all(p.requires_grad for p in adapter.lora_parameters().values())
    assert (logits(adapter, *batch) - logits(adapter, batch[0], -batch[1])).abs().max() > 1e-3


# ---------------------------------------------------------------------- PEFT


def test_peft_counts_the_gate_among_the_adapter(adapted):
    adapter = adapted("factor")
    names = get_peft_model_state_dict(adapter.peft_model)
    assert sum("lora_gate" in name for name in names) == len(adapter.gate_parameters())
    trainable, _ = adapter.peft_model.get_nb_trainable_parameters()
    ours = adapter.lora_parameters() | adapter.gate_parameters()
    assert trainable == sum(p.numel() for p in ours.values())
    with adapter.peft_model.disable_adapter():  # PEFT freezes what it counts
        assert not any(p.requires_grad for p in ours.values())


@pytest.mark.parametrize("safe", [False, True])
def test_merge_is_refused(adapted, safe):
    adapter = adapted("factor")
    weight = adapter.model.model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    with pytest.raises(ValueError, match="cannot be merged.*recbole-llm export"):
        adapter.peft_model.merge_and_unload(safe_merge=safe)
    with pytest.raises(ValueError, match="cannot be merged"):
        adapter.peft_model.merge_adapter(safe_merge=safe)
    with pytest.raises(ValueError, match="cannot be merged"):
        adapter.model.model.layers[0].self_attn.q_proj.get_delta_weight("default")
    assert torch.equal(adapter.model.model.layers[0].self_attn.q_proj.base_layer.weight, weight)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["query"], r"'query' matches no layer of LlamaForCausalLM.*'down_proj'.*'q_proj'"),
        (["q_proj", "v_porj"], "'v_porj' matches no layer"),  # PEFT adapts q_proj and says nothing
        (["proj"], "'proj' matches no layer"),
        (["embed_tokens"], "'embed_tokens' is not a linear layer"),
        (["self_attn"], "'self_attn' is not a linear layer"),
    ],
)
@pytest.mark.parametrize("mixer", ["identity", "factor"])
def test_unknown_targets(model, mixer, targets, words):
    with pytest.raises(ValueError, match=words):
        attach_adapter(model(), AdapterConfig(mixer=mixer, instance_size=6, target_modules=targets))


def test_targets_by_whole_name(model):
    targets = ["model.layers.1.self_attn.k_proj", "up_proj"]
    adapter = attach_adapter(model(), AdapterConfig(mixer="dense", instance_size=6, target_modules=targets))
    adapted_layers = {name.rsplit(".", 1)[0] for name in adapter.lora_parameters()}
    assert adapted_layers == {targets[0], *(f"model.layers.{i}.mlp.up_proj" for i in range(2))}


@pytest.mark.parametrize("mixer", ["identity", "factor"])
def test_second_adapter_is_refused(adapted, mixer):
    adapter = adapted(mixer)
    for model in (adapter.model, adapter.peft_model):
        with pytest.raises(ValueError, match="already has a PEFT adapter"):
            attach_adapter(model, adapter.config)


def test_attaching_warns_of_nothing(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        attach_adapter(model(), AdapterConfig(mixer="factor", instance_size=6))


# ---------------------------------------------------------------------- state


@pytest.mark.parametrize("gate", ["mlp60", "random", "uniform"])
@pytest.mark.parametrize("share_gate", [False, True])
def test_state_dict_restores_everything(adapted, batch, gate, share_gate):
    ids, z = batch
    settings = {"gate": gate, "share_gate": share_gate}
    one = adapted("factor", **settings, seed=0)
    two = adapted("factor", **settings, seed=0)
    for p in (one.lora_parameters() | one.gate_parameters()).values():
        p.data.add_(0.1)
    for name, tensor in one.state_dict().items():
        if gate == "random" and "lora_gate" in name:
            tensor.add_(1.0)  # the buffer too is restored, not drawn again
    assert (logits(one, ids, z) - logits(two, ids, z)).abs().max() > 1e-3
    two.load_state_dict(one.state_dict())
    assert torch.equal(logits(one, ids, z), logits(two, ids, z))


def test_state_dict_names_are_stable(adapted):
    layer = "model.layers.0.self_attn.q_proj"
    names = list(adapted("factor", gate="linear").state_dict())
    assert [name for name in names if name.startswith(layer)] == [
        f"{layer}.lora_A",
        f"{layer}.lora_B",
        f"{layer}.lora_gate.net.0.weight",
        f"{layer}.lora_gate.net.0.bias",
    ]


def test_load_state_dict_is_strict(adapted):
    adapter = adapted("factor")
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    changed = {name: tensor + 1 for name, tensor in before.items()}
    first = next(iter(changed))
    missing = {name: tensor for name, tensor in changed.items() if name != first}
    with pytest.raises(ValueError, match=f"1 missing .first: {first}"):
        adapter.load_state_dict(missing)
    with pytest.raises(ValueError, match="1 unknown .first: extra"):
        adapter.load_state_dict(changed | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"1 of another shape .first: .*\(2, 2\) instead of \(16, 16\)"):
        adapter.load_state_dict(changed | {first: torch.zeros(2, 2)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state_dict().items())


def test_a_shared_gate_is_evaluated_once_for_all_projections_and_never_stale(adapted, batch):
    ids, z = batch
    adapter = adapted("expert", share_gate=True, gate="linear")
    gate = next(m for m in adapter.model.modules() if hasattr(m, "lora_gate")).lora_gate["default"]
    calls = []
    gate.register_forward_hook(lambda *_: calls.append(1))
    adapter.peft_model.train()
    adapter.set_instance(z)
    adapter.peft_model(ids).logits.sum().backward()
    assert len(calls) == 1
    adapter.peft_model.eval()
    with torch.no_grad():
        adapter.set_instance(z)
        before = adapter.peft_model(ids).logits
        assert len(calls) == 2
        for parameter in adapter.lora_parameters().values():
            parameter.add_(0.1)
        for parameter in adapter.gate_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        changed = adapter.peft_model(ids).logits
        adapter.set_instance(z)
        torch.testing.assert_close(adapter.peft_model(ids).logits, changed)
    assert not torch.allclose(before, changed)
