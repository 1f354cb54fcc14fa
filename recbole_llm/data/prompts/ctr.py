"""From samples to token ids.

A prompt is a sequence of *lines* made from the templates of ``properties/prompt/<name>.yaml``::

    instruction                        the same for all samples
    profile                            one per user
    user_slot                          the same for all samples; a slot follows it
    history_header                     the same for all samples
    history_item                       one per (item, stars), oldest first
    ...
    target                             one per item
    lens_score                         one per probability in per cent; only where a template wants it
    question                           the same for all samples; ends where the answer word follows

In a hybrid prompt a *slot* follows some lines: one input embedding that the model makes from a vector of the lens.
Among the token ids the slot of item ``i`` is ``-i``, behind its title, and that of the sample's user ``-n_items``.

How lines become token ids, and why that is exact: :mod:`~recbole_llm.data.prompts.lines`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from string import Formatter
from typing import Any, cast

import numpy as np
from recbole.data.interaction import Interaction
from transformers import PreTrainedTokenizerBase

from recbole_llm.backbone.answers import answer_token_ids
from recbole_llm.data.ctr import CTRDataset
from recbole_llm.data.dataset import HISTORY_END, RECENT_TEXT
from recbole_llm.data.prompts.lines import (
    FORMAT_PLACEHOLDERS,
    ITEM_FORMATS,
    ITEM_PLACEHOLDERS,
    EncodedPrompts,
    Line,
    LinePrompts,
    TemplateKind,
    rating_text,
    sha256_of,
)
from recbole_llm.data.retriever import RecentRetriever, Retriever

logger = logging.getLogger(__name__)

_SHOW = (True, False, "history", "target")


def _check_answers(template: dict[str, Any], where: str) -> None:
    if template["lens_score"] and "{lens_score}" not in template["lens_score"]:
        raise ValueError(f"{where}: lens_score must hold {{lens_score}}, or be empty")
    answers = template["answers"]
    pair = (
        isinstance(answers, (list, tuple)) and len(answers) == 2 and all(isinstance(a, str) for a in answers)
    )
    if not pair or not all(a.strip() for a in answers) or answers[0] == answers[1]:
        raise ValueError(
            f"{where}: answers must be two different words, yes first, e.g. [' Yes', ' No'], not {answers!r}"
        )


CTR_TEMPLATE = TemplateKind(
    task="ctr",
    defaults={
        "history": "timeline",
        "history_header": "",
        "liked_header": "",
        "disliked_header": "",
        "history_empty": "",
        "profile": "",
        "user_slot": "",
        "lens_score": "",
        "instruction": "",
        "instruction_labels": "",
        **ITEM_FORMATS,
        "show_profile": True,
        "show_stars": True,
        "show_year": False,
        "show_genre": False,
        "item_slots": False,
        "obfuscate_titles": False,
        "chat_template": False,
    },
    required=("history_item", "target", "question", "answers"),
    placeholders={
        "instruction": {"threshold", "max_rating", "of_max"},
        "profile": {"profile"},
        "history_item": ITEM_PLACEHOLDERS,
        "target": ITEM_PLACEHOLDERS - {"stars"},
        "lens_score": {"lens_score"},
        "question": set(),
        **FORMAT_PLACEHOLDERS,
    },
    titled=("history_item", "target"),
    choices={
        "show_year": _SHOW,
        "show_genre": _SHOW,
        "item_slots": (True, False, "target"),
        "history": ("timeline", "by_label"),
    },
    further=_check_answers,
)


class PromptBuilder(LinePrompts):
    """Turns samples into prompts.

    Args:
        dataset: a built dataset; samples of any of its splits can be encoded.
        prompt_config: a template of :data:`CTR_TEMPLATE`.
        max_prompt_tokens: longer prompts lose their oldest history.
        retriever: which earlier interactions are shown. May be replaced later.
        lens_scores: ``lens_scores(samples) -> probabilities [B]``, what the line ``lens_score`` says of samples of the
            dataset. May be given later, but before the first prompt.

    Attributes:
        assembled: whether prompts are put together from lines tokenised once; otherwise whole strings are
            tokenised.
        item_slots: which titles a slot follows in hybrid prompts: none (``False``), all (``True``) or ``target``.
        user_slot: whether hybrid prompts have a slot of the sample's user.

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
        lens_scores: Callable[[Interaction], np.ndarray] | None = None,
    ):
        super().__init__(
            dataset,
            tokenizer,
            CTR_TEMPLATE,
            prompt_config,
            max_prompt_tokens=max_prompt_tokens,
            retriever=retriever,
        )
        self.lens_scores = lens_scores
        self._instruction = self._instruction_text()
        by_label = (
            self.template["liked_header"] and self.template["disliked_header"] and not self._shows_stars
        )
        if by_label and self.template["history"] == "timeline" and self.template["show_stars"]:
            logger.info("the history is shown as liked and other items, as there are no ratings to show")
            self.template["history"] = "by_label"
        self._profiles = (
            dataset.user_text().profiles
            if self.template["show_profile"] and self.template["profile"]
            else None
        )
        self.item_slots: bool | str = self.template["item_slots"]
        self.user_slot = bool(self.template["user_slot"])
        self._choose_assembly(self._sample(slots) for slots in {False, self.has_slots})

    def _instruction_text(self) -> str:
        """The first line, for labels that a threshold makes or that the data has.

        Raises:
            ValueError: if it names the highest rating, and ratings have no scale.
        """
        template, threshold = self.template["instruction"], self._dataset.threshold
        names = {name for _, name, _, _ in Formatter().parse(template) if name}
        if not threshold and names:  # no ratings to speak of
            return self.template["instruction_labels"].format()
        scale = self._dataset.text_settings.scale_of(self._history.ratings)
        if scale is None and "max_rating" in names:
            raise ValueError(
                f"prompt: the instruction says {{max_rating}}, but the ratings of {self._dataset.dataset_name} are no "
                "scale; set text.rating_scale, e.g. [1, 5], or write {of_max}, which is empty then"
            )
        highest = "" if scale is None else rating_text(np.float32(scale[1]))
        return template.format(
            threshold=f"{next(iter(threshold.values())):g}" if threshold else "",
            max_rating=highest,
            of_max=highest and f" of {highest}",
        )

    def identities(self) -> dict[str, str]:
        """As of every prompt, and the profiles."""
        return super().identities() | {"profiles": sha256_of([self._profiles, self._instruction])}

    @property
    def answer_words(self) -> tuple[str, str]:
        """(yes, no)"""
        return tuple(self.template["answers"])

    @property
    def before_answer(self) -> str | np.ndarray:
        """What the answer stands behind: the question, or the token ids that end a chat's turn."""
        return self._after if self.template["chat_template"] else self._line_text(("question",))

    @cached_property
    def answer_ids(self) -> list[int]:
        """The token that each answer begins with, behind the end of the prompt.

        Raises:
            ValueError: if both begin with the same.
        """
        return answer_token_ids(self._tokenizer, self.answer_words, behind=self.before_answer)

    @property
    def has_slots(self) -> bool:
        """Whether this template has hybrid prompts."""
        return self.user_slot or bool(self.item_slots)

    @property
    def tells_lens(self) -> bool:
        """Whether prompts say the lens's score."""
        return bool(self.template["lens_score"])

    def _sample(self, slots: bool = False) -> list[Line]:
        """One prompt with many histories and targets."""
        items, positions = self._history.item_ids, self._sample_positions()
        user = int(np.searchsorted(self._history.user_start, 0, side="right")) - 1
        *lines, question = self._lines(user, int(items[0]), positions, slots=slots)
        scores = [("lens_score", f"{cent / 100:.2f}") for cent in range(101)] if self.tells_lens else []
        targets = [line for item in items[positions].tolist() for line in self._target(item, slots)]
        return [*lines, *targets, *scores, question]

    def _shortest(self, interaction: Interaction) -> Iterator[tuple[int, Callable[[], object]]]:
        users, items = (
            interaction[field].cpu().numpy() for field in (self._dataset.uid_field, self._dataset.iid_field)
        )
        none, score = np.zeros(0, dtype=np.int64), "0.50" if self.tells_lens else None
        for user, item in dict.fromkeys(zip(users.tolist(), items.tolist(), strict=True)):
            length = len(self._items.titles[item]) + len(self._items.genres[item])
            length += len(self._profiles[user]) if self._profiles is not None else 0
            yield length, partial(self._fit_row, user, item, none, score, slots=self.has_slots)

    # ------------------------------------------------------------------ lines

    def _lines(
        self,
        user: int,
        item: int,
        positions: np.ndarray,
        score: str | None = None,
        *,
        slots: bool = False,
        cut: bool = False,
    ) -> list[Line]:
        """The lines of one prompt.

        Args:
            user: internal user id.
            item: internal id of the target.
            positions: the history to show, ascending in time.
            score: the lens's, as the prompt says it; ``None``: no such line.
            slots: whether the prompt is a hybrid one.
            cut: whether there is more history than that; if so, an empty one is not called empty.
        """
        lines: list[Line] = [("instruction",)] if self._instruction else []
        if self._profiles is not None and self._profiles[user]:
            lines.append(("profile", user))
        if slots and self.user_slot:
            lines += self._with_slot(("user_slot",), self._dataset.item_num)
        behind_history = slots and self.item_slots is True
        if not len(positions):
            lines += [("history_empty",)] if self.template["history_empty"] and not cut else []
        elif self.template["history"] == "timeline":
            lines += self._block("history_header", positions, behind_history)
        else:
            liked = cast(np.ndarray, self._history.labels)[positions] > 0
            lines += self._block("liked_header", positions[liked], behind_history)
            lines += self._block("disliked_header", positions[~liked], behind_history)
        lens = [] if score is None else [("lens_score", score)]
        return [*lines, *self._target(item, slots), *lens, ("question",)]

    def _target(self, item: int, slots: bool) -> list[Line]:
        line = ("target", item)
        return self._with_slot(line, item) if slots and self.item_slots else [line]

    def _block(self, header: str, positions: np.ndarray, slots: bool) -> list[Line]:
        if not len(positions):
            return []
        lines = self._history_lines(positions)
        if slots:
            lines = [part for line in lines for part in self._with_slot(line, line[1])]
        return [(header,), *lines] if self.template[header] else lines

    def _template_text(self, line: Line) -> str:
        kind, *about = line
        template = self.template[kind]
        if kind == "instruction":
            text = self._instruction
        elif kind == "profile":
            text = template.format(profile=cast(list, self._profiles)[about[0]])
        elif kind == "lens_score":
            text = template.format(lens_score=about[0])
        elif kind in ("history_item", "target"):
            text = self._item_text(template, kind.removesuffix("_item"), *about)
        else:
            text = template.format()
        return text if kind == "question" else text + "\n"

    # ------------------------------------------------------------------ prompts

    def encode(self, interaction: Interaction, *, slots: bool = False) -> EncodedPrompts:
        """Token ids of each sample's prompt, at most ``max_prompt_tokens`` long.

        Args:
            interaction: samples of the dataset, with ``user_id``, ``item_id`` and ``history_end``; where there is
                ``recent_text`` (:meth:`HistoryDataset.mixed`), it says whose history is the recent one.
            slots: hybrid prompts, where the template has them.

        Raises:
            ValueError: if a prompt is too long even without any history, or is to say a score that nobody gives.
        """
        prompts = [self._fit_row(*row, slots=slots) for row in self._rows(interaction)]
        return EncodedPrompts([ids for ids, _, _ in prompts], sum(shortened for _, _, shortened in prompts))

    def encode_shared(self, interaction: Interaction) -> tuple[list[np.ndarray], list[int]]:
        """Token ids as of :meth:`encode`, and how many of each stand before the target's line.

        These first tokens depend on the user alone, if the retriever does. Only of prompts that are ``assembled``.
        """
        ids, shared = [], []
        for row in self._rows(interaction):
            found, lines, _ = self._fit_row(*row, slots=False)
            before = lines[: next(i for i, line in enumerate(lines) if line[0] == "target")]
            ids.append(found)
            shared.append(len(self._before) + sum(map(len, self._line_ids(before))))
        return ids, shared

    def text(self, interaction: Interaction, i: int, *, slots: bool = True) -> str:
        """The prompt of sample ``i``, in full, as the LLM gets it (with the turns of a chat template).

        Slots, where the template has them, are shown as ``[item vector]`` and ``[user vector]``.
        """
        _, lines, _ = self._fit_row(*self._rows(interaction[i : i + 1])[0], slots=slots)
        return self._full_text(lines)

    def answer_to(self, interaction: Interaction, i: int) -> str:
        """The right answer of sample ``i``."""
        return self.answer_words[1 - int(interaction[self._dataset.label_field][i])]

    def _rows(self, interaction: Interaction) -> list[tuple[int, int, np.ndarray, str | None]]:
        """User, target, positions of the history to show, and the lens's score as text of each sample."""
        users, items, ends = (
            interaction[field].cpu().numpy()
            for field in (self._dataset.uid_field, self._dataset.iid_field, HISTORY_END)
        )
        found = self.retriever.positions(users, items, ends)
        if RECENT_TEXT in interaction:
            latest = RecentRetriever(self._history, self.retriever.k).positions(users, items, ends)
            found = np.where(interaction[RECENT_TEXT].cpu().numpy()[:, None] > 0, latest, found)
        return [
            (user, item, row[row >= 0], score)
            for user, item, row, score in zip(
                users.tolist(), items.tolist(), found, self._scores(interaction), strict=True
            )
        ]

    def _scores(self, interaction: Interaction) -> list[str | None]:
        """The lens's probability of each sample to two decimals, as the prompt says it; ``None`` where it does not."""
        if not self.tells_lens:
            return [None] * len(interaction)
        if self.lens_scores is None:
            raise ValueError(
                "the prompt's line lens_score says the score of a lens, and there is none: set lens: DIN"
            )
        return [f"{score:.2f}" for score in np.asarray(self.lens_scores(interaction)).tolist()]

    def _fit_row(
        self, user: int, item: int, positions: np.ndarray, score: str | None, *, slots: bool
    ) -> tuple[np.ndarray, list[Line], bool]:
        """Token ids and lines of one prompt, and whether history had to be dropped."""
        return self._fit(
            positions,
            lambda left, cut: self._lines(user, item, left, score, slots=slots, cut=cut),
            lambda: (
                f"user {self._name(self._dataset.uid_field, user)} and item "
                f"{self._name(self._dataset.iid_field, item)}"
            ),
        )
