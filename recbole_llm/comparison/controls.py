"""The control models of a comparison: what a personalised LoRA must beat before the gain is personalisation.

Published gains do not tell whether it is the user that the gate reads, the greater number of parameters, or the lens's
knowledge leaking through. Each control takes one of these away:

    gate=uniform, random, shuffled      the mixture does not depend on the user, or on another one
    num_experts=1                       one meta-LoRA, scaled by nothing that varies
    mixer=identity                      plain LoRA of one expert's rank r
    mixer=identity lora_r=K*r           plain LoRA with as many parameters as all experts
    shuffle_history                     the prompt's history in a random order
    obfuscate_titles                    titles replaced by "Movie 123"

The lens alone is part of every comparison, and so, in the ctr task, is a stack of the lens and the plain LoRA fitted on
validation rows (:func:`recbole_llm.comparison.stacking.stacked`).
"""

from __future__ import annotations

from recbole_llm.config.configurator import Config

GATES = ("uniform", "random", "shuffled")


def control_models(config: Config, text: str) -> list[str]:
    """The controls of a model with experts.

    Args:
        config: the model's configuration.
        text: the model as it was asked for.

    Returns:
        Each control as a model with its changes: ``"RecLoRA gate=uniform"``.

    Raises:
        ValueError: if the model has no gate.
    """
    mixer, experts = config["mixer"], config["num_experts"]
    if mixer in ("identity", "dense"):
        raise ValueError(f"controls: {text} has mixer {mixer} and no experts, so there is nothing to control")
    controls = [f"gate={gate}" for gate in GATES if gate != config["gate"]]
    # Slices of one LoRA's rank are smaller than it; a bank of LoRAs is larger than each. The scale stays.
    rank, alpha = config["lora_r"], config["lora_alpha"]
    small = rank // experts if mixer == "expert" else rank
    total = rank if mixer == "expert" else rank * experts
    scale = alpha / small
    all_experts = " top_k=~" if config["top_k"] else ""
    if mixer != "expert":
        controls.append(f"num_experts=1{all_experts}")
    # What belongs to the experts goes with them.
    ungated = "mixer=identity gate=~" + all_experts
    for key, off in (("gate_balance", 0), ("gate_entropy", 0), ("tune_lens", config["lens_residual"])):
        ungated += f" {key}={off}" if config[key] else ""
    for r in dict.fromkeys((small, total)):
        controls.append(f"{ungated} lora_r={r} lora_alpha={_number(scale * r)}")
    controls += ["shuffle_history=True", "obfuscate_titles=True"]
    if config["task"] == "ctr":
        plain = next(i for i, control in enumerate(controls) if control.startswith("mixer=identity"))
        controls[plain] += " score_valid=True"
    return [f"{text} {control}" for control in controls]


def _number(value: float) -> str:
    return f"{value:g}"
