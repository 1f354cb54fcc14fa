"""The control models of a comparison: what a personalised LoRA must beat before the gain is personalisation.

Published gains do not show whether they come from the user that the gate reads, from the greater number of parameters,
or from the lens's knowledge leaking through. Each control removes one of these:

    gate=uniform, random, shuffled      the mixture does not depend on the user, or on another one
    num_experts=1                       one meta-LoRA, scaled by nothing that varies
    mixer=identity                      plain LoRA of one expert's rank r
    mixer=identity lora_r=K*r           plain LoRA with as many parameters as all experts
    shuffle_history                     the prompt's history in a random order (not in a stream)
    obfuscate_titles                    titles replaced by "Movie 123"

The lens (the frozen conventional recommender) alone is part of every comparison, and so, in the ctr task, is a stack of
the lens and the plain LoRA fitted on validation samples (:func:`recbole_llm.comparison.stacking.stack`).
"""

from __future__ import annotations

from recbole_llm.config.command_line import parse_model
from recbole_llm.config.configurator import Config

GATES = ("uniform", "random", "shuffled")
_PHRASES = {
    "gate": "{} gate", "gate_scope": "{} gate", "num_experts": "{} experts", "num_experts=1": "one expert",
    "shuffle_history=True": "shuffled history", "obfuscate_titles=True": "hidden titles",
}  # fmt: skip
_OF_EXPERTS = ("mixer", "gate", "top_k", "gate_balance", "gate_entropy", "tune_lens", "lora_r", "lora_alpha")


def control_models(config: Config, text: str) -> list[str]:
    """The controls of a model with experts.

    Args:
        config: the model's configuration.
        text: the model as requested.

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
    # Settings of the experts are removed with them.
    ungated = "mixer=identity gate=~" + all_experts
    for key, off in (("gate_balance", 0), ("gate_entropy", 0), ("tune_lens", config["lens_residual"])):
        ungated += f" {key}={off}" if config[key] else ""
    for r in dict.fromkeys((small, total)):
        controls.append(f"{ungated} lora_r={r} lora_alpha={scale * r:g}")
    if config["layout"] != "stream":  # whose order is the order of its targets
        controls.append("shuffle_history=True")
    controls.append("obfuscate_titles=True")
    if config["task"] == "ctr":
        plain = next(i for i, control in enumerate(controls) if control.startswith("mixer=identity"))
        controls[plain] += " score_valid=True"
    return [f"{text} {control}" for control in controls]


def label_of(text: str) -> str:
    """What a report calls a model with changes; names of other forms (references) stay.

    >>> label_of("RecLoRA gate=uniform"), label_of("DIN epochs=2"), label_of("lens DIN")
    ('RecLoRA, uniform gate', 'DIN epochs=2', 'lens DIN')
    >>> label_of("RecLoRA mixer=identity gate=~ lora_r=8 lora_alpha=16 score_valid=True")
    'plain LoRA, rank 8'
    """
    try:
        name, changes = parse_model(text)
    except ValueError:
        return text
    if not {"mixer", "score_valid", *_PHRASES} & {
        *changes,
        *(f"{key}={value}" for key, value in changes.items()),
    }:
        return text
    phrases = []
    if changes.get("mixer") == "identity":
        name = "plain LoRA"
        phrases = [f"rank {changes['lora_r']}"] if "lora_r" in changes else []
        changes = {key: value for key, value in changes.items() if key not in _OF_EXPERTS}
    for key, value in changes.items():
        change = f"{key}={value}"
        if phrase := _PHRASES.get(change) or _PHRASES.get(key):
            phrases.append(phrase.format(str(value).replace("_", "-")))
        elif key != "score_valid":  # keeps more of the run, and changes nothing in it
            name += f" {change}"
    return ", ".join([name, *phrases])
