r"""iLoRA
################################################
Reference:
    Xiaoyu Kong et al. "Customizing Language Models with Instance-wise LoRA for Sequential Recommendation." in
    NeurIPS 2024.

Reference code:
    https://github.com/AkaliKong/iLoRA (model/peft/tuners/moelora.py, model/router/nlpr.py)
"""

from __future__ import annotations

from recbole_llm.model.title_ranker import TitleRanker


class iLoRA(TitleRanker):  # noqa: N801 - the name that the authors gave it
    """One LoRA cut along its rank into K experts, weighted per sequence by a frozen SASRec.

    With one gate for the whole model, from SASRec's last state ``z``:

        g = softmax(W z + b)                                            in R^K
        y = W0 x + alpha / (r / K) sum_k g_k B_k A_k x                  (mixer: expert)

    ``A_k`` and ``B_k`` are the k-th slices of ``r / K`` rows and columns. Under the hybrid prompt and the curriculum of
    LLaRA. Differences from the released code are listed in ``docs/models/ilora.md``.
    """
