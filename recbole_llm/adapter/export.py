"""A LoRA on disk in PEFT's own format: what a personalised adapter is for one instance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from recbole_llm.adapter.merge import PlainLora


def plain_tensors(lora: PlainLora, prefix: str) -> dict[str, Tensor]:
    """A and B of every projection as ``{prefix}{projection}.lora_A.weight``, on the CPU.

    They are copies: safetensors refuses tensors that share storage, as those of several instances do for some mixers.
    """
    return {
        f"{prefix}{name}.lora_{side}.weight": tensor.detach().cpu().clone().contiguous()
        for name, pair in lora.pairs.items()
        for side, tensor in zip("AB", pair, strict=True)
    }


def write_plain_lora(
    lora: PlainLora,
    folder: str | Path,
    *,
    target_modules: Sequence[str],
    layers: Sequence[int] | None = None,
    lora_dropout: float = 0.0,
    base_model_name: str | None = None,
    fan_in_fan_out: bool = False,
) -> None:
    """Write ``W0 + s B A`` of every projection as a plain PEFT LoRA.

    Args:
        lora: of one rank in all projections.
        folder: made if missing.
        target_modules: names of the adapted layers.
        layers: the first and the last decoder layer that is adapted; ``None``: all.
        lora_dropout: of further training.
        base_model_name: written into PEFT's configuration.
        fan_in_fan_out: whether the base weights are stored transposed (GPT-2's Conv1D), which merging must know.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(plain_tensors(lora, "base_model.model."), folder / "adapter_model.safetensors")
    (rank,) = {a.shape[0] for a, _ in lora.pairs.values()}
    LoraConfig(
        r=rank,
        lora_alpha=lora.scale * rank,  # PEFT scales by lora_alpha / r, which must be s
        lora_dropout=lora_dropout,
        target_modules=list(target_modules),
        layers_to_transform=None if layers is None else list(range(layers[0], layers[1] + 1)),
        task_type="CAUSAL_LM",
        inference_mode=True,
        fan_in_fan_out=fan_in_fan_out,
        base_model_name_or_path=base_model_name,
    ).save_pretrained(str(folder))
