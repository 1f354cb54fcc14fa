"""Columns of ``.item`` and ``.user`` as text for prompts.

Text never passes through RecBole's tensors: RecBole splits titles into words. It is taken from the checked cells of
:mod:`~recbole_llm.data.atomic_files` and mapped to RecBole's internal ids by the raw token. What a title goes through,
in this order: HTML entities, one line of plain text, the year and the article, a placeholder if nothing is left, the
limit of its length, and, if asked for, what tells it from equal titles.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from recbole_llm.data.atomic_files import MISSING, AtomicFile
from recbole_llm.data.history import HistoryIndex
from recbole_llm.data.text_cleaning import clean, natural_order, shorten
from recbole_llm.data.text_settings import TextSettings

logger = logging.getLogger(__name__)


class TextSource(Protocol):
    """What the text is read from: a built :class:`~recbole_llm.data.dataset.HistoryDataset`."""

    DISTINCT_TITLES: bool
    dataset_name: str
    uid_field: str
    iid_field: str
    field2id_token: Mapping[str, np.ndarray]
    field2token_id: Mapping[str, Mapping[str, int]]
    history: HistoryIndex
    text_settings: TextSettings
    user_num: int
    config: Any

    def text_file(self, suffix: str) -> AtomicFile | None:
        """The checked cells of ``.item`` or ``.user``."""

    def num(self, field: str) -> int:
        """How many ids a field has, with the padding."""


# Where a dataset's yaml does not name its columns, the first of these that the file has.
COMMON_COLUMNS = {
    "title": (
        "movie_title",
        "book_title",
        "title",
        "item_name",
        "name",
        "game_title",
        "app_name",
        "track_name",
        "artist_name",
    ),
    "year": ("release_year", "publication_year", "year"),
    "genre": ("genre", "genres", "class", "categories", "category"),
}

_TRAILING_YEAR = re.compile(r"\s*\((\d{4})\)$")
_YEAR = re.compile(r"(\d{4})(?:\.0*|-\d\d.*)?")  # also as a number, or as the beginning of a date


class _Table:
    """The cells of ``.item`` or ``.user``, aligned with RecBole's internal ids."""

    def __init__(self, dataset: TextSource, suffix: str, id_field: str):
        file = dataset.text_file(suffix)
        self._size = dataset.num(id_field)
        self._limit = dataset.text_settings.max_title_length
        self.path = file.path if file is not None else f"{dataset.dataset_name}.{suffix}"
        self.columns: list[str] = list(file.types) if file is not None else []
        self.known = np.zeros(self._size, dtype=bool)
        if file is not None:
            ids = dataset.field2token_id[id_field]
            self._file = file
            self._rows = np.array([ids.get(token, 0) for token in file.cells(id_field)], dtype=np.int64)
            self.known[self._rows] = True

    def resolve(self, name: str, key: str) -> str | None:
        """The column that ``text.<name>`` stands for, or ``None`` if the dataset has none."""
        if key == "auto":
            spelt = {column.lower(): column for column in reversed(self.columns)}
            return next((spelt[column] for column in COMMON_COLUMNS[name] if column in spelt), None)
        return None if key is None else self.checked(key, f"text.{name}")

    def checked(self, column: str, key: str) -> str:
        if column not in self.columns:
            has = f"has the columns {self.columns}" if self.columns else "does not exist"
            raise ValueError(
                f"{key}: no column {column!r}; {self.path} {has}. Set the key to ~ to go without"
            )
        return column

    def values(self, column: str | None, missing: tuple[str, ...]) -> list[str]:
        """Cleaned cells by internal id, '' where there is none; of an id's lines the first counts."""
        values = [""] * self._size
        if column is not None:
            for row, cell in zip(self._rows[::-1], self._file.cells(column)[::-1], strict=True):
                text = clean(cell)
                values[row] = "" if text in missing else self._shortened(text)
            values[0] = ""  # ids that RecBole dropped all went here
        return values

    def _shortened(self, text: str) -> str:
        # Titles are cut once more when year and article are in place; ten times as much is more than those need.
        return text if self._limit is None else text[: 10 * self._limit]


class ItemText:
    """Titles, years and genres of the items.

    Args:
        obfuscate: hide titles behind "Movie 123" (to measure what an LLM has memorised). Numbers are a fixed
            permutation, not the ids of the file, which may themselves be memorised.

    Attributes:
        titles: by internal item id, in natural order and without the year. Several items may have one title,
            unless ``text.disambiguate`` is in force.
        years: four digits, or '' (also where ``disambiguate`` put the year into the title).
        genre_lists: ``["Comedy", "Drama"]``, or ``[]``.
        genres: the same in words, "Comedy, Drama", or ''.
        titled: whether the data has a column of titles; else all are placeholders.

    Raises:
        ValueError: if a named column is missing, or items that occur have no title (unless
            ``text.missing_title: placeholder``).
    """

    def __init__(self, dataset: TextSource, *, obfuscate: bool = False):
        settings = dataset.text_settings
        table = _Table(dataset, "item", dataset.iid_field)
        missing = settings.missing_values
        columns = {name: table.resolve(name, getattr(settings, name)) for name in ("title", "year", "genre")}
        raw_titles = table.values(columns["title"], missing)
        years = table.values(columns["year"], missing)
        _warn_of_missing_values(table.path, columns["title"], raw_titles)
        self.titles, self.years = [""] * len(raw_titles), [""] * len(raw_titles)
        for item, (title, year) in enumerate(zip(raw_titles, years, strict=True)):
            match = _YEAR.fullmatch(year)
            year = match[1] if match else ""
            suffix = _TRAILING_YEAR.search(title)
            # "Heat (1995)" says the year already; but a film called only "(1984)" keeps its title.
            if suffix and suffix.start() > 0 and year in ("", suffix[1]):
                title, year = title[: suffix.start()], suffix[1]
            self.titles[item], self.years[item] = natural_order(title), year
        self.genre_lists = [
            [
                part
                for part in map(str.strip, cell.split(settings.genre_separator))
                if part and part not in missing
            ]
            for cell in table.values(columns["genre"], missing)
        ]
        self.genres = [", ".join(parts) for parts in self.genre_lists]
        if settings.max_title_length is not None:
            self.genres = [shorten(text, settings.max_title_length) for text in self.genres]
        self.titled = columns["title"] is not None
        self._fill_missing(dataset, settings, table, columns["title"])
        if settings.max_title_length is not None:
            self._shorten(dataset, settings.max_title_length)
        if obfuscate:
            self.titles = ["", *map(self._placeholder, range(1, len(self.titles)))]
        elif dataset.DISTINCT_TITLES if settings.disambiguate is None else settings.disambiguate:
            self._tell_apart(dataset)

    def _fill_missing(
        self, dataset: TextSource, settings: TextSettings, table: _Table, column: str | None
    ) -> None:
        tokens = dataset.field2id_token[dataset.iid_field]
        order = np.argsort(tokens[1:].astype(str), kind="stable")
        codes = np.empty(len(tokens), dtype=np.int64)
        codes[0] = 0
        codes[1 + order] = 1 + np.random.default_rng(0).permutation(len(order))
        called = settings.placeholder or settings.words()["Noun"]
        self._placeholder = lambda item: f"{called} {codes[item]}"
        occurring = set(np.unique(dataset.history.item_ids).tolist())
        untitled = [item for item in sorted(occurring) if not self.titles[item]]
        absent = [item for item in untitled if not table.known[item]]
        if column is None:
            where = (
                f"{table.path} has no column known as that of titles ({table.columns}; text.title names it)"
                if table.columns
                else f"there is no {table.path}"
            )
            logger.warning("%s: items are called '%s' and the like", where, self._placeholder(1))
            untitled = []
        elif absent:
            logger.warning(
                "%s has no line for %d of the %d items that occur (first: %s): they are called '%s' and the like",
                table.path,
                len(absent),
                len(occurring),
                ", ".join(str(tokens[item]) for item in absent[:5]),
                self._placeholder(absent[0]),
            )
            untitled = [item for item in untitled if table.known[item]]
        if untitled:
            first = ", ".join(str(tokens[item]) for item in untitled[:5])
            problem = (
                f"{table.path}: column {column!r} has no title for {len(untitled)} of the {len(occurring)} "
                f"items that occur (first: {first})"
            )
            if settings.missing_title == "error":
                raise ValueError(
                    f"{problem}. Fill them in, or set text.missing_title: placeholder in the dataset's yaml "
                    f"to call them '{self._placeholder(untitled[0])}' and the like"
                )
            logger.warning("%s: they are called '%s' and the like", problem, self._placeholder(untitled[0]))
        for item in range(1, len(self.titles)):
            self.titles[item] = self.titles[item] or self._placeholder(item)

    def _shorten(self, dataset: TextSource, limit: int) -> None:
        long = [item for item, title in enumerate(self.titles) if len(title) > limit]
        if long:
            logger.warning(
                "%s: %d titles are longer than %d characters (text.max_title_length) and are cut; the longest has %d",
                dataset.dataset_name,
                len(long),
                limit,
                max(len(self.titles[item]) for item in long),
            )
        for item in long:
            self.titles[item] = shorten(self.titles[item], limit)

    def _tell_apart(self, dataset: TextSource) -> None:
        """Add to equal titles what tells them apart: "Heat (1986)", "Heat (1995, Crime)", "Heat (1995, no. 7)"."""
        tokens = dataset.field2id_token[dataset.iid_field]
        bare = list(self.titles)
        added: dict[str, int] = defaultdict(int)
        notes: dict[int, list[str]] = defaultdict(list)
        kinds = (
            ("years", self.years),
            ("genres", self.genres),
            ("ids", ["", *(f"no. {token}" for token in tokens[1:])]),
        )
        for kind, values in kinds:
            for group in _equal(self.titles):
                # Equal notes tell nobody apart, and one that only some items have tells only those.
                if len({values[item] for item in group}) > 1:
                    for item in (item for item in group if values[item]):
                        notes[item].append(values[item])
                        added[kind] += 1
                        if kind == "years":
                            self.years[item] = ""
            for item, words in notes.items():
                self.titles[item] = f"{bare[item]} ({', '.join(words)})"
        if notes:
            logger.info(
                "%s: %d items share their title with another one and were told apart by %s",
                dataset.dataset_name,
                len(notes),
                ", ".join(f"{kind} ({count})" for kind, count in added.items()),
            )

    def descriptions(self) -> list[str]:
        """Title and genres as one text, by internal item id ('' for padding), for semantic vectors."""
        return [f"{t}. {g}" if g else t for t, g in zip(self.titles, self.genres, strict=True)]


def _warn_of_missing_values(path: Path | str, column: str | None, titles: list[str]) -> None:
    """Tell of titles such as "nan", which a program may have written for missing ones."""
    looks = Counter(title for title in titles if title and title.lower() in MISSING)
    if looks:
        logger.warning(
            "%s: column %r has the titles %s, taken as they are; if nothing is known of such items, set "
            "text.missing_values: %s",
            path,
            column,
            ", ".join(f"{title!r} ({count} times)" for title, count in looks.items()),
            list(looks),
        )


def _equal(titles: list[str]) -> list[list[int]]:
    """Items (internal ids) by title, upper and lower case alike, where there are several of one."""
    items: dict[str, list[int]] = defaultdict(list)
    for item, title in enumerate(titles[1:], start=1):
        items[title.casefold()].append(item)
    return [group for group in items.values() if len(group) > 1]


class UserText:
    """Profiles of the users, from ``text.user_fields`` of the dataset's yaml.

    Raises:
        ValueError: if a named column is missing.
    """

    def __init__(self, dataset: TextSource):
        self._dataset = dataset

    @cached_property
    def profiles(self) -> list[str]:
        """ "male, aged 25-34, programmer" by internal user id; '' where nothing is known."""
        dataset = self._dataset
        settings = dataset.text_settings
        limit = settings.max_title_length
        if not settings.user_fields:
            logger.warning(
                "%s: text.user_fields names no columns, so prompts show no profile", dataset.dataset_name
            )
            return [""] * dataset.user_num
        table = _Table(dataset, "user", dataset.uid_field)
        if not table.columns:
            logger.warning("there is no %s, so prompts show no profile", table.path)
            return [""] * dataset.user_num
        parts: list[list[str]] = [[] for _ in range(dataset.user_num)]
        for column, template in settings.user_fields.items():
            values = table.values(table.checked(column, "text.user_fields"), settings.missing_values)
            names = settings.value_names.get(column)
            unnamed = sorted(set(values) - {""} - set(names)) if names else []
            if unnamed:
                logger.warning("text.value_names.%s has no name for %s: not shown", column, unnamed[:10])
            for user, value in enumerate(values):
                shown = names.get(value) if names else value
                if shown:
                    parts[user].append(template.format(shown if limit is None else shorten(shown, limit)))
        return [", ".join(words) for words in parts]
