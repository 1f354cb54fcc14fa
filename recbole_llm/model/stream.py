"""Stream: a small transformer over users' interactions, every one of them a target; no language model in it.

The labelled form (:class:`Stream`) predicts the stars of each interaction and is a lens, too (``lens: Stream``). The
form of the next-item task (:class:`NextItemStream`) is a SASRec with a sampled or full softmax.
"""

from __future__ import annotations

import logging
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor, nn

from recbole_llm.backbone.loader import Backbone
from recbole_llm.config.keys import PROBABILITY, Choice, Flag, Key, ListOf, Number, Text, Whole
from recbole_llm.config.model_spec import ModelSpec
from recbole_llm.data.dataset import HISTORY_END
from recbole_llm.data.history import HistoryIndex
from recbole_llm.data.stream_batches import (
    HIGH,
    LOW,
    TARGETS,
    VectorStreamLoader,
    chunk_start,
    vector_cutter,
)
from recbole_llm.lens.embedding import FieldEmbedding, RatingLevels, choose_fields
from recbole_llm.model.stream_network import (
    ItemEmbedding,
    Similarity,
    SmallTransformer,
    StarsHead,
    StreamInput,
    like_logit,
    sampled_softmax,
)
from recbole_llm.model.title_embedding import standardised, standardised_like

logger = logging.getLogger(__name__)

GAPS = 34
"""Buckets of the time since the previous interaction: 0 none, then the powers of two of seconds, up to 272 years."""
MOST_AT_ONCE = 1 << 15
"""Interactions in one pass through the network, padding included."""


STREAM_KEYS: dict[str, Key] = {
    "stream_length": Key("most interactions in a chunk", Whole(2)),
    "stream_context": Key("interactions before the first target of a chunk", Whole(0)),
    "hidden_size": Key("width of the states", Whole(2)),
    "n_layers": Key("layers of the transformer", Whole(1)),
    "n_heads": Key("attention heads", Whole(1)),
    "inner_size": Key("hidden width of the feed-forward layers", Whole(1)),
    "hidden_dropout_prob": Key("dropout", PROBABILITY),
    "id_size": Key("width of the ID embedding, 0: none", Whole(0)),
    "item_fields": Key("embedded fields of items", ListOf(Text()), Text()),
    "user_fields": Key("embedded fields of users", ListOf(Text()), Text()),
    "pooling_mode": Key("how the words of a field become one vector", Choice("mean", "max", "sum")),
    "previous_item": Key("name the item of the previous stars", Flag()),
    "time_gaps": Key("embed the time since the previous interaction", Flag()),
    "train_negatives": Key("negatives of the softmax", Choice("all", "uniform", "in_batch", "both")),
    "num_train_negatives": Key("uniform negatives of a step", Whole(1)),
    "similarity": Key("of a state and an item", Choice("dot", "cosine")),
    "softmax_temperature": Key("where the temperature of cosines starts", Number(0.01, 1)),
}
"""Keys that every vector stream reads."""


class StreamRecommender(SequentialRecommender):
    """What both tasks share: streams of interactions to states.

        x = StreamInput(items, previous items and stars)        [B, S, w]
        h = user model([b + U f(user) ; x])                     [B, 1 + S, w]    row 0: before the chunk's first item

    ``b`` is a trained vector and ``f(user)`` are the user's fields, if any. The user model is
    :class:`SmallTransformer`.

    Args:
        config: the run's configuration, or the lens's own.
        item_vectors: text vectors of the items, ``[n_items, d]``, row 0 is the padding item; ``None``: not used.
        backbone: the language model, for a user model that is made of it.

    Raises:
        ValueError: for sizes that do not fit each other, ``history_ties: strict`` (interactions of one time would see
            each other), or another ``id_retrieval`` than ``recent`` (a stream is not retrieved).
    """

    input_type = InputType.POINTWISE

    def __init__(
        self, config, dataset, *, item_vectors: np.ndarray | None = None, backbone: Backbone | None = None
    ) -> None:
        super().__init__(config, dataset)
        name = type(self).__name__
        self.length, self.context = config["stream_length"], config["stream_context"]
        self.history: HistoryIndex = dataset.history
        vector_cutter(config, self.history)  # refuses what is no stream
        if self.history.ties == "strict":
            raise ValueError(
                f"history_ties: strict is not possible with {name}: interactions of one time would see each other in "
                "the stream; set history_ties: order"
            )
        if config["id_retrieval"] not in (None, "recent"):
            raise ValueError(
                f"id_retrieval: {config['id_retrieval']} is not possible with {name}, which reads the whole stream; "
                "set id_retrieval: recent"
            )
        self.reads_gaps = bool(config["time_gaps"])
        self.known_users, self.known_items = dataset.user_num, self.n_items
        ratings = self.history.ratings
        # The method alone: a module would be part of what is saved.
        self.level_of = None if ratings is None else RatingLevels(ratings).forward
        self.follow_history()

        user_model = self.build_user_model(config, backbone)
        width = user_model.width
        fields = {side: choose_fields(dataset, side, config[f"{side}_fields"]) for side in ("user", "item")}
        size = max(1, min(32, width))

        def embedding(side: str) -> FieldEmbedding | None:
            own = [field for field in fields[side] if field not in (dataset.uid_field, dataset.iid_field)]
            chosen = {"user": [], "item": [], side: own}
            return FieldEmbedding(dataset, chosen, size, config["pooling_mode"]) if own else None

        items = ItemEmbedding(
            self.n_items,
            width,
            id_size=config["id_size"],
            vectors=None if item_vectors is None else standardised(item_vectors),
            fields=embedding("item"),
        )
        self.inputs = StreamInput(
            items,
            levels=int(self.stream_levels.max()) + 1 if self.reads_stars(config) else 0,
            previous_item=config["previous_item"],
            gaps=GAPS if config["time_gaps"] else 0,
            dropout=config["hidden_dropout_prob"],
        )
        self.before = nn.Parameter(torch.randn(width) * width**-0.5)
        self.user_fields = embedding("user")
        self.of_user: nn.Module = None
        if self.user_fields is not None:
            self.of_user = nn.Linear(self.user_fields.width("user"), width, bias=False)
        self.user_model = user_model

    # ------------------------------------------------------------------ the history, and what comes later

    def _stream_tensors(self) -> dict[str, np.ndarray]:
        """What is read of the history, by the name of its buffer."""
        history = self.history
        # Nothing is known of an item that came later, unless titles suffice: the padding item stands for it.
        items = np.where(history.item_ids < self.known_items, history.item_ids, 0)
        gaps = time_buckets(history) if self.reads_gaps else np.zeros(len(history), np.uint8)
        return {
            "stream_begin": history.user_start,
            "stream_items": items,
            "stream_levels": self._levels(),
            "stream_gaps": gaps,
        }

    def follow_history(self) -> None:
        """Read the history, to which interactions may have been appended since."""
        for name, values in self._stream_tensors().items():
            device = getattr(self, name).device if hasattr(self, name) else None
            self.register_buffer(name, torch.from_numpy(values).to(device), persistent=False)

    @property
    def titles_suffice(self) -> bool:
        """Whether items that came later are known by their titles."""
        return self.inputs.items.titles_suffice

    def append_items(self, item_vectors: np.ndarray, others: np.ndarray) -> None:
        """Know more items: ``others [m, d]``, beside those of the training, ``item_vectors [n_items, d]``."""
        self.inputs.items.append(standardised_like(item_vectors, others))
        self.n_items += len(others)
        self.known_items += len(others)

    # ------------------------------------------------------------------ what the network is made of

    def build_user_model(self, config, backbone: Backbone | None) -> nn.Module:
        """From ``x`` to ``h``: ``[B, S, w] -> [B, S, w]``, causal; its ``width`` is ``w``."""
        return SmallTransformer(
            config["hidden_size"],
            config["n_layers"],
            config["n_heads"],
            config["inner_size"],
            config["hidden_dropout_prob"],
        )

    def reads_stars(self, config) -> bool:
        """Whether past stars (or labels, where there are no stars) are an input."""
        return self.history.ratings is None or bool(config["lens_ratings"])

    def _levels(self) -> np.ndarray:
        """The level of stars of every interaction, from 1, ``[n]``; of labels where the data has no stars."""
        history = self.history
        if history.ratings is not None:
            ratings = torch.from_numpy(history.ratings)
            assert self.level_of is not None  # there are ratings
            return self.level_of(ratings, torch.ones_like(ratings, dtype=torch.bool)).numpy()
        if history.labels is not None:
            return history.labels.astype(np.int64) + 1
        return np.zeros(len(history), dtype=np.int64)

    def item_vectors(self) -> Tensor:
        """``e`` of every item, ``[n_items, w]``; row 0 is the padding item."""
        return self.inputs.items.embed(torch.arange(self.n_items, device=self.before.device))

    # ------------------------------------------------------------------ states

    def states(
        self, users: Tensor, low: Tensor, high: Tensor, target: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """States of chunks of streams.

        Args:
            users: ``[B]`` whose they are.
            low, high: ``[B]`` the chunks are ``[low, high)``; ``high`` may be ``low``.
            target: ``[B]`` items to stand in the last place of the chunks, instead of what the history has there;
                0: the history's own.

        Returns:
            ``h`` ``[B, 1 + S, w]``: place ``j`` is the state after ``j`` interactions of the chunk; and the items
            ``[B, S]``, 0 behind a chunk's end.
        """
        size = int((high - low).max())
        positions = low[:, None] + torch.arange(size, device=low.device)
        inside = positions < high[:, None]
        known = positions.clamp(max=len(self.stream_items) - 1)
        items = self.stream_items[known] * inside
        if target is not None:
            last = inside & (positions == high[:, None] - 1) & (target[:, None] != 0)
            items = torch.where(last, target[:, None], items)
        follows = inside & (positions > self.stream_begin[users][:, None])
        before = (positions - 1).clamp(min=0, max=len(self.stream_items) - 1)
        x = self.inputs(
            items,
            self.stream_items[before] * follows,
            self.stream_levels[before] * follows,
            self.stream_gaps[known].long() * (follows & (positions < self.stream_begin[users + 1][:, None])),
        )
        first = self.before.expand(len(users), -1)
        if self.user_fields is not None:
            known = users * (users < self.known_users)
            first = first + self.of_user(self.user_fields("user", known))
        return self.user_model(torch.cat([first.unsqueeze(1).to(x.dtype), x], dim=1)), items

    def _target_states(self, batch: Interaction, before: bool) -> tuple[Tensor, Tensor, Tensor]:
        """States, items and positions of all targets of a training batch, ``[N, w]``, ``[N]``, ``[N]``.

        Chunks of similar length go through the network together: a batch is many users, whatever their lengths.

        Args:
            batch: from :class:`VectorStreamLoader`.
            before: whether the states are those before the targets, or have seen them.
        """
        low, high, targets = batch[LOW], batch[HIGH], batch[TARGETS]
        states, positions = [], []
        for piece in pieces((high - low).cpu().numpy(), MOST_AT_ONCE):
            piece = torch.from_numpy(piece).to(low.device)
            size = int((high[piece] - low[piece]).max())
            mine = targets[piece, :size]
            # A chunk ends with a target, which need not be read where it is only to be predicted.
            hidden, _ = self.states(batch[self.USER_ID][piece], low[piece], high[piece] - int(before))
            states.append(hidden[:, :size][mine] if before else hidden[:, 1:][mine])
            positions.append((low[piece, None] + torch.arange(size, device=low.device))[mine])
        where = torch.cat(positions)
        return torch.cat(states), self.stream_items[where], where

    def chunk_states(
        self,
        users: np.ndarray,
        low: np.ndarray,
        high: np.ndarray,
        target: np.ndarray,
        chunk: np.ndarray,
        place: np.ndarray,
    ) -> Tensor:
        """States at some places of chunks.

        Args:
            users, low, high, target: ``[C]`` the chunks, as in :meth:`states`.
            chunk, place: ``[N]`` which chunk, and after how many interactions of it; every chunk occurs.

        Returns:
            ``[N, w]``.
        """
        device = self.before.device
        members = np.argsort(chunk, kind="stable")
        bounds = np.searchsorted(chunk[members], np.arange(len(low) + 1))
        found, rows = [], []
        for piece in pieces(high - low, MOST_AT_ONCE):
            mine = [members[bounds[c] : bounds[c + 1]] for c in piece]
            rows.append(np.concatenate(mine))
            row = torch.from_numpy(np.repeat(np.arange(len(piece)), [len(m) for m in mine])).to(device)
            arguments = (torch.from_numpy(a[piece]).to(device) for a in (users, low, high, target))
            hidden, _ = self.states(*arguments)
            found.append(hidden[row, torch.from_numpy(place[rows[-1]]).to(device)])
        order = torch.from_numpy(np.argsort(np.concatenate(rows))).to(device)
        return torch.cat(found)[order]

    def _samples(self, interaction: Interaction) -> tuple[np.ndarray, np.ndarray]:
        """Users and positions of samples, int64 ``[B]`` each."""
        return interaction[self.USER_ID].cpu().numpy(), interaction[HISTORY_END].cpu().numpy()


class NextItemStream(StreamRecommender):
    """The next-item task: every interaction of a stream is predicted from the state before it.

        score(t, i) = h_t . e(i)   or   exp(s) cos(h_t, e(i))           (``similarity``)
        loss        = mean over training samples of the cross-entropy of i_{t+1} against negatives

    ``train_negatives``: ``all`` items (full softmax), ``uniform`` ones drawn for each step, the distinct targets of the
    step (``in_batch``), or ``both``. A negative that is the target itself is left out, by its item
    (:func:`sampled_softmax`). Stars are no input, unless ``lens_ratings`` is set.

    A sample is scored from the last ``stream_length - 1`` interactions before it; all items by one matrix product.
    """

    def __init__(self, config, dataset, **parts) -> None:
        super().__init__(config, dataset, **parts)
        if self.n_items < 3:
            raise ValueError(f"{dataset.dataset_name} has {self.n_items - 1} items: there are no negatives")
        self.negatives, self.num_negatives = config["train_negatives"], config["num_train_negatives"]
        self.similarity = Similarity(config["similarity"], config["softmax_temperature"])
        self._seen = [0, 0]  # targets of this epoch, and their live negatives

    def reads_stars(self, config) -> bool:
        """Whether past stars are an input: not by default."""
        return self.history.ratings is not None and bool(config["lens_ratings"])

    def negative_items(self, targets: Tensor) -> Tensor:
        """The negatives of a step with these target items, ``[M]``."""
        if self.negatives == "all":
            return torch.arange(1, self.n_items, device=targets.device)
        parts = []
        if self.negatives != "in_batch":
            # Drawn on the host, so that a resumed training draws the same.
            parts.append(torch.randint(1, self.n_items, (self.num_negatives,)).to(targets.device))
        if self.negatives != "uniform":
            parts.append(targets.unique())
        return torch.cat(parts).unique()

    def calculate_loss(self, batch: Interaction) -> Tensor:
        """Mean loss of all targets of a batch of chunks, scalar."""
        states, items, _ = self._target_states(batch, before=True)
        states = self.similarity.prepared(states)
        candidates = self.negative_items(items)
        needed, place = torch.cat([items, candidates]).unique(return_inverse=True)
        vectors = self.similarity.prepared(self.inputs.items.embed(needed))
        scale = self.similarity.scale()
        positive = scale * (states * vectors[place[: len(items)]]).sum(dim=-1)
        scores = scale * states @ vectors[place[len(items) :]].T
        loss, live = sampled_softmax(positive, scores, items, candidates)
        self._seen[0] += len(items)
        self._seen[1] += int(live.sum())
        return loss.mean()

    def train(self, mode: bool = True) -> NextItemStream:
        """Also logs, at the end of an epoch, the temperature and how many negatives were live."""
        if self.training and not mode and self._seen[0]:
            temperature = self.similarity.temperature
            logger.info(
                "%d targets, %.1f live negatives each%s",
                *(self._seen[0], self._seen[1] / self._seen[0]),
                "" if temperature is None else f", temperature {temperature:.4f}",
            )
            self._seen = [0, 0]
        return super().train(mode)

    def state(self, interaction: Interaction) -> Tensor:
        """The prepared state before each sample, ``[B, w]``; samples that repeat are computed once."""
        users, ends = self._samples(interaction)
        _, first, chunk = np.unique(np.stack([users, ends]), axis=1, return_index=True, return_inverse=True)
        users, ends = users[first], ends[first]
        low = np.maximum(self.history.user_start[users], ends - (self.length - 1))
        found = self.chunk_states(users, low, ends, np.zeros_like(ends), np.arange(len(first)), ends - low)
        return self.similarity.prepared(found)[torch.from_numpy(chunk.reshape(-1)).to(found.device)]

    def predict(self, interaction: Interaction) -> Tensor:
        """The score of every sample's item, ``[B]``."""
        vectors = self.similarity.prepared(self.inputs.items(interaction[self.ITEM_ID]))
        return (self.similarity.scale() * (self.state(interaction) * vectors).sum(dim=-1)).float()

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """The scores of all items for every sample, ``[B, n_items]``."""
        vectors = self.similarity.prepared(self.item_vectors())
        return (self.similarity.scale() * self.state(interaction) @ vectors.T).float()


class Stream(StreamRecommender):
    """The labelled task: ``K`` levels of stars of every interaction.

        o(t)      = W h_t + b + c(i_t)                                  [K]
        loss      = mean over training samples of -log softmax(o(t))_{stars(t)}
        P(like)   = sum of softmax(o(t)) over the levels whose label is 1

    ``h_t`` has seen item ``t`` and all earlier stars, so the gate's scope is ``user_item``. Where the labels do not
    follow from the stars (or there are none), the two labels are the levels.

    A sample is scored in the chunk of its stream that its position belongs to (:mod:`recbole_llm.data.stream_batches`),
    together with all samples of that chunk.
    """

    spec = ModelSpec(
        "conventional",
        tasks=("ctr", "next_item"),
        reads=("lens_ratings",),
        keys=STREAM_KEYS,
        probability=True,
        gate_scopes=("user_item",),
        training_loader=VectorStreamLoader,
        task_classes={"next_item": NextItemStream},
    )

    def __init__(self, config, dataset, **parts) -> None:
        super().__init__(config, dataset, **parts)
        self.LABEL_FIELD = config["LABEL_FIELD"]
        labels = cast(np.ndarray, self.history.labels)
        levels = self.stream_levels.numpy()
        count = int(levels.max())
        share = np.bincount(levels, labels, minlength=count + 1) / np.maximum(np.bincount(levels), 1)
        if self.history.ratings is None or not np.isin(share[1:], (0.0, 1.0)).all():
            classes, liked = labels.astype(np.int64), np.array([False, True])
        else:
            classes, liked = levels - 1, share[1:] == 1
        self.register_buffer("stream_classes", torch.from_numpy(classes), persistent=False)
        self.register_buffer("liked", torch.from_numpy(liked), persistent=False)
        self.head = StarsHead(self.before.shape[0], len(liked), self.n_items)
        self.widths = {"user_item": self.before.shape[0]}

    def calculate_loss(self, batch: Interaction) -> Tensor:
        """Mean cross-entropy of the stars of all targets of a batch of chunks, scalar."""
        states, items, positions = self._target_states(batch, before=False)
        return F.cross_entropy(self.head(states, items), self.stream_classes[positions])

    def represent(self, interaction: Interaction, gate_scope: str = "user_item") -> tuple[Tensor, Tensor]:
        """State ``[B, w]`` and logit ``[B]`` of samples; of any item in the sample's place."""
        users, ends = self._samples(interaction)
        items = interaction[self.ITEM_ID].cpu().numpy()
        low = chunk_start(self.history.user_start[users], ends, self.length, self.context)
        inside = np.minimum(ends, len(self.history) - 1)
        # Samples of the history share a chunk; another item, or one still to come, has a chunk of its own.
        own = (self.history.item_ids[inside] == items) & (ends < self.history.user_start[users + 1])
        key = np.stack([low, np.where(own, -1, np.arange(len(ends)))])
        _, first, chunk = np.unique(key, axis=1, return_index=True, return_inverse=True)
        chunk = chunk.reshape(-1)
        high = np.zeros(len(first), dtype=np.int64)
        np.maximum.at(high, chunk, ends + 1)
        states = self.chunk_states(
            users[first],
            low[first],
            high,
            np.where(own[first], 0, items[first]),
            chunk,
            ends - low + 1,
        )
        targets = interaction[self.ITEM_ID].to(states.device)
        logits = self.head(states, targets * (targets < self.head.of_item.num_embeddings))
        return states, like_logit(logits, self.liked)

    def predict(self, interaction: Interaction) -> Tensor:
        """``P(like)`` of samples, ``[B]``."""
        return torch.sigmoid(self.represent(interaction)[1])


def time_buckets(history: HistoryIndex) -> np.ndarray:
    """``1 + floor(log2(1 + seconds))`` since the user's previous interaction, 0 for the first; uint8 ``[n]``."""
    gaps = np.diff(history.timestamps, prepend=history.timestamps[:1])
    buckets = 1 + np.floor(np.log2(1 + np.maximum(gaps, 0)))
    starts = history.user_start[:-1]
    buckets[starts[starts < len(history)]] = 0
    return np.minimum(buckets, GAPS - 1).astype(np.uint8)


def pieces(sizes: np.ndarray, most: int) -> list[np.ndarray]:
    """Chunks of similar length together: the longest first, none padded to twice its length.

    Args:
        sizes: lengths of the chunks, ``[C]``.
        most: interactions in a piece, padding included; a piece has at least one chunk.

    Returns:
        Indices into ``sizes``, each in one of the pieces.
    """
    found: list[list[int]] = []
    for chunk in np.argsort(-sizes, kind="stable").tolist():
        longest = sizes[found[-1][0]] if found else 0
        if not found or (len(found[-1]) + 1) * longest > most or 2 * sizes[chunk] < longest:
            found.append([])
        found[-1].append(chunk)
    return [np.array(piece) for piece in found]
