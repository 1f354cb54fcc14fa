"""Gates: temperature, top-k, controls and precision."""

import pytest
import torch
from torch import nn

from recbole_llm.adapter import AdapterConfig
from recbole_llm.adapter.gate import DenseGate, SoftmaxGate, build_gate

WIDTH, EXPERTS = 6, 4


def config(**settings):
    settings = {"mixer": "factor", "instance_size": WIDTH, "num_experts": EXPERTS, "r": 3} | settings
    return AdapterConfig(**settings)


@pytest.fixture
def z():
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("gate", ["mlp60", "linear", "uniform", "random", "shuffled"])
def test_rows_are_distributions(gate, z):
    values = build_gate(config(gate=gate), "q").eval()(z)
    assert values.shape == (5, EXPERTS)
    assert (values > 0).all()
    torch.testing.assert_close(values.sum(-1), torch.ones(5))


def test_mlp60_is_the_released_gate():
    net = build_gate(config(gate_dropout=0.1), "q").net
    assert [type(layer) for layer in net] == [nn.LayerNorm, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    assert net[1].weight.shape == (60, WIDTH) and net[4].weight.shape == (EXPERTS, 60)
    assert net[3].p == 0.1
    assert not net[1].bias.any() and not net[4].bias.any()
    assert net[1].weight.abs().max() <= WIDTH**-0.5  # kaiming-uniform with a = sqrt(5)


def test_temperature_divides_the_logits(z):
    gate = build_gate(config(temperature=2.5), "q").eval()
    torch.testing.assert_close(gate(z), (gate.net(z) / 2.5).softmax(-1))


def test_top_k_renormalises_the_largest(z):
    gate = build_gate(config(), "q").eval()
    full = gate(z)
    gate.top_k = 2
    kept = gate(z)
    for row, all_of_it in zip(kept, full, strict=True):
        index = all_of_it.argsort(descending=True)[:2]
        expected = torch.zeros(EXPERTS).index_put((index,), all_of_it[index] / all_of_it[index].sum())
        torch.testing.assert_close(row, expected)


def test_top_k_keeps_k_where_logits_are_equal():
    gate = SoftmaxGate(nn.Linear(WIDTH, EXPERTS), top_k=2)
    nn.init.zeros_(gate.net.weight)
    nn.init.zeros_(gate.net.bias)
    assert (gate(torch.ones(3, WIDTH)) > 0).sum(-1).tolist() == [2, 2, 2]


def test_uniform_is_one_over_k_and_has_no_parameters(z):
    gate = build_gate(config(gate="uniform"), "q")
    assert gate(z).eq(1 / EXPERTS).all()
    assert not list(gate.parameters()) and not gate.state_dict()


def test_random_is_frozen_seeded_and_differs_between_instances_and_projections(z):
    gate = build_gate(config(gate="random"), "q")
    assert not list(gate.parameters())
    torch.manual_seed(123)  # the global generator has no part in it
    again = build_gate(config(gate="random"), "q")
    assert torch.equal(gate(z), again(z))
    for other in (build_gate(config(gate="random"), "v"), build_gate(config(gate="random", seed=1), "q")):
        assert (gate(z) - other(z)).abs().max() > 0.01
    assert gate(z).std(0).max() > 0.01
    torch.testing.assert_close(gate(z), gate(1000 * z), rtol=1e-3, atol=1e-4)  # scale of z plays no part
    assert set(gate.state_dict()) == {"net.weight"}


def test_dropout_is_off_in_eval_mode(z):
    gate = build_gate(config(gate_dropout=0.5), "q")
    assert not torch.equal(gate.train()(z), gate(z))
    assert torch.equal(gate.eval()(z), gate(z))


@pytest.mark.parametrize("name", ["mlp60", "linear", "uniform", "shuffled"])
def test_dense_starts_as_the_identity(name, z):
    gate = build_gate(config(mixer="dense", gate=name), "q")
    assert isinstance(gate, DenseGate)
    assert torch.equal(gate(z), torch.eye(3).expand(5, 3, 3))


def test_dense_is_identity_plus_network(z):
    gate = build_gate(config(mixer="dense"), "q")
    assert [type(layer) for layer in gate.net] == [nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear]
    assert gate.net[1].out_features == 2 * 3**2
    nn.init.normal_(gate.net[-1].weight)
    torch.testing.assert_close(gate(z), torch.eye(3) + gate.net(z).reshape(5, 3, 3))
    assert gate(z).std(0).max() > 0.01


def test_gates_compute_in_float32(z):
    gate = build_gate(config(gate="mlp60"), "q").eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gate(z)
    assert torch.equal(inside, gate(z))
    assert gate.bfloat16()(z.bfloat16()).dtype == torch.float32
