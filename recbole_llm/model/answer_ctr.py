"""Click-through-rate prediction by the two answer logits of a causal language model.

Every CTR model of this package is this class with another mixer, gate or prompt:

    margin(u, i) = logit(answer "yes") - logit(answer "no")        at the answer position of the prompt of (u, i)
    p(u, i)      = sigmoid(margin)                                  = softmax over the two answer words

The adapted projections follow one formula, ``y = W0 x + s B M(z) A x`` (:mod:`recbole_llm.adapter`), where ``z`` is
the lens's state of the sample. With ``lens_residual`` the prediction starts at the lens's and is corrected by the LLM:

    logit(u, i) = a * lens_logit(u, i) + b * margin(u, i) + c

With ``residual_rows: ~`` the three are learned with the adapter from (1, 0.1, 0). ``b`` starts small because the margin
of an untuned LLM is noise with a constant offset: added with weight one, training would start below the lens. It does
not start at zero, because there the gradient of the LLM vanishes, and its direction is that of the sign which ``b``
takes first. With ``residual_rows: n`` they are those of the stack: a logistic regression of the label on both logits,
fitted on n validation samples, before the training and after each epoch. A lens is surer of the labels that it was
trained on than of others, so what the training samples say of ``a`` is too much.

Where the template has slots (:mod:`recbole_llm.model.slots`), prompts are hybrid: projected vectors of the lens stand
behind titles, or for the user. The untrained LLM always gets text alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from recbole_llm.backbone.answers import answer_logits, pad_right
from recbole_llm.config.model_spec import ModelSpec
from recbole_llm.model.base import LLMRecommender, MicroBatch
from recbole_llm.model.slots import build_projector, fill_slots

if TYPE_CHECKING:
    from recbole_llm.backbone.loader import Backbone
    from recbole_llm.data.prompts.ctr import PromptBuilder
    from recbole_llm.data.prompts.lines import EncodedPrompts
    from recbole_llm.lens.lens import Lens

logger = logging.getLogger(__name__)

ANSWER_SCALE = 0.1
"""Where ``b`` of ``lens_residual`` starts."""


class AnswerCTR(LLMRecommender):
    """A RecBole model that answers "will this user like this item?" with a language model.

    Args:
        dataset: the training samples (:class:`recbole_llm.data.dataset.CTRDataset`).
        backbone: the frozen causal LM and its tokenizer; the adapter is attached to it in place.
        prompts: turns samples into token ids.
        lens: the frozen conventional model that gives ``z``, its own logit and the slots' vectors. May be ``None`` if
            neither the mixer nor ``lens_residual`` nor a slot needs it.

    Attributes:
        slots: whether the template has slots.
        hybrid: whether prompts have their slots now; subclasses may change it while they train.

    Raises:
        ValueError: if something needs a lens and none is given.
    """

    spec = ModelSpec("llm", tasks=("ctr",), learns_from="labels", probability=True)

    def __init__(
        self, config, dataset, *, backbone: Backbone, prompts: PromptBuilder, lens: Lens | None = None
    ) -> None:
        gated, residual = config["mixer"] != "identity", bool(config["lens_residual"])
        slots = prompts.has_slots
        if lens is None and (gated or residual or slots):
            raise ValueError(
                f"model {config['model']}: mixer={config['mixer']}, lens_residual={residual} and slots in "
                f"prompt={config['prompt']} ({slots}) need a lens, but the configuration has none; set e.g. lens: DIN"
            )
        lens = cast("Lens", lens)  # where something reads it
        embedding = backbone.model.get_input_embeddings()
        super().__init__(
            config, dataset, backbone=backbone, lens=lens, instance_size=lens.width if gated else None
        )
        self.LABEL = config["LABEL_FIELD"]
        self.prompts = prompts
        self.residual = residual
        self.answer_ids = self.read_answers(backbone.tokenizer)
        if self.residual:
            self.lens_scale = nn.Parameter(torch.tensor(1.0))
            self.answer_scale = nn.Parameter(torch.tensor(ANSWER_SCALE))
            self.bias = nn.Parameter(torch.tensor(0.0))
            for scalar in (self.lens_scale, self.answer_scale, self.bias):
                scalar.requires_grad_(config["residual_rows"] is None)
        self.slots = self.hybrid = slots
        self.projectors = nn.ModuleDict()
        if prompts.item_slots:
            self.register_buffer("item_vectors", lens.item_vectors().cpu(), persistent=False)
            self.projectors["item"] = build_projector(self.item_vectors.shape[1], embedding)
        if prompts.user_slot:
            self.projectors["user"] = build_projector(lens.width, embedding)

    def read_answers(self, tokenizer) -> list[int]:
        """The token that each answer begins with."""
        return self.prompts.answer_ids

    def own_parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """With ``lens_residual`` its three scalars, group ``residual``; with slots their MLPs, group ``projector``."""
        names = ("lens_scale", "answer_scale", "bias") if self.residual else ()
        return super().own_parameters() | {
            "residual": {name: getattr(self, name) for name in names},
            "projector": dict(self.projectors.named_parameters()),
        }

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
        """The prompts of some samples as the model gets them now."""
        return self.prompts.encode(interaction, slots=self.hybrid)

    def micro_batches(self, interaction: Interaction) -> Iterator[MicroBatch]:
        """Cut a batch into pieces of ``micro_batch_size`` samples, samples of similar length together."""
        return self._cut(interaction, self.encode(interaction))

    def _cut(self, interaction: Interaction, encoded: EncodedPrompts) -> Iterator[MicroBatch]:
        self.counts["prompts_shortened"] += encoded.n_shortened
        lengths = np.array([len(ids) for ids in encoded.input_ids])
        for rows in self.pieces(lengths, self.micro_batch_size):
            input_ids, row_lengths = pad_right([encoded.input_ids[i] for i in rows], self.pad_id)
            self.counts["tokens"] += int(lengths[rows].sum())
            yield MicroBatch(
                rows=rows,
                interaction=interaction[torch.from_numpy(rows)].to(self.device),
                input_ids=input_ids.to(self.device),
                lengths=row_lengths.to(self.device),
            )

    def embed(self, input_ids: Tensor, state: Tensor) -> Tensor:
        """Input embeddings ``[b, T, d]`` of hybrid prompts ``[b, T]``, given the lens's ``state [b, H]``."""

        def vectors(is_slot: Tensor) -> Tensor:
            items = -input_ids[is_slot]
            of_user = items == self.n_items
            found = state.new_zeros(len(items), self.adapter.model.get_input_embeddings().embedding_dim)
            if "item" in self.projectors:
                found = self.projectors["item"](self.item_vectors[items.masked_fill(of_user, 0)])
            if "user" in self.projectors:
                users = self.projectors["user"](state)[is_slot.nonzero()[:, 0]]
                found = torch.where(of_user.unsqueeze(-1), users, found)
            return found

        return fill_slots(self.adapter.model.get_input_embeddings(), input_ids, vectors)

    def margin(self, batch: MicroBatch, state: Tensor | None = None, *, adapted: bool = True) -> Tensor:
        """Logit of "yes" against "no" of the language model alone, ``[b]``; ``adapted=False``: without the adapter.

        Hybrid prompts need the lens's ``state [b, H]``.
        """
        inputs = batch.input_ids if state is None else self.embed(batch.input_ids, state)
        with nullcontext() if adapted else self.adapter.disabled():
            logits = answer_logits(self.adapter.peft_model, inputs, batch.lengths, self.answer_ids)
        return self.like_margin(logits)

    def terms(self, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """The adapted language model's margin, and with ``lens_residual`` the lens's logit, ``[b]`` float32 each."""
        state = lens_logit = None
        if self.gated or self.residual or self.hybrid:
            state, lens_logit = self.lens.represent(batch.interaction)
        if self.gated:
            self.adapter.set_instance(self.gate_instance(state, lens_logit))
        margin = self.margin(batch, state if self.hybrid else None)
        return margin, lens_logit if self.residual else None

    def with_residual(self, margin: Tensor, lens_logit: Tensor | None) -> Tensor:
        """The model's logit, given the language model's and, with ``lens_residual``, the lens's; all ``[b]``."""
        if lens_logit is None or not self.residual:
            return margin
        return self.lens_scale * lens_logit + self.answer_scale * margin + self.bias

    def logits(self, batch: MicroBatch) -> Tensor:
        """The model's logit, ``[b]`` float32."""
        return self.with_residual(*self.terms(batch))

    def like_margin(self, logits: Tensor) -> Tensor:
        """Logit of "yes" against "no", ``[b, 2] -> [b]``."""
        return logits[:, 0] - logits[:, 1]

    def loss(self, batch: MicroBatch) -> Tensor:
        """Mean cross-entropy between the two answers, and the gate's penalty if there is one; scalar."""
        labels = batch.interaction[self.LABEL].float()
        return self.with_gate_penalty(F.binary_cross_entropy_with_logits(self.logits(batch), labels))

    @torch.no_grad()
    def score_rows(self, interaction: Interaction) -> Tensor:
        """Probability of "yes", ``[B]`` float64; does not depend on what else is in the batch."""
        return torch.sigmoid(self._score(interaction, self.encode(interaction), self.logits))

    @torch.no_grad()
    def fit_residual(self, interaction: Interaction) -> None:
        """Set (a, b, c) of ``lens_residual`` to the logistic regression of the labels on both logits.

        Args:
            interaction: samples that neither lens nor adapter was trained on.

        Raises:
            ValueError: if they have one class only.
        """
        margin = self.by_shares(
            interaction, lambda part: self._score(part, self.encode(part), lambda batch: self.terms(batch)[0])
        )
        _, lens_logit = self.lens.represent(interaction.to(self.device))
        labels = interaction[self.LABEL].cpu().numpy()
        if len(np.unique(labels)) < 2:
            raise ValueError(
                f"residual_rows: the {len(labels):,} validation samples have one class only, so lens_residual cannot "
                "be fitted on them; draw more of them, or set residual_rows: ~"
            )
        terms = torch.stack([lens_logit.double().cpu(), margin.cpu()], dim=1).numpy()
        fitted = LogisticRegression(C=1e6, max_iter=1000, tol=1e-8).fit(terms, labels)  # C: no regularisation
        values = (*fitted.coef_[0], fitted.intercept_[0])
        for scalar, value in zip((self.lens_scale, self.answer_scale, self.bias), values, strict=True):
            scalar.fill_(float(value))
        logger.info(
            "lens_residual, fitted on %s validation samples: %.3g lens + %.3g LLM %+.3g",
            f"{len(labels):,}",
            *values,
        )

    def llm_alone(self, scores: np.ndarray, lens_scores: np.ndarray) -> np.ndarray | None:
        """The language model's own probability, without the lens's logit, out of the model's and the lens's.

        Args:
            scores, lens_scores: probabilities of the same samples, ``[n]``.

        Returns:
            float64 ``[n]``; ``None`` without ``lens_residual``, or where the LLM has no weight in it.
        """
        terms = self.residual_terms()
        if terms is None or abs(terms["answer_scale"]) < 1e-6:
            return None
        total = logit(scores) - terms["lens_scale"] * logit(lens_scores) - terms["bias"]
        return expit(total / terms["answer_scale"])

    @torch.no_grad()
    def predict_untrained(self, interaction: Interaction) -> Tensor:
        """Probability of "yes" of the language model without adapter and slots (zero-shot), ``[B]``."""
        encoded = self.prompts.encode(interaction)
        return torch.sigmoid(self._score(interaction, encoded, self.untrained_margin))

    def untrained_margin(self, batch: MicroBatch) -> Tensor:
        """The margin without the adapter, ``[b]``."""
        return self.margin(batch, adapted=False)

    def _score(self, interaction: Interaction, encoded: EncodedPrompts, logit_of) -> Tensor:
        # float64, because a float32 sigmoid is exactly 1 from a logit of 17 on
        scores = torch.empty(len(interaction), dtype=torch.float64, device=self.device)
        for batch in self._cut(interaction, encoded):
            scores[torch.from_numpy(batch.rows).to(self.device)] = logit_of(batch).double()
        return scores
