r"""RecLoRA
################################################
Reference:
    Jiachen Zhu et al. "Lifelong Personalized Low-Rank Adaptation of Large Language Models for Recommendation."
    arXiv 2408.03533, 2024.

Reference code:
    https://github.com/Gebro13/RecLoRA (modeling_lorec_trash_v1.py, finetune_lorec.py)
"""

from __future__ import annotations

from recbole_llm.model.answer_ctr import AnswerCTR


class RecLoRA(AnswerCTR):
    """A bank of meta-LoRAs, mixed per sample by the state of a conventional CTR model (the lens).

    For every adapted projection with gate logits ``l(z)`` from the lens's state ``z``:

        g   = softmax(l(z) / temperature)                       in R^K
        A_z = sum_k g_k A_k,    B_z = sum_k g_k B_k             (mixer: factor, the released code)
        y   = W0 x + (alpha / r) B_z A_z x

    The lens has read ``id_history_length`` items and all training samples; the prompt shows ``text_history_length``
    items and the LLM is tuned on ``few_shot`` samples (Long-Short Modality Retriever, Few2Many). Differences from the
    released code are listed in ``docs/models/reclora.md``.
    """
