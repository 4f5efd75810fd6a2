"""Metrics to lines, lines to SVG charts, tables of their numbers, and sentences of what they show. report.py is the page.

Everything that is text goes through `esc` on its way into the page.
"""

from __future__ import annotations

import html
import math
import re
from collections import defaultdict
from typing import NamedTuple

from data.scores import mean_and_se

HUGE = 1e12  # what is larger is no measurement, and its square would soon overflow


class Point(NamedTuple):
    step: float
    mean: float  # over the runs; NaN where no run has a finite value
    error: float  # standard error over the runs; of one run the error that it recorded, if any; 0: none known


class Line(NamedTuple):
    name: str
    style: str  # a class of report.css: a colour and a dash pattern
    points: list[Point]


def figure(quantity, unit, lines, note, title, marks=()) -> str:
    """One chart with its finding, legend, and the numbers as a table; nothing if no line has a number.

    unit: "%" for shares between 0 and 1, else a word. title(lines, unit) is the finding. marks: [(step, label)].
    """
    lines = [line for line in lines if finite(line.points)]
    if not lines:
        return ""
    says = title(lines, unit)
    legend = "".join(f"<li>{swatch(line.style)} {esc(line.name)}</li>" for line in lines)
    cells = [{p.step: plus_minus(p.mean, p.error, unit) for p in line.points} for line in lines]
    numbers = table(f"{quantity} ({unit or 'a number'}) by step", ["step", *(line.name for line in lines)],
                    [[f"{step:g}", *(c.get(step, "") for c in cells)] for step in sorted(set().union(*cells))])
    return (f'<figure><figcaption><p class="kicker">{esc(quantity)}</p><h3>{esc(says)}</h3></figcaption>\n'
            f'<ul class="legend">{legend}</ul>\n{line_chart(quantity, unit, lines, says, marks)}\n'
            f'<p class="note">{esc(note)}</p>{details("Numbers", numbers)}</figure>\n')


def line_chart(quantity, unit, lines, says, marks) -> str:
    """A line chart: axes with ticks and units, bands of ± error, one dash pattern a line, vertical `marks` (step, label)."""
    left, right, top, bottom = 50, 430, 24, 194
    points = [p for line in lines for p in finite(line.points)]
    last = max(1, max(p.step for p in points))
    edges = {p: band(p, unit) for p in points}
    y_ticks = ticks(min(low for low, _ in edges.values()), max(high for _, high in edges.values()))

    def x(step):
        return f"{left + step / last * (right - left):.1f}"

    def y(value):
        return f"{bottom - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - top):.1f}"

    parts = [text("start", 2, top - 10, unit)] if unit != "%" else []  # the ticks say %
    for v in y_ticks:
        label = f"{100 * v:.6g}%" if unit == "%" else f"{v:,g}"
        parts.append(f'<path class="rule" d="M{left},{y(v)}H{right}"/>' + text("end", left - 6, y(v), label, "dy='.35em'"))
    for step in ticks(0, last, whole=True):
        if step <= last:
            parts.append(f'<path class="axis" d="M{x(step)},{bottom}v4"/>' + text("middle", x(step), bottom + 17, f"{step:g}"))
    parts.append(f'<path class="axis" d="M{left},{bottom}H{right}"/>' + text("end", right, bottom + 33, "training step"))
    for step, label in marks:
        if step <= last:
            parts.append(f'<path class="mark" d="M{x(step)},{top - 6}V{bottom}"/>'
                         + text("end" if step > last / 2 else "start", x(step), top - 10, f"{label}, step {step:g}"))
    drawn = [(line, piece) for line in lines for piece in pieces(line.points)]
    for line, piece in drawn:
        if any(p.error for p in piece):
            around = [(p.step, edges[p][1]) for p in piece] + [(p.step, edges[p][0]) for p in reversed(piece)]
            parts.append(f'<polygon class="band {line.style}" points="{" ".join(f"{x(s)},{y(v)}" for s, v in around)}"/>')
    for line, piece in drawn:
        parts.append(f'<polyline class="line {line.style}" points="{" ".join(f"{x(p.step)},{y(p.mean)}" for p in piece)}"/>')
        if len(line.points) <= 24 or len(piece) == 1:
            parts += [f'<circle class="{line.style}" cx="{x(p.step)}" cy="{y(p.mean)}" r="2.6"/>' for p in piece]
    told = f"Line chart of {quantity} ({unit or 'a number'}), training step 0 to {last:g}: " \
        + "; ".join(f"{line.name} {trend(line.points, unit)}" for line in lines)
    return (f'<svg viewBox="0 0 440 232" role="img" aria-label="{esc(quantity)}: {esc(says)}"><title>{esc(says)}</title>'
            f'<desc>{esc(told)}.</desc>{"".join(parts)}</svg>')


def text(anchor, x, y, words, more="") -> str:
    return f'<text text-anchor="{anchor}" x="{x}" y="{y}" {more}>{esc(words)}</text>'


def band(p: Point, unit) -> tuple[float, float]:
    """mean ± error; a share's ends at 0 and 1."""
    low, high = p.mean - p.error, p.mean + p.error
    return (max(0.0, low), min(1.0, high)) if unit == "%" else (low, high)


def pieces(points):
    """The runs of points between the NaNs."""
    piece = []
    for p in [*points, Point(0, math.nan, 0)]:
        if math.isfinite(p.mean):
            piece.append(p)
        elif piece:
            yield piece
            piece = []


def ticks(low: float, high: float, whole=False) -> list[float]:
    """Round numbers around low to high; from 0, unless the values lie close together far above it."""
    if math.isclose(low, high) or 0 <= low < high / 2:
        low, high = min(low, 0.0), max(high, 0.0)
    high = low + 1.0 if math.isclose(low, high) else high
    power = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(m * power for m in ((1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)) if m * power * 5 >= (high - low) * 0.999999)
    step = max(step, 1) if whole else step
    return [float(f"{i * step:.12g}") for i in range(math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6) + 1)]


def swatch(style) -> str:
    return f'<svg class="swatch" viewBox="0 0 34 10" aria-hidden="true"><path class="line {style}" d="M1,5H33"/></svg>'


# From metrics to lines.

def number(metrics: dict, key: str) -> float | None:
    """None: not measured at that step. NaN: measured, and no number that could be drawn."""
    if key not in metrics:
        return None
    value = metrics[key]
    return float(value) if isinstance(value, (int, float)) and abs(value) < HUGE else math.nan


def series(runs, value, every=1) -> list[Point]:
    """Mean and standard error over the runs at each step, or over each `every` steps, where any run has a value.

    value: the name of a metric, or a function of a step's metrics (None: nothing was measured).
    """
    of = value if callable(value) else lambda m: number(m, value)
    bins = defaultdict(lambda: defaultdict(list))
    for i, run in enumerate(runs):
        for m in run.metrics:
            if (v := of(m)) is not None:
                bins[m["step"] // every][i].append((v, number(m, f"{value}_se") or 0.0))
    points = []
    for b, by_run in sorted(bins.items()):
        means = [sum(good) / len(good) for entries in by_run.values() if (good := [v for v, _ in entries if abs(v) < HUGE])]
        mean, error = mean_and_se(means) if means else (math.nan, 0.0)
        if len(runs) == 1 and len(by_run[0]) == 1:
            error = by_run[0][0][1]
        points.append(Point(b * every + (every - 1) / 2, mean, error if error > 1e-9 * abs(mean) else 0.0))  # more than rounding
    return points


# What the numbers say.

def show(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return "–"
    if unit == "%":
        return "under 0.1%" if 0 < value < 0.0005 else f"{100 * value:.1f}".removesuffix(".0") + "%"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def trend(points: list[Point], unit: str) -> str:
    """What a line does, in words: its first tenth against its last, told apart if by more than twice the standard error."""
    points = finite(points)
    width = max(1, len(points) // 10)
    windows = [mean_and_se([p.mean for p in points[i : i + width]]) for i in range(len(points) - width + 1)]
    (first, e1), (last, e2) = windows[0], windows[-1]
    noise = 2 * (math.hypot(e1, e2) if width > 1 else math.hypot(points[0].error, points[-1].error))
    a, b = show(first, unit), show(last, unit)
    if len(points) == 1:
        return f"is at {b}"
    means = [mean for mean, _ in windows]
    far = max(2 * noise, (max(means) - min(means)) / 2)
    if max(means) - max(first, last) > far:
        return "peaks at {} (step {}) and ends at {}".format(*extreme(max, points, unit), b)
    if min(first, last) - min(means) > far:
        return "dips to {} (step {}) and ends at {}".format(*extreme(min, points, unit), b)
    if a == b:
        return f"stays at {b}"
    if abs(last - first) <= noise:
        return f"shows no clear change ({a} to {b})"
    return f"{'rises' if last > first else 'falls'} from {a} to {b}"


def extreme(which, points, unit) -> tuple[str, str]:
    p = which(points, key=lambda p: p.mean)
    return show(p.mean, unit), f"{p.step:g}"


def finding(lines: list[Line], unit: str) -> str:
    if len(lines) <= 3:
        return "; ".join(f"{line.name} {trend(line.points, unit)}" for line in lines)
    ends = sorted((finite(line.points)[-1].mean, line.name) for line in lines)
    return f"{ends[-1][1]} ends highest ({show(ends[-1][0], unit)}), {ends[0][1]} lowest ({show(ends[0][0], unit)})"


def averages(lines: list[Line], unit: str) -> str:
    def mean(line):
        return mean_and_se([p.mean for p in finite(line.points)])[0]
    return "On average: " + ", ".join(f"{line.name} {show(mean(line), unit)}" for line in lines)


def finite(points):
    return [p for p in points if math.isfinite(p.mean)]


# Pieces of a page.

def table(caption, heads, rows) -> str:
    head = "".join(f'<th scope="col">{esc(h)}</th>' for h in heads)
    body = "".join("<tr>" + f'<th scope="row">{esc(row[0])}</th>' + "".join(f"<td>{esc(c)}</td>" for c in row[1:]) + "</tr>\n"
                   for row in rows)
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(caption)}"><table><caption>{esc(caption)}</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>\n")


def details(summary, content) -> str:
    return f"<details><summary>{esc(summary)}</summary>{content}</details>"


def plus_minus(mean, error, unit) -> str:
    return show(mean, unit) + (f" ± {show(error, '%') if unit == '%' else f'{error:.2g}'}" if error else "")


UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")  # no characters of HTML


def esc(text) -> str:
    return html.escape(UNFIT.sub("\ufffd", str(text)))
