"""Reading a causal language model at its output head: which positions go through it, and in which precision.

Only the positions that are asked for go through the head, and a plain head is multiplied in at least float32. In
bfloat16 this matters for quality: a logit near 16 is a multiple of 1/8 there, too coarse to rank items by.

Hooking the head, rather than calling the body and multiplying here, leaves everything an architecture does after it
(Gemma's soft cap, Cohere's and Granite's scales, ...) to the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, else ``model`` itself."""
    return getattr(model, "module", model)


@contextmanager
def replaced_head(
    model: nn.Module,
    gather: Callable[[Tensor], Tensor],
    finish: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Iterator[nn.Module]:
    """The output head sees ``gather(hidden [B, T, d])`` only, and answers ``finish(its input, its output)``.

    Yields:
        The head.

    Raises:
        ValueError: the model has no output head.
    """
    head = unwrapped(model).get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embedding: it is not a causal language model")
    handles = [head.register_forward_pre_hook(lambda _, args: (gather(args[0]), *args[1:]))]
    if finish is not None:
        handles.append(head.register_forward_hook(lambda _, args, output: finish(args[0], output)))
    try:
        yield head
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def precise_head(
    model: nn.Module,
    shape: Sequence[int],
    select: Callable[[Tensor], Tensor],
    token_ids: Tensor | None = None,
) -> Iterator[None]:
    """The head is multiplied with ``select(hidden)`` only, and in at least float32 if it is a plain one.

    Args:
        model: The causal LM.
        shape: B and T of what will go through it.
        select: ``hidden [B, T, d] -> [B, o, d]``.
        token_ids: [w] The tokens whose logits are wanted, [B, o, w]; all of the vocabulary if not given.

    Raises:
        ValueError: when the model runs and its head sees other shapes than ``shape``.
    """
    kept: list[Tensor] = []

    def gather(hidden: Tensor) -> Tensor:
        if hidden.shape[:2] != torch.Size(shape):
            raise ValueError(
                f"the model's head sees {list(hidden.shape)} states for inputs {list(shape)}: models that add "
                "or drop positions (prompt tuning) cannot be read here"
            )
        kept.append(select(hidden))
        # A plain head is multiplied in finish; its own product, in the model's dtype, is not wanted.
        return kept[0][:, :0] if type(head) is nn.Linear else kept[0]

    def finish(_: Tensor, output: Tensor) -> Tensor:
        hidden = kept.pop()
        if type(head) is not nn.Linear:  # adapted or packed head: its own output is the truth
            return output if token_ids is None else output[..., token_ids.to(output.device)]
        weight, bias = head.weight, head.bias
        if token_ids is not None:
            weight, bias = weight[token_ids], None if bias is None else bias[token_ids]
        dtype = at_least_float32(hidden.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return functional.linear(
                hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
            )

    with replaced_head(model, gather, finish) as head:
        yield


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Float32 for formats of 16 bits, else ``dtype`` itself."""
    return torch.promote_types(dtype, torch.float32)


def at_places(hidden: Tensor, places: Tensor) -> Tensor:
    """``hidden [B, T, d]`` at ``places [B, o]``, as [B, o, d]."""
    rows = torch.arange(len(hidden), device=hidden.device)[:, None]
    return hidden[rows, places.to(hidden.device)]
