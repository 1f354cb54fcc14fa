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

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor, nn

from recbole_llm.adapter import AdapterConfig, attach_adapter
from recbole_llm.backbone import answer_logits, answer_token_ids, pad_right

if TYPE_CHECKING:
    from recbole_llm.backbone import Backbone
    from recbole_llm.data.prompt import PromptBuilder
    from recbole_llm.lens import Lens

logger = logging.getLogger(__name__)

ANSWER_SCALE = 0.1
"""Where ``b`` of ``lens_residual`` starts."""


@dataclass
class MicroBatch:
    """Some rows of a batch, padded together.

    Attributes:
        rows: positions of these rows in the batch they were cut from, shape ``[b]``.
        interaction: their fields, on the model's device.
        input_ids: right-padded prompts, ``[b, T]``.
        lengths: prompt lengths in tokens, ``[b]``.
    """

    rows: np.ndarray
    interaction: Interaction
    input_ids: Tensor
    lengths: Tensor


class AnswerCTR(SequentialRecommender):
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

    input_type = InputType.POINTWISE

    def __init__(
        self, config, dataset, *, backbone: Backbone, prompts: PromptBuilder, lens: Lens | None = None
    ) -> None:
        super().__init__(config, dataset)
        self.LABEL = config["LABEL_FIELD"]
        self.prompts = prompts
        self.gated = config["mixer"] != "identity"
        self.residual = bool(config["lens_residual"])
        if lens is None and (self.gated or self.residual):
            raise ValueError(
                f"model {config['model']}: mixer={config['mixer']} and lens_residual={self.residual} need a lens, "
                "but the configuration has none; set e.g. lens: DIN"
            )
        self.lens = lens
        self.backbone_dtype = backbone.dtype
        self.answer_ids = answer_token_ids(backbone.tokenizer, prompts.answer_words)
        pad_id = backbone.tokenizer.pad_token_id
        self.pad_id = 0 if pad_id is None else pad_id  # never read: right padding under a causal mask
        self.micro_batch_size = config["micro_batch_size"]
        self.bucket_by_length = config["bucket_by_length"]

        self.adapter = attach_adapter(
            backbone.model,
            AdapterConfig(
                mixer=config["mixer"],
                num_experts=config["num_experts"] if self.gated else 1,
                r=config["lora_r"],
                lora_alpha=config["lora_alpha"],
                lora_dropout=config["lora_dropout"],
                target_modules=config["target_modules"],
                gate=config["gate"] if self.gated else "uniform",
                gate_dropout=config["gate_dropout"],
                temperature=config["temperature"],
                top_k=config["top_k"],
                share_gate=config["share_gate"],
                instance_size=lens.width if self.gated else 1,
            ),
        )
        self.llm = self.adapter.peft_model  # registered, so that .to() and .parameters() reach it
        if self.residual:
            self.lens_scale = nn.Parameter(torch.tensor(1.0))
            self.answer_scale = nn.Parameter(torch.tensor(ANSWER_SCALE))
            self.bias = nn.Parameter(torch.tensor(0.0))
        if config["torch_compile"]:
            for layer in self.adapter.model.get_decoder().layers:
                layer.compile()
        self.tokens_processed = 0
        self.rows_shortened = 0

    # ------------------------------------------------------------------ what is trained

    def parameter_groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """Trained parameters by group: ``lora``, ``gate`` and, with ``lens_residual``, ``residual``."""
        groups = {"lora": self.adapter.lora_parameters(), "gate": self.adapter.gate_parameters()}
        if self.residual:
            groups["residual"] = {
                name: getattr(self, name) for name in ("lens_scale", "answer_scale", "bias")
            }
        return {name: params for name, params in groups.items() if params}

    def trained_state(self) -> dict[str, Tensor]:
        """Everything that training changes, buffers included; the frozen LLM and lens are not part of it."""
        state = {f"adapter.{name}": value for name, value in self.adapter.state_dict().items()}
        if self.residual:
            state |= {f"residual.{n}": p.detach() for n, p in self.parameter_groups()["residual"].items()}
        return state

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of :meth:`trained_state`; the names must match exactly."""
        cut = len("adapter.")
        self.adapter.load_state_dict({n[cut:]: t for n, t in state.items() if n.startswith("adapter.")})
        residual = {n.removeprefix("residual."): t for n, t in state.items() if n.startswith("residual.")}
        expected = set(self.parameter_groups().get("residual", {}))
        if set(residual) != expected:
            raise ValueError(
                f"checkpoint holds residual terms {sorted(residual)}, the model has {sorted(expected)}"
            )
        with torch.no_grad():
            for name, value in residual.items():
                getattr(self, name).copy_(value)

    def summary(self) -> str:
        """One line on what is trained."""
        config = self.adapter.config
        counts = {
            name: sum(p.numel() for p in group.values()) for name, group in self.parameter_groups().items()
        }
        return (
            f"{type(self).__name__}: mixer {config.mixer}, {config.num_experts} experts of rank {config.r}, gate "
            f"{config.gate if self.gated else 'none'}, on {', '.join(config.target_modules)}; trained parameters "
            + ", ".join(f"{name} {count:,}" for name, count in counts.items())
        )

    def residual_terms(self) -> dict[str, float] | None:
        """The learned ``a`` (lens_scale), ``b`` (answer_scale) and ``c`` (bias) of ``lens_residual``."""
        if not self.residual:
            return None
        return {name: float(p.detach()) for name, p in self.parameter_groups()["residual"].items()}

    def train(self, mode: bool = True) -> AnswerCTR:
        """Training mode for the adapter only: the frozen LLM has no dropout to switch on and the lens must not."""
        super().train(mode)
        if self.lens is not None:
            self.lens.eval()
        return self

    # ------------------------------------------------------------------ forward

    def micro_batches(self, interaction: Interaction) -> Iterator[MicroBatch]:
        """Cut a batch into pieces of ``micro_batch_size`` rows, rows of similar length together.

        Sorting happens inside the batch only, so that bucketing saves padding without changing which rows share an
        optimizer step.
        """
        encoded = self.prompts.encode(interaction)
        self.rows_shortened += encoded.n_shortened
        lengths = np.array([len(ids) for ids in encoded.input_ids])
        order = np.argsort(-lengths, kind="stable") if self.bucket_by_length else np.arange(len(lengths))
        for start in range(0, len(order), self.micro_batch_size):
            rows = order[start : start + self.micro_batch_size]
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

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """RecBole's contract: the mean loss of a batch. (Our trainer accumulates micro-batches instead.)"""
        n = len(interaction)
        return sum(self.loss(batch) * (len(batch.rows) / n) for batch in self.micro_batches(interaction))

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
