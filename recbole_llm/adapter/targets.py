"""Which projections of an architecture an adapter changes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from recbole_llm.utils.causal_lm import projections

logger = logging.getLogger(__name__)

LLAMA_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Where PEFT's own table has no entry.
FUSED = {"phi3": ["qkv_proj"]}


def resolve_targets(model: PreTrainedModel, targets: Sequence[str], *, strict: bool = True) -> list[str]:
    """The names of the layers to adapt, each of which the model has.

    The papers' settings name Llama's projections. A model that lacks them gets, unless ``strict``:

    - for all seven projections of a Llama layer: all projections of its own layers;
    - for others of them, such as ``[q_proj, v_proj]``: PEFT's default for the architecture (often one projection that
      makes queries, keys and values together).

    Args:
        model: a causal language model without an adapter.
        targets: names (or name endings) of linear layers, as in PEFT.
        strict: whether to refuse names that the model lacks; for names that the user chose.

    Raises:
        ValueError: if a name matches no layer, or one that is not linear, and nothing may or can stand in for it.
    """
    found, why = stand_in(model, targets, strict=strict)
    if why:
        logger.warning(
            "target_modules: %s has no %s; adapting %s, %s",
            type(model).__name__,
            ", ".join(name for name in targets if _problem(model, [name])),
            ", ".join(found),
            why,
        )
    return found


def stand_in(
    model: PreTrainedModel, targets: Sequence[str], *, strict: bool = True
) -> tuple[list[str], str | None]:
    """As :func:`resolve_targets`, which also warns: the names, and which rule gave them if not the caller."""
    problem = _problem(model, targets)
    if problem is None:
        return list(targets), None
    if not strict and set(targets) <= set(LLAMA_PROJECTIONS):
        model_type = model.config.get_text_config().model_type
        if set(targets) == set(LLAMA_PROJECTIONS):
            found, why = _of_layers(model), "all projections of its layers"
        else:
            known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING | FUSED
            found, why = known.get(model_type), f"the default for {model_type}"
        if isinstance(found, list) and _problem(model, found) is None:
            return found, why
    raise ValueError(problem)


def stores_transposed(model: PreTrainedModel, targets: Sequence[str]) -> bool:
    """PEFT's ``fan_in_fan_out``: whether the targeted weights are ``[d_in, d_out]``, as those of GPT-2's Conv1D are."""
    return any(
        isinstance(projection, Conv1D) and name.endswith(tuple(targets))
        for name, projection in projections(model).items()
    )


def _problem(model: PreTrainedModel, targets: Sequence[str]) -> str | None:
    """What is wrong with ``targets``, by PEFT's rule: a whole name or a name's ending, of linear layers only.

    PEFT checks only that *something* matched: of ["q_proj", "v_porj"] it would adapt the first and say nothing.
    """
    linear = projections(model).keys()
    for target in targets:
        matched = {name for name, _ in model.named_modules() if name == target or name.endswith(f".{target}")}
        if not matched or not matched <= linear:
            what = "is not a linear layer" if matched else "matches no layer"
            return (
                f"target_modules: {target!r} {what} of {type(model).__name__}; its linear layers are named "
                f"{sorted({name.rsplit('.', 1)[-1] for name in linear})}"
            )
    return None


def _of_layers(model: PreTrainedModel) -> list[str]:
    """Endings of the names of all projections inside numbered layers, in their order."""
    inside = (name for name in projections(model) if any(part.isdigit() for part in name.split(".")))
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in inside))
