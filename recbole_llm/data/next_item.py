"""Samples whose answer is the next item: the dataset of the next-item task.

Only who, what and when are needed; ratings and other columns are carried along where the file has them::

    ml-100k.inter, user 1:      items   a  b  c  d  e        (in exact time order)
    samples, min_history: 1                b  c  d  e        history of sample d: a b c
    eval_args LS: valid_and_test           +  +  v  t        train, train, valid, test

Four ways to split: RecBole's ``eval_args`` (leave-one-out, ratios); ``user_split``, by user, as the papers on LLM
recommenders do it; ``benchmark_filename`` with files of plain interactions, see :class:`HistoryDataset`; and
``benchmark_filename`` with files that bring the histories along::

    toy.train.inter             user_id:token   item_id_list:token_seq   item_id:token
                                1               a b c                    d
                                1               x c                      y

    positions                   0  1  2  3    4  5  6
    history.item_ids            a  b  c  d    x  c  y        a sample's history is its own list and nothing else:
    history.row_start           0  0  0  0    4  4  4        sample d is at position 3 and looks at [0, 3)
"""

from __future__ import annotations

import logging
import zlib
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from recbole.utils import FeatureType

from recbole_llm.data.atomic_dataset import SPLITS, setting
from recbole_llm.data.dataset import HISTORY_END, HistoryDataset, table, take
from recbole_llm.data.history import HistoryIndex
from recbole_llm.utils.fields import ROW_ID

logger = logging.getLogger(__name__)


class NextItemDataset(HistoryDataset):
    """Samples (user, next item), each with the slice of earlier interactions it may use.

    Args:
        config: as for :class:`HistoryDataset`, and the keys ``min_rating`` (interactions with a lower rating
            are removed before anything else), ``user_split`` (e.g. ``[8, 1, 1]``: shares of the users; all samples
            of a training user, and only the last one of the others) and ``eval_seed`` (draws those users).
            ``threshold`` is not read: what comes next is the answer, whatever its rating.

    Raises:
        FileNotFoundError, ValueError: as :class:`HistoryDataset`; or if ready-made splits are combined with a key
            that would change them.
    """

    DISTINCT_TITLES = True
    _given: dict[str, Any]  # the lists of ready-made splits, by field

    # ------------------------------------------------------------------ checks

    def _check_settings(self, config) -> None:
        super()._check_settings(config)
        self._user_shares = self._checked_user_split(config)
        self._given_lists = False
        if config["benchmark_filename"] is not None and self._user_shares is not None:
            raise ValueError("user_split: benchmark_filename brings the splits; set one of the two to ~")

    def _open_splits(self, types: dict[Path, dict[str, str]]) -> None:
        super()._open_splits(types)
        self._given_lists = self._plain_splits and any(
            self._item_list in types[path] for path in self._files.interactions
        )
        if not self._given_lists:
            return
        self._plain_splits = False
        names = self.config["benchmark_filename"]
        if len(names) != len(SPLITS):
            raise ValueError(
                f"benchmark_filename: {names!r} must hold three names, of {', '.join(SPLITS)}, as the files bring lists"
            )
        clash = {
            "min_rating": self.config["min_rating"] is not None,
            "history_scope: split": self.config["history_scope"] == "split",
        }
        for key in (key for key, given in clash.items() if given):
            raise ValueError(
                f"{key}: benchmark_filename brings splits and histories that are taken as they are; set one of "
                "the two to its default"
            )

    @staticmethod
    def _checked_user_split(config) -> list[float] | None:
        shares = config["user_split"]
        if shares is None:
            return None
        numbers = isinstance(shares, (list, tuple)) and all(
            isinstance(share, (int, float)) and not isinstance(share, bool) and share >= 0 for share in shares
        )
        if not numbers or len(shares) != len(SPLITS) or not shares[0] > 0:
            raise ValueError(
                f"user_split: {shares!r} must hold three shares of the users, of {', '.join(SPLITS)}, none "
                "negative and the first above 0, e.g. [8, 1, 1]"
            )
        return list(shares)

    def _raw_fields(self, config) -> list[str]:
        suffix, raw = config["LIST_SUFFIX"], super()._raw_fields(config)
        return raw + [field + suffix for field in raw if field] if config["benchmark_filename"] else raw

    def _is_list(self, column: str) -> bool:
        return column.endswith(self.config["LIST_SUFFIX"])

    def _needed_columns(self) -> dict[str, str]:
        needed = super()._needed_columns()
        if self._given_lists:
            needed[self._item_list] = "ITEM_ID_FIELD and LIST_SUFFIX, for the histories"
        if self.config["min_rating"] is not None:
            needed[self.config["RATING_FIELD"]] = "RATING_FIELD, for min_rating"
        return needed

    @property
    def _item_list(self) -> str:
        return self.iid_field + self.config["LIST_SUFFIX"]

    # ------------------------------------------------------------------ loading

    def _data_filtering(self) -> None:
        minimum, field = self.config["min_rating"], self.config["RATING_FIELD"]
        if minimum is not None:
            # A rating that is missing is not low: it is reported later, as in every task.
            low = self.inter_feat[field] < minimum
            if low.all():
                raise ValueError(
                    f"min_rating: no interaction of {self.dataset_name} has {field} >= {minimum:g} (the highest "
                    f"is {self.inter_feat[field].max():g})"
                )
            with self._counting(f"min_rating: {field} < {minimum:g}"):
                self.inter_feat = self.inter_feat.drop(index=self.inter_feat.index[low])
        super()._data_filtering()

    def _set_label_by_threshold(self) -> None:
        """Nothing: there are no labels, and no column is taken away."""

    # ------------------------------------------------------------------ ready-made splits

    def _set_alias(self, alias_name: str, default_value: list[str]) -> None:
        """The items of the lists share their ids with the targets, whether or not ``alias_of_item_id`` says so."""
        if alias_name == "item_id" and self._given_lists:
            if self.field2type[self._item_list] is not FeatureType.TOKEN_SEQ:
                raise ValueError(
                    f"benchmark_filename: column {self._item_list!r} of {self.dataset_name} must be of type "
                    f"token_seq, not {self.field2type[self._item_list].value}"
                )
            default_value = [*default_value, self._item_list]
        super()._set_alias(alias_name, default_value)

    def _change_feat_format(self) -> None:
        if self.history is not None or not self._given_lists:
            super()._change_feat_format()
            return
        suffix = self.config["LIST_SUFFIX"]
        # The history of an interaction is known by what both it and its list have.
        self._given = {
            field: self.inter_feat.pop(field + suffix)
            for field in super()._history_fields()
            if field in self.inter_feat and field + suffix in self.inter_feat
        }
        if setting(self.config, "history_ties", "order") == "strict" and self.time_field not in self._given:
            raise ValueError(
                f"history_ties: strict compares times, but the files of benchmark_filename lack one of the columns "
                f"{self.time_field!r} and {self.time_field + suffix!r}"
            )
        times = self.inter_feat[self.time_field].to_numpy() if self.time_field in self._given else None
        # Past HistoryDataset's method, which sorts by time: these samples stay in the order of their files.
        super(HistoryDataset, self)._change_feat_format()
        self._index_given(times)
        self._given = dict.fromkeys(self._given)

    def _history_fields(self) -> dict[str, str]:
        fields = super()._history_fields()
        if not self._given_lists:
            return fields
        return {field: name for field, name in fields.items() if field in self._given}

    def _index_given(self, times: np.ndarray | None) -> None:
        """Index the samples of given files, each with its own list: the picture at the top of this file.

        Args:
            times: exact times of the samples ``[n]``, if their lists have times too.
        """
        self._aug_presets()
        users, targets = (self.inter_feat[field].numpy() for field in (self.uid_field, self.iid_field))
        lists, rating = self._given[self.iid_field], self._rating_field
        earlier = lists.map(len).to_numpy(np.int64)
        self._check_given(users, targets, earlier)
        split_of = np.repeat(np.arange(len(SPLITS)), self.file_size_list)
        rows = np.flatnonzero(earlier >= self._min_history)
        self._log_counts(
            f"have a history of fewer than {self._min_history} items (min_history) and are left out",
            split_of,
            earlier < self._min_history,
        )
        if not len(rows):
            raise ValueError(
                f"min_history: no sample of {self.dataset_name} has a list of {self._min_history} items (the longest "
                f"has {earlier.max()}); set it lower"
            )
        by_user = rows[np.argsort(users[rows], kind="stable")]
        sizes = earlier[by_user] + 1
        ends = np.cumsum(sizes) - 1
        own = np.zeros(sizes.sum(), dtype=bool)
        own[ends] = True

        def flat(past: pd.Series, present: np.ndarray, dtype: type) -> np.ndarray:
            """One array of all lists, each followed by the sample's own value."""
            values: np.ndarray = np.empty(len(own), dtype=dtype)
            values[~own] = np.concatenate([past.iloc[row] for row in by_user])
            values[own] = present[by_user]
            return values

        user_start = np.zeros(self.user_num + 1, dtype=np.int64)
        np.cumsum(np.bincount(np.repeat(users[by_user], sizes), minlength=self.user_num), out=user_start[1:])
        self.history = HistoryIndex(
            item_ids=flat(lists, targets, np.int64),
            labels=None,
            timestamps=(
                np.arange(len(own), dtype=np.float64)
                if times is None
                else flat(self._given[self.time_field], times, np.float64)
            ),
            ratings=(
                flat(self._given[rating], self.inter_feat[rating].numpy(), np.float32)
                if rating in self._given
                else None
            ),
            user_start=user_start,
            ties=setting(self.config, "history_ties", "order"),
            row_start=np.repeat(ends - sizes + 1, sizes),
        )
        position = np.empty(len(users), dtype=np.int64)
        position[by_user] = ends
        in_list, last = np.zeros((2, len(users)), dtype=bool)
        seen = self.history.item_ids == np.repeat(targets[by_user], sizes)
        in_list[by_user] = np.add.reduceat(seen & ~own, ends - sizes + 1) > 0
        last[by_user] = (sizes > 1) & seen[ends - 1]
        self._log_counts("have their target in their own history", split_of, in_list)
        self._log_counts("have their target as the last item of their own history", split_of, last)
        self._keep_rows(rows, earlier[rows], position[rows])
        self.file_size_list = np.bincount(split_of[rows], minlength=len(SPLITS)).tolist()

    def _check_given(self, users: np.ndarray, targets: np.ndarray, earlier: np.ndarray) -> None:
        for field, ids in ((self.uid_field, users), (self.iid_field, targets)):
            empty = np.flatnonzero(ids == 0)
            if len(empty):
                name = np.repeat(self._inter_files(), self.file_size_list)[empty[0]]
                raise ValueError(f"{name}: {field!r} is empty in {len(empty)} lines; remove them")
        for field, lists in self._given.items():
            lengths = lists.map(len).to_numpy()
            unequal = np.flatnonzero(lengths != earlier)
            if len(unequal):
                row = unequal[0]
                raise ValueError(
                    f"{field + self.config['LIST_SUFFIX']!r} and {self._item_list!r} of {self.dataset_name} have "
                    f"unequal lengths in {len(unequal)} lines (first: {lengths[row]} and {earlier[row]}, user "
                    f"{self.id2token(self.uid_field, int(users[row]))})"
                )

    def _log_counts(self, what: str, split_of: np.ndarray, rows: np.ndarray) -> None:
        """Warn how many samples of each split ``rows`` (a mask) has, if any."""
        if rows.any():
            counts = np.bincount(split_of[rows], minlength=len(SPLITS))
            parts = ", ".join(
                f"{count:,} of {size:,} in {name}"
                for name, count, size in zip(SPLITS, counts, self.file_size_list, strict=True)
            )
            logger.warning("%s: %s samples %s (%s)", self.dataset_name, f"{rows.sum():,}", what, parts)

    # ------------------------------------------------------------------ splits

    def _split(self) -> list[NextItemDataset]:
        if self._user_shares is None:
            return super()._split()  # given lists: RecBole cuts the samples by the sizes of the files
        self._change_feat_format()
        self._drop_unused_col()
        users, row_ids = (self.inter_feat[field].numpy() for field in (self.uid_field, ROW_ID))
        # The draw depends on the users' names, not on the order in which the file brings them.
        ranks = self._token_ranks(self.uid_field)
        there = np.unique(users)
        there = there[np.argsort(ranks[there])]
        seed = [setting(self.config, "eval_seed", 2020), zlib.crc32(b"user_split")]
        drawn = np.random.default_rng(seed).permutation(there)
        total = sum(self._user_shares)
        cuts = self._calcu_split_ids(tot=len(drawn), ratios=[share / total for share in self._user_shares])
        part = np.zeros(self.user_num, dtype=np.int64)
        for number, group in enumerate(np.split(drawn, cuts)):
            part[group] = number
        newest = np.zeros(self.user_num, dtype=np.int64)
        np.maximum.at(newest, users, row_ids)
        last = row_ids == newest[users]
        return [
            self.copy(take(self.inter_feat, np.flatnonzero((part[users] == number) & (last | (number == 0)))))
            for number in range(len(SPLITS))
        ]

    def inter_matrix(self, form: str = "coo", value_field: str | None = None):
        """Users x items of these samples and what comes before them; of ready-made splits each pair once.

        Samples of ready-made splits repeat each other's histories, so there is no value to a pair but 1.
        """
        if not self._given_lists:
            return super().inter_matrix(form, value_field)
        if value_field is not None:
            raise ValueError(f"value_field: {value_field!r} is not known for samples of benchmark_filename")
        ends = self.inter_feat[HISTORY_END].numpy()
        starts = cast(np.ndarray, self.history.row_start)[ends]  # given lists have one
        steps = np.zeros(len(self.history) + 1, dtype=np.int64)
        steps[starts] += 1
        steps[ends + 1] -= 1
        inside = np.flatnonzero(np.cumsum(steps[:-1]))
        owners = np.searchsorted(self.history.user_start, inside, side="right") - 1
        pairs = np.unique(np.stack([owners, self.history.item_ids[inside]]), axis=1)
        columns = dict(zip((self.uid_field, self.iid_field), pairs, strict=True))
        return self._create_sparse_matrix(table(columns), self.uid_field, self.iid_field, form)
