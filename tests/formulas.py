"""What tests compare with: metrics of all samples from those of each, and the plain LoRA of one instance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from recbole_llm.adapter.export import write_plain_lora
from recbole_llm.adapter.merge import PlainLora
from recbole_llm.adapter.personalized import PersonalizedAdapter
from recbole_llm.evaluation.metrics import row_logloss
from recbole_llm.evaluation.ranking import RANK_METRICS, row_rank_metric


def logloss(p: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log(probability given to the label)."""
    return float(row_logloss(p, labels).mean())


def rank_metrics(ranks: np.ndarray, metrics: Sequence[str] = RANK_METRICS) -> dict[str, float]:
    """Metric name -> mean over the samples."""
    return {metric.lower(): float(row_rank_metric(metric, ranks).mean()) for metric in metrics}


def export_instance(adapter: PersonalizedAdapter, z: Tensor | None, folder: Path) -> None:
    """Write the LoRA that the adapter is for one instance ``[1, H]`` as a plain PEFT folder."""
    config, pairs = adapter.config, adapter.plain_pairs(adapter.gate_weights(z))
    write_plain_lora(
        PlainLora(pairs, config.scale),
        folder,
        target_modules=config.target_modules,
        layers=config.layers,
        fan_in_fan_out=adapter.fan_in_fan_out,
    )
