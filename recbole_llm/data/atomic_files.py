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

A table may be parquet instead of text (``toy.inter.parquet``, see :mod:`~recbole_llm.data.parquet_files`); from there
on the path is the same. Cells of which many are equal are kept as numbers of their texts (pandas' categories), and long
columns of whole numbers as int64: 25 million timestamps take 0.2 GB so, and 1.7 GB as str.
"""

from __future__ import annotations

import csv
import io
import logging
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd

from recbole_llm.data import parquet_files
from recbole_llm.data.parquet_files import ParquetTable

logger = logging.getLogger(__name__)

TYPES = ("token", "token_seq", "float", "float_seq")
MISSING = frozenset({"", "na", "n/a", "<na>", "#n/a", "nan", "-nan", "null", "none"})
"""Cells of a numeric column, in lower case, that stand for a missing value."""
LINES_AT_ONCE = 1 << 18
"""Lines of a usual file that are split together."""
MOST_DIFFERENT = 0.5
"""Share of new cells in a piece of a column, beyond which equal ones are no longer looked for."""
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
    """A table's cells as text.

    Attributes:
        path: where it is.
        types: RecBole's type of each column, in the order of the file.
        table: one row per record. A column holds categories of str, or values of which the text is what Python
            prints: int64, float64 (NaN: an empty cell), datetime64[ns]. :meth:`cells` gives the text.
        lines: the line of the file on which each record begins, or its row in a parquet table, int ``[n]``.
        parquet: where the rows came from; ``None``: a text file.
    """

    path: Path
    types: dict[str, str]
    table: pd.DataFrame
    lines: np.ndarray
    parquet: ParquetTable | None = None

    def __len__(self) -> int:
        return len(self.lines)

    def cells(self, column: str) -> np.ndarray:
        """The text of every cell of a column, an array of str ``[n]``."""
        words, codes = self._words(column)
        return words[codes]

    def tokens(self, column: str) -> pd.Categorical:
        """The column as categories of str ``[n]``; empty cells have none."""
        words, codes = self._words(column)
        kept = np.flatnonzero(words != "")
        numbers = np.full(len(words), -1, dtype=np.int32)
        numbers[kept] = np.arange(len(kept))
        return pd.Categorical.from_codes(numbers[codes], categories=pd.Index(words[kept], dtype=object))

    def _words(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """The different texts of a column ``[k]``, each of which occurs, and the number of each row's ``[n]``."""
        values = self.table[column]
        if isinstance(values.dtype, pd.CategoricalDtype):
            return values.cat.categories.to_numpy(object), values.cat.codes.to_numpy()
        codes, found = pd.factorize(values, use_na_sentinel=False)
        words = np.array(["" if pd.isna(value) else str(value) for value in found], dtype=object)
        return words, codes

    def _keep_words(self, column: str, words: Iterable[str], codes: np.ndarray) -> None:
        """Set a column to the texts ``words[codes]``; equal ones become one."""
        same, found = pd.factorize(np.array(list(words), dtype=object))
        self.table[column] = pd.Categorical.from_codes(same[codes], categories=pd.Index(found, dtype=object))

    def place(self, row: int) -> str:
        """``line 7``, or ``part-0.parquet, row group 0, row 5``."""
        return f"line {self.lines[row]}" if self.parquet is None else self.parquet.place(int(self.lines[row]))

    def cell(self, row: int, column: str) -> str:
        """The text of one cell."""
        value = self.table[column].iloc[row]
        return "" if pd.isna(value) else str(value)

    def where(self, row: int, column: str) -> str:
        """``file, line 7, column 'price': '-'`` for an error message."""
        value = self.cell(row, column)
        shown = value if len(value) <= 40 else value[:39] + "…"
        return f"{self.path}, {self.place(row)}, column {column!r}: {shown!r}"

    def _floats(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """The column as float64 ``[n]`` with NaN for missing cells, and the rows that hold no finite numbers."""
        values = self.table[column]
        if values.dtype.kind in "if":
            numbers = values.to_numpy(np.float64)
            return numbers, np.flatnonzero(np.isinf(numbers))
        words, codes = self._words(column)
        numbers, wrong = _floats(words)
        if not len(wrong):
            return numbers[codes], wrong
        return numbers[codes], np.flatnonzero(np.isin(codes, wrong))

    def numbers(self, column: str, *, needed: bool = False) -> np.ndarray:
        """The column as float64 ``[n]``; NaN where the value is missing.

        Args:
            needed: whether there is no doing without it, which decides what the error advises.

        Raises:
            ValueError: for text and for infinite values.
        """
        values, wrong = self._floats(column)
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
        if self.table[column].dtype.kind == "M":
            return _seconds(pd.to_datetime(self.table[column], utc=True))
        values, wrong = self._floats(column)
        if len(wrong):
            words, codes = self._words(column)
            parsed = pd.to_datetime(pd.Series(words), format="ISO8601", utc=True, errors="coerce")
            there = np.array([not _is_missing(word) for word in words])
            wrong = np.flatnonzero((parsed.isna().to_numpy() & there)[codes])
            if len(wrong):
                raise ValueError(
                    f"{self.where(wrong[0], column)} is not a time ({len(wrong):,} of {len(self):,} cells are not). "
                    f"Write the header {column}:float, and as values seconds since 1970 or ISO dates such as "
                    "2011-06-26 10:16:34, the same in all lines"
                )
            logger.warning("%s: column %r holds dates, read as seconds since 1970 (UTC)", self.path, column)
            return _seconds(parsed)[codes]
        known = np.flatnonzero(~np.isnan(values))
        if not len(known):
            return values
        if (seconds := _dates_of_digits(values)) is not None:
            logger.warning(
                "%s: column %r holds dates such as %r, read as seconds since 1970 (UTC)",
                self.path,
                column,
                self.cell(known[0], column),
            )
            return seconds
        sizes = np.abs(values[known])
        low, high = known[sizes.argmin()], known[sizes.argmax()]
        if _unit(values[low]) != _unit(values[high]):
            raise ValueError(
                f"{self.where(low, column)} is a time in {_unit(values[low])[0]}, but {self.place(high)} has "
                f"{self.cell(high, column)!r}, in {_unit(values[high])[0]}. Use one unit in all lines"
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
        words, codes = self._words(column)
        stripped = [word.strip() for word in words]
        changed = np.array([new != old for new, old in zip(stripped, words, strict=True)], dtype=bool)
        if changed.any():
            rows = np.flatnonzero(changed[codes])
            logger.warning(
                "%s: %s ids in column %r have blanks around them, which are removed (first: %s)",
                self.path,
                f"{len(rows):,}",
                column,
                self.place(rows[0]),
            )
        if self.types[column] == "float":
            logger.warning("%s: column %r holds ids and is read as text, not as numbers", self.path, column)
            stripped = list(map(_canonical, stripped))
            self.types[column] = "token"
        self._keep_words(column, stripped, codes)


def joined(files: Sequence[AtomicFile]) -> AtomicFile | None:
    """The records of several files under the columns of the first; cells of columns that a file lacks are empty."""
    if len(files) < 2:
        return files[0] if files else None
    first = files[0]
    table = {
        column: np.concatenate(
            [file.cells(column) if column in file.types else np.full(len(file), "", object) for file in files]
        )
        for column in first.types
    }
    lines = np.concatenate([file.lines for file in files])
    return AtomicFile(first.path, first.types, pd.DataFrame(table, dtype=object), lines)


def _is_missing(cell: str) -> bool:
    return cell.strip().lower() in MISSING


def _seconds(times: pd.Series) -> np.ndarray:
    """Seconds since 1970, float64 ``[n]``; NaN for missing ones."""
    return ((times - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)).to_numpy(np.float64)


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
    low, high = np.nanmin(values), np.nanmax(values)
    for layout, fill in DATES_OF_DIGITS:
        if (
            low * fill < 19e12
            or high * fill > 2101e10
            or not np.equal(
                np.floor(values), values, where=~np.isnan(values), out=np.ones(len(values), bool)
            ).all()
        ):
            continue
        text = pd.Series(values).map(lambda value: "" if np.isnan(value) else f"{value:.0f}")
        parsed = pd.to_datetime(text, format=layout, utc=True, errors="coerce")
        if (parsed.isna().to_numpy() == np.isnan(values)).all():
            return _seconds(parsed)
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
    return _checked_types(path, header, "the first line")


def _checked_types(path: Path, header: Sequence[str], place: str) -> dict[str, str]:
    """Columns and types of ``name:type`` cells.

    Raises:
        ValueError: if a cell has another form, a type is unknown, or a name occurs twice.
    """
    cells = [[part.strip() for part in cell.split(":")] for cell in header]
    for cell in cells:
        if len(cell) != 2 or not cell[0]:
            raise ValueError(
                f"{path}: column {':'.join(cell)!r} must be named name:type or have a plain name"
            )
        if cell[1] not in TYPES:
            raise ValueError(
                f"{path}: column {cell[0]!r} has the type {cell[1]!r}, which is none of {', '.join(TYPES)}"
            )
    twice = [name for name, count in Counter(name for name, _ in cells).items() if count > 1]
    if twice:
        raise ValueError(f"{path}: {place} has the column {twice[0]!r} more than once")
    return {name: kind for name, kind in cells}


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


def read_atomic(
    path: Path, separator: str = "\t", encoding: str | None = None, columns: Collection[str] | None = None
) -> AtomicFile:
    """An atomic file as text: every cell as it is meant.

    A cell is taken as it is written, except where it must have been quoted by a writer of csv files: it begins
    and ends with a double quote, and quotes inside are doubled. Only such cells may hold separators and line
    breaks. Lines that end early are filled up with empty cells, and counted in the log.

    Args:
        columns: those to keep; ``None``: all.

    Raises:
        ValueError: if the header is wrong, or a line has more cells than the header.
    """
    types = read_types(path, separator, encoding)
    kept = [columns is None or name in columns for name in types]
    found = _usual_columns(islice(_lines(path, encoding), 1, None), separator, kept)
    if found is not None:
        table, size = found
        numbers: np.ndarray = np.arange(2, 2 + size, dtype=_row_type(size))
    else:
        lines = list(_lines(path, encoding))[1:]
        rows, numbers = _checked_records(path, lines, separator, list(types))
        table = [_Cells() for _ in types]
        for number, cells in enumerate(table):
            cells.add([row[number] for row in rows])
    return AtomicFile(path, *_kept(types, kept, table), numbers)


def _kept(
    types: Mapping[str, str], kept: Sequence[bool], found: Sequence[_Cells]
) -> tuple[dict[str, str], pd.DataFrame]:
    """Types and table of the columns that are kept."""
    table = {
        name: pd.Series(cells.done()) for name, cells, keep in zip(types, found, kept, strict=True) if keep
    }
    return {name: types[name] for name in table}, pd.DataFrame(table, copy=False)


def _row_type(size: int) -> type[np.signedinteger]:
    return np.int32 if size < 2**31 - 2 else np.int64


class _Cells:
    """The cells of a column, gathered piece by piece.

    Equal cells become one str with a number, for a str takes 50 bytes, and 25 million interactions have 160,000
    different users. In columns of which most cells differ, such as times, whole numbers are kept as such.
    """

    def __init__(self) -> None:
        self._known: defaultdict[str, int] = defaultdict()
        self._known.default_factory = self._known.__len__
        self._parts: list[np.ndarray] = []
        self._coded = 0  # of the parts, the first so many are numbers of known cells
        self._look = True

    def add(self, cells: list[str]) -> None:
        """Add a piece as text."""
        if not self._look:
            whole = _whole_numbers(cells)
            self._parts.append(np.array(cells, dtype=object) if whole is None else whole)
            return
        before = len(self._known)
        codes = np.fromiter(map(self._known.__getitem__, cells), dtype=np.int32, count=len(cells))
        self._parts.append(codes)
        self._coded += 1
        self._look = len(cells) < LINES_AT_ONCE or len(self._known) - before <= MOST_DIFFERENT * len(cells)

    def add_words(self, words: list[str], codes: np.ndarray) -> None:
        """Add the piece ``words[codes]``."""
        used = np.unique(codes)
        numbers = np.full(len(words), -1, dtype=np.int32)
        numbers[used] = [self._known[words[code]] for code in used]
        self._parts.append(numbers[codes])
        self._coded += 1

    def done(self) -> pd.Categorical | np.ndarray:
        """Categories of str; or int64, or str in an object array."""
        words = np.array(list(self._known), dtype=object)
        parts, self._parts, self._known = self._parts, [], defaultdict()
        if self._coded == len(parts):
            codes = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
            return pd.Categorical.from_codes(codes, categories=pd.Index(words, dtype=object))
        for number in range(self._coded):
            cells = words[parts[number]]
            whole = _whole_numbers(cells.tolist())
            parts[number] = cells if whole is None else whole
        if not all(part.dtype.kind == "i" for part in parts):
            parts = [part if part.dtype.kind == "O" else part.astype(str).astype(object) for part in parts]
        return np.concatenate(parts)


def _whole_numbers(cells: list[str]) -> np.ndarray | None:
    """Cells as int64, if each is a whole number as Python prints it; else ``None``."""
    digits = "".join(cells)
    if not (digits.isascii() and digits.isdecimal()) or max(map(len, cells)) > 15:
        return None
    try:
        values = np.array(list(map(int, cells)), dtype=np.int64)
    except ValueError:  # an empty cell
        return None
    lengths = 1 + np.searchsorted(10 ** np.arange(1, 16, dtype=np.int64), values, side="right")
    return values if lengths.sum() == len(digits) else None  # else there are leading zeros


def _usual_columns(
    lines: Iterator[str], separator: str, kept: Sequence[bool]
) -> tuple[list[_Cells], int] | None:
    """The columns of a usual file, in which every line is a record and no cell is quoted; ``None`` for any other.

    Many lines are split at once. The second result is the number of lines.
    """
    width, size = len(kept), 0
    found = [_Cells() for _ in kept]
    while chunk := list(islice(lines, LINES_AT_ONCE)):
        if not all(line.count(separator) == width - 1 and line and '"' not in line for line in chunk):
            return None
        flat = separator.join(chunk).split(separator)
        for column in np.flatnonzero(kept):
            found[column].add(flat[column::width])
        size += len(chunk)
    return found, size


def _read_parquet(
    path: Path,
    ids: Collection[str],
    numbers: Collection[str],
    separator: str,
    columns: Collection[str] | None,
) -> AtomicFile:
    """A parquet table as if it were an atomic file; only ``columns`` are read (``None``: all)."""
    source = ParquetTable(path)
    types = _checked_types(path, source.header(ids, numbers), "the schema")
    table: dict[str, pd.Series] = {}
    for number, (name, kind) in enumerate(types.items()):
        if columns is not None and name not in columns:
            continue
        cells, values = _Cells(), []
        for piece in source.pieces(number, kind, separator):
            if isinstance(piece, tuple):
                cells.add_words(*piece)
            else:
                values.append(piece)
        table[name] = pd.Series(np.concatenate(values) if values else cells.done())
    rows: np.ndarray = np.arange(source.rows, dtype=_row_type(source.rows))
    kept = {name: types[name] for name in table}
    return AtomicFile(path, kept, pd.DataFrame(table, copy=False), rows, source)


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
    used = list(dict.fromkeys(token for file in interactions for token in file.tokens(column).categories))
    words, codes = other._words(column)
    known = set(words)
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
        other._keep_words(column, [renamed.get(token, token) for token in words], codes)
    if len(lost) - len(renamed) == len(used):
        raise ValueError(
            f"no {column} of {interactions[0].path} is in {other.path}: the one has e.g. {lost[0]!r}, the other "
            f"{other.cell(0, column)!r}. Write ids alike in both files"
        )


def keep_first_lines(file: AtomicFile, column: str) -> None:
    """Of several lines of one user or item keep the first: with more, RecBole's table of features would shift."""
    again = file.table[column].duplicated().to_numpy()
    if not again.any():
        return
    row = int(np.flatnonzero(again)[0])
    logger.warning(
        "%s: %s lines repeat the %s of an earlier line (first: %s, %r); the earlier one counts",
        file.path,
        f"{again.sum():,}",
        column,
        file.place(row),
        file.cell(row, column),
    )
    table = file.table[~again].reset_index(drop=True)
    for name in table.columns:  # so that every category occurs
        if isinstance(table[name].dtype, pd.CategoricalDtype):
            table[name] = table[name].cat.remove_unused_categories()
    file.table = table
    file.lines = file.lines[~again]


def is_parquet(path: Path) -> bool:
    """Whether a table is parquet, by its name."""
    return path.suffix == parquet_files.SUFFIX


def table_suffix(path: Path) -> str:
    """``inter``, ``item`` or ``user``, of text and parquet alike.

    >>> table_suffix(Path("toy.inter")), table_suffix(Path("toy.item.parquet"))
    ('inter', 'item')
    """
    return path.name.removesuffix(parquet_files.SUFFIX).rpartition(".")[2]


def table_path(folder: Path, name: str) -> Path:
    """Where a table is: ``folder/name``, or ``folder/name.parquet`` if only that is there.

    Raises:
        ValueError: if both are there.
    """
    text, parquet = folder / name, folder / f"{name}{parquet_files.SUFFIX}"
    if text.is_file() and parquet.exists():
        raise ValueError(
            f"{text} and {parquet} are both there; keep the one that is meant and move the other away"
        )
    return parquet if parquet.exists() and not text.is_file() else text


class AtomicFiles:
    """The files of one dataset, read once.

    Args:
        folder: where they are.
        interactions: names of the files of interactions. Where ``NAME`` is no file, ``NAME.parquet`` is taken: a
            file, or a folder of part files.
        others: ``.user`` and ``.item`` file names and the field that holds their ids; they may be missing.
        separator, encoding: RecBole's ``field_separator`` and ``encoding``.
        seq_separator: RecBole's key, what separates the values of a list.
        numbers: columns of interactions that hold numbers or times, for parquet files that do not say so.

    Attributes:
        interactions: paths of the interactions.
        others: path of each other table and the field of its ids.

    Raises:
        FileNotFoundError: if a file of interactions is missing.
        ValueError: if a table is there both as text and as parquet.
    """

    def __init__(
        self,
        folder: Path,
        interactions: Sequence[str],
        others: dict[str, str],
        separator: str,
        encoding: str | None,
        seq_separator: str = " ",
        numbers: Collection[str] = (),
    ) -> None:
        self._how = (separator, encoding)
        self._roles = (set(others.values()), set(numbers), seq_separator)
        self.interactions = [table_path(folder, name) for name in interactions]
        paths = {table_path(folder, name): field for name, field in others.items()}
        self.others = {path: field for path, field in paths.items() if path.exists()}
        for path in self.interactions:
            if not path.exists():
                there = sorted(p.name for p in folder.iterdir())
                begin = path.name.removesuffix("inter")
                parts = [
                    name.removesuffix(parquet_files.SUFFIX)[len(begin) : -6]
                    for name in there
                    if re.fullmatch(f"{re.escape(begin)}.+[.]inter", name.removesuffix(parquet_files.SUFFIX))
                ]
                raise FileNotFoundError(
                    f"{path} does not exist; {folder} holds {there}"
                    + (f"; ready-made splits are named by benchmark_filename, of {parts}" if parts else "")
                )
        self._files: dict[Path, AtomicFile] = {}

    @cached_property
    def types(self) -> dict[Path, dict[str, str]]:
        """Columns and types of every file, from the headers alone."""
        return {path: self._types_of(path) for path in (*self.interactions, *self.others)}

    def _types_of(self, path: Path) -> dict[str, str]:
        if not is_parquet(path):
            return read_types(path, *self._how)
        ids, numbers, _ = self._roles
        return _checked_types(path, ParquetTable(path).header(ids, numbers), "the schema")

    def read_table(self, path: Path, columns: Collection[str] | None = None) -> AtomicFile:
        """Any table, text or parquet, read as those of the dataset are; ``columns``: those to keep (``None``: all).

        Raises:
            ValueError: if it cannot be read.
        """
        if is_parquet(path):
            return _read_parquet(path, *self._roles, columns)
        return read_atomic(path, *self._how, columns)

    def read(self, id_fields: Sequence[str], columns: Mapping[Path, Collection[str]] | None = None) -> None:
        """Read all files, clean their ids, and make the ids of ``.user`` and ``.item`` those of the interactions.

        Args:
            columns: those to keep of a file; of files that it does not name, all.

        Raises:
            ValueError: for whatever cannot be read or matched, and for interactions without a single line.
        """
        for path in self.types:
            file = self._files[path] = self.read_table(path, (columns or {}).get(path))
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

    def other(self, suffix: str) -> AtomicFile | None:
        """The table ``.item`` or ``.user`` if there is one and it was read."""
        found = [path for path in self.others if table_suffix(path) == suffix and path in self._files]
        return self._files[found[0]] if found else None

    def __contains__(self, path: Path) -> bool:
        return path in self._files

    def __getitem__(self, path: Path) -> AtomicFile:
        return self._files[path]

    def close_interactions(self) -> None:
        """Let go of the interactions, once they are in the dataset."""
        for path in self.interactions:
            self._files.pop(path, None)
