"""SIM: a DIN on those earlier interactions that a search by the target finds.

Reference:
    Qi Pi et al. "Search-based User Interest Modeling with Lifelong Sequential Behavior Data for Click-Through Rate
    Prediction" in CIKM 2020.
    Jianghao Lin et al. "ReLLa: Retrieval-enhanced Large Language Models for Lifelong Sequential Behavior
    Comprehension in Recommendation" in WWW 2024: there SIM is the DIN on a history found by LLM item vectors.
"""

from __future__ import annotations

from recbole_llm.lens.din import LensDIN
from recbole_llm.model.conventional import Conventional


class SIM(Conventional, LensDIN):
    """The network of the lens DIN on a retrieved history.

    With ``H`` all earlier interactions of the user, ``k`` = ``id_history_length`` and ``v`` the LLM's mean-pooled
    vectors of the titles:

        id_retrieval: semantic    S = the k of H with the largest cos(v(i_j), v(target))          soft search
        id_retrieval: category    S = the last k of H that share a genre with the target          hard search
        logit                     = LensDIN(user, S in time order, target)

    The search itself is the dataset's (:mod:`recbole_llm.data.retriever`). As a lens (``lens: SIM``) it is read
    like the DIN; as every state of it depends on the target, the gate's scope is ``user_item``.
    """

    tasks = ("ctr",)
    reads = ("id_retrieval", "lens_ratings", "backbone", "dtype", "quantization")
    retrieval = "semantic"
    """``id_retrieval`` of a run with this lens, unless it is given."""
