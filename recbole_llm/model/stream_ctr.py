"""``layout: stream``: models of the ctr task on streams, where every interaction of a chunk is a target.

A model of :mod:`~recbole_llm.model.answer_ctr` keeps its adapter, gate, slots and residual; what changes is how
samples become sequences. With ``l(t) [K]`` the logits of the K answers behind the title of interaction t, from the rows
of the output head that belong to them:

    loss     = mean over targets t of the cross-entropy of softmax(l(t)) with the answer of t
    margin   = logsumexp of l over the answers that mean label 1 - logsumexp over the others
    p(like)  = sigmoid(margin)                                 = the mass of the answers that mean label 1

Attention is causal, so ``l(t)`` has seen the title of t, and of all earlier interactions of the chunk the title and the
answer. Under ``history_ties: strict`` interactions of one second do not see each other (see :func:`attention_inputs`).

With a gate every interaction has its own instance: all tokens of interaction t, answer included, are adapted by
``z_t``, the lens's state of t, which has seen the user's interactions before t and the item of t, but not the answer of
t. The header is adapted by that of the chunk's first interaction.

Samples are scored in the chunks that :meth:`StreamCutter.evaluation_chunks` gives, so that a score depends neither on
the batch nor on which other samples are scored.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.backbone.answers import logits_at, pad_right
from recbole_llm.data.prompts.stream import EncodedStreams, StreamPrompts
from recbole_llm.data.streams import (
    Chunk,
    StreamBatch,
    attention_inputs,
    interactions_at,
    interactions_of,
    others_positions,
    stored,
    visible_until,
)
from recbole_llm.model.answer_ctr import AnswerCTR

logger = logging.getLogger(__name__)

CHECKED_INTERACTIONS = 512


@dataclass
class StreamMicroBatch:
    """Some chunks of a batch, padded together.

    Attributes:
        rows: positions of their targets among those of the batch, ``[k]``.
        interaction: the targets' fields.
        input_ids: right-padded token ids, ``[b, T]``; a negative entry is a slot.
        places: which interaction of its chunk each token belongs to, ``[b, T]``; 0 for header and padding.
        answer_rows, answer_tokens: where the answers of the targets follow, ``[k]`` each.
        answers: the right ones, ``[k]`` in ``[0, K)``.
        chunks: what the sequences are made of.
        attention: mask and position ids where causal attention is not exact, else empty.
    """

    rows: np.ndarray
    interaction: Interaction
    input_ids: Tensor
    places: Tensor
    answer_rows: Tensor
    answer_tokens: Tensor
    answers: Tensor
    chunks: list[Chunk]
    attention: dict[str, Tensor]


class StreamCTR(AnswerCTR):
    """An :class:`AnswerCTR` on streams; to be inherited before the model's own class (:func:`streamed`).

    Raises:
        ValueError: as :class:`AnswerCTR`; or if the lens's histories reach to an interaction's own place.
    """

    # What the base class does with prompts and their batches is overridden here, for those of streams.
    prompts: StreamPrompts  # type: ignore[assignment]  # the base's are of single samples

    def __init__(self, config, dataset, *, prompts, lens=None, **parts) -> None:
        super().__init__(config, dataset, prompts=prompts, lens=lens, **parts)
        self._dataset = dataset
        likes = torch.from_numpy(prompts.likes)
        self.register_buffer("_like", likes.nonzero().flatten(), persistent=False)
        self.register_buffer("_dislike", (~likes).nonzero().flatten(), persistent=False)
        if self.gated or self.residual:
            check_histories(dataset)
            if config["lens_rows"] == "all" and len(dataset):
                logger.info(
                    "lens_rows: all: the lens was trained on the %s labels that tune the LLM, too; with "
                    "without_few_shot it would not have seen them",
                    f"{len(dataset):,}",
                )

    def read_answers(self, tokenizer) -> list[int]:
        """The token that each answer begins with, as it reads in a line."""
        return self.prompts.class_ids

    # ------------------------------------------------------------------ batches

    def encode(  # type: ignore[override]  # chunks for the base's prompts
        self, interaction: Interaction
    ) -> EncodedStreams:
        """The chunks that samples are scored in, as the model gets them now."""
        return self.prompts.encode(interaction, slots=self.hybrid)

    def micro_batches(  # type: ignore[override]  # pieces of chunks for pieces of prompts
        self, interaction: StreamBatch | Interaction
    ) -> Iterator[StreamMicroBatch]:
        """Cut a batch into pieces of ``micro_batch_size`` chunks, chunks of similar length together.

        Args:
            interaction: chunks of training; or samples, in the chunks that they are scored in.
        """
        if isinstance(interaction, StreamBatch):
            encoded = self.prompts.encode_chunks(interaction.chunks, slots=self.hybrid)
            yield from self._pad(interaction.interaction, encoded, np.arange(len(interaction)))
        else:
            yield from self._pad(interaction, self.encode(interaction), self._order(interaction))

    def _order(self, interaction: Interaction) -> np.ndarray:
        """Samples in the order in which :meth:`encode` has them as targets."""
        users, items, ends = self.prompts.samples(interaction)
        mine = stored(self._dataset.history, users, items, ends)
        return np.lexsort((np.where(mine, ends, 0), ~mine))

    def _pad(
        self, interaction: Interaction, encoded: EncodedStreams, rows: np.ndarray
    ) -> Iterator[StreamMicroBatch]:
        """Pieces of encoded chunks; ``rows`` are the places in ``interaction`` of their targets, in turn."""
        streams = encoded.streams
        lengths = np.array([len(stream.input_ids) for stream in streams])
        ends = np.cumsum([len(stream.answers_at) for stream in streams])
        n = len(self._dataset.history)  # what is still to come has no answer: any will do
        for piece in self.pieces(lengths, self.micro_batch_size):
            mine = [streams[i] for i in piece]
            counts = [len(stream.answers_at) for stream in mine]
            of_targets = rows[
                np.concatenate([np.arange(ends[i] - len(streams[i].answers_at), ends[i]) for i in piece])
            ]
            input_ids, _ = pad_right([stream.input_ids for stream in mine], self.pad_id)
            places, _ = pad_right([np.maximum(stream.places, 0) for stream in mine], 0)
            targets = np.concatenate([stream.chunk.targets for stream in mine])
            answers_at = np.concatenate([stream.answers_at for stream in mine])
            self.counts["tokens"] += int(lengths[piece].sum())
            self.counts["labels"] += len(targets)
            until = [visible_until(self._dataset.history, stream.chunk) for stream in mine]
            attention = attention_inputs([stream.places for stream in mine], until)
            yield StreamMicroBatch(
                rows=of_targets,
                interaction=interaction[torch.from_numpy(of_targets)].to(self.device),
                input_ids=input_ids.to(self.device),
                places=places.to(self.device),
                answer_rows=torch.from_numpy(np.repeat(np.arange(len(mine)), counts)).to(self.device),
                answer_tokens=torch.from_numpy(answers_at).to(self.device),
                answers=torch.from_numpy(self.prompts.classes[np.minimum(targets, n - 1)]).to(self.device),
                chunks=[stream.chunk for stream in mine],
                attention={name: tensor.to(self.device) for name, tensor in attention.items()},
            )

    # ------------------------------------------------------------------ forward

    def gate_samples(self, chunks: Sequence[Chunk]) -> Interaction:
        """Whose states the gate reads: each interaction's own, with gate ``shuffled`` one of the next user's."""
        if self.adapter.config.gate != "shuffled":
            return interactions_of(self._dataset, chunks)
        owner = np.repeat([chunk.user for chunk in chunks], [len(chunk) for chunk in chunks])
        positions = np.concatenate([chunk.positions for chunk in chunks])
        return interactions_at(self._dataset, others_positions(self._dataset.history, positions, owner))

    def target_logits(self, interaction: Interaction) -> Tensor:
        """The lens's logit of samples, ``[B]``."""
        users, items, ends = self.prompts.samples(interaction)
        return self.lens.represent(interactions_at(self._dataset, ends, users, items))[1].to(self.device)

    def _read_lens(self, batch: StreamMicroBatch) -> Tensor | None:
        """Set the instance of every interaction; returns the lens's logit of every target ``[k]`` where it is read."""
        if self.gated:
            z = self.gate_instance(*self.lens.represent(self.gate_samples(batch.chunks)))
            padded = torch.nn.utils.rnn.pad_sequence(z.split(list(map(len, batch.chunks))), batch_first=True)
            self.adapter.set_instance(padded.to(self.device), batch.places)
        return self.target_logits(batch.interaction) if self.residual else None

    def answer_logits(self, batch: StreamMicroBatch, *, adapted: bool = True) -> Tensor:
        """Logits of the K answers behind every target, ``[k, K]`` float32."""
        hybrid = adapted and self.hybrid
        inputs = self.embed(batch.input_ids, self.item_vectors) if hybrid else batch.input_ids
        with nullcontext() if adapted else self.adapter.disabled():
            return logits_at(
                self.adapter.peft_model,
                inputs,
                batch.answer_rows,
                batch.answer_tokens,
                self.answer_ids,
                **batch.attention,
            )

    def like_margin(self, logits: Tensor) -> Tensor:
        """Log-odds of label 1 by the mass of the answers that mean it, ``[k, K] -> [k]``."""
        return logits[:, self._like].logsumexp(dim=1) - logits[:, self._dislike].logsumexp(dim=1)

    def terms(  # type: ignore[override]  # batches as micro_batches makes them
        self, batch: StreamMicroBatch
    ) -> tuple[Tensor, Tensor | None]:
        lens_logit = self._read_lens(batch)
        return self.like_margin(self.answer_logits(batch)), lens_logit

    def loss(self, batch: StreamMicroBatch) -> Tensor:  # type: ignore[override]  # as micro_batches makes them
        """Mean cross-entropy of the answers, scalar; with ``lens_residual`` also that of the labels, of the sum."""
        lens_logit = self._read_lens(batch)
        logits = self.answer_logits(batch)
        loss = F.cross_entropy(logits, batch.answers)
        if lens_logit is not None:
            labels = torch.isin(batch.answers, self._like).float()
            total = self.with_residual(self.like_margin(logits), lens_logit)
            loss = loss + F.binary_cross_entropy_with_logits(total, labels)
        return self.with_gate_penalty(loss)

    # ------------------------------------------------------------------ scoring

    def untrained_margin(self, batch: StreamMicroBatch) -> Tensor:  # type: ignore[override]  # as micro_batches makes them
        """The margin without the adapter, ``[k]``."""
        return self.like_margin(self.answer_logits(batch, adapted=False))

    def _score(  # type: ignore[override]  # of chunks, as encode gives them
        self, interaction: Interaction, encoded: EncodedStreams, logit_of
    ) -> Tensor:
        samples = self.prompts.samples(interaction)
        mine = stored(self._dataset.history, *samples)
        # A stored sample may occur twice, and is one target; any other has a chunk of its own.
        key = np.where(mine, samples[2], len(self._dataset.history) + np.arange(len(mine)))
        _, first, place = np.unique(key, return_index=True, return_inverse=True)
        scores = torch.empty(len(first), dtype=torch.float64, device=self.device)
        once = interaction[torch.from_numpy(first)]
        for batch in self._pad(once, encoded, self._order(once)):
            scores[torch.from_numpy(batch.rows).to(self.device)] = logit_of(batch).double()
        return scores[torch.from_numpy(place).to(self.device)]


def check_histories(dataset) -> None:
    """Check on some interactions that what the lens reads ends before them.

    Raises:
        ValueError: if the ID history of an interaction reaches to its own place: its state would have seen the label.
    """
    n = len(dataset.history)
    positions = np.unique(np.linspace(0, n - 1, min(n, CHECKED_INTERACTIONS)).astype(np.int64))
    users = np.searchsorted(dataset.history.user_start, positions, side="right") - 1
    found = dataset.id_retriever.positions(users, dataset.history.item_ids[positions], positions)
    if (found >= positions[:, None]).any():
        raise ValueError(
            "id_retrieval: the history that the lens reads of an interaction holds the interaction itself or a later "
            "one, so its state, which the gate reads, has seen the label"
        )


@cache
def streamed(model_class: type[AnswerCTR]) -> type[StreamCTR]:
    """The form on streams of a model of the ctr task (a new class of the same name)."""
    return type(model_class.__name__, (StreamCTR, model_class), {"__doc__": model_class.__doc__})
