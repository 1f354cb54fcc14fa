r"""Merge several plain LoRAs of one base model into one, without training.

A LoRA is its update ``U_i = s B_i A_i [d_out, d_in]`` of every projection. Two kinds of methods:

**By weights alone**, computed by PEFT's ``add_weighted_adapter`` (``w_i`` sum to 1 by default):

    =========  ==================================================================  ========
    linear     (sum_i w_i B_i sqrt(s_i)) (sum_i w_i A_i sqrt(s_i))                 rank r
    cat        sum_i w_i U_i, exactly                                              rank sum r_i
    svd        sum_i w_i U_i, truncated by SVD                                     rank R
    ties       TIES (Yadav et al. 2023) of the U_i, truncated by SVD               rank R
    dare       sum_i w_i drop(U_i) / density (Yu et al. 2024), truncated by SVD    rank R
    =========  ==================================================================  ========

PEFT's plain ``ties`` and ``dare_linear`` trim A and B separately; the forms used here trim the update, as the papers
do. PEFT's ``linear`` gives A and B the square roots of the weights, so it is given ``w_i^2``: a LoRA merged with
itself must stay what it is.

**By the inputs of the projections**, ``X_i [d_in, n]``: those of task i's prompts under LoRA i, and ``X~_i``: those of
the same prompts under the merged model. In every projection,

    U* = argmin_U  sum_i lam_i ( |U_i X_i - U X~_i|^2 + e_i |U_i - U|^2 ),      e_i = alpha tr(X~_i X~_i^T) / d_in
       = [sum_i lam_i U_i (X_i X~_i^T + e_i I)] [sum_i lam_i (X~_i X~_i^T + e_i I)]^-1

``regmean`` (Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023) is this with
``X~ = X`` and ``lam_i = w_i``. ``iteris`` (Chen et al., "IterIS: Iterative Inference-Solving Alignment for LoRA
Merging", CVPR 2025) has ``lam_i = w_i |U_i|^2 / |U_i X_i|^2`` and repeats: run the merged model, record ``X~``, solve.
Differences from the papers: products are means over tokens (without padding), the ridge is scaled by the trace instead
of the Frobenius norm and pulls towards the ``U_i`` instead of zero, and RegMean keeps the off-diagonal elements. Solved
in float64. ``U*`` has the columns of all ``U_i``, so at most the rank ``sum_i r_i``; :func:`truncate` cuts it by SVD.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig, LoraModel
from torch import Tensor, nn

BY_WEIGHTS = {
    "linear": "linear",
    "cat": "cat",
    "svd": "svd",
    "ties": "ties_svd",
    "dare": "dare_linear_svd",
}
"""Methods that need no prompts, and PEFT's name of each."""
BY_INPUTS = ("regmean", "iteris")
"""Methods that run the model on prompts of every task."""
METHODS = (*BY_WEIGHTS, *BY_INPUTS)

Batch = tuple[Tensor, Tensor]
"""Right-padded token ids ``[b, T]`` and lengths ``[b]``."""


@dataclass(frozen=True)
class PlainLora:
    """A LoRA without a gate: ``y = W0 x + scale B A x``.

    Attributes:
        pairs: for each projection, by its name in the causal LM, ``A [r, d_in]`` and ``B [d_out, r]``; r may differ.
        scale: s.
        base: what identifies the base model, e.g. the SHA-256 of its weights; ``None``: unknown.
        name: what errors call it.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    scale: float
    base: str | None = None
    name: str = "LoRA"

    @property
    def rank(self) -> int:
        """The largest r."""
        return max(a.shape[0] for a, _ in self.pairs.values())

    def updates(self) -> dict[str, Tensor]:
        """``U = s B A`` of every projection, float64 ``[d_out, d_in]``."""
        return {name: self.scale * b.double() @ a.double() for name, (a, b) in self.pairs.items()}


def check_mergeable(loras: Sequence[PlainLora], weights: Sequence[float] | None = None) -> list[float]:
    """The weights, by default ``1 / N`` each.

    Raises:
        ValueError: if the LoRAs are not of one base model and of the same projections, or the weights do not fit.
    """
    if not loras:
        raise ValueError("there is nothing to merge: name at least one LoRA")
    first = loras[0]
    for other in loras[1:]:
        if other.base != first.base:
            raise ValueError(
                f"{other.name} adapts another base model than {first.name} ({other.base} and {first.base}); only LoRAs "
                "of one base model can be merged"
            )
        shapes = [
            {n: (a.shape[1], b.shape[0]) for n, (a, b) in lora.pairs.items()} for lora in (first, other)
        ]
        if shapes[0] != shapes[1]:
            name = min(n for n in shapes[0].keys() | shapes[1].keys() if shapes[0].get(n) != shapes[1].get(n))
            raise ValueError(
                f"{other.name} and {first.name} do not adapt the same projections ({name}: "
                f"{shapes[1].get(name, 'none')} and {shapes[0].get(name, 'none')}); train them with the same "
                "target_modules"
            )
    weights = [1 / len(loras)] * len(loras) if weights is None else list(weights)
    if len(weights) != len(loras) or not all(weight > 0 for weight in weights):
        raise ValueError(
            f"weights: {weights} must hold one positive number for each of the {len(loras)} LoRAs"
        )
    return weights


# ---------------------------------------------------------------------- by weights alone


@torch.no_grad()
def merge_weights(
    loras: Sequence[PlainLora],
    method: str,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> PlainLora:
    """Merge by a method of :data:`BY_WEIGHTS`; the base model itself is not needed.

    Args:
        loras: LoRAs of one base model.
        method: see the module docstring.
        weights: ``w_i``, positive.
        rank: R of ``svd``, ``ties`` and ``dare``, by default the largest r; with ``linear`` and ``cat`` given by the
            LoRAs, and truncated by SVD if smaller.
        density: share of the elements that ``ties`` and ``dare`` keep.
        seed: of the elements that ``dare`` drops.

    Returns:
        the merged LoRA, float64, with scale 1.

    Raises:
        ValueError: as :func:`check_mergeable`; for ``linear`` also if ranks differ.
    """
    weights = check_mergeable(loras, weights)
    if method == "linear" and len({lora.rank for lora in loras}) > 1:
        ranks = ", ".join(f"{lora.name}: {lora.rank}" for lora in loras)
        raise ValueError(f"method linear adds the factors, which needs equal ranks ({ranks}); use svd")
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    if method == "linear":
        weights = [weight**2 for weight in weights]
    if method == "ties":  # which averages over the LoRAs itself
        weights = [weight * len(loras) for weight in weights]
    tuner, keys = _peft_model(loras)
    options = {"density": density} if method in ("ties", "dare") else {}
    if method in ("svd", "ties", "dare"):
        options["svd_rank"] = rank or max(lora.rank for lora in loras)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuner.add_weighted_adapter(
            [f"lora{i}" for i in range(len(loras))], weights, "merged", BY_WEIGHTS[method], **options
        )
    pairs = {}
    for name, key in keys.items():
        layer = tuner.model.get_submodule(key)
        scale = layer.scaling["merged"]
        a, b = layer.lora_A["merged"].weight.detach(), layer.lora_B["merged"].weight.detach()
        r = min(a.shape[0], b.shape[1])  # PEFT leaves a longer A where an SVD has fewer values than svd_rank
        pairs[name] = scale * a[:r], b[:, :r]
    merged = PlainLora(pairs, 1.0, loras[0].base, f"{method} of {len(loras)} LoRAs")
    return truncate(merged.updates(), rank, base=merged.base) if rank and rank < merged.rank else merged


def _peft_model(loras: Sequence[PlainLora]) -> tuple[LoraModel, dict[str, str]]:
    """The LoRAs as adapters ``lora0, lora1, ...`` of empty linear layers, and the layer of each projection's name."""
    keys = {name: f"p{i}" for i, name in enumerate(loras[0].pairs)}
    layers = nn.ModuleDict()
    for name, (a, b) in loras[0].pairs.items():
        layers[keys[name]] = nn.Linear(a.shape[1], b.shape[0], bias=False, dtype=torch.float64)
    tuner = None
    for i, lora in enumerate(loras):
        config = LoraConfig(
            r=lora.rank, lora_alpha=lora.scale * lora.rank, target_modules=list(keys.values())
        )
        if tuner is None:
            tuner = LoraModel(layers, {"lora0": config}, "lora0")
        else:
            tuner.peft_config[f"lora{i}"] = config
            tuner.inject_adapter(tuner.model, f"lora{i}")
        for name, (a, b) in padded(lora, lora.rank).pairs.items():
            layer = tuner.model.get_submodule(keys[name])
            layer.lora_A[f"lora{i}"].weight.data = a.double().cpu()
            layer.lora_B[f"lora{i}"].weight.data = b.double().cpu()
    return tuner, keys


# ---------------------------------------------------------------------- by the inputs of the projections


@torch.no_grad()
def merge_inputs(
    model: nn.Module,
    loras: Sequence[PlainLora],
    prompts: Sequence[Sequence[Batch]],
    method: str,
    *,
    weights: Sequence[float] | None = None,
    alpha: float = 1e-6,
    rounds: int = 10,
    tolerance: float = 1e-4,
) -> dict[str, Tensor]:
    """Merge by RegMean or IterIS (see the module docstring).

    Args:
        model: the causal LM, with no other adapter active.
        loras: LoRAs of it.
        prompts: for each LoRA, batches of its task's prompts.
        method: ``regmean`` or ``iteris``.
        weights: ``w_i``, positive.
        alpha: of the ridge.
        rounds: of ``iteris``, at most; the first is that of ``X~ = X``. As many as there are layers suffice.
        tolerance: ``iteris`` ends when no projection changes by more than this share of its Frobenius norm.

    Returns:
        ``U*`` of every projection, float64 ``[d_out, d_in]`` on the CPU, not truncated.

    Raises:
        ValueError: as :func:`check_mergeable`; if a LoRA has no prompts.
    """
    weights = check_mergeable(loras, weights)
    if len(prompts) != len(loras) or not all(prompts):
        raise ValueError(f"method {method} needs prompts of every LoRA's task")
    single = [lora.updates() for lora in loras]
    merged: list[dict[str, Tensor]] = single
    for number in range(rounds if method == "iteris" else 1):
        products = [
            input_products(model, batches, own, other if number else None)
            for batches, own, other in zip(prompts, single, merged, strict=True)
        ]
        solved = {}
        for name in single[0]:
            lam = list(weights)
            if method == "iteris":
                lam = [
                    weight * _scale(own[name], found[name].own)
                    for weight, own, found in zip(weights, single, products, strict=True)
                ]
            solved[name] = solve(
                [own[name] for own in single], [found[name] for found in products], lam, alpha
            )
        change = max(
            float((solved[name] - merged[0][name]).norm() / solved[name].norm().clamp(min=1e-300))
            for name in solved
        )
        merged = [solved] * len(loras)
        if number and change < tolerance:
            break
    return merged[0]


@dataclass
class Products:
    """Means over the tokens of one task, float64 ``[d_in, d_in]``.

    Attributes:
        own: ``X X^T``.
        cross: ``X X~^T``.
        merged: ``X~ X~^T``.
    """

    own: Tensor
    cross: Tensor
    merged: Tensor


def _scale(update: Tensor, own: Tensor) -> float:
    """``|U|^2 / |U X|^2``; 1 where the update or its effect is zero."""
    effect = float((update @ own @ update.T).trace())
    return float(update.square().sum()) / effect if effect > 0 else 1.0


def solve(
    updates: Sequence[Tensor], products: Sequence[Products], lam: Sequence[float], alpha: float
) -> Tensor:
    """``U*`` of one projection, float64 ``[d_out, d_in]``.

    Args:
        updates: ``U_i [d_out, d_in]`` float64.
        products: of each task.
        lam: ``lam_i``.
        alpha: of the ridge ``e_i = alpha tr(X~_i X~_i^T) / d_in``.
    """
    width = updates[0].shape[1]
    eye = torch.eye(width, dtype=torch.float64)
    left, right = torch.zeros_like(updates[0]), torch.zeros_like(eye)
    for update, found, factor in zip(updates, products, lam, strict=True):
        ridge = alpha * float(found.merged.trace()) / width
        left += factor * update @ (found.cross + ridge * eye)
        right += factor * (found.merged + ridge * eye)
    return torch.linalg.solve(right, left, left=False)


@torch.no_grad()
def input_products(
    model: nn.Module, batches: Sequence[Batch], own: dict[str, Tensor], merged: dict[str, Tensor] | None
) -> dict[str, Products]:
    """Run the model on prompts under two updates, and multiply the inputs of every projection.

    Args:
        own: updates under which ``X`` is recorded.
        merged: updates under which ``X~`` is recorded; ``None``: ``X~ = X``.
    """
    sums: dict[str, Products] = {}
    tokens = 0
    for input_ids, lengths in batches:
        inside = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
        tokens += int(inside.sum())
        x = _inputs(model, input_ids, inside, own)
        y = x if merged is None else _inputs(model, input_ids, inside, merged)
        for name in own:
            a, b = x[name], y[name]
            found = [a.T @ a, a.T @ b, b.T @ b]
            if name in sums:
                found = [old + new for old, new in zip(vars(sums[name]).values(), found, strict=True)]
            sums[name] = Products(*found)
    return {name: Products(*(p / tokens for p in vars(found).values())) for name, found in sums.items()}


def _inputs(
    model: nn.Module, input_ids: Tensor, inside: Tensor, updates: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Inputs of the projections at the real tokens, float64 ``[n, d_in]`` on the CPU."""
    recorded: dict[str, Tensor] = {}
    with applied(model, updates, recorded):
        model.get_decoder()(input_ids=input_ids, use_cache=False)
    return {name: x[inside].double().cpu() for name, x in recorded.items()}


@contextmanager
def applied(
    model: nn.Module, updates: dict[str, Tensor], recorded: dict[str, Tensor] | None = None
) -> Iterator[None]:
    """Let every named projection compute ``layer(x) + U x``, and record its input if asked to.

    Args:
        model: the causal LM; projections may be PEFT's layers, whose adapters the caller disables.
        updates: ``U [d_out, d_in]`` by the projection's name.
        recorded: filled with the last input ``x`` of each projection.
    """
    handles = []
    try:
        for name, update in updates.items():
            layer = model.get_submodule(name)
            update = update.to(layer.weight.device)

            def add(_, inputs, output, name=name, update=update):
                if recorded is not None:
                    recorded[name] = inputs[0]
                return output + nn.functional.linear(inputs[0], update.to(inputs[0].dtype))

            handles.append(layer.register_forward_hook(add))
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------------- updates as a LoRA


def truncate(updates: dict[str, Tensor], rank: int | None = None, *, base: str | None = None) -> PlainLora:
    """The best LoRA of a rank, by the SVD of every update: ``B = P sqrt(S)``, ``A = sqrt(S) Q^T``; scale 1.

    Args:
        updates: ``U [d_out, d_in]`` by the projection's name.
        rank: at most; ``None``: as large as the numerical rank of the largest update.
        base: as of :class:`PlainLora`.
    """
    parts = {name: torch.linalg.svd(update.double(), full_matrices=False) for name, update in updates.items()}
    if rank is None:
        rank = max(1, max(_numerical_rank(s, updates[name].shape) for name, (_, s, _) in parts.items()))
    pairs = {}
    for name, (p, s, q) in parts.items():
        root = s[:rank].sqrt()
        pairs[name] = (root[:, None] * q[:rank], p[:, :rank] * root)
    return PlainLora(pairs, 1.0, base, f"updates of rank {rank}")


def _numerical_rank(singular: Tensor, shape: torch.Size) -> int:
    return int((singular > singular.max() * max(shape) * torch.finfo(singular.dtype).eps).sum())


def padded(lora: PlainLora, rank: int) -> PlainLora:
    """The same LoRA with A and B filled up with zeros to a rank.

    Raises:
        ValueError: if it has a higher rank.
    """
    if lora.rank > rank:
        raise ValueError(f"{lora.name} has rank {lora.rank}, which cannot be written as rank {rank}")
    pad = nn.functional.pad
    return replace(
        lora,
        pairs={
            name: (pad(a, (0, 0, 0, rank - a.shape[0])), pad(b, (0, rank - b.shape[1])))
            for name, (a, b) in lora.pairs.items()
        },
    )


def truncation_error(updates: dict[str, Tensor], lora: PlainLora) -> float:
    """``|U - s B A| / |U|`` over all projections (Frobenius)."""
    got = lora.updates()
    missing = sum(float((updates[name] - got[name]).square().sum()) for name in updates)
    return (missing / max(sum(float(u.square().sum()) for u in updates.values()), 1e-300)) ** 0.5
