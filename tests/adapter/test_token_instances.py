"""An instance per interaction: each token is adapted by the instance of the interaction that it belongs to."""

from __future__ import annotations

import pytest
import torch
from formulas import export_instance

from recbole_llm.adapter.mixer import MIXERS

MIXED = ("expert", "output", "factor", "dense")
TOKENS = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 3, 3], [0, 0, 1, 1, 1, 1, 1]])


@pytest.fixture
def instances():
    """An instance for each of four interactions of three sequences."""
    return torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def logits(adapter, ids, z, tokens=None):
    adapter.set_instance(z, tokens)
    return adapter.peft_model(ids, use_cache=False).logits


def plain_sum(name: str, x, a, b, gate, scale):
    """``s B M A x`` of one token ``x [d_in]`` with ``gate [K]``, by the definitions in AdapterConfig."""
    if name == "dense":
        return scale * b @ gate @ a @ x
    k = len(gate)
    parts_a, parts_b = a.chunk(k, dim=0), b.chunk(k, dim=1)
    if name == "factor":
        mixed_a = sum(g * part for g, part in zip(gate, parts_a, strict=True))
        mixed_b = sum(g * part for g, part in zip(gate, parts_b, strict=True))
        return scale * mixed_b @ mixed_a @ x
    return scale * sum(g * pb @ pa @ x for g, pa, pb in zip(gate, parts_a, parts_b, strict=True))


@pytest.mark.parametrize("name", MIXED)
def test_update_is_the_plain_sum_of_each_token(name):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a, b, x = draw(8, 5), draw(7, 8), draw(3, 7, 5)
    gate = draw(10, 8, 8) if name == "dense" else draw(10, 4).softmax(-1)
    tokens = torch.randint(10, (3, 7), generator=generator)
    found = MIXERS[name].token_update(x, a, b, gate, tokens, 1.7)
    for i in range(3):
        for t in range(7):
            wanted = plain_sum(name, x[i, t], a, b, gate[tokens[i, t]], 1.7)
            torch.testing.assert_close(found[i, t], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MIXED)
def test_gradients_are_those_of_the_plain_sum(name):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = torch.tensor([[0, 1, 1]])
    given = [draw(1, 3, 5), draw(8, 5), draw(7, 8), draw(2, 8, 8) if name == "dense" else draw(2, 4)]
    leaves = [[t.clone().requires_grad_() for t in given] for _ in range(2)]
    MIXERS[name].token_update(*leaves[0], tokens, 0.5).square().sum().backward()
    x, a, b, gate = leaves[1]
    sum(plain_sum(name, x[0, t], a, b, gate[tokens[0, t]], 0.5).square().sum() for t in range(3)).backward()
    for mine, wanted in zip(*leaves, strict=True):
        torch.testing.assert_close(mine.grad, wanted.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("share_gate", [False, True])
@pytest.mark.parametrize("name", MIXED)
def test_equal_instances_give_what_one_per_sequence_gives(adapted, batch, name, share_gate):
    ids, z = batch
    adapter = adapted(name, share_gate=share_gate)
    wanted = logits(adapter, ids, z)
    found = logits(adapter, ids, z.unsqueeze(1).expand(-1, 4, -1).contiguous(), TOKENS)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gate", ["mlp60", "linear", "random", "shuffled"])
@pytest.mark.parametrize("name", MIXED)
def test_an_instance_changes_its_own_tokens_and_later_ones_only(adapted, batch, instances, name, gate):
    ids, _ = batch
    adapter = adapted(name, gate=gate)
    before = logits(adapter, ids, instances, TOKENS)
    other = instances.clone()
    other[1, 2] = other[1, 2].flip(-1)  # interaction 2 of sequence 1: its token 4
    changed = (logits(adapter, ids, other, TOKENS) != before).any(-1)
    assert changed[1, 4:].all() and not changed[1, :4].any() and not changed[[0, 2]].any()


def test_uniform_gate_needs_no_instance_of_its_own(adapted, batch, instances):
    ids, z = batch
    adapter = adapted("output", gate="uniform")
    found = logits(adapter, ids, instances, TOKENS)
    torch.testing.assert_close(found, logits(adapter, ids, z), rtol=1e-10, atol=1e-10)


def test_padding_interactions_enter_neither_penalty_nor_statistics(adapted, batch, instances):
    ids, _ = batch
    nowhere = instances.clone()
    nowhere[0, 3] = nowhere[2, 2:] = torch.nan
    for gate in ("mlp60", "cnn"):
        adapter = adapted("output", gate=gate)
        adapter.peft_model.train()
        found = logits(adapter, ids, nowhere, TOKENS)
        assert torch.isfinite(found).all()
        assert torch.isfinite(adapter.gate_penalty(1.0, 1.0))
        assert all(torch.isfinite(t).all() for t in adapter.state_dict().values())
        assert {len(g) for g in adapter.gate_values().values()} == {9}  # interactions that tokens belong to


def test_gradient_checkpointing_sees_the_same_instances(adapted, batch, instances):
    ids, _ = batch
    grads = []
    for checkpointing in (False, True):
        adapter = adapted("factor", gate="mlp60")
        if checkpointing:
            adapter.model.gradient_checkpointing_enable({"use_reentrant": False})
            adapter.peft_model.enable_input_require_grads()
        adapter.peft_model.train()
        logits(adapter, ids, instances, TOKENS).square().mean().backward()
        grads.append([p.grad for p in adapter.lora_parameters().values()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_what_does_not_fit_is_refused(adapted, batch, instances):
    ids, z = batch
    adapter = adapted("output")
    with pytest.raises(ValueError, match=r"\[batch, interactions, 6\]"):
        adapter.set_instance(z, TOKENS)
    with pytest.raises(ValueError, match=r"in \[0, 4\), got torch.int64 of shape \(3, 7\) from 0 to 4"):
        adapter.set_instance(instances, TOKENS + (TOKENS == 3))
    with pytest.raises(ValueError, match=r"int64 tensor \[3, T\]"):
        adapter.set_instance(instances, TOKENS[:2])
    adapter.set_instance(instances, TOKENS[:, :5])
    with pytest.raises(ValueError, match="3 sequences of 7 tokens"):
        adapter.peft_model(ids, use_cache=False)


def test_next_per_sequence_instance_forgets_the_tokens(adapted, batch, instances):
    ids, z = batch
    adapter = adapted("output")
    wanted = logits(adapter, ids, z)
    logits(adapter, ids, instances, TOKENS)
    assert torch.equal(logits(adapter, ids, z), wanted)


# ------------------------------------------------------------------ layers


def test_only_the_layers_asked_for_are_adapted(adapted, batch):
    ids, z = batch
    for mixer in ("output", "identity"):
        adapter = adapted(mixer, layers=[1, 1])
        assert {name.split(".")[2] for name in adapter.lora_parameters()} == {"1"}
        adapter.set_instance(z)
        assert torch.isfinite(adapter.peft_model(ids, use_cache=False).logits).all()


def test_layers_survive_an_export(adapted, model, batch, tmp_path):
    from peft import PeftModel

    ids, z = batch
    adapter = adapted("output", layers=[1, 1])
    wanted = logits(adapter, ids[:1], z[:1])
    export_instance(adapter, z[:1], tmp_path / "plain")
    plain = PeftModel.from_pretrained(model(0, torch.float64), str(tmp_path / "plain")).eval()
    torch.testing.assert_close(plain(ids[:1], use_cache=False).logits, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("layers", "message"),
    [([0, 2], "numbered 0 to 1"), ([1, 0], "first and the last"), ([1], "first and the last")],
)
def test_layers_that_are_not_there(adapted, layers, message):
    with pytest.raises(ValueError, match=message):
        adapted("output", layers=layers)


def test_rank_space_needs_no_update_per_expert():
    """The largest tensors of ``factor`` are of size [B, T, R]: nothing of [B, T, K, d_out]."""
    shapes = []
    gate = torch.full((2, 4), 0.25)
    hook = torch.utils._python_dispatch.TorchDispatchMode

    class Watch(hook):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            shapes.extend(t.numel() for t in ([out] if isinstance(out, torch.Tensor) else []))
            return out

    with Watch():
        MIXERS["factor"].token_update(
            torch.ones(1, 40, 64), torch.ones(8, 64), torch.ones(64, 8), gate, torch.zeros(1, 40).long(), 1.0
        )
    assert max(shapes) == 40 * 64
