"""Mixers against the sums over experts they stand for, in float64, for random shapes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recbole_llm.adapter.mixer import MIXERS, DenseMixer, DiagonalMixer, FactorMixer

sizes = st.tuples(*[st.integers(1, 4)] * 6, st.integers(0, 10**6))  # batch, tokens, d_in, d_out, r, K, seed


def draw(shape):
    batch, tokens, d_in, d_out, r, experts, seed = shape
    generator = torch.Generator().manual_seed(seed)
    make = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64)  # noqa: E731
    x, a, b = make(batch, tokens, d_in), make(experts * r, d_in), make(d_out, experts * r)
    return x, a, b, make(batch, experts).softmax(-1)


def blocks(a, b, experts):
    """Expert k's own pair: rows k r ... of A, columns k r ... of B."""
    r = a.shape[0] // experts
    return [(a[k * r : (k + 1) * r], b[:, k * r : (k + 1) * r]) for k in range(experts)]


@given(sizes)
def test_factor_mixes_a_and_b_separately(shape):
    x, a, b, gate = draw(shape)
    got = FactorMixer.update(x, a, b, gate, 0.7)
    for i in range(len(x)):
        a_z = sum(g * a_k for g, (a_k, _) in zip(gate[i], blocks(a, b, gate.shape[1]), strict=True))
        b_z = sum(g * b_k for g, (_, b_k) in zip(gate[i], blocks(a, b, gate.shape[1]), strict=True))
        torch.testing.assert_close(got[i], 0.7 * (x[i] @ a_z.T @ b_z.T))


@given(sizes)
def test_diagonal_is_the_weighted_sum_of_experts(shape):
    x, a, b, gate = draw(shape)
    got = DiagonalMixer.update(x, a, b, gate, 0.7)
    for i in range(len(x)):
        pairs = zip(gate[i], blocks(a, b, gate.shape[1]), strict=True)
        torch.testing.assert_close(got[i], 0.7 * sum(g * (x[i] @ a_k.T @ b_k.T) for g, (a_k, b_k) in pairs))


@given(sizes)
def test_dense_is_b_m_a(shape):
    x, a, b, _ = draw(shape)
    generator = torch.Generator().manual_seed(shape[-1])
    matrix = torch.randn(len(x), len(a), len(a), generator=generator, dtype=torch.float64)
    got = DenseMixer.update(x, a, b, matrix, 0.7)
    for i in range(len(x)):
        torch.testing.assert_close(got[i], 0.7 * (b @ matrix[i] @ a @ x[i].T).T)


@given(sizes)
def test_fold_gives_the_lora_of_one_instance(shape):
    x, a, b, gate = draw(shape)
    generator = torch.Generator().manual_seed(shape[-1])
    matrix = torch.randn(1, len(a), len(a), generator=generator, dtype=torch.float64)
    for mixer, weights in ((FactorMixer, gate[:1]), (DiagonalMixer, gate[:1]), (DenseMixer, matrix)):
        folded_a, folded_b = mixer.fold(a, b, weights)
        torch.testing.assert_close(x[:1] @ folded_a.T @ folded_b.T, mixer.update(x[:1], a, b, weights, 1.0))


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("name", ["output", "factor"])
def test_experts_never_multiply_the_update(name):
    """Nothing of size [B, T, K, d_out], forward or backward."""
    x, a, b, gate = draw((2, 50, 12, 12, 2, 8, 0))
    for tensor in (x, a, b, gate):
        tensor.requires_grad_()
    with LargestTensor() as largest:
        MIXERS[name].update(x, a, b, gate, 1.0).square().sum().backward()
    assert largest.numel <= 2 * 50 * max(12, 2 * 8)  # [B, T, d], or [B, T, R] in rank space


def test_expert_k_owns_its_slice():
    """A gate that is one for expert 1 gives expert 1's LoRA, squared gates being one too for factor."""
    x, a, b, _ = draw((2, 3, 4, 5, 2, 3, 1))
    gate = torch.tensor([[0.0, 1.0, 0.0]] * 2, dtype=torch.float64)
    alone = x @ a[2:4].T @ b[:, 2:4].T
    for mixer in (FactorMixer, DiagonalMixer):
        torch.testing.assert_close(mixer.update(x, a, b, gate, 1.0), alone)
