"""The pictures of the pages. Here: how many of the student's rollouts reflect, step by step.

python -m show.figure                            draw them all, those of show/diagrams.py too
python -m show.figure demonstration out/demo-0   take that one's curves from these runs first
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from show.diagrams import DIAGRAMS
from show.svg import LEFT, LINE, RIGHT, WIDTH, Axis, Picture, Plot, legend, path, rect, text

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

OURS = "ThinkTuning, after a"
# A curve's name; its style, method and metric.
CURVE = {
    "wrong": (f"{OURS} wrong answer", "blue", "thinktuning", "reflection_rate_first_wrong"),
    "right": (f"{OURS} right answer", "green dots", "thinktuning", "reflection_rate_first_right"),
    "grpo": ("GRPO, after any answer", "orange dashes", "grpo", "reflection_rate"),
}
TOP = len(CURVE) * LINE + 34  # of the plot, below the legend
BOTTOM = TOP + 172


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


def draw(name: str, curves: Curves) -> Picture:
    """Raises ValueError where the curves do not show what the picture's title says."""
    figure, last, off = FIGURES[name], len(curves["grpo"]) - 1, teacher_leaves(curves)
    if not figure.shows({key: curves[key][-1] for key in CURVE}):
        raise ValueError(f"{figure.source} does not show what the title says: write another title")
    plot = Plot(Axis(0, last, LEFT, RIGHT), Axis(0, 1, BOTTOM, TOP))
    steps = {step: str(step) for step in range(0, last + 1, figure.every)}
    shares = {share: f"{share:.0%}" for share in (0.0, 0.25, 0.5, 0.75, 1.0)}
    left, lines, legends = plot.x(off), [], []
    for key, (words, style, *_) in CURVE.items():
        lines.append(plot.line(enumerate(curves[key]), style))
        legends.append((style, f"{words}: {curves[key][-1]:.0%}"))
    anchor = "end" if left > WIDTH / 2 else "start"
    parts = [
        *legend(legends),
        rect(LEFT, TOP, round(left - LEFT, 1), BOTTOM - TOP, "help"),
        *plot.axes(steps, shares, "training step"),
        path("mark", f"M{left},{TOP - 8}V{BOTTOM}"),
        text(left, TOP - 14, f"the teacher leaves at step {off}", "", anchor),
        *lines,
    ]
    caption, told = figure.caption, description(curves)
    return Picture(figure.title, caption, told, BOTTOM + 2 * LINE + 14, parts)


def recorded(name: str) -> Picture:
    return draw(name, curves(name))


PICTURES: dict[str, Callable[[], Picture]] = {
    **{name: partial(recorded, name) for name in FIGURES},
    **DIAGRAMS,
}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        source = ROOT / "results" / FIGURES[sys.argv[1]].source
        source.write_text(json.dumps(curves_of(Path(sys.argv[2])), indent=1) + "\n")
    for name, make in PICTURES.items():
        picture(name).parent.mkdir(parents=True, exist_ok=True)
        picture(name).write_text(make().svg())
        print(f"drawn: {picture(name).relative_to(ROOT)}")
