r"""TALLRecNext
################################################
Reference:
    Keqin Bao et al. "TALLRec: An Effective and Efficient Tuning Framework to Align Large Language Model with
    Recommendation." in RecSys 2023.
"""

from __future__ import annotations

from recbole_llm.model.title_ranker import TitleRanker


class TALLRecNext(TitleRanker):
    """TALLRec's plain LoRA and text-only prompts on the next-item task: the baseline of LLaRA and iLoRA.

    The paper itself predicts likes (:class:`recbole_llm.model.tallrec.TALLRec`).
    """
