"""From text-only to hybrid prompts: how likely an optimizer step is a hybrid one.

Reference: Liao et al. "LLaRA: Large Language-Recommendation Assistant" in SIGIR 2024, curriculum prompt tuning: the
probability rises linearly from 0 to 1 over the whole training. In the released code the counter lives in the workers
of a DataLoader, which are made again in each epoch; there the probability rises from 0 to 1 / epochs in every epoch.
"""

from __future__ import annotations

import torch


def hybrid_probability(mode: str, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Probability that optimizer step ``step`` (0-based, over all epochs) shows the item vectors.

    ``linear`` is ``(step + 1) / total``: the last step is always a hybrid one. ``as_released`` starts again at
    each epoch.
    """
    if mode == "text_only":
        return 0.0
    if mode == "hybrid_only":
        return 1.0
    done = step if mode == "linear" else step % steps_per_epoch
    return (done + 1) / (steps_per_epoch * epochs)


def is_hybrid(mode: str, step: int, steps_per_epoch: int, epochs: int, seed: int) -> bool:
    """The draw for one step. It depends on its arguments alone, so that a resumed run draws the same."""
    draw = torch.rand((), generator=torch.Generator().manual_seed(seed * 1_000_003 + step)).item()
    return draw < hybrid_probability(mode, step, steps_per_epoch, epochs)
