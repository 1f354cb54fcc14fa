"""What a configuration key may hold: whole numbers, numbers, texts, lists, tables, and how an error names them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Whole:
    """A whole number in [low, high]."""

    low: int | None = None
    high: int | None = None

    def accepts(self, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and _within(value, self.low, self.high)

    def __str__(self) -> str:
        return "an int" + _range_text(self.low, self.high)


@dataclass(frozen=True)
class Number:
    """A finite number in [low, high], or without the ends in `open`."""

    low: float | None = None
    high: float | None = None
    open: str = ""  # "low", "high" or "low high": which ends are not allowed themselves

    def accepts(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return False
        at_open_end = ("low" in self.open and value == self.low) or (
            "high" in self.open and value == self.high
        )
        return _within(value, self.low, self.high) and not at_open_end

    def __str__(self) -> str:
        low, high = "low" in self.open, "high" in self.open
        return "a number" + _range_text(self.low, self.high, low_open=low, high_open=high)


@dataclass(frozen=True)
class Share(Number):
    """A float strictly between 0 and 1: a share of the data. (The int 1 is a count, so 1 is not a share.)"""

    low: float = 0.0
    high: float = 1.0
    open: str = "low high"

    def __str__(self) -> str:
        return "a share in (0, 1)"


@dataclass(frozen=True)
class Flag:
    """true or false."""

    def accepts(self, value: Any) -> bool:
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Text:
    """A non-empty str, matching `pattern` if one is given; `what` describes it."""

    what: str = "a str"
    pattern: str = r"(?s).+"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.what


class Choice(Text):
    """One of a few names."""

    def __init__(self, *names: str) -> None:
        super().__init__("one of " + ", ".join(names), "|".join(map(re.escape, names)))
        object.__setattr__(self, "names", names)


@dataclass(frozen=True)
class ListOf:
    """A non-empty list of `kind`."""

    kind: Any

    def accepts(self, value: Any) -> bool:
        return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(self.kind.accepts, value))

    def __str__(self) -> str:
        return f"a list, each entry {self.kind}"


@dataclass(frozen=True)
class Table:
    """A dict with str keys, its values being `values` if given."""

    values: Any = None

    def accepts(self, value: Any) -> bool:
        return isinstance(value, Mapping) and all(
            isinstance(k, str) and (self.values is None or self.values.accepts(v)) for k, v in value.items()
        )

    def __str__(self) -> str:
        return "a dict" + (f", each value {self.values}" if self.values else "")


@dataclass(frozen=True)
class Anything:
    """Any value: RecBole accepts several forms."""

    def accepts(self, value: Any) -> bool:
        return True

    def __str__(self) -> str:
        return "anything"


def _within(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def _range_text(
    low: float | None, high: float | None, *, low_open: bool = False, high_open: bool = False
) -> str:
    if low is None and high is None:
        return ""
    if high is None:
        return f" {'>' if low_open else '>='} {low}"
    return f" in {'(' if low_open else '['}{low}, {high}{')' if high_open else ']'}"


POSITIVE = Number(0, open="low")
PROBABILITY = Number(0, 1, open="high")
