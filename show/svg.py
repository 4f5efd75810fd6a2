"""A picture of a page as SVG: title, caption, axes, lines, bars and labels.

The colours follow the reader's light or dark scheme. The background belongs to the picture, because
the page around it may have the other scheme. It is narrow, so that a phone shows readable letters.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterable, Mapping
from typing import NamedTuple

WIDTH, EDGE = 480, 12  # of the picture, and what stays free on both its sides
SHOWN_WIDTH = 576  # pixels on a page that is wide enough
LEFT, RIGHT = 56, WIDTH - EDGE  # of a plot
LINE = 20  # height of a line of text
DESCENT = 5  # from the middle of small letters down to their base line

STYLE = """
svg { --paper: #ffffff; --ink: #1f2328; --soft: #59636e; --rule: #d8dee4; --help: #eef1f4;
      --blue: #0757ba; --orange: #a04100; --green: #1a7f37;
      font: 15px system-ui, -apple-system, "Segoe UI", sans-serif }
@media (prefers-color-scheme: dark) {
  svg { --paper: #0d1117; --ink: #f0f6fc; --soft: #a5adb6; --rule: #30363d; --help: #1c222b;
        --blue: #6cb6ff; --orange: #f0a35e; --green: #57c26b }
}
.blue { --hue: var(--blue) } .orange { --hue: var(--orange) } .green { --hue: var(--green) }
text { fill: var(--hue, var(--soft)); white-space: pre }
.title { --hue: var(--ink); font-size: 18px; font-weight: 600 }
.label { font-size: 14px; font-weight: 600 } .small { font-size: 14px }
.ink { --hue: var(--ink) } .paper { fill: var(--paper) } .help { fill: var(--help) }
.rule { stroke: var(--rule) } .mark { stroke: var(--soft); stroke-dasharray: 2 4 }
.line { fill: none; stroke: var(--hue, var(--soft)); stroke-width: 3; stroke-linejoin: round }
.thin { stroke-width: 1.5 } .dashes { stroke-dasharray: 8 5 } .dots { stroke-dasharray: 2 4 }
.bar { fill: var(--hue, var(--soft)) }
"""


class Picture(NamedTuple):
    title: str  # a sentence: what the picture shows
    caption: str  # which quantities, in which units
    description: str  # the picture in words, for those who do not see it
    height: float  # of what stands below the caption
    parts: list[str]  # of it, with y = 0 at its top

    def svg(self) -> str:
        header, y = [], 8
        for style, height, lines in (
            ("title", 24, balanced(self.title, 40)),
            ("", LINE, balanced(self.caption, 55)),
        ):
            for line in lines:
                y += height
                header.append(text(EDGE, y - DESCENT, line, style))
            y += 3
        height = round(y + 8 + self.height)
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
                f' width="{SHOWN_WIDTH}" height="{height * SHOWN_WIDTH // WIDTH}" role="img"'
                f' aria-labelledby="title told"><title id="title">{html.escape(self.title)}</title>'
                f'<desc id="told">{html.escape(self.description)}</desc><style>{STYLE}</style>',
                rect(0, 0, WIDTH, height, "paper"),
                *header,
                f'<g transform="translate(0,{y + 8})">',
                *self.parts,
                "</g></svg>\n",
            ]
        )


class Axis(NamedTuple):
    """Where the numbers from `low` to `high` lie between two edges of a plot.

    With `log` equal factors have equal distances.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)


class Plot(NamedTuple):
    x: Axis
    y: Axis  # starts at the bottom

    def axes(self, x_ticks: Mapping, y_ticks: Mapping, x_title="", y_title="") -> list[str]:
        """Rules at the y ticks, the words of all ticks, and titles. Ticks: words by value."""
        left, right, bottom, top = self.x.start, self.x.end, self.y.start, self.y.end
        parts = [text(left, top - 12, y_title)] if y_title else []
        for value, words in y_ticks.items():
            parts.append(path("rule", f"M{left},{self.y(value)}H{right}"))
            parts.append(text(left - 8, self.y(value) + DESCENT, words, anchor="end"))
        for value, words in x_ticks.items():
            parts.append(text(self.x(value), bottom + LINE, words, anchor="middle"))
        if x_title:
            parts.append(text((left + right) / 2, bottom + 2 * LINE, x_title, anchor="middle"))
        return parts

    def line(self, points: Iterable[tuple[float, float]], style: str) -> str:
        corners = " ".join(f"{self.x(x)},{self.y(y)}" for x, y in points)
        return f'<polyline class="line {style}" points="{corners}"/>'

    def bar(self, x: float, width: float, value: float, style: str) -> str:
        """A bar from 0 to `value`, `width` pixels wide, in the middle of which is x."""
        top, bottom = self.y(max(value, 0)), self.y(min(value, 0))
        left = round(self.x(x) - width / 2, 1)
        return rect(left, top, width, round(bottom - top, 1), f"bar {style}")


def balanced(words: str, most: int) -> list[str]:
    """As few lines as `most` characters a line allow, all about equally long."""
    lines = len(textwrap.wrap(words, most))
    while len(textwrap.wrap(words, most - 1)) == lines:
        most -= 1
    return textwrap.wrap(words, most)


def text(x: float, y: float, words: str, style="", anchor="start") -> str:
    words = html.escape(words, quote=False)
    return f'<text x="{x}" y="{y}" class="{style}" text-anchor="{anchor}">{words}</text>'


def rect(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" class="{style}"/>'


def path(style: str, points: str) -> str:
    return f'<path class="{style}" d="{points}"/>'


def legend(lines: Iterable[tuple[str, str]]) -> list[str]:
    """From the top on, a line of the picture in its style, and its name, on a line of their own."""
    parts = []
    for i, (style, words) in enumerate(lines):
        y = i * LINE + LINE / 2
        parts.append(path(f"line {style}", f"M{EDGE},{y}h36"))
        parts.append(text(EDGE + 46, y + DESCENT, words, f"label {style}"))
    return parts


def number(value: float, digits=2) -> str:
    """Rounded, with a real minus sign."""
    return f"{value:.{digits}f}".replace("-", "−")
