"""Samples with their histories: what the datasets of all tasks share.

:class:`HistoryDataset` is RecBole's SequentialDataset with these differences:

- files are checked, and what is dropped is counted: :class:`~recbole_llm.data.atomic_dataset.AtomicDataset`;
- samples are ordered by the exact (timestamp, user, item), or (timestamp, line of the file) with ``tie_order: file``;
  RecBole rounds timestamps to float32 before it sorts;
- a sample needs ``min_history`` earlier interactions, which themselves are no samples but stay in the histories;
- histories are gathered per batch in :meth:`HistoryDataset.join` from one sorted array, never stored per sample;
- ``benchmark_filename`` takes plain interactions, split by file, and makes the histories.

:class:`recbole_llm.data.ctr.CTRDataset` adds labels, :class:`recbole_llm.data.next_item.NextItemDataset` has none.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd
import torch
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType, ModelType
from torch import Tensor

from recbole_llm.config.model_spec import spec_of
from recbole_llm.data.atomic_dataset import SPLITS, AtomicDataset, setting
from recbole_llm.data.atomic_files import AtomicFile, joined
from recbole_llm.data.history import HistoryIndex
from recbole_llm.data.item_text import ItemText, UserText
from recbole_llm.data.retriever import RecentRetriever, Retriever
from recbole_llm.data.text_settings import TextSettings
from recbole_llm.utils.fields import ROW_ID

try:
    import resource
except ImportError:  # Windows has no getrusage
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_Made = TypeVar("_Made")

HISTORY_END = "history_end"
RECENT_TEXT = "recent_text"
"""A field that only mixed training samples have: 1 where the prompt shows the recent history whatever the retriever."""
VALID_SHARE = 0.1
"""Share of the training interactions, the latest, that validate where ``benchmark_filename`` brings no such file."""


def peak_bytes() -> int:
    """The process's largest resident memory so far, in bytes (0 where the system does not tell)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if resource else 0


class HistoryDataset(AtomicDataset):
    """Samples (user, item, timestamp, ...), each with the slice of earlier interactions it may use.

    After :meth:`build`, ``inter_feat`` has beside the loaded fields ``item_length``, ``row_id`` (rank of the
    sample among all interactions in exact time order; stable under ``min_history`` and draws) and
    ``history_end`` (its own position in :attr:`history`).

    Args:
        config: RecBole's Config with the keys ``min_history``, ``tie_order``, ``history_ties``, ``history_scope``,
            ``candidate_items`` and ``rank_history`` (defaults where a plain Config has none: :attr:`MIN_HISTORY`,
            ``id``, ``order``, ``all``, ``seen`` and ``True``).

    Attributes:
        history: the sorted interactions, shared by all splits; ``None`` before :meth:`build`.
        preparation: ``seconds`` from the first line read to the split, and ``peak_bytes``, by how much the
            process's peak memory grew meanwhile.

    Raises:
        FileNotFoundError, ValueError: as :class:`AtomicDataset`.
    """

    MIN_HISTORY = 1
    """Earlier interactions that a sample needs where the configuration does not say."""
    DISTINCT_TITLES = False
    """Whether items with equal titles are told apart where ``text.disambiguate`` does not say."""
    _exact_times: np.ndarray  # while it is built

    def __init__(self, config):
        self.history = cast(HistoryIndex, None)  # until `build`
        self.preparation: dict[str, float] = {}
        # Seen by every split and subset, see `copy` of RecBole's Dataset.
        self._shared: dict[str, Any] = {}
        self._ranked: tuple[HistoryIndex | None, np.ndarray] = (None, np.zeros(0, dtype=bool))
        self._began = (time.monotonic(), peak_bytes())
        super().__init__(config)

    def _benchmark_presets(self) -> None:
        """Nothing: RecBole would prepare the lists here that :meth:`join` makes."""

    def _change_feat_format(self) -> None:
        """Sort by the exact order, then let RecBole turn the tables into tensors (timestamps: float32).

        Rounding is monotone and every later sort of RecBole is stable, so the order survives. Interactions that are
        split by file are sorted by split first: a history never holds an interaction of a later split.
        """
        if self.history is not None:  # a second build() of the same dataset
            return
        timed = self.time_field in self.inter_feat
        if not timed or (len(self.inter_feat) > 1 and self.inter_feat[self.time_field].nunique() == 1):
            logger.warning(
                "%s.inter has %s: the order of the file is taken as the order in time",
                self.dataset_name,
                f"one {self.time_field} in all lines" if timed else f"no loaded column {self.time_field!r}",
            )
            self.inter_feat[self.time_field] = np.arange(len(self.inter_feat), dtype=np.float64)
            self.set_field_property(self.time_field, FeatureType.FLOAT, FeatureSource.INTERACTION, 1)
        keys = [self.inter_feat[self.time_field]]
        if setting(self.config, "tie_order", "id") == "id":
            fields = (self.iid_field, self.uid_field)
            keys = [*(self._token_ranks(field)[self.inter_feat[field]] for field in fields), *keys]
        order = np.lexsort([*keys, self._split_of] if self._plain_splits else keys)
        del keys
        # Column by column: two copies of the whole table would be the peak of a preparation.
        feat, self.inter_feat = self.inter_feat, pd.DataFrame(index=pd.RangeIndex(len(order)))
        for name in list(feat):
            self.inter_feat[name] = feat.pop(name).to_numpy()[order]
        if self._plain_splits:
            self._order_splits(order)
        del feat, order
        self._exact_times = self.inter_feat[self.time_field].to_numpy(np.float64)
        super()._change_feat_format()
        if self._plain_splits:  # where RecBole leaves the histories to the files
            self.data_augmentation()
        del self._exact_times

    def _order_splits(self, order: np.ndarray) -> None:
        """Bring the splits of the files into the order of the interactions; make a validation split where none is."""
        self._split_of = self._split_of.to_numpy()[order]
        if len(self.file_size_list) == 2:
            train = int((self._split_of == 0).sum())
            held = max(1, int(VALID_SHARE * train))
            self._split_of = np.where(self._split_of == 1, 2, 0)
            self._split_of[train - held : train] = 1
            logger.warning(
                "benchmark_filename: there is no file to validate on, so the latest %s of %s training interactions do",
                f"{held:,}",
                f"{train:,}",
            )
        times = self.inter_feat[self.time_field].to_numpy()
        by_user = np.argsort(self.inter_feat[self.uid_field].to_numpy(), kind="stable")
        users = self.inter_feat[self.uid_field].to_numpy()[by_user]
        back = (users[1:] == users[:-1]) & (np.diff(times[by_user]) < 0)
        if back.any():
            logger.warning(
                "benchmark_filename: %s users have interactions in a later split that are older than some in an "
                "earlier one; histories hold the earlier splits first, so that none shows what is to be predicted",
                f"{len(np.unique(users[1:][back])):,}",
            )

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
        """Whether samples come with their histories. RecBole's context-aware models would take them for features."""
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
        return setting(self.config, "min_history", self.MIN_HISTORY)

    def data_augmentation(self) -> None:
        """Index the histories and keep the samples that have enough of one (RecBole builds every list here)."""
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
            ties=setting(self.config, "history_ties", "order"),
        )
        if spec_of(self.config.model_class).negative_history:
            self.history.draw_negatives(self.item_num, self.config["seed"])
        earlier = position - self.history.user_start[users]
        del feat, users
        minimum = self._min_history
        rows = np.flatnonzero(earlier >= minimum)
        if not len(rows):
            raise ValueError(
                f"min_history: no sample of {self.dataset_name} has {minimum} earlier interactions (the longest "
                f"history has {earlier.max()}); set it lower"
            )
        self._keep_rows(rows, earlier[rows], position[rows])

    def _keep_rows(self, rows: np.ndarray, earlier: np.ndarray, position: np.ndarray) -> None:
        """Reduce ``inter_feat`` to the samples at ``rows``, which have ``earlier`` items before their ``position``.

        One column at a time, so that never two copies of the table are in memory.
        """
        index, columns_of = torch.from_numpy(rows), self.inter_feat.interaction
        self.inter_feat = Interaction({name: columns_of.pop(name)[index] for name in list(columns_of)})
        lengths = np.clip(earlier, 1, self.max_item_list_len)
        columns = {self.item_list_length_field: lengths, ROW_ID: rows, HISTORY_END: position}
        self.inter_feat.update(table({name: values.astype(np.int64) for name, values in columns.items()}))
        self.set_id_retriever(RecentRetriever(self.history, self.max_item_list_len))

    # ------------------------------------------------------------------ splits

    def build(self) -> list[HistoryDataset]:
        """Split by ``eval_args``: ``[train, valid, test]``."""
        splits = self._split()
        scope = setting(self.config, "history_scope", "all")
        if scope == "split":
            self.history.row_start = self._split_starts(splits)
        elif scope != "all":
            raise ValueError(f"history_scope: {scope!r} is neither 'all' nor 'split'")
        self.history.opens_split = self._split_openings(splits)
        seconds, peak = time.monotonic() - self._began[0], max(0, peak_bytes() - self._began[1])
        self.preparation = {"seconds": seconds, "peak_bytes": peak}
        for split in splits:
            split.preparation = self.preparation
        logger.info(
            "%s: %s samples as %s, prepared in %.1f s with %.2f GB at the peak",
            self.dataset_name,
            f"{len(self):,}",
            " / ".join(f"{len(split):,}" for split in splits),
            seconds,
            peak / 1e9,
        )
        return splits

    def _split(self) -> list[HistoryDataset]:
        """RecBole's own split, on samples in exact time order; or that of the files."""
        if not self._plain_splits:
            return super().build()
        self._change_feat_format()
        self._drop_unused_col()
        part = self._split_of[self.inter_feat[ROW_ID].numpy()]
        return [
            self.copy(take(self.inter_feat, np.flatnonzero(part == number))) for number in range(len(SPLITS))
        ]

    def _split_openings(self, splits: list[HistoryDataset]) -> np.ndarray:
        """Which interactions are their user's first sample of the validation, or of the test split, bool ``[n]``."""
        opens = np.zeros(len(self.history), dtype=bool)
        for split in splits[1:]:
            positions = np.sort(split.inter_feat[HISTORY_END].numpy())
            owners = np.searchsorted(self.history.user_start, positions, side="right")
            opens[positions[np.unique(owners, return_index=True)[1]]] = True
        return opens

    def _split_starts(self, splits: list[HistoryDataset]) -> np.ndarray:
        """For each position the first one of the same user in the same split (``history_scope: split``).

        The interactions before a user's first sample, which belong to no split, count to the split of that sample.
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
        """The samples at ``indices``, with everything else shared."""
        return self.copy(take(self.inter_feat, np.asarray(indices)))

    def mixed(self) -> HistoryDataset:
        """These samples twice: to be shown with their recent history, then with what the prompt's retriever finds."""
        twice = self.subset(np.tile(np.arange(len(self)), 2))
        recent = torch.arange(len(twice)) < len(self)
        twice.inter_feat.update(Interaction({RECENT_TEXT: recent.long()}))
        return twice

    # ------------------------------------------------------------------ batches

    @property
    def id_retriever(self) -> Retriever:
        """Chooses the ID history that :meth:`join` adds; one for all splits."""
        return self._shared["id_retriever"]

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
            df = take(self.inter_feat, np.asarray(index))
        else:
            df = self.inter_feat[index]
        return self.join(df) if join else df

    def join(self, df: Interaction) -> Interaction:
        """Add user and item features, and to samples of the dataset their history.

        Adds ``item_id_list`` int64 ``[B, L]`` and, of what the data has, ``timestamp_list``, ``rating_list`` and
        ``label_list`` float32 ``[B, L]``, in time order from the left with zeros at the end, and ``item_length``
        ``[B]``. For DIEN also ``neg_item_id_list`` int64 ``[B, L]``. An empty history is given length 1 (one padding
        item): RecBole's models read position ``item_length - 1``.
        """
        if self.user_feat is not None and self.uid_field in df:
            df.update(take(self.user_feat, df[self.uid_field].numpy()))
        if self.item_feat is not None and self.iid_field in df:
            df.update(take(self.item_feat, df[self.iid_field].numpy()))
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
        """Users x items of these samples; with a user's first sample come the interactions before it."""
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
        return self._create_sparse_matrix(table(columns), self.uid_field, self.iid_field, form, value_field)

    def _counted(self, positions: np.ndarray) -> np.ndarray:
        """Which positions of the history :meth:`inter_matrix` counts, a mask."""
        return np.ones(len(positions), dtype=bool)

    def row_facts(self, train: HistoryDataset) -> dict[str, np.ndarray]:
        """What results are grouped by, for each of these samples, int64 ``[n]``.

        Args:
            train: all training samples.

        Returns:
            ``history_length`` (all earlier interactions the sample may use), ``user_rows`` and ``item_rows`` (training
            samples of its user and of its item).
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

    @property
    def ranked_items(self) -> np.ndarray:
        """Which items may be candidates and are ranked (``candidate_items``), a mask ``[n_items]``; not the padding."""
        history, ranked = self._ranked
        # Asked for every batch. Interactions and items that come later are another history, or more items.
        if history is not self.history or len(ranked) != self.item_num:
            ranked = np.ones(self.item_num, dtype=bool)
            if setting(self.config, "candidate_items", "seen") == "seen":
                ranked[:] = False
                ranked[self.history.item_ids] = True
            ranked[0] = False
            ranked.setflags(write=False)
            self._ranked = self.history, ranked
        return ranked

    def not_ranked(self, rows: Interaction) -> tuple[Tensor, Tensor]:
        """What the targets of samples are not ranked against with ``eval_mode: full``.

        These are all items but :attr:`ranked_items`, and without ``rank_history`` those of each sample's history; never
        the target.

        Returns:
            Indices into scores ``[B, n_items]``: samples and items, ``[m]`` int64 each.
        """
        users, targets, ends = (
            rows[name].cpu().numpy() for name in (self.uid_field, self.iid_field, HISTORY_END)
        )
        samples = np.arange(len(users))
        nobodys = np.flatnonzero(~self.ranked_items)
        owner, items = np.repeat(samples, len(nobodys)), np.tile(nobodys, len(users))
        if not setting(self.config, "rank_history", True):
            start, end = self.history.bounds(users, ends)
            of_history = np.repeat(samples, end - start)
            first = np.cumsum(end - start) - (end - start)  # where each sample's begin among all of them
            met = self.history.item_ids[np.arange(len(of_history)) + (start - first)[of_history]]
            others = met != targets[of_history]
            owner, items = (
                np.concatenate([owner, of_history[others]]),
                np.concatenate([items, met[others]]),
            )
        return torch.from_numpy(owner), torch.from_numpy(items.astype(np.int64))

    def note_negatives(self, found: Mapping[str, Any]) -> None:
        """Keep for :meth:`facts` that samples have fewer negatives than asked for: asked, used and reason."""
        self._shared["negatives"] = dict(found)

    def facts(self) -> dict[str, dict]:
        """What a result says of the data: interactions by fate, the items that were ranked, and missing negatives."""
        drawn_by_recbole = str(setting(self.config, "eval_mode", "candidates"))[:3] in ("uni", "pop")
        return {
            "data": {"interactions": self.n_read, "dropped": self.dropped, "unmatched": self.unmatched},
            "candidate_items": {
                "which": "all" if drawn_by_recbole else setting(self.config, "candidate_items", "seen"),
                "items": self.item_num - 1 if drawn_by_recbole else int(self.ranked_items.sum()),
                "catalogue": self.item_num - 1,
                **({} if setting(self.config, "rank_history", True) else {"rank_history": False}),
                **({"negatives": self._shared["negatives"]} if "negatives" in self._shared else {}),
            },
        }

    # ------------------------------------------------------------------ text and identity

    @property
    def text_settings(self) -> TextSettings:
        """The ``text`` section of the dataset's yaml, checked."""
        return TextSettings.from_config(self.config)

    def text_file(self, suffix: str) -> AtomicFile | None:
        """The cells of ``.item`` or ``.user``, with the ids of this dataset; ``None`` if there is no such file.

        Items that were appended to a finished run bring files of their own (``_shared["item_files"]``).
        """
        file = self._files.other(suffix)
        files = [] if file is None else [file]
        return joined(files + (self._shared.get("item_files", []) if suffix == "item" else []))

    def item_texts(self) -> list[str]:
        """Title and genres of every item that occurs, e.g. to make a tokenizer of."""
        descriptions = self.item_text().descriptions()
        return [descriptions[item] for item in np.unique(self.history.item_ids)]

    def item_text(self, *, obfuscate: bool = False) -> ItemText:
        """Titles, years and genres, read once."""
        return self._once(f"item_text {obfuscate}", lambda: ItemText(self, obfuscate=obfuscate))

    def user_text(self) -> UserText:
        """Profiles of the users, read once."""
        return self._once("user_text", lambda: UserText(self))

    def _once(self, key: str, make: Callable[[], _Made]) -> _Made:
        """What ``make()`` gives, made once for all splits and subsets."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def content_hash(self) -> str:
        """Sha256 of these samples, of all histories, of the ids' meaning and of the features.

        Text is no part of it: see :meth:`recbole_llm.data.prompts.lines.LinePrompts.identities`.
        """
        if "hash" not in self._shared:
            digest, index = hashlib.sha256(), self.history
            for name in ("item_ids", "labels", "timestamps", "ratings", "user_start", "row_start"):
                array = getattr(index, name)
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


def table(columns: Mapping[str, np.ndarray]) -> Interaction:
    """Arrays as RecBole's Interaction."""
    return Interaction({name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in columns.items()})


def take(feat: Interaction, rows: np.ndarray) -> Interaction:
    """``feat[rows]`` without the Python list that RecBole's Interaction makes of an index array."""
    index = torch.from_numpy(rows)
    return Interaction({field: values[index] for field, values in feat.interaction.items()})
