"""``layout: stream`` in the next-item task: all titles of a chunk are predicted in one pass.

A model of :mod:`~recbole_llm.model.title_ranker` keeps adapter, gate, slots, curriculum and the scoring of candidates
and catalogue; what changes is the text, and that each interaction of it has a gate of its own. With the tokens
``x_1 ... x_n`` of a title and ``x_{n+1}`` the line break behind it:

    loss(t)  = - 1 / (n + 1)  sum_j log p(x_j | the chunk before x_j)           minus the title's score behind this text
    loss     = mean of loss(t) over the targets t of an optimizer step

So every title counts the same, however long it is, as in the prompt layout and in the score it is ranked by.

**What a gate may have seen.** The place before ``x_1`` (the line break that ends the title before) predicts ``x_1``,
and ``x_n`` predicts the line break. All these places are adapted by ``z_t``, the lens's state *before* t; it has seen
the interactions up to t - 1 and nothing of t. A slot of t, shown behind ``x_n``, predicts nothing and has ``z_t``, too.
The header has the state of the first interaction. Behind the history of a sample, the last line break and all
candidates have the state before the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import cast

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.backbone.answers import pad_right
from recbole_llm.backbone.titles import token_log_likelihood
from recbole_llm.data.dataset import HISTORY_END
from recbole_llm.data.prompts.title_stream import TitleStream, TitleStreamPrompts, TitleStreams
from recbole_llm.data.streams import StreamBatch, attention_inputs, interactions_at, others_positions
from recbole_llm.model.title_ranker import TitleRanker


@dataclass
class TitleMicroBatch:
    """Some chunks of a batch, padded together; its targets have ``N`` answer tokens together.

    Attributes:
        rows: places of their targets among those of the batch, ``[k]``.
        interaction: the targets' fields.
        input_ids: right-padded token ids, ``[b, T]``; a negative entry is a slot.
        read_rows, read_at: behind which token of which chunk each answer token follows, ``[N]``.
        answers: the tokens of the answers, ``[N]``.
        owners: which target each of them belongs to, ``[N]`` in ``[0, k)``.
        sizes: tokens of each target's answer, ``[k]``.
        streams: the chunks.
        attention: mask and position ids where causal attention is not exact, else empty.
    """

    rows: np.ndarray
    interaction: Interaction
    input_ids: Tensor
    read_rows: Tensor
    read_at: Tensor
    answers: Tensor
    owners: Tensor
    sizes: Tensor
    streams: list[TitleStream]
    attention: dict[str, Tensor]


def stream_attention(streams: list[TitleStream]) -> dict[str, Tensor]:
    """Mask and positions of some streams, padded together, as :func:`~recbole_llm.data.streams.attention_inputs`."""
    return attention_inputs([stream.places for stream in streams], [stream.until for stream in streams])


class TitleStreamRanker(TitleRanker):
    """A :class:`TitleRanker` on streams; to be inherited before the model's own class (:func:`streamed_titles`)."""

    prompts: TitleStreamPrompts  # type: ignore[assignment]  # the base's are of single samples

    def __init__(self, config, dataset, *, prompts, **parts) -> None:
        super().__init__(config, dataset, prompts=prompts, **parts)
        self._dataset = dataset

    # ------------------------------------------------------------------ the gate

    def _states(self, positions: np.ndarray) -> Tensor:
        """The lens's state before each interaction, ``[n, H]``; with gate ``shuffled`` that of another user."""
        if self.adapter.config.gate == "shuffled":
            positions = others_positions(self._dataset.history, positions)
        return self.lens.represent(interactions_at(self._dataset, positions))[0].to(self.device)

    def _target_states(self, interaction: Interaction) -> Tensor:
        """The same before the targets of samples, ``[b, H]``; also of samples still to come."""
        if self.adapter.config.gate == "shuffled":
            users, ends = (interaction[name].cpu().numpy() for name in (self.USER_ID, HISTORY_END))
            others = others_positions(self._dataset.history, ends, users)
            interaction = interactions_at(self._dataset, others)
        return self.lens.represent(interaction)[0].to(self.device)

    def _set_stream_instances(self, streams: list[TitleStream], states: list[Tensor]) -> None:
        """Give every interaction of some streams its instance; ``states``: one row for each place of a stream."""
        places, _ = pad_right([np.maximum(stream.places, 0) for stream in streams], 0)
        padded = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
        self.adapter.set_instance(padded, places.to(self.device))

    def _set_prompt_instances(
        self, encoded, rows, interaction, input_ids, lengths
    ) -> Callable[[], None] | None:
        """As the base's: the tokens of the history have states of their own, all behind it that before the target."""
        if not self.gated:
            return None
        streams = [cast(TitleStreams, encoded).streams[i] for i in rows]
        targets = self._target_states(interaction[torch.from_numpy(rows)].to(self.device))
        shown = self._shown_states(streams)
        self._set_stream_instances(
            streams, [torch.cat([own, last[None]]) for own, last in zip(shown, targets, strict=True)]
        )
        return lambda: self.adapter.set_instance(targets, shuffle=False)

    def _prompt_attention(self, encoded, rows) -> dict[str, Tensor]:
        """As the base's: interactions of one second do not see each other under ``history_ties: strict``."""
        return stream_attention([cast(TitleStreams, encoded).streams[i] for i in rows])

    def _shown_states(self, streams: list[TitleStream]) -> list[Tensor]:
        """The state before each interaction of some streams, ``[S, H]`` each."""
        positions = np.concatenate([stream.positions for stream in streams])
        if not len(positions):  # text_history_length: 0
            return [torch.zeros(0, self.lens.width, device=self.device)] * len(streams)
        return list(self._states(positions).split([len(stream.positions) for stream in streams]))

    # ------------------------------------------------------------------ training

    def micro_batches(  # type: ignore[override]  # pieces of chunks for pieces of prompts
        self, interaction: StreamBatch | Interaction
    ) -> Iterator[TitleMicroBatch]:
        """Cut a batch into pieces of ``micro_batch_size`` chunks, chunks of similar length together.

        Args:
            interaction: chunks of training; or samples, each as a chunk of its own.
        """
        batch = interaction
        if not isinstance(batch, StreamBatch):
            batch = StreamBatch(self.prompts.own_chunks(batch), batch)
        streams = self.prompts.encode_chunks(batch.chunks, slots=self.slots).streams
        lengths = np.array([len(stream.input_ids) for stream in streams])
        ends = np.cumsum([len(stream.sizes) for stream in streams])
        for piece in self.pieces(lengths, self.micro_batch_size):
            mine = [streams[i] for i in piece]
            rows = np.concatenate([np.arange(ends[i] - len(streams[i].sizes), ends[i]) for i in piece])
            input_ids, _ = pad_right([stream.input_ids for stream in mine], self.pad_id)
            sizes = np.concatenate([stream.sizes for stream in mine])
            read_rows = np.repeat(np.arange(len(mine)), [len(stream.read_at) for stream in mine])

            def put(array: np.ndarray) -> Tensor:
                return torch.from_numpy(array).to(self.device)

            self.counts["tokens"] += int(lengths[piece].sum())
            yield TitleMicroBatch(
                rows=rows,
                interaction=batch.interaction[torch.from_numpy(rows)].to(self.device),
                input_ids=input_ids.to(self.device),
                read_rows=put(read_rows),
                read_at=put(np.concatenate([stream.read_at for stream in mine])),
                answers=put(np.concatenate([stream.answers for stream in mine])),
                owners=put(np.repeat(np.arange(len(sizes)), sizes)),
                sizes=put(sizes),
                streams=mine,
                attention=stream_attention(mine),
            )

    def title_log_likelihood(self, batch: TitleMicroBatch) -> Tensor:
        """Mean log-likelihood of each target's title behind what its chunk shows before it, ``[k]`` float32."""
        if self.gated:
            self._set_stream_instances(batch.streams, self._shown_states(batch.streams))
        embedded = self.embed(batch.input_ids, hybrid=self._hybrid_step)
        log_p = token_log_likelihood(
            self.adapter.peft_model,
            embedded,
            batch.read_rows,
            batch.read_at,
            batch.answers,
            **batch.attention,
        )
        total = log_p.new_zeros(len(batch.sizes)).index_add(0, batch.owners, log_p)
        return total / batch.sizes

    def loss(self, batch: TitleMicroBatch) -> Tensor:  # type: ignore[override]  # as micro_batches makes them
        """Mean over targets of the mean negative log-likelihood of their titles, scalar."""
        return self.with_gate_penalty(-self.title_log_likelihood(batch).mean())


@cache
def streamed_titles(model_class: type[TitleRanker]) -> type[TitleStreamRanker]:
    """The form on streams of a model of the next-item task (a new class of the same name)."""
    return type(model_class.__name__, (TitleStreamRanker, model_class), {"__doc__": model_class.__doc__})
