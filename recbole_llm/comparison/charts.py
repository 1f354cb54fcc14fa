"""Small charts as SVG, in plain strings: no script, no fonts, no dependency.

A chart is drawn on a canvas of 360 units so that its text can be read on a narrow screen. Colours are CSS classes
(`c1` .. `c6`, `axis`, `heat`, ..) that the page defines for light and dark; shapes and dashes tell series apart
without them.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recbole_llm.comparison.tables import clean

WIDTH = 360
SHAPES = ("circle", "square", "diamond", "triangle", "wedge", "plus")
DASHES = ("none", "5 3", "2 2", "7 2 2 2", "9 3", "1 3")
_CHAR = 5.9  # a generous mean width of a letter at 11 units
_BOLD = 6.9
_A = 0.4
_POLYGONS = {
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    "triangle": ((0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
    "wedge": ((0, 1.2), (1.15, -0.9), (-1.15, -0.9)),
    "plus": (
        (-_A, -1.2), (_A, -1.2), (_A, -_A), (1.2, -_A), (1.2, _A), (_A, _A),
        (_A, 1.2), (-_A, 1.2), (-_A, _A), (-1.2, _A), (-1.2, -_A), (-_A, -_A),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A line of `interval_chart`: `text` stands at the right, `style` is the colour's and shape's number."""

    name: str
    text: str
    value: float
    low: float | None = None
    high: float | None = None
    spread: float | None = None
    values: tuple[float, ...] = ()
    style: int = 0


@dataclass(frozen=True)
class Point:
    """A mark of `scatter_chart`; `tip` is what a pointer resting on it shows, `label` stands beside it."""

    x: float
    y: float
    tip: str
    label: str = ""
    style: int = 0


@dataclass(frozen=True)
class Series:
    """The values of one model in the groups of `group_chart`."""

    name: str
    values: tuple[float | None, ...]
    style: int = 0


class Scale:
    """A map from numbers to positions, with room at both ends and ticks at round numbers."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool = False) -> None:
        """`values` are what has to fit, all positive with `log`."""
        self._log = log
        numbers = [math.log10(value) if log else value for value in values]
        low, high = min(numbers), max(numbers)
        room = (high - low) * 0.06
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # one number, or as good as one
            room = 0.4 if log else abs(low) * 0.02 or 0.5
        self._low, self._high = low - room, high + room
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        number = math.log10(value) if self._log else value
        return self._start + (number - self._low) / (self._high - self._low) * (self._end - self._start)

    def ticks(self, wanted: int = 5) -> list[tuple[float, str]]:
        """(position, text) of about [wanted] round numbers within the scale."""
        if self._log:
            decades = range(math.floor(self._low), math.ceil(self._high) + 1)
            for factors in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
                found = [f * 10.0**d for d in decades for f in factors]
                found = [v for v in found if self._low <= math.log10(v) <= self._high]
                if len(found) >= min(3, wanted):
                    break
            found = found[:: max(1, math.ceil(len(found) / (wanted + 1)))]
            return [(self(v), f"{v:,.0f}" if v >= 1 else f"{v:g}") for v in found]
        rough = (self._high - self._low) / wanted
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * 0.75)
        decimals = max(0, -math.floor(math.log10(step)) + (f"{step / power:g}" == "2.5"))
        first = math.ceil(self._low / step)
        values = [i * step for i in range(first, math.floor(self._high / step) + 1)]
        return [(self(v), _number(v, decimals)) for v in values]


def escape(text: Any, lines: bool = False) -> str:
    """`text` for HTML, in elements as in quoted attributes; see `compare_tables.clean`."""
    return html.escape(clean(text, lines))


def shorten(text: str, letters: int) -> str:
    """At most [letters] letters, the last an ellipsis where some were left out."""
    text = clean(text)
    return text if len(text) <= letters else text[: max(1, letters - 1)] + "…"


def mark(style: int, x: float, y: float, size: float = 4.5) -> str:
    """The mark of a style at a place: its own shape and its own colour."""
    shape, css = SHAPES[style % len(SHAPES)], f"c{style % len(SHAPES) + 1}"
    if shape == "circle":
        return f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>'
    points = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in _POLYGONS[shape])
    return f'<polygon class="{css}" points="{points}"/>'


def swatch(style: int) -> str:
    """A style's mark alone, for a legend."""
    return f'<svg class="swatch" viewBox="0 0 14 14" aria-hidden="true">{mark(style, 7, 7)}</svg>'


def interval_chart(key: str, title: str, lines: Sequence[Estimate], axis: str) -> str:
    """Dot and whisker, one line for each model: name and number above, below them the interval and the seeds."""
    top, below, line = 6, 24, 13
    # A name stands beside its number where there is room, else on two lines.
    names = [_wrapped(e.name, int((WIDTH - 22 - _CHAR * len(e.text)) / _BOLD)) for e in lines]
    bottom = top + sum(below + line * len(name) for name in names)
    shown = [v for e in lines for v in (e.value, e.low, e.high, *e.values) if v is not None]
    shown += [e.value + s * e.spread for e in lines if e.spread is not None for s in (-1, 1)]
    scale = Scale(shown, 8, WIDTH - 8)
    parts = _x_axis(scale, top, bottom, axis)
    start = top
    for e, name in zip(lines, names, strict=True):
        y, x = start + line * len(name) + 12, scale(e.value)
        for j, words in enumerate(name):
            parts.append(f'<text class="name halo" x="4" y="{start + line * (j + 1)}">{escape(words)}</text>')
        parts.append(
            f'<text class="halo" x="{WIDTH - 4}" y="{start + line}" text-anchor="end">{escape(e.text)}</text>'
        )
        start += below + line * len(name)
        if e.low is not None and e.high is not None:
            low, high = scale(e.low), scale(e.high)
            path = f"M{low:.1f} {y - 5}v10M{low:.1f} {y}H{high:.1f}M{high:.1f} {y - 5}v10"
            parts.append(f'<path class="whisker" d="{path}"/>')
        if e.spread is not None:
            half = scale(e.value + e.spread) - x
            parts.append(
                f'<rect class="spread" x="{x - half:.1f}" y="{y - 3}" width="{2 * half:.1f}" height="6"/>'
            )
        ticks = "".join(f"M{scale(v):.1f} {y + 4}v5" for v in e.values)
        parts.append(f'<path class="seed" d="{ticks}"/>' if ticks else "")
        interval = "" if e.low is None or e.high is None else f", 95% interval {e.low:.4f} to {e.high:.4f}"
        parts.append(_tipped(f"{e.name}: {e.text}{interval}", mark(e.style, x, y)))
    said = "; ".join(
        f"{e.name} {e.text}"
        + ("" if e.low is None or e.high is None else f" from {e.low:.4f} to {e.high:.4f}")
        for e in lines
    )
    return _svg(key, title, said, WIDTH, bottom + 36, parts)


def scatter_chart(
    key: str,
    title: str,
    points: Sequence[Point],
    x_axis: str,
    y_axis: str,
    log_x: bool = False,
    ticks: bool = True,
) -> str:
    """Points in the plane; labels are put where they cover nothing, as far as there is room.

    Without `ticks` the axes are bare: only distances count.
    """
    left, right, top, bottom = (46 if ticks else 10), WIDTH - 10, 22, 250
    x_scale = Scale([p.x for p in points], left + 4, right - 4, log_x)
    y_scale = Scale([p.y for p in points], bottom - 4, top + 4)
    parts = [f'<text class="axis-title" x="2" y="12">{escape(y_axis)}</text>']
    if ticks:
        parts += _x_axis(x_scale, top, bottom, x_axis) + _y_axis(y_scale, left, right)
        height = bottom + 36
    else:
        parts.append(
            f'<rect class="frame" x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"/>'
        )
        parts.append(
            f'<text class="axis-title" x="{right}" y="{bottom + 14}" text-anchor="end">{escape(x_axis)}</text>'
        )
        height = bottom + 20
    size = 5.0 if len(points) <= 100 else 3.0
    places = [(x_scale(p.x), y_scale(p.y)) for p in points]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places] if any(p.label for p in points) else []
    for point, (x, y) in zip(points, places, strict=True):
        parts.append(_tipped(point.tip, mark(point.style, x, y, size)))
        if point.label:
            box = _free_place(x, y, point.label, taken, (left, top, right, bottom))
            taken.append(box)
            parts.append(
                f'<text class="label halo" x="{(box[0] + box[2]) / 2:.1f}" y="{box[3] - 1.5:.1f}" text-anchor="middle">'
                f"{escape(point.label)}</text>"
            )
    said = "; ".join(p.tip for p in points[:30]) + (
        f"; and {len(points) - 30} more" if len(points) > 30 else ""
    )
    return _svg(key, title, said, WIDTH, height, parts)


def calibration_chart(
    key: str, title: str, predicted: Sequence[float], observed: Sequence[float], counts: Sequence[float]
) -> str:
    """Observed against predicted share, both from 0 to 1; the area of a dot goes with its number of rows."""
    left, top, side = 30, 8, 150
    place = [(left + side * p, top + side * (1 - o)) for p, o in zip(predicted, observed, strict=True)]
    parts = []
    for tick in (0.0, 0.5, 1.0):
        x, y, text = left + side * tick, top + side * (1 - tick), f"{tick:g}"
        parts.append(f'<path class="grid" d="M{x:.1f} {top}v{side}M{left} {y:.1f}h{side}"/>')
        parts.append(f'<text x="{x:.1f}" y="{top + side + 13}" text-anchor="middle">{text}</text>')
        parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    parts.append(f'<path class="diagonal" d="M{left} {top + side}L{left + side} {top}"/>')
    parts.append(
        f'<text class="axis-title" x="{left + side / 2}" y="{top + side + 28}" text-anchor="middle">predicted</text>'
    )
    y = top + side / 4
    parts.append(
        f'<text class="axis-title" transform="translate(10 {y}) rotate(-90)" text-anchor="middle">observed</text>'
    )
    parts.append(f'<polyline class="line s1" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in place)}"/>')
    most = max(counts, default=0) or 1
    for (x, y), p, o, n in zip(place, predicted, observed, counts, strict=True):
        tip = f"predicted {p:.3f}, observed {o:.3f}, {n:,} rows"
        parts.append(_tipped(tip, mark(0, x, y, 2 + 4 * math.sqrt(max(n, 0) / most))))
    said = "; ".join(
        f"{p:.2f} predicted, {o:.2f} observed, {n:,} rows"
        for p, o, n in zip(predicted, observed, counts, strict=True)
    )
    return _svg(key, title, said, left + side + 12, top + side + 34, parts)


def group_chart(
    key: str, title: str, groups: Sequence[tuple[str, str]], series: Sequence[Series], axis: str
) -> str:
    """One row for each group (name, count), in it a dot for each series that has a value; thin lines join a series."""
    letters = min(16, max(len(clean(text)) for pair in groups for text in pair))
    left, top, lane = int(letters * _CHAR) + 12, 6, 9
    row = max(32, lane * len(series) + 12)
    bottom = top + row * len(groups)
    scale = Scale([v for s in series for v in s.values if v is not None], left + 4, WIDTH - 8)
    parts = []
    for i, (name, count) in enumerate(groups):
        y = top + row * i
        parts.append(f'<rect class="band{i % 2}" x="0" y="{y}" width="{WIDTH}" height="{row}"/>')
        parts.append(f'<text class="name" x="4" y="{y + row / 2 - 2:.1f}">{escape(shorten(name, 16))}</text>')
        parts.append(
            f'<text class="muted" x="4" y="{y + row / 2 + 11:.1f}">{escape(shorten(count, 16))}</text>'
        )
    parts += _x_axis(scale, top, bottom, axis)
    for j, s in enumerate(series):
        offset = row / 2 + lane * (j - (len(series) - 1) / 2)
        run: list[str] = []
        for i, value in enumerate([*s.values, None]):
            if value is not None:
                run.append(f"{scale(value):.1f},{top + row * i + offset:.1f}")
                continue
            if len(run) > 1:  # a line joins neighbours only
                dash = DASHES[s.style % len(DASHES)]
                css = f"thin s{s.style % len(SHAPES) + 1}"
                parts.append(f'<polyline class="{css}" stroke-dasharray="{dash}" points="{" ".join(run)}"/>')
            run = []
        for i, value in enumerate(s.values):
            if value is not None:
                tip = f"{s.name}, {groups[i][0]} ({groups[i][1]}): {value:.4f}"
                parts.append(_tipped(tip, mark(s.style, scale(value), top + row * i + offset, 3.6)))
    said = "; ".join(
        f"{s.name}: " + ", ".join("none" if value is None else f"{value:.4f}" for value in s.values)
        for s in series
    )
    return _svg(
        key,
        title,
        f"Groups {', '.join(clean(name) for name, _ in groups)}. {said}",
        WIDTH,
        bottom + 36,
        parts,
    )


def heat_map(
    key: str, title: str, rows: Sequence[tuple[str, Sequence[float]]], columns: Sequence[str]
) -> str:
    """Rows of numbers as shades of one colour, from 0 (or the least, if that is below 0) to the greatest."""
    named = len(rows) <= 30
    letters = min(14, max(len(clean(name)) for name, _ in rows)) if named else 0
    left, top = int(letters * _CHAR) + 10, 20
    height = 16.0 if named else max(1.5, 480 / len(rows))
    width = (WIDTH - left - 4) / len(columns)
    numbers = [value for _, values in rows for value in values]
    low, high = min(0.0, min(numbers)), max(numbers)
    parts = []
    for j, column in enumerate(columns):
        if len(columns) <= 12:
            x, text = left + width * (j + 0.5), escape(shorten(column, 6))
            parts.append(f'<text x="{x:.1f}" y="13" text-anchor="middle">{text}</text>')
    for i, (name, values) in enumerate(rows):
        y = top + height * i
        if named:
            parts.append(f'<text x="4" y="{y + 12:.1f}">{escape(shorten(name, 14))}</text>')
        for j, value in enumerate(values):
            share = (value - low) / (high - low) if high > low else 0.5
            gap = 1 if named else 0
            cell = (
                f'<rect class="heat" x="{left + width * j:.1f}" y="{y:.1f}" width="{width - 1:.1f}" '
                f'height="{height - gap:.1f}" fill-opacity="{0.04 + 0.96 * share:.3f}"/>'
            )
            parts.append(_tipped(f"{name}, {columns[j]}: {value:.4f}", cell) if named else cell)
            if named and width >= 36:
                ink = "on-heat" if share > 0.55 else ""
                x = left + width * (j + 0.5) - 0.5
                parts.append(
                    f'<text class="{ink}" x="{x:.1f}" y="{y + 12:.1f}" text-anchor="middle">{value:.2f}</text>'
                )
    y = top + height * len(rows) + 10
    for i in range(20):
        place = f'x="{left + i * 6}" y="{y:.1f}" width="6" height="8"'
        parts.append(f'<rect class="heat" {place} fill-opacity="{0.04 + 0.96 * i / 19:.3f}"/>')
    parts.append(f'<text x="{left}" y="{y + 21:.1f}">{low:.2f}</text>')
    parts.append(f'<text x="{left + 120}" y="{y + 21:.1f}" text-anchor="end">{high:.2f}</text>')
    said = "; ".join(f"{name}: " + ", ".join(f"{v:.2f}" for v in values) for name, values in rows[:30])
    return _svg(key, title, said, WIDTH, y + 28, parts)


def _svg(key: str, title: str, said: str, width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg role="img" aria-labelledby="{key}-title {key}-desc" viewBox="0 0 {width:.0f} {height:.0f}">'
        f'<title id="{key}-title">{escape(title)}</title><desc id="{key}-desc">{escape(said)}</desc>'
        f"{''.join(parts)}</svg>"
    )


def _wrapped(text: str, letters: int) -> list[str]:
    """At most two lines; what does not fit ends in an ellipsis."""
    return textwrap.wrap(clean(text), max(letters, 8), max_lines=2, placeholder="…") or [""]


def _tipped(tip: str, drawn: str) -> str:
    return f"<g><title>{escape(tip)}</title>{drawn}</g>"


def _x_axis(scale: Scale, top: float, bottom: float, title: str) -> list[str]:
    parts, last = [], -math.inf
    for x, text in scale.ticks():
        parts.append(f'<path class="grid" d="M{x:.1f} {top}V{bottom}"/>')
        half = len(text) * _CHAR / 2
        middle = min(max(x, half), WIDTH - half)
        if middle - half > last + 4:
            parts.append(f'<text x="{middle:.1f}" y="{bottom + 14:.1f}" text-anchor="middle">{text}</text>')
            last = middle + half
    parts.append(f'<path class="axis" d="M0 {bottom}H{WIDTH}"/>')
    parts.append(
        f'<text class="axis-title" x="{WIDTH - 4}" y="{bottom + 30}" text-anchor="end">{escape(title)}</text>'
    )
    return parts


def _y_axis(scale: Scale, left: float, right: float) -> list[str]:
    parts = []
    for y, text in scale.ticks():
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    return parts


def _free_place(
    x: float, y: float, label: str, taken: Sequence[tuple[float, ...]], inside: tuple[float, ...]
) -> tuple[float, float, float, float]:
    """The box (left, top, right, bottom) for a label beside (x, y) that covers the least of what is taken."""
    half, height = len(label) * 3.3 + 1, 12
    best, least = None, math.inf
    for away in (0, 7, 14):
        for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1)):
            cx, cy = x + dx * (8 + half + away), y + dy * (12 + away)
            box = (cx - half, cy - height / 2, cx + half, cy + height / 2)
            covered = sum(
                max(0.0, min(box[2], b[2]) - max(box[0], b[0]))
                * max(0.0, min(box[3], b[3]) - max(box[1], b[1]))
                for b in taken
            )
            out = box[0] < inside[0] or box[1] < inside[1] or box[2] > inside[2] or box[3] > inside[3]
            cost = covered + 1000 * out + away
            if cost < least:
                best, least = box, cost
    assert best is not None
    return best


def _number(value: float, decimals: int) -> str:
    return f"{value:,.{decimals}f}".replace("-", "−") if round(value, decimals) else f"{0:.{decimals}f}"
