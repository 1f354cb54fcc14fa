"""Evaluation of generated answers: which candidate a text names, and how often it names one at all.

A language model that writes its answer may misquote a title, name two, or name none. Every test sample stays in the
denominator of `hit_ratio_all`; an answer that names no candidate is a miss. The
share of usable answers is reported beside it, and so is the accuracy among those alone, which by itself
rewards a model for answering only the easy ones.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from recbole_llm.evaluation.bootstrap import bootstrap_ratios

GENERATION_METRICS = ("valid_ratio", "hit_ratio_all", "hit_ratio_valid")
_QUOTES = "\"'«»‹›「」『』"
_STRAIGHT = str.maketrans(dict.fromkeys("`´‘’‚‛", "'") | dict.fromkeys("“”„‟", '"'))
_UNSPACED = (  # scripts written without spaces between words
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # kana
    (0x3400, 0x9FFF),  # Han
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)


def normalise_title(text: str) -> str:
    """The form in which titles are compared.

    NFKC, case folded, straight quotes, single spaces, and neither quotes around it nor a dot at the end.

    >>> normalise_title('  “The  GODFATHER (1972)”. ')
    'the godfather (1972)'
    """
    text = unicodedata.normalize("NFKC", text.translate(_STRAIGHT)).casefold()
    text = unicodedata.normalize("NFKC", text)  # folding may take a character apart
    text = " ".join(text.split())
    while True:  # quotes and final dots may be nested either way: "Title". and "Title."
        stripped = text.strip(_QUOTES).rstrip(".").strip()
        if stripped == text:
            return text
        text = stripped


def match_title(text: str, candidates: Sequence[str]) -> int | None:
    """The candidate that a generated answer names.

    The whole answer is compared first (both sides by `normalise_title`). Else the longest candidate that
    stands in it as whole words is taken, so that 'I would watch Alien 3 next' names 'Alien 3' and not
    'Alien'. This is generous to chatter: of two candidates named side by side the longer wins.

    Args:
        text: what the model generated, cut at the end of its answer.
        candidates: titles as the prompt lists them.

    Returns:
        The position of the candidate; of several with the same text the first (they cannot be told apart:
        list candidates with distinct titles). None if no candidate is named, or two different ones of the
        same greatest length.
    """
    answer = normalise_title(text)
    first: dict[str, int] = {}
    for position, candidate in enumerate(candidates):
        first.setdefault(normalise_title(candidate), position)
    first.pop("", None)
    if answer in first:
        return first[answer]
    named = [title for title in first if _holds(answer, title)]
    longest = max(map(len, named), default=0)
    best = [title for title in named if len(title) == longest]
    return first[best[0]] if len(best) == 1 else None


def generation_report(
    matches: np.ndarray,
    targets: np.ndarray,
    users: np.ndarray,
    *,
    n: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """How many generated answers name a candidate, and how many the right one.

        valid_ratio      valid / n
        hit_ratio_all    hits / n            every sample counts; comparable with HR@1 of scored candidates
        hit_ratio_valid  hits / valid        None without a valid answer

    Args:
        matches: [n] the item (or position) that each answer names, -1 for an invalid answer.
        targets: [n] the right one, in the same numbering.
        users: [n] the user of each sample, for the bootstrap.
        n: bootstrap samples, 0 for no intervals; seed: of the bootstrap.

    Returns:
        {n, users, valid, hits, valid_ratio, hit_ratio_all, hit_ratio_valid,
        intervals: {unit, samples, seed, level, each ratio: {value, low, high[, reason]}}}.

    Raises:
        ValueError: if the lengths differ, there are no samples, or a target is negative.
    """
    matches, targets = np.asarray(matches), np.asarray(targets)
    if matches.ndim != 1 or matches.shape != targets.shape or not matches.size:
        raise ValueError(
            f"matches and targets must be two vectors of one length, not {matches.shape} and {targets.shape}"
        )
    if targets.min() < 0:
        raise ValueError(f"a target is {targets.min()}, but negative numbers mark invalid answers")
    valid = (matches >= 0).astype(np.float64)
    hits = (matches == targets).astype(np.float64)
    rows = np.ones(matches.size)
    ratios = dict(zip(GENERATION_METRICS, ((valid, rows), (hits, rows), (hits, valid)), strict=True))
    estimate = bootstrap_ratios(users, {"model": ratios}, n=n, seed=seed)
    found = estimate.to_dict()
    return {
        "n": estimate.rows,
        "users": estimate.users,
        "valid": int(valid.sum()),
        "hits": int(hits.sum()),
        **estimate.values["model"],
        "intervals": {key: found[key] for key in ("unit", "samples", "seed", "level")}
        | found["models"]["model"],
    }


def _holds(text: str, title: str) -> bool:
    """Whether `title` stands in `text` with no word running on at either end."""
    begin = text.find(title)
    while begin >= 0:
        end = begin + len(title)
        if not (_joined(text[:begin][-1:], title[0]) or _joined(title[-1], text[end : end + 1])):
            return True
        begin = text.find(title, begin + 1)
    return False


def _joined(left: str, right: str) -> bool:
    """Whether two neighbouring characters belong to one word ('' being the edge of the text)."""
    return bool(left and right) and all(
        (unicodedata.category(one)[0] in "LMN" or one == "_")
        and not any(low <= ord(one) <= high for low, high in _UNSPACED)
        for one in (left, right)
    )
