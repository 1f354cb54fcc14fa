"""Prompts that ask for the next item, and titles as their answers.

A prompt is a sequence of *lines* made from the templates of ``properties/prompt/<name>.yaml``::

    instruction                        the same for all samples
    history_header                     the same for all samples
    history_item                       one per (item, stars), oldest first
    candidates_header                  the same for all samples
    candidate_item                     one per candidate, in the order they are given
    question                           the same for all samples; ends where the answer follows

and the answer is a title and a line break. In a *hybrid* prompt (LLaRA: Liao et al. "LLaRA: Large
Language-Recommendation Assistant", SIGIR 2024) each title is followed by a *slot*, one input embedding that the
model makes from the lens's vector of the item. Among the token ids the slot of item ``i`` is ``-i``::

    text          The Alpha (1991)\\n          hybrid          The Alpha (1991)[item vector]\\n
    ids           [464, 26041, 357, ..., 198]                 [464, 26041, 357, ..., -17, 198]

Nothing in a prompt depends on which of the candidates is the target, so one prompt serves them all. How lines
become token ids, and why that is exact: :mod:`~recbole_llm.data.prompts.lines`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
from recbole.data.interaction import Interaction
from transformers import PreTrainedTokenizerBase

from recbole_llm.data.dataset import HISTORY_END, HistoryDataset
from recbole_llm.data.prompts.lines import (
    FORMAT_PLACEHOLDERS,
    ITEM_FORMATS,
    ITEM_PLACEHOLDERS,
    EncodedPrompts,
    Line,
    LinePrompts,
    TemplateKind,
    tokenize_behind,
)
from recbole_llm.data.retriever import Retriever, SemanticRetriever
from recbole_llm.utils.fields import ROW_ID

TITLE_TEMPLATE = TemplateKind(
    task="next_item",
    defaults={
        "instruction": "",
        "history_header": "",
        "history_empty": "",
        "candidates_header": "",
        "candidate_item": "{title}{year}{genre}",
        **ITEM_FORMATS,
        "show_stars": False,
        "show_year": True,
        "show_genre": False,
        "list_candidates": "auto",
        "item_slots": False,
        "obfuscate_titles": False,
        "chat_template": False,
    },
    required=("history_item", "question", "answer"),
    placeholders={
        "history_item": ITEM_PLACEHOLDERS,
        "candidate_item": ITEM_PLACEHOLDERS - {"stars"},
        "question": set(),
        "answer": {"title", "year"},
        **FORMAT_PLACEHOLDERS,
    },
    titled=("history_item", "candidate_item", "answer"),
    choices={"list_candidates": (True, False, "auto")},
)


class TitlePromptBuilder(LinePrompts):
    """Turns samples into prompts, and items into answers.

    Args:
        dataset: a built dataset; samples of any of its splits can be encoded.
        prompt_config: a template of :data:`TITLE_TEMPLATE`.
        max_prompt_tokens: longer prompts lose their oldest history. A slot counts as a token.
        retriever: which earlier interactions are shown. May be replaced later.
        candidates: ``candidates(row_ids [B]) -> items [B, C]``, the candidates of samples in the order to show them;
            ``None``: there are none to show. May be replaced later.

    Attributes:
        assembled: whether prompts are put together from lines tokenised once; otherwise whole strings are
            tokenised.
        item_slots: whether prompts of this template may have slots.
        terminator: token ids of the line break that ends an answer, int64, not empty.
        stop_ids: tokens at which a written answer ends: the line break and the tokenizer's end of text.

    Raises:
        ValueError: for an impossible template, a chat template that the tokenizer does not have, ``list_candidates``
            without candidates, or a retriever that looks at the target.
    """

    def __init__(
        self,
        dataset: HistoryDataset,
        tokenizer: PreTrainedTokenizerBase,
        prompt_config: Mapping[str, Any],
        *,
        max_prompt_tokens: int,
        retriever: Retriever,
        candidates: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        super().__init__(
            dataset,
            tokenizer,
            TITLE_TEMPLATE,
            prompt_config,
            max_prompt_tokens=max_prompt_tokens,
            retriever=retriever,
        )
        self.candidates = candidates
        self.item_slots: bool = self.template["item_slots"]
        if self.template["list_candidates"] is True and candidates is None:
            raise ValueError(
                "list_candidates: True, but every item is ranked, so there are no candidates to list; set it to "
                "auto or False, or rank among candidates"
            )
        self._check_retriever()
        (self.terminator,) = tokenize_behind(tokenizer, "a", ["\n"])
        if not len(self.terminator):
            raise ValueError(
                "this tokenizer drops line breaks, which separate titles and end answers; use another backbone"
            )
        eos = tokenizer.eos_token_id
        self.stop_ids: list[int] = sorted({int(self.terminator[-1]), *([] if eos is None else [eos])})
        self._choose_assembly(
            self._sample(slots) for slots in ([False, True] if self.item_slots else [False])
        )

    @property
    def lists_candidates(self) -> bool:
        """Whether prompts list the candidates."""
        return self.template["list_candidates"] is not False and self.candidates is not None

    def _check_retriever(self) -> None:
        if isinstance(self.retriever, SemanticRetriever):
            raise ValueError(
                "text_retrieval: semantic picks the history by its similarity to the target, which a prompt for the "
                "next item must not know; set it to recent"
            )

    def _sample(self, slots: bool) -> list[Line]:
        """One prompt with many histories and candidates."""
        positions = self._sample_positions()
        return self._lines(positions, self._history.item_ids[positions].tolist(), slots)

    # ------------------------------------------------------------------ answers

    @cached_property
    def answers(self) -> list[np.ndarray]:
        """Token ids of each item's answer as it stands behind a prompt, by internal id, int64 and never empty.

        Each ends with the terminator; entry 0, of the padding item, is nothing else. Items with the same text
        have the same answer.
        """
        behind = "" if self.template["chat_template"] else self._line_text(("question",))
        titles = tokenize_behind(
            self._tokenizer, behind, [self.answer_text(item) for item in range(1, len(self._items.titles))]
        )
        return [self.terminator, *(np.concatenate([ids, self.terminator]) for ids in titles)]

    def answer_text(self, item: int) -> str:
        """The answer that names an item, as it stands behind a prompt (with its blank) and without the line break."""
        return self._item_text(self.template["answer"], "answer", item)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The title in what an LLM wrote: its first line, without special tokens and outer blanks.

        The line break may hide in a token of its own kind, such as ")\\\\n" of Llama 3, which is no stop id.
        """
        text = self._tokenizer.decode(np.asarray(ids, dtype=np.int64), skip_special_tokens=True)
        return text.partition("\n")[0].strip()

    # ------------------------------------------------------------------ lines

    def _lines(
        self, positions: np.ndarray, candidates: Sequence[int] | None, slots: bool, cut: bool = False
    ) -> list[Line]:
        """The lines of one prompt.

        Args:
            positions: the history to show, ascending in time.
            candidates: the items to list; ``None``: no list.
            slots: whether a slot follows each title.
            cut: whether there is more history than that; if so, an empty one is not called empty.
        """
        lines = self._block("instruction", [])
        if len(positions):
            lines += self._block("history_header", self._history_lines(positions), slots)
        elif not cut:
            lines += self._block("history_empty", [])
        if candidates is not None:
            items = [("candidate_item", item) for item in candidates]
            lines += self._block("candidates_header", items, slots)
        return [*lines, ("question",)]

    def _block(self, header: str, items: list[Line], slots: bool = False) -> list[Line]:
        """A header, unless it is empty, and the lines of items."""
        lines: list[Line] = [(header,)] if self.template[header] else []
        for line in items:
            lines += self._with_slot(line, line[1]) if slots else [line]
        return lines

    def _template_text(self, line: Line) -> str:
        kind, *about = line
        template = self.template[kind]
        if kind in ("history_item", "candidate_item"):
            return self._item_text(template, kind, *about) + "\n"
        return template.format() + ("" if kind == "question" else "\n")

    # ------------------------------------------------------------------ prompts

    def encode(self, interaction: Interaction, *, slots: bool) -> EncodedPrompts:
        """Token ids of each sample's prompt, at most ``max_prompt_tokens`` long.

        Args:
            interaction: samples of the dataset, with ``user_id``, ``history_end`` and, where candidates are listed,
                ``row_id``. The target is not looked at.
            slots: whether a slot ``-i`` follows the title of each item ``i``.

        Raises:
            ValueError: if a prompt is too long even without any history, or for slots that the template rules out.
        """
        if slots and not self.item_slots:
            raise ValueError("item_slots: False, so this template's prompts have no slots; set it to True")
        prompts = [self._fit_row(*row, slots) for row in self._rows(interaction)]
        return EncodedPrompts([ids for ids, _, _ in prompts], sum(shortened for _, _, shortened in prompts))

    def text(self, interaction: Interaction, i: int, *, slots: bool | None = None) -> str:
        """The prompt of sample ``i``, in full, as the LLM gets it (with the turns of a chat template).

        Args:
            interaction: samples of the dataset.
            i: which of them.
            slots: whether slots, shown as ``[item vector]``, follow the titles. ``None``: ``item_slots``.
        """
        slots = self.item_slots if slots is None else slots
        _, lines, _ = self._fit_row(*self._rows(interaction[i : i + 1])[0], slots)
        return self._full_text(lines)

    def _rows(self, interaction: Interaction) -> list[tuple[int, np.ndarray, list[int] | None]]:
        """User, positions of the history to show, and candidates of each sample."""
        self._check_retriever()
        users, ends = (interaction[field].cpu().numpy() for field in (self._dataset.uid_field, HISTORY_END))
        # Item 0 in place of the target: no retriever can let it decide what is shown.
        found = self.retriever.positions(users, np.zeros_like(users), ends)
        histories = [row[row >= 0] for row in found]
        listed = self._candidates(interaction) if self.lists_candidates else [None] * len(users)
        return list(zip(users.tolist(), histories, listed, strict=True))

    def _shortest(self, interaction: Interaction) -> Iterator[tuple[int, Callable[[], object]]]:
        users = interaction[self._dataset.uid_field].cpu().numpy().tolist()
        listed = self._candidates(interaction) if self.lists_candidates else [None] * len(users)
        none, titles = np.zeros(0, dtype=np.int64), self._items.titles
        for user, items in zip(users, listed, strict=True):
            length = sum(len(titles[item]) for item in items or ())
            yield length, partial(self._fit_row, user, none, items, self.item_slots)

    def _candidates(self, interaction: Interaction) -> list[list[int]]:
        row_ids = interaction[ROW_ID].cpu().numpy()
        items = np.asarray(cast(Callable, self.candidates)(row_ids))  # where they are listed, there are some
        if items.ndim != 2 or len(items) != len(row_ids):
            raise ValueError(
                f"candidates of shape {items.shape} for {len(row_ids)} samples; [samples, candidates] expected"
            )
        wrong = (items < 1) | (items >= self._dataset.item_num)
        if wrong.any():
            row = int(wrong.any(axis=1).argmax())
            raise ValueError(
                f"candidates of row_id {row_ids[row]}: {items[row].tolist()} are not all items, which are numbered "
                f"from 1 to {self._dataset.item_num - 1}"
            )
        return items.tolist()

    def _fit_row(
        self, user: int, positions: np.ndarray, candidates: list[int] | None, slots: bool
    ) -> tuple[np.ndarray, list[Line], bool]:
        """Token ids and lines of one prompt, and whether history had to be dropped."""
        return self._fit(
            positions,
            lambda left, cut: self._lines(left, candidates, slots, cut),
            lambda: (
                f"user {self._name(self._dataset.uid_field, user)}"
                + (f" and {len(candidates)} candidates" if candidates is not None else "")
            ),
        )
