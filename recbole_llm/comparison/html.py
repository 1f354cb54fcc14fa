"""A comparison as one page of HTML that needs nothing but itself: no network, no fonts, and scripts only to sort."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from recbole_llm.comparison.charts import (
    SHAPES,
    Estimate,
    Point,
    Series,
    calibration_chart,
    escape,
    group_chart,
    heat_map,
    interval_chart,
    scatter_chart,
    swatch,
)
from recbole_llm.comparison.page import SCRIPT, STYLE
from recbole_llm.comparison.tables import (
    DASH,
    TASKS,
    Cell,
    Table,
    better_first,
    checked,
    clean,
    costs_table,
    differences_table,
    estimate_of,
    estimate_text,
    facts,
    failure_lines,
    interval_text,
    metric_title,
    metrics_table,
    quantity_text,
    spread_of,
    value_text,
)

_KINDS = {"llm": 0, "classical": 1, "reference": 2}
_KIND_NAMES = {"llm": "language model", "classical": "classical recommender", "reference": "reference"}
_OTHER = 3  # the style of any other kind
_SERIES = len(SHAPES)
"""As many models are told apart in one chart."""
_HEAT_ROWS = 300


def to_html(comparison: Mapping[str, Any]) -> str:
    """The page. Texts of the comparison are escaped, and a content policy lets no script run but the page's own.

    Raises:
        ValueError: if the comparison is not complete.
    """
    found = checked(comparison)
    title = f"{clean(found['dataset'])}: {TASKS.get(found['task'], clean(found['task']))}"
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    sections = [
        _header(found, title),
        _follows(found),
        _metrics(found),
        _intervals(found),
        _differences(found),
        _costs(found),
        _calibration(found),
        _groups(found),
        _gates(found),
        _prompts(found),
        _list("Failed", failure_lines(found), "failed"),
        _list("Notes", found["notes"], "notes"),
        _runs(found),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _header(found: Mapping[str, Any], title: str) -> str:
    pairs = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts(found)
    )
    n = len(found["models"])
    return (
        f"<header><h1>{escape(title)}</h1>"
        f'<p class="lead">{n} model{"" if n == 1 else "s"} on the same test rows</p>'
        f'<dl class="facts">{pairs}</dl>{_command(found["command"])}</header>'
    )


def _command(command: str) -> str:
    return f'<pre class="command" tabindex="0" aria-label="Command"><code>{escape(command, lines=True)}</code></pre>'


def _follows(found: Mapping[str, Any]) -> str:
    if not found["sentences"]:
        return ""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in found["sentences"])
    return _section("follows", "What follows", f"<ul>{items}</ul>")


def _metrics(found: Mapping[str, Any]) -> str:
    if not found["models"]:
        return _section("metrics", "Metrics", _absent("No model finished."))
    said = "Mean over seeds; below it the 95% interval by users."
    said += " ★ marks the best value of a column." if len(found["models"]) > 1 else ""
    said += " ↓: less is better." if found["smaller_is_better"] else ""
    if any(len(model["seeds"]) > 1 for model in found["models"]):
        said += " ±: standard deviation over seeds."
    kinds = [_KIND_NAMES.get(model["kind"], model["kind"]) for model in found["models"]]
    table = _table(metrics_table(found, all_intervals=True), below=kinds)
    return _section("metrics", "Metrics", f"<p>{said}</p>{table}{_seeds(found)}")


def _seeds(found: Mapping[str, Any]) -> str:
    """The leading metric of every seed, and BCa intervals, folded away."""
    leading, seeds = found["leading"], found["seeds"]
    rows = []
    for model in found["models"]:
        estimate = estimate_of(model, leading)
        values = dict(zip(model["seeds"], estimate.get("values") or (), strict=False))
        cells = [Cell(value_text(values.get(seed)), number=values.get(seed)) for seed in seeds]
        bca = Cell(interval_text(estimate, "_bca") or DASH, number=estimate.get("low_bca"))
        rows.append((Cell(clean(model["name"])), *cells, bca))
    if all(cell.text == DASH for row in rows for cell in row[1:]):
        return ""
    head = ("model", *(f"seed {clean(seed)}" for seed in seeds), "BCa interval")
    name = f"{metric_title(leading)} of every seed"
    return f"<details><summary>{escape(name)}</summary>{_table(Table(name, head, tuple(rows)))}</details>"


def _intervals(found: Mapping[str, Any]) -> str:
    leading = found["leading"]
    name = f"{metric_title(leading)}, best first"
    lines = []
    for i in better_first(found, leading):
        model = found["models"][i]
        estimate = estimate_of(model, leading)
        several = len(model["seeds"]) > 1
        lines.append(
            Estimate(
                clean(model["name"]),
                estimate_text(model, leading),
                estimate["mean"],
                estimate.get("low"),
                estimate.get("high"),
                spread_of(model, leading),
                tuple(v for v in estimate.get("values") or () if v is not None) if several else (),
                _style(model),
            )
        )
    if not lines:
        return _section(
            "intervals", name, _absent(f"No plot: no model has a value of {metric_title(leading)}.")
        )
    said = "The mark is the mean over seeds, the thin line the 95% interval by users"
    said += (
        ", the thick bar ± one standard deviation over seeds"
        if any(e.spread is not None for e in lines)
        else ""
    )
    said += ", the small ticks below single seeds." if any(e.values for e in lines) else "."
    without = [e.name for e in lines if e.low is None or e.high is None]
    said += f" Without an interval: {', '.join(without)}." if without else ""
    chart = interval_chart("intervals-svg", name, lines, _axis(found))
    return _section("intervals", name, _keyed(chart, _kinds(found), said))


def _differences(found: Mapping[str, Any]) -> str:
    table = differences_table(found)
    if not table.rows:
        return _section("differences", "Differences", _absent("No differences were computed."))
    said = (
        "Paired by user. p (Holm) is p corrected for the number of comparisons. An interval that holds 0 does not "
        "tell which of the two is better."
    )
    return _section("differences", "Differences", f"<p>{said}</p>{_table(table)}")


def _costs(found: Mapping[str, Any]) -> str:
    leading = found["leading"]
    name = f"{metric_title(leading)} against cost"
    points, key, partial, left_out = [], [], [], []
    for i, model in enumerate(found["models"]):
        cost, mean = model.get("cost") or {}, estimate_of(model, leading)["mean"]
        parts = [cost.get("train_seconds"), cost.get("test_seconds")]
        seconds = sum(part for part in parts if part is not None)
        if mean is None or seconds <= 0:
            left_out.append(clean(model["name"]))
            continue
        if None in parts:
            partial.append(f"{clean(model['name'])} ({'testing' if parts[0] is None else 'training'} only)")
        text = f"{clean(model['name'])}: {value_text(mean)} after {quantity_text(seconds)} s"
        points.append(Point(seconds, mean, text, str(i + 1), _style(model)))
        key.append(f'<li value="{i + 1}">{swatch(_style(model))}{escape(text)}</li>')
    table = costs_table(found)
    shown = _table(table) if table else ""
    if not points:
        return _section("cost", name, _absent("No plot: no model has both a value and its seconds.") + shown)
    said = "Seconds of training and testing, mean over seeds, on a logarithmic axis."
    said += f" Not all seconds are known of {', '.join(partial)}." if partial else ""
    said += f" Left out, for want of seconds or of a value: {', '.join(left_out)}." if left_out else ""
    chart = scatter_chart(
        "cost-svg", name, points, "seconds of training and testing", _axis(found), log_x=True
    )
    return _section("cost", name, _keyed(chart, f'<ol class="key">{"".join(key)}</ol>', said) + shown)


def _calibration(found: Mapping[str, Any]) -> str:
    if found["task"] != "ctr":
        return ""
    name = "Reliability"
    curves = [(i, m) for i, m in enumerate(found["models"]) if (m.get("calibration") or {}).get("predicted")]
    if not curves:
        return _section("calibration", name, _absent("No plot: no model has calibration data."))
    panels = []
    for i, model in curves:
        curve, title = model["calibration"], clean(model["name"])
        chart = calibration_chart(
            f"calibration-{i}",
            f"Reliability of {title}",
            curve["predicted"],
            curve["observed"],
            curve["counts"],
        )
        panels.append(
            f"<figure>{chart}<figcaption><strong>{escape(title)}</strong><br>"
            f"expected calibration error {value_text(curve.get('ece'))}</figcaption></figure>"
        )
    said = "Observed share of likes against the predicted one; on the dashed line they agree. Larger dots: more rows."
    without = [clean(m["name"]) for m in found["models"] if not (m.get("calibration") or {}).get("predicted")]
    said += f" Not known: {', '.join(without)}." if without else ""
    return _section("calibration", name, f'<p>{escape(said)}</p><div class="panels">{"".join(panels)}</div>')


def _groups(found: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(name for model in found["models"] for name in model.get("groups") or {}))
    leading = metric_title(found["leading"])
    title = f"{leading} by group"
    if not names:
        return _section("groups", title, _absent("No plots: no model has values by group."))
    order = better_first(found, found["leading"])
    order += [i for i in range(len(found["models"])) if i not in order]
    return _section(
        "groups", title, f'<div class="wide">{"".join(_grouping(found, n, order) for n in names)}</div>'
    )


def _grouping(found: Mapping[str, Any], name: str, order: Sequence[int]) -> str:
    """One chart of the best models in the groups of one kind, and a table of all."""
    of_model = {i: (found["models"][i].get("groups") or {}).get(name) or [] for i in order}
    counts = {g["name"]: g["rows"] for i in sorted(order) for g in reversed(of_model[i])}
    groups = list(dict.fromkeys(g["name"] for i in sorted(order) for g in of_model[i]))
    values = {i: {g["name"]: g for g in of_model[i]} for i in order}
    known = [i for i in order if any(g["value"] is not None for g in of_model[i])]
    rows = tuple(
        (
            Cell(clean(found["models"][i]["name"])),
            *(
                Cell(
                    value_text(g["value"]),
                    note=g.get("reason") if g["value"] is None else None,
                    number=g["value"],
                )
                for g in (values[i].get(group) or {"value": None} for group in groups)
            ),
        )
        for i in order
        if of_model[i]
    )
    title, leading = f"By {clean(name)}", metric_title(found["leading"])
    if not known:
        return f"<figure><h3>{escape(title)}</h3>{_absent('No plot: no group has a value.')}</figure>"
    drawn = known[:_SERIES]
    series = [
        Series(
            clean(found["models"][i]["name"]),
            tuple((values[i].get(group) or {"value": None})["value"] for group in groups),
            style,
        )
        for style, i in enumerate(drawn)
    ]
    labels = [(clean(group), "" if counts[group] is None else f"{counts[group]:,} rows") for group in groups]
    chart = group_chart(f"group-{_key(name)}", f"{leading} {title.lower()}", labels, series, _axis(found))
    key = "".join(f"<li>{swatch(s.style)}{escape(s.name)}</li>" for s in series)
    more = f" The best {len(drawn)} of {len(known)} models are drawn." if len(known) > len(drawn) else ""
    head = ("model", *(f"{group} ({count})" if count else group for group, count in labels))
    table = _table(Table(f"{leading} {title.lower()}", head, rows))
    return (
        f'<figure><h3>{escape(title)}</h3>{chart}<ul class="key">{key}</ul>'
        f"<figcaption>{more}</figcaption>"
        f"<details><summary>All values by {escape(name)}</summary>{table}</details></figure>"
    )


def _gates(found: Mapping[str, Any]) -> str:
    gates = found["gates"]
    if not gates:
        return _section("gates", "Gates", _absent("No plots: none of these models has gates that were kept."))
    if not gates["users"] or not gates["experts"]:
        return _section("gates", "Gates", _absent("No plots: there are no users or no experts."))
    users, values = gates["users"], gates["values"]
    # Users of one expert stand together, those most of it first.
    order = sorted(range(len(users)), key=lambda i: (_strongest(values[i]), -max(values[i])))[:_HEAT_ROWS]
    said = f"{clean(gates['model'])}: weights of {gates['experts']} experts, mean over projections; "
    said += "users sorted by their strongest expert."
    said += f" The first {_HEAT_ROWS} of {len(users):,} users." if len(users) > _HEAT_ROWS else ""
    chart = heat_map(
        "gates-svg",
        "Gates: users by experts",
        [(f"{clean(users[i])}", values[i]) for i in order],
        [str(j + 1) for j in range(gates["experts"])],
    )
    figure = f"<figure><h3>Weights</h3>{chart}<figcaption>{escape(said)}</figcaption></figure>"
    return _section("gates", "Gates", f'<div class="wide">{figure}{_gate_map(gates)}</div>')


def _gate_map(gates: Mapping[str, Any]) -> str:
    if not gates.get("coordinates"):
        return _absent("No map of users: no coordinates were kept.")
    field, profile = gates.get("profile_field"), gates.get("profile")
    key, caption, styles = "", "", {}
    if profile:
        common = Counter(map(clean, profile)).most_common()
        shown = common if len(common) <= _SERIES else common[: _SERIES - 1]
        styles = {value: style for style, (value, _) in enumerate(shown)}
        rest = sum(n for value, n in common if value not in styles)
        entries = [(styles[value], value, n) for value, n in shown] + (
            [(_SERIES - 1, "other", rest)] if rest else []
        )
        key = "".join(f"<li>{swatch(style)}{escape(value)} ({n:,})</li>" for style, value, n in entries)
        key = f'<ul class="key">{key}</ul>'
        caption = f" Marks show {clean(field or 'the profile')}."
    points = []
    for i, (x, y) in enumerate(gates["coordinates"]):
        value = clean(profile[i]) if profile else ""
        tip = f"{clean(gates['users'][i])}{', ' + value if value else ''}"
        points.append(Point(x, y, tip, style=styles.get(value, _SERIES - 1) if profile else 0))
    chart = scatter_chart("map-svg", "Map of the users' gates", points, "", "", ticks=False)
    said = f"Each mark is a user; users with like gates lie near each other.{caption}"
    return f"<figure><h3>Map of users</h3>{chart}{key}<figcaption>{escape(said)}</figcaption></figure>"


def _strongest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _prompts(found: Mapping[str, Any]) -> str:
    if not found["prompts"]:
        return _section("prompts", "Example prompts", _absent("No prompts were kept."))
    folded = []
    for prompt in found["prompts"]:
        label = prompt.get("label")
        said = "" if label is None else f" (label {clean(label)})"
        scores = [
            (Cell(clean(name)), Cell(value_text(score), number=score))
            for name, score in (prompt.get("scores") or {}).items()
        ]
        table = (
            _table(Table("Scores", ("model", "score"), tuple(scores))) if scores else _absent("No scores.")
        )
        folded.append(
            f"<details><summary>{escape(prompt['model'])}: user {escape(prompt['user'])}, "
            f'{escape(prompt["item"])}{escape(said)}</summary><pre class="prompt" tabindex="0" aria-label="Prompt">'
            f"{escape(prompt['text'], lines=True)}</pre>{table}</details>"
        )
    return _section("prompts", "Example prompts", "".join(folded))


def _list(title: str, lines: Sequence[str], key: str) -> str:
    if not lines:
        return ""
    return _section(key, title, f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>")


def _runs(found: Mapping[str, Any]) -> str:
    """What each model changed, and where its runs lie."""
    items = []
    for model in found["models"]:
        changes = ", ".join(f"{key}={value}" for key, value in (model.get("changes") or {}).items())
        paths = "".join(f"<br><code>{escape(path)}</code>" for path in model.get("paths") or ())
        if changes or paths:
            items.append(f"<li><strong>{escape(model['name'])}</strong> {escape(changes)}{paths}</li>")
    return _section("runs", "Runs", f"<ul>{''.join(items)}</ul>") if items else ""


def _section(key: str, title: str, body: str) -> str:
    return f'<section aria-labelledby="{key}"><h2 id="{key}">{escape(title)}</h2>{body}</section>'


def _keyed(chart: str, key: str, said: str) -> str:
    """A chart with its legend and words, beside it where the screen is wide."""
    return f'<figure class="keyed">{chart}<figcaption>{key}<p>{escape(said)}</p></figcaption></figure>'


def _absent(why: str) -> str:
    return f'<p class="absent">{escape(why)}</p>'


def _table(table: Table, below: Sequence[str] | None = None) -> str:
    """`below`: small words under the first cell of each row."""
    reasons: dict[str, int] = {}
    head = "".join(
        f'<th scope="col"{"" if i in table.words else " class=n"}>{escape(title)}</th>'
        for i, title in enumerate(table.head)
    )
    rows = []
    for r, row in enumerate(table.rows):
        cells = []
        for i, cell in enumerate(row):
            if i == 0:  # always a name alone
                small = f"<small>{escape(below[r])}</small>" if below else ""
                cells.append(f'<th scope="row">{_breakable(escape(cell.text))}{small}</th>')
            else:
                kind = "" if i in table.words else ' class="n"'
                number = "" if cell.number is None else f' data-v="{cell.number!r}"'
                cells.append(f"<td{kind}{number}>{_cell(cell, reasons)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    notes = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    notes = f'<ol class="reasons">{notes}</ol>' if notes else ""
    title = escape(table.title)
    return (
        f'<div class="scroll" role="region" aria-label="{title}" tabindex="0"><table class="sortable">'
        f'<caption class="vh">{title}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{notes}"
    )


def _cell(cell: Cell, reasons: dict[str, int]) -> str:
    text = escape(cell.text)
    if cell.note:
        number = reasons.setdefault(cell.note, len(reasons) + 1)
        text = f'<span title="{escape(cell.note)}">{text}<sup>{number}</sup></span>'
    if cell.best:
        text = f'<strong>{text}</strong><span class="star" aria-hidden="true">★</span><span class="vh"> best</span>'
    return text + (f"<small>{escape(cell.interval)}</small>" if cell.interval else "")


def _breakable(escaped: str) -> str:
    """Names such as gate=uniform may be broken after = and _ on a narrow screen."""
    return escaped.replace("=", "=<wbr>").replace("_", "_<wbr>")


def _kinds(found: Mapping[str, Any]) -> str:
    """A legend of the kinds of models there are."""
    kinds = dict.fromkeys(model["kind"] for model in found["models"])
    items = "".join(f"<li>{swatch(_KINDS.get(k, _OTHER))}{escape(_KIND_NAMES.get(k, k))}</li>" for k in kinds)
    return f'<ul class="key">{items}</ul>'


def _style(model: Mapping[str, Any]) -> int:
    return _KINDS.get(model["kind"], _OTHER)


def _axis(found: Mapping[str, Any]) -> str:
    leading = found["leading"]
    return metric_title(leading) + (" (less is better)" if leading in found["smaller_is_better"] else "")


def _key(name: str) -> str:
    """An id of letters and digits that no other name has."""
    return hashlib.sha256(name.encode()).hexdigest()[:12]
