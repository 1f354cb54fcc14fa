"""Names that users mistype."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str], n: int = 3) -> list[str]:
    """The entries of ``names`` most like ``name``, upper and lower case being the same."""
    by_lower = {known.lower(): known for known in names}
    return [by_lower[match] for match in difflib.get_close_matches(str(name).lower(), by_lower, n=n)]
