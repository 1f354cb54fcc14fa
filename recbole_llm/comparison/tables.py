"""The tables of a comparison, before they become text, markdown, LaTeX or HTML; and what a comparison must hold.

`compare.json`, format 1. Everything stands in it; the other files are views of it.

    format              1
    task                "ctr" or "next_item"
    dataset, created, machine, device, command
                        text; created is the time of writing, ISO
    versions            {package: version or null}
    metrics             ["auc", "logloss", ..] or ["hr@1", "ndcg@5", ..], in the order of the columns
    leading             the one of them that plots and intervals are of
    smaller_is_better   those of them where less is better
    rows                {train, valid, test[, few_shot, test_available, users]}: counts, the latter null if unknown
    seeds               [2020, ..]
    models              [{name, kind: llm|classical|reference, seeds,
                          metrics: {auc: {mean[, sd, low, high, low_bca, high_bca, values, reason]}, ..}
                          [, cost: {train_seconds, test_seconds, samples_per_second, tokens_per_second, tokens,
                                    peak_memory_gib, trained_parameters, energy_joules}
                           , calibration: {predicted, observed, counts, ece}
                           , groups: {"history length": [{name, rows, value[, reason]}, ..], ..}
                           , changes: {key: value}, paths: [..]]}, ..]
                        reason says why the mean or the bounds are null
    differences         [{a, b, metric, value[, low, high, low_bca, high_bca, p, p_holm, test, reason]}, ..]: a minus b
    failed              [{name, seed, error}, ..]
    [sentences, notes]  [text, ..]
    [gates]             {model, experts: K, users, values [users, K], coordinates [users, 2], profile_field, profile}
    [prompts]           [{model, user, item, text[, label, scores: {model: score}]}, ..]

What stands in brackets may be null or missing.
"""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FORMAT = 1
DASH = "–"
MINUS = "−"
COSTS = {
    "train_seconds": "training, s",
    "test_seconds": "test, s",
    "samples_per_second": "rows/s",
    "tokens_per_second": "tokens/s",
    "tokens": "tokens",
    "peak_memory_gib": "peak memory, GiB",
    "trained_parameters": "trained parameters",
    "energy_joules": "energy, J",
}
TASKS = {"ctr": "click-through rate", "next_item": "next item"}
_TITLES = {"auc": "AUC", "logloss": "LogLoss", "acc": "ACC", "gauc": "GAUC"}
_REQUIRED = (
    "format", "task", "dataset", "created", "versions", "machine", "device", "command", "metrics", "leading",
    "smaller_is_better", "rows", "seeds", "models", "differences", "failed",
)  # fmt: skip
_OPTIONAL = {"sentences": [], "notes": [], "gates": None, "prompts": []}
_BOUNDS = ("low", "high", "low_bca", "high_bca")
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True)
class Cell:
    """What stands in a table at one place.

    Attributes:
        interval: "[0.7301, 0.7520]" or empty.
        note: why the text or the interval is missing.
        best: whether no other model is better, as printed.
        number: to sort by; None for text and where nothing is known.
    """

    text: str
    interval: str = ""
    note: str | None = None
    best: bool = False
    number: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells below a head; the columns in [words] are words, the others numbers."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    words: tuple[int, ...] = (0,)


def checked(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """A plain copy of `comparison`, known to be complete; NumPy scalars and arrays and paths become plain.

    Raises:
        ValueError: for another format, a missing key, a number that is not finite or not a number, or lists that
            must be of one length and are not. The message names the place, such as [models[0].metrics.auc.mean].
    """
    if not isinstance(comparison, Mapping):
        raise ValueError(f"a comparison is a mapping, not a {type(comparison).__name__}")
    found = _plain(comparison, "")
    _need(found, _REQUIRED, "")
    if found["format"] != FORMAT:
        raise ValueError(
            f"[format] is {found['format']!r}; this version of recbole_llm reads format {FORMAT}"
        )
    found = {**found, **{k: found.get(k) if found.get(k) is not None else v for k, v in _OPTIONAL.items()}}
    for key in (
        "metrics",
        "smaller_is_better",
        "seeds",
        "models",
        "differences",
        "failed",
        "sentences",
        "notes",
        "prompts",
    ):
        if not isinstance(found[key], list):
            raise ValueError(f"[{key}] must be a list")
    for key in ("task", "dataset", "created", "machine", "device", "command", "leading"):
        if not isinstance(found[key], str):
            raise ValueError(f"[{key}] must be a text, but is {found[key]!r}")
    _need(found["versions"], (), "versions")
    if found["leading"] not in found["metrics"]:
        raise ValueError(
            f"[leading] is {found['leading']!r}, which is not among [metrics] {found['metrics']}"
        )
    _need(found["rows"], ("train", "valid", "test"), "rows")
    _numbers(found["rows"], tuple(found["rows"]), "rows")
    for i, model in enumerate(found["models"]):
        _check_model(model, f"models[{i}]")
    for i, difference in enumerate(found["differences"]):
        _need(difference, ("a", "b", "metric", "value"), f"differences[{i}]")
        _numbers(difference, ("value", *_BOUNDS, "p", "p_holm"), f"differences[{i}]")
    for i, failure in enumerate(found["failed"]):
        _need(failure, ("name", "seed", "error"), f"failed[{i}]")
    for i, prompt in enumerate(found["prompts"]):
        _need(prompt, ("model", "user", "item", "text"), f"prompts[{i}]")
        scores = prompt.get("scores") or {}
        _numbers(scores, tuple(scores), f"prompts[{i}].scores")
    if found["gates"] is not None:
        _check_gates(found["gates"])
    return found


def clean(text: Any, lines: bool = False) -> str:
    """`text` on one line (with `lines`: on its own lines), without characters that steer a terminal or a page.

    Control characters, halves of surrogates and marks that turn the writing direction become U+FFFD.
    """
    kept = [
        c if c in "\n\t" or not (c in _BIDI or unicodedata.category(c) in ("Cc", "Cs")) else "\ufffd"
        for c in str(text).replace("\r\n", "\n").replace("\r", "\n")
    ]
    return "".join(kept) if lines else " ".join("".join(kept).split())


def metric_title(metric: str) -> str:
    """'gauc' -> 'GAUC', 'ndcg@5' -> 'NDCG@5'."""
    return _TITLES.get(metric, metric.upper())


def value_text(value: float | None, sign: bool = False) -> str:
    """A metric with four decimals, a dash for None."""
    if value is None:
        return DASH
    return f"{value:{'+' if sign else ''}.4f}".replace("-", MINUS)


def quantity_text(value: float | None) -> str:
    """A cost: whole from 100 on, three digits below; a dash for None."""
    if value is None:
        return DASH
    size = abs(value)
    return (f"{value:,.0f}" if size >= 100 or value == int(value) else f"{value:.3g}").replace("-", MINUS)


def p_text(value: float | None) -> str:
    """A probability with four decimals, '<0.0001' below."""
    return DASH if value is None else "<0.0001" if value < 1e-4 else f"{value:.4f}"


def interval_text(holder: Mapping[str, Any], suffix: str = "", sign: bool = False) -> str:
    """'[0.7301, 0.7520]', empty where a bound is null."""
    low, high = holder.get("low" + suffix), holder.get("high" + suffix)
    return "" if low is None or high is None else f"[{value_text(low, sign)}, {value_text(high, sign)}]"


def estimate_of(model: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """The model's entry for the metric; one without a mean where there is none."""
    return model["metrics"].get(metric) or {"mean": None, "reason": "not computed"}


def spread_of(model: Mapping[str, Any], metric: str) -> float | None:
    """The standard deviation over seeds, None with a single seed."""
    return estimate_of(model, metric).get("sd") if len(model["seeds"]) > 1 else None


def estimate_text(model: Mapping[str, Any], metric: str) -> str:
    """'0.7412 ± 0.0021'."""
    spread = spread_of(model, metric)
    return value_text(estimate_of(model, metric)["mean"]) + (
        "" if spread is None else f" ± {value_text(spread)}"
    )


def better_first(comparison: Mapping[str, Any], metric: str) -> list[int]:
    """Places of the models that have the metric, the best first."""
    sign = 1 if metric in comparison["smaller_is_better"] else -1
    means = [estimate_of(model, metric)["mean"] for model in comparison["models"]]
    return sorted((i for i, mean in enumerate(means) if mean is not None), key=lambda i: sign * means[i])


def metrics_table(comparison: Mapping[str, Any], all_intervals: bool = False) -> Table:
    """A line for each model: seeds and metrics, with the interval of the leading one or of all."""
    metrics, leading = comparison["metrics"], comparison["leading"]
    best = {}
    for metric in metrics:
        order = better_first(comparison, metric)
        if len(order) > 1:
            best[metric] = value_text(estimate_of(comparison["models"][order[0]], metric)["mean"])
    rows = []
    for model in comparison["models"]:
        row = [Cell(clean(model["name"])), Cell(str(len(model["seeds"])), number=len(model["seeds"]))]
        for metric in metrics:
            estimate = estimate_of(model, metric)
            mean, wanted = estimate["mean"], all_intervals or metric == leading
            interval = interval_text(estimate) if wanted and mean is not None else ""
            note = estimate.get("reason") if mean is None or (wanted and not interval) else None
            row.append(
                Cell(
                    estimate_text(model, metric),
                    interval,
                    clean(note) if note else None,
                    mean is not None and value_text(mean) == best.get(metric),
                    mean,
                )  # fmt: skip
            )
        rows.append(tuple(row))
    return Table(
        "Metrics",
        ("model", "seeds", *(_column_title(comparison, m, all_intervals) for m in metrics)),
        tuple(rows),
    )


def differences_table(comparison: Mapping[str, Any]) -> Table:
    """A line for each difference, with BCa intervals and tests where any has them."""
    found = comparison["differences"]
    bca = any(interval_text(d, "_bca") for d in found)
    tests = any(d.get("test") for d in found)
    head = [
        "difference",
        "metric",
        "value",
        "95% interval",
        *(["BCa interval"] if bca else []),
        "p",
        "p (Holm)",
    ]
    rows = []
    for d in found:
        note = clean(d["reason"]) if d.get("reason") else None
        interval = interval_text(d, sign=True)
        row = [
            Cell(f"{clean(d['a'])} {MINUS} {clean(d['b'])}"),
            Cell(_marked(comparison, d["metric"])),
            Cell(
                value_text(d["value"], sign=True),
                note=note if d["value"] is None else None,
                number=d["value"],
            ),
            Cell(interval or DASH, note=None if interval else note, number=d.get("low")),
        ]
        if bca:
            row.append(Cell(interval_text(d, "_bca", sign=True) or DASH, number=d.get("low_bca")))
        for key in ("p", "p_holm"):
            row.append(Cell(p_text(d.get(key)), note=note if d.get(key) is None else None, number=d.get(key)))
        rows.append((*row, *([Cell(clean(d.get("test") or DASH))] if tests else [])))
    return Table("Differences", (*head, *(["test"] if tests else [])), tuple(rows), (0, 1, len(head)))


def costs_table(comparison: Mapping[str, Any]) -> Table | None:
    """A line for each model with the costs that any of them has; None where nothing is known."""
    costs = [model.get("cost") or {} for model in comparison["models"]]
    known = [key for key in COSTS if any(cost.get(key) is not None for cost in costs)]
    if not known:
        return None
    rows = [
        (Cell(clean(model["name"])), *(Cell(quantity_text(cost.get(k)), number=cost.get(k)) for k in known))
        for model, cost in zip(comparison["models"], costs, strict=True)
    ]
    return Table("Cost", ("model", *(COSTS[key] for key in known)), tuple(rows))


def facts(comparison: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the head of a report says: name and text of rows, users, seeds, device and the like."""
    rows = comparison["rows"]
    few, available, users = (rows.get(key) for key in ("few_shot", "test_available", "users"))
    test = _count(rows["test"])
    if available and rows["test"] is not None and available > rows["test"]:
        test += f" of {_count(available)}, a seeded draw"
    training = _count(rows["train"]) + (
        f"; {_count(few)} of them for the language models" if few is not None else ""
    )
    versions = ", ".join(
        f"{package} {version}" for package, version in comparison["versions"].items() if version
    )
    pairs = (
        ("training rows", training),
        ("validation rows", _count(rows["valid"])),
        ("test rows", test),
        ("users", None if users is None else _count(users)),
        ("seeds", ", ".join(map(str, comparison["seeds"]))),
        ("machine", comparison["machine"]),
        ("device", comparison["device"]),
        ("created", comparison["created"].replace("T", " ").replace("+00:00", " UTC")),
        ("versions", versions),
    )
    return [(name, clean(text)) for name, text in pairs if text]


def failure_lines(comparison: Mapping[str, Any]) -> list[str]:
    """'iLoRA, seed 2021: out of memory'."""
    return [
        clean(f"{f['name']}{'' if f['seed'] is None else ', seed ' + str(f['seed'])}: {f['error']}")
        for f in comparison["failed"]
    ]


def _count(value: float | None) -> str:
    return DASH if value is None else f"{value:,}"


def _marked(comparison: Mapping[str, Any], metric: str) -> str:
    return clean(metric_title(metric)) + (" ↓" if metric in comparison["smaller_is_better"] else "")


def _column_title(comparison: Mapping[str, Any], metric: str, all_intervals: bool) -> str:
    interval = metric == comparison["leading"] and not all_intervals
    return _marked(comparison, metric) + (" [95% interval]" if interval else "")


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"[{where}] is {value}, which JSON cannot hold; give null and a reason")
        return value
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # halves of surrogates cannot be written
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}".lstrip(".")) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise ValueError(f"[{where}] is a {type(value).__name__}, which JSON cannot hold")


def _need(holder: Any, keys: Sequence[str], where: str) -> None:
    if not isinstance(holder, dict):
        raise ValueError(f"[{where}] must be a mapping, but is {holder!r}")
    for key in keys:
        if key not in holder:
            raise ValueError(f"the comparison lacks the key [{where + '.' if where else ''}{key}]")


def _numbers(holder: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    for key in keys:
        value = holder.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"[{where}.{key}] must be a number or null, but is {value!r}")


def _list_of_numbers(holder: Mapping[str, Any], key: str, where: str) -> None:
    _numbers(dict(enumerate(holder[key])), range(len(holder[key])), f"{where}.{key}")


def _check_model(model: Any, where: str) -> None:
    _need(model, ("name", "kind", "seeds", "metrics"), where)
    if not isinstance(model["seeds"], list):
        raise ValueError(f"[{where}.seeds] must be a list")
    _need(model["metrics"], (), f"{where}.metrics")
    for metric, estimate in model["metrics"].items():
        place = f"{where}.metrics.{metric}"
        _need(estimate, ("mean",), place)
        _numbers(estimate, ("mean", "sd", *_BOUNDS), place)
        if estimate.get("values") is not None:
            _list_of_numbers(estimate, "values", place)
    cost = model.get("cost") or {}
    _numbers(cost, tuple(cost), f"{where}.cost")
    curve = model.get("calibration")
    if curve:
        place = f"{where}.calibration"
        _need(curve, ("predicted", "observed", "counts"), place)
        _numbers(curve, ("ece",), place)
        for key in ("predicted", "observed", "counts"):
            _list_of_numbers(curve, key, place)
            if len(curve[key]) != len(curve["predicted"]):
                raise ValueError(
                    f"[{place}]: {len(curve[key])} {key} for {len(curve['predicted'])} predicted"
                )
    for name, groups in (model.get("groups") or {}).items():
        for i, group in enumerate(groups or []):
            _need(group, ("name", "rows", "value"), f"{where}.groups.{name}[{i}]")
            _numbers(group, ("rows", "value"), f"{where}.groups.{name}[{i}]")


def _check_gates(gates: Any) -> None:
    _need(gates, ("model", "experts", "users", "values"), "gates")
    n = len(gates["users"])
    for key, width in (("values", gates["experts"]), ("coordinates", 2), ("profile", None)):
        found = gates.get(key)
        if found is None:
            continue
        if len(found) != n:
            raise ValueError(f"[gates.{key}] has {len(found)} entries for {n} users")
        for i, row in enumerate(found if width is not None else []):
            if len(row) != width:
                raise ValueError(f"[gates.{key}[{i}]] has {len(row)} numbers instead of {width}")
            if any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in row):
                raise ValueError(f"[gates.{key}[{i}]] must hold numbers, but is {row!r}")
