"""Items by a language model's vectors of their titles, in the place of a table with one row per item.

Reference:
    Zheng Yuan et al. "Where to Go Next for Recommender Systems? ID- vs. Modality-based Recommender Models Revisited"
    (MoRec) in SIGIR 2023, in its two-stage form: frozen encoder, trained projector; and the sum with an ID embedding.
    Jesse Harte et al. "Leveraging Large Language Models for Sequential Recommendation" in RecSys 2023: an ID
    embedding that starts at the first principal components of the LLM's vectors.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def standardised(item_vectors: np.ndarray) -> Tensor:
    """``[n_items, d]`` float32: every column with mean 0 and variance 1 over the items; row 0, the padding, is 0."""
    vectors = torch.as_tensor(item_vectors, dtype=torch.float64)
    return torch.cat([torch.zeros_like(vectors[:1]), _scaled(vectors[1:], vectors[1:])]).float()


def standardised_like(item_vectors: np.ndarray, others: np.ndarray) -> Tensor:
    """``[m, d]`` float32: the vectors of other items, scaled as :func:`standardised` scales ``item_vectors``."""
    return _scaled(torch.as_tensor(others), torch.as_tensor(item_vectors)[1:]).float()


def _scaled(vectors: Tensor, items: Tensor) -> Tensor:
    vectors, items = vectors.double(), items.double()
    spread = items.std(dim=0, correction=0)
    return (vectors - items.mean(dim=0)) / torch.where(spread > 0, spread, 1)


class TitleEmbedding(nn.Module):
    """``e(i) = P(v(i))``, or with an ID table ``e(i) = P(v(i)) + E(i)``; ``e(0) = 0``.

    ``v`` are the standardised vectors, frozen and not saved; ``P`` is Linear(d, w) and then ``layers`` times GELU and
    Linear(w, w). Stands where an ``nn.Embedding`` stood: it is called with ids, and has ``weight``.

    Args:
        item_vectors: the LLM's, ``[n_items, d]``.
        width: ``w``.
        layers: of ``P`` beyond the first.
        ids: whether there is a table ``E``.
    """

    vectors: Tensor

    def __init__(self, item_vectors: np.ndarray, width: int, layers: int, *, ids: bool) -> None:
        super().__init__()
        self.embedding_dim = width
        self.register_buffer("vectors", standardised(item_vectors), persistent=False)
        blocks: list[nn.Module] = [nn.Linear(self.vectors.shape[1], width)]
        for _ in range(layers):
            blocks += [nn.GELU(), nn.Linear(width, width)]
        self.projector = nn.Sequential(*blocks)
        self.ids = nn.Embedding(len(self.vectors), width, padding_idx=0) if ids else None

    def embed(self, items: Tensor) -> Tensor:
        """``e`` of some items, ``[N]`` -> ``[N, w]``."""
        embedded = self.projector(self.vectors[items])
        if self.ids is not None:
            embedded = embedded + self.ids(items)
        return embedded * (items != 0).unsqueeze(-1)

    def append(self, item_vectors: np.ndarray, others: np.ndarray) -> None:
        """Know more items: ``others [m, d]``, beside those of the training, ``item_vectors [n_items, d]``."""
        added = standardised_like(item_vectors, others).to(self.vectors.device)
        self.vectors = torch.cat([self.vectors, added])

    @property
    def weight(self) -> Tensor:
        """``e`` of every item, ``[n_items, w]``."""
        return self.embed(torch.arange(len(self.vectors), device=self.vectors.device))

    def forward(self, items: Tensor) -> Tensor:
        """``e`` of items, ``[...]`` -> ``[..., w]``; each distinct one is projected once."""
        distinct, place = torch.unique(items, return_inverse=True)
        return F.embedding(place, self.embed(distinct))


@torch.no_grad()
def start_at_components(table: nn.Embedding, item_vectors: np.ndarray) -> None:
    """Set the first columns of an ID table to the principal components of the vectors, as large as the table was.

    All columns together keep their standard deviation. Where the vectors have fewer components than the table has
    columns, the others stay as they are.
    """
    vectors = standardised(item_vectors)[1:].double()
    left, singular, _ = torch.linalg.svd(vectors, full_matrices=False)
    rank = int((singular > 1e-6 * singular[0]).sum())
    used = min(rank, table.embedding_dim)
    components = left[:, :used] * singular[:used]
    scale = table.weight[1:].std() / components.pow(2).mean().sqrt()
    table.weight[1:, :used] = (components * scale).to(table.weight.dtype)
