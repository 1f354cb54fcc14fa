"""The tables of a comparison, before they become text, Markdown, LaTeX or HTML; and what a comparison holds.

`compare.json`, format 1. It holds everything; the other files are views of it.

    format              1
    task                "ctr" or "next_item"
    dataset, created, machine, device, command
                        text; created is the time of writing, ISO
    versions            {package: version or null}
    metrics             ["auc", "logloss", ..] or ["hr@1", "ndcg@5", ..], in the order of the columns
    leading             the one of them that plots, tests and key findings are about
    smaller_is_better   those of them where less is better
    rows                {train, valid, test[, few_shot, test_available, users]}: numbers of samples and users
    seeds               [2020, ..]
    models              [{name, kind: llm|classical|reference, seeds,
                          metrics: {auc: {mean[, sd, low, high, low_bca, high_bca, values, reason]}, ..}
                          [, label: how reports call it
                           , cost: {train_seconds, test_seconds, samples_per_second, tokens_per_second, tokens,
                                    peak_memory_gib, trained_parameters}
                           , calibration: {predicted, observed, counts, ece}
                           , groups: {"history length": [{name, rows, value[, reason]}, ..], ..}
                           , changes: {key: value}, paths: [..]]}, ..]
                        reason says why the mean or the bounds are null
    differences         [{a, b, metric, value[, low, high, low_bca, high_bca, p, p_holm, test, reason]}, ..]: a minus b
    failed              [{name, seed, error}, ..]
    [sentences, notes]  [text, ..]: key findings, and remarks
    [gates]             {model, experts: K, users, values [users, K], coordinates [users, 2], profile_field, profile}
    [prompts]           [{model, user, item, text[, label, scores: {model: score}]}, ..]

Keys in brackets may be null or missing.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recbole_llm.comparison.controls import label_of

FORMAT = 1
DASH = "–"
MINUS = "−"
COSTS = {
    "train_seconds": "training, s",
    "test_seconds": "test, s",
    "samples_per_second": "samples/s",
    "tokens_per_second": "tokens/s",
    "tokens": "tokens",
    "peak_memory_gib": "peak memory, GiB",
    "trained_parameters": "trained parameters",
}
TASKS = {"ctr": "click-through rate", "next_item": "next item"}
_TITLES = {"auc": "AUC", "logloss": "LogLoss", "acc": "ACC", "gauc": "GAUC"}
_REQUIRED = (
    "format", "task", "dataset", "created", "versions", "machine", "device", "command", "metrics", "leading",
    "smaller_is_better", "rows", "seeds", "models", "differences", "failed",
)  # fmt: skip
_OPTIONAL: dict[str, Any] = {"sentences": [], "notes": [], "gates": None, "prompts": []}
_STEERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufffe\uffff")


@dataclass(frozen=True)
class Cell:
    """One entry of a table.

    Attributes:
        interval: "[0.7301, 0.7520]" or empty.
        note: a footnote: why the text or the interval is missing, or what a label stands for.
        best: whether no other model is better, as printed.
        number: to sort by; None for text and unknown values.
        kind: of the model, below its name in HTML.
    """

    text: str
    interval: str = ""
    note: str | None = None
    best: bool = False
    number: float | None = None
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """Lines of cells below a head; the columns in [words] are text, the others numbers."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    words: tuple[int, ...] = (0,)


class Footnotes:
    """Numbers notes in order of appearance, equal ones once; iterate over (number, note)."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, cell: Cell) -> int:
        """The number of the cell's note, 0 if it has none."""
        return self._numbers.setdefault(cell.note, len(self._numbers) + 1) if cell.note else 0

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return iter([(number, note) for note, number in self._numbers.items()])


def checked(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """A plain copy of `comparison`, as JSON holds it, with every model's `label` and all optional keys.

    Raises:
        ValueError: for another format, a missing key, or what JSON cannot hold (numbers that are not finite).
    """
    if missing := [key for key in _REQUIRED if key not in comparison]:
        raise ValueError(f"the comparison lacks the key [{missing[0]}]")
    if comparison["format"] != FORMAT:
        raise ValueError(
            f"[format] is {comparison['format']!r}; this version of recbole_llm reads format {FORMAT}"
        )
    try:
        text = json.dumps(comparison, default=_plain, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the comparison cannot be written as JSON: {error}") from error
    found = json.loads(text.encode("utf-8", "replace"))  # unpaired surrogates cannot be written
    found |= {key: found.get(key) or value for key, value in _OPTIONAL.items()}
    for model in found["models"]:
        if lacking := [key for key in ("name", "kind", "seeds", "metrics") if key not in model]:
            raise ValueError(f"a model of the comparison lacks the key [{lacking[0]}]")
        model.update(
            {key: model.get(key) for key in ("changes", "paths")},
            label=model.get("label") or label_of(model["name"]),
        )
    return found


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # NumPy
        return value.tolist()
    return os.fspath(value)  # a TypeError for what is no path either


def clean(text: Any, lines: bool = False) -> str:
    """`text` on one line (with `lines`: on its own lines), without characters that steer a terminal or a page.

    Control characters, unpaired surrogates and marks that change the writing direction become U+FFFD.
    """
    kept = "".join(
        c if c in "\n\t" or not (c in _STEERING or unicodedata.category(c) in ("Cc", "Cs")) else "\ufffd"
        for c in str(text).replace("\r\n", "\n").replace("\r", "\n")
    )
    return kept if lines else " ".join(kept.split())


def metric_title(metric: str) -> str:
    """'gauc' -> 'GAUC', 'ndcg@5' -> 'NDCG@5'."""
    return _TITLES.get(metric, metric.upper())


def value_text(value: float | None, sign: bool = False) -> str:
    """A metric with four decimals, a dash for None."""
    return DASH if value is None else f"{value:{'+' if sign else ''}.4f}".replace("-", MINUS)


def quantity_text(value: float | None) -> str:
    """A cost: whole from 100 on, three digits below; a dash for None."""
    if value is None:
        return DASH
    return (f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}").replace(
        "-", MINUS
    )


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


def estimate_text(model: Mapping[str, Any], metric: str) -> str:
    """'0.7412 ± 0.0021', without the standard deviation for a single seed."""
    estimate = estimate_of(model, metric)
    spread = estimate.get("sd") if len(model["seeds"]) > 1 else None
    return value_text(estimate["mean"]) + ("" if spread is None else f" ± {value_text(spread)}")


def best_first(comparison: Mapping[str, Any], metric: str) -> list[dict[str, Any]]:
    """The models that have the metric, the best first."""
    models = [m for m in comparison["models"] if estimate_of(m, metric)["mean"] is not None]
    sign = 1 if metric in comparison["smaller_is_better"] else -1
    return sorted(models, key=lambda model: sign * estimate_of(model, metric)["mean"])


def number_cell(value: float | None, text: str | None = None, note: str | None = None) -> Cell:
    """A number; `note` says why it is missing."""
    return Cell(
        value_text(value) if text is None else text, note=note if value is None else None, number=value
    )


def name_cell(model: Mapping[str, Any]) -> Cell:
    """A model's label, with its full name as a footnote where the two differ."""
    same = model["label"] == model["name"]
    return Cell(
        model["label"], note=None if same else f"{model['label']}: {model['name']}", kind=model["kind"]
    )


def metrics_table(comparison: Mapping[str, Any], all_intervals: bool = False) -> Table:
    """A line for each model: seeds and metrics, with the interval of the leading metric or of all."""
    metrics, leading = comparison["metrics"], comparison["leading"]
    order = {metric: best_first(comparison, metric) for metric in metrics}
    best = {m: value_text(estimate_of(found[0], m)["mean"]) for m, found in order.items() if len(found) > 1}
    rows = []
    for model in comparison["models"]:
        row = [name_cell(model), Cell(str(len(model["seeds"])), number=len(model["seeds"]))]
        for metric in metrics:
            estimate = estimate_of(model, metric)
            mean, wanted = estimate["mean"], all_intervals or metric == leading
            interval = interval_text(estimate) if wanted and mean is not None else ""
            note = estimate.get("reason") if mean is None or (wanted and not interval) else None
            is_best = mean is not None and value_text(mean) == best.get(metric)
            row.append(Cell(estimate_text(model, metric), interval, note, is_best, mean))
        rows.append(tuple(row))
    head = (
        marked(comparison, m) + (" [95% CI]" if m == leading and not all_intervals else "") for m in metrics
    )
    return Table("Metrics", ("model", "seeds", *head), tuple(rows))


def seeds_table(comparison: Mapping[str, Any]) -> Table:
    """The leading metric of every seed, and BCa intervals."""
    leading, seeds, rows = comparison["leading"], comparison["seeds"], []
    for model in comparison["models"]:
        estimate = estimate_of(model, leading)
        values = dict(zip(model["seeds"], estimate.get("values") or (), strict=False))
        bca = Cell(interval_text(estimate, "_bca") or DASH, number=estimate.get("low_bca"))
        rows.append((name_cell(model), *(number_cell(values.get(seed)) for seed in seeds), bca))
    head = ("model", *(f"seed {seed}" for seed in seeds), "BCa interval")
    return Table(f"{metric_title(leading)} by seed", head, tuple(rows))


def differences_table(comparison: Mapping[str, Any]) -> Table:
    """A line for each difference, with BCa intervals and tests where any has them."""
    found, labels = comparison["differences"], {m["name"]: m["label"] for m in comparison["models"]}
    bca, tests = any(interval_text(d, "_bca") for d in found), any(d.get("test") for d in found)
    rows = []
    for d in found:
        interval, note = interval_text(d, sign=True), d.get("reason")
        a, b = (labels.get(d[side], d[side]) for side in "ab")
        row = [Cell(f"{a} {MINUS} {b}"), Cell(marked(comparison, d["metric"]))]
        row += [number_cell(d["value"], value_text(d["value"], sign=True), note)]
        row += [Cell(interval or DASH, note=None if interval else note, number=d.get("low"))]
        row += [Cell(interval_text(d, "_bca", sign=True) or DASH, number=d.get("low_bca"))] if bca else []
        row += [number_cell(d.get(key), p_text(d.get(key)), note) for key in ("p", "p_holm")]
        rows.append((*row, *([Cell(d.get("test") or DASH)] if tests else [])))
    head = ["difference", "metric", "value", "95% CI", *(["BCa interval"] if bca else []), "p", "p (Holm)"]
    return Table("Differences", (*head, *(["test"] if tests else [])), tuple(rows), (0, 1, len(head)))


def costs_table(comparison: Mapping[str, Any]) -> Table:
    """A line for each model with the costs that any of them has; without lines where nothing is known."""
    models = comparison["models"]
    known = [key for key in COSTS if any((m.get("cost") or {}).get(key) is not None for m in models)]
    rows = []
    for model in models if known else ():
        values = [(model.get("cost") or {}).get(key) for key in known]
        rows.append((name_cell(model), *(number_cell(value, quantity_text(value)) for value in values)))
    return Table("Cost", ("model", *(COSTS[key] for key in known)), tuple(rows))


def calibration_table(models: Sequence[Mapping[str, Any]]) -> Table:
    """Expected calibration error and the reliability curve, bin by bin, of models that have them."""
    rows = []
    for model in models:
        curve = model["calibration"]
        bins = zip(curve["predicted"], curve["observed"], curve["counts"], strict=True)
        text = "; ".join(f"{p:.3f} / {o:.3f} ({n:,})" for p, o, n in bins)
        rows.append((name_cell(model), number_cell(curve.get("ece")), Cell(text)))
    head = ("model", "calibration error", "predicted / observed (samples), by bin")
    return Table("Reliability", head, tuple(rows), (0, 2))


def group_sizes(comparison: Mapping[str, Any], name: str) -> dict[str, str]:
    """The groups of one kind, and "1,200 samples" where their number is known."""
    groups = [
        group for model in comparison["models"] for group in (model.get("groups") or {}).get(name) or ()
    ]
    return {group["name"]: "" if group["rows"] is None else f"{group['rows']:,} samples" for group in groups}


def group_table(comparison: Mapping[str, Any], name: str) -> Table:
    """The leading metric of every model in the groups of one kind, the best models first."""
    order = best_first(comparison, comparison["leading"])
    order += [model for model in comparison["models"] if model not in order]
    sizes, rows = group_sizes(comparison, name), []
    for model in order:
        values = {group["name"]: group for group in (model.get("groups") or {}).get(name) or ()}
        cells = [values.get(group) or {"value": None} for group in sizes]
        if values:
            rows.append((name_cell(model), *(number_cell(c["value"], note=c.get("reason")) for c in cells)))
    head = ("model", *(f"{group} ({size})" if size else group for group, size in sizes.items()))
    return Table(f"{metric_title(comparison['leading'])} by {name}", head, tuple(rows))


def values_by_group(comparison: Mapping[str, Any], name: str) -> dict[str, list[float | None]]:
    """By label, the values in each group of the models that have any, the best models first."""
    values = {row[0].text: [cell.number for cell in row[1:]] for row in group_table(comparison, name).rows}
    return {label: found for label, found in values.items() if any(value is not None for value in found)}


def gates_table(gates: Mapping[str, Any], order: Sequence[int]) -> Table:
    """The mixture weights of users, in the given order."""
    rows = [
        (Cell(str(gates["users"][i])), *(number_cell(value, f"{value:.3f}") for value in gates["values"][i]))
        for i in order
    ]
    return Table("Gates", ("user", *(f"expert {j + 1}" for j in range(gates["experts"]))), tuple(rows))


def scores_table(prompt: Mapping[str, Any], labels: Mapping[str, str]) -> Table:
    """Every model's score of an example prompt."""
    scores = (prompt.get("scores") or {}).items()
    rows = tuple((Cell(labels.get(name, name)), number_cell(score)) for name, score in scores)
    return Table("Scores", ("model", "score"), rows)


def facts(comparison: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The head of a report: name and text of samples, users, seeds, device and the like."""
    rows = comparison["rows"]
    few, available, users = (rows.get(key) for key in ("few_shot", "test_available", "users"))
    test, training = _count(rows["test"]), _count(rows["train"])
    if available and rows["test"] is not None and available > rows["test"]:
        test += f" of {_count(available)}, a seeded draw"
    if few is not None:
        training += f"; {_count(few)} of them for the language models"
    versions = ", ".join(
        f"{package} {version}" for package, version in comparison["versions"].items() if version
    )
    pairs = (
        ("training samples", training),
        ("validation samples", _count(rows["valid"])),
        ("test samples", test),
        ("users", None if users is None else _count(users)),
        ("seeds", ", ".join(map(str, comparison["seeds"]))),
        ("machine", comparison["machine"]),
        ("device", comparison["device"]),
        ("created", comparison["created"].replace("T", " ").replace("+00:00", " UTC")),
        ("versions", versions),
    )
    return [(name, text) for name, text in pairs if text]


def failure_lines(comparison: Mapping[str, Any]) -> list[str]:
    """'iLoRA, seed 2021: out of memory'."""
    return [
        f"{f['name']}{'' if f['seed'] is None else ', seed ' + str(f['seed'])}: {f['error']}"
        for f in comparison["failed"]
    ]


def marked(comparison: Mapping[str, Any], metric: str) -> str:
    """The metric's title, with an arrow where less is better."""
    return metric_title(metric) + (" ↓" if metric in comparison["smaller_is_better"] else "")


def _count(value: float | None) -> str:
    return DASH if value is None else f"{value:,}"
