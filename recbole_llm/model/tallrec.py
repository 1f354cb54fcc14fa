r"""TALLRec
################################################
Reference:
    Keqin Bao et al. "TALLRec: An Effective and Efficient Tuning Framework to Align Large Language Model with
    Recommendation." in RecSys 2023.

Reference code:
    https://github.com/SAI990323/TALLRec
"""

from __future__ import annotations

from recbole_llm.model.answer_ctr import AnswerCTR


class TALLRec(AnswerCTR):
    """One plain LoRA for all users, recent history in the prompt: ``y = W0 x + (alpha / r) B A x``.

    The score is the softmax over the two answer logits; the released code first takes the softmax of the whole
    vocabulary, which ranks by ``p_yes - p_no`` and is not a calibrated probability.
    """
