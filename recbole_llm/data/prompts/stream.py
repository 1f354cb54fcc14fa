"""From chunks of a user's interactions to token ids: the text stream.

A header and one line per interaction, from the template ``properties/prompt/stream_ctr.yaml``::

    Stars from a viewer, female, aged 25-34, artist:
    Fargo:4
    The Terminator:5
    Heat:                     the last target of a chunk ends it

The state at each ``:`` predicts the answer behind it: one of K values of the rating scale, or one of two words where
the data has only labels. Every text (header, title, answer, ...) is tokenised once and alone; lines are assembled from
the integers. A text that stands alone gives the same tokens in every line, so that a stream cut to one target has
exactly the tokens of the same lines as a prompt.
"""

from __future__ import annotations

import logging
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from recbole.data.interaction import Interaction
from transformers import PreTrainedTokenizerBase

from recbole_llm.data.ctr import CTRDataset
from recbole_llm.data.dataset import HISTORY_END
from recbole_llm.data.item_text import UserText
from recbole_llm.data.prompts.lines import TemplateKind, TemplatePrompts, bos_ids, tokenize_inert
from recbole_llm.data.streams import Chunk, StreamCutter, stored

logger = logging.getLogger(__name__)

STREAM_VERSION = 1
"""To be raised whenever this code writes other streams from the same template and data."""


def _check_stream(template: dict[str, Any], where: str) -> None:
    limit, words = template["max_title_tokens"], template["words"]
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ValueError(f"{where}: max_title_tokens must be an int >= 1, not {limit!r}")
    if (
        not isinstance(words, (list, tuple))
        or len(words) != 2
        or not all(isinstance(word, str) and word.strip() for word in words)
    ):
        raise ValueError(f"{where}: words must be two words, that for label 1 first, not {words!r}")
    if (
        "{lens_score}" in template["item"].partition("{title}")[0]
        or template["item"].count("{lens_score}") > 1
    ):
        raise ValueError(f"{where}: item may hold {{lens_score}} once, behind {{title}}")


STREAM_TEMPLATE = TemplateKind(
    task="ctr with layout: stream",
    defaults={
        "words_header": "",
        "profile_format": ", {profile}",
        "answer": "auto",
        "words": ("yes", "no"),
        "letters": "",
        "max_title_tokens": 24,
        "show_profile": True,
        "item_slots": False,
        "obfuscate_titles": False,
    },
    required=("header", "item"),
    placeholders={
        "header": {"profile", "scale"},
        "words_header": {"profile"},
        "profile_format": {"profile"},
        "letters": {"lowest", "highest"},
        "item": {"title", "lens_score"},
    },
    titled=("item",),
    choices={"answer": ("auto", "stars", "words")},
    further=_check_stream,
)
_SCORES = [f"{cent / 100:.2f}" for cent in range(101)]


@dataclass
class EncodedStream:
    """One chunk as token ids.

    Attributes:
        chunk: what it is made of.
        input_ids: int64 ``[T]``; a negative entry ``-i`` is the slot of item ``i``.
        places: int64 ``[T]``: which interaction of the chunk each token belongs to, -1 for the header.
        answers_at: int64 ``[k]``: the token whose state predicts the answer of each target.
    """

    chunk: Chunk
    input_ids: np.ndarray
    places: np.ndarray
    answers_at: np.ndarray


@dataclass
class EncodedStreams:
    """Chunks as token ids; the attributes of :class:`~recbole_llm.data.prompts.lines.EncodedPrompts` and the streams.

    Attributes:
        streams: one per chunk.
        n_shortened: how many lost history to fit: none, because the cutter sees to it.
    """

    streams: list[EncodedStream]
    n_shortened: int = 0

    @property
    def input_ids(self) -> list[np.ndarray]:
        """Token ids of each chunk."""
        return [stream.input_ids for stream in self.streams]


class StreamPrompts(TemplatePrompts):
    """Turns chunks into token ids.

    Args:
        dataset: a built dataset; samples of any of its splits can be encoded.
        prompt_config: a template of :data:`STREAM_TEMPLATE`.
        max_prompt_tokens: longest chunk, in tokens.
        lead, context: earlier interactions that a chunk shows, see :class:`~recbole_llm.data.streams.StreamCutter`.
        rating_scale: all values that a rating may have; ``None``: those that occur.
        lens_scores: ``lens_scores(chunks) -> probabilities``, what ``{lens_score}`` says of their interactions. May
            be given later, but before the first chunk is encoded.

    Attributes:
        cutter: cuts users' interactions into chunks that fit.
        class_ids: the token that each answer begins with, ``K`` ids.
        classes: the answer of every interaction, int64 ``[n]`` in ``[0, K)``.
        likes: which answers mean label 1, bool ``[K]``.
        item_slots: whether a slot follows each title in hybrid streams.

    Raises:
        ValueError: if the answers cannot be told apart, ratings are not on the scale, labels are no function of the
            ratings where ``answer: stars`` asks for it, or a line does not fit into a chunk.
    """

    version = STREAM_VERSION
    user_slot = False
    """Streams have no slot of the user: what it would hold changes with every interaction."""
    _dataset: CTRDataset
    _history: Any  # with labels, and where the answers are stars, with ratings
    values: Any
    """Of the rating scale, float64 ``[K]``, ascending; ``None`` where the answers are words."""

    def __init__(
        self,
        dataset: CTRDataset,
        tokenizer: PreTrainedTokenizerBase,
        prompt_config: Mapping[str, Any],
        *,
        max_prompt_tokens: int,
        lead: int = 5,
        context: int = 25,
        rating_scale: Sequence[float] | None = None,
        lens_scores: Callable[[Sequence[Chunk]], np.ndarray] | None = None,
    ) -> None:
        super().__init__(dataset, tokenizer, STREAM_TEMPLATE, prompt_config)
        self.lens_scores = lens_scores
        self.item_slots: bool = self.template["item_slots"]
        self._max_tokens, self._lead, self._context = max_prompt_tokens, lead, context
        self._slotted_items = dataset.item_num
        self._choose_answers(rating_scale)
        self._tokenise_lines()
        self._tokenise_headers()
        self.cutter = self._new_cutter()

    def _new_cutter(self) -> StreamCutter:
        scored = max(map(len, self._scores)) if self.tells_lens else 0
        self._rest = len(self._colon) + len(self._between) + scored + self.item_slots + len(self._break)
        lengths = np.array([len(title) for title in self._titles])
        answers = np.array([len(answer) for answer in self._answers])
        return StreamCutter(
            self._history,
            openings=self._history.opens_split,
            budget=self._max_tokens,
            costs=lengths[self._history.item_ids] + answers[self.classes] + self._rest,
            prefix_costs=np.array([len(header) for header in self._headers]),
            lead=self._lead,
            context=self._context,
            unit="tokens (max_prompt_tokens)",
        )

    def check_later(self, ratings: np.ndarray | None) -> None:
        """Whether later interactions have answers that the model was trained with.

        Args:
            ratings: theirs, float; ``None``: the data has none.

        Raises:
            ValueError: naming ratings that are not on the scale.
        """
        if self.values is None or ratings is None:
            return
        off = np.setdiff1d(np.asarray(ratings, dtype=np.float64).round(6), self.values)
        if len(off):
            raise ValueError(
                f"ratings of the new interactions are none of {self._named_scale()}, the answers that the model was "
                f"trained with: {', '.join(f'{value:g}' for value in off[:5])}"
            )

    def refresh(self) -> None:
        """Follow interactions, users and items that were appended to the dataset; the answers stay what they are."""
        self._items = self._dataset.item_text(obfuscate=self.template["obfuscate_titles"])
        self.classes = self._classes()
        self._tokenise_lines()
        self._tokenise_headers()
        self.cutter = self._new_cutter()

    def _classes(self) -> np.ndarray:
        """The answer of every interaction, int64 ``[n]`` in ``[0, K)``."""
        if self.values is None:
            return np.where(self._history.labels > 0, 0, 1)
        return np.searchsorted(self.values, self._history.ratings.astype(np.float64).round(6))

    # ------------------------------------------------------------------ once

    def _ids(self, *texts: str) -> list[np.ndarray]:
        return tokenize_inert(self._tokenizer, list(texts))

    def _choose_answers(self, rating_scale: Sequence[float] | None) -> None:
        """Set what the answers are, how they read and which of them each interaction has."""
        dataset, history, wanted = self._dataset, self._history, self.template["answer"]
        threshold = dataset.threshold
        decides = history.ratings is not None and threshold is not None and dataset._rating_field in threshold
        if wanted == "stars" and not decides:
            raise ValueError(
                f"prompt: answer: stars needs labels that are a threshold on the ratings, and {dataset.dataset_name} "
                f"has {'no ratings' if history.ratings is None else f'threshold: {threshold}'}; set answer: words"
            )
        before = self.template["item"].rpartition("}")[2]
        if wanted == "words" or threshold is None or not decides:
            if wanted == "auto":
                logger.info("labels are no threshold on ratings: the answers are %s", self.template["words"])
            self.values, self.answer_words = None, tuple(self.template["words"])
            self.likes, self._letters = np.array([True, False]), False
            self._answers = self._behind(before, self.answer_words)
            firsts = [int(ids[0]) for ids in self._answers]
            if firsts[0] == firsts[1]:
                raise ValueError(
                    f"prompt: words {self.answer_words} begin with the same token of this backbone's tokenizer; use "
                    "other words"
                )
        else:
            self.values = self._scale(rating_scale)
            cut = next(iter(threshold.values()))
            self.likes = self.values >= cut
            if self.likes.all() or not self.likes.any():
                raise ValueError(
                    f"threshold: {threshold} makes all of the ratings {self._named_scale()} the same label"
                )
            self._read_values(before)
        self.classes = self._classes()
        self.class_ids = [int(ids[0]) for ids in self._answers]

    def _scale(self, rating_scale: Sequence[float] | None) -> np.ndarray:
        """All values of the rating scale, float64, ascending."""
        found = np.unique(self._history.ratings.astype(np.float64).round(6))
        if rating_scale is None:
            return found
        declared = np.unique(np.asarray(rating_scale, dtype=np.float64).round(6))
        if len(off := np.setdiff1d(found, declared)):
            count = int(np.isin(self._history.ratings.astype(np.float64).round(6), off).sum())
            raise ValueError(
                f"rating_scale: {count:,} ratings of {self._dataset.dataset_name} are none of "
                f"{[float(f'{v:g}') for v in declared]}, e.g. {', '.join(f'{v:g}' for v in off[:5])}; correct the "
                "data or the scale"
            )
        return declared

    def _named_scale(self) -> str:
        shown = [f"{value:g}" for value in self.values]
        return ", ".join(shown if len(shown) <= 12 else [*shown[:5], "...", shown[-1]])

    def _read_values(self, before: str) -> None:
        """Let the values read as they are, or, where first tokens do not tell them apart, as letters."""
        texts = [f"{value:g}" for value in self.values]
        answers = self._behind(before, texts)
        self._letters = len({int(ids[0]) for ids in answers}) < len(texts)
        if self._letters:
            letters = list(string.ascii_uppercase[: len(texts)])
            answers = self._behind(before, letters)
            if len(letters) < len(texts) or len({int(ids[0]) for ids in answers}) < len(texts):
                raise ValueError(
                    f"the {len(texts)} ratings {self._named_scale()} of {self._dataset.dataset_name} cannot be told "
                    "apart by their first tokens, and letters do not reach: set answer: words in the prompt's "
                    "template, or round the ratings"
                )
            logger.info(
                "the ratings %s share first tokens of this tokenizer: letters stand for them, %s for %s to %s for %s",
                *(self._named_scale(), letters[0], texts[0], letters[-1], texts[-1]),
            )
            texts = letters
        self.answer_words, self._answers = tuple(texts), answers

    def _behind(self, before: str, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text as it reads behind ``before``.

        Tokenizers that put a blank before every text (SentencePiece) would else begin all answers with that blank.
        """
        stem, *whole = self._ids(before or ":", *(f"{before or ':'}{text}" for text in texts))
        inside = all(len(ids) > len(stem) and np.array_equal(ids[: len(stem)], stem) for ids in whole)
        return [ids[len(stem) :] for ids in whole] if inside else self._ids(*texts)

    def _tokenise_lines(self) -> None:
        """Titles, and what stands around them, each once."""
        opening, _, rest = self.template["item"].partition("{title}")
        between, _, colon = rest.rpartition("{lens_score}")
        self._between, self._colon, self._break = (
            ids if text else np.array([], dtype=np.int64)
            for text, ids in zip((between, colon, "\n"), self._ids(between, colon, "\n"), strict=True)
        )
        self._scores = self._behind(between, _SCORES) if self.tells_lens else []
        limit = self.template["max_title_tokens"]
        items = range(1, len(self._items.titles))
        texts = [opening + self._items.titles[item] for item in items]
        self._titles = [np.array([], dtype=np.int64)]
        long = 0
        for item, ids in zip(items, self._ids(*texts), strict=True):
            if not len(ids):
                raise ValueError(
                    f"the title of item {self._dataset.id2token(self._dataset.iid_field, int(item))} is empty"
                )
            long += len(ids) > limit
            self._titles.append(ids[:limit])
        if long:
            logger.info("%d of %d titles are cut to %d tokens (max_title_tokens)", long, len(texts), limit)

    def _tokenise_headers(self) -> None:
        """The header of every user, with the token that begins a text where the tokenizer has one."""
        profiles = UserText(self._dataset).profiles if self.template["show_profile"] else None
        template = self.template["header"]
        if self.values is None:
            template = self.template["words_header"] or template
        scale = ""
        if self.values is not None and self._letters:
            scale = self.template["letters"].format(
                lowest=self.answer_words[0], highest=self.answer_words[-1]
            )
        texts = []
        for user in range(self._dataset.user_num):
            known = profiles[user] if profiles else ""
            profile = self.template["profile_format"].format(profile=known) if known else ""
            texts.append(template.format(profile=profile, scale=scale) + "\n")
        distinct, place = np.unique(texts, return_inverse=True)
        bos, ids = bos_ids(self._tokenizer), self._ids(*distinct.tolist())
        self._headers = [np.concatenate([bos, ids[i]]) for i in place.tolist()]

    # ------------------------------------------------------------------ what models ask

    @property
    def has_slots(self) -> bool:
        """Whether this template has hybrid streams."""
        return self.item_slots

    @property
    def tells_lens(self) -> bool:
        """Whether lines state the lens's probability."""
        return "{lens_score}" in self.template["item"]

    def answer_to(self, interaction: Interaction, i: int) -> str:
        """The answer of sample ``i`` as it reads."""
        return self.answer_words[self.classes[int(interaction[HISTORY_END][i])]]

    # ------------------------------------------------------------------ chunks

    def encode(self, interaction: Interaction, *, slots: bool = False) -> EncodedStreams:
        """The chunks that samples are scored in, at most ``max_prompt_tokens`` long each.

        Samples that are interactions of the history share chunks. Any other, of an item that the history has not at
        this place, has a chunk of its own: that of the item appended there to the user's stream, its answer being
        counted as long as the longest one.

        Args:
            interaction: samples of the dataset, with ``user_id``, ``item_id`` and ``history_end``.
            slots: hybrid streams, where the template has them.

        Returns:
            The chunks of stored samples, by user and time; then those of the others, in the order given.
        """
        users, items, ends = self.samples(interaction)
        mine = stored(self._history, users, items, ends)
        return self.encode_chunks(
            [
                *self.cutter.evaluation_chunks(ends[mine]),
                *map(self.appended, users[~mine].tolist(), items[~mine].tolist(), ends[~mine].tolist()),
            ],
            slots=slots,
        )

    def samples(self, interaction: Interaction) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Users, items and places of samples, int64 ``[B]`` each."""
        fields = self._dataset.uid_field, self._dataset.iid_field, HISTORY_END
        users, items, ends = (interaction[field].cpu().numpy() for field in fields)
        return users, items, ends

    def appended(self, user: int, item: int, end: int) -> Chunk:
        """The chunk of an item at a place of a user's stream, where it may come next."""
        longest = max(map(len, self._answers))
        return self.cutter.appended_chunk(user, end, item, len(self._titles[item]) + longest + self._rest)

    def encode_chunks(self, chunks: Sequence[Chunk], *, slots: bool = False) -> EncodedStreams:
        """Token ids of chunks.

        Raises:
            ValueError: if lines are to state a score that nobody gives.
        """
        scores = self._scores_of(chunks)
        return EncodedStreams(
            [self._encode(chunk, score, slots) for chunk, score in zip(chunks, scores, strict=True)]
        )

    def _scores_of(self, chunks: Sequence[Chunk]) -> list[np.ndarray | None]:
        if not self.tells_lens or not chunks:
            return [None] * len(chunks)
        if self.lens_scores is None:
            raise ValueError("the prompt states the score of a lens, and there is none: set lens: DIN")
        found = self.lens_scores(chunks)
        cents = np.rint(100 * np.asarray(found)).astype(np.int64)
        return [*np.split(cents, np.cumsum([len(chunk) for chunk in chunks])[:-1])]

    def _encode(self, chunk: Chunk, cents: np.ndarray | None, slots: bool) -> EncodedStream:
        positions = chunk.positions
        parts, ends = [self._headers[chunk.user]], []  # of each interaction: the tokens up to its answer
        places, total = [np.full(len(parts[0]), -1)], len(parts[0])
        items, classes = chunk.items(self._history).tolist(), self.classes[positions[:-1]].tolist()
        last = len(positions) - 1
        for place, item in enumerate(items):
            line = [self._titles[item]]
            if (
                slots and self.item_slots and item < self._slotted_items
            ):  # no lens has a vector of later items
                line.append(np.array([-item]))
            if cents is not None:
                line += [self._between, self._scores[cents[place]]]
            line.append(self._colon)
            total += sum(map(len, line))
            ends.append(total)
            if place < last:
                line += [self._answers[classes[place]], self._break]
                total += len(line[-2]) + len(line[-1])
            parts += line
            places.append(np.full(sum(map(len, line)), place))
        return EncodedStream(
            chunk,
            np.concatenate(parts).astype(np.int64),
            np.concatenate(places),
            np.array(ends, dtype=np.int64)[chunk.target_places] - 1,
        )

    def text(self, interaction: Interaction, i: int, *, slots: bool = True) -> str:
        """The stream of sample ``i`` up to its answer, as the LLM gets it; slots as ``[item vector]``."""
        (stream,) = self.encode(interaction[i : i + 1], slots=slots).streams
        return self._decoded(stream.input_ids)
