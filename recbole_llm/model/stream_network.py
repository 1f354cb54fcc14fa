"""Networks and losses of vector streams: one vector per interaction of a user, every interaction a target.

    interaction      1         2         3         4
    input x_t     e(a) + 0  e(b)+r(a) e(c)+r(b) e(d)+r(c)      r(a): what the user did with a (item and stars)
    state h_t        |         |         |         |           causal: h_t sees x_1 ... x_t
    target        stars(a)  stars(b)  stars(c)  stars(d)       labelled task
                     b         c         d         ?           next-item task (x_t = e(i_t) alone)

The state of interaction ``t`` has seen item ``t`` and the stars of all earlier interactions, never its own stars.
Sequences are padded on the right: attention is causal, so no real interaction sees the padding, and a state depends
neither on what comes later nor on the batch.

References:
    Junyi Chen et al. "HLLM: Enhancing Sequential Recommendations via Hierarchical Large Language Models for Item and
    User Modeling", arXiv 2409.12740: the loss over sampled negatives, by cosine with a learned temperature.
    Jiaqi Zhai et al. "Actions Speak Louder than Words", arXiv 2402.17152: every interaction of a user a target.
    Jianlin Su et al. "RoFormer", arXiv 2104.09864: rotary positions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_llm.lens.embedding import FieldEmbedding

MAX_SCALE = math.log(100)
"""Upper bound of the learned log-scale of cosines, as in the released HLLM."""


class ItemEmbedding(nn.Module):
    """``e(i) = W E(i) + P v(i) + F f(i)``, the sum of those parts that are used; ``e(0) = 0``.

    Args:
        n_items: size of the vocabulary, the padding item 0 included.
        width: of ``e``.
        id_size: width of the table ``E``; 0: no table. Without another width there is no ``W``.
        vectors: ``v``, ``[n_items, d]`` float32: the items' text vectors, frozen and not saved; ``None``: none.
        fields: embeds item fields ``f``, such as genres; ``None``: none.
    """

    vectors: Tensor

    def __init__(
        self,
        n_items: int,
        width: int,
        *,
        id_size: int,
        vectors: Tensor | None = None,
        fields: FieldEmbedding | None = None,
    ) -> None:
        super().__init__()
        if not id_size and vectors is None and fields is None:
            raise ValueError("an item needs at least one of id_size > 0, item_vectors: True and item_fields")
        self.width = width
        self.ids = nn.Embedding(n_items, id_size, padding_idx=0) if id_size else None
        self.widen = nn.Linear(id_size, width, bias=False) if id_size not in (0, width) else None
        self.register_buffer("vectors", vectors, persistent=False)
        self.project = None if vectors is None else nn.Linear(vectors.shape[1], width)
        self.fields = fields
        self.of_fields: nn.Module = (
            None if fields is None else nn.Linear(fields.width("item"), width, bias=False)
        )
        if self.ids is not None:
            nn.init.normal_(self.ids.weight, std=id_size**-0.5)
            with torch.no_grad():
                self.ids.weight[0] = 0

    @property
    def titles_suffice(self) -> bool:
        """Whether an item is its text's vector, and nothing else is known of it."""
        return self.project is not None and self.ids is None and self.fields is None

    def append(self, vectors: Tensor) -> None:
        """Know more items by their text vectors, ``[m, d]``."""
        self.vectors = torch.cat([self.vectors, vectors.to(self.vectors.device)])

    def embed(self, items: Tensor) -> Tensor:
        """``e`` of items, ``[N] -> [N, width]``, each computed for itself."""
        parts = []
        if self.ids is not None:
            ids = self.ids(items)
            parts.append(ids if self.widen is None else self.widen(ids))
        if self.project is not None:
            parts.append(self.project(self.vectors[items]))
        if self.fields is not None:
            parts.append(self.of_fields(self.fields("item", items)))
        return sum(parts) * (items != 0).unsqueeze(-1)

    def forward(self, items: Tensor) -> Tensor:
        """``e`` of items, ``[...] -> [..., width]``; each distinct one is computed once."""
        distinct, place = torch.unique(items, return_inverse=True)
        return F.embedding(place, self.embed(distinct))


class StreamInput(nn.Module):
    """The vectors ``x_t`` of a stream.

        labelled     x_t = LayerNorm( e(i_t) + GELU(R [e(i_{t-1}) ; s_{t-1}]) + g_t )
        next item    x_t = LayerNorm( e(i_t) + g_t )

    ``s`` embeds the stars of the PREVIOUS interaction and ``g`` the time since it (optional). With ``previous_item:
    False`` the second term is the embedding of the stars alone, as in the first vector streams; naming the item that
    got the stars spares the network from finding it by attention.

    Args:
        items: the item embedding.
        levels: number of levels of stars, level 0 (unknown, or no previous interaction) included; 0: no stars.
        previous_item: whether the item that got the stars stands beside them.
        gaps: number of buckets of the time since the previous interaction; 0: no time.
        dropout: of ``x``.
    """

    def __init__(
        self, items: ItemEmbedding, *, levels: int, previous_item: bool, gaps: int, dropout: float
    ) -> None:
        super().__init__()
        width = items.width
        self.items = items
        self.stars: nn.Module = nn.Embedding(levels, width, padding_idx=0) if levels else None
        self.event = nn.Linear(2 * width, width) if levels and previous_item else None
        self.gaps = nn.Embedding(gaps, width) if gaps else None
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        for table in (self.stars, self.gaps):
            if table is not None:
                nn.init.normal_(table.weight, std=width**-0.5)
        if self.stars is not None:
            with torch.no_grad():
                self.stars.weight[0] = 0

    def forward(self, items: Tensor, previous: Tensor, stars: Tensor, gaps: Tensor) -> Tensor:
        """``x``, ``[B, S, width]``.

        Args:
            items: ``[B, S]`` the items, 0 where there is padding.
            previous: ``[B, S]`` the items before them, 0 where there is none.
            stars: ``[B, S]`` the levels of stars of ``previous``, 0 where there is none.
            gaps: ``[B, S]`` buckets of the time since ``previous``.
        """
        embedded = self.items(torch.stack([items, previous]) if self.event is not None else items)
        x = embedded[0] if self.event is not None else embedded
        if self.event is not None:
            happened = F.gelu(self.event(torch.cat([embedded[1], self.stars(stars)], dim=-1)))
            x = x + happened * (previous != 0).unsqueeze(-1)
        elif self.stars is not None:
            x = x + self.stars(stars)
        if self.gaps is not None:
            x = x + self.gaps(gaps)
        return self.dropout(self.norm(x))


def rotate(vectors: Tensor) -> Tensor:
    """Rotary positions 0, 1, ... applied to queries or keys ``[B, heads, S, d]``, ``d`` even."""
    size, half = vectors.shape[-2], vectors.shape[-1] // 2
    frequency = 10_000 ** -(torch.arange(half, device=vectors.device, dtype=torch.float32) / half)
    angle = torch.arange(size, device=vectors.device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos().to(vectors.dtype), angle.sin().to(vectors.dtype)
    first, second = vectors.split(half, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Block(nn.Module):
    """``x + Attention(norm(x))``, then ``x + W2 GELU(W1 norm(x))``; causal, rotary positions.

    Args:
        width: of ``x``.
        heads: a divisor of ``width``; the width of a head must be even.
        inner: hidden width of the feed-forward part.
        dropout: of both parts' outputs.
    """

    def __init__(self, width: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"hidden_size: {width} must be a multiple of twice n_heads: {heads}")
        self.heads = heads
        self.attention_norm, self.inner_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, width] -> [B, S, width]``."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(F.gelu(self.up(self.inner_norm(x)))))


class SmallTransformer(nn.Module):
    """``layers`` of :class:`Block` and a last LayerNorm: the user model without a language model."""

    def __init__(self, width: int, layers: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.width = width
        self.blocks = nn.ModuleList(Block(width, heads, inner, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                depth = (2 * layers) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=depth * width**-0.5 / 2)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors ``[B, S, width]`` to states ``[B, S, width]``; state ``t`` sees ``x_1 ... x_t``."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class StarsHead(nn.Module):
    """Logits of the ``K`` levels of stars: ``o_k(t) = (W h_t + b)_k + c_k(i_t)``, ``c`` a table that starts at 0.

    Args:
        width: of the states.
        levels: ``K``.
        n_items: size of the vocabulary.
    """

    def __init__(self, width: int, levels: int, n_items: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, levels)
        self.of_item = nn.Embedding(n_items, levels, padding_idx=0)
        nn.init.zeros_(self.of_item.weight)
        nn.init.normal_(self.linear.weight, std=width**-0.5 / 2)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor, items: Tensor) -> Tensor:
        """``[..., width]`` states and ``[...]`` items to ``[..., K]`` logits."""
        return self.linear(states) + self.of_item(items)


def like_logit(logits: Tensor, liked: Tensor) -> Tensor:
    """The logit of the probability mass of some levels.

    Args:
        logits: ``[..., K]``.
        liked: ``[K]`` bool, which levels count as liked; both kinds must occur.

    Returns:
        ``log P(liked) - log P(not liked)``, ``[...]``.
    """
    return logits[..., liked].logsumexp(dim=-1) - logits[..., ~liked].logsumexp(dim=-1)


def sampled_softmax(
    positive: Tensor, negatives: Tensor, targets: Tensor, negative_items: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each target against shared negatives; a negative that IS the target does not count.

        loss_n = -log( exp(p_n) / (exp(p_n) + sum_{m: j_m != i_n} exp(s_nm)) )

    False negatives are told by their item, never by likeness: the released HLLM leaves out negatives whose cosine with
    the positive exceeds 0.99, and once the vectors are that close no negative is left to part them.

    Args:
        positive: ``p``, ``[N]`` scores of the targets.
        negatives: ``s``, ``[N, M]`` scores of the negatives.
        targets: ``i``, ``[N]`` items.
        negative_items: ``j``, ``[M]`` items.

    Returns:
        The losses ``[N]``, and how many negatives of each target count, ``[N]`` int64.
    """
    false = negative_items == targets.unsqueeze(1)
    rest = negatives.masked_fill(false, -torch.inf)
    every = torch.cat([positive.unsqueeze(1), rest], dim=1).logsumexp(dim=1)
    return every - positive, (~false).sum(dim=1)


class Similarity(nn.Module):
    """How well an item follows a state: ``u . e`` (``dot``), or ``exp(s) cos(u, e)`` with a learned ``s`` (``cosine``).

    ``s`` starts at ``log(1 / temperature)`` and is kept in ``[0, log 100]``, as in the released HLLM.

    Args:
        kind: ``dot`` or ``cosine``.
        temperature: where the learned temperature ``exp(-s)`` starts.
    """

    def __init__(self, kind: str, temperature: float) -> None:
        super().__init__()
        self.cosine = kind == "cosine"
        if self.cosine:
            self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    @property
    def temperature(self) -> float | None:
        """The present temperature, of cosines."""
        return float(torch.exp(-self.log_scale.detach().clamp(0, MAX_SCALE))) if self.cosine else None

    def prepared(self, vectors: Tensor) -> Tensor:
        """States or item vectors ``[..., w]``, so that their products are the scores but for :meth:`scale`."""
        return F.normalize(vectors, dim=-1) if self.cosine else vectors

    def scale(self) -> Tensor | float:
        """What products of prepared vectors are multiplied by."""
        return self.log_scale.clamp(0, MAX_SCALE).exp() if self.cosine else 1.0
