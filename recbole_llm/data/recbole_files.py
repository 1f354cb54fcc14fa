"""The files of a run in RecBole's own protocol (``task: ~``), checked before RecBole reads them.

RecBole's loader stays as it is there, with its own reading of every cell, so nothing is repaired: what it would refuse
without naming file and line, or take for something else, is one ``ValueError``.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd
from recbole.config import Config

from recbole_llm.data.atomic_dataset import loaded_columns
from recbole_llm.data.atomic_files import AtomicFile, AtomicFiles, is_parquet, read_atomic

logger = logging.getLogger(__name__)


def check_files(config: Config) -> None:
    """Check interactions, users and items of a dataset that RecBole is about to load.

    Raises:
        FileNotFoundError: if a file of interactions is missing.
        ValueError: for headers, numbers, times and ids that RecBole would misread.
    """
    folder, name = Path(config["data_path"]), config["dataset"]
    if not folder.is_dir():
        return  # RecBole knows a download, or says what is missing
    how = (config["field_separator"], config["encoding"])
    user, item, time = (config[f"{key}_FIELD"] for key in ("USER_ID", "ITEM_ID", "TIME"))
    splits = config["benchmark_filename"] or [""]
    names = [f"{name}.{split + '.' if split else ''}inter" for split in splits]
    files = AtomicFiles(folder, names, {f"{name}.user": user, f"{name}.item": item}, *how)
    parquet = [path for path in (*files.interactions, *files.others) if is_parquet(path)]
    if parquet:
        raise ValueError(
            f"{parquet[0]}: RecBole's own protocol reads text only; set task: ctr or task: next_item, or write "
            f"{parquet[0].name.removesuffix('.parquet')} as text"
        )
    columns = {path: loaded_columns(config, path, types) for path, types in files.types.items()}
    for path in files.interactions:
        lacking = {user: "USER_ID_FIELD", item: "ITEM_ID_FIELD"}
        if config["eval_args"]["order"] == "TO":
            lacking[time] = "TIME_FIELD, eval_args.order being TO"
        for field, key in lacking.items():
            if field not in columns[path]:
                raise ValueError(f"{path}: no column {field!r} ({key}) is loaded, but {columns[path]}")
    inter = [_checked(path, columns[path], how, time) for path in files.interactions]
    for path, field in files.others.items():
        if not columns[path]:
            continue  # it is not loaded
        if field not in columns[path]:
            raise ValueError(f"{path}: no column {field!r} is loaded, but {columns[path]}")
        _check_ids(inter, _checked(path, columns[path], how, None), field, config)


def _checked(path: Path, columns: list[str], how: tuple[str, str | None], time: str | None) -> AtomicFile:
    """A file of which every loaded column of numbers holds numbers."""
    file = read_atomic(path, *how)
    if not len(file):
        raise ValueError(f"{path} has a header and no lines below it")
    for column in columns:
        if column == time and file.types[column] != "float":
            raise ValueError(
                f"{path}: column {column!r} is {file.types[column]}, so RecBole orders times as they first appear; "
                f"write {column}:float and seconds, or set task: ctr or task: next_item, which read dates"
            )
        if file.types[column] == "float":
            try:
                file.numbers(column)
            except ValueError as error:
                if column != time:
                    raise
                said = str(error).partition(". ")[0]
                raise ValueError(
                    f"{said}. Write seconds, or set task: ctr or task: next_item, which read dates"
                ) from error
    return file


def _check_ids(inter: list[AtomicFile], other: AtomicFile, field: str, config: Config) -> None:
    """Refuse ids of ``.user`` or ``.item`` that are nowhere or twice; tell of interactions that RecBole drops."""
    again = np.flatnonzero(other.table[field].duplicated())
    if len(again):
        raise ValueError(
            f"{other.where(again[0], field)} has a line already, and RecBole would give all later ones the features of "
            "others. Remove one of the two"
        )
    known = set(other.cells(field))
    lost = sum(int((~pd.Series(file.cells(field)).isin(known)).sum()) for file in inter)
    total = sum(map(len, inter))
    if lost == total:
        raise ValueError(
            f"no {field} of {inter[0].path} is in {other.path}: the one has e.g. {inter[0].cell(0, field)!r}, "
            f"the other {other.cell(0, field)!r}. Write ids alike in both files"
        )
    if lost and config["filter_inter_by_user_or_item"]:
        logger.warning(
            "%s of %s interactions have a %s that is not in %s: RecBole drops them (filter_inter_by_user_or_item)",
            f"{lost:,}",
            f"{total:,}",
            field,
            other.path,
        )
