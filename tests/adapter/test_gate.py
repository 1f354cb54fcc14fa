"""Gates: networks, temperature, top-k, controls, precision, and statistics of batch normalisation."""

import pytest
import torch
from formulas import export_instance
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from recbole_llm.adapter.config import GATES, AdapterConfig
from recbole_llm.adapter.gate import DenseGate, SoftmaxGate, build_gate
from recbole_llm.adapter.personalized import attach_adapter

WIDTH, EXPERTS = 6, 4
LEARNED = ["mlp60", "linear", "mlp", "cnn", "cnn_groupnorm", "token"]
NEW = ["mlp", "cnn", "cnn_groupnorm", "token"]


def config(**settings):
    settings = {"mixer": "factor", "instance_size": WIDTH, "num_experts": EXPERTS, "r": 3} | settings
    return AdapterConfig(**settings)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Convolutions as small as these lose most of their time to threads waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def z():
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("gate", GATES)
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


def test_mlp_is_as_wide_as_its_input():
    net = build_gate(config(gate="mlp", gate_dropout=0.1), "q").net
    assert [type(layer) for layer in net] == [nn.LayerNorm, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    assert net[1].weight.shape == (WIDTH, WIDTH) and net[4].weight.shape == (EXPERTS, WIDTH)
    assert net[3].p == 0.1


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_token_gate_does_not_depend_on_the_scale_of_embeddings(scale):
    """Also where averaging many tokens has left entries of a thousandth."""
    torch.manual_seed(0)
    gate = build_gate(config(gate="token"), "q").double()
    nn.init.normal_(gate.net[0].weight)
    z = torch.randn(5, WIDTH, dtype=torch.float64)
    centred = z - z.mean(-1, keepdim=True)
    normal = centred / centred.square().mean(-1, keepdim=True).sqrt() * gate.net[0].weight
    expected = (normal @ gate.net[1].weight.T).softmax(-1)
    torch.testing.assert_close(gate(scale * z), expected, rtol=1e-3, atol=1e-4)


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


@pytest.mark.parametrize("name", [*LEARNED, "uniform", "shuffled"])
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


@pytest.mark.parametrize("name", LEARNED)
def test_gates_compute_in_float32(name, z):
    gate = build_gate(config(gate=name), "q").eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gate(z)
    assert torch.equal(inside, gate(z))
    assert gate.bfloat16()(z.bfloat16()).dtype == torch.float32


# ---------------------------------------------------------------------- the convolutional network


def slow_conv(x, weight, stride):
    """``x [B, C_in, L], weight [C, C_in, 3]``, one position at a time, zeros beyond the ends."""
    length = x.shape[-1]
    positions = []
    for centre in range(0, length, stride):
        inside = [(k, centre + k - 1) for k in range(3) if 0 <= centre + k - 1 < length]
        positions.append(sum(x[:, :, at] @ weight[:, :, k].T for k, at in inside))
    return torch.stack(positions, -1)


def slow_norm(x, state, name, kind, statistics):
    """Batch normalisation with the batch's or the running statistics, or group normalisation."""
    if kind == "cnn_groupnorm":
        grouped = x.reshape(len(x), 4, -1)
        mean, var = grouped.mean(-1, keepdim=True), grouped.var(-1, correction=0, keepdim=True)
        normal = ((grouped - mean) / (var + 1e-5).sqrt()).reshape(x.shape)
    elif statistics == "batch":
        mean, var = x.mean((0, 2), keepdim=True), x.var((0, 2), correction=0, keepdim=True)
        normal = (x - mean) / (var + 1e-5).sqrt()
    else:
        mean, var = state[f"{name}.running_mean"][:, None], state[f"{name}.running_var"][:, None]
        normal = (x - mean) / (var + 1e-5).sqrt()
    return normal * state[f"{name}.weight"][:, None] + state[f"{name}.bias"][:, None]


def slow_cnn(z, state, kind, statistics):
    """The network from its tensors: the names of the state, the equations of the docstrings."""
    norm = lambda x, name: slow_norm(x, state, name, kind, statistics)  # noqa: E731
    x = norm(slow_conv(z[:, None], state["conv.weight"], 1), "norm").relu()
    for i in range(9):
        block, stride = f"blocks.{i}", 2 if i in (3, 6) else 1
        inner = norm(slow_conv(x, state[f"{block}.conv1.weight"], stride), f"{block}.norm1").relu()
        inner = norm(slow_conv(inner, state[f"{block}.conv2.weight"], 1), f"{block}.norm2")
        shortcut = torch.zeros_like(inner)
        margin = (inner.shape[1] - x.shape[1]) // 2
        shortcut[:, margin : margin + x.shape[1]] = x[:, :, ::stride]
        x = (shortcut + inner).relu()
    return x.mean(-1) @ state["head.weight"].T + state["head.bias"]


def cnn(kind="cnn", width=WIDTH, batches=3):
    """A float64 gate with parameters and statistics as after some training."""
    torch.manual_seed(5)
    gate = build_gate(config(gate=kind, instance_size=width), "q").double()
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for _ in range(batches):
        gate.observe(torch.randn(4, width, dtype=torch.float64) + 1.0)
    return gate


def statistics_of(gate):
    return {name: buffer.clone() for name, buffer in gate.named_buffers()}


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 4), st.integers(5, 9), st.sampled_from(["batch", "running"]), st.integers(0, 99))
@pytest.mark.parametrize("kind", ["cnn", "cnn_groupnorm"])
def test_cnn_is_its_equations(kind, rows, width, statistics, seed):
    gate = cnn(kind, width).train(statistics == "batch")
    z = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(gate.logits(z), slow_cnn(z, gate.net.state_dict(), kind, statistics))


@pytest.mark.parametrize(("kind", "buffers"), [("cnn", 1395), ("cnn_groupnorm", 0)])
def test_cnn_has_the_released_size(kind, buffers):
    gate = build_gate(config(gate=kind, instance_size=64), "q")
    assert sum(p.numel() for p in gate.parameters()) == 90_772
    assert sum(b.numel() for b in gate.buffers()) == buffers
    assert len(list(gate.parameters())) == 59


def test_statistics_move_once_per_observed_batch():
    """As PyTorch's would by one forward pass per batch: 0.9 old + 0.1 new, variances with n - 1."""
    gate = cnn(batches=0)
    mean, var = torch.zeros(16, dtype=torch.float64), torch.ones(16, dtype=torch.float64)
    for seed in range(3):
        z = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        gate.observe(z)
        x = slow_conv(z[:, None], gate.net.conv.weight, 1)
        mean, var = 0.9 * mean + 0.1 * x.mean((0, 2)), 0.9 * var + 0.1 * x.var((0, 2))
        gate(z), gate(z)  # neither of these counts
    torch.testing.assert_close(gate.net.norm.running_mean, mean)
    torch.testing.assert_close(gate.net.norm.running_var, var)
    assert all(int(n) == 3 for name, n in statistics_of(gate).items() if name.endswith("batches_tracked"))


def test_nothing_is_observed_in_eval_mode():
    gate = cnn().eval()
    before = statistics_of(gate)
    gate.observe(torch.randn(4, WIDTH))
    assert all(torch.equal(buffer, before[name]) for name, buffer in statistics_of(gate).items())


@pytest.mark.parametrize("width", [5, 16])
def test_cnn_trains_on_a_batch_of_one_row(width):
    gate = cnn(width=width)
    z = torch.randn(1, width, dtype=torch.float64)
    gate.observe(z)
    gate(z)[0, 0].backward()
    assert gate(z).isfinite().all() and all(b.isfinite().all() for b in gate.buffers())
    assert all(p.grad.isfinite().all() for p in gate.parameters())


def test_cnn_refuses_instances_that_leave_nothing_to_normalise():
    with pytest.raises(ValueError, match="instance_size of at least 5, got 4; choose gate cnn_groupnorm"):
        config(gate="cnn", instance_size=4)
    assert config(gate="cnn", instance_size=4, mixer="identity").gate == "cnn"  # not built there
    gate = build_gate(config(gate="cnn_groupnorm", instance_size=1), "q")
    assert gate(torch.randn(1, 1)).isfinite().all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", NEW)
def test_rows_of_a_gate_do_not_depend_on_each_other(kind, training):
    """In evaluation and in training; only the released batch normalisation mixes the rows of a training batch."""
    gate = cnn(kind) if kind.startswith("cnn") else build_gate(config(gate=kind, gate_dropout=0.0), "q")
    gate = gate.double().train(training)
    z = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    difference = (gate(z)[1:3] - gate(z[1:3])).abs().max()
    if kind == "cnn" and training:
        assert difference > 1e-3
    else:
        assert difference < 1e-12
    assert gate(z).std(0).max() > 1e-3  # and yet rows differ


# ---------------------------------------------------------------------- on a language model


def trained(adapted, gate, mixer="expert", **settings):
    """An adapter whose one gate has seen 20 batches in training, and its model back in eval mode."""
    adapter = adapted(mixer, gate=gate, share_gate=True, temperature=5.0, **settings)
    adapter.peft_model.train()
    generator = torch.Generator().manual_seed(11)
    for _ in range(20):
        adapter.set_instance(torch.randn(4, WIDTH, generator=generator, dtype=torch.float64) + 0.5)
    adapter.peft_model.eval()
    return adapter


def logits(adapter, ids, z):
    adapter.set_instance(z)
    return adapter.peft_model(ids).logits


@pytest.mark.parametrize("kind", NEW)
def test_a_new_gate_weighs_the_experts_of_one_row(adapted, batch, kind):
    """y = W0 x + s sum_k g_k B_k A_k x with the gate's own g, whatever the other rows are."""
    ids, z = batch
    adapter = trained(adapted, kind, lora_alpha=3.0)
    layer = adapter.model.model.layers[0].self_attn.v_proj
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    adapter.set_instance(z)
    got = layer(x) - layer.base_layer(x)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for i in range(3):
        g = layer.lora_gate["default"](z[i : i + 1])[0]
        expected = sum(g[k] * (x[i] @ a[k : k + 1].T @ b[:, k : k + 1].T) for k in range(4))
        torch.testing.assert_close(got[i], 3.0 * expected)
    alone = logits(adapter, ids[1:2], z[1:2])
    torch.testing.assert_close(alone, logits(adapter, ids, z)[1:2])
    assert (logits(adapter, ids[1:2], z[2:3]) - alone).abs().max() > 1e-3


@pytest.mark.parametrize("kind", NEW)
def test_new_gates_come_back_from_disk_bit_by_bit(adapted, model, batch, tmp_path, kind):
    """The statistics too: released iLoRA loses them, and then its gate hardly differs between users."""
    ids, z = batch
    adapter = trained(adapted, kind)
    save_file(adapter.state_dict(), tmp_path / "adapter.safetensors")
    again = attach_adapter(model(), adapter.config)
    again.load_state_dict(load_file(tmp_path / "adapter.safetensors"))
    again.peft_model.eval()
    saved, restored = adapter.state_dict(), again.state_dict()
    assert saved.keys() == restored.keys()
    assert all(torch.equal(saved[name], restored[name]) for name in saved)
    assert torch.equal(logits(again, ids, z), logits(adapter, ids, z))

    statistics = [name for name in saved if "running" in name or "tracked" in name]
    assert len(statistics) == (57 if kind == "cnn" else 0)
    if statistics:
        with pytest.raises(ValueError, match="57 missing"):
            again.load_state_dict({name: saved[name] for name in saved if name not in statistics})


@pytest.mark.parametrize("mixer", ["expert", "dense"])
@pytest.mark.parametrize("kind", NEW)
def test_one_users_adapter_can_be_exported(adapted, model, batch, tmp_path, kind, mixer):
    ids, z = batch
    adapter = trained(adapted, kind, mixer)
    expected = logits(adapter, ids[:1], z[:1])
    adapter.peft_model.train()
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    export_instance(adapter, z[:1], tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state_dict().items())
    plain = PeftModel.from_pretrained(model(), tmp_path)
    torch.testing.assert_close(plain(ids[:1]).logits, expected)


def test_checkpointing_and_sharing_count_a_batch_once(adapted, batch):
    """A gate shared by four projections, each run again in the backward pass, sees one batch and not eight."""
    ids, z = batch
    results = []
    for checkpointing in (False, True):
        adapter = adapted("expert", gate="cnn", share_gate=True)
        adapter.peft_model.train()
        if checkpointing:
            adapter.model.gradient_checkpointing_enable({"use_reentrant": False})
        logits(adapter, ids, z).square().mean().backward()
        gradients = {name: p.grad for name, p in adapter.gate_parameters().items()}
        results.append({**gradients, **adapter.state_dict()})
    plain, checkpointed = results
    assert any(gradient.any() for name, gradient in plain.items() if name.endswith("conv.weight"))
    for name, tensor in plain.items():
        torch.testing.assert_close(checkpointed[name], tensor)
    (gate,) = {id(g): g for g in adapter.peft_model.modules() if isinstance(g, SoftmaxGate)}.values()
    assert int(gate.net.norm.num_batches_tracked) == 1
    first = slow_conv(z[:, None], gate.net.conv.weight, 1)
    torch.testing.assert_close(gate.net.norm.running_mean, 0.1 * first.mean((0, 2)))
