"""The flat keys as small typed groups: what one constructor takes of a configuration.

Each field is the key of its name; :data:`recbole_llm.config.keys.TABLE` says what it means. ``from_config`` takes
anything that has these keys: a :class:`~recbole_llm.config.Config` or a dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from recbole_llm.adapter.config import AdapterConfig

S = TypeVar("S", bound="Settings")


class Settings:
    """Base of the groups."""

    @classmethod
    def from_config(cls: type[S], config: Mapping[str, Any]) -> S:
        """The group, from the keys of its fields' names."""
        return cls(**{field.name: config[field.name] for field in fields(cls)})  # type: ignore[arg-type]  # subclasses are dataclasses


@dataclass(frozen=True)
class ScoringSettings(Settings):
    """How titles are scored and written."""

    scoring_batch_size: int
    trie_nodes: int
    two_stage: int | None
    curriculum: str
    seed: int


@dataclass(frozen=True)
class ModelSettings(Settings):
    """What an LLM recommender of either task is made of, beside the adapter (:func:`adapter_config`)."""

    mixer: str
    gate_inputs: str
    gate_balance: float
    gate_entropy: float
    lora_from: str | None
    tune_lens: bool
    micro_batch_size: int
    bucket_by_length: bool
    torch_compile: bool
    shard_backbone: bool

    @property
    def gated(self) -> bool:
        """Whether the adapter's update depends on the sample."""
        return self.mixer != "identity"

    @property
    def gate_reads_logit(self) -> bool:
        """Whether the gate reads the lens's logit beside its state."""
        return self.gated and self.gate_inputs == "state_and_logit"


def adapter_config(config: Mapping[str, Any], instance_size: int | None) -> AdapterConfig:
    """The adapter of a configuration.

    Args:
        instance_size: width of what the gate reads, without the lens's logit; ``None`` with ``mixer: identity``.

    Raises:
        ValueError: as :class:`AdapterConfig`.
    """
    model = ModelSettings.from_config(config)
    return AdapterConfig(
        mixer=model.mixer,
        num_experts=config["num_experts"] if model.gated else 1,
        r=config["lora_r"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=config["lora_dropout"],
        target_modules=config["target_modules"],
        layers=config["lora_layers"],
        gate=config["gate"] if model.gated else "uniform",
        gate_dropout=config["gate_dropout"],
        temperature=config["temperature"],
        top_k=config["top_k"],
        share_gate=config["share_gate"],
        instance_size=(instance_size or 0) + model.gate_reads_logit if model.gated else 1,
    )
