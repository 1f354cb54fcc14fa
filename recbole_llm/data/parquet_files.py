"""Tables written as parquet: one file or a folder of part files, read column by column and row group by row group.

This is what Spark and Ray Data write. Needs pyarrow (the extra ``parquet``). What a cell means, and what is wrong with
it, is decided in :mod:`recbole_llm.data.atomic_files`, for text and parquet alike.

==================================  ==========================================================================
stored as                           handed on as
==================================  ==========================================================================
strings, and whatever the header    the different texts of a row group, and the number of each cell's text:
calls a token                       ids are never spelt out per row; null and NaN are empty cells
numbers and truth values that the   numpy arrays, int64 or float64; null is NaN
header calls float
times that the header calls float   datetime64[ns], in UTC
lists                               one text per cell, with RecBole's ``seq_separator`` between the values
==================================  ==========================================================================
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SUFFIX = ".parquet"
Piece = tuple[list[str], np.ndarray] | np.ndarray
"""Texts ``[k]`` and each row's text, int ``[n]``; or values ``[n]``."""


class ParquetTable:
    """A table in one parquet file or in a folder of them, which are taken in the order of their names.

    Args:
        path: the file or folder. In a folder, names that begin with ``_`` or ``.`` are passed over.

    Attributes:
        rows: of all parts together.

    Raises:
        ModuleNotFoundError: without pyarrow.
        ValueError: if a part is no parquet file or truncated, there is none, or their columns differ.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        parts = _parts(path)
        opened = [_opened(part) for part in parts]
        self._fields = {field.name: field.type for field in opened[0].schema_arrow}
        if len(self._fields) < len(opened[0].schema_arrow.names):
            raise ValueError(f"{path} has two columns of one name: {opened[0].schema_arrow.names}")
        for part, file in zip(parts, opened, strict=True):
            fields = {field.name: field.type for field in file.schema_arrow}
            if fields != self._fields:
                raise ValueError(
                    f"{part} has the columns {_shown(fields)}, but {parts[0]} has {_shown(self._fields)}; all parts of "
                    "a table need the same names and types"
                )
        self._groups: list[tuple[Path, int]] = []
        self._starts: list[int] = []
        self.rows = 0
        for part, file in zip(parts, opened, strict=True):
            for group in range(file.num_row_groups):
                self._groups.append((part, group))
                self._starts.append(self.rows)
                self.rows += file.metadata.row_group(group).num_rows

    def header(self, ids: Collection[str], numbers: Collection[str]) -> list[str]:
        """The ``name:type`` cell of each column; types that the names lack follow from the schema.

        Args:
            ids: columns of user and item ids, which are tokens.
            numbers: columns of ratings, labels and times, which are floats.

        Raises:
            ValueError: if a type does not follow, or no cell can hold such values.
        """
        return [
            name if ":" in name else f"{name}:{self._type_of(name, ids, numbers)}" for name in self._fields
        ]

    def _type_of(self, name: str, ids: Collection[str], numbers: Collection[str]) -> str:
        kind = _kind(self._fields[name])
        if kind == "list":
            return "float_seq" if _kind(self._fields[name].value_type) == "float" else "token_seq"
        if kind in ("text", "nothing", "float", "time"):
            return "float" if kind == "float" or (kind == "time" and name in numbers) else "token"
        if kind in ("whole", "truth") and (name in ids or name in numbers):
            return "token" if name in ids else "float"
        said = f"{self.path}: column {name!r} is {self._fields[name]}"
        if kind in ("whole", "truth"):
            raise ValueError(
                f"{said}, which may be a category or a number; name it {name}:token or {name}:float"
            )
        raise ValueError(
            f"{said}, which no column may be; write it as text, numbers or lists of them, or leave it out"
        )

    def place(self, row: int) -> str:
        """Part, row group and row in it, both counted from 0 as pyarrow does, for an error message."""
        at = bisect_right(self._starts, row) - 1
        part, group = self._groups[at]
        inside = "" if part == self.path else f"{part.name}, "
        return f"{inside}row group {group}, row {row - self._starts[at]}"

    def pieces(self, number: int, kind: str, separator: str) -> Iterator[Piece]:
        """The values of a column, one piece per row group.

        Args:
            number: of the column, from 0.
            kind: RecBole's type of it.
            separator: put between the values of a list.

        Raises:
            ValueError: if a part cannot be read, or its type cannot be cells of a table.
        """
        name, stored = list(self._fields.items())[number]
        if _kind(stored) == "other":
            self._type_of(name, (), ())
        file: Any = None
        opened: Path | None = None
        for start, (part, group) in zip(self._starts, self._groups, strict=True):
            if part != opened:
                file, opened = _opened(part, [name] if _kind(stored) == "text" else None), part
            try:
                array = file.read_row_group(group, columns=[name]).column(0).combine_chunks()
                if hasattr(array, "chunks"):  # combine_chunks of a table without rows
                    continue
                numeric = kind == "float" and _kind(stored) in ("whole", "float", "truth", "time")
                piece = _values(array) if numeric else _texts(array)
            except (OSError, ValueError, OverflowError) as error:  # ArrowInvalid is a ValueError
                raise ValueError(
                    f"{part}, row group {group}, column {name!r} cannot be read: {error}"
                ) from error
            yield piece if not isinstance(piece, list) else self._joined(piece, name, separator, start)

    def _joined(self, lists: list[list[str]], name: str, separator: str, start: int) -> Piece:
        """Lists as one text per row.

        Raises:
            ValueError: if a value holds the separator: it would be read as two.
        """
        for row, values in enumerate(lists):
            for value in values:
                if separator in value:
                    raise ValueError(
                        f"{self.path}, {self.place(start + row)}, column {name!r}: {value[:40]!r} holds {separator!r}, "
                        "which separates the values of a list; set seq_separator to something else"
                    )
        return [separator.join(values) for values in lists], np.arange(len(lists))


def _parts(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = [part for part in sorted(path.iterdir()) if not part.name.startswith(("_", "."))]
    folders = [part.name for part in found if part.is_dir()]
    if folders:
        raise ValueError(f"{path} holds the folder {folders[0]!r}; write its part files without partitioning")
    if not found:
        raise ValueError(f"{path} holds no part files; write the table again")
    return found


def _opened(part: Path, dictionaries: list[str] | None = None) -> Any:
    """A part as pyarrow's ParquetFile; the columns named are read as dictionaries."""
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{part} needs pyarrow: pip install pyarrow") from error
    try:
        return pyarrow.parquet.ParquetFile(part, read_dictionary=dictionaries)
    except (OSError, ValueError) as error:
        raise ValueError(f"{part} is no parquet file, or truncated: {error}") from error


def _kind(stored: Any) -> str:
    """What values of an arrow type are here."""
    import pyarrow.types as types

    if types.is_dictionary(stored):
        return _kind(stored.value_type)
    if types.is_list(stored) or types.is_large_list(stored):
        return "list" if _kind(stored.value_type) in ("text", "whole", "float", "nothing") else "other"
    known = {
        "text": (types.is_string, types.is_large_string),
        "whole": (types.is_integer,),
        "float": (types.is_floating,),
        "truth": (types.is_boolean,),
        "time": (types.is_timestamp, types.is_date),
        "nothing": (types.is_null,),
    }
    return next((kind for kind, tests in known.items() if any(test(stored) for test in tests)), "other")


def _shown(fields: dict[str, Any]) -> str:
    cells = [f"{name} ({kind})" for name, kind in fields.items()]
    return ", ".join(cells[:12]) + (f" and {len(cells) - 12} more" if len(cells) > 12 else "")


def _values(array: Any) -> np.ndarray:
    """Numbers as int64 (without nulls) or float64, times as datetime64[ns], ``[n]``."""
    import pyarrow as pa

    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if _kind(array.type) == "time":
        zone = array.type.tz if pa.types.is_timestamp(array.type) else None
        return array.cast(pa.timestamp("ns", zone)).to_numpy(zero_copy_only=False)
    if _kind(array.type) == "truth":
        array = array.cast(pa.int8())
    values = array.to_numpy(zero_copy_only=False)
    signed = np.issubdtype(values.dtype, np.signedinteger) or values.dtype in (np.uint8, np.uint16, np.uint32)
    return values.astype(np.int64 if signed else np.float64)


def _texts(array: Any) -> Piece | list[list[str]]:
    """The different texts of an array and the number of each row's; of lists, the texts of each."""
    import pyarrow as pa

    if _kind(array.type) == "list":
        return [[_text(value) for value in values or ()] for values in array.to_pylist()]
    if _kind(array.type) == "nothing":
        return [""], np.zeros(len(array), dtype=np.int64)
    found = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    words = [*map(_text, found.dictionary.to_pylist()), ""]
    return words, found.indices.fill_null(len(words) - 1).to_numpy(zero_copy_only=False)


def _text(value: Any) -> str:
    return "" if value is None or value != value else str(value)
