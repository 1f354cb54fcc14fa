"""What every model here shares: a frozen causal language model with an adapter, and what of it is trained.

A model adds how prompts become scores (:mod:`~recbole_llm.model.answer_ctr`,
:mod:`~recbole_llm.model.title_ranker`). The trainer sees only :meth:`LLMRecommender.micro_batches`,
:meth:`LLMRecommender.loss` and the groups of parameters.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor, nn

from recbole_llm.adapter.personalized import attach_adapter
from recbole_llm.config.configurator import SAVED_RUN
from recbole_llm.config.settings import ModelSettings, adapter_config
from recbole_llm.trainer.score_cache import KeptScores, batch_key
from recbole_llm.utils.causal_lm import decoder_layers
from recbole_llm.utils.distributed import launched, shard_layers
from recbole_llm.utils.fields import ROW_ID
from recbole_llm.utils.memory import within_memory

if TYPE_CHECKING:
    from recbole_llm.backbone.loader import Backbone
    from recbole_llm.data.prompts.lines import EncodedPrompts
    from recbole_llm.lens.lens import Lens

logger = logging.getLogger(__name__)


@dataclass
class MicroBatch:
    """Some samples of a batch, padded together.

    Attributes:
        rows: positions of these samples in the batch they were cut from, shape ``[b]``.
        interaction: their fields, on the model's device.
        input_ids: right-padded token ids, ``[b, T]``; a negative entry is a slot (:mod:`recbole_llm.model.slots`).
        lengths: prompt lengths in tokens, ``[b]``.
        answers: the tokens to be written behind each prompt, where the task has any.
    """

    rows: np.ndarray
    interaction: Interaction
    input_ids: Tensor
    lengths: Tensor
    answers: list[np.ndarray] | None = None


class LLMRecommender(SequentialRecommender):
    """A RecBole model around an adapted language model.

    Args:
        backbone: the frozen causal LM and its tokenizer; the adapter is attached to it in place.
        lens: the frozen conventional recommender whose state is the gate's ``z``; ``None`` if nothing reads it. With
            ``tune_lens`` the model trains a copy.
        instance_size: width of ``z``.

    Attributes:
        gated: whether the adapter's update depends on the sample.
        lora_given: whether A and B come from another run (``lora_from``) and are not trained.
        counts: of ``tokens`` that went through the LLM so far, padding not counted, and of ``prompts_shortened``, which
            lost history because they were too long.
        processes: those that share a training step.
        sharded: whether each process has a share of the frozen weights only (``shard_backbone``). Then all have to run
            the LLM equally often.
        shares_samples: whether each process scores a share of the samples.
        kept_scores: keeps the scores of every batch of an evaluation, so that it can be resumed.
    """

    input_type = InputType.POINTWISE
    SCORED_IN = "micro_batch_size"
    """The attribute, and the key, that says how many samples are scored at once."""
    SCORES = torch.float64
    """The format of :meth:`score_rows`."""

    def __init__(
        self, config, dataset, *, backbone: Backbone, lens: Lens | None, instance_size: int | None = None
    ) -> None:
        super().__init__(config, dataset)
        settings = ModelSettings.from_config(config)
        self.gated, self.gate_reads_logit = settings.gated, settings.gate_reads_logit
        self.gate_balance, self.gate_entropy = settings.gate_balance, settings.gate_entropy
        self.micro_batch_size, self.bucket_by_length = settings.micro_batch_size, settings.bucket_by_length
        self.lora_given = settings.lora_from is not None
        # None where nothing reads it; models ask for one where something does.
        self.lens: Any = lens.tunable() if settings.tune_lens and lens is not None else lens
        self.backbone_dtype = backbone.dtype
        pad_id = backbone.tokenizer.pad_token_id
        self.pad_id = 0 if pad_id is None else pad_id  # never read: right padding under a causal mask
        self.adapter = attach_adapter(
            backbone.model,
            adapter_config(config, instance_size),
            # The default names Llama's projections; other architectures have their own.
            strict=config.origins.get("target_modules", SAVED_RUN) != SAVED_RUN,
        )
        self.adapter.train_lora(not self.lora_given)
        self.llm = self.adapter.peft_model  # registered, so that .to() and .parameters() reach it
        if settings.torch_compile:
            for layer in decoder_layers(self.adapter.model):
                layer.compile()
        self.counts: Counter[str] = Counter()
        self.kept_scores: KeptScores | None = None
        self.processes = launched()
        self.sharded = settings.shard_backbone
        if self.sharded:
            shard_layers(decoder_layers(self.adapter.model), config["device"])
        self.shares_samples = self.processes.several and not self.sharded

    # ------------------------------------------------------------------ the gate

    def gate_instance(self, state: Tensor, lens_logit: Tensor) -> Tensor:
        """What the gate reads of the lens, ``z [b, H]``: its state ``[b, width]``, and its logit ``[b]`` if so set."""
        return torch.cat([state, lens_logit.unsqueeze(-1)], dim=-1) if self.gate_reads_logit else state

    def with_gate_penalty(self, loss: Tensor) -> Tensor:
        """``loss`` and what ``gate_balance`` and ``gate_entropy`` add to it for the samples last set."""
        if not self.gated or not (self.gate_balance or self.gate_entropy):
            return loss
        return loss + self.adapter.gate_penalty(self.gate_balance, self.gate_entropy).to(loss.device)

    # ------------------------------------------------------------------ what is trained

    def own_parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """Trained parameters beside the adapter's, by group and name; with ``tune_lens`` the lens's, group ``lens``."""
        if self.lens is None or not self.lens.tuned:
            return {}
        return {"lens": dict(self.lens.model.named_parameters())}

    def parameter_groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """Trained parameters by group: ``lora`` unless given, ``gate``, :meth:`own_parameters`; no empty group."""
        lora = {} if self.lora_given else self.adapter.lora_parameters()
        groups = {"lora": lora, "gate": self.adapter.gate_parameters()}
        return {name: params for name, params in (groups | self.own_parameters()).items() if params}

    def trained_state(self) -> dict[str, Tensor]:
        """Everything that training changes, buffers included; the frozen LLM and lens are not part of it."""
        state = {f"adapter.{name}": value for name, value in self.adapter.state_dict().items()}
        for group, parameters in self.own_parameters().items():
            state |= {f"{group}.{name}": p.detach() for name, p in parameters.items()}
        return state

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of :meth:`trained_state`; the names must match exactly."""
        prefix = "adapter."
        own = {f"{g}.{n}": p for g, params in self.own_parameters().items() for n, p in params.items()}
        other = {name: value for name, value in state.items() if not name.startswith(prefix)}
        if other.keys() != own.keys():
            raise ValueError(
                f"checkpoint holds {sorted(other)} beside the adapter, the model has {sorted(own)}"
            )
        self.adapter.load_state_dict(
            {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        )
        with torch.no_grad():
            for name, value in other.items():
                own[name].copy_(value)

    def summary(self) -> str:
        """One line on what is trained."""
        config = self.adapter.config
        counts = {
            name: sum(p.numel() for p in group.values()) for name, group in self.parameter_groups().items()
        }
        return (
            f"{type(self).__name__}: mixer {config.mixer}, {config.num_experts} experts of rank "
            f"{config.rank // config.experts}, gate {config.gate if self.gated else 'none'}, on "
            f"{', '.join(config.target_modules)}; trained parameters "
            + ", ".join(f"{name} {count:,}" for name, count in counts.items())
        )

    def train(self, mode: bool = True) -> LLMRecommender:
        """Training mode for the adapter only: the frozen LLM has no dropout to switch on and the lens must not."""
        super().train(mode)
        if self.lens is not None:
            self.lens.eval()
        return self

    def extra_results(self) -> dict:
        """What a model adds to ``result.json`` beside its metrics; for subclasses."""
        return {}

    def reset_work(self) -> None:
        """Count the cost of scoring from zero, where a model counts it."""

    # ------------------------------------------------------------------ scoring

    def predict(self, interaction: Interaction) -> Tensor:
        """RecBole's: what :meth:`score_rows` gives, or where scores are kept, what it gave before an interruption."""
        if self.sharded:
            return self.score_within_memory(
                lambda: self.processes.together(lambda: self.score_rows(interaction))
            )
        if self.kept_scores is None:
            return self.by_shares(interaction, self.score_rows)
        key = batch_key(interaction[ROW_ID], interaction[self.ITEM_ID])
        found = self.kept_scores(key, lambda: self.by_shares(interaction, self.score_rows))
        return found.to(self.device)

    def by_shares(self, interaction: Interaction, score: Callable[[Interaction], Tensor]) -> Tensor:
        """What ``score`` gives for all samples, ``[B]``, where each process computes it for some of them.

        Candidates of one sample stay together, and so do neighbours in the batch, which may share a chunk of a stream.

        Args:
            score: gives a number for each sample, ``[b]``.
        """
        if not self.shares_samples:
            return self.score_within_memory(lambda: score(interaction))
        _, first, group = np.unique(interaction[ROW_ID].cpu().numpy(), return_index=True, return_inverse=True)
        place = np.argsort(np.argsort(first))[group]
        mine = self.processes.mine(len(first))
        own = torch.from_numpy(np.flatnonzero((place >= mine.start) & (place < mine.stop)))
        scores = torch.zeros(len(interaction), dtype=torch.float64, device=self.device)
        if len(own):
            found = self.score_within_memory(lambda: score(interaction[own]))
            scores[own.to(self.device)] = found.to(self.device, torch.float64)
        return self.processes.add_up(scores).to(self.SCORES)

    def score_within_memory(self, score: Callable[[], Tensor]) -> Tensor:
        """What ``score()`` gives, with half as many samples at once as often as memory does not suffice."""
        before = self.counts.copy()

        def ask_less(reason: str) -> None:
            self.halve(self.SCORED_IN, reason)
            self.counts.clear()
            self.counts.update(before)

        return within_memory(score, ask_less)

    def halve(self, key: str, reason: str) -> None:
        """Go on with half as many samples at once, because memory did not suffice.

        Args:
            key: ``micro_batch_size`` or another key of that kind.
            reason: what the error said.

        Raises:
            ValueError: if it is one already, or the other processes could not do likewise.
        """
        size = getattr(self, key)
        if self.sharded:
            raise ValueError(
                f"memory does not suffice for {key}: {size}, and with shard_backbone the processes cannot change it "
                f"while they run: set {key} lower. ({reason})"
            )
        if size == 1:
            raise ValueError(
                f"memory does not suffice for a single sample ({key}: 1): {reason} Set max_prompt_tokens lower, use "
                "gradient_checkpointing: True, a smaller backbone, fewer backbone_layers or, on a GPU, quantization"
            )
        setattr(self, key, size // 2)
        logger.warning(
            "memory does not suffice for %s: %d; continuing with %d; optimizer steps keep their number of samples (%s)",
            *(key, size, size // 2, reason),
        )

    def score_rows(self, interaction: Interaction) -> Tensor:
        """One score per sample, ``[B]``, which must not depend on what else is in the batch."""
        raise NotImplementedError

    # ------------------------------------------------------------------ batches

    def begin_step(self, step: int, steps_per_epoch: int, epochs: int) -> None:
        """Called before optimizer step ``step`` (0-based, over all epochs), for models that change while they train."""

    def schedule_span(self, step: int, total_steps: int) -> tuple[int, int]:
        """First step and end of the part of the training around ``step`` that has its own learning-rate schedule."""
        return 0, total_steps

    def encode(self, interaction: Interaction) -> EncodedPrompts:
        """The prompts of some samples as the model gets them."""
        raise NotImplementedError

    def micro_batches(self, interaction: Interaction) -> Iterator[MicroBatch]:
        """Cut a training batch into pieces of ``micro_batch_size`` samples, samples of similar length together."""
        raise NotImplementedError

    def loss(self, batch: MicroBatch) -> Tensor:
        """Mean loss of the samples of a micro-batch, scalar."""
        raise NotImplementedError

    def pieces(self, lengths: np.ndarray, size: int) -> Iterator[np.ndarray]:
        """Positions of the samples of each piece, the longest samples first where ``bucket_by_length``.

        Sorting happens inside the batch only, so that bucketing saves padding without changing which samples share an
        optimizer step.
        """
        order = np.argsort(-lengths, kind="stable") if self.bucket_by_length else np.arange(len(lengths))
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """RecBole's contract: the mean loss of a batch. (Our trainer accumulates micro-batches instead.)"""
        n = len(interaction)
        return sum(self.loss(batch) * (len(batch.rows) / n) for batch in self.micro_batches(interaction))
