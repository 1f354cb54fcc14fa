"""The report of a comparison: JSON, CSV, Markdown, LaTeX, and one page of HTML that needs no network.

:func:`report` works it out from the files of finished runs. The other functions are views of the comparison's dict,
which docs/comparisons.md describes. Names, titles and model texts are untrusted: templates escape
everything that is not marked as safe, each in the way of its format.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from operator import methodcaller
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from recbole_llm.comparison import tables
from recbole_llm.comparison.analysis import build_comparison
from recbole_llm.comparison.finished_run import FinishedRun, load_run
from recbole_llm.comparison.plan import FOLDER, PLAN_FILE
from recbole_llm.comparison.tables import COSTS, KINDS, SERIES, TASKS, clean
from recbole_llm.experiment.table import MINUS, ascii_number, layout
from recbole_llm.utils.files import read_json, write_atomically, write_json
from recbole_llm.utils.run_files import RESULT_FILE
from recbole_llm.utils.text_output import spreadsheet_text

NAME = "compare"
TEMPLATES = Path(__file__).parent / "templates"
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
    # In braces, because \\ takes a following [ or * as its argument.
    | {"[": "{[}", "]": "{]}", "*": "{*}"}
    | {"±": r"$\pm$", MINUS: "$-$", "–": r"\textendash{}", "↓": r"$\downarrow$"}
)


def report(folder: Path, failed: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Work out the comparison in a folder from its runs' files, and write the report files.

    Args:
        folder: of a comparison, or of a single run with ``compare_with``.
        failed: of a single run's other models, those that ended without a result.

    Returns:
        As :func:`recbole_llm.comparison.analysis.build_comparison`, with ``files``: the paths written.

    Raises:
        FileNotFoundError: if the folder holds no finished run, or a run's score file is missing.
        ValueError: if the runs cannot be compared.
    """
    folder = Path(folder)
    if (folder / PLAN_FILE).is_file():
        runs, failed, options = _planned(folder)
    else:
        others = sorted(folder.glob(f"{FOLDER}/*/{RESULT_FILE}"))
        runs = [load_run(folder), *(load_run(path.parent) for path in others)]
        options = {"samples": runs[0].result["config"]["bootstrap_samples"]}
    comparison = build_comparison(runs, failed=failed, **options)
    return {**comparison, "files": [str(path) for path in write_report(folder, comparison)]}


def _planned(folder: Path) -> tuple[list[FinishedRun], list[Mapping[str, Any]], dict[str, Any]]:
    """Finished runs, failed ones, and options, of the folder of a comparison."""
    plan = read_json(folder / PLAN_FILE)
    reasons = {(entry["name"], entry["seed"]): entry for entry in plan["failed"]}
    runs, failed = [], []
    for entry in plan["runs"]:
        name, seed = entry["name"], entry["seed"]
        if (folder / entry["folder"] / RESULT_FILE).is_file():
            runs.append(load_run(folder / entry["folder"], name))
        else:
            unfinished = {"name": name, "seed": seed, "error": "the run is not finished"}
            failed.append(reasons.get((name, seed), unfinished))
    if not runs:
        what = "; ".join(tables.failure_lines({"failed": failed}))
        raise ValueError(f"no run in {folder} has a result ({what})")
    subject = plan["subject"] if any(run.name == plan["subject"] for run in runs) else runs[-1].name
    return runs, failed, {"subject": subject, "samples": plan["samples"], "command": plan["command"]}


def write_report(folder: Path, found: Mapping[str, Any]) -> list[Path]:
    """Write compare.json, .csv, .md, .tex and .html of a comparison into `folder`, each atomically.

    Returns:
        Their paths, in this order.

    Raises:
        OSError: if the folder cannot be written.
    """
    texts = {"csv": to_csv(found), "md": to_markdown(found), "tex": to_latex(found), "html": to_html(found)}
    paths = [Path(folder) / f"{NAME}.{ending}" for ending in ("json", *texts)]
    write_json(paths[0], found)
    for path, text in zip(paths[1:], texts.values(), strict=True):
        write_atomically(path, methodcaller("write", text.encode()))
    return paths


def terminal_table(found: Mapping[str, Any]) -> str:
    """Plain text: the models, key findings, failures."""
    table, notes = tables.metrics_table(found), dict[str, int]()

    def plain(column: str, cell: tables.Cell) -> str:
        number, text = tables.mark(notes, cell), clean(f"{cell.text} {cell.below}")
        return (text if column in tables.TEXTS else ascii_number(text)) + (f" ({number})" if number else "")

    lines = ["no model finished"]
    if table.rows:
        lines = [layout([table.head, *([plain(*entry) for entry in row.items()] for row in table.rows)])]
    lines += [f"({number}) {clean(note)}" for note, number in notes.items()]
    lines += ["", *map(clean, found["sentences"])] if found["sentences"] else []
    lines += ["", "failed:", *map(clean, tables.failure_lines(found))] if found["failed"] else []
    return "\n".join(lines)


def to_csv(found: Mapping[str, Any]) -> str:
    """One table in long form, numbers in full; [record] says what a line is.

    metric      value: mean over seeds, with sd and bounds
    seed        value: that of one seed
    cost        value: mean over seeds; metric is train_seconds or another
    group       value of the leading metric in one group of samples; rows: their number
    difference  value: model minus against
    failed      reason: the error
    """
    lines: list[dict[str, Any]] = []
    for model in found["models"]:
        of_model = {"model": model["name"], "kind": model["kind"]}
        for metric in found["metrics"]:
            of_metric, estimate = {**of_model, "metric": metric}, model["metrics"][metric]
            lines.append({"record": "metric", **of_metric, **estimate, "value": estimate["mean"]})
            for seed, value in zip(model["seeds"], estimate["values"], strict=True):
                lines.append({"record": "seed", **of_metric, "seed": seed, "value": value})
        for key in COSTS:
            if (value := model["cost"][key]) is not None:
                lines.append({"record": "cost", **of_model, "metric": key, "value": value})
        for name, groups in model["groups"].items():
            for group in groups:
                of_group = {**group, "group": f"{name}: {group['name']}", "metric": found["leading"]}
                lines.append({"record": "group", **of_model, **of_group})
    lines += [{"record": "difference", "model": d["a"], "against": d["b"], **d} for d in found["differences"]]
    for f in found["failed"]:
        lines.append({"record": "failed", "model": f["name"], "seed": f["seed"], "reason": f["error"]})
    whole = ({"dataset": found["dataset"], "task": found["task"], **line} for line in lines)
    cells = [{key: _csv(v) if isinstance(v, str) else v for key, v in line.items()} for line in whole]
    return pd.DataFrame(cells, columns=_CSV_COLUMNS, dtype=object).to_csv(index=False, lineterminator="\n")


def to_markdown(found: Mapping[str, Any]) -> str:
    """A page for GitHub; footnotes explain missing values and labels."""
    page = _render("report.md", found, _markdown, fenced=_fenced)
    return re.sub(r"\n{3,}", "\n\n", page).rstrip() + "\n"


def to_latex(found: Mapping[str, Any]) -> str:
    """Tables with booktabs, to be read with \\input; the best value of a column is bold."""
    return _render("report.tex", found, _latex) + "\n"


def to_html(found: Mapping[str, Any]) -> str:
    """The page. A content policy lets no script run but the page's own, which only sorts tables."""
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    page = {
        "charts": _charts(),
        "labels": {model["name"]: model["label"] for model in found["models"]},
        "leading": tables.metric_title(found["leading"]),
        "axis": tables.marked(found, found["leading"], " (less is better)"),
        "order": tables.best_first(found, found["leading"]),
        "several_seeds": any(len(model["seeds"]) > 1 for model in found["models"]),
        "groupings": list(dict.fromkeys(name for model in found["models"] for name in model["groups"])),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "lines": lambda text: escape(clean(text, lines=True)),
        **_against_cost(found),
        **(_gates(found["gates"]) if found["gates"] else {}),
    }
    return _render("report.html", found, lambda value: escape(clean(value)), **page) + "\n"


def _charts() -> ModuleType | None:
    """The module that draws, where the extra `report` is installed."""
    if find_spec("matplotlib") is None:
        return None
    from recbole_llm.comparison import charts

    return charts


def _render(template: str, found: Mapping[str, Any], escaped: Callable[[Any], str], **page: Any) -> str:
    """A template's text, in which every output is escaped unless it is marked as safe already."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=True,
        finalize=lambda value: value if hasattr(value, "__html__") else Markup(escaped(value)),
        trim_blocks=True,
    )
    title = f"{found['dataset']}: {TASKS.get(found['task'], found['task'])}"
    return environment.get_template(template).render(found=found, title=title, tables=tables, **page)


def _against_cost(found: Mapping[str, Any]) -> dict[str, Any]:
    """``points``: (seconds, value, tip, style) of models; ``unknown``: the others."""
    points, unknown = [], []
    for model in found["models"]:
        mean, cost = model["metrics"][found["leading"]]["mean"], model["cost"]
        if None in (mean, cost["train_seconds"], cost["test_seconds"]):
            unknown.append(model["label"])
        elif (seconds := cost["train_seconds"] + cost["test_seconds"]) >= 1e-6:
            tip = f"{model['label']}: {tables.value_text(mean)} after {tables.quantity_text(seconds)} s"
            points.append((seconds, mean, tip, list(KINDS).index(model["kind"])))
    return {"points": points, "unknown": unknown}


def _gates(gates: Mapping[str, Any]) -> dict[str, Any]:
    """``user_order``: those of one expert together, the most weight first; ``profiles``: their names with counts."""
    weights = np.array(gates["values"])
    common = Counter(map(clean, gates["profile"] or ())).most_common()
    if len(common) > SERIES:
        common[SERIES - 1 :] = [("other", sum(count for _, count in common[SERIES - 1 :]))]
    order = np.lexsort((-weights.max(axis=1), weights.argmax(axis=1)))
    return {"user_order": order, "profiles": {name: f"{name} ({count})" for name, count in common}}


def _csv(text: str) -> str:
    # csv leaves a lone \r unquoted and then cannot read it; nothing reads NUL
    return spreadsheet_text(clean(text, lines=True))


def _markdown(text: Any) -> str:
    return clean(text).translate(_MARKDOWN)


def _fenced(text: str) -> Markup:
    """A code block whose fence is longer than any in the text."""
    text = clean(text, lines=True)
    fence = "`" * max([3, *(1 + len(run) for run in re.findall("`+", text))])
    return Markup(f"{fence}\n{text}\n{fence}")


def _latex(text: Any) -> str:
    # An empty group keeps -- from becoming a dash.
    return re.sub("-(?=-)", "-{}", clean(text).translate(_LATEX))
