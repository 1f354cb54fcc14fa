r"""LensPrompt
################################################
Built-in control for models whose gate reads a conventional recommender (:class:`recbole_llm.model.reclora.RecLoRA`).
"""

from __future__ import annotations

from recbole_llm.model.answer_ctr import AnswerCTR


class LensPrompt(AnswerCTR):
    """One plain LoRA for all users; the prompt states the lens's predicted probability as text.

        "... A conventional recommender estimates that the viewer likes it with probability 0.73. ..."
        y = W0 x + (alpha / r) B A x

    The number is ``sigmoid(lens logit)`` of the sample, to two decimals; the template's line ``lens_score`` holds it.
    The LLM reads the lens's prediction and nothing else of it, so what a personalised adapter gains over this model is
    not the lens's score leaking through its gate. See ``docs/models/lensprompt.md``.

    Raises:
        ValueError: if the template states no score.
    """

    def __init__(self, config, dataset, *, prompts, **parts) -> None:
        if not prompts.tells_lens:
            raise ValueError(
                f"prompt: {config['prompt']} does not state the lens's score, without which {config['model']} is a "
                "plain LoRA; set prompt: movie_ctr_lens, or give the template a line lens_score"
            )
        super().__init__(config, dataset, prompts=prompts, **parts)
