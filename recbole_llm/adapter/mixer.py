"""Mixers: the personalised update ``s B M(z) A x`` of one projection, and the plain LoRA it is for a fixed z.

Shapes: ``x [B, T, d_in]``, ``a [R, d_in]``, ``b [d_out, R]``; experts are stacked along R, expert k being
rows (of a) and columns (of b) ``k R/K ... (k+1) R/K - 1``. All mixing happens in rank space: the largest
tensors are ``x``, the update and, for ``factor``, one pair per instance; nothing of size ``[B, T, K, d_out]``
exists.

Where every token has an instance of its own (streams), ``token_update`` takes ``tokens [B, T]``, which says whose
row of the gates ``[N, ...]`` each token has. Mixing is in rank space there, too, token by token.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Mixer(Protocol):
    """What the layer needs of a mixer; ``weights`` are what the gate gives, ``[B, K]`` or ``[B, r, r]``."""

    @staticmethod
    def update(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, scale: float, /) -> Tensor:
        """``s B M(z) A x``, ``[B, T, d_out]``."""

    @staticmethod
    def token_update(
        x: Tensor, a: Tensor, b: Tensor, weights: Tensor, tokens: Tensor, scale: float, /
    ) -> Tensor:
        """The same where the tokens ``[B, T]`` say which of the rows of ``weights`` each of them has."""

    @staticmethod
    def fold(a: Tensor, b: Tensor, weights: Tensor, /) -> tuple[Tensor, Tensor]:
        """The pair ``(A', B')`` with ``B' A' = B M A`` for one instance."""


class DiagonalMixer:
    """``M = diag(g) (x) I``: expert k's slice of the rank axis is multiplied by g_k.

    Used by ``expert`` and ``output``. Equal to ``sum_k g_k B_k A_k x`` at the cost of one LoRA of rank R.
    """

    @staticmethod
    def update(x: Tensor, a: Tensor, b: Tensor, gate: Tensor, scale: float) -> Tensor:
        """``gate [B, K] -> [B, T, d_out]``."""
        h = F.linear(x, a)
        weights = (scale * gate).repeat_interleave(a.shape[0] // gate.shape[-1], dim=-1)
        return F.linear(h * weights.to(h.dtype).unsqueeze(1), b)

    @staticmethod
    def token_update(x: Tensor, a: Tensor, b: Tensor, gate: Tensor, tokens: Tensor, scale: float) -> Tensor:
        """``gate [N, K], tokens [B, T] -> [B, T, d_out]``."""
        h = F.linear(x, a)
        weights = (scale * gate).repeat_interleave(a.shape[0] // gate.shape[-1], dim=-1)
        return F.linear(h * weights.to(h.dtype)[tokens], b)

    @staticmethod
    def fold(a: Tensor, b: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """The pair ``(A', B')`` with ``B' A' = B M A`` for one instance, ``gate [1, K]``; rank R."""
        weights = gate.squeeze(0).repeat_interleave(a.shape[0] // gate.shape[-1])
        return weights.to(a.dtype).unsqueeze(-1) * a, b


class FactorMixer:
    """``M = (g g^T) (x) I``: a LoRA of rank r = R / K with ``A(z) = sum_k g_k A_k, B(z) = sum_k g_k B_k``.

    The pairs are built once per instance, at a cost that does not depend on the number of tokens, outside
    autocast: what is mixed are parameters, and rounding them before the sum would lose what distinguishes two
    instances.
    """

    @staticmethod
    def update(x: Tensor, a: Tensor, b: Tensor, gate: Tensor, scale: float) -> Tensor:
        """``gate [B, K] -> [B, T, d_out]``."""
        a_z, b_z = FactorMixer.pairs(a, b, gate)
        # The scale goes on B(z), [B, r, d_out]: smaller than the update whenever there are more than r
        # tokens.
        return torch.bmm(torch.bmm(x, a_z.transpose(1, 2)), b_z * scale)

    @staticmethod
    def token_update(x: Tensor, a: Tensor, b: Tensor, gate: Tensor, tokens: Tensor, scale: float) -> Tensor:
        """``gate [N, K], tokens [B, T] -> [B, T, d_out]``.

        With ``h_k = A_k x``, ``sum_k g_k h_k`` of r numbers is expanded again by ``g`` to the R columns of B: a pair
        of matrices per interaction would be larger than x.
        """
        experts = gate.shape[-1]
        h = F.linear(x, a).unflatten(-1, (experts, -1))
        g = gate.to(h.dtype)[tokens].unsqueeze(-1)  # [B, T, K, 1]
        mixed = (g * h).sum(dim=-2, keepdim=True) * scale
        return F.linear((g * mixed).flatten(-2), b)

    @staticmethod
    def pairs(a: Tensor, b: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """``A(z) [B, r, d_in]`` and ``B(z)`` transposed, ``[B, r, d_out]``, each by one matrix product."""
        experts = gate.shape[-1]
        r = a.shape[0] // experts
        with torch.autocast(a.device.type, enabled=False):
            gate = gate.to(a.dtype)
            a_z = gate @ a.reshape(experts, -1)
            b_z = gate @ b.T.reshape(experts, -1)
        return a_z.unflatten(-1, (r, a.shape[1])), b_z.unflatten(-1, (r, b.shape[0]))

    @staticmethod
    def fold(a: Tensor, b: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """The pair ``(A', B')`` with ``B' A' = B M A`` for one instance, ``gate [1, K]``; rank R / K."""
        a_z, b_z = FactorMixer.pairs(a, b, gate)
        return a_z.squeeze(0), b_z.squeeze(0).T


class DenseMixer:
    """``M`` is a full ``r x r`` matrix of the instance (CFLoRA)."""

    @staticmethod
    def update(x: Tensor, a: Tensor, b: Tensor, matrix: Tensor, scale: float) -> Tensor:
        """``matrix [B, r, r] -> [B, T, d_out]``."""
        h = F.linear(x, a)
        return F.linear(torch.bmm(h, (scale * matrix).to(h.dtype).transpose(1, 2)), b)

    @staticmethod
    def token_update(x: Tensor, a: Tensor, b: Tensor, matrix: Tensor, tokens: Tensor, scale: float) -> Tensor:
        """``matrix [N, r, r], tokens [B, T] -> [B, T, d_out]``."""
        h = F.linear(x, a)
        return F.linear(((scale * matrix).to(h.dtype)[tokens] @ h.unsqueeze(-1)).squeeze(-1), b)

    @staticmethod
    def fold(a: Tensor, b: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """The pair ``(A', B')`` with ``B' A' = B M A`` for one instance, ``matrix [1, r, r]``; rank r."""
        return matrix.squeeze(0).to(a.dtype) @ a, b


MIXERS: dict[str, type[Mixer]] = {
    "expert": DiagonalMixer,
    "output": DiagonalMixer,
    "factor": FactorMixer,
    "dense": DenseMixer,
}
