"""Folders on disk: the personalised adapter in its own format, and one instance's LoRA in PEFT's.

The own format is ``adapter_config.json`` (with a ``peft_type`` that PEFT does not know, so that PEFT and
transformers refuse the folder instead of reading A and B as a plain LoRA) and
``personalized_adapter.safetensors``. Reading either never unpickles anything.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from recbole_llm.adapter.config import AdapterConfig
from recbole_llm.utils.files import read_json, read_tensors
from recbole_llm.utils.hashing import hash_file

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "personalized_adapter.safetensors"
FORMAT_VERSION = 1
# PEFT looks this up among its own types and raises KeyError with the whole text: it doubles as the error
# message.
PEFT_TYPE = (
    "RECBOLE_LLM_PERSONALIZED_LORA: not a plain LoRA; "
    "load it with recbole_llm.adapter.PersonalizedAdapter.load(model, folder)"
)


def write_personalized(config: AdapterConfig, tensors: dict[str, Tensor], folder: str | Path) -> None:
    """Write a personalised adapter.

    Args:
        tensors: its ``state_dict``.
        folder: made if missing; files of an earlier adapter in it are replaced.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(tensors, folder / TENSOR_FILE)
    content = {
        "peft_type": PEFT_TYPE,
        "format_version": FORMAT_VERSION,
        "adapter": asdict(config),
        "sha256": hash_file(folder / TENSOR_FILE),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_personalized(folder: str | Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Read a personalised adapter.

    Args:
        folder: written by :func:`write_personalized`.

    Returns:
        the configuration and the tensors, on the CPU.

    Raises:
        FileNotFoundError: if one of the two files is missing.
        ValueError: if the folder holds another kind or version of adapter.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, TENSOR_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a saved personalised adapter: {name} is missing")
    path = folder / CONFIG_FILE
    content = read_json(path)
    if content.get("peft_type") != PEFT_TYPE:
        raise ValueError(
            f"{path}: peft_type is {content.get('peft_type')!r}, not that of a personalised adapter; "
            "load a plain PEFT adapter with peft.PeftModel.from_pretrained"
        )
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version is {content.get('format_version')!r}, this release reads "
            f"{FORMAT_VERSION}; load it with the release that wrote it"
        )
    known = {f.name for f in fields(AdapterConfig)}
    if unknown := set(content["adapter"]) - known:
        raise ValueError(f"{path}: unknown adapter settings {sorted(unknown)}; known are {sorted(known)}")
    tensors = folder / TENSOR_FILE
    if content.get("sha256", "not kept") not in ("not kept", hash_file(tensors)):
        raise ValueError(f"{tensors} is damaged: its SHA-256 is not the one in {CONFIG_FILE}")
    return AdapterConfig(**content["adapter"]), read_tensors(tensors)


def write_plain_lora(
    pairs: dict[str, tuple[Tensor, Tensor]],
    config: AdapterConfig,
    folder: str | Path,
    *,
    base_model_name: str | None = None,
    fan_in_fan_out: bool = False,
) -> None:
    """Write ``W0 + s B' A'`` of every projection as a plain PEFT LoRA.

    Args:
        pairs: for each projection, by its name in the causal LM, ``A' [R', d_in]`` and ``B' [d_out, R']``;
            one R'.
        config: of the adapter the pairs come from; gives s and the target modules.
        folder: made if missing.
        base_model_name: written into PEFT's configuration.
        fan_in_fan_out: whether the base weights are stored transposed (GPT-2's Conv1D), which merging must know.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    (rank,) = {a.shape[0] for a, _ in pairs.values()}
    _write_tensors(tensors, folder / "adapter_model.safetensors")
    LoraConfig(
        r=rank,
        lora_alpha=config.scale * rank,  # PEFT scales by lora_alpha / r, which must be s
        lora_dropout=config.lora_dropout,
        target_modules=list(config.target_modules),
        layers_to_transform=None
        if config.layers is None
        else list(range(config.layers[0], config.layers[1] + 1)),
        task_type="CAUSAL_LM",
        inference_mode=True,
        fan_in_fan_out=fan_in_fan_out,
        base_model_name_or_path=base_model_name,
    ).save_pretrained(str(folder))


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    # clone: safetensors refuses tensors that share storage, as A' = A does for some mixers
    save_file({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, path)
