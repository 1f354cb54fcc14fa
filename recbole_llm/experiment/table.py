"""The table of one run, or of several on the same test samples, for the terminal."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from recbole_llm.experiment.result import metric_title

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
    basis = {_basis(r) for r in results}
    if len(basis) != 1:
        ranked = any("candidates" in r["rows"] for r in results)
        what = "samples, users, candidates" if ranked else "samples, users"
        raise ValueError(f"one table needs one test set, but these runs were evaluated on ({what}) {basis}")
    if results[0]["intervals"] is None:
        columns = list(dict.fromkeys(key for r in results for key in r["metrics"]["test"]))
        body = [[r["name"], *(_number(r["metrics"]["test"].get(key)) for key in columns)] for r in results]
        return layout([["model", *columns], *body])

    main, columns = "auc", ["logloss", "acc", "gauc"]
    if "candidates" in results[0]["rows"]:
        known = next(iter(results[0]["intervals"]["models"].values()))
        main, *columns = (metric for metric in _RANK_COLUMNS if metric in known)
    notes: list[str] = []
    lines: list[list[str]] = []
    own: list[list[str]] = []
    title, order = metric_title(main), {"zero_shot": 0, "lens": 1, "llm": 2}
    for result in results:
        found = result["intervals"]
        for key in sorted(found["models"], key=lambda key: order.get(key, len(order))):
            label, values = result["names"][key], found["models"][key]
            difference = found["differences"].get(f"{key} - lens", {}).get(main)
            line = [label, _cell(values[main], f"{label}, {title}", notes)]
            line += [_number(values[metric]["value"]) for metric in columns]
            line += [_cell(difference, f"{label}, {title} - lens", notes, sign="+") if difference else ""]
            for metric in columns:
                if values[metric]["value"] is None:
                    notes.append(f"{label}, {metric_title(metric)}: {values[metric]['reason']}")
            if key in ("model", "llm"):
                own.append(line)
            elif line not in lines:
                lines.append(line)
    level = f"[{results[0]['intervals']['level']:.0%} interval]"
    head = ["model", f"{title} {level}", *map(metric_title, columns), f"{title} - lens {level}"]
    table = [head, *lines, *own]
    if not any(line[-1] for line in table[1:]):
        table = [line[:-1] for line in table]
    return "\n".join([layout(table), _footer(results[0]), *dict.fromkeys(notes)])


def _basis(result: Mapping[str, Any]) -> Any:
    """What two results must share to stand in one table."""
    found, ranked = result["intervals"], result["rows"].get("candidates")
    if not found:
        return result["rows"].get("test")
    return (found["rows"], found["users"], *((ranked["min"], ranked["max"]) if ranked else ()))


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:{sign}.4f}"


def _cell(interval: Mapping[str, Any], where: str, notes: list[str], sign: str = "") -> str:
    """'0.7412 [0.7301, 0.7520]', or the value alone and a note that says why."""
    if interval["low"] is None:
        notes.append(f"{where}: {interval['reason']}")
        return _number(interval["value"], sign)
    return "{} [{}, {}]".format(*(_number(interval[key], sign) for key in ("value", "low", "high")))


def _footer(result: Mapping[str, Any]) -> str:
    found, rows = result["intervals"], result["rows"]
    available = rows.get("test_available")
    drawn = f" of {available:,} (a seeded draw: eval_rows)" if available and available > rows["test"] else ""
    return (
        f"{result['dataset']}: {found['rows']:,}{drawn} test samples of {found['users']:,} users"
        f"{_among(rows['candidates']) if 'candidates' in rows else ''}; intervals "
        f"from {found['samples']:,} bootstrap samples of users, differences paired"
    )


def _among(candidates: Mapping[str, Any]) -> str:
    """The footer's words on what was ranked."""
    ties = "; ties count against the model"
    if candidates["min"] is None:
        return ties
    low, high = candidates["min"], candidates["max"]
    number = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    what = f"all {number} items" if candidates["all_items"] else f"{number} candidates"
    return f", each target ranked among {what}{ties}"


def _width(text: str) -> int:
    """Columns on a terminal: two for Chinese and the like, none for combining marks."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def layout(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as columns of equal width, with a rule below the first line."""
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell + " " * (width - _width(cell)) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "  ".join("-" * width for width in widths), *text[1:]])
