"""The tables of a comparison, before they become text, Markdown, LaTeX or HTML.

`found` is a comparison's dict, the content of `compare.json`, which docs/comparisons.md describes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recbole_llm.experiment.result import metric_title
from recbole_llm.experiment.table import DASH, MINUS, interval_text, value_text

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
BINS = "predicted / observed (samples), by bin"
TEXTS = ("model", "difference", "metric", "test", "user", BINS)
KINDS = {"llm": "language model", "classical": "conventional recommender", "reference": "reference"}
SERIES = 6
"""As many series are distinguished in one chart."""
_STEERING = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Cell:
    """One entry of a table.

    Attributes:
        below: what stands below the text: an interval, "[0.7301, 0.7520]", or a model's kind.
        note: a footnote: why the text or the interval is missing, or what a label stands for.
        best: whether no other model is better, as printed.
        number: to sort by; None for text and unknown values.
    """

    text: str
    below: str = ""
    note: str | None = None
    best: bool = False
    number: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells by the name of their column; the columns in ``TEXTS`` hold text, all others numbers."""

    title: str
    rows: Sequence[Mapping[str, Cell]]

    @property
    def head(self) -> list[str]:
        return list(self.rows[0]) if self.rows else []

    @property
    def known(self) -> list[Mapping[str, Cell]]:
        """The rows with a number."""
        return [row for row in self.rows if any(cell.number is not None for cell in row.values())]


def mark(notes: dict[str, int], cell: Cell) -> int:
    """The number of the cell's note, 0 if it has none; `notes` numbers them in order of appearance, equal ones once."""
    return notes.setdefault(cell.note, len(notes) + 1) if cell.note else 0


def clean(text: Any, lines: bool = False) -> str:
    """`text` on one line (with `lines`: on its own lines), without characters that steer a terminal or a page.

    Control characters, unpaired surrogates and marks that change the writing direction become U+FFFD.
    """
    kept = _STEERING.sub("\ufffd", re.sub("\r\n?", "\n", str(text)))
    return kept if lines else " ".join(kept.split())


def quantity_text(value: float | None) -> str:
    """A cost: whole from 100 on, three digits below; a dash for None."""
    whole = value is not None and (abs(value) >= 100 or value == int(value))
    return value_text(value, ",.0f" if whole else ".3g")


def p_text(value: float | None) -> str:
    """A probability with four decimals, '<0.0001' below."""
    return "<0.0001" if value is not None and value < 1e-4 else value_text(value)


def estimate_text(model: Mapping[str, Any], metric: str) -> str:
    """'0.7412 ± 0.0021', without the standard deviation for a single seed."""
    estimate = model["metrics"][metric]
    spread = estimate["sd"] if len(model["seeds"]) > 1 else None
    return value_text(estimate["mean"]) + ("" if spread is None else f" ± {value_text(spread)}")


def marked(found: Mapping[str, Any], metric: str, mark: str = " ↓") -> str:
    """The metric's title, marked where less is better."""
    return metric_title(metric) + (mark if metric in found["smaller_is_better"] else "")


def best_first(found: Mapping[str, Any], metric: str) -> list[dict[str, Any]]:
    """The models that have the metric, the best first."""
    models = [model for model in found["models"] if model["metrics"][metric]["mean"] is not None]
    sign = 1 if metric in found["smaller_is_better"] else -1
    return sorted(models, key=lambda model: sign * model["metrics"][metric]["mean"])


def number_cell(value: float | None, text: str | None = None, note: str | None = None) -> Cell:
    """A number; `note` says why it is missing."""
    text = value_text(value) if text is None else text
    return Cell(text, note=note if value is None else None, number=value)


def name_cell(model: Mapping[str, Any], below: str = "") -> Cell:
    """A model's label, with its full name as a footnote where the two differ."""
    label, name = model["label"], model["name"]
    return Cell(label, below, note=None if label == name else f"{label}: {name}")


def metrics_table(found: Mapping[str, Any], all_intervals: bool = False) -> Table:
    """A line for each model: seeds and metrics; the interval of the leading metric, or the kind and all intervals."""
    rows = []
    for model in found["models"]:
        name = name_cell(model, KINDS[model["kind"]] if all_intervals else "")
        rows.append({"model": name, "seeds": number_cell(len(model["seeds"]), str(len(model["seeds"])))})
    for metric in found["metrics"]:
        wanted, order = all_intervals or metric == found["leading"], best_first(found, metric)
        best = value_text(order[0]["metrics"][metric]["mean"]) if len(order) > 1 else None
        title = marked(found, metric) + (" [95% CI]" if wanted and not all_intervals else "")
        for row, model in zip(rows, found["models"], strict=True):
            estimate = model["metrics"][metric]
            mean, interval = estimate["mean"], interval_text(estimate) if wanted else ""
            note = estimate["reason"] if mean is None or (wanted and not interval) else None
            is_best = value_text(mean) == best
            row[title] = Cell(estimate_text(model, metric), interval, note, is_best, mean)
    return Table("Metrics", rows)


def seeds_table(found: Mapping[str, Any]) -> Table:
    """The leading metric of every seed, and BCa intervals."""
    leading, rows = found["leading"], []
    for model in found["models"]:
        estimate = model["metrics"][leading]
        values = dict(zip(model["seeds"], estimate["values"], strict=True))
        row = {"model": name_cell(model)}
        row |= {f"seed {seed}": number_cell(values.get(seed)) for seed in found["seeds"]}
        row["BCa interval"] = Cell(interval_text(estimate, "_bca") or DASH, number=estimate["low_bca"])
        rows.append(row)
    return Table(f"{metric_title(leading)} by seed", rows)


def differences_table(found: Mapping[str, Any]) -> Table:
    """A line for each difference, with BCa intervals and tests where any has them."""
    labels, rows = {model["name"]: model["label"] for model in found["models"]}, []
    for d in found["differences"]:
        a, b = (labels.get(d[side], d[side]) for side in "ab")
        interval, reason = interval_text(d, form="+.4f"), d["reason"]
        row = {
            "difference": Cell(f"{a} {MINUS} {b}"),
            "metric": Cell(marked(found, d["metric"])),
            "value": number_cell(d["value"], value_text(d["value"], "+.4f"), reason),
            "95% CI": Cell(interval or DASH, note=None if interval else reason, number=d["low"]),
            "BCa interval": Cell(interval_text(d, "_bca", "+.4f") or DASH, number=d["low_bca"]),
            "p": number_cell(d["p"], p_text(d["p"]), reason),
            "p (Holm)": number_cell(d["p_holm"], p_text(d["p_holm"]), reason),
            "test": Cell(d["test"] or DASH),
        }
        rows.append(row)
    for name in ("BCa interval", "test"):
        if all(row[name].text == DASH for row in rows):
            rows = [{key: cell for key, cell in row.items() if key != name} for row in rows]
    return Table("Differences", rows)


def costs_table(found: Mapping[str, Any]) -> Table:
    """A line for each model with the costs that any of them has; without lines where nothing is known."""
    known = [key for key in COSTS if any(model["cost"][key] is not None for model in found["models"])]
    rows = []
    for model in found["models"] if known else ():
        costs = {COSTS[key]: model["cost"][key] for key in known}
        cells = {title: number_cell(value, quantity_text(value)) for title, value in costs.items()}
        rows.append({"model": name_cell(model), **cells})
    return Table("Cost", rows)


def calibration_table(models: Sequence[Mapping[str, Any]]) -> Table:
    """Expected calibration error and the reliability curve, bin by bin, of models that have them."""
    rows = []
    for model in models:
        curve = model["calibration"]
        bins = zip(curve["predicted"], curve["observed"], curve["counts"], strict=True)
        text = Cell("; ".join(f"{p:.3f} / {o:.3f} ({n:,})" for p, o, n in bins))
        rows.append({"model": name_cell(model), "calibration error": number_cell(curve["ece"]), BINS: text})
    return Table("Reliability", rows)


def group_table(found: Mapping[str, Any], name: str) -> Table:
    """The leading metric of every model in the groups of one kind, the best models first."""
    order, rows = best_first(found, found["leading"]), []
    for model in order + [model for model in found["models"] if model not in order]:
        row = {"model": name_cell(model)}
        for group in model["groups"].get(name, ()):
            title = f"{group['name']} ({group['rows']:,} samples)"
            row[title] = number_cell(group["value"], note=group["reason"])
        rows += [row] if len(row) > 1 else []
    return Table(f"{metric_title(found['leading'])} by {name}", rows)


def gates_table(gates: Mapping[str, Any], order: Sequence[int]) -> Table:
    """The mixture weights of users, in the given order."""
    rows = []
    for i in order:
        weights = {f"expert {j + 1}": number_cell(v, f"{v:.3f}") for j, v in enumerate(gates["values"][i])}
        rows.append({"user": Cell(str(gates["users"][i])), **weights})
    return Table("Gates", rows)


def scores_table(prompt: Mapping[str, Any], labels: Mapping[str, str]) -> Table:
    """Every model's score of an example prompt."""
    scores = prompt["scores"].items()
    return Table("Scores", [{"model": Cell(labels.get(k, k)), "score": number_cell(v)} for k, v in scores])


def main_tables(found: Mapping[str, Any]) -> list[Table]:
    """Metrics, differences and cost, as far as there are any."""
    made = (metrics_table(found), differences_table(found), costs_table(found))
    return [table for table in made if table.rows]


def facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The head of a report: name and text of samples, users, seeds, device and the like."""
    rows, versions = found["rows"], found["versions"]
    test, training = f"{rows['test']:,}", f"{rows['train']:,}"
    if rows["test_available"] > rows["test"]:
        test += f" of {rows['test_available']:,}, a seeded draw"
    if rows["few_shot"] is not None:
        training += f"; {rows['few_shot']:,} of them for the language models"
    pairs = {
        "training samples": training,
        "validation samples": f"{rows['valid']:,}",
        "test samples": test,
        "users": f"{rows['users']:,}",
        "seeds": ", ".join(map(str, found["seeds"])),
        "machine": found["machine"],
        "device": found["device"],
        "created": found["created"].replace("T", " ").replace("+00:00", " UTC"),
        "versions": ", ".join(f"{package} {version}" for package, version in versions.items() if version),
    }
    return [(name, text) for name, text in pairs.items() if text]


def failure_lines(found: Mapping[str, Any]) -> list[str]:
    """'iLoRA, seed 2021: out of memory'."""
    seeds = ["" if run["seed"] is None else f", seed {run['seed']}" for run in found["failed"]]
    return [f"{run['name']}{seed}: {run['error']}" for run, seed in zip(found["failed"], seeds, strict=True)]
