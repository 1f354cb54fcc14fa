r"""LLaRA
################################################
Reference:
    Jiayi Liao et al. "LLaRA: Large Language-Recommendation Assistant." in SIGIR 2024.

Reference code:
    https://github.com/ljy0ustc/LLaRA
"""

from __future__ import annotations

from recbole_llm.model.title_ranker import TitleRanker


class LLaRA(TitleRanker):
    """A plain LoRA under hybrid prompts: each title is followed by the projected item vector of a frozen SASRec.

        y = W0 x + (alpha / r) B A x                                    (mixer: identity)

    The prompts go from text only to hybrid over the training (:mod:`recbole_llm.model.curriculum`). Differences from
    the released code are listed in ``docs/models/llara.md``.
    """
