"""Slots: places of a prompt that hold a projected vector of the lens instead of a token.

Among token ids a slot is a negative number, so there is no new token and no text that could be taken for one. With an
MLP per kind of vector, ``e`` being the lens's vector of the item, or its state of the sample:

    slot = W2 GELU(W1 e + b1) + b2,         b2 starting at the mean of the LLM's token embeddings
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def mean_embedding(embedding: nn.Embedding) -> Tensor:
    """The mean of all token embeddings, ``[d]`` float32."""
    return embedding.weight.detach().float().mean(dim=0)


def build_projector(width: int, embedding: nn.Embedding) -> nn.Sequential:
    """From vectors ``[n, width]`` to input embeddings ``[n, d]``; starts near the mean token embedding."""
    mean = mean_embedding(embedding)
    projector = nn.Sequential(nn.Linear(width, len(mean)), nn.GELU(), nn.Linear(len(mean), len(mean)))
    with torch.no_grad():
        projector[-1].bias.copy_(mean)
    return projector


def fill_slots(embedding: nn.Module, input_ids: Tensor, vectors_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Input embeddings ``[b, T, d]`` of token ids with slots, ``[b, T]``; all slots are filled by one scatter.

    Args:
        embedding: the LLM's token embedding.
        input_ids: a negative entry is a slot.
        vectors_of: from the mask of the slots ``[b, T]`` to their embeddings ``[n, d]``, in the mask's order.
    """
    is_slot = input_ids < 0
    embedded = embedding(input_ids.clamp(min=0))
    if not bool(is_slot.any()):
        return embedded
    return embedded.index_put((is_slot,), vectors_of(is_slot).to(embedded.dtype))
