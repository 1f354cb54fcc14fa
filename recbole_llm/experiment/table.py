"""The table of one run, or of several on the same test samples, for the terminal."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from recbole_llm.experiment.result import metric_title

DASH, MINUS = "–", "−"
_RANK_COLUMNS = ("hr@1", "hr@5", "ndcg@5", "ndcg@10", "mrr@10")
"""Of the table; the result has all of :data:`recbole_llm.evaluation.ranking.RANK_METRICS`."""


def result_table(results: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str:
    """A fixed-width table of one run, or of several on the same test samples, as `build_result` gives them.

    One line per model: the untrained LLM, the lens, others, then each run's own model; with AUC and its
    interval, LogLoss, ACC, GAUC, and the paired difference of the AUC to the lens of the same run. Runs with
    ranks show HR@1 in the place of AUC and HR@5, NDCG@5, NDCG@10 and MRR@10 beside it, as far as k is below
    the number of candidates; rankings without scores by sample show RecBole's metrics.

    Raises:
        ValueError: if the runs were evaluated on different numbers of samples, users or candidates, or one ranked and
            one did not.
    """
    results = [results] if isinstance(results, Mapping) else list(results)
    first, basis = results[0], {_basis(r) for r in results}
    if len(basis) != 1:
        what = "samples, users" + ", candidates" * any("candidates" in r["rows"] for r in results)
        raise ValueError(f"one table needs one test set, but these runs were evaluated on ({what}) {basis}")
    if first["intervals"] is None:
        columns = list(dict.fromkeys(key for r in results for key in r["metrics"]["test"]))
        tested = [(r["name"], r["metrics"]["test"]) for r in results]
        body = [
            [name, *(ascii_number(value_text(values.get(key))) for key in columns)] for name, values in tested
        ]
        return layout([["model", *columns], *body])

    main, *columns = "auc", "logloss", "acc", "gauc"
    if "candidates" in first["rows"]:
        known = next(iter(first["intervals"]["models"].values()))
        main, *columns = (metric for metric in _RANK_COLUMNS if metric in known)
    notes, controls, references, own = list[str](), list[str](), list[list[str]](), list[list[str]]()
    title, order = metric_title(main), {"zero_shot": 0, "lens": 1, "llm": 2}

    def cell(found: Mapping[str, Any], where: str, form: str = ".4f", bounds: bool = True) -> str:
        """'0.7412 [0.7301, 0.7520]', or the value alone; a note says why one of the two is missing."""
        if found["low" if bounds else "value"] is None:
            notes.append(f"{where}: {found['reason']}")
        interval = interval_text(found, form=form) if bounds else ""
        return ascii_number(f"{value_text(found['value'], form)} {interval}".rstrip())

    for result in results:
        found = result["intervals"]
        for key in sorted(found["models"], key=lambda key: order.get(key, len(order))):
            label, values = result["names"][key], found["models"][key]
            line = [label, cell(values[main], f"{label}, {title}")]
            line += [cell(values[m], f"{label}, {metric_title(m)}", bounds=False) for m in columns]
            difference = found["differences"].get(f"{key} - lens", {}).get(main)
            line += [cell(difference, f"{label}, {title} - lens", "+.4f") if difference else ""]
            if key in ("model", "llm"):
                own.append(line)
            elif line not in references:
                references.append(line)
        alone = "llm" if "llm" in found["models"] else "model"
        if control := found["differences"].get(f"{alone} - past_ratings"):
            label = f"{result['names'][alone]} - past ratings"
            texts = [f"{metric_title(m)} {cell(control[m], label, '+.4f')}" for m in ("auc", "gauc")]
            controls.append(f"{label}: {', '.join(texts)}")
    level = f"[{first['intervals']['level']:.0%} interval]"
    head = ["model", f"{title} {level}", *map(metric_title, columns), f"{title} - lens {level}"]
    table = [head, *references, *own]
    if not any(line[-1] for line in table[1:]):
        table = [line[:-1] for line in table]
    return "\n".join([layout(table), _footer(first), *controls, *dict.fromkeys(notes)])


def value_text(value: float | None, form: str = ".4f") -> str:
    """A metric with four decimals, or in another format; a dash for None and what is not finite."""
    return DASH if value is None or not math.isfinite(value) else f"{value:{form}}".replace("-", MINUS)


def interval_text(holder: Mapping[str, Any], suffix: str = "", form: str = ".4f") -> str:
    """'[0.7301, 0.7520]', empty where a bound is null."""
    bounds = [holder.get(end + suffix) for end in ("low", "high")]
    return "" if None in bounds else "[{}, {}]".format(*(value_text(bound, form) for bound in bounds))


def ascii_number(text: str) -> str:
    """A number as any terminal shows it, with the keyboard's minus sign and dash; not for names."""
    return text.replace(MINUS, "-").replace(DASH, "-")


def _basis(result: Mapping[str, Any]) -> Any:
    """What two results must share to stand in one table."""
    found, ranked = result["intervals"], result["rows"].get("candidates")
    if not found:
        return result["rows"].get("test")
    return (found["rows"], found["users"], *((ranked["min"], ranked["max"]) if ranked else ()))


def _footer(result: Mapping[str, Any]) -> str:
    found, rows = result["intervals"], result["rows"]
    available = rows.get("test_available")
    drawn = f" of {available:,} (a seeded draw: eval_rows)" if available and available > rows["test"] else ""
    return (
        f"{result['dataset']}: {found['rows']:,}{drawn} test samples of {found['users']:,} users"
        f"{_among(rows['candidates'], result) if 'candidates' in rows else ''}; intervals "
        f"from {found['samples']:,} bootstrap samples of users, differences paired"
    )


def _among(candidates: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """The footer's words on what was ranked."""
    ties = "; ties count against the model"
    if candidates["min"] is None:
        return ties
    low, high = candidates["min"], candidates["max"]
    number = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    what = f"all {number} items" if candidates["all_items"] else f"{number} candidates"
    if not result.get("candidate_items", {}).get("rank_history", True):
        what = f"the {number} items that its user had not met"
    return f", each target ranked among {what}{ties}"


def layout(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as columns of equal width, with a rule below the first line."""
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    padded = [
        [cell + " " * (width - _width(cell)) for cell, width in zip(line, widths, strict=True)]
        for line in ruled
    ]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def _width(text: str) -> int:
    """Columns on a terminal: two for Chinese and the like, none for combining marks."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)
