"""Samples with 0/1 labels: the dataset of the CTR task.

The rating stays beside the label (RecBole's ``threshold`` deletes it): prompts and lenses show past stars.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

import numpy as np
from recbole.utils import FeatureSource, FeatureType

from recbole_llm.data.dataset import HistoryDataset

logger = logging.getLogger(__name__)

HIGHEST_STAR = 5
"""The highest rating that the default of ``threshold`` was made for."""


class CTRDataset(HistoryDataset):
    """Samples with 0/1 labels: a column of the file, or ``threshold`` on another column, which stays beside them.

    Of a file with a column of labels and without the threshold's, the labels are used. With both, the threshold is used
    if it was given, and refused as a mere default.

    ``inter_feat`` has ``label`` beside the fields of :class:`HistoryDataset`, and batches have ``label_list``.

    Raises:
        ValueError: as :class:`HistoryDataset`; or if labels cannot be made, or only one class is left.
    """

    MIN_HISTORY = 5

    liked_only = False
    """Whether these are the samples of :meth:`liked`."""

    def _raw_fields(self, config) -> list[str]:
        return [*super()._raw_fields(config), config["LABEL_FIELD"], *(config["threshold"] or ())]

    def _check_columns(self, types: dict[Path, dict[str, str]]) -> None:
        self._choose_labels()
        super()._check_columns(types)

    def _choose_labels(self) -> None:
        """Set ``threshold``, which makes the labels; ``None``: a column holds them."""
        self.threshold: dict[str, float] | None = self.config["threshold"] or None
        if self.threshold is None:
            return
        if len(self.threshold) != 1:
            raise ValueError(f"threshold: {self.threshold} must hold exactly one column")
        (column,) = self.threshold
        path = self._files.interactions[0]
        loaded = self._loaded(path)
        if self.label_field not in loaded or column == self.label_field:
            return
        if column not in loaded:
            logger.warning(
                "%s has no column %r for threshold: %s, which is ignored; the column %r holds the labels",
                path,
                column,
                self.threshold,
                self.label_field,
            )
            self.threshold = None
        elif self._threshold_given:
            logger.warning(
                "%s has a column %r, which is not used: labels are made by threshold: %s",
                path,
                self.label_field,
                self.threshold,
            )
        else:
            raise ValueError(
                f"{path} has the columns {self.label_field!r} and {column!r}, either of which could be the labels. Set "
                f"threshold: ~ to take {self.label_field!r}, or threshold: {self.threshold} to make them of {column!r}"
            )

    @property
    def _threshold_given(self) -> bool:
        """Whether ``threshold`` was set by the user or the dataset's yaml, and is no mere default."""
        return "threshold" in getattr(self.config, "origins", ("threshold",))

    def _needed_columns(self) -> dict[str, str]:
        if self.threshold:
            return super()._needed_columns() | {field: "threshold" for field in self.threshold}
        return super()._needed_columns() | {self.label_field: "LABEL_FIELD, threshold being ~"}

    def _set_label_by_threshold(self) -> None:
        """Label 1 where the threshold's column is at least its value; the column itself stays."""
        if self.threshold:
            ((field, value),) = self.threshold.items()
            values = self.inter_feat[field]
            self.inter_feat[self.label_field] = (values >= value).astype(np.float32)
            self.set_field_property(self.label_field, FeatureType.FLOAT, FeatureSource.INTERACTION, 1)
            what = f"threshold: {field} >= {value}, with {field} from {values.min():g} to {values.max():g},"
            if not self._threshold_given and values.max() > HIGHEST_STAR:
                logger.warning(
                    "%s gives %.0f%% of the interactions of %s the label 1; it is only the default, made for ratings "
                    "from 1 to %d: set threshold",
                    what,
                    100 * self.inter_feat[self.label_field].mean(),
                    self.dataset_name,
                    HIGHEST_STAR,
                )
        else:
            what = f"column {self.label_field!r} of {self.dataset_name}.inter"
        labels = self.inter_feat[self.label_field]
        if not labels.isin((0, 1)).all():
            raise ValueError(
                f"{what} holds other values than 0 and 1, from {labels.min():g} to {labels.max():g}; set threshold to "
                f"make labels, e.g. {{{self.label_field}: {labels.max():g}}}"
            )
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
        for field in (self.config["RATING_FIELD"], *(self.threshold or ())):
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
                    f"the {name} split of {self.dataset_name} has {balance['rows']:,} samples and all have the "
                    f"label {int(balance['positive'] > 0)}; change threshold or eval_args"
                )
        return splits

    def liked(self) -> CTRDataset:
        """The samples with label 1, for models that learn pairs of a liked and a sampled item."""
        rows = self.subset(np.flatnonzero(self.inter_feat[self.label_field].numpy() == 1))
        rows.liked_only = True
        return rows

    def _counted(self, positions: np.ndarray) -> np.ndarray:
        labels = cast(np.ndarray, self.history.labels)
        return labels[positions] == 1 if self.liked_only else np.ones(len(positions), dtype=bool)

    def label_balance(self) -> dict[str, float]:
        """``rows`` (the number of samples), ``positive`` (of those with label 1) and ``share`` (of the two)."""
        labels = self.inter_feat[self.label_field]
        rows, positive = len(labels), int(labels.sum())
        return {"rows": rows, "positive": positive, "share": positive / rows if rows else float("nan")}
