"""Click-through-rate prediction by the two answer logits of a causal language model.

Every CTR model of this package is this class with another mixer, gate or prompt:

    margin(u, i) = logit(answer "yes") - logit(answer "no")        at the answer position of the prompt of (u, i)
    p(u, i)      = sigmoid(margin)                                  = softmax over the two answer words

The adapted projections follow one formula, ``y = W0 x + s B M(z) A x`` (:mod:`recbole_llm.adapter`), where ``z`` is
the lens's state of the row. With ``lens_residual`` the prediction starts at the lens's and is corrected by the LLM:

    logit(u, i) = a * lens_logit(u, i) + b * margin(u, i) + c,      (a, b, c) learned from (1, 0.1, 0)

``b`` starts small because the margin of an untuned LLM is noise with a constant offset: added with weight one, training
would start below the lens. It does not start at zero, because there the gradient of the LLM vanishes, and its direction
is that of the sign which ``b`` takes first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from torch import Tensor, nn

from recbole_llm.backbone import answer_logits, answer_token_ids, pad_right
from recbole_llm.model.base import LLMRecommender, MicroBatch

if TYPE_CHECKING:
    from recbole_llm.backbone import Backbone
    from recbole_llm.data import EncodedPrompts, PromptBuilder
    from recbole_llm.lens import Lens

ANSWER_SCALE = 0.1
"""Where ``b`` of ``lens_residual`` starts."""


class AnswerCTR(LLMRecommender):
    """A RecBole model that answers "will this user like this item?" with a language model.

    Args:
        config: the run's configuration.
        dataset: the training rows (:class:`recbole_llm.data.CTRDataset`).
        backbone: the frozen causal LM and its tokenizer; the adapter is attached to it in place.
        prompts: turns rows into token ids.
        lens: the frozen conventional model that gives ``z`` and its own logit. May be ``None`` if neither the mixer
            nor ``lens_residual`` needs it.

    Raises:
        ValueError: if the mixer or ``lens_residual`` needs a lens and none is given.
    """

    task = "ctr"

    def __init__(
        self, config, dataset, *, backbone: Backbone, prompts: PromptBuilder, lens: Lens | None = None
    ) -> None:
        gated, residual = config["mixer"] != "identity", bool(config["lens_residual"])
        if lens is None and (gated or residual):
            raise ValueError(
                f"model {config['model']}: mixer={config['mixer']} and lens_residual={residual} need a lens, "
                "but the configuration has none; set e.g. lens: DIN"
            )
        super().__init__(
            config, dataset, backbone=backbone, lens=lens, instance_size=lens.width if gated else None
        )
        self.LABEL = config["LABEL_FIELD"]
        self.prompts = prompts
        self.residual = residual
        self.answer_ids = answer_token_ids(backbone.tokenizer, prompts.answer_words)
        if self.residual:
            self.lens_scale = nn.Parameter(torch.tensor(1.0))
            self.answer_scale = nn.Parameter(torch.tensor(ANSWER_SCALE))
            self.bias = nn.Parameter(torch.tensor(0.0))

    def own_parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """With ``lens_residual`` its three scalars, group ``residual``."""
        names = ("lens_scale", "answer_scale", "bias") if self.residual else ()
        return {"residual": {name: getattr(self, name) for name in names}}

    def residual_terms(self) -> dict[str, float] | None:
        """The learned ``a`` (lens_scale), ``b`` (answer_scale) and ``c`` (bias) of ``lens_residual``."""
        if not self.residual:
            return None
        return {name: float(p.detach()) for name, p in self.own_parameters()["residual"].items()}

    def extra_results(self) -> dict:
        """The learned terms of ``lens_residual`` under ``residual``."""
        return {"residual": self.residual_terms()}

    # ------------------------------------------------------------------ forward

    def encode(self, interaction: Interaction) -> EncodedPrompts:
        """The prompts of some rows."""
        return self.prompts.encode(interaction)

    def micro_batches(self, interaction: Interaction) -> Iterator[MicroBatch]:
        """Cut a batch into pieces of ``micro_batch_size`` rows, rows of similar length together."""
        encoded = self.encode(interaction)
        self.rows_shortened += encoded.n_shortened
        lengths = np.array([len(ids) for ids in encoded.input_ids])
        for rows in self.pieces(lengths, self.micro_batch_size):
            input_ids, row_lengths = pad_right([encoded.input_ids[i] for i in rows], self.pad_id)
            self.tokens_processed += int(lengths[rows].sum())
            yield MicroBatch(
                rows=rows,
                interaction=interaction[torch.from_numpy(rows)].to(self.device),
                input_ids=input_ids.to(self.device),
                lengths=row_lengths.to(self.device),
            )

    def margin(self, batch: MicroBatch, *, adapted: bool = True) -> Tensor:
        """Logit of "yes" against "no" of the language model alone, ``[b]``; ``adapted=False``: without the adapter."""
        with nullcontext() if adapted else self.adapter.disabled():
            logits = answer_logits(self.adapter.peft_model, batch.input_ids, batch.lengths, self.answer_ids)
        return logits[:, 0] - logits[:, 1]

    def logits(self, batch: MicroBatch) -> Tensor:
        """The model's logit, ``[b]`` float32 (see the module docstring)."""
        lens_logit = None
        if self.lens is not None and (self.gated or self.residual):
            state, lens_logit = self.lens.represent(batch.interaction)
            if self.gated:
                self.adapter.set_instance(state)
        margin = self.margin(batch)
        if self.residual:
            return self.lens_scale * lens_logit + self.answer_scale * margin + self.bias
        return margin

    def loss(self, batch: MicroBatch) -> Tensor:
        """Mean cross-entropy between the two answers, scalar."""
        return F.binary_cross_entropy_with_logits(self.logits(batch), batch.interaction[self.LABEL].float())

    @torch.no_grad()
    def predict(self, interaction: Interaction) -> Tensor:
        """Probability of "yes", ``[B]`` float64; does not depend on what else is in the batch."""
        return torch.sigmoid(self._score(interaction, self.logits))

    @torch.no_grad()
    def predict_untrained(self, interaction: Interaction) -> Tensor:
        """Probability of "yes" of the language model without adapter and lens (zero-shot), ``[B]``."""
        return torch.sigmoid(self._score(interaction, lambda batch: self.margin(batch, adapted=False)))

    def _score(self, interaction: Interaction, logit_of) -> Tensor:
        # float64, because a float32 sigmoid is exactly 1 from a logit of 17 on
        scores = torch.empty(len(interaction), dtype=torch.float64, device=self.device)
        for batch in self.micro_batches(interaction):
            scores[torch.from_numpy(batch.rows).to(self.device)] = logit_of(batch).double()
        return scores
