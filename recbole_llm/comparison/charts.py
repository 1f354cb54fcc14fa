"""The pictures of a report as inline SVG, drawn by matplotlib (the extra `report`); without it reports show tables.

Charts are 360 units wide, so that their text can be read on a narrow screen. Colours are variables of the page's style
sheet (`var(--c1)`, ..), for light and dark; shapes distinguish series without them. A mark has a tip, its SVG title,
which a pointer resting on it shows; the first tips are the description of the chart.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import wraps
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from recbole_llm.comparison.tables import KINDS, SERIES, Table, clean, estimate_text, interval_text
from recbole_llm.experiment.result import metric_title

_MARKERS = "osD^vP"
_VARIABLES = ("ink", "muted", "line", "soft", "paper", "c1", "c2", "c3", "c4", "c5", "c6")
_COLOUR = {name: f"#0000{i}" for i, name in enumerate(_VARIABLES, 10)}
"""What stands for the page's colours until :func:`_inline`."""
_STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 11, "lines.linewidth": 1.4,
    "text.color": _COLOUR["ink"], "axes.labelcolor": _COLOUR["muted"], "axes.edgecolor": _COLOUR["muted"],
    "xtick.labelcolor": _COLOUR["ink"], "ytick.labelcolor": _COLOUR["ink"], "grid.color": _COLOUR["line"],
    "axes.grid": True, "axes.axisbelow": True, "axes.formatter.useoffset": False, "axes.xmargin": 0.08,
    "axes.ymargin": 0.08, "axes.spines.top": False, "axes.spines.left": False, "axes.spines.right": False,
    "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
}  # fmt: skip


def _chart(draw: Callable[..., tuple[Figure, str]]) -> Callable[..., Markup]:
    """Makes ``f(..) -> svg`` of ``f(..) -> (figure, title)``."""

    @wraps(draw)
    def drawn(*arguments: Any) -> Markup:
        # It warns of fonts without a glyph: the browser has others.
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        with warnings.catch_warnings(), matplotlib.rc_context(_STYLE):
            warnings.simplefilter("ignore")
            figure, title = draw(*arguments)
            matplotlib.rcParams["svg.hashsalt"] = title  # the ids in two charts differ
            file, no_metadata = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
        return _inline(file.getvalue(), title)

    return drawn


@_chart
def intervals(metric: str, axis: str, models: Sequence[Mapping[str, Any]]) -> tuple[Figure, str]:
    """Dot and whisker, one lane for each model: name and number above, the seeds below."""
    figure, ax = _axes(44 * len(models) + 40, axis)
    ax.set(yticks=[], ylim=(len(models) - 0.6, -0.85))
    for y, model in enumerate(models):
        estimate, text = model["metrics"][metric], estimate_text(model, metric)
        mean, spread = estimate["mean"], estimate["sd"] or 0
        for up, line, weight in ((0.57, _short(model["label"], 50), "bold"), (0.29, text, "normal")):
            ax.text(0, y - up, line, weight=weight, transform=ax.get_yaxis_transform(), in_layout=False)
        if interval_text(estimate):
            ax.plot([estimate["low"], estimate["high"]], [y, y], color=_COLOUR["ink"], marker="|", ms=10)
        if len(model["seeds"]) > 1:
            ax.hlines(y, mean - spread, mean + spread, color=_COLOUR["muted"], alpha=0.45, lw=6)
            ticks = [y + 0.18] * len(model["seeds"])
            ax.plot(estimate["values"], ticks, "|", color=_COLOUR["muted"], ms=5)
        tip = f"{model['label']}: {text} {interval_text(estimate)}"
        _mark(ax, mean, y, list(KINDS).index(model["kind"]), tip)
    return figure, f"{metric_title(metric)}, best first"


@_chart
def cost(axis: str, points: Sequence[tuple[float, float, str, int]]) -> tuple[Figure, str]:
    """(seconds, value, tip, style): the leading metric against seconds, on a logarithmic axis, numbered from 1."""
    figure, ax = _axes(280, "seconds of training and testing")
    ax.set(xscale="log", ylabel=axis)
    for i, (seconds, value, tip, style) in enumerate(points):
        _mark(ax, seconds, value, style, tip)
        beside = [(10, 0), (0, 11), (-10, 0), (0, -11)][i % 4]
        number: dict[str, Any] = {
            "weight": "bold",
            "ha": "center",
            "va": "center",
            "textcoords": "offset points",
        }
        ax.annotate(str(i + 1), (seconds, value), beside, **number)
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,)))
    ax.xaxis.set_major_formatter("{x:,.7g}")
    ax.xaxis.set_minor_formatter("")
    return figure, f"{axis} against cost"


@_chart
def reliability(model: Mapping[str, Any]) -> tuple[Figure, str]:
    """Observed against predicted share, both from 0 to 1; the area of a dot is proportional to its samples."""
    figure, ax = _axes(192, "predicted", width=192)
    predicted, observed, counts = (model["calibration"][key] for key in ("predicted", "observed", "counts"))
    ax.plot([0, 1], [0, 1], color=_COLOUR["muted"], lw=1, ls="--")
    ax.plot(predicted, observed, color=_COLOUR["c1"])
    for p, o, n in zip(predicted, observed, counts, strict=True):
        tip = f"predicted {p:.3f}, observed {o:.3f}, {n:,} samples"
        _mark(ax, p, o, 0, tip, size=4 + 8 * (n / max(counts)) ** 0.5)
    ax.set(xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), ylabel="observed")
    return figure, f"Reliability of {model['label']}"


@_chart
def by_group(table: Table, axis: str) -> tuple[Figure, str]:
    """One band for each group, in it a mark for each of the best models; thin lines join neighbouring groups."""
    groups, rows = table.head[1:], table.known[:SERIES]
    figure, ax = _axes(len(groups) * (9 * len(rows) + 14) + 40, axis)
    for j, row in enumerate(rows):
        label, *cells = row.values()
        values = np.array([cell.number for cell in cells], float)
        ys = np.arange(len(groups)) + (j + 1) / (len(rows) + 1) - 0.5
        ax.plot(values, ys, color=_COLOUR[f"c{j + 1}"], lw=1, alpha=0.6, ls=(0, (3 + 2 * j, j)) if j else "-")
        for group, value, y in zip(groups, values, ys, strict=True):
            if np.isfinite(value):
                _mark(ax, value, y, j, f"{label.text}, {group}: {value:.4f}", size=6.5)
    for i in range(1, len(groups), 2):
        ax.axhspan(i - 0.5, i + 0.5, color=_COLOUR["soft"], lw=0)
    names = ["\n(".join(_short(part, 16) for part in group.rsplit(" (", 1)) for group in groups]
    ax.set_yticks(range(len(groups)), names)
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    return figure, table.title


@_chart
def gate_weights(gates: Mapping[str, Any], order: Sequence[int]) -> tuple[Figure, str]:
    """Users by experts as shades of one colour, from 0 (or the least, if that is below 0) to the greatest."""
    values, low = np.array(gates["values"])[order], np.min(gates["values"], initial=0)
    (users, experts), few = values.shape, len(order) <= 30
    figure, ax = _axes(16 * users + 70 if few else 550)
    shades = ListedColormap([(*to_rgb(_COLOUR["c1"]), share) for share in np.linspace(0.03, 0.8, 40)])
    mesh = ax.pcolormesh(values, cmap=shades, vmin=low)
    figure.colorbar(
        mesh, location="bottom", shrink=0.4, aspect=15, anchor=(0, 1), ticks=mesh.get_clim(), format="%.2f"
    )
    names = [_short(gates["users"][i], 14) for i in order] if few else []
    ax.set_yticks(np.arange(len(names)) + 0.5, names)
    ax.set_xticks(np.arange(experts) + 0.5, [str(j + 1) for j in range(experts)])
    ax.xaxis.tick_top()
    ax.grid(visible=False)
    ax.invert_yaxis()
    for i, j in np.ndindex(values.shape) if few and experts <= 8 else ():
        ax.text(j + 0.5, i + 0.5, f"{values[i, j]:.2f}", ha="center", va="center")
    return figure, "Gates: users by experts"


@_chart
def gate_map(gates: Mapping[str, Any], profiles: Collection[str]) -> tuple[Figure, str]:
    """The users in the plane, marked by their profile; axes are bare, as only distances count."""
    figure, ax = _axes(230)
    styles = {name: i for i, name in enumerate(profiles)}
    for i, (x, y) in enumerate(gates["coordinates"]):
        profile = clean(gates["profile"][i]) if gates["profile"] else ""
        tip = ", ".join(filter(None, [gates["users"][i], profile]))
        style = styles.get(profile, SERIES - 1) if profile else 0
        _mark(ax, x, y, style, tip, size=9 if len(gates["users"]) <= 100 else 5)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(visible=True, color=_COLOUR["line"])
    return figure, "Map of the users' gates"


def _short(text: Any, letters: int) -> str:
    text = clean(text)
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _axes(height: float, axis: str = "", width: float = 360) -> tuple[Figure, Axes]:
    """A figure with one plot; sizes are in units, 72 to an inch."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
    ax = figure.add_subplot()
    ax.set_xlabel(axis, loc="right")
    return figure, ax


def _mark(ax: Axes, x: float, y: float, style: int, tip: str, size: float = 8) -> None:
    """The mark of a style, with its tip."""
    colour = _COLOUR[f"c{style + 1}"]
    line = ax.plot(
        x, y, _MARKERS[style], color=colour, ms=size, mec=_COLOUR["paper"], mew=0.8, clip_on=False
    )[0]
    line.set(gid=f"tip {clean(tip)}", zorder=3)


def _inline(svg: str, title: str) -> Markup:
    """matplotlib's file as an element of a page, with the page's colours, a title, tips and a description."""
    _, size, body = re.split(r'viewBox="(.*?)".*?>', svg, maxsplit=1)
    body = re.sub(r": #0000(1\d|20)", lambda found: f": var(--{_VARIABLES[int(found[1]) - 10]})", body)
    tip = re.compile(r"""<g id=(["'])tip (.*?)\1>""")  # escaped, but for the quote that does not enclose it
    tips = "; ".join(text for _, text in tip.findall(body)[:30])
    body = re.sub(r'<g id="[\w.]+"(/?)>', r"<g\1>", tip.sub(r"<g><title>\2</title>", body))
    return Markup(
        f'<svg role="img" viewBox="{size}"><title>{escape(clean(title))}</title><desc>{tips}</desc>{body}'
    )
