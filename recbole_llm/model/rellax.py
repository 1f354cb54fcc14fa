r"""ReLLaX
################################################
Reference:
    Rong Shan et al. "Full-Stack Optimized Large Language Models for Lifelong Sequential Behavior Comprehension in
    Recommendation." arXiv 2501.13344, 2025.

Reference code:
    https://github.com/LaVieEnRose365/ReLLaX
"""

from __future__ import annotations

from recbole_llm.model.answer_ctr import AnswerCTR


class ReLLaX(AnswerCTR):
    """CFLoRA: a full matrix of the lens's state between the A and B of one LoRA; retrieved history in the prompt.

    For every adapted projection, with its own gate, from the lens's state ``z``:

        M(z) = I + reshape(W2 GELU(W1 LayerNorm(z) + b1) + b2)          in R^{r x r}
        y    = W0 x + (alpha / r) B M(z) A x                            (mixer: dense)

    ``W2`` and ``b2`` start at zero, so that training starts as a plain LoRA: a new one, trained with the gate, or
    (``lora_from``) that of a finished run, which stays as it is. Differences from the released code are listed in
    ``docs/models/rellax.md``.
    """
