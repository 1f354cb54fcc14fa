r"""ReLLa
################################################
Reference:
    Jianghao Lin et al. "ReLLa: Retrieval-enhanced Large Language Models for Lifelong Sequential Behavior Comprehension
    in Recommendation." in WWW 2024.

Reference code:
    https://github.com/LaVieEnRose365/ReLLa
"""

from __future__ import annotations

from recbole_llm.model.answer_ctr import AnswerCTR


class ReLLa(AnswerCTR):
    """One plain LoRA for all users; the prompt shows the earlier items that are most like the target.

        S(u, i) = the K earlier items j of u with the largest cos(e_j, e_i), in time order
        y       = W0 x + (alpha / r) B A x

    ``e_j`` is the LLM's own mean-pooled vector of the item's text (``text_retrieval: semantic``). With
    ``mixed_training`` an epoch has each few-shot sample twice, with its K latest items and with ``S``; samples to be
    predicted show ``S`` alone. Differences from the released code are listed in ``docs/models/rella.md``.
    """
