"""The key findings of a comparison in words: which difference is significant, and which only looks like one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recbole_llm.evaluation.ranking import row_rank_metric

ALPHA = 0.05
SMALLER_IS_BETTER = ("logloss",)


def key_findings(
    differences: Sequence[Mapping[str, Any]],
    table: Sequence[Mapping[str, Any]],
    metric: str,
    expected: float | None,
) -> list[str]:
    """The key findings: one for each difference of the leading metric."""
    lines = {line["name"]: line for line in table}

    def at_chance(name: str) -> bool:
        found = lines[name]["metrics"][metric]
        return None not in (expected, found["low"]) and found["low"] <= expected <= found["high"]

    return [
        sentence(
            dict(found) | {side: lines[found[side]]["label"] for side in "ab"},
            one_seed=len(lines[found["a"]]["seeds"]) == 1,
            chance=expected if at_chance(found["a"]) and at_chance(found["b"]) else None,
        )
        for found in differences
        if found["metric"] == metric
    ]


def sentence(difference: Mapping[str, Any], *, one_seed: bool = False, chance: float | None = None) -> str:
    """One difference of the leading metric in words.

    Args:
        difference: one of a comparison's.
        one_seed: whether ``a`` was trained with one seed: the finding then holds for that training only.
        chance: the expected value of random scores, if both models' intervals contain it.
    """
    a, b, metric = difference["a"], difference["b"], difference["metric"].upper()
    value, p = difference["value"], difference["p_holm"]
    if value is None:
        return f"{a} and {b} cannot be compared: {difference['reason']}."
    low, high = difference["low"], difference["high"]
    if p is None and low is None:
        return f"{metric} of {a} minus {b}: {value:+.4f}; significance is not known ({difference['reason']})."
    significant = p < ALPHA if p is not None else low > 0 or high < 0
    better = "better" if (value > 0) == (difference["metric"] not in SMALLER_IS_BETTER) else "worse"
    if significant:
        found = f"{a}{' (one seed)' if one_seed else ''} is significantly {better} than {b}"
    else:
        found = f"The difference between {a} and {b} is not significant at {ALPHA:.0%}"
    details = [f"{metric} {value:+.4f}"]
    if low is not None:
        details.append(f"95% CI [{low:+.4f}, {high:+.4f}]")
    if p is not None:
        details.append(f"p = {p:.2g} ({difference['test']}; Holm)")
    found += f": {', '.join(details)}."
    if significant and chance is not None:
        found += f" Neither is distinguishable from chance ({metric} {chance:.4g} lies in both 95% CIs)."
    return found


def chance(metric: str, rows: Mapping[str, np.ndarray]) -> float | None:
    """The expected value of random scores; ``None`` where it is not known."""
    if metric == "auc":
        return 0.5
    if "candidates" not in rows:
        return None
    sizes, counts = np.unique(rows["candidates"], return_counts=True)
    values = [row_rank_metric(metric, np.arange(1, size + 1)).mean() for size in sizes]
    return float(np.average(values, weights=counts))
