"""From rows to token ids.

A prompt is a sequence of *lines* made from the templates of ``properties/prompt/<name>.yaml``::

    instruction                        the same for all rows
    profile                            one per user
    history_header                     the same for all rows
    history_item                       one per (item, stars), oldest first
    ...
    target                             one per item
    question                           the same for all rows; ends where the answer word follows

Each line is tokenised once, and prompts are assembled from the integers. This gives the tokens of the whole
string wherever a line break separates what tokenisers never join; byte-level BPE (GPT-2, Llama 3, Qwen,
SmolLM2) does, since their pre-tokenisers never let a word begin inside one line and end in the next. Whether
it holds is checked with the tokenizer at hand; if not (SentencePiece with a prefix space), whole strings are
tokenised.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
from recbole.data.interaction import Interaction
from transformers import PreTrainedTokenizerBase

from recbole_llm.config import load_yaml, properties_dir
from recbole_llm.data.dataset import HISTORY_END, CTRDataset
from recbole_llm.data.retriever import Retriever
from recbole_llm.data.text import UserText

logger = logging.getLogger(__name__)

Line = tuple[Any, ...]
"""What identifies a line: its kind, and the user, the item or (item, number of stars) it is about."""

# Placeholders that each template may hold.
_ITEM_PLACEHOLDERS = {"title", "stars", "year", "genre"}
_PLACEHOLDERS = {
    "instruction": {"threshold", "max_rating"},
    "profile": {"profile"},
    "history_header": set(),
    "liked_header": set(),
    "disliked_header": set(),
    "history_empty": set(),
    "history_item": _ITEM_PLACEHOLDERS,
    "target": _ITEM_PLACEHOLDERS - {"stars"},
    "question": set(),
    "stars_format": {"stars"},
    "year_format": {"year"},
    "genre_format": {"genre"},
}
_SHOW = (True, False, "history", "target")
_DEFAULTS: dict[str, Any] = {
    "history": "timeline",
    "history_header": "",
    "liked_header": "",
    "disliked_header": "",
    "history_empty": "",
    "profile": "",
    "instruction": "",
    "stars_format": "{stars} ",
    "year_format": " ({year})",
    "genre_format": " [{genre}]",
    "show_profile": True,
    "show_stars": True,
    "show_year": False,
    "show_genre": False,
    "obfuscate_titles": False,
    "chat_template": False,
}
_REQUIRED = ("history_item", "target", "question", "answers")
_STABILITY_SAMPLE = 512


def load_prompt_config(name: str | Path) -> dict[str, Any]:
    """The template of that name in ``properties/prompt``, or in a yaml file.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if a key is unknown, missing, or holds something else than it may.
    """
    folder = properties_dir() / "prompt"
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        raise FileNotFoundError(f"prompt: {name!r} is neither a yaml file nor one of {known}")
    return check_prompt_config(load_yaml(path), str(path))


def check_prompt_config(config: Mapping[str, Any], where: str = "prompt") -> dict[str, Any]:
    """A complete template: defaults filled in, everything checked.

    Raises:
        ValueError: naming the key and ``where`` it stands.
    """
    known = sorted({*_DEFAULTS, *_REQUIRED})
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            raise ValueError(
                f"{where}: unknown key {key!r}; "
                + (f"did you mean {near[0]}?" if near else f"known: {known}")
            )
    missing = [key for key in _REQUIRED if not config.get(key)]
    if missing:
        raise ValueError(f"{where}: {missing} must be given and not be empty")
    full = {**_DEFAULTS, **config}
    for key, allowed in _PLACEHOLDERS.items():
        if not isinstance(full[key], str):
            raise ValueError(f"{where}: {key} must be text, not {full[key]!r}")
        try:
            names = {name for _, name, _, _ in Formatter().parse(full[key]) if name is not None}
        except ValueError as error:
            raise ValueError(f"{where}: {key}: {error}; write {{{{ and }}}} for braces") from error
        if not names <= allowed:
            unknown = sorted(names - allowed)
            raise ValueError(
                f"{where}: {key} has no value for {unknown}; it may hold {sorted(allowed) or 'no braces'}"
            )
    for key in ("history_item", "target"):
        if "{title}" not in full[key]:
            raise ValueError(f"{where}: {key} must hold {{title}}")
    for key in ("show_year", "show_genre"):
        if full[key] not in _SHOW:
            raise ValueError(f"{where}: {key} must be true, false, history or target, not {full[key]!r}")
    for key in ("show_profile", "show_stars", "obfuscate_titles", "chat_template"):
        if not isinstance(full[key], bool):
            raise ValueError(f"{where}: {key} must be true or false, not {full[key]!r}")
    if full["history"] not in ("timeline", "by_label"):
        raise ValueError(f"{where}: history must be timeline or by_label, not {full['history']!r}")
    answers = full["answers"]
    pair = (
        isinstance(answers, (list, tuple)) and len(answers) == 2 and all(isinstance(a, str) for a in answers)
    )
    if not pair or not all(a.strip() for a in answers) or answers[0] == answers[1]:
        raise ValueError(
            f"{where}: answers must be two different words, yes first, e.g. [' Yes', ' No'], not {answers!r}"
        )
    return full


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


@dataclass
class EncodedPrompts:
    """Prompts of a batch.

    Attributes:
        input_ids: int64 arrays, one per row.
        n_shortened: how many of them lost history to fit into ``max_prompt_tokens``.
    """

    input_ids: list[np.ndarray]
    n_shortened: int


class PromptBuilder:
    """Turns rows into prompts.

    Args:
        dataset: a built dataset; rows of any of its splits can be encoded.
        tokenizer: the LLM's.
        prompt_config: a template, see :func:`load_prompt_config`.
        max_prompt_tokens: longer prompts lose their oldest history.
        retriever: which earlier interactions are shown. May be replaced later.

    Attributes:
        assembled: whether prompts are put together from lines tokenised once; otherwise whole strings are
            tokenised.

    Raises:
        ValueError: for an impossible template, or a chat template that the tokenizer does not have.
    """

    def __init__(
        self,
        dataset: CTRDataset,
        tokenizer: PreTrainedTokenizerBase,
        prompt_config: Mapping[str, Any],
        *,
        max_prompt_tokens: int,
        retriever: Retriever,
    ):
        if dataset.history is None:
            raise ValueError("PromptBuilder needs a dataset after build()")
        self.config = check_prompt_config(prompt_config)
        self.retriever = retriever
        self.max_prompt_tokens = max_prompt_tokens
        self._dataset, self._tokenizer, self._history = dataset, tokenizer, dataset.history
        self._items = dataset.item_text(obfuscate=self.config["obfuscate_titles"])
        self._profiles = (
            UserText(dataset).profiles if self.config["show_profile"] and self.config["profile"] else None
        )
        self._number_stars()
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        self._bos = np.array([bos] if adds_bos else [], dtype=np.int64)
        self._before, self._after = self._frame()
        self._pieces: dict[Line, np.ndarray] = {}
        self.assembled = self._lines_are_stable()
        if not self.assembled:
            logger.info(
                "this tokenizer joins text across line breaks: whole prompts are tokenised, which is slower"
            )

    @property
    def answer_words(self) -> tuple[str, str]:
        """(yes, no)"""
        return tuple(self.config["answers"])

    # ------------------------------------------------------------------ once

    def _number_stars(self) -> None:
        """Number the rating values, so that a history line is identified by (item, number)."""
        ratings = self._history.ratings
        self._shows_stars = self.config["show_stars"] and ratings is not None
        if self.config["show_stars"] and ratings is None:
            logger.warning("%s has no ratings: prompts show no stars", self._dataset.dataset_name)
        if self._shows_stars:
            values, self._star = np.unique(ratings, return_inverse=True)
            self._star_texts = [f"{value:g}" for value in values]

    def _frame(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids before and after the text: BOS if the tokenizer itself adds it, or the chat turns."""
        tokenizer = self._tokenizer
        if not self.config["chat_template"]:
            return self._bos, np.array([], dtype=np.int64)
        if tokenizer.chat_template is None:
            raise ValueError("chat_template: True, but the tokenizer has no chat template; set it to False")
        mark = "@@prompt@@"
        turn = [{"role": "user", "content": mark}]
        before, _, after = tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True
        ).partition(mark)
        frame = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))
        return tuple(np.asarray(ids, dtype=np.int64) for ids in frame)

    def _lines_are_stable(self) -> bool:
        """Whether tokenising line by line gives the tokens of the whole string, on a sample."""
        items = self._history.item_ids
        positions = np.arange(0, len(items), max(1, len(items) // _STABILITY_SAMPLE))
        user = int(np.searchsorted(self._history.user_start, 0, side="right")) - 1
        *lines, question = self._lines(user, int(items[0]), positions)
        lines += [*(("target", item) for item in items[positions].tolist()), question]
        whole = tokenize_inert(self._tokenizer, ["".join(map(self._line_text, lines))])[0]
        return np.array_equal(np.concatenate(self._line_ids(lines)), whole)

    # ------------------------------------------------------------------ lines

    def _lines(self, user: int, item: int, positions: np.ndarray, *, cut: bool = False) -> list[Line]:
        """The lines of one prompt.

        Args:
            user: internal user id.
            item: internal id of the target.
            positions: the history to show, ascending in time.
            cut: whether there is more history than that; if so, an empty one is not called empty.
        """
        lines: list[Line] = [("instruction",)] if self.config["instruction"] else []
        if self._profiles is not None and self._profiles[user]:
            lines.append(("profile", user))
        if not len(positions):
            lines += [("history_empty",)] if self.config["history_empty"] and not cut else []
        elif self.config["history"] == "timeline":
            lines += self._block("history_header", positions)
        else:
            liked = self._history.labels[positions] > 0
            lines += self._block("liked_header", positions[liked]) + self._block(
                "disliked_header", positions[~liked]
            )
        return [*lines, ("target", item), ("question",)]

    def _block(self, header: str, positions: np.ndarray) -> list[Line]:
        if not len(positions):
            return []
        items = self._history.item_ids[positions].tolist()
        stars = self._star[positions].tolist() if self._shows_stars else [None] * len(items)
        lines = [("history_item", *pair) for pair in zip(items, stars, strict=True)]
        return [(header,), *lines] if self.config[header] else lines

    def _line_text(self, line: Line) -> str:
        kind, *about = line
        template = self.config[kind]
        if kind == "instruction":
            threshold = self._dataset.config["threshold"]
            values = {
                "threshold": f"{next(iter(threshold.values())):g}" if threshold else "1",
                "max_rating": self._star_texts[-1] if self._shows_stars else f"{self._largest_rating():g}",
            }
            text = template.format(**values)
        elif kind == "profile":
            text = template.format(profile=self._profiles[about[0]])
        elif kind in ("history_item", "target"):
            text = self._item_text(template, kind.removesuffix("_item"), *about)
        else:
            text = template.format()
        return text if kind == "question" else text + "\n"

    def _largest_rating(self) -> float:
        ratings = self._history.ratings
        return 1 if ratings is None else float(ratings.max())

    def _item_text(self, template: str, where: str, item: int, star: int | None = None) -> str:
        parts = {"title": self._items.titles[item], "stars": "", "year": "", "genre": ""}
        if star is not None:
            parts["stars"] = self.config["stars_format"].format(stars=self._star_texts[star])
        for name, values in (("year", self._items.years), ("genre", self._items.genres)):
            if values[item] and self.config[f"show_{name}"] in (True, where):
                parts[name] = self.config[f"{name}_format"].format(**{name: values[item]})
        return template.format(**parts)

    def _line_ids(self, lines: Iterable[Line]) -> list[np.ndarray]:
        lines = list(lines)
        new = list(dict.fromkeys(line for line in lines if line not in self._pieces))
        if new:
            self._pieces.update(
                zip(new, tokenize_inert(self._tokenizer, list(map(self._line_text, new))), strict=True)
            )
        return [self._pieces[line] for line in lines]

    # ------------------------------------------------------------------ prompts

    def encode(self, interaction: Interaction) -> EncodedPrompts:
        """Token ids of each row's prompt, at most ``max_prompt_tokens`` long.

        Args:
            interaction: rows of the dataset, with ``user_id``, ``item_id`` and ``history_end``.

        Raises:
            ValueError: if a prompt is too long even without any history.
        """
        prompts = [self._fit(*row) for row in self._rows(interaction)]
        return EncodedPrompts([ids for ids, _, _ in prompts], sum(shortened for _, _, shortened in prompts))

    def text(self, interaction: Interaction, i: int) -> str:
        """The prompt of row ``i``, in full, as the LLM gets it (with the turns of a chat template)."""
        _, lines, _ = self._fit(*self._rows(interaction[i : i + 1])[0])
        body = "".join(map(self._line_text, lines))
        if self.config["chat_template"]:
            return self._tokenizer.decode(self._before) + body + self._tokenizer.decode(self._after)
        return body

    def item_token_ids(self) -> list[np.ndarray]:
        """Token ids of each item's title and genres, by internal id; row 0 is a mere line break."""
        texts = ["\n", *self._items.descriptions()[1:]]
        return [np.concatenate([self._bos, ids]) for ids in tokenize_inert(self._tokenizer, texts)]

    def _rows(self, interaction: Interaction) -> list[tuple[int, int, np.ndarray]]:
        users, items, ends = (
            interaction[field].cpu().numpy()
            for field in (self._dataset.uid_field, self._dataset.iid_field, HISTORY_END)
        )
        found = self.retriever.positions(users, items, ends)
        return [
            (user, item, row[row >= 0])
            for user, item, row in zip(users.tolist(), items.tolist(), found, strict=True)
        ]

    def _fit(self, user: int, item: int, positions: np.ndarray) -> tuple[np.ndarray, list[Line], bool]:
        """Token ids and lines of one prompt, and whether history had to be dropped."""
        for dropped in range(len(positions) + 1):
            lines = self._lines(user, item, positions[dropped:], cut=dropped > 0)
            if self.assembled:
                body = self._line_ids(lines)
            else:
                body = tokenize_inert(self._tokenizer, ["".join(map(self._line_text, lines))])
            ids = np.concatenate([self._before, *body, self._after])
            if len(ids) <= self.max_prompt_tokens:
                return ids, lines, dropped > 0
        raise ValueError(
            f"max_prompt_tokens: {self.max_prompt_tokens} is too small: the prompt for user "
            f"{self._dataset.id2token(self._dataset.uid_field, user)} and item "
            f"{self._dataset.id2token(self._dataset.iid_field, item)} needs {len(ids)} tokens without "
            "any history"
        )
