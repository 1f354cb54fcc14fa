"""What every prompt is made of: a checked template, and lines that are tokenised once.

Each line of a prompt is tokenised once, and prompts are assembled from the integers. This gives the tokens of
the whole string wherever a line break separates what tokenisers never join; byte-level BPE (GPT-2, Llama 3,
Qwen, SmolLM2) does, since their pre-tokenisers never let a word begin inside one line and end in the next.
Whether it holds is checked with the tokenizer at hand; if not (SentencePiece with a prefix space), whole
strings are tokenised.
"""

from __future__ import annotations

import difflib
import hashlib
import heapq
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
from recbole.data.interaction import Interaction
from transformers import PreTrainedTokenizerBase

from recbole_llm.data.dataset import HistoryDataset
from recbole_llm.data.item_text import ItemText
from recbole_llm.data.retriever import Retriever
from recbole_llm.data.text_settings import WORDS
from recbole_llm.utils.yaml_files import load_yaml, properties_dir

logger = logging.getLogger(__name__)

Line = tuple[Any, ...]
"""What identifies a line: its kind, and the user, the item or (item, number of stars) it is about."""

SLOT = "slot"
"""Kind of the lines ``(SLOT, item)``, which are no text: their one entry ``-item`` stands for a vector."""
_OPEN, _BREAK = "open", "break"  # lines ("open", *line), which lack their line break, and ("break",)

SLOT_TEXT, USER_SLOT_TEXT = "[item vector]", "[user vector]"
"""How the text of a prompt shows a slot."""

ITEM_PLACEHOLDERS = frozenset({"title", "stars", "year", "genre"})
ITEM_FORMATS = {"stars_format": "{stars} ", "year_format": " ({year})", "genre_format": " [{genre}]"}
"""Defaults of the keys that say how the parts of an item's line read."""
FORMAT_PLACEHOLDERS = {"stars_format": {"stars"}, "year_format": {"year"}, "genre_format": {"genre"}}
STABILITY_SAMPLE = 512
LONGEST = 64
"""Prompts without history that are tried before anything is trained."""

PROMPT_VERSION = 1
"""Part of every run's identity: to be raised when the same template, text and sample come to give another prompt."""


# ---------------------------------------------------------------------------------------------- templates


@dataclass(frozen=True)
class TemplateKind:
    """Which keys the templates of one task have. Defaults of text and of true or false are checked as such.

    Attributes:
        task: the task's name.
        defaults: keys that may be left out, and their values.
        required: keys that must be given.
        placeholders: which placeholders a text may hold beside the words of the ``text`` section
            (:meth:`~recbole_llm.data.text_settings.TextSettings.words`); required texts are listed even if none.
        titled: keys that must hold ``{title}``.
        choices: what a key may be that is neither any text nor true or false.
        further: checks what these attributes cannot say; called with a complete template and where it stands.
    """

    task: str
    defaults: Mapping[str, Any]
    required: tuple[str, ...]
    placeholders: Mapping[str, frozenset[str] | set[str]]
    titled: tuple[str, ...]
    choices: Mapping[str, tuple[bool | str, ...]]
    further: Callable[[dict[str, Any], str], None] = lambda template, where: None

    @property
    def texts(self) -> dict[str, frozenset[str] | set[str]]:
        """The keys that hold any text, and the placeholders of each."""
        plain = [
            key for key, value in self.defaults.items() if isinstance(value, str) and key not in self.choices
        ]
        return {**dict.fromkeys(plain, frozenset()), **self.placeholders}

    def load(self, name: str | Path) -> dict[str, Any]:
        """The template of that name in ``properties/prompt``, or in a yaml file.

        Raises:
            FileNotFoundError: if there is neither, naming the packaged templates of this kind.
            ValueError: if a key is unknown, missing, or holds something else than it may.
        """
        folder = properties_dir() / "prompt"
        path = Path(name)
        if path.suffix not in (".yaml", ".yml"):
            path = folder / f"{name}.yaml"
        if not path.is_file():
            known = [p.stem for p in sorted(folder.glob("*.yaml")) if set(self.required) <= set(load_yaml(p))]
            raise FileNotFoundError(f"prompt: {name!r} is neither a yaml file nor one of {known}")
        return self.check(load_yaml(path), str(path))

    def check(self, config: Mapping[str, Any], where: str = "prompt") -> dict[str, Any]:
        """A complete template: defaults filled in, everything checked.

        Raises:
            ValueError: naming the key and ``where`` it stands.
        """
        known = sorted({*self.defaults, *self.required})
        for key in config:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                raise ValueError(
                    f"{where}: unknown key {key!r}; "
                    + (f"did you mean {near[0]}?" if near else f"known: {known}")
                    + f" (read as a template of the {self.task} task)"
                )
        missing = [key for key in self.required if not config.get(key)]
        if missing:
            raise ValueError(f"{where}: {missing} must be given and not be empty")
        full = {**self.defaults, **config}
        for key, allowed in self.texts.items():
            if not isinstance(full[key], str):
                raise ValueError(f"{where}: {key} must be text, not {full[key]!r}")
            try:
                names = {name for _, name, _, _ in Formatter().parse(full[key]) if name is not None}
            except ValueError as error:
                raise ValueError(f"{where}: {key}: {error}; write {{{{ and }}}} for braces") from error
            if not names <= allowed | WORDS:
                unknown = sorted(names - allowed - WORDS)
                raise ValueError(
                    f"{where}: {key} has no value for {unknown}; it may hold {sorted(allowed) or 'none of its own'} "
                    f"and the words {sorted(word for word in WORDS if word.islower())}"
                )
        for key in self.titled:
            if "{title}" not in full[key]:
                raise ValueError(f"{where}: {key} must hold {{title}}")
        flags = {key: (True, False) for key, default in self.defaults.items() if isinstance(default, bool)}
        for key, choices in {**flags, **self.choices}.items():
            if not any(type(full[key]) is type(choice) and full[key] == choice for choice in choices):
                *others, last = (str(c).lower() if isinstance(c, bool) else c for c in choices)
                raise ValueError(f"{where}: {key} must be {', '.join(others)} or {last}, not {full[key]!r}")
        self.further(full, where)
        return full

    def in_words(self, config: Mapping[str, Any], words: Mapping[str, str]) -> dict[str, Any]:
        """A checked template with the words of a domain in place; other placeholders stay."""
        return {**config, **{key: _with_words(config[key], words) for key in self.texts}}


def _with_words(template: str, words: Mapping[str, str]) -> str:
    """
    >>> _with_words("{{a}} {a_noun}: {title}", {"a_noun": "a {book}"})
    '{{a}} a {{book}}: {title}'
    """
    text = ""
    for literal, name, spec, conversion in Formatter().parse(template):
        text += literal.replace("{", "{{").replace("}", "}}")
        if name is not None and name in words:
            text += words[name].replace("{", "{{").replace("}", "}}")
        elif name is not None:
            text += "{" + name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "") + "}"
    return text


# ----------------------------------------------------------------------------------------------- token ids


def tokenize_inert(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text as plain text: nothing is added, and special tokens in it are spelled out.

    Raises:
        ValueError: if the tokenizer still finds a special token in a text.
    """
    if not texts:
        return []
    encoded = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
    )
    ids = [np.asarray(row, dtype=np.int64) for row in encoded["input_ids"]]
    special = np.array([i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id], dtype=np.int64)
    for row, text in zip(ids, texts, strict=True):
        if np.isin(row, special).any():
            raise ValueError(f"this tokenizer reads a special token in the text {text!r}; change the text")
    return ids


def tokenize_behind(
    tokenizer: PreTrainedTokenizerBase, before: str, texts: Sequence[str]
) -> list[np.ndarray]:
    """Token ids of each text as it stands behind ``before``; alone, where the two are joined into a token.

    For byte-level BPE both are the same; SentencePiece writes a blank before a text that stands alone.
    """
    lead, *whole = tokenize_inert(tokenizer, [before, *(before + text for text in texts)])
    apart = [np.array_equal(ids[: len(lead)], lead) for ids in whole]
    alone = tokenize_inert(tokenizer, [t for t, a in zip(texts, apart, strict=True) if not a])
    rest = iter(alone)
    return [ids[len(lead) :] if a else next(rest) for ids, a in zip(whole, apart, strict=True)]


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The token that begins every text, where the tokenizer itself puts one; else nothing."""
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return np.array([bos] if adds_bos else [], dtype=np.int64)


def item_token_ids(items: ItemText, tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """Token ids of each item's title and genres, by internal id; row 0 is a mere line break."""
    texts, bos = ["\n", *items.descriptions()[1:]], bos_ids(tokenizer)
    return [np.concatenate([bos, ids]) for ids in tokenize_inert(tokenizer, texts)]


@dataclass
class EncodedPrompts:
    """Prompts of a batch.

    Attributes:
        input_ids: int64 arrays, one per sample; a negative entry ``-i`` is the slot of item ``i``, and ``-n_items``,
            one past the last item, that of the sample's user.
        n_shortened: how many of them lost history to fit into ``max_prompt_tokens``.
    """

    input_ids: list[np.ndarray]
    n_shortened: int


class TemplatePrompts:
    """What prompts of every kind are made of: a template in the words of the data, and the texts of the items.

    Args:
        dataset: a built dataset; samples of any of its splits can be encoded.
        kind: which keys its templates have.
        template: with keys of this kind.

    Attributes:
        template: the complete template, in the words of the data.

    Raises:
        ValueError: if the dataset is not built, or for an impossible template.
    """

    version = PROMPT_VERSION
    """Of the code that makes token ids of a template and samples."""

    def __init__(
        self,
        dataset: HistoryDataset,
        tokenizer: PreTrainedTokenizerBase,
        kind: TemplateKind,
        template: Mapping[str, Any],
    ) -> None:
        if dataset.history is None:
            raise ValueError(f"{type(self).__name__} needs a dataset after build()")
        self.template = kind.in_words(kind.check(template), dataset.text_settings.words())
        self._dataset, self._tokenizer, self._history = dataset, tokenizer, dataset.history
        self._items = dataset.item_text(obfuscate=self.template["obfuscate_titles"])

    def identities(self) -> dict[str, str]:
        """What prompts are made of beside samples and tokenizer: hashes, and the version of this code, by name."""
        return {
            "template": sha256_of(self.template),
            "titles": sha256_of(self._item_texts()),
            "prompt version": str(self.version),
        }

    def _item_texts(self) -> list[Any]:
        return [self._items.titles, self._items.years, self._items.genres]

    def item_token_ids(self) -> list[np.ndarray]:
        """Token ids of each item's title and genres, by internal id; row 0 is a mere line break."""
        return item_token_ids(self._items, self._tokenizer)

    def _decoded(self, ids: np.ndarray) -> str:
        """Token ids as text, slots as ``[item vector]``."""
        pieces = np.split(ids, np.flatnonzero(np.diff(ids < 0)) + 1)
        return "".join(SLOT_TEXT if piece[0] < 0 else self._tokenizer.decode(piece) for piece in pieces)


class LinePrompts(TemplatePrompts):
    """Prompts assembled from lines. A subclass says which lines a sample has, and how each of them reads.

    Args:
        dataset, kind, template: as of :class:`TemplatePrompts`.
        max_prompt_tokens: longer prompts lose their oldest history.
        retriever: which earlier interactions are shown. May be replaced later.

    Attributes:
        assembled: whether prompts are put together from lines tokenised once; otherwise whole strings are
            tokenised.

    Raises:
        ValueError: if the dataset is not built, or for a chat template that the tokenizer does not have.
    """

    assembled: bool

    def __init__(
        self,
        dataset: HistoryDataset,
        tokenizer: PreTrainedTokenizerBase,
        kind: TemplateKind,
        template: Mapping[str, Any],
        *,
        max_prompt_tokens: int,
        retriever: Retriever,
    ):
        super().__init__(dataset, tokenizer, kind, template)
        self.retriever = retriever
        self.max_prompt_tokens = max_prompt_tokens
        self._number_stars()
        self._bos = bos_ids(tokenizer)
        self._before, self._after = self._frame()
        self._pieces: dict[Line, np.ndarray] = {}

    # ------------------------------------------------------------------ once

    def _number_stars(self) -> None:
        """Number the rating values, so that a history line is identified by (item, number)."""
        ratings = self._history.ratings
        self._shows_stars = self.template["show_stars"] and ratings is not None
        if ratings is None:
            if self.template["show_stars"]:
                logger.warning("%s has no ratings: prompts show no stars", self._dataset.dataset_name)
        elif self._shows_stars:
            values, self._star = np.unique(ratings, return_inverse=True)
            self._star_texts = [rating_text(value) for value in values]

    def _frame(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids before and after the text: BOS if the tokenizer itself adds it, or the chat turns."""
        tokenizer = self._tokenizer
        if not self.template["chat_template"]:
            return self._bos, np.array([], dtype=np.int64)
        if tokenizer.chat_template is None:
            raise ValueError("chat_template: True, but the tokenizer has no chat template; set it to False")
        mark = "@@prompt@@"
        turn = [{"role": "user", "content": mark}]
        before, _, after = tokenizer.apply_chat_template(
            turn,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # Qwen3's answer would begin with its thoughts; other templates ignore it
        ).partition(mark)
        first, last = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))
        return np.asarray(first, dtype=np.int64), np.asarray(last, dtype=np.int64)

    def _choose_assembly(self, samples: Iterable[list[Line]]) -> None:
        """Set ``assembled``: whether line by line gives the tokens of the whole string, on these prompts."""
        self.assembled = all(
            np.array_equal(np.concatenate(self._line_ids(lines)), self._whole_ids(lines)) for lines in samples
        )
        if not self.assembled:
            logger.info(
                "this tokenizer joins text across line breaks: whole prompts are tokenised, which is slower"
            )

    def _sample_positions(self) -> np.ndarray:
        """Positions of the history, evenly spread, whose items make a sample for :meth:`_choose_assembly`."""
        n = len(self._history.item_ids)
        return np.arange(0, n, max(1, n // STABILITY_SAMPLE))

    # ------------------------------------------------------------------ lines

    def _template_text(self, line: Line) -> str:
        """The text of a line that a template makes, with its line break."""
        raise NotImplementedError

    def _line_text(self, line: Line) -> str:
        kind = line[0]
        if kind == _OPEN:
            return self._template_text(line[1:]).removesuffix("\n")
        if kind == SLOT:
            return USER_SLOT_TEXT if line[1] == self._dataset.item_num else SLOT_TEXT
        return "\n" if kind == _BREAK else self._template_text(line)

    @staticmethod
    def _with_slot(line: Line, item: int) -> list[Line]:
        """A line of text and, before its line break, the slot of an item (``n_items``: of the user)."""
        return [(_OPEN, *line), (SLOT, item), (_BREAK,)]

    def _history_lines(self, positions: np.ndarray) -> list[Line]:
        items = self._history.item_ids[positions].tolist()
        stars = self._star[positions].tolist() if self._shows_stars else [None] * len(items)
        return [("history_item", *pair) for pair in zip(items, stars, strict=True)]

    def _item_text(self, template: str, where: str, item: int, star: int | None = None) -> str:
        parts = {"title": self._items.titles[item], "stars": "", "year": "", "genre": ""}
        if star is not None:
            parts["stars"] = self.template["stars_format"].format(stars=self._star_texts[star])
        for name, values in (("year", self._items.years), ("genre", self._items.genres)):
            if values[item] and self.template[f"show_{name}"] in (True, where):
                parts[name] = self.template[f"{name}_format"].format(**{name: values[item]})
        return template.format(**parts)

    def _line_ids(self, lines: Iterable[Line]) -> list[np.ndarray]:
        """Token ids of each line, tokenised alone when first met."""
        lines = list(lines)
        new = list(dict.fromkeys(line for line in lines if line not in self._pieces))
        slots, texts = ([line for line in new if (line[0] == SLOT) == slot] for slot in (True, False))
        self._pieces.update({line: np.array([-line[1]], dtype=np.int64) for line in slots})
        if texts:
            ids = tokenize_inert(self._tokenizer, list(map(self._line_text, texts)))
            self._pieces.update(zip(texts, ids, strict=True))
        return [self._pieces[line] for line in lines]

    def _whole_ids(self, lines: Iterable[Line]) -> np.ndarray:
        """Token ids of all lines as one string, which only slots interrupt."""
        groups = [
            (is_slot, list(group)) for is_slot, group in groupby(lines, key=lambda line: line[0] == SLOT)
        ]
        texts = ["".join(map(self._line_text, group)) for is_slot, group in groups if not is_slot]
        ids = iter(tokenize_inert(self._tokenizer, texts))
        return np.concatenate(
            [
                part
                for is_slot, group in groups
                for part in (self._line_ids(group) if is_slot else [next(ids)])
            ]
        )

    # ------------------------------------------------------------------ prompts

    def _fit(
        self,
        positions: np.ndarray,
        lines_of: Callable[[np.ndarray, bool], list[Line]],
        what: Callable[[], str],
    ) -> tuple[np.ndarray, list[Line], bool]:
        """Token ids and lines of one prompt, and whether history had to be dropped.

        Args:
            positions: the history to show, ascending in time.
            lines_of: the lines for the positions that are left; its second argument is whether some are not.
            what: whose prompt it is, for the error.

        Raises:
            ValueError: if the prompt is too long even without any history.
        """
        for dropped in range(len(positions) + 1):
            lines = lines_of(positions[dropped:], dropped > 0)
            body = self._line_ids(lines) if self.assembled else [self._whole_ids(lines)]
            ids = np.concatenate([self._before, *body, self._after])
            if len(ids) <= self.max_prompt_tokens:
                return ids, lines, dropped > 0
        raise ValueError(
            f"max_prompt_tokens: {self.max_prompt_tokens} is too small: the prompt for {what()} needs "
            f"{len(ids)} tokens without any history"
        )

    def check_length(self, interaction: Interaction) -> None:
        """Refuse samples whose prompt is too long even without any history; the `LONGEST` by their text are tried.

        Raises:
            ValueError: naming the first one and its length.
        """
        for _, encode in heapq.nlargest(LONGEST, self._shortest(interaction), key=itemgetter(0)):
            encode()

    def _shortest(self, interaction: Interaction) -> Iterator[tuple[int, Callable[[], object]]]:
        """Of each sample, characters of the text that stays without history, and what encodes that prompt."""
        raise NotImplementedError

    def _full_text(self, lines: Iterable[Line]) -> str:
        """The text of these lines as the LLM gets it, with the turns of a chat template."""
        body = "".join(map(self._line_text, lines))
        if self.template["chat_template"]:
            return self._tokenizer.decode(self._before) + body + self._tokenizer.decode(self._after)
        return body

    def _name(self, field: str, internal_id: int) -> str:
        return str(self._dataset.id2token(field, internal_id))


def rating_text(value: float) -> str:
    """A rating as the file has it: 5, 3.5, 1234567.

    >>> rating_text(np.float32(5)), rating_text(np.float32(4.1)), rating_text(np.float32(1234567))
    ('5', '4.1', '1234567')
    """
    return np.format_float_positional(value, trim="-")


def sha256_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
