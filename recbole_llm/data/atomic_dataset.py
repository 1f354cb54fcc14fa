"""Interactions and features from checked files: what is loaded, what is dropped, and why.

:class:`AtomicDataset` is RecBole's SequentialDataset up to the point where samples and histories are made of the
interactions (:class:`~recbole_llm.data.dataset.HistoryDataset`): files are read by
:mod:`~recbole_llm.data.atomic_files`, columns that are missing are named, and every filter counts what it drops.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from pandas.api.types import union_categoricals
from recbole.data.dataset import SequentialDataset
from recbole.utils import FeatureSource, FeatureType

from recbole_llm.data.atomic_files import AtomicFile, AtomicFiles, table_suffix

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
INTERVAL = re.compile(r"\s*[\[(]\s*([^,]+?)\s*,\s*([^,]+?)\s*[\])]\s*")
"""One of RecBole's intervals, ``[4,inf)``; several are separated by semicolons."""
LIST_TYPES = (FeatureType.TOKEN_SEQ, FeatureType.FLOAT_SEQ)


class AtomicDataset(SequentialDataset):
    """The interactions and features of a dataset, checked.

    Args:
        config: RecBole's Config, with the key ``max_dropped`` (0.5 where a plain Config has none).

    Attributes:
        dropped: interactions of the files that are no part of the data, their number by cause.
        unmatched: interactions that are kept although their user has no line in ``.user`` or their item none in
            ``.item``, their number by cause.
        n_read: interactions in the files.

    Raises:
        FileNotFoundError: if the folder or the ``.inter`` file is missing.
        ValueError: if a file cannot be read as it is meant, a column is missing or empty, a setting would spoil it,
            or more than ``max_dropped`` of the interactions would be dropped unasked.
    """

    inter_feat: Any  # RecBole's: a DataFrame while it loads, then an Interaction
    file_size_list: list[int]
    field2seqlen: dict[str, int]
    benchmark_filename_list: list[str] | None

    def __init__(self, config):
        self.dropped: dict[str, int] = {}
        self.unmatched: dict[str, int] = {}
        self.n_read = 0
        self._plain_splits = False
        self._check_settings(config)
        super().__init__(config)

    # ------------------------------------------------------------------ checks

    def _check_settings(self, config) -> None:
        raw = set(self._raw_fields(config))
        names = config["benchmark_filename"]
        if names is not None and (
            not isinstance(names, (list, tuple)) or len(names) not in (2, 3) or len(set(names)) < len(names)
        ):
            raise ValueError(
                f"benchmark_filename: {names!r} must hold three names ({', '.join(SPLITS)}) or two (train, test)"
            )
        if config["normalize_all"]:
            raise ValueError(
                "normalize_all: True would scale ratings and timestamps to [0, 1]; set it to False"
            )
        for key in ("normalize_field", "numerical_features", "discretization"):
            clash = sorted(raw.intersection(config[key] or ()))
            if clash:
                raise ValueError(f"{key}: {clash} must keep the raw values; take them out")
        for key in ("user_inter_num_interval", "item_inter_num_interval"):
            if config[key] is not None:
                check_interval(key, config[key])

    def _raw_fields(self, config) -> list[str]:
        """Columns whose values must reach the samples as they are in the file."""
        return [config["RATING_FIELD"], config["TIME_FIELD"]]

    def _needed_columns(self) -> dict[str, str]:
        """Columns of ``.inter`` without which there are no samples, and the configuration key that asks for them."""
        return {self.uid_field: "USER_ID_FIELD", self.iid_field: "ITEM_ID_FIELD"}

    def _inter_files(self) -> list[str]:
        """Names of the files of interactions: one, or RecBole's ``benchmark_filename``, one per split."""
        names = self.config["benchmark_filename"]
        return [f"{self.dataset_name}.{name + '.' if name else ''}inter" for name in names or [""]]

    def _open_splits(self, types: dict[Path, dict[str, str]]) -> None:
        """Decide how the files of ``benchmark_filename`` are read, from the headers of all files."""
        self._plain_splits = self.config["benchmark_filename"] is not None

    def _check_columns(self, types: dict[Path, dict[str, str]]) -> None:
        """Name every column that is asked for and not there, before a line of data is read."""
        load_col = self.config["load_col"]
        for path, columns in types.items():
            asked = (load_col or {}).get(table_suffix(path)) or ()
            missing = [column for column in asked if asked != "*" and column not in columns]
            if missing:
                raise ValueError(f"load_col: {path} has no column {missing}; it has {list(columns)}")
        first, *others = self._files.interactions
        for path in others:
            if lacking := [column for column in self._loaded(first) if column not in self._loaded(path)]:
                raise ValueError(
                    f"{path} has no column {lacking}, but {first} has; split files need the same columns"
                )
        for path in self._files.interactions:
            loaded = self._loaded(path)
            for field, key in self._needed_columns().items():
                if field not in loaded:
                    raise ValueError(
                        f"{path}: column {field!r} ({key}) is not loaded, so there are no samples to "
                        f"learn from. The file has {list(types[path])}, load_col and unload_col keep {loaded}"
                        + ("" if field in types[path] else f"; name the right one by {key.split(',')[0]}")
                    )

    def _loaded(self, path: Path) -> list[str]:
        """The columns of a file that ``load_col`` and ``unload_col`` keep."""
        return loaded_columns(self.config, path, self._files.types[path])

    # ------------------------------------------------------------------ loading

    def _load_data(self, token: str, dataset_path: str) -> None:
        folder = Path(dataset_path)
        if not folder.is_dir():
            if self._get_download_url("url", allow_none=True) is None:
                parent, there = folder.parent, f"{folder.parent} does not exist"
                if parent.is_dir():
                    found = sorted(path.name for path in parent.iterdir() if path.is_dir())
                    there = f"{parent} holds {found or 'no folders'}"
                raise FileNotFoundError(
                    f"the data folder {folder} does not exist ({there}), and RecBole knows no download for {token!r}. "
                    f"Set data_path to the folder that holds {token}/{token}.inter"
                )
            self._download()
        self._files = AtomicFiles(
            folder,
            self._inter_files(),
            {f"{token}.user": self.uid_field, f"{token}.item": self.iid_field},
            self.config["field_separator"],
            self.config["encoding"],
            self.config["seq_separator"],
            [*filter(None, self._raw_fields(self.config)), self.config["LABEL_FIELD"]],
        )
        types = self._files.types
        self._open_splits(types)
        self._check_columns(types)
        # Of users and items any column may become text.
        columns = {path: self._loaded(path) for path in self._files.interactions}
        self._files.read((self.uid_field, self.iid_field), columns)
        super()._load_data(token, dataset_path)
        self._files.close_interactions()

    def _load_inter_feat(self, token: str, dataset_path: str) -> None:
        """The interactions of all files, one after the other; RecBole knows them by the names of text files only."""
        feats: list[pd.DataFrame] = []
        longest = dict[str, int]()
        for path in self._files.interactions:
            feats.append(cast(pd.DataFrame, self._load_feat(str(path), FeatureSource.INTERACTION)))
            for field, length in self.field2seqlen.items():
                longest[field] = max(longest.get(field, 0), length)
        if self.benchmark_filename_list is None:
            (self.inter_feat,) = feats
        else:
            self.inter_feat = pd.concat(feats, ignore_index=True)
            self.file_size_list, self.field2seqlen = list(map(len, feats)), longest
        self.n_read = len(self.inter_feat)
        if self._plain_splits:
            self._split_of = pd.Series(np.repeat(np.arange(len(self.file_size_list)), self.file_size_list))
            self.benchmark_filename_list = None  # filtered like any other interactions

    def _load_user_or_item_feat(self, token, dataset_path, source, field_name):
        """The features of users or items, from text or parquet; ``None`` if there are none."""
        file, field = self._files.other(source.value), getattr(self, field_name)
        feat = None if file is None else self._load_feat(str(file.path), source)
        if file is not None and feat is not None and field not in feat:
            raise ValueError(
                f"{file.path}: column {field!r} must be loaded, but load_col and unload_col leave it out"
            )
        if field in self.field2source:
            self.field2source[field] = FeatureSource(source.value + "_id")
        return feat

    def _load_feat(self, filepath: str, source) -> pd.DataFrame | None:
        """The table that RecBole would make of a file, from its checked cells."""
        path = Path(filepath)
        if path not in self._files:  # additional_feat_suffix
            return super()._load_feat(filepath, source)
        file, columns = self._files[path], self._loaded(path)
        if not columns or not len(file):
            return None
        table = {}
        for column in columns:
            values, kind = self._column(file, column)
            table[column] = values
            self.field2source[column], self.field2type[column] = source, kind
            if kind in (FeatureType.FLOAT, FeatureType.FLOAT_SEQ):
                self.field2bucketnum[column] = 2
            self.field2seqlen[column] = 1
            if kind in LIST_TYPES:
                longest = max(map(len, values))
                limit = (self.config["seq_len"] or {}).get(column)
                if limit:
                    table[column] = [value[:limit] for value in values]
                self.field2seqlen[column] = min(limit or longest, longest)
        return pd.DataFrame({name: pd.Series(values) for name, values in table.items()})

    def _column(
        self, file: AtomicFile, column: str
    ) -> tuple[np.ndarray | list | pd.Categorical, FeatureType]:
        """The values of a column by its role, else by the type in the header, and their type."""
        kind = FeatureType(file.types[column])
        if table_suffix(file.path) == "inter" and not self._is_list(column):
            if column == self.time_field:
                return file.times(column), FeatureType.FLOAT
            if column in self._raw_fields(self.config):
                needed = column in self._needed_columns()
                try:
                    values = file.numbers(column, needed=needed)
                except ValueError as error:
                    if needed or kind is FeatureType.FLOAT:
                        raise
                    logger.warning("%s; the column is not used as a rating", error)
                else:
                    if kind is not FeatureType.FLOAT:
                        logger.warning(
                            "%s: column %r is read as numbers, not as %s", file.path, column, kind.value
                        )
                    return values, FeatureType.FLOAT
        if kind is FeatureType.FLOAT:
            return file.numbers(column), kind
        if kind is FeatureType.TOKEN:
            return file.tokens(column), kind
        separator = self.config["seq_separator"]
        parts = [[part for part in cell.split(separator) if part] for cell in file.cells(column)]
        if kind is FeatureType.TOKEN_SEQ:
            return [np.array(part) for part in parts], kind
        lists: list[np.ndarray] = []
        for row, part in enumerate(parts):
            try:
                lists.append(np.array([float(number) for number in part]))
            except ValueError:
                raise ValueError(f"{file.where(row, column)} is not a list of numbers") from None
        return lists, kind

    def _is_list(self, column: str) -> bool:
        """Whether a column of the interactions holds a list per line."""
        return False

    # ------------------------------------------------------------------ filtering

    @contextmanager
    def _counting(self, cause: str) -> Iterator[None]:
        """Count under ``cause`` by how much ``inter_feat`` gets shorter.

        Raises:
            ValueError: if nothing is left.
        """
        before = len(self.inter_feat)
        yield
        lost = before - len(self.inter_feat)
        if lost:
            self.dropped[cause] = lost
            logger.warning(
                "%s: %s of %s interactions are dropped: %s",
                self.dataset_name,
                f"{lost:,}",
                f"{self.n_read:,}",
                cause,
            )
        if not len(self.inter_feat):
            raise ValueError(f"{self.dataset_name}: no interaction is left; dropped were {self.dropped}")

    def _data_filtering(self) -> None:
        """RecBole's filters, each counted in :attr:`dropped`, and that of exact duplicates."""
        with self._counting("no user or item id"):
            self._filter_nan_user_or_item()
        with self._counting("exact duplicate"):
            self._drop_duplicates()
        self._match_features()
        unasked = sum(self.dropped.get(cause, 0) for cause in ("no user or item id", "exact duplicate"))
        limit = setting(self.config, "max_dropped", 0.5)
        if unasked > limit * self.n_read:
            raise ValueError(
                f"max_dropped: of {self.n_read:,} interactions of {self.dataset_name} {unasked:,} are dropped "
                f"({self.dropped}), more than the share {limit:g}; mend the files, or set max_dropped higher"
            )
        with self._counting("rm_dup_inter"):
            self._remove_duplication()
        with self._counting("val_interval"):
            self._filter_by_field_value()
        with self._counting("filter_inter_by_user_or_item"):
            self._filter_inter_by_user_or_item()
        with self._counting("user_inter_num_interval and item_inter_num_interval"):
            self._filter_by_inter_num()
        self._reset_index()

    def _filter_by_field_value(self) -> None:
        """RecBole's ``val_interval``; the interactions of users and items that it drops go with them.

        Raises:
            ValueError: for columns that are not loaded, and values that are no intervals or lists.
        """
        wanted = self.config["val_interval"] or {}
        for field, values in wanted.items():
            if field not in self.field2type:
                raise ValueError(
                    f"val_interval: no column {field!r} is loaded, but {sorted(self.field2type)}"
                )
            if self.field2type[field] in (FeatureType.FLOAT, FeatureType.FLOAT_SEQ):
                check_interval(f"val_interval.{field}", values)
            elif not isinstance(values, (list, tuple)):
                raise ValueError(f"val_interval.{field}: {values!r} must be a list of the values to keep")
        both = ((self.uid_field, "user_feat"), (self.iid_field, "item_feat"))
        tables = [(field, name) for field, name in both if getattr(self, name) is not None]
        before = {field: set(getattr(self, name)[field]) for field, name in tables}
        super()._filter_by_field_value()
        for field, name in tables:
            gone = before[field] - set(getattr(self, name)[field])
            self.inter_feat = self.inter_feat[~self.inter_feat[field].isin(gone)]

    def _drop_duplicates(self) -> None:
        """Keep one of the interactions that agree in user, item, time, rating and label.

        Without times the data does not tell a repeated line from a repeated event: all are kept.
        """
        fields = [self.uid_field, self.iid_field, *self._raw_fields(self.config)]
        fields = [field for field in dict.fromkeys(fields) if field in self.inter_feat]
        if self.time_field in fields:
            self.inter_feat = self.inter_feat.drop_duplicates(subset=fields)

    def _match_features(self) -> None:
        """Count the interactions whose user or item has no line of its own in ``.user`` or ``.item``."""
        if self.config["filter_inter_by_user_or_item"]:
            return  # they are dropped, and counted there
        for path, field in self._files.others.items():
            known = self._files[path].cells(field)
            lost = ~self.inter_feat[field].isin(known)
            if len(known) and lost.any():
                self.unmatched[f"{field} not in .{table_suffix(path)}"] = int(lost.sum())
                logger.warning(
                    "%s of %s interactions have %s %s that is not in %s (first: %s); they are kept, without its "
                    "features and text. filter_inter_by_user_or_item: True drops them",
                    f"{lost.sum():,}",
                    f"{len(lost):,}",
                    "an" if field[0] in "aeio" else "a",
                    field,
                    path,
                    self.inter_feat[field][lost].iloc[0],
                )

    def _filter_by_inter_num(self) -> None:
        """RecBole's filter, unless it keeps all, as by default: it counts users and items in Python then, too."""
        keys = ("user_inter_num_interval", "item_inter_num_interval")
        if any(self.config[key] not in (None, "[0,inf)", "[0, inf)") for key in keys):
            super()._filter_by_inter_num()

    def _concat_remaped_tokens(self, remap_list):
        """All tokens that share their ids, and where each table's end; categories are kept (RecBole: objects)."""
        columns = [feat[field] for feat, field, _ in remap_list]
        if not all(isinstance(column.dtype, pd.CategoricalDtype) for column in columns):
            return super()._concat_remaped_tokens(remap_list)
        ends = np.cumsum(list(map(len, columns)))[:-1]
        return union_categoricals(columns) if len(columns) > 1 else columns[0].array, ends

    def _reset_index(self) -> None:
        if self._plain_splits:
            self._split_of = self._split_of.loc[self.inter_feat.index].reset_index(drop=True)
        for name in self.feat_name_list:
            feat = getattr(self, name)
            if feat.empty:
                raise ValueError(
                    f"{self.dataset_name}: no line of {name} is left; check user_inter_num_interval, "
                    "item_inter_num_interval and val_interval"
                )
            feat.reset_index(drop=True, inplace=True)

    def _fill_nan(self) -> None:
        """RecBole would fill a missing rating or time with the mean: a made-up label or order."""
        for field in dict.fromkeys(name for name in self._raw_fields(self.config) if name in self.inter_feat):
            empty = np.flatnonzero(self.inter_feat[field].isna())
            if len(empty):
                row = self.inter_feat.iloc[empty[0]]
                raise ValueError(
                    f"{self.dataset_name}.inter: {field!r} is empty in {len(empty)} lines (first: user "
                    f"{self.id2token(self.uid_field, int(row[self.uid_field]))}, item "
                    f"{self.id2token(self.iid_field, int(row[self.iid_field]))}); fill them in or remove them"
                )
        super()._fill_nan()


def loaded_columns(config, path: Path, types: Iterable[str]) -> list[str]:
    """The columns of a file that ``load_col`` and ``unload_col`` keep."""
    columns, source = list(types), table_suffix(path)
    load_col, unload_col = config["load_col"], config["unload_col"] or {}
    if load_col is not None and load_col.get(source) != "*":
        columns = [column for column in columns if column in (load_col.get(source) or ())]
    return [column for column in columns if column not in (unload_col.get(source) or ())]


def check_interval(key: str, value: object) -> None:
    """Refuse what RecBole would leave out with a warning.

    Raises:
        ValueError: if ``value`` is not made of intervals such as ``[4,inf)``.
    """
    for part in str(value).split(";"):
        match = INTERVAL.fullmatch(part)
        try:
            right = match is not None and float(match[1]) <= float(match[2])
        except ValueError:
            right = False
        if not right:
            raise ValueError(f"{key}: {value!r} is no interval; write '[4,inf)' or '[1,2];(3,5]'")


def setting(config, key: str, default):
    """A key that a plain RecBole Config does not have."""
    value = config[key]
    return default if value is None else value
