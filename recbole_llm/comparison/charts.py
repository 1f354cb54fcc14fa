"""The pictures of a report as inline SVG, drawn by matplotlib (the extra `report`); without it reports show tables.

Charts are drawn on a canvas of 360 units, so that their text can be read on a narrow screen. Colours are variables of
the page's style sheet (`var(--c1)`, ..), for light and dark; shapes distinguish series without them. A mark has a tip,
its SVG title, which a pointer resting on it shows.
"""

from __future__ import annotations

import io
import logging
import math
import textwrap
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib.util import find_spec
from typing import Any

import numpy as np
from markupsafe import Markup

from recbole_llm.comparison.tables import clean, estimate_text, interval_text, marked, values_by_group
from recbole_llm.experiment.result import metric_title

AVAILABLE = find_spec("matplotlib") is not None
INSTALL = "Plots need matplotlib: pip install recbole_llm[report]"
SERIES = 6
"""As many series are distinguished in one chart."""
WIDTH = 360.0
_MARKERS = "osD^vP"
_VARIABLES = ("ink", "muted", "line", "soft", "paper", "heat", "on-heat", "c1", "c2", "c3", "c4", "c5", "c6")
_COLOUR = {name: f"#0000{i + 16:02x}" for i, name in enumerate(_VARIABLES)}  # replaced in the SVG
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "", "text.parse_math": False, "font.size": 11, "axes.unicode_minus": True,
    "text.color": _COLOUR["ink"], "axes.labelcolor": _COLOUR["muted"], "axes.edgecolor": _COLOUR["muted"],
    "axes.facecolor": "none", "axes.grid": True, "axes.axisbelow": True, "axes.formatter.useoffset": False,
    "grid.color": _COLOUR["line"], "axes.spines.top": False, "axes.spines.left": False, "axes.spines.right": False,
    "xtick.labelcolor": _COLOUR["ink"], "ytick.labelcolor": _COLOUR["ink"], "xtick.major.size": 0,
    "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0, "lines.linewidth": 1.4,
}  # fmt: skip


def style_of(kind: str) -> int:
    """The number of the colour and shape of a kind of model."""
    return {"llm": 0, "classical": 1, "reference": 2}.get(kind, 3)


def _chart(draw: Callable[..., tuple[Any, str, str]]) -> Callable[..., Markup]:
    """Makes ``f(..) -> svg`` of ``f(..) -> (figure, key, title)``; `key` begins its ids. Empty without matplotlib."""

    @wraps(draw)
    def drawn(*arguments: Any) -> Markup:
        if not AVAILABLE:
            return Markup("")
        import matplotlib

        # It warns of fonts without a glyph: the browser has others.
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        with warnings.catch_warnings(), matplotlib.rc_context(_STYLE):
            warnings.simplefilter("ignore")
            figure, key, title = draw(*arguments)
            file = io.BytesIO()
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        return _inline(file.getvalue(), key, title)

    return drawn


@_chart
def intervals(found: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> tuple[Any, str, str]:
    """Dot and whisker, one lane for each model: name and number above, below them the interval and the seeds."""
    metric, names = found["leading"], []
    for model in models:  # beside its number where there is room, else on two lines
        letters = max(8, int((WIDTH - 22 - 5.9 * len(estimate_text(model, metric))) / 6.9))
        names.append(textwrap.wrap(clean(model["label"]), letters, max_lines=2, placeholder="…") or [""])
    figure, ax = _axes(sum(24 + 13 * len(name) for name in names), _axis(found))
    top, place = 0, {"transform": ax.get_yaxis_transform(), "va": "baseline"}
    for model, name in zip(models, names, strict=True):
        estimate, text = model["metrics"][metric], estimate_text(model, metric)
        y = top + 13 * len(name) + 11
        for i, words in enumerate(name):
            ax.text(0, top + 13 * (i + 1) - 2, words, weight="bold", **place)
        ax.text(1, top + 11, text, ha="right", **place)
        top += 24 + 13 * len(name)
        mean, spread = estimate["mean"], estimate["sd"]
        if interval_text(estimate):
            ax.plot([estimate["low"], estimate["high"]], [y, y], color=_COLOUR["ink"], marker="|", ms=10)
        if len(model["seeds"]) > 1:
            if spread is not None:
                ends = {"xmin": mean - spread, "xmax": mean + spread}
                ax.hlines(y, **ends, color=_COLOUR["muted"], alpha=0.45, lw=6)
            values = [value for value in estimate["values"] if value is not None]
            ax.plot(values, [y + 7] * len(values), "|", color=_COLOUR["muted"], ms=5)
        _mark(ax, mean, y, style_of(model["kind"]), f"{model['label']}: {text} {interval_text(estimate)}")
    return figure, "intervals-svg", f"{metric_title(metric)}, best first"


@_chart
def cost(found: Mapping[str, Any], points: Sequence[tuple[float, float, str, int]]) -> tuple[Any, str, str]:
    """(seconds, value, tip, style): the leading metric against seconds, on a logarithmic axis, numbered from 1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, ax = _axes(230, "seconds of training and testing", left=46, top=24, y_ticks=True)
    places = [point[:2] for point in points]
    for seconds, value, tip, style in points:
        _mark(ax, seconds, value, style, tip)
    ax.set_title(
        _axis(found),
        loc="left",
        size=11,
        color=_COLOUR["muted"],
        x=-46 / (WIDTH - 54),
    )
    logs = [math.log10(seconds) for seconds, _ in places]
    ax.set(xscale="log", ylim=_limits([value for _, value in places]))
    ax.set_xlim(*(10**limit for limit in _limits(logs, 0.4)))
    decades = max(logs) - min(logs)
    steps = (1, 2, 5) if decades < 1.5 else (1, 3) if decades < 3 else (1,)
    ax.xaxis.set_major_locator(LogLocator(subs=steps))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1 else f"{v:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    taken = [tuple(place) for place in ax.transData.transform(places)]
    for i, (x, y) in enumerate(list(taken)):  # where the number is farthest from all marks and other numbers
        around = [(x + r * math.cos(a), y + r * math.sin(a)) for r in (11, 16) for a in range(8)]
        around = [place for place in around if ax.get_window_extent().contains(*place)] or around
        taken.append(max(around, key=lambda place: min(min(math.dist(place, other) for other in taken), 11)))
        ax.text(*taken[-1], str(i + 1), transform=None, weight="bold", ha="center", va="center")
    return figure, "cost-svg", f"{metric_title(found['leading'])} against cost"


@_chart
def reliability(model: Mapping[str, Any], number: int) -> tuple[Any, str, str]:
    """Observed against predicted share, both from 0 to 1; the area of a dot is proportional to its samples."""
    figure, ax = _axes(150, "predicted", width=192, left=36, right=6, y_ticks=True)
    predicted, observed, counts = (model["calibration"][key] for key in ("predicted", "observed", "counts"))
    ax.plot([0, 1], [0, 1], color=_COLOUR["muted"], lw=1, ls=(0, (4, 3)))
    ax.plot(predicted, observed, color=_COLOUR["c1"])
    for p, o, n in zip(predicted, observed, counts, strict=True):
        size = 4 + 8 * math.sqrt(max(n, 0) / (max(counts) or 1))
        _mark(ax, p, o, 0, f"predicted {p:.3f}, observed {o:.3f}, {n:,} samples", size)
    for ticks in (ax.set_xticks, ax.set_yticks):
        ticks((0, 0.5, 1), ("0", "0.5", "1"))
    ax.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), ylabel="observed")
    return figure, f"calibration-{number}", f"Reliability of {model['label']}"


@_chart
def by_group(found: Mapping[str, Any], name: str, number: int) -> tuple[Any, str, str]:
    """One band for each group, in it a mark for each of the best models; thin lines join neighbouring groups."""
    series = list(values_by_group(found, name).items())[:SERIES]
    groups = list(series[0][1])
    named = [group[:-1].rsplit(" (", 1) for group in groups]  # "5-12 (1,200 samples)"
    texts = [[_short(text, 16) for text in pair] for pair in named]
    left, lane = 6.2 * max(len(text) for pair in texts for text in pair) + 14, 9
    band, width = max(32, lane * len(series) + 12), WIDTH - left - 8
    figure, ax = _axes(band * len(groups), _axis(found), left=left)
    beside = {"transform": ax.get_yaxis_transform(), "x": (4 - left) / width}
    for i, (group, size) in enumerate(texts):
        if i % 2:
            stripe = {"color": _COLOUR["soft"], "lw": 0, "clip_on": False}
            ax.axhspan(band * i, band * i + band, -left / width, 1.1, **stripe)
        ax.text(y=band * (i + 0.5) - 2, s=group, weight="bold", **beside)
        ax.text(y=band * (i + 0.5) + 11, s=size, color=_COLOUR["muted"], **beside)
    for j, (label, values) in enumerate(series):
        ys = [band * (i + 0.5) + lane * (j - (len(series) - 1) / 2) for i in range(len(groups))]
        dashes = (0, (3 + 2 * j, j)) if j else "-"
        line = [math.nan if value is None else value for value in values.values()]
        ax.plot(line, ys, color=_COLOUR[f"c{j + 1}"], lw=1, alpha=0.6, ls=dashes)
        for (group, value), y in zip(values.items(), ys, strict=True):
            if value is not None:
                _mark(ax, value, y, j, f"{label}, {group}: {value:.4f}", 6.5)
    return figure, f"group-{number}", f"{metric_title(found['leading'])} by {name}"


@_chart
def gate_weights(gates: Mapping[str, Any], order: Sequence[int]) -> tuple[Any, str, str]:
    """Users by experts as shades of one colour, from 0 (or the least, if that is below 0) to the greatest."""
    from matplotlib.colors import ListedColormap

    values, columns, named = np.array(gates["values"])[order], gates["experts"], len(order) <= 30
    users = [gates["users"][i] for i in order] if named else [""]
    names = [_short(user, 14) for user in users]
    left, height = 6.2 * max(map(len, names)) + 10, 16.0 if named else max(1.5, 480 / len(order))
    figure, ax = _axes(height * len(order) + 40, "", left=left, right=4, top=18, bottom=2)
    ax.set_axis_off()
    low, high = min(0.0, values.min()), values.max()
    shares = (values - low) / (high - low) if high > low else np.full(values.shape, 0.5)
    bar, colours = height * len(order) + 10, ListedColormap([_COLOUR["heat"]])
    scale = np.linspace(0, 1, 20)[None]
    for top, step, right, cells in ((0, height, columns, shares), (bar, 8, columns / 3, scale)):
        xs, ys = np.linspace(0, right, cells.shape[1] + 1), top + step * np.arange(len(cells) + 1)
        shades = 0.04 + 0.96 * cells
        ax.pcolormesh(xs, ys, shades, cmap=colours, alpha=shades, lw=0)
    ax.text(0, bar + 21, f"{low:.2f}")
    ax.text(columns / 3, bar + 21, f"{high:.2f}", ha="right")
    for j in range(columns if columns <= 12 else 0):
        ax.text(j + 0.5, -5, str(j + 1), ha="center")
    for i, name in enumerate(names if named else ()):
        beside = {"transform": ax.get_yaxis_transform(), "x": (4 - left) / (WIDTH - left - 4)}
        ax.text(y=height * (i + 0.75), s=name, **beside)
        for j, value in enumerate(values[i] if (WIDTH - left) / columns >= 36 else ()):
            ink = _COLOUR["on-heat" if shares[i, j] > 0.55 else "ink"]
            ax.text(j + 0.5, height * (i + 0.75), f"{value:.2f}", color=ink, ha="center")
    return figure, "gates-svg", "Gates: users by experts"


@_chart
def gate_map(gates: Mapping[str, Any], profiles: Sequence[tuple[str, int]]) -> tuple[Any, str, str]:
    """The users in the plane, marked by their profile; axes are bare, as only distances count."""
    figure, ax = _axes(230, "", left=10)
    styles, size = {name: i for i, (name, _) in enumerate(profiles)}, 9 if len(gates["users"]) <= 100 else 5
    for i, (x, y) in enumerate(gates["coordinates"]):
        profile = clean(gates["profile"][i]) if gates["profile"] else ""
        style = styles.get(profile, SERIES - 1) if profile else 0
        _mark(ax, x, y, style, ", ".join(filter(None, [str(gates["users"][i]), profile])), size)
    ax.set(xticks=[], yticks=[], ylim=_limits([y for _, y in gates["coordinates"]]))
    ax.spines[:].set(visible=True, color=_COLOUR["line"])
    return figure, "map-svg", "Map of the users' gates"


def _short(text: Any, letters: int) -> str:
    return textwrap.shorten(clean(text), letters, placeholder="…")


def _axis(found: Mapping[str, Any]) -> str:
    return marked(found, found["leading"], " (less is better)")


def _axes(
    height: float, axis: str, width: float = WIDTH, left: float = 8, right: float = 8, top: float = 6,
    bottom: float = 36, y_ticks: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """A figure with one plot `height` units high, margins in units; y counts units downwards."""
    from matplotlib.figure import Figure

    total = height + top + bottom
    figure = Figure(figsize=(width / 72, total / 72), dpi=72)
    box = left / width, bottom / total, (width - left - right) / width, height / total
    ax = figure.add_axes(box, ylim=(height, 0))
    if not y_ticks:
        ax.set_yticks([])
    ax.set_xlabel(axis, loc="right")
    return figure, ax


def _limits(values: Sequence[float], least: float | None = None) -> tuple[float, float]:
    """A range with some room at both ends."""
    low, high = min(values), max(values)
    room = (high - low) * 0.08
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = least or abs(low) * 0.02 or 0.5
    return low - room, high + room


def _mark(ax: Any, x: float, y: float, style: int, tip: str, size: float = 8) -> None:
    """The mark of a style, with its tip."""
    look = {"marker": _MARKERS[style], "color": _COLOUR[f"c{style + 1}"], "mec": _COLOUR["paper"], "mew": 0.8}
    ax.plot([x], [y], ms=size, gid=f"tip {clean(tip)}", clip_on=False, zorder=3, **look)


def _inline(content: bytes, key: str, title: str) -> Markup:
    """matplotlib's file as an element of a page: its own ids, the page's colours and fonts, title and description."""
    root, tips = ElementTree.fromstring(content), []
    for parent in root.iter():
        for child in [child for child in parent if child.tag.endswith(("}metadata", "}style", "}clipPath"))]:
            parent.remove(child)
    for element in list(root.iter()):
        element.tag = element.tag.rsplit("}")[-1]
        attributes = {name.rsplit("}")[-1]: value for name, value in element.attrib.items()}
        element.attrib.clear()
        name = attributes.pop("id", "")
        if name.startswith("tip "):
            tips.append(name[4:])
            element.insert(0, _text("title", name[4:]))
        elif element.tag != "g" and name:
            attributes["id"] = f"{key}-{name}"
        attributes.pop("clip-path", None)
        if "href" in attributes:
            attributes["href"] = f"#{key}-{attributes['href'][1:]}"
        if "style" in attributes:
            kept = [part for part in attributes["style"].split("; ") if not part.startswith("font-family")]
            attributes["style"] = "; ".join(kept)
            for variable, colour in _COLOUR.items():
                attributes["style"] = attributes["style"].replace(colour, f"var(--{variable})")
        element.attrib.update(attributes)
    labels = {"role": "img", "aria-labelledby": f"{key}-title {key}-desc", "viewBox": root.attrib["viewBox"]}
    root.attrib.clear()
    root.attrib.update(labels)
    more = [f"and {len(tips) - 30} more"] if len(tips) > 30 else []
    root.insert(0, _text("title", clean(title), id=f"{key}-title"))
    root.insert(1, _text("desc", "; ".join(tips[:30] + more), id=f"{key}-desc"))
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))


def _text(tag: str, text: str, **attributes: str) -> ElementTree.Element:
    element = ElementTree.Element(tag, attributes)
    element.text = text
    return element
