"""The ``text`` section of a dataset's yaml: which columns become text, and the words that prompts use for a domain."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from string import Formatter
from types import NoneType
from typing import Any, cast

import numpy as np

from recbole_llm.data.text_cleaning import clean


@dataclass(frozen=True)
class TextSettings:
    """The ``text`` section of a dataset's yaml.

    Attributes:
        title, year, genre: columns of ``.item``. ``None``: the dataset has none. ``'auto'`` (default): a
            common name.
        genre_separator: what separates several genres in a cell.
        noun, nouns: what an item is called in prompts, e.g. ``book``; its plural (``None``: with an s).
        user: what a user is called, e.g. ``reader``.
        verb: what users do with items, as ``[chooses, chosen]``, e.g. ``[reads, read]``.
        rating_unit: what ratings count, in the plural: ``stars``, ``points``, ``plays``.
        rating_scale: lowest and highest rating that can be given, e.g. ``[1, 5]``. ``'auto'``: those of the data, if
            its ratings look like a scale (at most 20 evenly spaced values, up to 100). ``None``: there is none, as with
            numbers of plays.
        placeholder: what an item is called where its title is hidden or missing, e.g. ``Movie`` in "Movie 123".
            ``None``: the noun.
        missing_title: ``error``, or ``placeholder`` to call items without a title "Movie 123". Items without a line in
            ``.item`` always are.
        user_fields: column of ``.user`` -> how its value reads, e.g. ``{age: "aged {}"}``; empty: no profile.
        value_names: column -> value in the file -> its name. A value without a name, or named ``~``, is not
            shown.
        missing_values: cells that mean nothing is known.
        max_title_length: longer titles, genres and profile values are cut to so many characters; ``None``: never.
        disambiguate: where several items have the same title, add the year, else the genres, else the item's id
            of the file. ``None``: in tasks that are answered by titles, where of two equal ones neither could win.
    """

    title: str | None = "auto"
    year: str | None = "auto"
    genre: str | None = "auto"
    genre_separator: str = " "
    noun: str = "item"
    nouns: str | None = None
    user: str = "user"
    verb: tuple[str, str] = ("chooses", "chosen")
    rating_unit: str = "points"
    rating_scale: tuple[float, float] | str | None = "auto"
    placeholder: str | None = None
    missing_title: str = "error"
    user_fields: Mapping[str, str] = field(default_factory=dict)
    value_names: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    missing_values: tuple[str, ...] = ("",)
    max_title_length: int | None = 200
    disambiguate: bool | None = None

    @classmethod
    def from_config(cls, config) -> TextSettings:
        """Read and check the section; keys of yaml that look like numbers are taken as text.

        Raises:
            ValueError: for an unknown key or a value that cannot be.
        """
        section = dict(config["text"] or {})
        known = [f.name for f in fields(cls)]
        for key in section:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)  # YAML reads `no` as False
                raise ValueError(
                    f"text.{key}: unknown key; "
                    + (f"did you mean {near[0]}?" if near else f"it may hold {known}")
                )
        for key in ("title", "year", "genre"):
            if not isinstance(section.get(key), (str, NoneType)):
                raise ValueError(f"text.{key}: {section[key]!r} is neither the name of a column nor ~")
        section["user_fields"] = _user_fields(section.get("user_fields") or {})
        section["value_names"] = _value_names(section.get("value_names") or {})
        missing = section.get("missing_values")
        missing = () if missing is None else missing
        missing = missing if isinstance(missing, (list, tuple)) else (missing,)
        if not all(isinstance(cell, (str, int, float)) for cell in missing):
            raise ValueError(
                f"text.missing_values: {list(missing)!r} must hold cells, such as [unknown, none]"
            )
        section["missing_values"] = ("", *map(str, missing))
        for key in ("verb", "rating_scale"):
            if isinstance(section.get(key), list):
                section[key] = tuple(section[key])
        settings = cls(**section)
        settings._check_words()
        if settings.missing_title not in ("error", "placeholder"):
            raise ValueError(
                f"text.missing_title: {settings.missing_title!r} is neither 'error' nor 'placeholder'"
            )
        if not isinstance(settings.genre_separator, str) or not settings.genre_separator:
            raise ValueError(
                f"text.genre_separator: {settings.genre_separator!r} is no text to split cells at"
            )
        limit = settings.max_title_length
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 2):
            raise ValueError(f"text.max_title_length: {limit!r} is neither an int >= 2 nor ~")
        if settings.disambiguate is not None and not isinstance(settings.disambiguate, bool):
            raise ValueError(f"text.disambiguate: {settings.disambiguate!r} is none of true, false and ~")
        return settings

    def _check_words(self) -> None:
        for key in ("noun", "nouns", "user", "rating_unit", "placeholder"):
            value = getattr(self, key)
            optional = key in ("nouns", "placeholder")
            if not (optional and value is None) and not (isinstance(value, str) and clean(value)):
                raise ValueError(f"text.{key}: {value!r} is not a word")
        if (
            not isinstance(self.verb, tuple)
            or len(self.verb) != 2
            or not all(isinstance(form, str) and clean(form) for form in self.verb)
        ):
            raise ValueError(f"text.verb: {self.verb!r} must hold two forms, e.g. [reads, read]")
        scale: Any = self.rating_scale
        numbers = (
            isinstance(scale, tuple) and len(scale) == 2 and all(isinstance(n, (int, float)) for n in scale)
        )
        if scale not in ("auto", None) and not (numbers and scale[0] < scale[1]):
            raise ValueError(
                f"text.rating_scale: {scale!r} is none of auto, ~ and two numbers such as [1, 5]"
            )

    def words(self) -> dict[str, str]:
        """The words that templates may hold, by placeholder: ``{user}``, ``{User}``, ``{a_noun}``, ...

        >>> words = TextSettings(noun="album").words()
        >>> words["Noun"], words["a_noun"], words["nouns"], words["a_user"], words["verb_s"]
        ('Album', 'an album', 'albums', 'a user', 'chooses')
        """
        words = {
            "user": self.user,
            "noun": self.noun,
            "nouns": self.nouns or f"{self.noun}s",
            "unit": self.rating_unit,
            "verb_s": self.verb[0],
            "verb_ed": self.verb[1],
        }
        words = {name: clean(word) for name, word in words.items()}
        for name in ("user", "noun"):
            article = "an" if words[name][0].lower() in "aeio" else "a"
            words[f"a_{name}"] = f"{article} {words[name]}"
        return words | {
            name[0].upper() + name[1:]: word[0].upper() + word[1:] for name, word in words.items()
        }

    def scale_of(self, ratings: np.ndarray | None) -> tuple[float, float] | None:
        """Lowest and highest rating that can be given; ``None`` where there is no scale.

        Args:
            ratings: those of the data, any shape; ``None``: it has none.
        """
        if self.rating_scale != "auto":
            return cast(tuple[float, float] | None, self.rating_scale)
        values = np.unique(ratings) if ratings is not None else np.zeros(0)
        steps = np.diff(values.astype(np.float64))
        if not 2 <= len(values) <= 20 or values[0] < 0 or values[-1] > 100:
            return None
        parts = steps / steps.min()
        return (float(values[0]), float(values[-1])) if np.abs(parts - parts.round()).max() < 1e-3 else None


WORDS = frozenset(TextSettings().words())
"""Placeholders that every template may hold, see :meth:`TextSettings.words`."""


def _user_fields(found: Any) -> dict[str, str]:
    """Column -> how its value reads; a list of columns shows their values as they are.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(found, (list, tuple)) and all(isinstance(column, str) for column in found):
        return dict.fromkeys(found, "{}")
    if not isinstance(found, Mapping):
        raise ValueError(f'text.user_fields: {found!r} must name columns, such as {{age: "aged {{}}"}}')
    for column, template in found.items():
        try:
            places = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
        except (TypeError, ValueError):  # no text, or a single brace
            places = []
        if places != [""]:
            raise ValueError(
                f"text.user_fields.{column}: {template!r} must hold {{}} exactly once, for the value"
            )
    return dict(found)


def _value_names(found: Any) -> dict[str, dict[str, str | None]]:
    """Column -> value in the file, as text -> its name.

    Raises:
        ValueError: if it is none of that.
    """
    if not isinstance(found, Mapping) or not all(isinstance(names, Mapping) for names in found.values()):
        raise ValueError(
            f"text.value_names: {found!r} must name the values of columns, such as {{gender: {{F: female}}}}"
        )
    for column, names in found.items():
        for value, name in names.items():
            if not isinstance(name, (str, int, float, NoneType)):
                raise ValueError(f"text.value_names.{column}.{value}: {name!r} is neither a text nor ~")
    return {
        column: {str(value): name if name is None else str(name) for value, name in names.items()}
        for column, names in found.items()
    }
