"""A bounded memory of results; the one used longest ago goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Kept(Generic[K, V]):
    """Values by key.

    Args:
        size: how much may be kept.
        weigh: how much of it a value takes.

    Attributes:
        used: how much is kept.
        found, missed: how often a key was there, and was not.
    """

    def __init__(self, size: int, weigh: Callable[[V], int] = lambda value: 1) -> None:
        self.size, self.used, self.found, self.missed = size, 0, 0, 0
        self._weigh = weigh
        self._entries: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        """The value, or ``None``."""
        if key not in self._entries:
            self.missed += 1
            return None
        self.found += 1
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: K, value: V) -> None:
        """Keep a value, if it fits at all."""
        self.forget([key])
        if self._weigh(value) > self.size:
            return
        self._entries[key] = value
        self.used += self._weigh(value)
        while self.used > self.size:
            self.forget([next(iter(self._entries))])

    def forget(self, keys: Iterable[K]) -> None:
        """Drop values, as far as they are kept."""
        for key in keys:
            if key in self._entries:
                self.used -= self._weigh(self._entries.pop(key))

    def keys(self) -> list[K]:
        """What is kept, that used longest ago first."""
        return list(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
