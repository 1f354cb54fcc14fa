"""RecBole's atomic files: read as text, checked and repaired before a dataset is made of them.

RecBole hands these files to pandas, which takes an id ``NA`` for a missing one, a leading double quote for the start
of a quoted cell and a date for a category. Here every cell is first a str, exactly as it is meant; each column is then
parsed by its role. A repair is made where only one reading is possible, and is logged. Everything else is one
``ValueError`` that names file, line, column and value.

==================================  ==========================================================================
what is found                       what is done
==================================  ==========================================================================
byte-order mark, quotes and blanks  removed; a file of which the mark says UTF-16 is read as UTF-16
in a header, blanks around an id
text in a column of numbers         error; an empty cell, ``NA``, ``NaN``, ``null`` and the like are missing values
times as ISO dates, as dates made   read as seconds since 1970, whatever type the header declares
of digits (``20110626``), or as
epochs in ms, us or ns
other times, or mixed units         error
numbers in a column of text that    read as numbers
is used as rating or label
``13.0`` or ``013`` against ``13``  one id if nothing else could be meant; files without a common id are an error
several lines of one user or item   the first one counts
duplicate columns, unknown types,   error
lines that are too long
==================================  ==========================================================================
"""

from __future__ import annotations

import csv
import io
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

logger = logging.getLogger(__name__)

TYPES = ("token", "token_seq", "float", "float_seq")
MISSING = frozenset({"", "na", "n/a", "<na>", "#n/a", "nan", "-nan", "null", "none"})
"""Cells of a numeric column, in lower case, that stand for a missing value."""
LINES_AT_ONCE = 1 << 18
"""Lines of a usual file that are split together."""
MOST_DIFFERENT = 1 << 20
"""Different cells of a column up to which equal ones are looked for."""
MAX_LINES_OF_A_CELL = 100
"""A quoted cell that spans more lines than this is taken for a title that begins with a quote."""
TIME_UNITS = (("seconds", 1e11, 1.0), ("milliseconds", 1e14, 1e3), ("microseconds", 1e17, 1e6))
"""Unit of an epoch, the value from which on it is a finer one, and how many of it make a second."""

DATES_OF_DIGITS = (("%Y%m%d", 1e6), ("%Y%m%d%H%M", 1e2), ("%Y%m%d%H%M%S", 1.0))
"""Dates written without separators, and what makes a year, month and day of 14 digits of each."""
OTHER_SEPARATORS = ("\t", ",", ";", "|", "::", " ")
"""What else may separate the cells of a header, to say so."""
PACKED = ((b"\x1f\x8b", "gzip"), (b"PK\x03\x04", "zip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"))
"""How compressed files begin."""

_QUOTED = re.compile(r'"((?:[^"]|"")*)"', re.DOTALL)
_WHOLE = re.compile(r"([-+]?)0*(\d+)(?:\.0*)?", re.ASCII)


@dataclass
class AtomicFile:
    """A file's cells as text.

    Attributes:
        path: where it is.
        types: RecBole's type of each column, in the order of the file.
        table: every cell a str, one row per record.
        lines: the line of the file on which each record begins, int64 ``[n]``.
    """

    path: Path
    types: dict[str, str]
    table: pd.DataFrame
    lines: np.ndarray

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, row: int, column: str) -> str:
        """``file, line 7, column 'price': '-'`` for an error message."""
        value = self.table[column].iloc[row]
        shown = value if len(value) <= 40 else value[:39] + "…"
        return f"{self.path}, line {self.lines[row]}, column {column!r}: {shown!r}"

    def numbers(self, column: str, *, needed: bool = False) -> np.ndarray:
        """The column as float64 ``[n]``; NaN where the value is missing.

        Args:
            needed: whether there is no doing without it, which decides what the error advises.

        Raises:
            ValueError: for text and for infinite values.
        """
        values, wrong = _floats(self.table[column].to_numpy())
        if len(wrong):
            more = f" (and {len(wrong) - 1:,} more)" if len(wrong) > 1 else ""
            remedy = (
                "Ratings and labels must be numbers"
                if needed
                else f"Leave such cells empty, write {column}:token in the header, or drop the column by unload_col"
            )
            raise ValueError(f"{self.where(wrong[0], column)} is not a finite number{more}. {remedy}")
        return values

    def times(self, column: str) -> np.ndarray:
        """The column as seconds since 1970, float64 ``[n]``; NaN where the value is missing.

        Numbers may be seconds, milli-, micro- or nanoseconds (all of one kind, by their size), text may be ISO dates.

        Raises:
            ValueError: for anything else, and for mixed units.
        """
        cells = self.table[column].to_numpy()
        values, wrong = _floats(cells)
        if len(wrong):
            parsed = pd.to_datetime(pd.Series(cells), format="ISO8601", utc=True, errors="coerce")
            there = np.fromiter((not _is_missing(cell) for cell in cells), dtype=bool, count=len(cells))
            wrong = np.flatnonzero(parsed.isna().to_numpy() & there)
            if len(wrong):
                raise ValueError(
                    f"{self.where(wrong[0], column)} is not a time ({len(wrong):,} of {len(cells):,} cells are not). "
                    f"Write the header {column}:float, and as values seconds since 1970 or ISO dates such as "
                    "2011-06-26 10:16:34, the same in all lines"
                )
            seconds = (parsed - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)
            logger.warning("%s: column %r holds dates, read as seconds since 1970 (UTC)", self.path, column)
            return seconds.to_numpy(np.float64)
        known = np.flatnonzero(~np.isnan(values))
        if not len(known):
            return values
        if (seconds := _dates_of_digits(values)) is not None:
            logger.warning(
                "%s: column %r holds dates such as %r, read as seconds since 1970 (UTC)",
                self.path,
                column,
                cells[known[0]],
            )
            return seconds
        sizes = np.abs(values[known])
        low, high = known[sizes.argmin()], known[sizes.argmax()]
        if _unit(values[low]) != _unit(values[high]):
            raise ValueError(
                f"{self.where(low, column)} is a time in {_unit(values[low])[0]}, but line {self.lines[high]} has "
                f"{self.table[column].iloc[high]!r}, in {_unit(values[high])[0]}. Use one unit in all lines"
            )
        unit, per_second = _unit(values[high])
        if per_second != 1:
            logger.warning("%s: column %r is in %s, read as seconds", self.path, column, unit)
        elif self.types[column] != "float":
            logger.warning(
                "%s: column %r is read as numbers, not as %s", self.path, column, self.types[column]
            )
        return values / per_second

    def clean_ids(self, column: str) -> None:
        """Remove blanks around the ids of a column, and ``.0`` where the header declares them as numbers.

        Raises:
            ValueError: if the column's type is that of a list.
        """
        if self.types[column].endswith("seq"):
            raise ValueError(
                f"{self.path}: column {column!r} holds ids, one per line; write {column}:token in the header, not "
                f"{column}:{self.types[column]}"
            )
        cells = self.table[column]
        stripped = cells.map(str.strip)
        changed = np.flatnonzero((stripped != cells).to_numpy())
        if len(changed):
            logger.warning(
                "%s: %s ids in column %r have blanks around them, which are removed (first: line %d)",
                self.path,
                f"{len(changed):,}",
                column,
                self.lines[changed[0]],
            )
        if self.types[column] == "float":
            logger.warning("%s: column %r holds ids and is read as text, not as numbers", self.path, column)
            stripped = stripped.map(_canonical)
            self.types[column] = "token"
        self.table[column] = stripped


def joined(files: Sequence[AtomicFile]) -> AtomicFile | None:
    """The records of several files under the columns of the first; cells of columns that a file lacks are empty."""
    if len(files) < 2:
        return files[0] if files else None
    first = files[0]
    tables = [file.table.reindex(columns=list(first.types), fill_value="") for file in files]
    lines = np.concatenate([file.lines for file in files])
    return AtomicFile(first.path, first.types, pd.concat(tables, ignore_index=True), lines)


def _is_missing(cell: str) -> bool:
    return cell.strip().lower() in MISSING


def _floats(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cells as float64 ``[n]`` with NaN for missing ones, and the indices of those that are no finite numbers."""
    try:
        values = cells.astype(np.float64)
        if np.isfinite(values).all():
            return values, np.zeros(0, dtype=np.int64)
    except ValueError:
        pass
    values, wrong = np.full(len(cells), np.nan), []
    for index, cell in enumerate(cells):
        if _is_missing(cell):
            continue
        try:
            values[index] = float(cell)
        except ValueError:
            pass
        if not np.isfinite(values[index]):
            wrong.append(index)
    return values, np.array(wrong, dtype=np.int64)


def _unit(value: float) -> tuple[str, float]:
    """The unit of an epoch by its size, and how many of it make a second."""
    for name, end, per_second in TIME_UNITS:
        if abs(value) < end:
            return name, per_second
    return "nanoseconds", 1e9


def _dates_of_digits(values: np.ndarray) -> np.ndarray | None:
    """Seconds since 1970 of values such as 20110626 and 20110626101634, if all are dates of 1900 to 2100.

    As epochs, all of these would lie in a single day, month or century in which no data has been made.
    """
    whole = values[~np.isnan(values)]
    for layout, fill in DATES_OF_DIGITS:
        if whole.min() * fill < 19e12 or whole.max() * fill > 2101e10 or (whole != np.floor(whole)).any():
            continue
        text = pd.Series(values).map(lambda value: "" if np.isnan(value) else f"{value:.0f}")
        parsed = pd.to_datetime(text, format=layout, utc=True, errors="coerce")
        if (parsed.isna().to_numpy() == np.isnan(values)).all():
            return ((parsed - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)).to_numpy(np.float64)
    return None


# ------------------------------------------------------------------------------------------------- reading


def _encoding_of(path: Path, encoding: str | None) -> str:
    """The encoding to read a file with: the one asked for, but UTF-16 where UTF-8 is asked for and cannot be."""
    if encoding is not None and encoding.lower().replace("_", "-") not in ("utf-8", "utf8"):
        return encoding
    with path.open("rb") as file:
        begin = file.read(6)
    for mark, name in PACKED:
        if begin.startswith(mark):
            raise ValueError(f"{path} is compressed ({name}); unpack it")
    if begin.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    return "utf-8-sig"  # with or without a byte-order mark


def _lines(path: Path, encoding: str | None) -> Iterator[str]:
    """The lines of a file. Only "\\n" ends one: Python and pandas know others too, which occur inside titles."""
    encoding = _encoding_of(path, encoding)
    try:
        with path.open(encoding=encoding, newline="\n") as file:
            for line in file:
                yield line.rstrip("\n").removesuffix("\r")
    except (UnicodeError, LookupError) as error:
        raise ValueError(f"{path}: {error}; set encoding to that of the file, e.g. latin-1") from error


def read_types(path: Path, separator: str = "\t", encoding: str | None = None) -> dict[str, str]:
    """Columns of an atomic file and their types, from its first line.

    Raises:
        ValueError: if the line is not made of ``name:type`` cells, or names a column twice.
    """
    line = next(_lines(path, encoding), "")
    if "\r" in line:
        raise ValueError(f"{path}: its lines end in \\r alone; write line feeds, \\n")
    header = [_unquoted(cell) for cell in line.split(separator)]
    wrong = [cell if len(cell) <= 60 else cell[:59] + "…" for cell in header if not _is_header_cell(cell)]
    if wrong:
        shown = f"{wrong[:5]}{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}"
        raise ValueError(
            f"{path}: the first line must be name:type cells separated by {separator!r}, but "
            + (f"it has {shown}{_header_hint(line, separator)}" if line.strip() else "it is empty")
        )
    cells = [[part.strip() for part in cell.split(":")] for cell in header]
    for name, kind in cells:
        if kind not in TYPES:
            raise ValueError(
                f"{path}: column {name!r} has the type {kind!r}, which is none of {', '.join(TYPES)}"
            )
    twice = [name for name, count in Counter(name for name, _ in cells).items() if count > 1]
    if twice:
        raise ValueError(f"{path}: the first line has the column {twice[0]!r} more than once")
    return dict(cells)


def _is_header_cell(cell: str) -> bool:
    return cell.count(":") == 1 and bool(cell.split(":")[0].strip())


def _header_hint(line: str, separator: str) -> str:
    """What a first line that is no header may have been meant to be."""
    for other in OTHER_SEPARATORS:
        cells = [_unquoted(cell) for cell in line.split(other)]
        if other != separator and len(cells) > 1 and all(map(_is_header_cell, cells)):
            return f"; they look separated by {other!r}, so set field_separator to {other!r}"
    cells = [_unquoted(cell) for cell in line.split(separator)]
    if not any(":" in cell for cell in cells) and all(cell.strip().isidentifier() for cell in cells):
        return f"; write {cells[0].strip()}:token and so on (types: {', '.join(TYPES)})"
    if cells[-1] == "" and all(map(_is_header_cell, cells[:-1])):
        return f"; it ends in a {separator!r} too many"
    return ""


def read_atomic(path: Path, separator: str = "\t", encoding: str | None = None) -> AtomicFile:
    """An atomic file as text: every cell a str as it is meant.

    A cell is taken as it is written, except where it must have been quoted by a writer of csv files: it begins
    and ends with a double quote, and quotes inside are doubled. Only such cells may hold separators and line
    breaks. Lines that end early are filled up with empty cells, and counted in the log.

    Raises:
        ValueError: if the header is wrong, or a line has more cells than the header.
    """
    types = read_types(path, separator, encoding)
    width = len(types)
    columns: Sequence[Any] | None = _usual_columns(islice(_lines(path, encoding), 1, None), separator, width)
    if columns is not None:
        numbers = np.arange(2, 2 + len(columns[0]), dtype=np.int64)
    else:
        lines = list(_lines(path, encoding))[1:]
        rows, numbers = _checked_records(path, lines, separator, list(types))
        columns = [list(cells) for cells in zip(*rows, strict=True)] if rows else [[]] * width
    table = pd.DataFrame(
        {name: pd.Series(cells, dtype=object) for name, cells in zip(types, columns, strict=True)}, copy=False
    )
    return AtomicFile(path, types, table, numbers)


def _usual_columns(lines: Iterator[str], separator: str, width: int) -> list[np.ndarray] | None:
    """The columns of a usual file, in which every line is a record and no cell is quoted; ``None`` for any other.

    Many lines are split at once. Equal cells become one object, for a str takes 50 bytes, and 25 million interactions
    have 160,000 different users: not in columns of which most cells differ, such as times.
    """
    parts: list[list[np.ndarray]] = [[np.empty(0, dtype=object)] for _ in range(width)]
    known: list[dict[str, str] | None] = [{} for _ in range(width)]
    while chunk := list(islice(lines, LINES_AT_ONCE)):
        if not all(line.count(separator) == width - 1 and line and '"' not in line for line in chunk):
            return None
        flat = separator.join(chunk).split(separator)
        for column, same in enumerate(known):
            cells = flat[column::width]
            if same is not None:
                cells = [same.setdefault(cell, cell) for cell in cells]
                if len(same) > MOST_DIFFERENT:
                    known[column] = None
            parts[column].append(np.array(cells, dtype=object))
    return [np.concatenate(part) for part in parts]


def _checked_records(
    path: Path, lines: list[str], separator: str, columns: list[str]
) -> tuple[list[list[str]], np.ndarray]:
    """The records of a file, filled up to the width of the header, and the line on which each begins."""
    rows, numbers, short = [], [], []
    for number, cells in _records(lines, separator, len(columns)):
        if len(cells) > len(columns):
            raise ValueError(
                f"{path}: line {number} has {len(cells)} cells, but the header has {len(columns)} ({columns})"
            )
        if len(cells) < len(columns):
            short.append(number)
        rows.append(cells + [""] * (len(columns) - len(cells)))
        numbers.append(number)
    if short:
        logger.warning(
            "%s: %d lines have fewer cells than the header (first: line %d); missing cells count as empty",
            path,
            len(short),
            short[0],
        )
    return rows, np.array(numbers, dtype=np.int64)


def _records(lines: list[str], separator: str, width: int) -> Iterator[tuple[int, list[str]]]:
    """The records of a file: the number of each one's first line, and its cells. Empty lines are skipped."""
    at = 0
    while at < len(lines):
        number, cells, used = at + 2, lines[at].split(separator), 1
        if '"' in lines[at]:
            left_open = cells[-1].startswith('"') and not _QUOTED.fullmatch(cells[-1])
            quoted = None
            if len(cells) != width or left_open:
                quoted = _quoted_record(lines[at : at + MAX_LINES_OF_A_CELL], separator, width)
            if quoted is not None:
                cells, used = quoted
            else:
                cells = [_unquoted(cell) for cell in cells]
        if lines[at] or used > 1:
            yield number, cells
        at += used


def _quoted_record(lines: list[str], separator: str, width: int) -> tuple[list[str], int] | None:
    """The record that begins with the first of ``lines`` if read as csv, and how many lines it takes; if it is one."""
    if len(separator) > 1:  # unknown to the csv module
        return None
    for count in range(1, len(lines) + 1):
        if count > 1 and lines[count - 1].count(separator) + 1 >= width:
            break  # this line is a record of its own
        text = io.StringIO("\n".join(lines[:count]), newline="")
        try:
            rows = list(csv.reader(text, delimiter=separator, strict=True))
        except csv.Error:
            continue
        if len(rows) == 1 and len(rows[0]) == width:
            return rows[0], count
    return None


def _unquoted(cell: str) -> str:
    match = _QUOTED.fullmatch(cell)
    return match[1].replace('""', '"') if match else cell


# ---------------------------------------------------------------------------------------------- ids of two files


def _canonical(token: str) -> str:
    """What ids that only differ in their spelling have in common.

    >>> _canonical("13.0"), _canonical("013"), _canonical("B00A"), _canonical("1.5")
    ('13', '13', 'b00a', '1.5')
    """
    token = unicodedata.normalize("NFKC", token)
    match = _WHOLE.fullmatch(token)
    return match[1].replace("+", "") + match[2] if match else token.casefold()


def match_ids(interactions: Sequence[AtomicFile], other: AtomicFile, column: str) -> None:
    """Let ``other`` (``.user`` or ``.item``) spell its ids as the interactions do.

    An id that only ``other`` has becomes one that only the interactions have if they differ in nothing but leading
    zeros, ``.0``, upper case or Unicode's ways to write a character, and no other id could be meant.

    Raises:
        ValueError: if the files have no id in common.
    """
    used = list(
        dict.fromkeys(token for file in interactions for token in pd.unique(file.table[column]) if token)
    )
    known = set(other.table[column])
    lost = [token for token in used if token not in known]
    if not lost or not len(other):
        return
    in_use = set(used)
    candidates: dict[str, list[str]] = {}
    for token in known - in_use - {""}:
        candidates.setdefault(_canonical(token), []).append(token)
    spellings = Counter(map(_canonical, lost))
    renamed = {
        candidates[_canonical(token)][0]: token
        for token in lost
        if spellings[_canonical(token)] == 1 and len(candidates.get(_canonical(token), ())) == 1
    }
    if renamed:
        theirs, ours = next(iter(renamed.items()))
        logger.warning(
            "%s spells %s of its %s otherwise than %s (%r for %r); they are taken as the same",
            other.path,
            f"{len(renamed):,}",
            column,
            interactions[0].path,
            theirs,
            ours,
        )
        other.table[column] = other.table[column].map(lambda token: renamed.get(token, token))
    if len(lost) - len(renamed) == len(used):
        raise ValueError(
            f"no {column} of {interactions[0].path} is in {other.path}: the one has e.g. {lost[0]!r}, the other "
            f"{next(iter(other.table[column]))!r}. Write ids alike in both files"
        )


def keep_first_lines(file: AtomicFile, column: str) -> None:
    """Of several lines of one user or item keep the first: with more, RecBole's table of features would shift."""
    again = file.table[column].duplicated().to_numpy()
    if not again.any():
        return
    row = int(np.flatnonzero(again)[0])
    logger.warning(
        "%s: %s lines repeat the %s of an earlier line (first: line %d, %r); the earlier one counts",
        file.path,
        f"{again.sum():,}",
        column,
        file.lines[row],
        file.table[column].iloc[row],
    )
    file.table = file.table[~again].reset_index(drop=True)
    file.lines = file.lines[~again]


class AtomicFiles:
    """The files of one dataset, read once.

    Args:
        folder: where they are.
        interactions: names of the files of interactions.
        others: ``.user`` and ``.item`` file names and the field that holds their ids; they may be missing.
        separator, encoding: RecBole's ``field_separator`` and ``encoding``.

    Raises:
        FileNotFoundError: if a file of interactions is missing.
    """

    def __init__(
        self,
        folder: Path,
        interactions: Sequence[str],
        others: dict[str, str],
        separator: str,
        encoding: str | None,
    ) -> None:
        self._how = (separator, encoding)
        self.interactions = [folder / name for name in interactions]
        self.others = {folder / name: field for name, field in others.items() if (folder / name).is_file()}
        for path in self.interactions:
            if not path.is_file():
                there = sorted(p.name for p in folder.iterdir())
                begin = path.name.removesuffix("inter")
                parts = [
                    name[len(begin) : -6]
                    for name in there
                    if re.fullmatch(f"{re.escape(begin)}.+[.]inter", name)
                ]
                raise FileNotFoundError(
                    f"{path} does not exist; {folder} holds {there}"
                    + (f"; ready-made splits are named by benchmark_filename, of {parts}" if parts else "")
                )
        self._files: dict[Path, AtomicFile] = {}

    @cached_property
    def types(self) -> dict[Path, dict[str, str]]:
        """Columns and types of every file, from the headers alone."""
        return {path: read_types(path, *self._how) for path in (*self.interactions, *self.others)}

    def read(self, id_fields: Sequence[str]) -> None:
        """Read all files, clean their ids, and make the ids of ``.user`` and ``.item`` those of the interactions.

        Raises:
            ValueError: for whatever cannot be read or matched, and for interactions without a single line.
        """
        for path in self.types:
            file = self._files[path] = read_atomic(path, *self._how)
            if not len(file):
                if path in self.interactions:
                    raise ValueError(f"{path} has a header and no lines below it: there are no interactions")
                logger.warning("%s has a header and no lines below it", path)
            for field in id_fields:
                if field in file.types:
                    file.clean_ids(field)
        inter = [self._files[path] for path in self.interactions]
        for path, field in self.others.items():
            if field not in self.types[path]:
                raise ValueError(f"{path} has no column {field!r}; it has {list(self.types[path])}")
            match_ids(inter, self._files[path], field)
            keep_first_lines(self._files[path], field)

    def __contains__(self, path: Path) -> bool:
        return path in self._files

    def __getitem__(self, path: Path) -> AtomicFile:
        return self._files[path]

    def close_interactions(self) -> None:
        """Let go of the interactions, once they are in the dataset."""
        for path in self.interactions:
            self._files.pop(path, None)
