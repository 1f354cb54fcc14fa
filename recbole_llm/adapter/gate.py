"""Gates: from the instance representation z to expert weights, or to the matrix of the dense mixer.

A gate is a network that gives logits, and a reading of these logits:

    SoftmaxGate   g(z) = softmax(net(z) / temperature) in R^K,      optionally only the top_k largest
    DenseGate     M(z) = I + reshape(net(z))            in R^{r x r}

The networks are the rows of :func:`build_gate`. Gates always compute in at least float32, also under
autocast.

Every network but one maps each row of z on its own. The exception is :class:`ResidualCNN` with batch
normalisation, while it trains: there a row's gate depends on the rows beside it, and running statistics are
kept for evaluation. See :meth:`Gate.observe` for when these move.
"""

from __future__ import annotations

import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_llm.adapter.config import AdapterConfig

_CHANNELS = (16, 32, 64)  # of the three stages of ResidualCNN
_BLOCKS = 3  # per stage
_GROUPS = 4  # of its group normalisation


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
        return F.layer_norm(z, z.shape[-1:]) @ self.weight.T


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation whose running statistics move only while ``observing``.

    A gate runs several times per batch: in every projection that shares it, and again when gradient
    checkpointing recomputes a layer. PyTorch's own would count the same rows each time; with 50 projections
    its statistics would be those of the last batch (0.9 ^ 50 = 0.005 of all others).
    """

    observing = False

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, C, L]``, of the same shape."""
        if self.training and not self.observing:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        return super().forward(x)


class GroupNorm(nn.GroupNorm):
    """Group normalisation with the one argument that the layers of :class:`ResidualCNN` have.

    Args:
        channels: C, a multiple of 4.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(_GROUPS, channels)


class ResidualBlock(nn.Module):
    """``relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))`` with kernels of 3.

    The shortcut has no parameters: where the block halves the length and widens the channels, it keeps every
    second position and adds channels of zeros on both sides.

    Args:
        channels_in: channels of x.
        channels: channels of the result.
        stride: 1, or 2 to halve the length (rounded up).
        norm: class of the normalisation, built with the number of channels.
    """

    def __init__(self, channels_in: int, channels: int, stride: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.stride = stride
        self.padding = (channels - channels_in) // 2
        self.conv1 = nn.Conv1d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = norm(channels)
        self.conv2 = nn.Conv1d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, C_in, L] -> [B, C, ceil(L / stride)]``."""
        shortcut = F.pad(x[..., :: self.stride], (0, 0, self.padding, self.padding))
        return F.relu(shortcut + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class ResidualCNN(nn.Module):
    """The network of iLoRA's released gate: a residual 1-D CNN along the coordinates of z.

    Conv(1 -> 16), 3 stages of 3 residual blocks (16, 32 and 64 channels; the second and third stage halve the
    length), the mean over positions, Linear(64, size). From 64 coordinates to 4 experts that is 90,772
    parameters, where the paper's linear map has 260. It treats z as a signal, although neighbouring
    coordinates of an embedding have nothing in common, and it takes more than ten times as long as an MLP: it
    is here to follow the released code. Of that code's shortcuts it is known that they
    have no parameters; their form here is that of the ResNets for CIFAR-10.

    Args:
        size: number of logits.
        norm: :class:`BatchNorm` as released, or :class:`GroupNorm`, which needs no statistics and keeps rows
            apart in training too.
    """

    def __init__(self, size: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, _CHANNELS[0], 3, padding=1, bias=False)
        self.norm = norm(_CHANNELS[0])
        blocks, before = [], _CHANNELS[0]
        for stage, channels in enumerate(_CHANNELS):
            for block in range(_BLOCKS):
                blocks.append(ResidualBlock(before, channels, 2 if stage and not block else 1, norm))
                before = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, size)

    def forward(self, z: Tensor) -> Tensor:
        """``z [B, H] -> [B, size]``."""
        x = F.relu(self.norm(self.conv(z.unsqueeze(1))))
        return self.head(self.blocks(x).mean(-1))


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

    @torch.no_grad()
    def observe(self, z: Tensor) -> None:
        """Move the running statistics of batch normalisation by one batch; to be called once for each.

        Does nothing outside of training, or where the network has no batch normalisation.

        Args:
            z: the batch's instances ``[B, H]``, anywhere and in any float format.
        """
        norms = [module for module in self.net.modules() if isinstance(module, BatchNorm)]
        if not self.training or not norms:
            return
        like = norms[0].running_mean
        try:
            for norm in norms:
                norm.observing = True
            self.logits(z.to(like.device, like.dtype))
        finally:
            for norm in norms:
                norm.observing = False


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

    ================= ===================================================================================
    ``mlp60``         LayerNorm(H), Linear(H, 60), ReLU, Dropout, Linear(60, K): RecLoRA's
    ``mlp``           the same with H instead of 60
    ``linear``        Linear(H, K), as iLoRA's paper has it
    ``cnn``           :class:`ResidualCNN` with :class:`BatchNorm`, as iLoRA's released code has it
    ``cnn_groupnorm`` the same with :class:`GroupNorm`
    ``token``         LayerNorm(H), Linear(H, K), for a z made of the LLM's own token embeddings. These are
                      small (entries of about 0.02, and a mean over n tokens shrinks them by up to sqrt(n)):
                      without the norm all gates would start at 1/K and hardly leave it
    ``uniform``       :class:`Zeros`
    ``random``        :class:`FrozenRandom`
    ``shuffled``      ``mlp60``; the caller shuffles z
    ================= ===================================================================================

    Linear layers start with kaiming weights and zero biases, as RecLoRA's do.

    Dense gates have r^2 logits instead of K, and ``mlp60`` stands for ReLLaX's LayerNorm(H), Linear(H, 2 r^2),
    GELU, Linear(2 r^2, r^2). Their last layer starts at zero: training starts as a plain LoRA, M = I. (ReLLaX
    starts M at random, which suits it because its A and B are trained before and frozen.)

    Args:
        config: the adapter's configuration; its mixer must not be ``identity``.
        name: the projection's name; gives each ``random`` gate its own draw.

    Returns:
        the gate, in float32 on the CPU.
    """
    dense = config.mixer == "dense"
    net = _network(config, name, config.r**2 if dense else config.experts)
    linears = [module for module in net.modules() if isinstance(module, nn.Linear)]
    for linear in linears:
        nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
        nn.init.zeros_(linear.bias)
    if dense and linears:
        nn.init.zeros_(linears[-1].weight)
    return DenseGate(net, config.r) if dense else SoftmaxGate(net, config.temperature, config.top_k)


def _network(config: AdapterConfig, name: str, size: int) -> nn.Module:
    """``[B, H] -> [B, size]``, the row ``config.gate`` of :func:`build_gate`."""
    kind, width = config.gate, config.instance_size
    if kind == "uniform":
        return Zeros(size)
    if kind == "random":
        return FrozenRandom(width, size, seed=zlib.crc32(f"{config.seed}:{name}".encode()))
    if kind == "linear":
        return nn.Sequential(nn.Linear(width, size))
    if kind == "token":
        # LayerNorm's usual eps of 1e-5 is above the variance of averaged token embeddings.
        return nn.Sequential(nn.LayerNorm(width, eps=1e-10), nn.Linear(width, size))
    if kind in ("cnn", "cnn_groupnorm"):
        return ResidualCNN(size, BatchNorm if kind == "cnn" else GroupNorm)
    if kind != "mlp" and config.mixer == "dense":
        return nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * size), nn.GELU(), nn.Linear(2 * size, size)
        )
    hidden = width if kind == "mlp" else 60
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, hidden),
        nn.ReLU(),
        nn.Dropout(config.gate_dropout),
        nn.Linear(hidden, size),
    )
