"""The files of a comparison of several models on the same rows: json, csv, markdown, LaTeX, and one page of HTML.

What a comparison holds is described in `compare_tables`; these are functions of it and nothing else.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_llm.comparison.html import to_html
from recbole_llm.comparison.tables import (
    COSTS,
    MINUS,
    TASKS,
    Cell,
    Table,
    checked,
    clean,
    costs_table,
    differences_table,
    estimate_of,
    facts,
    failure_lines,
    interval_text,
    metric_title,
    metrics_table,
    p_text,
    value_text,
)
from recbole_llm.utils.files import write_atomically, write_json

__all__ = ["terminal_table", "to_csv", "to_html", "to_latex", "to_markdown", "write_report"]

NAME = "compare"
_CSV_COLUMNS = (
    "record", "dataset", "task", "model", "against", "kind", "seed", "metric", "value", "sd", "low", "high",
    "low_bca", "high_bca", "p", "p_holm", "test", "rows", "group", "reason",
)  # fmt: skip
_MARKDOWN = str.maketrans(
    {c: "\\" + c for c in "\\`*_{}[]#!~$"} | {"|": "&#124;", "<": "&lt;", ">": "&gt;", "&": "&amp;"}
)
_LATEX = str.maketrans(
    {c: "\\" + c for c in "{}$&#%_"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "`": r"\textasciigrave{}"}
    # In braces, because \\ takes a following [ or * as its own.
    | {
        "[": "{[}",
        "]": "{]}",
        "*": "{*}",
        "±": r"$\pm$",
        MINUS: "$-$",
        "–": r"\textendash{}",
        "↓": r"$\downarrow$",
    }
)


def write_report(folder: Path, comparison: Mapping[str, Any]) -> list[Path]:
    """Write compare.json, .csv, .md, .tex and .html into `folder`, each atomically; nothing if one cannot be made.

    Returns:
        Their paths, in this order.

    Raises:
        ValueError: if the comparison is not complete; see `compare_tables.checked`.
        OSError: if the folder cannot be written.
    """
    found = checked(comparison)
    texts = {"csv": to_csv(found), "md": to_markdown(found), "tex": to_latex(found), "html": to_html(found)}
    paths = [Path(folder) / f"{NAME}.json"]
    write_json(paths[0], found)
    for ending, text in texts.items():
        paths.append(Path(folder) / f"{NAME}.{ending}")
        content = text.encode()
        write_atomically(paths[-1], lambda file, content=content: file.write(content))
    return paths


def terminal_table(comparison: Mapping[str, Any]) -> str:
    """Plain text: the models, what follows, what failed. Differences are in the sentences; the files have them all.

    Raises:
        ValueError: if the comparison is not complete.
    """
    found = checked(comparison)
    reasons = _Footnotes()
    table = metrics_table(found)
    cells = [[_joined(cell) + reasons.mark(cell, " ({})") for cell in row] for row in table.rows]
    lines = [_layout([list(table.head), *cells])] if cells else ["no model finished"]
    lines += [f"({number}) {reason}" for number, reason in reasons]
    if found["differences"] and not found["sentences"]:
        lines += ["", "differences (p by Holm):", *map(_difference_line, found["differences"])]
    if found["sentences"]:
        lines += ["", *map(clean, found["sentences"])]
    if found["failed"]:
        lines += ["", "failed:", *failure_lines(found)]
    return "\n".join(lines).replace(MINUS, "-").replace("–", "-")


def to_csv(comparison: Mapping[str, Any]) -> str:
    """One table in long form, numbers in full; [record] says what a line is.

        metric      value: mean over seeds, with sd and bounds
        seed        value: that of one seed
        cost        value: mean over seeds; metric is train_seconds or another
        group       value of the leading metric in one group of rows
        difference  value: model minus against
        failed      reason: the error

    Raises:
        ValueError: if the comparison is not complete.
    """
    found = checked(comparison)
    lines: list[dict[str, Any]] = []
    for model in found["models"]:
        of_model = {"model": model["name"], "kind": model["kind"]}
        for metric in found["metrics"]:
            estimate = estimate_of(model, metric)
            lines.append(
                {"record": "metric", **of_model, **estimate, "metric": metric, "value": estimate["mean"]}
            )
            for seed, value in zip(model["seeds"], estimate.get("values") or (), strict=False):
                lines.append({"record": "seed", **of_model, "seed": seed, "metric": metric, "value": value})
        for key in COSTS:
            value = (model.get("cost") or {}).get(key)
            if value is not None:
                lines.append({"record": "cost", **of_model, "metric": key, "value": value})
        for name, groups in (model.get("groups") or {}).items():
            for group in groups or ():
                of_group = {**group, "group": f"{name}: {group['name']}", "metric": found["leading"]}
                lines.append({"record": "group", **of_model, **of_group})
    lines += [{"record": "difference", "model": d["a"], "against": d["b"], **d} for d in found["differences"]]
    lines += [
        {"record": "failed", "model": f["name"], "seed": f["seed"], "reason": f["error"]}
        for f in found["failed"]
    ]
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, _CSV_COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for line in lines:
        line = {"dataset": found["dataset"], "task": found["task"], **line}
        # csv leaves a lone \r unquoted and then cannot read it; nothing reads NUL.
        writer.writerow({key: clean(v, lines=True) if isinstance(v, str) else v for key, v in line.items()})
    return file.getvalue()


def to_markdown(comparison: Mapping[str, Any]) -> str:
    """A page for GitHub; why a value is missing stands in a footnote.

    Raises:
        ValueError: if the comparison is not complete.
    """
    found = checked(comparison)
    reasons = _Footnotes()
    parts = [f"# {_markdown(found['dataset'])}: {TASKS.get(found['task'], _markdown(found['task']))}"]
    parts.append("\n".join(f"- {name}: {_markdown(text)}" for name, text in facts(found)))
    parts.append(_fence(clean(found["command"], lines=True)))
    if found["sentences"]:
        parts += ["## What follows", _bullets(found["sentences"])]
    for table in _tables(found):
        head = [_markdown(title) for title in table.head]
        rule = ["---" if i in table.words else "---:" for i in range(len(head))]
        rows = [
            [
                (f"**{_markdown(cell.text)}**" if cell.best else _markdown(cell.text))
                + (f" {_markdown(cell.interval)}" if cell.interval else "")
                + reasons.mark(cell, "[^{}]")
                for cell in row
            ]
            for row in table.rows
        ]
        parts += [f"## {table.title}", "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])]
    if not found["models"]:
        parts.append("No model finished.")
    if found["failed"]:
        parts += ["## Failed", _bullets(failure_lines(found))]
    if found["notes"]:
        parts += ["## Notes", _bullets(found["notes"])]
    if notes := [f"[^{number}]: {_markdown(reason)}" for number, reason in reasons]:
        parts.append("\n".join(notes))
    return "\n\n".join(parts) + "\n"


def to_latex(comparison: Mapping[str, Any]) -> str:
    """Tables with booktabs, to be read with \\input; the best value of a column is bold.

    Raises:
        ValueError: if the comparison is not complete.
    """
    found = checked(comparison)
    parts = ["% needs \\usepackage{booktabs}"]
    rows = found["rows"]
    captions = {
        "Metrics": f"{clean(found['dataset'])}, {TASKS.get(found['task'], clean(found['task']))}: "
        f"{rows['test'] or 0:,} test rows"
        + (f" of {rows['users']:,} users" if rows.get("users") is not None else "")
        + "; mean ± standard deviation over seeds.",
        "Differences": "Differences, paired by user; p corrected by Holm.",
        "Cost": "Cost, means over seeds.",
    }
    for table in _tables(found):
        reasons = _Footnotes()
        body = []
        for row in table.rows:
            cells = []
            for cell in row:
                text = rf"\textbf{{{_latex(cell.text)}}}" if cell.best else _latex(cell.text)
                text += f" {_latex(cell.interval)}" if cell.interval else ""
                cells.append(text + reasons.mark(cell, "$^{{{}}}$"))
            body.append("  " + " & ".join(cells) + r" \\")
        columns = "".join("l" if i in table.words else "r" for i in range(len(table.head)))
        notes = [rf"\par\footnotesize $^{{{number}}}$ {_latex(reason)}" for number, reason in reasons]
        parts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    r"\centering",
                    rf"\caption{{{_latex(captions[table.title])}}}",
                    rf"\label{{tab:compare-{table.title.lower()}}}",
                    rf"\begin{{tabular}}{{{columns}}}",
                    r"\toprule",
                    "  " + " & ".join(map(_latex, table.head)) + r" \\",
                    r"\midrule",
                    *body,
                    r"\bottomrule",
                    r"\end{tabular}",
                    *notes,
                    r"\end{table}",
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


class _Footnotes:
    """Numbers reasons in the order in which they are met, equal ones once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, cell: Cell, form: str) -> str:
        """`form` with the number of the cell's reason, or nothing."""
        if not cell.note:
            return ""
        return form.format(self._numbers.setdefault(cell.note, len(self._numbers) + 1))

    def __iter__(self):
        return iter([(number, reason) for reason, number in self._numbers.items()])


def _tables(found: Mapping[str, Any]) -> list[Table]:
    tables = (metrics_table(found), differences_table(found), costs_table(found))
    return [table for table in tables if table is not None and table.rows]


def _joined(cell: Cell) -> str:
    return f"{cell.text} {cell.interval}".rstrip()


def _difference_line(d: Mapping[str, Any]) -> str:
    words = [
        f"{clean(d['a'])} - {clean(d['b'])}, {clean(metric_title(d['metric']))}: {value_text(d['value'], sign=True)}"
    ]
    words.append(interval_text(d, sign=True))
    if d.get("p_holm") is not None or d.get("p") is not None:
        key = "p_holm" if d.get("p_holm") is not None else "p"
        words.append(f"p {p_text(d[key])}" + (" (uncorrected)" if key == "p" else ""))
        words.append(f"({clean(d['test'])})" if d.get("test") else "")
    words.append(f"({clean(d['reason'])})" if d.get("reason") else "")
    return " ".join(word for word in words if word)


def _width(text: str) -> int:
    """Columns on a terminal: two for Chinese and the like, none for combining marks."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def _layout(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell + " " * (width - _width(cell)) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "  ".join("-" * width for width in widths), *text[1:]])


def _markdown(text: str) -> str:
    return clean(text).translate(_MARKDOWN)


def _bullets(texts: Sequence[str]) -> str:
    return "\n".join(f"- {_markdown(text)}" for text in texts)


def _fence(text: str) -> str:
    """A code block whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def _latex(text: str) -> str:
    # An empty group keeps -- from becoming a dash.
    return re.sub("-(?=-)", "-{}", clean(text).translate(_LATEX))
