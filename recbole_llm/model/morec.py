"""MoRec: a SASRec that knows items by a frozen language model's vectors of their titles.

Reference: Zheng Yuan et al. "Where to Go Next for Recommender Systems? ID- vs. Modality-based Recommender Models
Revisited" in SIGIR 2023.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from recbole.model.sequential_recommender.sasrec import SASRec
from torch import nn

from recbole_llm.config.keys import Key
from recbole_llm.config.kinds import Choice, Whole
from recbole_llm.config.model_spec import ModelSpec
from recbole_llm.lens.sequence import LensSASRec
from recbole_llm.model.title_embedding import TitleEmbedding, start_at_components


def use_titles(model: SASRec, config, item_vectors: np.ndarray | None) -> None:
    """Put what ``config["item_vectors"]`` says in the place of a SASRec's item embedding."""
    if item_vectors is None:
        return
    if config["item_vectors"] == "initialise":
        start_at_components(model.item_embedding, item_vectors)
        return
    add = config["item_vectors"] == "add"
    model.item_embedding = TitleEmbedding(
        item_vectors, model.hidden_size, config["projector_layers"], ids=add
    ).apply(model._init_weights)


class ItemsByTitle:
    """What MoRec adds to a SASRec: items that came after the training are known by their titles, if all items are."""

    n_items: int
    item_embedding: nn.Module

    @property
    def titles_suffice(self) -> bool:
        """Whether an item is its title's vector, and nothing else was trained for it."""
        return isinstance(self.item_embedding, TitleEmbedding) and self.item_embedding.ids is None

    def append_items(self, item_vectors: np.ndarray, others: np.ndarray) -> None:
        """See :meth:`TitleEmbedding.append`."""
        cast(TitleEmbedding, self.item_embedding).append(item_vectors, others)
        self.n_items += len(others)


class LabelledMoRec(ItemsByTitle, LensSASRec):
    """The lens SASRec, which is trained on labels and sees past ratings, with the item embedding of :class:`MoRec`."""

    def __init__(self, config, dataset, item_vectors: np.ndarray | None = None) -> None:
        super().__init__(config, dataset)
        use_titles(self, config, item_vectors)

    def append_items(self, item_vectors: np.ndarray, others: np.ndarray) -> None:
        """Also with a bias of 0, where those of the training started."""
        super().append_items(item_vectors, others)
        known = self.item_bias.weight.detach()
        self.item_bias = nn.Embedding.from_pretrained(
            nn.functional.pad(known, (0, 0, 0, len(others))), padding_idx=0
        )


class MoRec(ItemsByTitle, SASRec):
    """RecBole's SASRec with another item embedding ``e``, of the history and of the items that are scored.

    With ``v`` the LLM's mean-pooled vectors of the titles, standardised, ``P`` a trained projector and ``E`` a trained
    table:

        item_vectors: replace       e(i) = P(v(i))            MoRec with a frozen encoder
        item_vectors: add           e(i) = P(v(i)) + E(i)
        item_vectors: initialise    e(i) = E(i), which starts at the principal components of v
        item_vectors: ~             e(i) = E(i)               SASRec as it is, the control
        score(i)                    = SASRec(e(i_1), ..., e(i_n)) . e(i)

    Network, loss and ranking are RecBole's. In the ctr task it is the labelled form, :class:`LabelledMoRec`.

    Args:
        item_vectors: ``[n_items, d]``, row 0 is the padding item; ``None`` with ``item_vectors: ~``.
    """

    spec = ModelSpec(
        "conventional",
        tasks=("next_item", "ctr"),
        reads=("backbone", "dtype", "quantization", "lens_ratings"),
        keys={
            "item_vectors": Key(
                "what the LLM's vectors do to the item embedding",
                Choice("replace", "add", "initialise"),
                optional=True,
            ),
            "projector_layers": Key("layers of the projector beyond the first", Whole(0)),
        },
        learns_from="loss_type",
        takes_item_vectors=True,
        task_classes={"ctr": LabelledMoRec},
    )

    def __init__(self, config, dataset, item_vectors: np.ndarray | None = None) -> None:
        super().__init__(config, dataset)
        use_titles(self, config, item_vectors)
