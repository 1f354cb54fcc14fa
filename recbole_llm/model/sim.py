"""SIM: a DIN on those earlier interactions that a search by the target finds.

Reference:
    Qi Pi et al. "Search-based User Interest Modeling with Lifelong Sequential Behavior Data for Click-Through Rate
    Prediction" in CIKM 2020.
    Jianghao Lin et al. "ReLLa: Retrieval-enhanced Large Language Models for Lifelong Sequential Behavior
    Comprehension in Recommendation" in WWW 2024: there SIM is the DIN on a history found by LLM item vectors.
"""

from __future__ import annotations

import numpy as np

from recbole_llm.config.keys import Key
from recbole_llm.config.kinds import Choice, Whole
from recbole_llm.config.model_spec import ModelSpec
from recbole_llm.lens.din import LensDIN
from recbole_llm.model.title_embedding import TitleEmbedding


class SIM(LensDIN):
    """The network of the lens DIN on a retrieved history.

    With ``H`` all earlier interactions of the user, ``k`` = ``id_history_length`` and ``v`` the LLM's mean-pooled
    vectors of the titles:

        id_retrieval: semantic    S = the k of H with the largest cos(v(i_j), v(target))          soft search
        id_retrieval: category    S = the last k of H that share a genre with the target          hard search
        logit                     = LensDIN(user, S in time order, target)

    With ``item_vectors``, the projected vector ``P(v(i))`` (:class:`TitleEmbedding`) is one more field of an item
    (``add``), or takes the place of its ID (``replace``).

    The search itself is the dataset's (:mod:`recbole_llm.data.retriever`). As a lens (``lens: SIM``) it is read
    like the DIN, without ``item_vectors``; as every state depends on the target, the gate's scope is ``user_item``.

    Args:
        config: the run's configuration, or the lens's own.
        item_vectors: ``[n_items, d]``, row 0 is the padding item; ``None`` where the key is not set.
    """

    spec = ModelSpec(
        "conventional",
        tasks=("ctr",),
        reads=("id_retrieval", "lens_ratings", "backbone", "dtype", "quantization"),
        keys={
            "item_vectors": Key(
                "what the LLM's vectors do to the items", Choice("replace", "add"), optional=True
            ),
            "projector_layers": Key("layers of the projector beyond the first", Whole(0)),
        },
        probability=True,
        gate_scopes=LensDIN.spec.gate_scopes,
        lens_retrieval="semantic",
        takes_item_vectors=True,
    )

    def __init__(self, config, dataset, item_vectors: np.ndarray | None = None) -> None:
        if item_vectors is None:
            super().__init__(config, dataset)
            return
        width, layers = config["embedding_size"], config["projector_layers"]
        super().__init__(
            config,
            dataset,
            titles=TitleEmbedding(item_vectors, width, layers, ids=False),
            without=(dataset.iid_field,) if config["item_vectors"] == "replace" else (),
        )
