"""The slides of the course: docs/slides.md as one HTML page, without scripts from elsewhere.

    python -m show.slides                            write docs/slides.html

A slide begins with a heading and may hold paragraphs, lists, fenced code, and figures, each on a
line of its own: `![](figures/NAME.svg)`. Within a line: `code`, **bold**, [text](link).
"""

from __future__ import annotations

import base64
import re
import sys
from html import escape
from itertools import groupby
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
SOURCE, PAGE = DOCS / "slides.md", DOCS / "slides.html"
STYLE = (Path(__file__).parent / "slides.css").read_text(encoding="utf-8")
FENCE = re.compile(r"^```\n(.*?)^```$", re.M | re.S)
HIDDEN = "\0"  # stands for a # in code, which begins no slide
KEYS = """const slides = [...document.querySelectorAll("section")]
const here = () => slides.findLastIndex(s => s.getBoundingClientRect().top < innerHeight / 2)
const steps = {ArrowRight: 1, ArrowDown: 1, PageDown: 1, " ": 1, ArrowLeft: -1, ArrowUp: -1,
  PageUp: -1, Home: -1e9, End: 1e9}
addEventListener("keydown", event => {
  const step = steps[event.key]
  if (!step || event.ctrlKey || event.altKey || event.metaKey) return
  event.preventDefault()
  slides[Math.min(slides.length - 1, Math.max(0, here() + step))].scrollIntoView()
})"""


def page(source: str, folder: Path) -> str:
    """The slides as HTML; figures are read from `folder`. Raises ValueError where one is wrong."""
    hidden = FENCE.sub(lambda fence: fence[0].replace("#", HIDDEN), source)
    slides = re.split(r"^(?=#{1,2} )", hidden, flags=re.M)
    if slides[0].strip():
        raise ValueError(f"slides.md begins without a heading: {slides[0].splitlines()[0]!r}")
    sections = []
    for number, slide in enumerate(slides[1:], start=1):
        sections.append(f'<section id="{number}">\n{blocks(slide.replace(HIDDEN, "#"), folder)}')
    if not sections:
        raise ValueError("slides.md has no slide: begin one with a heading, as in # Title")
    title = escape(source.partition("\n")[0].lstrip("# "))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{STYLE}</style></head>\n<body>\n"
        + "\n</section>\n".join(sections)
        + f"\n</section>\n<script>\n{KEYS}\n</script>\n</body></html>\n"
    )


def blocks(slide: str, folder: Path) -> str:
    """A slide's heading, then its blocks, which blank lines or fences separate."""
    heading, _, body = slide.partition("\n")
    level = heading.index(" ")  # 1 for the title, 2 for the others
    parts = [f"<h{level}>{inline(heading[level + 1 :])}</h{level}>"]
    for i, part in enumerate(FENCE.split(body)):
        if i % 2:  # what stood between fences
            parts.append(f"<pre>{escape(part.rstrip())}</pre>")
        else:
            for block in re.split(r"\n\s*\n", part):
                parts += plain(block.strip(), folder)
    return "\n".join(parts)


def plain(block: str, folder: Path) -> list[str]:
    """Paragraphs, lists and figures of a block without code."""
    lines = re.sub(r"\n(?!- |!\[)\s*", " ", block).splitlines()  # a long line was wrapped
    parts = []
    for kind, group in groupby(lines, key=lambda line: line[:2]):
        if kind == "- ":
            items = "".join(f"<li>{inline(line[2:])}</li>" for line in group)
            parts.append(f"<ul>{items}</ul>")
        else:
            for line in group:
                parts.append(figure(line, folder) if kind == "![" else f"<p>{inline(line)}</p>")
    return parts


def figure(line: str, folder: Path) -> str:
    """An SVG as an image of its own: what it calls by ids and styles stays inside it."""
    found = re.fullmatch(r"!\[\]\(([\w/-]+\.svg)\)", line.strip())
    if not found:
        raise ValueError(f"a figure is a line of its own, as in ![](figures/NAME.svg): {line!r}")
    file = folder / found[1]
    if not file.exists():
        raise ValueError(f"there is no {file}: draw it with python -m show.figure")
    svg = file.read_text(encoding="utf-8")
    told = re.search(r"<desc\b[^>]*>(.*?)</desc>", svg, re.S)  # the picture in words
    if not told:
        raise ValueError(f"{file} has no <desc>, which says in words what it shows")
    data = base64.b64encode(svg.encode()).decode()
    words = " ".join(told[1].replace('"', "&quot;").split())
    return f'<img alt="{words}" src="data:image/svg+xml;base64,{data}">'


def inline(text: str) -> str:
    text = escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)
    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", r'<a href="\2">\1</a>', text)


def main() -> int:
    try:
        PAGE.write_text(page(SOURCE.read_text(encoding="utf-8"), DOCS), encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
