"""DIN for rating CTR, as the lens of RecLoRA.

Reference:
    Guorui Zhou et al. "Deep Interest Network for Click-Through Rate Prediction" in KDD 2018.
    Jiachen Zhu et al. "Lifelong Personalized Low-Rank Adaptation of Large Language Models for
    Recommendation", arXiv 2408.03533: its conventional model is a DIN with past ratings and user fields.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.model.layers import MLPLayers, SequenceAttLayer
from recbole.model.sequential_recommender.din import DIN
from torch import Tensor, nn

from recbole_llm.config.model_spec import ModelSpec
from recbole_llm.lens.embedding import FieldEmbedding, choose_fields, past_ratings


class TargetAttention(SequenceAttLayer):
    """RecBole's DIN attention, with the first layer rearranged to cost less.

    RecBole builds ``[q, k, q - k, q * k]`` (width ``4 d``) at every position and multiplies it with
    ``W = [Wq Wk Wd Wp]``. The same number, from narrower arrays, is

        W [q, k, q - k, q * k] + b = (Wq + Wd) q + b + (Wk - Wd) k + Wp (q * k)

    whose first part is needed once per sample. The parameters are RecBole's own; a test compares the two.

    Args:
        width: ``d``, of queries and keys.
        hidden_sizes: widths ``A, ...`` of the attention's hidden layers.
    """

    def __init__(self, width: int, hidden_sizes: list[int]) -> None:
        super().__init__(
            mask_mat=None,  # the mask is made from the batch, on the batch's device
            att_hidden_size=[4 * width, *hidden_sizes],
            activation="Sigmoid",
            softmax_stag=False,
            return_seq_weight=False,
        )

    def forward(self, queries: Tensor, keys: Tensor, keys_length: Tensor) -> Tensor:
        """Weighted sum of the history, without softmax, so that its size tells how much there is to like.

        Args:
            queries: the targets, ``[B, d]``.
            keys: the histories, ``[B, L, d]``, padded at the end.
            keys_length: ``[B]``.

        Returns:
            ``[B, d]``.
        """
        width = queries.shape[-1]
        first, *rest = self.att_mlp_layers.mlp_layers[1:]  # [0] is a dropout of rate 0
        w_query, w_key, w_difference, w_product = first.weight.split(width, dim=1)
        of_query = F.linear(queries, w_query + w_difference, first.bias).unsqueeze(1)
        of_product = F.linear(queries.unsqueeze(1) * keys, w_product)
        hidden = F.linear(keys, w_key - w_difference) + of_product + of_query
        for layer in rest:
            hidden = layer(hidden)
        weights = self.dense(hidden).squeeze(-1) / width**0.5
        weights = weights * history_mask(keys_length, keys.shape[1])
        return torch.bmm(weights.unsqueeze(1), keys).squeeze(1)


def history_mask(lengths: Tensor, size: int) -> Tensor:
    """``[B, size]`` bool: which positions of left-aligned histories are filled."""
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)


class LensDIN(DIN):
    """RecBole's DIN with past ratings, the user's fields and a ReLU tower.

    With ``x(i)`` the embedded fields of item ``i`` side by side, ``e(r)`` the embedding of a rating and ``u``
    the embedded fields of the user:

        h_j   = ReLU(W_h [x(i_j) ; e(r_j)] + b_h)             an earlier item and its rating          [d]
        t     = W_t x(target) + b_t                                                                    [d]
        v     = sum_j attention(t, h_j) h_j                    RecBole's DIN attention                  [d]
        final = tower([v ; x(target) ; v * t ; u])             the last hidden layer
        logit = w final + b
        user  = [mean_j h_j ; u]                               does not see the target

    Without ``lens_ratings``, ``h_j = ReLU(W_h x(i_j) + b_h)``. What differs from RecBole's DIN: past ratings,
    ``u`` in the tower, ReLU without batch normalisation instead of Dice with it, an attention of its own
    size, and items projected to ``d`` so that the cost per position does not grow with the item fields.

    The constructor does not run ``DIN.__init__``: that sizes every layer for all item fields at every
    position, and lists its embedding layer (and through it the whole dataset) as something to pickle.

    Args:
        config: the lens's own configuration (see ``properties/lens/DIN.yaml``).
        titles: a further field of items, by id: a module with ``embedding_dim``.
        without: fields of items that are left out.
    """

    spec = ModelSpec("conventional", tasks=("ctr",), probability=True, gate_scopes=("user_item", "user"))

    def __init__(
        self, config, dataset, titles: nn.Module | None = None, without: tuple[str, ...] = ()
    ) -> None:
        SequentialRecommender.__init__(self, config, dataset)
        self.LABEL_FIELD = config["LABEL_FIELD"]
        d = config["embedding_size"]
        fields = {side: choose_fields(dataset, side, config[f"{side}_fields"]) for side in ("user", "item")}
        fields["item"] = [field for field in fields["item"] if field not in without]
        if not fields["item"] and titles is None:
            raise ValueError("lens_config item_fields: a DIN needs at least one item field")

        self.fields = FieldEmbedding(dataset, fields, d, config["pooling_mode"])
        self.titles = titles
        items, users = self.fields.width("item"), self.fields.width("user")
        items += 0 if titles is None else titles.embedding_dim
        self.ratings, self.RATING_SEQ = past_ratings(config, dataset)
        if self.ratings is not None:
            self.rating_embedding = nn.Embedding(self.ratings.count, d)
        self.history_projection = nn.Linear(items + (d if self.ratings is not None else 0), d)
        self.target_projection = nn.Linear(items, d)
        self.attention = TargetAttention(d, config["attention_hidden_size"])
        tower = [2 * d + items + users, *config["mlp_hidden_size"]]
        self.dnn_mlp_layers = MLPLayers(tower, activation="relu", dropout=config["dropout_prob"])
        self.dnn_predict_layers = nn.Linear(tower[-1], 1)
        self.sigmoid = nn.Sigmoid()
        self.loss = nn.BCEWithLogitsLoss()
        self.widths = {"user_item": tower[-1], "user": d + users}
        self.apply(self._init_weights)

    def embed_items(self, items: Tensor) -> Tensor:
        """``x(i)`` of items, ``[N]`` -> ``[N, F d]``, the titles last."""
        fields = self.fields("item", items)
        return fields if self.titles is None else torch.cat([fields, self.titles(items)], dim=-1)

    def embed_history(self, interaction: Interaction) -> Tensor:
        """``h_j`` of every position, ``[B, L, d]``; padded positions hold the padding item's.

        A batch of histories repeats few (item, rating) pairs many times, so ``h`` is computed once per
        distinct pair and gathered: long histories do not make the embedding of item fields slower.
        """
        pairs = interaction[self.ITEM_SEQ]
        levels = 1 if self.ratings is None else self.ratings.count
        if self.ratings is not None:
            pairs = pairs * levels + self.ratings(interaction[self.RATING_SEQ], pairs != 0)
        distinct, place = torch.unique(pairs, return_inverse=True)
        parts = [self.embed_items(distinct // levels)]
        if self.ratings is not None:
            parts.append(self.rating_embedding(distinct % levels))
        return F.embedding(place, torch.relu(self.history_projection(torch.cat(parts, dim=-1))))

    def states(self, interaction: Interaction) -> tuple[Tensor, Tensor]:
        """``final [B, H]`` and ``user [B, d + U d]`` (see the class)."""
        lengths = interaction[self.ITEM_SEQ_LEN]
        history = self.embed_history(interaction)
        user = self.fields("user", interaction[self.USER_ID])
        item = self.embed_items(interaction[self.ITEM_ID])
        target = self.target_projection(item)
        interest = self.attention(target, history, lengths)
        final = self.dnn_mlp_layers(torch.cat([interest, item, interest * target, user], dim=-1))

        mask = history_mask(lengths, history.shape[1]).to(history.dtype)
        mean = torch.bmm(mask.unsqueeze(1), history).squeeze(1) / lengths.clamp(min=1).unsqueeze(1)
        return final, torch.cat([mean, user], dim=-1)

    def forward(self, interaction: Interaction) -> Tensor:
        """The logit of every sample, ``[B]``."""
        return self.represent(interaction)[1]

    def represent(self, interaction: Interaction, gate_scope: str = "user_item") -> tuple[Tensor, Tensor]:
        """``final`` (``user_item``) or ``user`` (``user``), and the logit of every sample."""
        final, user = self.states(interaction)
        logit = self.dnn_predict_layers(final).squeeze(1)
        return (final if gate_scope == "user_item" else user), logit

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Mean binary cross-entropy of the labels, scalar."""
        return self.loss(self.forward(interaction), interaction[self.LABEL_FIELD].float())

    def predict(self, interaction: Interaction) -> Tensor:
        """The probability of a positive label, ``[B]``."""
        return self.sigmoid(self.forward(interaction))

    def item_vectors(self) -> Tensor:
        """The embedded fields of every item, ``[n_items, F d]``; row 0 is the padding item."""
        return self.embed_items(torch.arange(self.n_items, device=self.history_projection.weight.device))
