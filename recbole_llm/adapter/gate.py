"""Gates: from the instance representation z to expert weights, or to the matrix of the dense mixer.

A gate is a network that gives logits, and a reading of these logits:

    SoftmaxGate   g(z) = softmax(net(z) / temperature) in R^K,      optionally only the top_k largest
    DenseGate     M(z) = I + reshape(net(z))            in R^{r x r}

The networks are the rows of :func:`build_gate`. Gates always compute in at least float32, also under
autocast.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor, nn

from recbole_llm.adapter.config import AdapterConfig


class Zeros(nn.Module):
    """``net(z) = 0``: no parameters. As softmax logits, g = 1/K; as dense logits, M = I.

    Args:
        size: number of logits.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, z: Tensor) -> Tensor:
        """``z [B, H] -> [B, size]``."""
        return z.new_zeros(z.shape[0], self.size)


class FrozenRandom(nn.Module):
    """``net(z) = W norm(z)`` with a fixed W, entries N(0, 1/H), drawn from ``seed`` and saved as a buffer.

    ``norm`` is a LayerNorm without parameters, so that logits have a standard deviation of about 1 whatever
    the scale of z. The gate differs between instances, but nothing in it was learned: a control for "any
    routing helps".

    Args:
        in_size: H.
        size: number of logits.
        seed: of W.
    """

    def __init__(self, in_size: int, size: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(size, in_size, generator=generator) / math.sqrt(in_size)
        self.register_buffer("weight", weight)

    def forward(self, z: Tensor) -> Tensor:
        """``z [B, H] -> [B, size]``."""
        return nn.functional.layer_norm(z, z.shape[-1:]) @ self.weight.T


class Gate(nn.Module):
    """Runs the network outside autocast: routing decided in bfloat16 is coarse, and the cost is negligible.

    Args:
        net: ``[B, H] -> [B, logits]``.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def logits(self, z: Tensor) -> Tensor:
        """``z [B, H] -> [B, logits]`` in at least float32."""
        with torch.autocast(z.device.type, enabled=False):
            logits = self.net(z)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class SoftmaxGate(Gate):
    """``g = softmax(net(z) / temperature)``, with ``top_k`` over the k largest logits of each row only.

    That is the same as cutting the full softmax to its k largest entries and renormalising.

    Args:
        net: ``[B, H] -> [B, K]``.
        temperature: above 1 flattens, below 1 sharpens.
        top_k: number of experts kept, or ``None`` for all.
    """

    def __init__(self, net: nn.Module, temperature: float = 1.0, top_k: int | None = None) -> None:
        super().__init__(net)
        self.temperature = temperature
        self.top_k = top_k

    def forward(self, z: Tensor) -> Tensor:
        """``z [B, H] -> g [B, K]``, rows sum to 1."""
        logits = self.logits(z) / self.temperature
        if self.top_k is not None:
            values, index = logits.topk(self.top_k, dim=-1)
            logits = torch.full_like(logits, -math.inf).scatter(-1, index, values)
        return logits.softmax(dim=-1)


class DenseGate(Gate):
    """``M = I + reshape(net(z), r x r)``.

    Args:
        net: ``[B, H] -> [B, r * r]``.
        r: rank of the pair that M sits in.
    """

    def __init__(self, net: nn.Module, r: int) -> None:
        super().__init__(net)
        self.r = r

    def forward(self, z: Tensor) -> Tensor:
        """``z [B, H] -> M [B, r, r]``."""
        delta = self.logits(z).unflatten(-1, (self.r, self.r))
        return delta + torch.eye(self.r, dtype=delta.dtype, device=delta.device)


def build_gate(config: AdapterConfig, name: str) -> Gate:
    """The gate of one projection.

    Softmax gates: ``mlp60`` is RecLoRA's LayerNorm(H) -> Linear(H, 60) -> ReLU -> Dropout -> Linear(60, K),
    with its start (kaiming weights, zero biases); ``linear`` is Linear(H, K), as iLoRA's paper has it.

    Dense gates: ``mlp60`` stands for ReLLaX's LayerNorm(H) -> Linear(H, 2 r^2) -> GELU -> Linear(2 r^2, r^2),
    and ``linear`` for Linear(H, r^2). Both have their last layer at zero: training starts as a plain LoRA, M
    = I. (ReLLaX starts M at random, which suits it because its A and B are trained before and frozen.)

    Args:
        config: the adapter's configuration; its mixer must not be ``identity``.
        name: the projection's name; gives each ``random`` gate its own draw.

    Returns:
        the gate, in float32 on the CPU.
    """
    dense = config.mixer == "dense"
    width, size = config.instance_size, config.r**2 if config.mixer == "dense" else config.experts
    if config.gate == "uniform":
        net = Zeros(size)
    elif config.gate == "random":
        net = FrozenRandom(width, size, seed=zlib.crc32(f"{config.seed}:{name}".encode()))
    elif config.gate == "linear":
        net = nn.Sequential(nn.Linear(width, size))
    elif dense:
        net = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * size), nn.GELU(), nn.Linear(2 * size, size)
        )
    else:
        net = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 60),
            nn.ReLU(),
            nn.Dropout(config.gate_dropout),
            nn.Linear(60, size),
        )
    linears = [module for module in net.modules() if isinstance(module, nn.Linear)]
    for linear in linears:
        nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
        nn.init.zeros_(linear.bias)
    if dense and linears:
        nn.init.zeros_(linears[-1].weight)
    return DenseGate(net, config.r) if dense else SoftmaxGate(net, config.temperature, config.top_k)
