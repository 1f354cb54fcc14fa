"""The tables of a comparison, before they become text, Markdown, LaTeX or HTML; and what a comparison holds.

`compare.json`, format 1, as :func:`recbole_llm.comparison.analysis.build_comparison` makes it. It holds everything; the
other files are views of it.

    format              1
    task                "ctr" or "next_item"
    dataset, created, machine, device, command
                        text; created is the time of writing, ISO
    versions            {package: version or null}
    metrics             ["auc", "logloss", ..] or ["hr@1", "ndcg@5", ..], in the order of the columns
    leading             the one of them that plots, tests and key findings are about
    smaller_is_better   those of them where less is better
    rows                {train, few_shot or null, valid, test, test_available, users}: numbers of samples and users
    seeds               [2020, ..]
    models              [{name, kind: llm|classical|reference, seeds, label: how reports call it,
                          metrics: {auc: {mean, sd, low, high, low_bca, high_bca, values, reason}, ..},
                          cost: {train_seconds, test_seconds, samples_per_second, tokens_per_second, tokens,
                                 peak_memory_gib, trained_parameters},
                          calibration: {predicted, observed, counts, ece} or null,
                          groups: {"history length": [{name, rows, value, reason}, ..], ..},
                          paths: [..]}, ..]
                        reason says why the mean or the bounds are null
    differences         [{a, b, metric, value, low, high, low_bca, high_bca, p, p_holm, test, reason}, ..]: a minus b
    failed              [{name, seed, error}, ..]
    sentences, notes    [text, ..]: key findings, and remarks
    gates               {model, experts: K, users, values [users, K], coordinates [users, 2], profile_field, profile}
                        or null; the last two may be null
    prompts             [{model, user, item, text, label, scores: {model: score}}, ..]

Numbers that are not known are null.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recbole_llm.experiment.result import metric_title

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


def clean(text: Any, lines: bool = False) -> str:
    """`text` on one line (with `lines`: on its own lines), without characters that steer a terminal or a page.

    Control characters, unpaired surrogates and marks that change the writing direction become U+FFFD.
    """
    kept = "".join(
        c if c in "\n\t" or not (c in _STEERING or unicodedata.category(c) in ("Cc", "Cs")) else "\ufffd"
        for c in str(text).replace("\r\n", "\n").replace("\r", "\n")
    )
    return kept if lines else " ".join(kept.split())


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


def estimate_text(model: Mapping[str, Any], metric: str) -> str:
    """'0.7412 ± 0.0021', without the standard deviation for a single seed."""
    estimate = model["metrics"][metric]
    spread = estimate["sd"] if len(model["seeds"]) > 1 else None
    return value_text(estimate["mean"]) + ("" if spread is None else f" ± {value_text(spread)}")


def best_first(comparison: Mapping[str, Any], metric: str) -> list[dict[str, Any]]:
    """The models that have the metric, the best first."""
    models = [model for model in comparison["models"] if model["metrics"][metric]["mean"] is not None]
    sign = 1 if metric in comparison["smaller_is_better"] else -1
    return sorted(models, key=lambda model: sign * model["metrics"][metric]["mean"])


def number_cell(value: float | None, text: str | None = None, note: str | None = None) -> Cell:
    """A number; `note` says why it is missing."""
    text = value_text(value) if text is None else text
    return Cell(text, note=note if value is None else None, number=value)


def name_cell(model: Mapping[str, Any]) -> Cell:
    """A model's label, with its full name as a footnote where the two differ."""
    label, name = model["label"], model["name"]
    return Cell(label, note=None if label == name else f"{label}: {name}", kind=model["kind"])


def metrics_table(comparison: Mapping[str, Any], all_intervals: bool = False) -> Table:
    """A line for each model: seeds and metrics, with the interval of the leading metric or of all."""
    metrics, leading = comparison["metrics"], comparison["leading"]
    order = {metric: best_first(comparison, metric) for metric in metrics}
    best = {m: value_text(found[0]["metrics"][m]["mean"]) for m, found in order.items() if len(found) > 1}
    rows = []
    for model in comparison["models"]:
        row = [name_cell(model), Cell(str(len(model["seeds"])), number=len(model["seeds"]))]
        for metric in metrics:
            estimate = model["metrics"][metric]
            mean, wanted = estimate["mean"], all_intervals or metric == leading
            interval = interval_text(estimate) if wanted and mean is not None else ""
            note = estimate["reason"] if mean is None or (wanted and not interval) else None
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
        estimate = model["metrics"][leading]
        values = dict(zip(model["seeds"], estimate["values"], strict=True))
        bca = Cell(interval_text(estimate, "_bca") or DASH, number=estimate["low_bca"])
        rows.append((name_cell(model), *(number_cell(values.get(seed)) for seed in seeds), bca))
    head = ("model", *(f"seed {seed}" for seed in seeds), "BCa interval")
    return Table(f"{metric_title(leading)} by seed", head, tuple(rows))


def differences_table(comparison: Mapping[str, Any]) -> Table:
    """A line for each difference, with BCa intervals and tests where any has them."""
    found, labels = comparison["differences"], {m["name"]: m["label"] for m in comparison["models"]}
    bca, tests = any(interval_text(d, "_bca") for d in found), any(d["test"] for d in found)
    rows = []
    for d in found:
        interval, note = interval_text(d, sign=True), d["reason"]
        a, b = (labels.get(d[side], d[side]) for side in "ab")
        row = [Cell(f"{a} {MINUS} {b}"), Cell(marked(comparison, d["metric"]))]
        row += [number_cell(d["value"], value_text(d["value"], sign=True), note)]
        row += [Cell(interval or DASH, note=None if interval else note, number=d["low"])]
        row += [Cell(interval_text(d, "_bca", sign=True) or DASH, number=d["low_bca"])] if bca else []
        row += [number_cell(d[key], p_text(d[key]), note) for key in ("p", "p_holm")]
        rows.append((*row, *([Cell(d["test"] or DASH)] if tests else [])))
    head = ["difference", "metric", "value", "95% CI", *(["BCa interval"] if bca else []), "p", "p (Holm)"]
    return Table("Differences", (*head, *(["test"] if tests else [])), tuple(rows), (0, 1, len(head)))


def costs_table(comparison: Mapping[str, Any]) -> Table:
    """A line for each model with the costs that any of them has; without lines where nothing is known."""
    models = comparison["models"]
    known = [key for key in COSTS if any(model["cost"][key] is not None for model in models)]
    rows = []
    for model in models if known else ():
        values = [model["cost"][key] for key in known]
        rows.append((name_cell(model), *(number_cell(value, quantity_text(value)) for value in values)))
    return Table("Cost", ("model", *(COSTS[key] for key in known)), tuple(rows))


def calibration_table(models: Sequence[Mapping[str, Any]]) -> Table:
    """Expected calibration error and the reliability curve, bin by bin, of models that have them."""
    rows = []
    for model in models:
        curve = model["calibration"]
        bins = zip(curve["predicted"], curve["observed"], curve["counts"], strict=True)
        text = "; ".join(f"{p:.3f} / {o:.3f} ({n:,})" for p, o, n in bins)
        rows.append((name_cell(model), number_cell(curve["ece"]), Cell(text)))
    head = ("model", "calibration error", "predicted / observed (samples), by bin")
    return Table("Reliability", head, tuple(rows), (0, 2))


def group_sizes(comparison: Mapping[str, Any], name: str) -> dict[str, str]:
    """The groups of one kind, and the number of samples of each in words."""
    groups = [group for model in comparison["models"] for group in model["groups"].get(name, ())]
    return {group["name"]: f"{group['rows']:,} samples" for group in groups}


def group_table(comparison: Mapping[str, Any], name: str) -> Table:
    """The leading metric of every model in the groups of one kind, the best models first."""
    order = best_first(comparison, comparison["leading"])
    order += [model for model in comparison["models"] if model not in order]
    sizes, rows = group_sizes(comparison, name), []
    for model in order:
        groups = model["groups"].get(name)
        if groups:
            rows.append((name_cell(model), *(number_cell(g["value"], note=g["reason"]) for g in groups)))
    head = ("model", *(f"{group} ({size})" for group, size in sizes.items()))
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
    scores = prompt["scores"].items()
    rows = tuple((Cell(labels.get(name, name)), number_cell(score)) for name, score in scores)
    return Table("Scores", ("model", "score"), rows)


def facts(comparison: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The head of a report: name and text of samples, users, seeds, device and the like."""
    rows, versions = comparison["rows"], comparison["versions"]
    test, training = f"{rows['test']:,}", f"{rows['train']:,}"
    if rows["test_available"] > rows["test"]:
        test += f" of {rows['test_available']:,}, a seeded draw"
    if rows["few_shot"] is not None:
        training += f"; {rows['few_shot']:,} of them for the language models"
    pairs = (
        ("training samples", training),
        ("validation samples", f"{rows['valid']:,}"),
        ("test samples", test),
        ("users", f"{rows['users']:,}"),
        ("seeds", ", ".join(map(str, comparison["seeds"]))),
        ("machine", comparison["machine"]),
        ("device", comparison["device"]),
        ("created", comparison["created"].replace("T", " ").replace("+00:00", " UTC")),
        ("versions", ", ".join(f"{package} {version}" for package, version in versions.items() if version)),
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
