"""Starting from the plain LoRA of a finished run: ``lora_from``.

Models that add something to a tuned LoRA (a matrix between A and B, soft tokens in the prompt) load its A and B and
train the rest alone. What is loaded becomes part of the new run's own checkpoints, so the folder it came from is needed
only while that run is trained.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from recbole_llm.trainer.checkpoint import CheckpointError, load_checkpoint
from recbole_llm.utils.files import read_json
from recbole_llm.utils.hashing import hash_tensors
from recbole_llm.utils.run_files import BEST_FILE, CONFIG_FILE, RESULT_FILE

logger = logging.getLogger(__name__)

SHAPE = ("lora_r", "lora_alpha", "target_modules")
"""Keys that A and B of two runs must have in common."""


@dataclass
class PlainLora:
    """The A and B of a finished run.

    Attributes:
        folder: of the run.
        tensors: by name, as in :meth:`recbole_llm.adapter.PersonalizedAdapter.state_dict`.
        identities: hashes of what the run was made with.
        eval_args: how its samples were split.
    """

    folder: Path
    tensors: dict[str, Tensor]
    identities: dict[str, str]
    eval_args: dict

    @property
    def sha256(self) -> str:
        """Hash of the tensors, with their names."""
        return hash_tensors(self.tensors)

    def check(self, identities: dict[str, str], eval_args: dict) -> None:
        """Refuse another backbone; warn where this run's test samples may have tuned the LoRA.

        Args:
            identities: hashes of this run's backbone and data.
            eval_args: how this run's samples are split.

        Raises:
            CheckpointError: naming both hashes.
        """
        there, here = self.identities["backbone"], identities["backbone"]
        if there != here:
            raise CheckpointError(
                f"lora_from: {self.folder} was tuned on another backbone: sha256 {there[:16]} there, {here[:16]} here"
            )
        split = {key: self.eval_args.get(key) for key in ("split", "order", "group_by")}
        if self.identities["data"] != identities["data"] or split != {
            key: eval_args.get(key) for key in split
        }:
            logger.warning(
                "lora_from: %s was tuned on other data or another split; samples that are tested here may be among "
                "those it was tuned on",
                self.folder,
            )


def read_plain_lora(folder: Path, shape: Mapping[str, Any]) -> PlainLora:
    """The A and B of the finished run in a folder.

    Args:
        folder: what ``lora_from`` names.
        shape: ``lora_r``, ``lora_alpha`` and ``target_modules`` that they must have.

    Raises:
        CheckpointError: if the run is not finished, is no plain LoRA, or has another rank, scale or other modules.
    """
    for name in (CONFIG_FILE, RESULT_FILE, BEST_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"lora_from: {folder} is no finished run of recbole_llm: it has no {name}")
    saved = read_json(folder / CONFIG_FILE)
    if saved.get("mixer") != "identity":
        raise CheckpointError(
            f"lora_from: {folder} is a {saved['model']} with mixer={saved.get('mixer')}; a plain LoRA (mixer: "
            "identity) is needed, e.g. a run of ReLLa or TALLRec"
        )
    different = [
        f"{key}: {saved[key]!r} there, {value!r} here"
        for key, value in shape.items()
        if (sorted(saved[key]) != sorted(value) if key == "target_modules" else saved[key] != value)
    ]
    if different:
        raise CheckpointError(f"lora_from: the LoRA of {folder} does not fit:\n  " + "\n  ".join(different))
    tensors, meta = load_checkpoint(folder / BEST_FILE)
    lora = {
        name.removeprefix("adapter."): tensor
        for name, tensor in tensors.items()
        if name.startswith("adapter.") and name.endswith((".lora_A", ".lora_B"))
    }
    return PlainLora(folder, lora, meta["identities"], saved["eval_args"])
