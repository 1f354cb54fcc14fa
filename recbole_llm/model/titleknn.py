"""TitleKNN: similarity of a title to those of a user's recent items, by an untuned language model."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor, nn

from recbole_llm.config.keys import Key
from recbole_llm.config.kinds import Flag
from recbole_llm.config.model_spec import ModelSpec


class TitleKNN(SequentialRecommender):
    """No training: cosines of the LLM's mean-pooled title vectors.

    For the last ``n`` <= ``id_history_length`` items ``i_1 ... i_n`` of a user and the target ``t``:

        next item    s = 1/n sum_j cos(v(i_j), v(t))
        ctr          s = 1/n sum_j y_j cos(v(i_j), v(t))    y_j = +1 if i_j was liked (its label), -1 if not
                     p = (1 + s) / 2                        a number in [0, 1], but no calibrated probability

    With ``center_vectors``, ``v`` is the LLM's vector less the mean of all items' vectors: the vectors of one LLM
    all point in nearly the same direction, so that without it every cosine is near 1. A user without any history
    has ``s = 0``.

    Args:
        item_vectors: ``[n_items, d]``, row 0 is the padding item.
    """

    input_type = InputType.POINTWISE
    spec = ModelSpec(
        "conventional",
        tasks=("next_item", "ctr"),
        reads=("backbone", "dtype", "quantization"),
        keys={"center_vectors": Key("subtract the items' mean vector", Flag())},
        learns_from="interactions",
        probability=True,
        takes_item_vectors=True,
    )

    def __init__(self, config, dataset, item_vectors: np.ndarray) -> None:
        super().__init__(config, dataset)
        self.LABEL_SEQ = config["LABEL_FIELD"] + config["LIST_SUFFIX"] if config["task"] == "ctr" else None
        self._centered = config["center_vectors"]
        unit = self._unit(item_vectors, item_vectors)
        unit[0] = 0
        self.register_buffer("unit", unit, persistent=False)
        self.nothing = nn.Parameter(torch.zeros(()))  # RecBole's Trainer wants something to optimise

    unit: Tensor
    titles_suffice = True
    """Nothing is trained for an item."""

    def _unit(self, item_vectors: np.ndarray, of: np.ndarray) -> Tensor:
        """Unit vectors of some items, float64 ``[m, d]``, less the mean of ``item_vectors``."""
        vectors = torch.as_tensor(of, dtype=torch.float64)
        if self._centered:
            vectors = vectors - torch.as_tensor(item_vectors, dtype=torch.float64)[1:].mean(dim=0)
        return F.normalize(vectors, dim=1)

    def append_items(self, item_vectors: np.ndarray, others: np.ndarray) -> None:
        """Know more items: ``others [m, d]``, beside those of the training, ``item_vectors [n_items, d]``."""
        self.unit = torch.cat([self.unit, self._unit(item_vectors, others).to(self.unit.device)])
        self.n_items += len(others)

    def interest(self, interaction: Interaction) -> Tensor:
        """``1/n sum_j y_j v(i_j) / |v(i_j)|`` of every sample, ``[B, d]``: its product with a unit vector is ``s``."""
        items = interaction[self.ITEM_SEQ]
        weights = (items != 0).to(self.unit.dtype)
        count = weights.sum(dim=1, keepdim=True).clamp(min=1)
        if self.LABEL_SEQ is not None:
            weights = weights * (2 * interaction[self.LABEL_SEQ].to(weights.dtype) - 1)
        return torch.bmm(weights.unsqueeze(1), F.embedding(items, self.unit)).squeeze(1) / count

    def score(self, similarity: Tensor) -> Tensor:
        """``s``, or in the ctr task ``p``; computed in float64, float32 as RecBole's Trainer wants it."""
        return (similarity if self.LABEL_SEQ is None else (1 + similarity).clamp(0, 2) / 2).float()

    def forward(self, interaction: Interaction) -> Tensor:
        """``s`` of every sample, float64 ``[B]``."""
        return (self.interest(interaction) * F.embedding(interaction[self.ITEM_ID], self.unit)).sum(dim=1)

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Zero: there is nothing to learn."""
        return 0 * self.nothing

    def predict(self, interaction: Interaction) -> Tensor:
        """The score of every sample's item, ``[B]``."""
        return self.score(self.forward(interaction))

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """The scores of all items for every sample, ``[B, n_items]``."""
        return self.score(self.interest(interaction) @ self.unit.T)
