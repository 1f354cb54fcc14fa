"""From a user's interactions to token ids in the next-item task: the stream of titles.

A header and one title per line, from the template ``properties/prompt/stream_next_item.yaml``::

    place      -1 ... -1 | 0  0  0  0      | 1  1     | 2  2                  of each token
    tokens     Films ... : | \\n Fargo [v]   | \\n Heat [v] | \\n Seven           the last title of a chunk ends it
    predicts               | Fargo \\n       | Heat \\n     | Seven \\n

A line break belongs to the title *behind* it, whose first token it predicts; the last token of a title predicts the
line break that ends it. So the tokens of place t predict the title of t, and nothing else predicts it. In hybrid
streams a slot ``[v]``, an input embedding made of the lens's vector of the item, follows each title; it is shown and
never predicted, and the last token of the title still predicts the line break, as in the answer of a prompt.

A sample is scored behind its user's last ``text_history_length`` interactions: the same text up to the line break that
the target's title follows. Header, titles and line break are tokenised once and apart, so that a chunk with one target
has exactly the tokens of that prompt and its answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from recbole.data.interaction import Interaction
from transformers import PreTrainedTokenizerBase

from recbole_llm.data.dataset import HISTORY_END, HistoryDataset
from recbole_llm.data.prompts.lines import (
    TemplateKind,
    TemplatePrompts,
    bos_ids,
    tokenize_behind,
    tokenize_inert,
)
from recbole_llm.data.retriever import RecentRetriever
from recbole_llm.data.streams import Chunk, StreamCutter, visible_until

TITLE_STREAM_VERSION = 1
"""To be raised whenever this code writes other streams from the same template and data."""
TITLE_STREAM_TEMPLATE = TemplateKind(
    task="next_item with layout: stream",
    defaults={"item_slots": False, "obfuscate_titles": False},
    required=("header", "title"),
    placeholders={"header": set(), "title": {"title"}},
    titled=("title",),
    choices={},
)


@dataclass
class TitleStream:
    """Some interactions of one user as token ids: a chunk, or what a sample is scored behind.

    Attributes:
        positions: the interactions, positions in the history, ascending, int64 ``[S]``.
        input_ids: int64 ``[T]``; a negative entry ``-i`` is the slot of item ``i``.
        places: int64 ``[T]``: which interaction each token belongs to, -1 for the header; the line break that ends what
            a sample is scored behind has place ``S``, the target's.
        until: how many interactions those of each place may see, as
            :func:`~recbole_llm.data.streams.visible_until` gives it; of what a sample is scored behind ``[S + 1]``.
        read_at: int64 ``[N]``: the tokens whose states predict the answers of the targets, one after the other.
        answers: int64 ``[N]``: what they predict.
        sizes: int64 ``[k]``: tokens of each target's answer, together ``N``.
    """

    positions: np.ndarray
    input_ids: np.ndarray
    places: np.ndarray
    until: np.ndarray | None
    read_at: np.ndarray
    answers: np.ndarray
    sizes: np.ndarray


@dataclass
class TitleStreams:
    """Streams of a batch; the attributes of :class:`~recbole_llm.data.prompts.lines.EncodedPrompts` and the streams.

    Attributes:
        streams: one per chunk or sample.
        n_shortened: how many lost history to fit into ``max_prompt_tokens``.
    """

    streams: list[TitleStream]
    n_shortened: int = 0

    @property
    def input_ids(self) -> list[np.ndarray]:
        """Token ids of each stream."""
        return [stream.input_ids for stream in self.streams]


class TitleStreamPrompts(TemplatePrompts):
    """Turns chunks and samples into token ids, and items into answers.

    Args:
        dataset: a built dataset; samples of any of its splits can be encoded.
        tokenizer: the LLM's.
        prompt_config: a template of :data:`TITLE_STREAM_TEMPLATE`.
        max_prompt_tokens: longest chunk, and longest text that a sample is scored behind, in tokens.
        lead: earlier interactions that a training chunk shows before its first target.
        history_length: earlier interactions that a sample is scored behind.

    Attributes:
        cutter: cuts users' interactions into training chunks that fit.
        item_slots: whether a slot follows each title in hybrid streams.
        answers: token ids of each item's title and the line break, by internal id; entry 0, of the padding item, is the
            line break alone. Items of the same text have the same answer.
        stop_ids: tokens at which a written answer ends.

    Raises:
        ValueError: if the dataset is not built, the tokenizer has not one token for a line break, a title is empty or a
            line does not fit into a chunk.
    """

    version = TITLE_STREAM_VERSION
    lists_candidates = False
    """Candidates are never listed: the text is the same for all of them, and for all targets behind it."""

    def __init__(
        self,
        dataset: HistoryDataset,
        tokenizer: PreTrainedTokenizerBase,
        prompt_config: Mapping[str, Any],
        *,
        max_prompt_tokens: int,
        lead: int,
        history_length: int,
    ) -> None:
        super().__init__(dataset, tokenizer, TITLE_STREAM_TEMPLATE, prompt_config)
        self.item_slots: bool = self.template["item_slots"]
        self._retriever = RecentRetriever(self._history, history_length)
        self._max_tokens = max_prompt_tokens
        (breaks,) = tokenize_behind(tokenizer, "a", ["\n"])
        if len(breaks) != 1:
            raise ValueError(
                f"a stream of titles needs a line break to be one token, and this tokenizer makes {len(breaks)} of it: "
                "use another backbone, or layout: prompt"
            )
        self._break = breaks
        eos = tokenizer.eos_token_id
        self.stop_ids: list[int] = sorted({int(breaks[0]), *([] if eos is None else [eos])})
        (header,) = tokenize_inert(tokenizer, [self.template["header"].format()])
        self._header = np.concatenate([bos_ids(tokenizer), header])
        titles = tokenize_behind(tokenizer, "\n", list(map(self.answer_text, range(1, dataset.item_num))))
        if empty := [item for item, ids in enumerate(titles, start=1) if not len(ids)]:
            name = dataset.id2token(dataset.iid_field, empty[0])
            raise ValueError(f"the title of item {name} is empty; set text.missing_title: placeholder")
        self._titles = [np.array([], dtype=np.int64), *titles]
        self.answers = [np.concatenate([ids, self._break]) for ids in self._titles]
        self._costs = np.array([len(ids) for ids in self.answers])[self._history.item_ids] + self.item_slots
        self.cutter = StreamCutter(
            self._history,
            budget=max_prompt_tokens,
            costs=self._costs,
            prefix_costs=np.full(dataset.user_num, len(self._header)),
            lead=lead,
            context=lead,  # samples are scored one by one, in no chunk
            unit="tokens (max_prompt_tokens)",
        )

    def _item_texts(self) -> list[str]:
        return self._items.titles

    # ------------------------------------------------------------------ answers

    def answer_text(self, item: int) -> str:
        """The line of an item, without its line break."""
        return self.template["title"].format(title=self._items.titles[item])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The title in what an LLM wrote: its first line, without special tokens and outer blanks."""
        text = self._tokenizer.decode(np.asarray(ids, dtype=np.int64), skip_special_tokens=True)
        return text.partition("\n")[0].strip()

    # ------------------------------------------------------------------ chunks and samples

    def encode(self, interaction: Interaction, *, slots: bool) -> TitleStreams:
        """What samples are scored behind: header and history up to the line break that the target's title follows.

        Args:
            interaction: samples of the dataset, with ``user_id`` and ``history_end``; also samples still to come, at
                the end of their user's interactions. The target is not looked at.
            slots: whether a slot ``-i`` follows the title of each item ``i``.

        Raises:
            ValueError: for slots that the template rules out.
        """
        rows = [self._shown(interaction, i) for i in range(len(interaction))]
        return TitleStreams([self._prompt(shown, slots) for shown, _ in rows], sum(cut for _, cut in rows))

    def encode_chunks(self, chunks: Sequence[Chunk], *, slots: bool) -> TitleStreams:
        """Training chunks, up to the last token of their last title.

        Raises:
            ValueError: for slots that the template rules out.
        """
        return TitleStreams([self._chunk(chunk, slots) for chunk in chunks])

    def own_chunks(self, interaction: Interaction) -> list[Chunk]:
        """Each sample as a chunk of its own, behind the history that it is scored behind."""
        users, ends = (interaction[name].tolist() for name in (self._dataset.uid_field, HISTORY_END))
        shown = [self._shown(interaction, i)[0] for i in range(len(ends))]
        starts = [int(own[0]) if len(own) else end for own, end in zip(shown, ends, strict=True)]
        return [
            Chunk(user, start, np.array([end])) for user, start, end in zip(users, starts, ends, strict=True)
        ]

    def _shown(self, interaction: Interaction, i: int) -> tuple[np.ndarray, bool]:
        """The history of a sample that fits, as positions, and whether some was left out to fit."""
        users, ends = (
            interaction[name][i : i + 1].cpu().numpy() for name in (self._dataset.uid_field, HISTORY_END)
        )
        (found,) = self._retriever.positions(users, np.zeros_like(users), ends)
        found = found[found >= 0]
        room = self._max_tokens - len(self._header) - len(self._break)
        fits = np.cumsum(self._costs[found][::-1])[::-1] <= room
        return found[fits], not fits.all()

    def _lines(self, positions: np.ndarray, slots: bool) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Header and lines as pieces of token ids; the place of each token, and of each line its answer's tokens."""
        if slots and not self.item_slots:
            raise ValueError("item_slots: False, so this template's streams have no slots; set it to True")
        items = self._history.item_ids[positions].tolist()
        parts: list[np.ndarray] = [self._header]
        for item in items:
            parts += [self._break, self._titles[item]]
            if slots:
                parts.append(np.array([-item], dtype=np.int64))
        sizes = np.array([len(self.answers[item]) for item in items], dtype=np.int64)
        return parts, np.repeat(np.arange(-1, len(items)), [len(self._header), *(sizes + slots)]), sizes

    def _prompt(self, shown: np.ndarray, slots: bool) -> TitleStream:
        parts, places, _ = self._lines(shown, slots)
        until, n = None, len(shown)
        if n and self._history.ties == "strict":  # the target sees all that is shown, with earlier timestamps
            until = np.append(np.maximum(self._history.tie_start[shown] - shown[0], 0), n)
        none = np.array([], dtype=np.int64)
        ids = np.concatenate([*parts, self._break])
        return TitleStream(shown, ids, np.append(places, n), until, none, none, none)

    def _chunk(self, chunk: Chunk, slots: bool) -> TitleStream:
        parts, places, sizes = self._lines(chunk.positions, slots)
        lines = sizes + slots  # tokens of each
        starts = len(self._header) + np.cumsum(lines) - lines
        targets = chunk.target_places
        return TitleStream(
            chunk.positions,
            np.concatenate(parts[:-1] if slots else parts),
            places[: len(places) - slots],
            visible_until(self._history, chunk),
            np.concatenate([starts[place] + np.arange(sizes[place]) for place in targets]),
            np.concatenate([self.answers[item] for item in self._history.item_ids[chunk.targets].tolist()]),
            sizes[targets],
        )

    def text(self, interaction: Interaction, i: int, *, slots: bool | None = None) -> str:
        """What sample ``i`` is scored behind, as the LLM gets it; slots as ``[item vector]``.

        Args:
            interaction: samples of the dataset.
            i: which of them.
            slots: ``None``: ``item_slots``.
        """
        slots = self.item_slots if slots is None else slots
        (stream,) = self.encode(interaction[i : i + 1], slots=slots).streams
        return self._decoded(stream.input_ids)
