"""Inputs of a lens: side-information fields, and the ratings a user gave earlier."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.model.layers import ContextSeqEmbAbstractLayer
from recbole.utils import FeatureType
from torch import Tensor, nn

MAX_RATING_LEVELS = 50
"""More distinct ratings than this are cut into quantiles: a continuous rating is not a vocabulary."""


class FeatureTable(nn.Module):
    """The rows of ``dataset.user_feat`` or ``.item_feat``, as buffers that follow the module to its device.

    Indexed by field name, as the :class:`~recbole.data.interaction.Interaction` it stands in for. The buffers
    are not saved: they are data, and come back with the dataset.
    """

    def __init__(self, features: Interaction, fields: Sequence[str]) -> None:
        super().__init__()
        for field in fields:
            self.register_buffer(f"field_{field}", features[field], persistent=False)

    def __getitem__(self, field: str) -> Tensor:
        return getattr(self, f"field_{field}")


class FieldEmbedding(ContextSeqEmbAbstractLayer):
    """Embeddings of chosen fields of users and items: RecBole's layer, with a choice and movable.

    RecBole's ``ContextSeqEmbLayer`` takes every field of both tables and keeps the tables (and the whole
    dataset) outside the module, on the device of the configuration; only that part differs here.

    Args:
        fields: the field names by side, ``{"user": [...], "item": [...]}``; a side may be empty.
        embedding_size: ``d``, the width of one field.
        pooling_mode: how the words of a ``token_seq`` field become one vector: ``mean``, ``max`` or ``sum``.
    """

    def __init__(self, dataset, fields: dict[str, list[str]], embedding_size: int, pooling_mode: str) -> None:
        super().__init__()
        if pooling_mode not in ("mean", "max", "sum"):
            raise ValueError(f"lens_config pooling_mode must be mean, max or sum, not {pooling_mode!r}")
        self.embedding_size = embedding_size
        self.pooling_mode = pooling_mode
        self.field_names = fields
        self.types = [side for side in ("user", "item") if fields[side]]
        self.dataset = dataset
        self.get_fields_name_dim()
        self.device = "cpu"  # the tables are made here and moved with the module
        self.get_embedding()
        del self.dataset  # RecBole's layer keeps it, and with it every interaction
        self.user_feat = FeatureTable(dataset.get_user_feature(), fields["user"])
        self.item_feat = FeatureTable(dataset.get_item_feature(), fields["item"])

    def width(self, side: str) -> int:
        """Width of all fields of ``side`` (``user`` or ``item``) side by side."""
        return len(self.field_names[side]) * self.embedding_size

    def forward(self, side: str, ids: Tensor) -> Tensor:
        """All fields of some users or items, side by side.

        Args:
            side: ``user`` or ``item``.
            ids: internal ids, ``[N]``.

        Returns:
            ``[N, F d]``, the fields in RecBole's order: tokens, token sequences, floats.
        """
        if side not in self.types:
            return torch.empty(len(ids), 0, device=ids.device)
        self.device = ids.device  # where the inherited pooling makes its constants
        both, self.types = self.types, [side]
        # RecBole's layer has a position axis for items, [B, L]. One position is enough here.
        sparse, dense = self.embed_input_fields(ids, ids.unsqueeze(1))
        self.types = both
        parts = [part.reshape(len(ids), -1) for part in (sparse[side], dense[side]) if part is not None]
        return torch.cat(parts, dim=-1)


def choose_fields(dataset, side: str, wanted: str | Sequence[str]) -> list[str]:
    """The fields of users or items that a lens embeds.

    Args:
        side: ``user`` or ``item``.
        wanted: ``all``, ``none`` or a list of field names.

    Returns:
        Field names in the order of the table. ``all`` takes what RecBole's context-aware models take: token
        and token_seq columns, and float columns named in ``numerical_features``.

    Raises:
        ValueError: if a named field does not exist or cannot be embedded.
    """
    features = dataset.get_user_feature() if side == "user" else dataset.get_item_feature()
    numerical = dataset.config["numerical_features"] or []
    possible = [
        field
        for field in features.columns
        if dataset.field2type[field] in (FeatureType.TOKEN, FeatureType.TOKEN_SEQ) or field in numerical
    ]
    if wanted == "all":
        return possible
    if wanted == "none":
        return []
    if isinstance(wanted, str):
        wanted = [wanted]
    unknown = [field for field in wanted if field not in possible]
    if unknown:
        raise ValueError(
            f"lens_config {side}_fields: {', '.join(unknown)} cannot be embedded; the dataset offers "
            f"{', '.join(possible)} (load more with load_col)"
        )
    return [field for field in possible if field in wanted]


def past_ratings(config, dataset) -> tuple[RatingLevels | None, str | None]:
    """The levels of past ratings, and their field: of ``RATING_FIELD``, or of the column that makes the labels.

    Nothing without ``lens_ratings``, and where the data has no ratings.

    Raises:
        ValueError: if the batches have no such field.
    """
    ratings = dataset.history.ratings
    if not config["lens_ratings"] or ratings is None:
        return None, None
    for field in (config["RATING_FIELD"], *(config["threshold"] or ())):
        if field + config["LIST_SUFFIX"] in dataset.field2type:
            return RatingLevels(ratings), field + config["LIST_SUFFIX"]
    raise ValueError(
        f"lens_ratings: the histories of {dataset.dataset_name} have no ratings; set it to False"
    )


class RatingLevels(nn.Module):
    """Ratings as a small vocabulary: 0 for "no rating" (padding), then one id per level, lowest first.

    A rating belongs to the nearest level, so that a float that was rounded on its way keeps its id.

    Args:
        ratings: every rating of the history, any shape. More than :data:`MAX_RATING_LEVELS` distinct values
            become that many quantiles.
    """

    def __init__(self, ratings: np.ndarray) -> None:
        super().__init__()
        levels = np.unique(np.asarray(ratings, dtype=np.float64))
        levels = levels[np.isfinite(levels)]
        if len(levels) == 0:
            raise ValueError("lens_ratings: the histories hold no rating; set lens_ratings: False")
        if len(levels) > MAX_RATING_LEVELS:
            levels = np.unique(np.quantile(ratings, np.linspace(0.0, 1.0, MAX_RATING_LEVELS)))
        self.count = len(levels) + 1
        boundaries = torch.as_tensor((levels[1:] + levels[:-1]) / 2, dtype=torch.float32)
        self.register_buffer("boundaries", boundaries)

    def forward(self, ratings: Tensor, present: Tensor) -> Tensor:
        """Level ids of ``ratings`` where ``present`` (bool), 0 elsewhere; all three of one shape."""
        return (torch.bucketize(ratings.float(), self.boundaries) + 1) * present
