"""Rows with their histories: what the datasets of all tasks share, and the dataset of the CTR task.

:class:`HistoryDataset` is RecBole's SequentialDataset with three differences:

- rows are ordered by the exact (timestamp, user, item); RecBole rounds timestamps to float32 before it sorts;
- rows need ``min_history`` earlier interactions, which themselves are no rows but stay in the histories;
- histories are gathered per batch in :meth:`HistoryDataset.join` from one sorted array, never stored per row.

:class:`CTRDataset` adds labels, and keeps the rating beside the label (RecBole's ``threshold`` deletes it):
prompts and lenses show past stars. :class:`recbole_llm.data.next_item.NextItemDataset` has no labels.
"""

from __future__ import annotations

import hashlib
import logging
import time
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType, ModelType

from recbole_llm.config.model_spec import spec_of
from recbole_llm.data.history import HistoryIndex
from recbole_llm.data.item_text import ItemText, TextSettings, read_atomic, read_header
from recbole_llm.data.retriever import RecentRetriever, Retriever
from recbole_llm.utils.fields import ROW_ID

try:
    import resource
except ImportError:  # Windows has no getrusage
    resource = None

logger = logging.getLogger(__name__)

HISTORY_END = "history_end"
RECENT_TEXT = "recent_text"
"""A field that only mixed training rows have: 1 where the prompt shows the recent history, whatever the retriever."""


def peak_bytes() -> int:
    """The process's largest resident memory so far, in bytes (0 where the system does not tell)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if resource else 0


def draw_rows(n_rows: int, size: int | float | None, seed: int, purpose: str) -> np.ndarray:
    """Draw rows without replacement, once per (seed, purpose).

    Draws are nested: with one seed and purpose, the rows of ``size=512`` are among those of ``size=1024``.

    Args:
        n_rows: how many rows there are.
        size: a count (int), a share in (0, 1) (float), or ``None`` for all rows.
        seed: the run's seed.
        purpose: what the rows are for, e.g. ``'few_shot'``; other purposes get other rows.

    Returns:
        Ascending indices, int64.

    Raises:
        ValueError: if ``size`` is larger than the data, or not a count or share.
    """
    if size is None:
        return np.arange(n_rows)
    if isinstance(size, float) and 0 < size < 1:
        count = max(1, round(size * n_rows))
    elif isinstance(size, (int, np.integer)) and not isinstance(size, bool) and size >= 1:
        count = int(size)
    else:
        raise ValueError(
            f"{purpose}: {size!r} is neither a count of rows (an int >= 1) nor a share in (0, 1)"
        )
    if count > n_rows:
        raise ValueError(f"{purpose}: {count:,} rows are asked for, but there are only {n_rows:,}")
    generator = np.random.default_rng([seed, zlib.crc32(purpose.encode())])
    return np.sort(generator.permutation(n_rows)[:count])


class HistoryDataset(SequentialDataset):
    """Rows (user, item, timestamp, ...), each with the slice of earlier interactions it may use.

    After :meth:`build`, ``inter_feat`` has beside the loaded fields ``item_length``, ``row_id`` (rank of the
    row among all interactions in exact time order; stable under ``min_history`` and draws) and
    ``history_end`` (its own position in :attr:`history`).

    Args:
        config: RecBole's Config with our keys ``min_history``, ``history_ties`` and ``history_scope``
            (defaults :attr:`MIN_HISTORY`, ``order`` and ``all`` where a plain Config has none).

    Attributes:
        history: the sorted interactions, shared by all splits; ``None`` before :meth:`build`.
        preparation: ``seconds`` from the first line read to the split, and ``peak_bytes``, by how much the
            process's peak memory grew meanwhile.

    Raises:
        FileNotFoundError: if the folder or the ``.inter`` file is missing.
        ValueError: if a column is missing or empty, or a setting would spoil it.
    """

    MIN_HISTORY = 1
    """Earlier interactions that a row needs where the configuration does not say."""
    DISTINCT_TITLES = False
    """Whether items with equal titles are told apart where ``text.disambiguate`` does not say."""

    def __init__(self, config):
        self.history: HistoryIndex | None = None
        self.preparation: dict[str, float] = {}
        self._shared: dict[
            str, object
        ] = {}  # seen by every split and subset, see `copy` of RecBole's Dataset
        self._began = (time.monotonic(), peak_bytes())
        self._check_settings(config)
        super().__init__(config)

    # ------------------------------------------------------------------ checks

    def _check_settings(self, config) -> None:
        raw = set(self._raw_fields(config))
        if config["normalize_all"]:
            raise ValueError(
                "normalize_all: True would scale ratings and timestamps to [0, 1]; set it to False"
            )
        for key in ("normalize_field", "numerical_features", "discretization"):
            clash = sorted(raw.intersection(config[key] or ()))
            if clash:
                raise ValueError(f"{key}: {clash} must keep the raw values; take them out")

    def _raw_fields(self, config) -> list[str]:
        """Columns whose values must reach the rows as they are in the file."""
        return [config["RATING_FIELD"], config["TIME_FIELD"]]

    def _needed_columns(self) -> dict[str, str]:
        """Columns of ``.inter`` without which there are no rows, and the configuration key that asks for them."""
        return {self.uid_field: "USER_ID_FIELD", self.iid_field: "ITEM_ID_FIELD"}

    def _inter_files(self) -> list[str]:
        """Names of the files of interactions: one, or RecBole's ``benchmark_filename``, one per split."""
        names = self.config["benchmark_filename"]
        return [f"{self.dataset_name}.{name + '.' if name else ''}inter" for name in names or [""]]

    def _load_data(self, token: str, dataset_path: str) -> None:
        folder = Path(dataset_path)
        if not folder.is_dir():
            if self._get_download_url("url", allow_none=True) is None:
                parent = folder.parent
                found = sorted(p.name for p in parent.iterdir() if p.is_dir()) if parent.is_dir() else None
                there = (
                    f"{parent} holds {found or 'no folders'}"
                    if found is not None
                    else f"{parent} does not exist"
                )
                raise FileNotFoundError(
                    f"the data folder {folder} does not exist ({there}), and RecBole knows no download "
                    f"for {token!r}. "
                    f"Set data_path to the folder that holds {token}/{token}.inter"
                )
            self._download()
        self._check_columns(folder, token)
        super()._load_data(token, dataset_path)

    def _load_feat(self, filepath: str, source) -> pd.DataFrame | None:
        """RecBole's table of a file, if its reader did not stumble over quotes.

        It takes a cell that begins with a double quote for a quoted one, up to the next quote before a separator:
        it fails where there is none, and else makes one row of all lines in between.
        """
        remedy = (
            "RecBole takes a cell that begins with a double quote for a quoted one: remove such quotes, or leave "
            "the file out of load_col (titles are read all the same)"
        )
        try:
            table = super()._load_feat(filepath, source)
        except pd.errors.ParserError as error:
            raise ValueError(f"{filepath} cannot be read ({error}). {remedy}") from error
        if table is not None and b'"' in Path(filepath).read_bytes():
            rows = len(read_atomic(Path(filepath), self.config["field_separator"], self.config["encoding"]))
            if len(table) != rows:
                raise ValueError(f"{filepath} has {rows:,} rows, of which {len(table):,} are read. {remedy}")
        return table

    def _check_columns(self, folder: Path, token: str) -> None:
        """Name every column that is asked for and not there, before RecBole reads a byte of data."""
        separator, encoding = self.config["field_separator"], self.config["encoding"]
        present = {}
        for name in (*self._inter_files(), f"{token}.user", f"{token}.item"):
            path = folder / name
            if path.is_file():
                present[path] = read_header(path, separator, encoding)
            elif path.suffix == ".inter":
                raise FileNotFoundError(
                    f"{path} does not exist; {folder} holds {sorted(p.name for p in folder.iterdir())}"
                )
        load_col = self.config["load_col"]
        for path, columns in present.items():
            asked = (load_col or {}).get(path.suffix[1:]) or ()
            missing = [column for column in asked if asked != "*" and column not in columns]
            if missing:
                raise ValueError(f"load_col: {path} has no column {missing}; it has {columns}")
        unloaded = (self.config["unload_col"] or {}).get("inter") or ()
        for path in (path for path in present if path.suffix == ".inter"):
            loaded = present[path]
            if load_col is not None and load_col.get("inter") != "*":
                loaded = list(load_col.get("inter") or ())
            loaded = [column for column in loaded if column not in unloaded]
            for field, key in self._needed_columns().items():
                if field not in loaded:
                    raise ValueError(
                        f"{path}: column {field!r} ({key}) is not loaded, so there are no rows to "
                        f"learn from. The file has {present[path]}, load_col and unload_col keep {loaded}"
                    )

    # ------------------------------------------------------------------ loading

    def _fill_nan(self) -> None:
        """RecBole would fill a missing rating or time with the mean: a made-up label or order."""
        for field in dict.fromkeys(name for name in self._raw_fields(self.config) if name in self.inter_feat):
            empty = np.flatnonzero(self.inter_feat[field].isna())
            if len(empty):
                row = self.inter_feat.iloc[empty[0]]
                raise ValueError(
                    f"{self.dataset_name}.inter: {field!r} is empty in {len(empty)} rows (first: user "
                    f"{self.id2token(self.uid_field, int(row[self.uid_field]))}, item "
                    f"{self.id2token(self.iid_field, int(row[self.iid_field]))}); fill them in or remove them"
                )
        super()._fill_nan()

    def _change_feat_format(self) -> None:
        """Sort by the exact order, then let RecBole turn the tables into tensors (timestamps: float32).

        Rounding is monotone and every later sort of RecBole is stable, so the order survives.
        """
        if self.history is not None:  # a second build() of the same dataset
            return
        if self.time_field not in self.inter_feat:
            logger.warning(
                "%s.inter has no loaded column %r: the order of the file is taken as the order in time",
                self.dataset_name,
                self.time_field,
            )
            self.inter_feat[self.time_field] = np.arange(len(self.inter_feat), dtype=np.float64)
            self.set_field_property(self.time_field, FeatureType.FLOAT, FeatureSource.INTERACTION, 1)
        order = np.lexsort(
            (
                self._token_ranks(self.iid_field)[self.inter_feat[self.iid_field]],
                self._token_ranks(self.uid_field)[self.inter_feat[self.uid_field]],
                self.inter_feat[self.time_field],
            )
        )
        self.inter_feat = self.inter_feat.iloc[order].reset_index(drop=True)
        self._exact_times = self.inter_feat[self.time_field].to_numpy(np.float64)
        super()._change_feat_format()
        del self._exact_times

    def _token_ranks(self, field: str) -> np.ndarray:
        """Rank of each internal id by its token, ``[n_ids]``: as numbers if all of them are, else as text."""
        tokens = self.field2id_token[field][1:]
        numeric = all(str(token).isdecimal() for token in tokens)
        keys = [int(token) for token in tokens] if numeric else [str(token) for token in tokens]
        ranks = np.zeros(len(tokens) + 1, dtype=np.int64)
        ranks[1 + np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)] = np.arange(
            1, len(tokens) + 1
        )
        return ranks

    @property
    def _has_histories(self) -> bool:
        """Whether rows come with their histories. RecBole's context-aware models would take them for features."""
        return self.config["MODEL_TYPE"] in (None, ModelType.SEQUENTIAL)

    def _aug_presets(self) -> None:
        """Declare the list fields that :meth:`join` adds, as RecBole's models look them up."""
        if not self._has_histories:
            return
        suffix = self.config["LIST_SUFFIX"]
        for field in self._history_fields():
            kind = FeatureType.TOKEN_SEQ if field == self.iid_field else FeatureType.FLOAT_SEQ
            setattr(self, f"{field}_list_field", field + suffix)
            self.set_field_property(field + suffix, kind, FeatureSource.INTERACTION, self.max_item_list_len)
        self.set_field_property(self.item_list_length_field, FeatureType.TOKEN, FeatureSource.INTERACTION, 1)

    def _history_fields(self) -> dict[str, str]:
        """Fields that the history has, and the names of their arrays in :class:`HistoryIndex`."""
        fields = {self.iid_field: "item_ids", self.time_field: "timestamps"}
        if self._rating_field is not None:
            fields[self._rating_field] = "ratings"
        return fields

    def _labels(self) -> np.ndarray | None:
        """0/1 labels of all interactions ``[n]``; ``None`` where the task has none."""
        return None

    @property
    def _rating_field(self) -> str | None:
        """The column of stars, or ``None``."""
        field = self.config["RATING_FIELD"]
        return field if self.field2type.get(field) is FeatureType.FLOAT else None

    @property
    def _min_history(self) -> int:
        return _setting(self.config, "min_history", self.MIN_HISTORY)

    def data_augmentation(self) -> None:
        """Index the histories and keep the rows that have enough of one (RecBole builds every list here)."""
        self._aug_presets()
        feat, rating = self.inter_feat, self._rating_field
        users = feat[self.uid_field].numpy()
        self.history, position = HistoryIndex.from_time_order(
            users,
            feat[self.iid_field].numpy(),
            self._labels(),
            self._exact_times,
            None if rating is None else feat[rating].numpy(),
            n_users=self.user_num,
            ties=_setting(self.config, "history_ties", "order"),
        )
        if spec_of(self.config.model_class).negative_history:
            self.history.draw_negatives(self.item_num, self.config["seed"])
        earlier = position - self.history.user_start[users]
        minimum = self._min_history
        rows = np.flatnonzero(earlier >= minimum)
        if not len(rows):
            raise ValueError(
                f"min_history: no row of {self.dataset_name} has {minimum} earlier interactions (the longest "
                f"history has {earlier.max()}); set it lower"
            )
        self._keep_rows(rows, earlier[rows], position[rows])

    def _keep_rows(self, rows: np.ndarray, earlier: np.ndarray, position: np.ndarray) -> None:
        """Reduce ``inter_feat`` to the rows at ``rows``, which have ``earlier`` items before their ``position``."""
        self.inter_feat = _take(self.inter_feat, rows)
        lengths = np.clip(earlier, 1, self.max_item_list_len)
        self.inter_feat.update(
            Interaction(
                {
                    self.item_list_length_field: torch.from_numpy(lengths.astype(np.int64)),
                    ROW_ID: torch.from_numpy(rows.astype(np.int64)),
                    HISTORY_END: torch.from_numpy(position),
                }
            )
        )
        self.set_id_retriever(RecentRetriever(self.history, self.max_item_list_len))

    # ------------------------------------------------------------------ splits

    def build(self) -> list[HistoryDataset]:
        """Split by ``eval_args``: ``[train, valid, test]``."""
        splits = self._split()
        scope = _setting(self.config, "history_scope", "all")
        if scope == "split":
            self.history.row_start = self._split_starts(splits)
        elif scope != "all":
            raise ValueError(f"history_scope: {scope!r} is neither 'all' nor 'split'")
        seconds, peak = time.monotonic() - self._began[0], max(0, peak_bytes() - self._began[1])
        self.preparation = {"seconds": seconds, "peak_bytes": peak}
        for split in splits:
            split.preparation = self.preparation
        logger.info(
            "%s: %s rows as %s, prepared in %.1f s with %.2f GB at the peak",
            self.dataset_name,
            f"{len(self):,}",
            " / ".join(f"{len(split):,}" for split in splits),
            seconds,
            peak / 1e9,
        )
        return splits

    def _split(self) -> list[HistoryDataset]:
        """RecBole's own split, on rows in exact time order."""
        return super().build()

    def _split_starts(self, splits: list[HistoryDataset]) -> np.ndarray:
        """For each position the first one of the same user in the same split (``history_scope: split``).

        The interactions before a user's first row, which belong to no split, count to the split of that row.
        """
        split_of = np.full(len(self.history), -1, dtype=np.int64)
        for number, split in enumerate(splits):
            split_of[split.inter_feat[HISTORY_END].numpy()] = number
        users = np.repeat(np.arange(len(self.history.user_start) - 1), np.diff(self.history.user_start))
        starts = self.history.user_start[users].copy()
        for number in range(len(splits)):
            mine = np.flatnonzero(split_of == number)
            owners, index = np.unique(users[mine], return_index=True)
            first, beginning = mine[index], self.history.user_start[owners]
            follows_a_row = (first > beginning) & (split_of[np.maximum(first - 1, 0)] >= 0)
            by_user = np.zeros(len(self.history.user_start), dtype=np.int64)
            by_user[owners] = np.where(follows_a_row, first, beginning)
            starts[mine] = by_user[users[mine]]
        return starts

    def split_by_ratio(self, ratios, group_by=None):
        """RecBole's split; without groups the parts are slices, instant where its index lists are slow."""
        if group_by is not None:
            return super().split_by_ratio(ratios, group_by)
        ends = self._calcu_split_ids(tot=len(self), ratios=[ratio / sum(ratios) for ratio in ratios])
        self._drop_unused_col()
        return [
            self.copy(self.inter_feat[start:end])
            for start, end in zip([0, *ends], [*ends, len(self)], strict=True)
        ]

    def subset(self, indices: np.ndarray) -> HistoryDataset:
        """The rows at ``indices``, with everything else shared."""
        return self.copy(_take(self.inter_feat, np.asarray(indices)))

    def mixed(self) -> HistoryDataset:
        """These rows twice: to be shown with their recent history, then with what the prompt's retriever finds."""
        twice = self.subset(np.tile(np.arange(len(self)), 2))
        recent = torch.arange(len(twice)) < len(self)
        twice.inter_feat.update(Interaction({RECENT_TEXT: recent.long()}))
        return twice

    # ------------------------------------------------------------------ batches

    @property
    def id_retriever(self) -> Retriever:
        """Chooses the ID history that :meth:`join` adds; one for all splits."""
        return self._shared["id_retriever"]

    @id_retriever.setter
    def id_retriever(self, retriever: Retriever) -> None:
        self.set_id_retriever(retriever)

    def set_id_retriever(self, retriever: Retriever) -> None:
        """Use another retriever for the ID history, in this dataset and in all splits and subsets of it.

        Raises:
            ValueError: if it does not return histories of ``MAX_ITEM_LIST_LENGTH``.
        """
        if retriever.k != self.max_item_list_len:
            raise ValueError(
                f"the ID retriever returns {retriever.k} interactions, MAX_ITEM_LIST_LENGTH is "
                f"{self.max_item_list_len}"
            )
        self._shared["id_retriever"] = retriever

    def __getitem__(self, index, join: bool = True) -> Interaction:
        if isinstance(index, (list, np.ndarray, torch.Tensor)):
            df = _take(self.inter_feat, np.asarray(index))
        else:
            df = self.inter_feat[index]
        return self.join(df) if join else df

    def join(self, df: Interaction) -> Interaction:
        """Add user and item features, and to rows of the dataset their history.

        Adds ``item_id_list`` int64 ``[B, L]`` and, of what the data has, ``timestamp_list``, ``rating_list`` and
        ``label_list`` float32 ``[B, L]``, in time order from the left with zeros at the end, and ``item_length``
        ``[B]``. For DIEN also ``neg_item_id_list`` int64 ``[B, L]``. An empty history is given length 1 (one padding
        item): RecBole's models read position ``item_length - 1``.
        """
        if self.user_feat is not None and self.uid_field in df:
            df.update(_take(self.user_feat, df[self.uid_field].numpy()))
        if self.item_feat is not None and self.iid_field in df:
            df.update(_take(self.item_feat, df[self.iid_field].numpy()))
        if HISTORY_END not in df or not self._has_histories:
            return df
        found = self.id_retriever.positions(
            df[self.uid_field].numpy(), df[self.iid_field].numpy(), df[HISTORY_END].numpy()
        )
        real = found >= 0
        found = np.where(real, found, 0)
        suffix = self.config["LIST_SUFFIX"]
        lists = {}
        for field, name in self._history_fields().items():
            values = np.where(real, getattr(self.history, name)[found], 0)
            lists[field + suffix] = torch.from_numpy(
                values if field == self.iid_field else values.astype(np.float32)
            )
        if self.history.negatives is not None:
            negatives = np.where(real, self.history.negatives[found], 0)
            lists[self.config["NEG_PREFIX"] + self.iid_field + suffix] = torch.from_numpy(negatives)
        lists[self.item_list_length_field] = torch.from_numpy(np.maximum(real.sum(axis=1), 1))
        df.update(Interaction(lists))
        return df

    def inter_matrix(self, form: str = "coo", value_field: str | None = None):
        """Users x items of these rows; with a user's first row come the interactions before it."""
        if not self.uid_field or not self.iid_field:
            raise ValueError("the dataset has no user or item ids, so there is no matrix of interactions")
        fields = self._history_fields()
        if value_field is not None and value_field not in fields:
            raise ValueError(f"value_field: {value_field!r} is none of {sorted(fields)}")
        ends, users = self.inter_feat[HISTORY_END].numpy(), self.inter_feat[self.uid_field].numpy()
        first = self._min_history
        opening = self.history.user_start[users] + first == ends
        positions = np.concatenate([ends, *(ends[opening] - back for back in range(1, first + 1))])
        owners = np.concatenate([users, *[users[opening]] * first])
        counted = self._counted(positions)
        positions = positions[counted]
        columns = {self.uid_field: owners[counted]}
        for field, name in fields.items():
            columns[field] = getattr(self.history, name)[positions]
        table = Interaction(
            {field: torch.from_numpy(np.ascontiguousarray(v)) for field, v in columns.items()}
        )
        return self._create_sparse_matrix(table, self.uid_field, self.iid_field, form, value_field)

    def _counted(self, positions: np.ndarray) -> np.ndarray:
        """Which positions of the history :meth:`inter_matrix` counts, a mask."""
        return np.ones(len(positions), dtype=bool)

    def row_facts(self, train: HistoryDataset) -> dict[str, np.ndarray]:
        """What results are grouped by, for each of these rows, int64 ``[n]``.

        Args:
            train: the full training rows.

        Returns:
            ``history_length`` (all earlier interactions the row may use), ``user_rows`` and ``item_rows`` (training
            rows of its user and of its item).
        """
        feat, of_train = self.inter_feat, train.inter_feat
        users, items = feat[self.uid_field].numpy(), feat[self.iid_field].numpy()
        start, end = self.history.bounds(users, feat[HISTORY_END].numpy())

        def counts(field: str, size: int) -> np.ndarray:
            return np.bincount(of_train[field].numpy(), minlength=size)

        return {
            "history_length": end - start,
            "user_rows": counts(self.uid_field, self.user_num)[users],
            "item_rows": counts(self.iid_field, self.item_num)[items],
        }

    # ------------------------------------------------------------------ text and identity

    @property
    def text_settings(self) -> TextSettings:
        """The ``text`` section of the dataset's yaml, checked."""
        return TextSettings.from_config(self.config)

    def item_texts(self) -> list[str]:
        """Title and genres of every item that occurs, e.g. to make a tokenizer of."""
        descriptions = self.item_text().descriptions()
        return [descriptions[item] for item in np.unique(self.history.item_ids)]

    def item_text(self, *, obfuscate: bool = False) -> ItemText:
        """Titles, years and genres, read once."""
        key = f"item_text {obfuscate}"
        if key not in self._shared:
            self._shared[key] = ItemText(self, obfuscate=obfuscate)
        return self._shared[key]

    def content_hash(self) -> str:
        """Sha256 of these rows, of all histories, of the ids' meaning and of the features."""
        if "hash" not in self._shared:
            digest, index = hashlib.sha256(), self.history
            for array in (
                index.item_ids,
                index.labels,
                index.timestamps,
                index.ratings,
                index.user_start,
                index.row_start,
            ):
                digest.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
            digest.update(index.ties.encode())
            for field in sorted(self.field2id_token):
                digest.update("\n".join([field, *map(str, self.field2id_token[field])]).encode())
            for feat in (self.user_feat, self.item_feat):
                for field in sorted(feat.columns if feat is not None else ()):
                    digest.update(field.encode() + feat[field].numpy().tobytes())
            self._shared["hash"] = digest.digest()
        rows = np.ascontiguousarray(self.inter_feat[ROW_ID].numpy()).tobytes()
        return hashlib.sha256(self._shared["hash"] + rows).hexdigest()


class CTRDataset(HistoryDataset):
    """Rows with 0/1 labels: a column of the file, or ``threshold`` on another column, which stays beside them.

    ``inter_feat`` has ``label`` beside the fields of :class:`HistoryDataset`, and batches have ``label_list``.

    Raises:
        ValueError: as :class:`HistoryDataset`; or if labels cannot be made, or only one class is left.
    """

    MIN_HISTORY = 5

    liked_only = False
    """Whether these are the rows of :meth:`liked`."""

    def _check_settings(self, config) -> None:
        if config["benchmark_filename"] is not None:
            raise ValueError(
                "benchmark_filename: given splits are not supported in the ctr task, set it to ~"
            )
        super()._check_settings(config)

    def _raw_fields(self, config) -> list[str]:
        return [*super()._raw_fields(config), config["LABEL_FIELD"], *(config["threshold"] or ())]

    def _needed_columns(self) -> dict[str, str]:
        threshold = self.config["threshold"]
        if threshold:
            return super()._needed_columns() | {field: "threshold" for field in threshold}
        return super()._needed_columns() | {self.label_field: "LABEL_FIELD, threshold being ~"}

    def _set_label_by_threshold(self) -> None:
        """Label 1 where the threshold's column is at least its value; the column itself stays."""
        threshold = self.config["threshold"]
        if threshold:
            if len(threshold) != 1:
                raise ValueError(f"threshold: {threshold} must hold exactly one column")
            ((field, value),) = threshold.items()
            values = self.inter_feat[field]
            if not pd.api.types.is_numeric_dtype(values) or self.field2type[field] is not FeatureType.FLOAT:
                raise ValueError(
                    f"threshold: column {field!r} of {self.dataset_name}.inter is not of type float"
                )
            self.inter_feat[self.label_field] = (values >= value).astype(np.float32)
            self.set_field_property(self.label_field, FeatureType.FLOAT, FeatureSource.INTERACTION, 1)
            what = f"threshold: {field} >= {value}, with {field} from {values.min():g} to {values.max():g},"
        else:
            # A label column may be declared a token; by now its values would be internal ids.
            if self.field2type[self.label_field] is not FeatureType.FLOAT:
                raise ValueError(
                    f"column {self.label_field!r} of {self.dataset_name}.inter must be of type float (0 or 1)"
                )
            what = f"column {self.label_field!r} of {self.dataset_name}.inter"
        labels = self.inter_feat[self.label_field]
        if not labels.isin((0, 1)).all():
            raise ValueError(f"{what} holds other values than 0 and 1; set threshold to make labels")
        if labels.nunique() < 2:
            raise ValueError(f"{what} gives all {len(labels):,} interactions the label {labels.iloc[0]:g}")

    def _labels(self) -> np.ndarray:
        return self.inter_feat[self.label_field].numpy()

    def _history_fields(self) -> dict[str, str]:
        items, *others = super()._history_fields().items()
        return dict([items, (self.label_field, "labels"), *others])

    @property
    def _rating_field(self) -> str | None:
        """The column of stars: RATING_FIELD, else the threshold's, else none."""
        for field in (self.config["RATING_FIELD"], *(self.config["threshold"] or ())):
            if self.field2type.get(field) is FeatureType.FLOAT and field != self.label_field:
                return field
        return None

    def build(self) -> list[CTRDataset]:
        """Split by ``eval_args``: ``[train, valid, test]``.

        Raises:
            ValueError: if one of the splits has only one class.
        """
        splits = super().build()
        for name, split in zip(("train", "valid", "test"), splits, strict=False):
            balance = split.label_balance()
            if balance["rows"] and balance["positive"] in (0, balance["rows"]):
                raise ValueError(
                    f"the {name} split of {self.dataset_name} has {balance['rows']:,} rows and all have the "
                    f"label {int(balance['positive'] > 0)}; change threshold or eval_args"
                )
        return splits

    def liked(self) -> CTRDataset:
        """The rows with label 1, for models that learn pairs of a liked and a sampled item."""
        rows = self.subset(np.flatnonzero(self.inter_feat[self.label_field].numpy() == 1))
        rows.liked_only = True
        return rows

    def _counted(self, positions: np.ndarray) -> np.ndarray:
        return self.history.labels[positions] == 1 if self.liked_only else np.ones(len(positions), dtype=bool)

    def label_balance(self) -> dict[str, float]:
        """``rows``, ``positive`` (their number) and ``share`` (positive / rows)."""
        labels = self.inter_feat[self.label_field]
        rows, positive = len(labels), int(labels.sum())
        return {"rows": rows, "positive": positive, "share": positive / rows if rows else float("nan")}


def _take(feat: Interaction, rows: np.ndarray) -> Interaction:
    """``feat[rows]`` without the Python list that RecBole's Interaction makes of an index array."""
    index = torch.from_numpy(rows)
    return Interaction({field: values[index] for field, values in feat.interaction.items()})


def _setting(config, key: str, default):
    """A key of ours, which a plain RecBole Config does not have."""
    value = config[key]
    return default if value is None else value
