"""Next-item recommendation by the likelihood of titles under a causal language model.

The prompt holds the history (and the candidates, if they are listed); the answer is a title and a line break:

    score(u, i) = 1 / n_i  sum_t log p(answer_i[t] | prompt(u), answer_i[:t])        n_i tokens, line break included

Items with the same title are the same to the model and get equal scores. In a *hybrid* prompt
(LLaRA) each title is followed by a slot, one input embedding made of the lens's vector of the item
(:mod:`recbole_llm.model.slots`). In a text-only step of the curriculum every slot holds one trained vector instead,
which starts at the mean token embedding, as the projector's bias does.
All candidates of a sample share one pass over its prompt. That is exact only where neither prompt nor adapter depend on
the candidate, so a gate that has seen the target is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor, nn

from recbole_llm.backbone.answers import pad_right
from recbole_llm.backbone.title_trie import TitleTrie
from recbole_llm.backbone.titles import answer_log_likelihood, generate_titles, score_titles
from recbole_llm.config.model_spec import ModelSpec
from recbole_llm.config.settings import ScoringSettings
from recbole_llm.model.base import LLMRecommender, MicroBatch
from recbole_llm.model.curriculum import is_hybrid
from recbole_llm.model.slots import build_projector, fill_slots, mean_embedding
from recbole_llm.utils.fields import ROW_ID

if TYPE_CHECKING:
    from recbole_llm.backbone.loader import Backbone
    from recbole_llm.data.prompts.lines import EncodedPrompts
    from recbole_llm.data.prompts.next_item import TitlePromptBuilder
    from recbole_llm.lens.lens import Lens

logger = logging.getLogger(__name__)

BELOW_ALL = -1e6
"""Where the scores of items begin that two-stage ranking leaves to the lens: below any mean log-likelihood."""


WORK = ("rows", "prompt_tokens", "edges", "tokens")
"""What scoring costs: prompts that were scored, their tokens, the edges of their title trees (the least that any exact
scoring has to look at), and the tokens that went through the LLM, prompts included. Counted as ``scored_rows``, ..."""


class TitleRanker(LLMRecommender):
    """A RecBole model that ranks items by the likelihood of their titles.

    Args:
        dataset: the training samples (:class:`recbole_llm.data.next_item.NextItemDataset`).
        backbone: the frozen causal LM and its tokenizer; the adapter is attached to it in place.
        prompts: turns samples into token ids with slots, and items into answers.
        lens: the frozen sequential recommender that gives ``z``, the slots' item vectors and the first stage.

    Raises:
        ValueError: if something needs a lens and none is given, or the gate has seen the target.
    """

    spec = ModelSpec("llm", tasks=("next_item",), learns_from="next_item")

    SCORED_IN = "scoring_batch_size"
    SCORES = torch.float32  # as RecBole's Trainer puts them into a float32 table

    def __init__(
        self, config, dataset, *, backbone: Backbone, prompts: TitlePromptBuilder, lens: Lens | None = None
    ) -> None:
        scoring = ScoringSettings.from_config(config)
        gated, hybrid = config["mixer"] != "identity", prompts.item_slots
        if lens is None and (gated or hybrid or scoring.two_stage):
            raise ValueError(
                f"model {config['model']}: mixer={config['mixer']}, item_slots={hybrid} and "
                f"two_stage={scoring.two_stage} need a lens, but the configuration has none; set e.g. lens: SASRec"
            )
        lens = cast("Lens", lens)  # where something reads it
        if gated and lens.gate_scope != "user":
            raise ValueError(
                f"gate_scope: the state of the lens {lens.name} depends on the target item, so candidates cannot "
                "share one pass over the prompt; use gate_scope: user (lens: SASRec)"
            )
        embedding = backbone.model.get_input_embeddings()
        self._gate_reads_tokens = gated and config["gate"] == "token"
        width = embedding.embedding_dim if self._gate_reads_tokens else lens.width if gated else None
        super().__init__(config, dataset, backbone=backbone, lens=lens, instance_size=width)
        self.prompts = prompts
        self.scoring = scoring
        self._not_ranked = dataset.not_ranked
        self.curriculum = scoring.curriculum
        self.hybrid = hybrid and self.curriculum != "text_only"
        """Whether slots hold item vectors now; in evaluation always, unless the curriculum never shows them."""
        self._hybrid_step = self.hybrid
        self._catalogue: TitleTrie | None = None
        self.slots = hybrid
        if hybrid:
            vectors = lens.item_vectors().cpu()
            self.register_buffer("item_vectors", vectors, persistent=False)
            self.projector = build_projector(vectors.shape[1], embedding)
            self.empty_slot = nn.Parameter(mean_embedding(embedding))

    # ------------------------------------------------------------------ what is trained

    def own_parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """With slots: the projector and the vector of a text-only slot, group ``projector``."""
        groups = super().own_parameters()
        if not self.slots:
            return groups
        named = dict(self.projector.named_parameters())
        if self.curriculum != "hybrid_only":
            named["empty_slot"] = self.empty_slot
        if self.curriculum == "text_only":
            named = {"empty_slot": self.empty_slot}
        return groups | {"projector": named}

    def begin_step(self, step: int, steps_per_epoch: int, epochs: int) -> None:
        """Draw whether this optimizer step shows item vectors (see :mod:`recbole_llm.model.curriculum`)."""
        self._hybrid_step = self.slots and is_hybrid(
            self.curriculum, step, steps_per_epoch, epochs, self.scoring.seed
        )

    # ------------------------------------------------------------------ inputs

    def embed(self, input_ids: Tensor, *, hybrid: bool) -> Tensor:
        """Input embeddings ``[b, T, d]`` of token ids with slots (``-i`` for item ``i``), ``[b, T]``."""

        def vectors(is_slot: Tensor) -> Tensor:
            if hybrid:
                return self.projector(self.item_vectors[-input_ids[is_slot]])
            return self.empty_slot.expand(int(is_slot.sum()), -1)

        return fill_slots(self.adapter.model.get_input_embeddings(), input_ids, vectors)

    def encode(self, interaction: Interaction) -> EncodedPrompts:
        """The prompts of some samples, with slots if the template has them."""
        return self.prompts.encode(interaction, slots=self.slots)

    def _set_instance(self, interaction: Interaction, input_ids: Tensor, lengths: Tensor) -> None:
        """Give the gate its input: the lens's state, or (gate ``token``) the prompt's mean embedding."""
        if not self.gated:
            return
        if self._gate_reads_tokens:
            embedded = self.adapter.model.get_input_embeddings()(input_ids.clamp(min=0)).float()
            inside = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
            real = (inside & (input_ids >= 0)).unsqueeze(-1)
            self.adapter.set_instance((embedded * real).sum(dim=1) / real.sum(dim=1))
            return
        state, _ = self.lens.represent(interaction)
        self.adapter.set_instance(state)

    def _prompt_attention(self, encoded: EncodedPrompts, rows: np.ndarray) -> dict[str, Tensor]:
        """Mask and positions of the prompts ``rows`` of ``encoded``, padded together; none: plain causal attention."""
        return {}

    def _set_prompt_instances(
        self,
        encoded: EncodedPrompts,
        rows: np.ndarray,
        interaction: Interaction,
        input_ids: Tensor,
        lengths: Tensor,
    ) -> Callable[[], None] | None:
        """Give the gate its input for the prompts ``rows`` of ``encoded``, padded together.

        Returns:
            What gives it that of the titles behind them, where it is another one (streams).
        """
        self._set_instance(interaction[torch.from_numpy(rows)].to(self.device), input_ids, lengths)
        return None

    # ------------------------------------------------------------------ training

    def micro_batches(self, interaction: Interaction) -> Iterator[MicroBatch]:
        """Prompts and the titles of the samples' targets; the last token of an answer is only ever predicted."""
        encoded = self.encode(interaction)
        self.counts["prompts_shortened"] += encoded.n_shortened
        answers = [self.prompts.answers[item] for item in interaction[self.ITEM_ID].tolist()]
        whole = [np.concatenate([p, a[:-1]]) for p, a in zip(encoded.input_ids, answers, strict=True)]
        sizes = np.array([len(ids) for ids in whole])
        for rows in self.pieces(sizes, self.micro_batch_size):
            input_ids, _ = pad_right([whole[i] for i in rows], self.pad_id)
            lengths = torch.tensor([len(encoded.input_ids[i]) for i in rows])
            self.counts["tokens"] += int(sizes[rows].sum())
            yield MicroBatch(
                rows=rows,
                interaction=interaction[torch.from_numpy(rows)].to(self.device),
                input_ids=input_ids.to(self.device),
                lengths=lengths.to(self.device),
                answers=[answers[i] for i in rows],
            )

    def loss(self, batch: MicroBatch) -> Tensor:
        """Mean over samples of the mean negative log-likelihood of the target's title, scalar."""
        self._set_instance(batch.interaction, batch.input_ids, batch.lengths)
        embedded = self.embed(batch.input_ids, hybrid=self._hybrid_step)
        answers = batch.answers or []
        total = answer_log_likelihood(self.adapter.peft_model, embedded, batch.lengths, answers)
        sizes = torch.tensor([len(answer) for answer in answers], device=total.device)
        return self.with_gate_penalty(-(total / sizes).mean())

    # ------------------------------------------------------------------ scoring

    def reset_work(self) -> None:
        """Count the cost of scoring from zero."""
        for name in WORK:
            self.counts[f"scored_{name}"] = 0

    def extra_results(self) -> dict:
        """The cost of scoring since :meth:`reset_work`, and the ratio of tokens to the least, under ``scoring``."""
        work = {name: self.counts[f"scored_{name}"] for name in WORK}
        least = work["prompt_tokens"] + work["edges"]
        return {"scoring": {**work, "ratio": work["tokens"] / least if least else 0.0}}

    @torch.no_grad()
    def score_items(
        self, interaction: Interaction, items: Sequence[Sequence[int]] | None, *, adapted: bool = True
    ) -> list[Tensor]:
        """Mean log-likelihood of titles for each sample.

        Args:
            interaction: ``B`` samples of the dataset.
            items: for each sample the items to score; ``None``: the whole catalogue, items ``1 ... n_items - 1``.
            adapted: ``False``: by the untrained LLM, whose prompt is text without slots.

        Returns:
            One float64 tensor per sample, in the order of ``items``. A sample's scores do not depend on other samples.
        """
        slots = self.slots and adapted
        encoded = self.prompts.encode(interaction, slots=slots)
        lengths = np.array([len(ids) for ids in encoded.input_ids])
        scores: list[Tensor | None] = [None] * len(lengths)
        tries: TitleTrie | list[TitleTrie]
        # One sample of the catalogue is many tokens already; more only need more memory, which was slower on a CPU.
        for rows in self.pieces(lengths, 1 if items is None else self.scoring.scoring_batch_size):
            input_ids, row_lengths = pad_right([encoded.input_ids[i] for i in rows], self.pad_id)
            input_ids, row_lengths = input_ids.to(self.device), row_lengths.to(self.device)
            if items is None:
                tries = self.catalogue()
                edges = tries.n_edges * len(rows)
            else:
                tries = [TitleTrie([self.prompts.answers[i] for i in items[row]]) for row in rows]
                edges = sum(trie.n_edges for trie in tries)
            before_titles, attention = None, self._prompt_attention(encoded, rows)
            with nullcontext() if adapted else self.adapter.disabled():
                if adapted:
                    before_titles = self._set_prompt_instances(
                        encoded, rows, interaction, input_ids, row_lengths
                    )
                found = score_titles(
                    self.adapter.peft_model,
                    self.embed(input_ids, hybrid=self.hybrid),
                    row_lengths,
                    tries,
                    max_nodes=self.scoring.trie_nodes,
                    before_titles=before_titles,
                    attention=attention,
                )
            self.counts["tokens"] += found.tokens
            self.counts["scored_rows"] += len(rows)
            self.counts["scored_prompt_tokens"] += int(lengths[rows].sum())
            self.counts["scored_edges"] += edges
            self.counts["scored_tokens"] += found.tokens
            for row, total, sizes in zip(rows, found.log_likelihood, found.lengths, strict=True):
                scores[row] = total.double() / sizes.to(total.device)
        return scores

    def catalogue(self) -> TitleTrie:
        """The titles of all items as one tree; title ``n`` is item ``n + 1``."""
        if self._catalogue is None:
            self._catalogue = TitleTrie(self.prompts.answers[1:])
        return self._catalogue

    def _predict(self, interaction: Interaction, *, adapted: bool) -> Tensor:
        row_ids = interaction[ROW_ID].cpu().numpy()
        _, first, group = np.unique(row_ids, return_index=True, return_inverse=True)
        items = interaction[self.ITEM_ID].cpu().numpy()
        members = [np.flatnonzero(group == g) for g in range(len(first))]
        # float32, as RecBole's Trainer puts them into a float32 table
        scores = torch.empty(len(items), dtype=torch.float32, device=self.device)
        rows = interaction[torch.from_numpy(first)]
        found = self.score_items(rows, [items[m].tolist() for m in members], adapted=adapted)
        for positions, score in zip(members, found, strict=True):
            scores[torch.from_numpy(positions).to(self.device)] = score.float()
        return scores

    def score_rows(self, interaction: Interaction) -> Tensor:
        """Score of each (sample, item), ``[B]`` float32. Samples that are candidates of one sample share its prompt."""
        return self._predict(interaction, adapted=True)

    def predict_untrained(self, interaction: Interaction) -> Tensor:
        """As :meth:`score_rows`, by the LLM before any tuning, from a prompt without slots."""
        return self._predict(interaction, adapted=False)

    @torch.no_grad()
    def full_sort_predict(self, interaction: Interaction, *, adapted: bool = True) -> Tensor:
        """Score of every item for each sample, ``[B, n_items]`` float64; the padding item has ``-inf``.

        With ``two_stage`` the LLM scores the lens's first ``two_stage`` items, of those that are ranked, and these come
        first; the others follow in the lens's order.
        """
        if not (self.shares_samples and adapted):  # the untrained model is asked in one process alone
            return self._score_all(interaction, adapted)
        scores = torch.zeros((len(interaction), self.n_items), dtype=torch.float64, device=self.device)
        mine = self.processes.mine(len(interaction))
        if mine.start < mine.stop:
            scores[mine] = self._score_all(interaction[mine], adapted)
        return self.processes.add_up(scores)

    def _score_all(self, interaction: Interaction, adapted: bool) -> Tensor:
        scores = torch.full(
            (len(interaction), self.n_items), -torch.inf, dtype=torch.float64, device=self.device
        )
        if not self.scoring.two_stage:
            for row, found in enumerate(self.score_items(interaction, None, adapted=adapted)):
                scores[row, 1:] = found
            return scores
        first_stage = self.lens.score_items(interaction).double()
        ranked = first_stage.clone()
        ranked[self._not_ranked(interaction)] = -torch.inf
        best = ranked.topk(min(self.scoring.two_stage, self.n_items - 1), dim=-1).indices
        scores[:, 1:] = BELOW_ALL + first_stage[:, 1:].to(self.device)
        for row, found in enumerate(self.score_items(interaction, best.tolist(), adapted=adapted)):
            scores[row, best[row].to(self.device)] = found
        return scores

    @torch.no_grad()
    def generate(self, interaction: Interaction, max_new_tokens: int) -> list[str]:
        """What the LLM writes behind each prompt, greedily, up to the end of the line: the papers' protocol."""
        encoded = self.encode(interaction)
        lengths = np.array([len(ids) for ids in encoded.input_ids])
        texts: list[str] = [""] * len(lengths)
        for rows in self.pieces(lengths, self.micro_batch_size):
            input_ids, row_lengths = pad_right([encoded.input_ids[i] for i in rows], self.pad_id)
            input_ids, row_lengths = input_ids.to(self.device), row_lengths.to(self.device)
            before_titles = self._set_prompt_instances(encoded, rows, interaction, input_ids, row_lengths)
            written = generate_titles(
                self.adapter.peft_model,
                self.embed(input_ids, hybrid=self.hybrid),
                row_lengths,
                stop_ids=self.prompts.stop_ids,
                max_new_tokens=max_new_tokens,
                before_titles=before_titles,
                attention=self._prompt_attention(encoded, rows),
            )
            self.counts["tokens"] += int(lengths[rows].sum()) + sum(map(len, written))
            for row, ids in zip(rows, written, strict=True):
                texts[row] = self.prompts.decode(ids)
        return texts
