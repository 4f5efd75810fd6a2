"""Metrics to lines, lines to SVG charts and tables, and sentences that say what they show.

report.py makes the page of them. Every text goes through `esc` on its way into the page.
"""

from __future__ import annotations

import html
import math
import re
from collections import defaultdict
from itertools import groupby
from typing import NamedTuple

from data.scores import mean_and_se

HUGE = 1e12  # a larger value is no measurement, and its square would soon overflow
LEFT, RIGHT, TOP, BOTTOM = 50, 430, 24, 194  # of the axes, in a picture of 440 × 232
FEW = 24  # points: each of so many gets a dot


class Point(NamedTuple):
    step: float
    mean: float  # over the runs; NaN where no run has a finite value
    error: float  # standard error over the runs, or the one that a single run recorded; 0: unknown


class Line(NamedTuple):
    name: str
    style: str  # a class of report.css: a colour and a dash pattern
    points: list[Point]


def figure(quantity, unit, lines, finding, note, marks=()) -> str:
    """One chart with its finding as the title, its legend, and its numbers as a table.

    unit: "%" for shares between 0 and 1, else a word. Every line has a finite point.
    marks: the steps at which the teacher leaves.
    """
    legend = [f"<li>{swatch(line.style)} {esc(line.name)}</li>" for line in lines]
    cells = defaultdict(lambda: [""] * len(lines))  # step: a cell for each line
    for column, line in enumerate(lines):
        for p in line.points:
            cells[p.step][column] = with_error(p, unit)
    rows = [[f"{step:g}", *row] for step, row in sorted(cells.items())]
    caption = f"{quantity} ({unit or 'a number'}) by step"
    numbers = table(caption, ["step", *(line.name for line in lines)], rows)
    return f"""<figure><figcaption><p class="kicker">{esc(quantity)}</p><h3>{esc(finding)}</h3>
</figcaption><ul>{"".join(legend)}</ul>
{line_chart(quantity, unit, lines, finding, marks)}
<p class="note">{esc(note)}</p>
<details><summary>Numbers</summary>{numbers}</details></figure>
"""


def line_chart(quantity, unit, lines, finding, marks) -> str:
    """The picture: axes with ticks and units, bands of ± error, a dash pattern for each line."""
    points = [p for line in lines for p in finite(line.points)]
    edges = [edge for p in points for edge in band(p, unit)]
    y_ticks = ticks(min(edges), max(edges))
    plot = Plot(unit, max(1, max(p.step for p in points)), y_ticks[0], y_ticks[-1])
    bands, strokes = [], []
    for line in lines:
        for measured, piece in groupby(line.points, key=lambda p: math.isfinite(p.mean)):
            piece = list(piece)
            if measured and any(p.error for p in piece):
                bands.append(plot.band(piece, line.style))
            if measured:
                strokes += plot.stroke(piece, line.style)
    leaving = [plot.mark(step) for step in marks if step <= plot.last]
    parts = [*plot.axes(y_ticks), *leaving, *bands, *strokes]
    return f"""<svg viewBox="0 0 440 232" role="img" aria-label="{esc(quantity)}: {esc(finding)}">
<title>{esc(finding)}</title>{"".join(parts)}</svg>"""


class Plot(NamedTuple):
    """The area between the axes: where a step and a value lie, and what is drawn there."""

    unit: str
    last: float  # step
    low: float
    high: float

    def x(self, step) -> str:
        return f"{LEFT + step / self.last * (RIGHT - LEFT):.1f}"

    def y(self, value) -> str:
        share = (value - self.low) / (self.high - self.low)
        return f"{BOTTOM - share * (BOTTOM - TOP):.1f}"

    def corners(self, pairs) -> str:
        return " ".join(f"{self.x(step)},{self.y(value)}" for step, value in pairs)

    def axes(self, y_ticks) -> list[str]:
        parts = [label("end", RIGHT, BOTTOM + 33, "training step")]
        if self.unit != "%":  # the ticks say %
            parts.append(label("start", 2, TOP - 10, self.unit))
        for value in y_ticks:
            shown = f"{100 * value:.6g}%" if self.unit == "%" else f"{value:,g}"
            parts.append(f'<path class="rule" d="M{LEFT},{self.y(value)}H{RIGHT}"/>')
            parts.append(label("end", LEFT - 6, self.y(value), shown, "dy='.35em'"))
        for step in ticks(0, self.last, whole=True):
            if step <= self.last:
                parts.append(label("middle", self.x(step), BOTTOM + 17, f"{step:g}"))
        return [*parts, f'<path class="axis" d="M{LEFT},{BOTTOM}H{RIGHT}"/>']

    def mark(self, step) -> str:
        anchor = "end" if step > self.last / 2 else "start"
        words = label(anchor, self.x(step), TOP - 10, f"teacher leaves, step {step:g}")
        return f'<path class="mark" d="M{self.x(step)},{TOP - 6}V{BOTTOM}"/>{words}'

    def band(self, points, style) -> str:
        upper = [(p.step, band(p, self.unit)[1]) for p in points]
        lower = [(p.step, band(p, self.unit)[0]) for p in reversed(points)]
        return f'<polygon class="band {style}" points="{self.corners(upper + lower)}"/>'

    def stroke(self, points, style) -> list[str]:
        corners = self.corners((p.step, p.mean) for p in points)
        parts = [f'<polyline class="line {style}" points="{corners}"/>']
        for p in points if len(points) <= FEW else ():
            x, y = self.x(p.step), self.y(p.mean)
            parts.append(f'<circle class="{style}" cx="{x}" cy="{y}" r="2.6"/>')
        return parts


def label(anchor, x, y, words, more="") -> str:
    return f'<text text-anchor="{anchor}" x="{x}" y="{y}" {more}>{esc(words)}</text>'


def swatch(style) -> str:
    path = f'<path class="line {style}" d="M1,5H33"/>'
    return f'<svg class="swatch" viewBox="0 0 34 10" aria-hidden="true">{path}</svg>'


def band(p: Point, unit) -> tuple[float, float]:
    """mean ± error; a share's ends at 0 and 1."""
    low, high = p.mean - p.error, p.mean + p.error
    return (max(0.0, low), min(1.0, high)) if unit == "%" else (low, high)


def ticks(low: float, high: float, whole=False) -> list[float]:
    """Round numbers around low to high; from 0, unless the values lie close together far above."""
    if math.isclose(low, high) or 0 <= low < high / 2:
        low, high = min(low, 0.0), max(high, 0.0)
    if math.isclose(low, high):
        high = low + 1.0
    power = 10 ** math.floor(math.log10((high - low) / 4))
    multiples = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(m * power for m in multiples if m * power * 5 >= (high - low) * 0.999999)
    if whole:
        step = max(step, 1)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def number(metrics: dict, key: str) -> float | None:
    """None: not measured at that step. NaN: measured, and no number that could be drawn."""
    return as_float(metrics[key]) if key in metrics else None


def as_float(value) -> float:
    fits = isinstance(value, int | float) and abs(value) < HUGE
    return float(value) if fits else math.nan


def series(runs, measure, every=1) -> list[Point]:
    """Mean and standard error over the runs at each step, or over each `every` steps.

    measure: the name of a metric, or a function of a step's metrics (None: not measured).
    """
    bins, recorded = defaultdict(lambda: defaultdict(list)), {}
    for i, run in enumerate(runs):
        for m in run.metrics:
            value = measure(m) if callable(measure) else number(m, measure)
            if value is None:
                continue
            by_run = bins[m["step"] // every]  # without a finite value: a gap in the line
            if abs(value) < HUGE:
                by_run[i].append(value)
                recorded[m["step"] // every] = number(m, f"{measure}_se") or 0.0
    points = []
    for place, by_run in sorted(bins.items()):
        means = [mean_and_se(values)[0] for values in by_run.values()]
        mean, error = mean_and_se(means) if means else (math.nan, 0.0)
        if len(runs) == 1 and len(by_run[0]) == 1:
            error = recorded[place]
        error = error if error > 1e-9 * abs(mean) else 0.0  # less is rounding
        points.append(Point(place * every + (every - 1) / 2, mean, error))
    return points


def finite(points) -> list[Point]:
    return [p for p in points if math.isfinite(p.mean)]


def format_value(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return "–"
    if unit == "%" and 0 < value < 0.0005:
        return "under 0.1%"
    if unit == "%":
        return f"{100 * value:.1f}".removesuffix(".0") + "%"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def with_error(p: Point, unit) -> str:
    shown = format_value(p.mean, unit)
    return f"{shown} ± {format_value(p.error, unit)}" if p.error else shown


def trends(lines: list[Line], unit: str) -> str:
    """What each line does; of more than three, where the highest and the lowest end."""
    if len(lines) <= 3:
        return "; ".join(f"{line.name} {trend(line.points, unit)}" for line in lines)
    ends = sorted((finite(line.points)[-1].mean, line.name) for line in lines)
    (low, lowest), (high, highest) = ends[0], ends[-1]
    high, low = format_value(high, unit), format_value(low, unit)
    return f"{highest} ends highest ({high}), {lowest} lowest ({low})"


def trend(points: list[Point], unit: str) -> str:
    """What a line does, in words: its first tenth against its last.

    They differ if they are more than twice the standard error apart.
    """
    points = finite(points)
    values = [p.mean for p in points]
    width = max(1, len(points) // 10)
    windows = [mean_and_se(values[i : i + width]) for i in range(len(points) - width + 1)]
    (first, e1), (last, e2) = windows[0], windows[-1]
    if width == 1:
        e1, e2 = points[0].error, points[-1].error
    noise = 2 * math.hypot(e1, e2)
    start, end = format_value(first, unit), format_value(last, unit)
    low, high = min(windows)[0], max(windows)[0]
    far = max(2 * noise, (high - low) / 2)
    if len(points) == 1:
        return f"is at {end}"
    if high - max(first, last) > far or min(first, last) - low > far:
        low, high = format_value(low, unit), format_value(high, unit)
        return f"moves between {low} and {high} and ends at {end}"
    if start == end:
        return f"stays at {end}"
    if abs(last - first) <= noise:
        return f"shows no clear change ({start} to {end})"
    return f"{'rises' if last > first else 'falls'} from {start} to {end}"


def averages(lines: list[Line], unit: str) -> str:
    means = []
    for line in lines:
        mean, _ = mean_and_se([p.mean for p in finite(line.points)])
        means.append(f"{line.name} {format_value(mean, unit)}")
    return "On average: " + ", ".join(means)


def table(caption, heads, rows) -> str:
    head = "".join(f'<th scope="col">{esc(h)}</th>' for h in heads)
    body = []
    for first, *others in rows:
        cells = "".join(f"<td>{esc(cell)}</td>" for cell in others)
        body.append(f'<tr><th scope="row">{esc(first)}</th>{cells}</tr>\n')
    caption = esc(caption)
    return f"""<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table>
<caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>
{"".join(body)}</tbody></table></div>
"""


# Characters that HTML does not allow.
UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def esc(text) -> str:
    return html.escape(UNFIT.sub("\ufffd", str(text)))
