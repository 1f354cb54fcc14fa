"""Sequential recommenders of RecBole as lenses of the next-item task: RecBole's own model, read and nothing else.

Network, loss (cross-entropy over all items), ``predict`` and ``full_sort_predict`` are RecBole's. What is added
only reads them:

    state  = model(history)                     [B, H]          what iLoRA's gate sees
    logit  = predict(history, item)             [B]             the model's own score of the sample's item
    scores = full_sort_predict(history)         [B, n_items]    the same of every item; -inf for padding

The state does not see the target, so the gate scope is ``user``.

Reference:
    Wang-Cheng Kang et al. "Self-Attentive Sequential Recommendation" in ICDM 2018.
    Xiaoyu Kong et al. "Customizing Language Models with Instance-wise LoRA for Sequential Recommendation" in
    NeurIPS 2024: its gate reads the last state of a SASRec of width 64 that sees 10 items.
"""

from __future__ import annotations

import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from torch import Tensor

from recbole_llm.lens.sequence import HistoryEncoder

NEXT_ITEM_WORKING = ("SASRec", "GRU4Rec", "Caser", "NARM", "STAMP", "LightSANs")
"""Models of RecBole that are tested in this role."""


class NextItemSequence(HistoryEncoder):
    """A sequential model as RecBole has it, with its state readable; to be inherited before the model's own class.

    Raises:
        ValueError: if the model does not make one vector of a history; the message names models that do.
    """

    known_to_work = NEXT_ITEM_WORKING

    def represent(self, interaction: Interaction, gate_scope: str = "user") -> tuple[Tensor, Tensor]:
        """The state ``[B, H]``, and the model's score ``[B]`` of the item of every sample."""
        return self.state(interaction), self.predict(interaction)

    def score_items(self, interaction: Interaction) -> Tensor:
        """The model's score of every item, ``[B, n_items]``; column 0, the padding item, is -inf."""
        scores = self.full_sort_predict(interaction).reshape(-1, self.n_items)
        padding = torch.arange(self.n_items, device=scores.device) == 0
        return scores.masked_fill(padding, -torch.inf)

    def check(self, interaction: Interaction) -> None:
        """Try everything on a few samples, so that an unsuitable model is refused before it is trained.

        Args:
            interaction: a joined batch.

        Raises:
            ValueError: if one of state, loss and scores cannot be had, or ``predict`` and ``full_sort_predict``
                disagree.
        """
        rows = len(interaction)
        try:
            _, logit = self.represent(interaction)
            scores = self.full_sort_predict(interaction)
            loss = self.calculate_loss(interaction)
        except (KeyError, TypeError, NotImplementedError) as error:
            problem = f"{type(error).__name__} {error}"
            raise self._unsuitable(
                f"it cannot be run on samples of a history and one item ({problem})"
            ) from error
        if scores.numel() != rows * self.n_items or logit.numel() != rows:
            raise self._unsuitable(
                f"for {rows} samples and {self.n_items} items it gives {logit.numel()} and {scores.numel()} scores"
            )
        own = scores.reshape(rows, -1).gather(1, interaction[self.ITEM_ID].unsqueeze(1)).squeeze(1)
        if not torch.allclose(own, logit, rtol=1e-3, atol=1e-4):
            raise self._unsuitable("its predict and full_sort_predict give different scores")
        losses = loss if isinstance(loss, tuple) else (loss,)
        if not all(isinstance(part, Tensor) and part.numel() == 1 for part in losses):
            raise self._unsuitable("its loss is no number")


def next_item_lens_class(model_class: type[SequentialRecommender]) -> type[NextItemSequence]:
    """One of RecBole's sequential models with its state readable (a new class ``Lens<Name>``)."""
    bases = (NextItemSequence, model_class)
    return type(f"Lens{model_class.__name__}", bases, {"__doc__": model_class.__doc__})
