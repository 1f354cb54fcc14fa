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
    """The key findings: one for each difference of the leading metric.

    Args:
        table: a comparison's models.
        expected: the expected value of random scores, if known.
    """
    lines = {line["name"]: line for line in table}
    leading = [found for found in differences if found["metric"] == metric]
    return [_sentence(found, lines[found["a"]], lines[found["b"]], expected) for found in leading]


def _sentence(
    difference: Mapping[str, Any], of_a: Mapping[str, Any], of_b: Mapping[str, Any], expected: float | None
) -> str:
    a, b, key = of_a["label"], of_b["label"], difference["metric"]
    value, low, high, p = (difference[name] for name in ("value", "low", "high", "p_holm"))
    metric = key.upper()
    if value is None:
        return f"{a} and {b} cannot be compared: {difference['reason']}."
    if p is None and low is None:
        return f"{metric} of {a} minus {b}: {value:+.4f}; significance is not known ({difference['reason']})."
    details = [f"{metric} {value:+.4f}"]
    if low is not None:
        details.append(f"95% CI [{low:+.4f}, {high:+.4f}]")
    if p is not None:
        details.append(f"p = {p:.2g} ({difference['test']}; Holm)")
    numbers = ", ".join(details)
    if not (p < ALPHA if p is not None else low > 0 or high < 0):
        return f"The difference between {a} and {b} is not significant at {ALPHA:.0%}: {numbers}."
    # Trained once: the finding then holds for that training only.
    once = " (one seed)" if len(of_a["seeds"]) == 1 else ""
    better = "better" if (value > 0) == (key not in SMALLER_IS_BETTER) else "worse"
    found = f"{a}{once} is significantly {better} than {b}: {numbers}."
    bounds = [(line["metrics"][key]["low"], line["metrics"][key]["high"]) for line in (of_a, of_b)]
    if expected is not None and all(low is not None and low <= expected <= high for low, high in bounds):
        found += f" Neither is distinguishable from chance ({metric} {expected:.4g} lies in both 95% CIs)."
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
