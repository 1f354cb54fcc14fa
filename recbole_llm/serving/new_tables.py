"""Tables of interactions and items that came after the training, checked against what a run's data has."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd

from recbole_llm.data.atomic_files import AtomicFile, is_parquet
from recbole_llm.data.ctr import CTRDataset
from recbole_llm.data.dataset import HistoryDataset
from recbole_llm.data.history import HistoryIndex

logger = logging.getLogger(__name__)


def read_interactions(source: str | Path | pd.DataFrame, dataset: HistoryDataset) -> pd.DataFrame:
    """Check a table of interactions against what the run's data has; see :mod:`recbole_llm.data.atomic_files`.

    ``min_rating`` holds here, too; RecBole's filters by counts and intervals do not.

    Args:
        source: an atomic ``.inter`` file, text or parquet, or a table with the same column names.
        dataset: of the run.

    Returns:
        ``user``, ``item`` (tokens), ``time`` and, of what the histories have, ``rating`` and ``label``.

    Raises:
        FileNotFoundError, ValueError: naming the columns or cells that are wrong.
    """
    file, history = read_table(source, "interactions", dataset), cast(HistoryIndex, dataset.history)
    timed = dataset.time_field in dataset._loaded(dataset._files.interactions[0])
    columns = {"user": dataset.uid_field, "item": dataset.iid_field}
    if timed:
        columns["time"] = dataset.time_field
    if history.ratings is not None:
        columns["rating"] = cast(str, dataset._rating_field)
    threshold = dataset.threshold if isinstance(dataset, CTRDataset) else None
    if history.labels is not None:
        columns["label"] = next(iter(threshold)) if threshold else dataset.label_field
    missing = sorted({name for name in columns.values() if name not in file.types})
    if missing:
        raise ValueError(
            f"{file.path}: no column {', '.join(missing)}; the run needs {', '.join(dict.fromkeys(columns.values()))}, "
            f"and there are {', '.join(file.types)}"
        )
    found = pd.DataFrame()
    for name, column in columns.items():
        if name in ("user", "item"):
            file.clean_ids(column)
            found[name] = file.cells(column)
            empty = found[name].isin(["", "[PAD]"])
        else:
            found[name] = file.times(column) if name == "time" else file.numbers(column, needed=True)
            empty = found[name].isna()
        if empty.any():
            raise ValueError(
                f"{file.where(int(empty.argmax()), column)} is empty; fill it in or remove the line"
            )
    if not timed:  # the order of the file is the order in time
        found["time"] = history.timestamps.max() + 1 + np.arange(len(found))
    if threshold:
        found["label"] = (found["label"] >= next(iter(threshold.values()))).astype(np.float64)
    elif "label" in found and not found["label"].isin((0, 1)).all():
        raise ValueError(f"{file.path}: {columns['label']} holds other values than 0 and 1")
    minimum = dataset.config["min_rating"]
    if minimum is not None and dataset.config["task"] == "next_item":
        found = found[found["rating"] >= minimum].reset_index(drop=True)
    return _without_duplicates(found, dataset) if timed else found


def read_table(source: str | Path | pd.DataFrame, what: str, dataset: HistoryDataset) -> AtomicFile:
    """The cells of a file, or of a table as if it were read from one; errors call it ``what``.

    Raises:
        FileNotFoundError, ValueError: if there is no such file, or it is no atomic file.
    """
    if not isinstance(source, pd.DataFrame):
        path = Path(source)
        if not (path.is_file() or (is_parquet(path) and path.is_dir())):
            raise FileNotFoundError(f"{what}: there is no file {source}")
        return dataset._files.read_table(path)
    types = {
        str(name): "float" if pd.api.types.is_float_dtype(column) else "token"
        for name, column in source.items()
    }
    table = source.where(source.notna(), "").astype(str).set_axis(list(types), axis=1).reset_index(drop=True)
    return AtomicFile(Path(f"the {what}"), types, table, np.arange(1, len(table) + 1))


def _without_duplicates(table: pd.DataFrame, dataset: HistoryDataset) -> pd.DataFrame:
    """The interactions that the data does not have yet, each once, as a preparation would keep them."""
    history = cast(HistoryIndex, dataset.history)
    if "rating" in table:
        table["rating"] = table["rating"].astype(np.float32)  # as in the histories
    users = np.repeat(np.arange(len(history.user_start) - 1), np.diff(history.user_start))
    ids = dataset.field2token_id[dataset.uid_field]
    mine = np.flatnonzero(np.isin(users, [ids[user] for user in table["user"].unique() if user in ids]))
    old = {
        "user": dataset.field2id_token[dataset.uid_field][users[mine]],
        "item": dataset.field2id_token[dataset.iid_field][history.item_ids[mine]],
        "time": history.timestamps[mine],
    }
    for name, values in (("rating", history.ratings), ("label", history.labels)):
        if values is not None:
            old[name] = values[mine]
    both = pd.concat([pd.DataFrame(old)[list(table.columns)], table], ignore_index=True)
    again = both.duplicated().to_numpy()[len(mine) :]
    if again.any():
        logger.warning("%d of the interactions are in the data already: left out", again.sum())
    return table[~again].reset_index(drop=True)
