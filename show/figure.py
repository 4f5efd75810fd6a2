"""The pictures of the pages: how many of the student's rollouts reflect, step by step.

    python -m show.figure                            draw them all from the curves in results/
    python -m show.figure demonstration out/demo-0   take that one's curves from these runs first

The colours follow the reader's light or dark scheme. The background belongs to the picture, because
the page around it may have the other scheme.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Figure(NamedTuple):
    source: str  # in results/: the curves
    title: str
    shows: Callable[[dict[str, float]], bool]  # whether the curves' ends show what the title says
    caption: str
    every: int  # steps from one number below the axis to the next


FIGURES = {  # by the name of the picture
    "demonstration": Figure(
        "curves-seed0.json",
        "ThinkTuning learns to look back at wrong answers",
        lambda ends: ends["wrong"] > 0.9 > 0.1 > ends["right"] > ends["grpo"] - 0.02,
        "Share of ThinkTuning's and GRPO's rollouts that reflect (seed 0)",
        20,
    ),
    "smollm2": Figure(
        "curves-smollm2.json",
        "SmolLM2-135M learns to answer again after wrong answers",
        lambda ends: ends["wrong"] > 0.5 > 0.1 > ends["right"] > ends["grpo"] - 0.02,
        "Share of rollouts with a second boxed answer (one run of each method)",
        10,
    ),
}

Curves = dict[str, list[float]]

WIDTH, HEIGHT = 630, 320
LEFT, RIGHT, TOP, BOTTOM = 62, 392, 92, 264  # of the plot

STYLE = """
svg { --paper: #ffffff; --ink: #1f2328; --soft: #59636e; --rule: #d8dee4; --help: #eef1f4;
      --ours: #0757ba; --grpo: #a04100; --right: #1a7f37;
      font: 16px system-ui, -apple-system, "Segoe UI", sans-serif }
@media (prefers-color-scheme: dark) {
  svg { --paper: #0d1117; --ink: #f0f6fc; --soft: #a5adb6; --rule: #30363d; --help: #1c222b;
        --ours: #6cb6ff; --grpo: #f0a35e; --right: #57c26b }
}
text { fill: var(--soft) } .title { fill: var(--ink); font-size: 19px; font-weight: 600 }
.rule { stroke: var(--rule) } .mark { stroke: var(--soft); stroke-dasharray: 2 4 }
polyline { fill: none; stroke-width: 3; stroke-linejoin: round }
.ours { stroke: var(--ours) } .grpo { stroke: var(--grpo); stroke-dasharray: 8 5 }
.right { stroke: var(--right); stroke-dasharray: 2 4 }
text.ours, text.grpo, text.right { stroke: none; font-size: 14px; font-weight: 600 }
text.ours { fill: var(--ours) } text.grpo { fill: var(--grpo) } text.right { fill: var(--right) }
"""


# A curve's label; its style, method and metric.
CURVE = {
    "grpo": ("GRPO, wrong or right", "grpo", "grpo", "reflection_rate"),
    "right": ("after a right answer", "right", "thinktuning", "reflection_rate_first_right"),
    "wrong": ("after a wrong answer", "ours", "thinktuning", "reflection_rate_first_wrong"),
}
LABEL = 18  # height of a label


def picture(name: str) -> Path:
    return ROOT / "docs" / "figures" / f"{name}.svg"


def curves(name: str) -> Curves:
    found: Curves = json.loads((ROOT / "results" / FIGURES[name].source).read_text())
    return found


def curves_of(runs: Path) -> Curves:
    """Of the runs grpo and thinktuning: each step's shares of rollouts that reflect, and p_s."""
    metrics = {}
    for method in ("grpo", "thinktuning"):
        lines = (runs / method / "metrics.jsonl").read_text().splitlines()
        metrics[method] = [json.loads(line) for line in lines]
    found, steps = {}, min(map(len, metrics.values()))  # GRPO may have gone on for longer
    for key, (*_, method, metric) in CURVE.items():
        found[key] = [step[metric] for step in metrics[method][:steps]]
    return {**found, "fraction": [step["fraction"] for step in metrics["thinktuning"][:steps]]}


def teacher_leaves(curves: Curves) -> int:
    return curves["fraction"].index(0.0)  # the first step without help


def description(curves: Curves) -> str:
    """The picture in words, for those who do not see it."""
    wrong, leaves = curves["wrong"], teacher_leaves(curves)
    return (
        f"Line chart of the share of sampled rollouts that reflect, over {len(wrong)} training "
        f"steps. ThinkTuning after a wrong first answer: {wrong[0]:.0%} at first, "
        f"{wrong[leaves]:.0%} when the teacher leaves at step {leaves}, {wrong[-1]:.0%} at the "
        f"end; after a right one {curves['right'][-1]:.0%} at the end. GRPO: "
        f"{curves['grpo'][0]:.0%} at first, {curves['grpo'][-1]:.0%} at the end."
    )


def draw(name: str, curves: Curves) -> str:
    """The picture as SVG. Raises ValueError where the curves do not show what its title says."""
    figure, last = FIGURES[name], len(curves["grpo"]) - 1
    if not figure.shows({key: curves[key][-1] for key in CURVE}):
        raise ValueError(f"{figure.source} does not show what the title says: write another title")

    def x(step: float) -> float:
        return round(LEFT + step / last * (RIGHT - LEFT), 1)

    def y(share: float) -> float:
        return round(BOTTOM - share * (BOTTOM - TOP), 1)

    def text(x: float, y: float, words: str, style: str = "", anchor: str = "start") -> str:
        return f'<text x="{x}" y="{y}" class="{style}" text-anchor="{anchor}">{words}</text>'

    off = teacher_leaves(curves)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="787" '
        f'height="400"'
        f' role="img" aria-labelledby="title told"><title id="title">{figure.title}</title>'
        f'<desc id="told">{description(curves)}</desc><style>{STYLE}</style>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="var(--paper)"/>',
        text(12, 28, figure.title, "title"),
        text(12, 52, figure.caption),
        f'<rect x="{LEFT}" y="{TOP}" width="{round(x(off) - LEFT, 1)}" height="{BOTTOM - TOP}"'
        ' fill="var(--help)"/>',
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<path class="rule" d="M{LEFT},{y(share)}H{RIGHT}"/>')
        parts.append(text(LEFT - 8, y(share) + 5, f"{share:.0%}", anchor="end"))
    for step in range(0, last + 1, figure.every):
        parts.append(text(x(step), BOTTOM + 22, str(step), anchor="middle"))
    parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 44, "training step", anchor="middle"))
    parts.append(f'<path class="mark" d="M{x(off)},{TOP - 8}V{BOTTOM}"/>')
    parts.append(text(x(off), TOP - 14, f"the teacher leaves at step {off}"))
    free = HEIGHT  # below this height there are labels already
    for key in sorted(CURVE, key=lambda key: curves[key][-1]):
        name, style, *_ = CURVE[key]
        points = " ".join(f"{x(step)},{y(share)}" for step, share in enumerate(curves[key]))
        parts.append(f'<polyline class="{style}" points="{points}"/>')
        end = curves[key][-1]
        free = min(y(end) + 6, free - LABEL)
        parts.append(text(RIGHT + 8, free, f"{name}: {end:.0%}", style))
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        source = ROOT / "results" / FIGURES[sys.argv[1]].source
        source.write_text(json.dumps(curves_of(Path(sys.argv[2])), indent=1) + "\n")
    for name in FIGURES:
        picture(name).parent.mkdir(parents=True, exist_ok=True)
        picture(name).write_text(draw(name, curves(name)))
        print(f"drawn: {picture(name).relative_to(ROOT)}")
