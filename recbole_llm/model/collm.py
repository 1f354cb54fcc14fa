r"""CoLLM
################################################
Reference:
    Yang Zhang et al. "CoLLM: Integrating Collaborative Embeddings into Large Language Models for Recommendation." in
    IEEE TKDE 2025.

Reference code:
    https://github.com/zyang1580/CoLLM
"""

from __future__ import annotations

import torch
from torch import Tensor

from recbole_llm.model.answer_ctr import AnswerCTR


class CoLLM(AnswerCTR):
    """Two stages: a plain LoRA on text, then soft tokens of the lens's user and item through an MLP.

        stage 1   y = W0 x + (alpha / r) B A x               A and B trained, prompts of text alone
        stage 2   slot = W2 GELU(W1 e + b1) + b2             these trained, A and B frozen, hybrid prompts

    ``e`` is the lens's state of the user, or its vector of the target. ``stage_one_share`` of the optimizer steps are
    stage 1; with ``lora_from`` that stage is a finished run. Each stage has its own learning-rate schedule. Samples are
    scored as in the stage that training is in. Differences from the released code: ``docs/models/collm.md``.

    Attributes:
        stage: 1 or 2.

    Raises:
        ValueError: if the template has no slots, or a stage would have no optimizer step.
    """

    def __init__(self, config, dataset, *, prompts, **parts) -> None:
        if not prompts.has_slots:
            raise ValueError(
                f"prompt: {config['prompt']} has no slots, without which {config['model']} has no second stage; set "
                "prompt: tallrec_vectors, or give the template a user_slot or item_slots"
            )
        super().__init__(config, dataset, prompts=prompts, **parts)
        self.stage_one_share = config["stage_one_share"]  # 0 with lora_from
        self._enter(1 if self.stage_one_share else 2)

    def _enter(self, stage: int) -> None:
        self.stage, self.hybrid = stage, stage == 2
        self.adapter.train_lora(stage == 1)
        self.projectors.requires_grad_(stage == 2)

    def schedule_span(self, step: int, total_steps: int) -> tuple[int, int]:
        """The steps of the stage that ``step`` is in."""
        second = self._stage_two(total_steps)
        return (0, second) if step < second else (second, total_steps)

    def _stage_two(self, total_steps: int) -> int:
        """The first step of stage 2."""
        first = round(self.stage_one_share * total_steps)
        if self.stage_one_share and not 0 < first < total_steps:
            raise ValueError(
                f"stage_one_share: {self.stage_one_share} of {total_steps} optimizer steps leave one of the two stages "
                "without any; train on more samples or epochs, or in smaller batches"
            )
        return first

    def begin_step(self, step: int, steps_per_epoch: int, epochs: int) -> None:
        """Enter the stage that this optimizer step belongs to."""
        self._enter(1 if step < self._stage_two(steps_per_epoch * epochs) else 2)

    def trained_state(self) -> dict[str, Tensor]:
        """As every model's, and the stage."""
        return super().trained_state() | {"stage": torch.tensor(self.stage)}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of :meth:`trained_state`."""
        super().load_trained_state({name: value for name, value in state.items() if name != "stage"})
        self._enter(int(state["stage"]))

    def extra_results(self) -> dict:
        """As every model's, and the stage that was tested."""
        return {**super().extra_results(), "stage": self.stage}
