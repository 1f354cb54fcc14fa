"""Sequential recommenders of RecBole as lenses: trained on labels instead of on the next item.

Any model that turns a history into one vector of the width of its item embeddings will do:

    state = model(history)                                       [B, H]
    logit = state . item_embedding(target) + bias(target) + bias [B]

The state does not see the target, so the gate scope is ``user``.

Reference:
    Wang-Cheng Kang et al. "Self-Attentive Sequential Recommendation" in ICDM 2018.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.model.layers import MultiHeadAttention
from recbole.model.sequential_recommender.sasrec import SASRec
from recbole.utils import InputType
from torch import Tensor, nn

from recbole_llm.config.model_spec import ModelSpec
from recbole_llm.lens.embedding import past_ratings

WORKING = ("SASRec", "GRU4Rec", "NARM", "STAMP", "Caser", "LightSANs")
"""Models of RecBole that are tested in this role."""

# The names that RecBole's models give to their inputs in ``forward``, and where the value comes from.
_INPUTS = {
    "item_seq": "ITEM_SEQ",
    "seq_item": "ITEM_SEQ",
    "item_seq_len": "ITEM_SEQ_LEN",
    "seq_item_len": "ITEM_SEQ_LEN",
    "user": "USER_ID",
}


class HistoryEncoder(SequentialRecommender):
    """A sequential model read as an encoder of histories; to be inherited before the model's own class.

    Raises:
        ValueError: if the model does not make one vector of a history; the message names models that do.
    """

    spec = ModelSpec("conventional", tasks=("next_item",), learns_from="loss_type", gate_scopes=("user",))
    known_to_work: tuple[str, ...] = ()

    def __init__(self, config, dataset) -> None:
        super().__init__(config, dataset)
        self.input_fields = self._input_fields()
        embedding = getattr(self, "item_embedding", None)
        if not isinstance(embedding, nn.Embedding):
            raise self._unsuitable("it has no item_embedding")
        self.widths = {"user": embedding.embedding_dim}

    def _unsuitable(self, reason: str) -> ValueError:
        name = type(self).__name__.removeprefix("Lens")
        works = f"Known to work: {', '.join(self.known_to_work)}"
        return ValueError(f"lens {name} gives no representation: {reason}. {works}")

    def _input_fields(self) -> list[str]:
        """The fields to pass to the model's ``forward``, in order."""
        names = list(inspect.signature(super().forward).parameters)
        unknown = [name for name in names if name not in _INPUTS]
        if unknown or not any(_INPUTS[name] == "ITEM_SEQ" for name in names):
            raise self._unsuitable(f"its forward({', '.join(names)}) does not take a history alone")
        return [getattr(self, _INPUTS[name]) for name in names]

    def state(self, interaction: Interaction) -> Tensor:
        """The model's vector of the history, ``[B, H]``."""
        inputs = [interaction[field] for field in self.input_fields]
        state = self.call_forward(interaction, inputs)
        if not isinstance(state, Tensor) or state.shape != (len(inputs[0]), self.widths["user"]):
            shape = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
            raise self._unsuitable(f"its forward returns {shape}, not [batch, {self.widths['user']}]")
        return state

    def call_forward(self, _interaction: Interaction, inputs: list[Tensor]) -> Tensor:
        """The model's ``forward`` of its inputs."""
        return self.forward(*inputs)

    def item_vectors(self) -> Tensor:
        """The item embeddings, ``[n_items, H]``; row 0 is the padding item."""
        return self.item_embedding.weight


class LabelledSequence(HistoryEncoder):
    """Puts a labelled head on a sequential model; to be inherited before the model's own class.

    With ``lens_ratings`` the embedding of the rating is added to the embedding of every earlier item, where
    the model looks its history up (a hook on ``item_embedding``: the model's ``forward`` stays RecBole's).

    Raises:
        ValueError: if the model cannot give a state as above; the message names models that can.
    """

    spec = ModelSpec("conventional", tasks=("ctr",), probability=True, gate_scopes=("user",))
    input_type = InputType.POINTWISE
    known_to_work = ("DIN", *WORKING)

    def __init__(self, config, dataset) -> None:
        super().__init__(config, dataset)
        self.LABEL_FIELD = config["LABEL_FIELD"]
        width = self.widths["user"]
        self.item_bias = nn.Embedding(self.n_items, 1, padding_idx=0)
        self.bias = nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self.item_bias.weight)
        self.ratings, self.RATING_SEQ = past_ratings(config, dataset)
        if self.ratings is not None:
            self.rating_embedding = nn.Embedding(self.ratings.count, width, padding_idx=0)
            # From zero: the model starts as its authors' initialisation leaves it.
            nn.init.zeros_(self.rating_embedding.weight)
        self.bce = nn.BCEWithLogitsLoss()

    def call_forward(self, interaction: Interaction, inputs: list[Tensor]) -> Tensor:
        """The model's ``forward`` of its inputs, the ratings added to the items."""
        if self.ratings is None:
            return self.forward(*inputs)
        history = interaction[self.ITEM_SEQ]
        rated = self.rating_embedding(self.ratings(interaction[self.RATING_SEQ], history != 0))
        added = []

        def add_ratings(_module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if args[0] is not history:
                return None
            added.append(True)
            return output + rated

        handle = self.item_embedding.register_forward_hook(add_ratings)
        try:
            state = self.forward(*inputs)
        finally:
            handle.remove()
        if not added:
            raise self._unsuitable("it does not look its history up in one call; set lens_ratings: False")
        return state

    def represent(self, interaction: Interaction, gate_scope: str = "user") -> tuple[Tensor, Tensor]:
        """The state ``[B, H]`` and the logit ``[B]`` of every sample."""
        state = self.state(interaction)
        target = interaction[self.ITEM_ID]
        dot = (state * self.item_embedding(target)).sum(dim=-1)
        return state, dot + self.item_bias(target).squeeze(-1) + self.bias

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Mean binary cross-entropy of the labels, scalar."""
        return self.bce(self.represent(interaction)[1], interaction[self.LABEL_FIELD].float())

    def predict(self, interaction: Interaction) -> Tensor:
        """The probability of a positive label, ``[B]``."""
        return torch.sigmoid(self.represent(interaction)[1])


class LastPositionSASRec(SASRec):
    """RecBole's SASRec, which computes its last layer for the last position alone.

    RecBole computes every position and then takes one. Only the layers below the last need the others; with the one
    layer of a lens that leaves of 60 positions their keys and values. The parameters and the result are RecBole's; in
    training the dropout of what is not computed is not drawn, so that one seed gives other numbers than RecBole's.
    """

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """The encoded last position of histories ``[B, L]`` with lengths ``[B]``: ``[B, H]``."""
        position = torch.arange(item_seq.shape[1], device=item_seq.device)
        hidden = self.item_embedding(item_seq) + self.position_embedding(position)
        hidden = self.dropout(self.LayerNorm(hidden))
        *below, top = self.trm_encoder.layer
        if below:
            mask = self.get_attention_mask(item_seq)
            for layer in below:
                hidden = layer(hidden, mask)
        last = self.gather_indexes(hidden, item_seq_len - 1)
        # The last position is the one that sees the whole history, and nothing behind it.
        attended = attend(top.multi_head_attention, last, hidden, item_seq != 0)
        return top.feed_forward(attended)


def attend(attention: MultiHeadAttention, query: Tensor, hidden: Tensor, visible: Tensor) -> Tensor:
    """RecBole's multi-head self-attention, for one position of each sample.

    Args:
        attention: the module whose parameters are used.
        query: what the position holds, ``[B, H]``.
        hidden: what all positions hold, ``[B, L, H]``.
        visible: the positions that it sees, ``[B, L]`` bool.

    Returns:
        The module's output at the position, ``[B, H]``.
    """
    queries, keys, values = (
        attention.transpose_for_scores(project(inputs)).transpose(1, 2)
        for project, inputs in (
            (attention.query, query.unsqueeze(1)),
            (attention.key, hidden),
            (attention.value, hidden),
        )
    )
    dropout = attention.attn_dropout.p if attention.training else 0.0
    context = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=visible[:, None, None], dropout_p=dropout
    )
    context = context.transpose(1, 2).reshape(len(query), -1)
    return attention.LayerNorm(attention.out_dropout(attention.dense(context)) + query)


class LensSASRec(LabelledSequence, LastPositionSASRec):
    """RecBole's SASRec, trained on labels; the state is its last position's output."""


def labelled_lens_class(model_class: type[SequentialRecommender]) -> type[LabelledSequence]:
    """The labelled form of one of RecBole's sequential models (a new class ``Lens<Name>``)."""
    bases = (LabelledSequence, model_class)
    return type(f"Lens{model_class.__name__}", bases, {"__doc__": model_class.__doc__})
