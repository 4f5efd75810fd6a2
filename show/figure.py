"""The picture in the README: how many of the student's rollouts reflect, step by step, in the
demonstration.

    python -m show.figure    draw docs/figures/demonstration.svg from results/curves-seed0.json
    python -m show.figure out/demo-0       take the curves from that demonstration first

The colours follow the reader's light or dark scheme. The background belongs to the picture, because
the page around it may have the other scheme.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CURVES = ROOT / "results" / "curves-seed0.json"
PICTURE = ROOT / "docs" / "figures" / "demonstration.svg"

WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 62, 438, 92, 264  # of the plot

STYLE = """
svg { --paper: #ffffff; --ink: #1f2328; --soft: #59636e; --rule: #d8dee4; --help: #eef1f4;
      --ours: #0757ba; --grpo: #a04100;
      font: 16px system-ui, -apple-system, "Segoe UI", sans-serif }
@media (prefers-color-scheme: dark) {
  svg { --paper: #0d1117; --ink: #f0f6fc; --soft: #a5adb6; --rule: #30363d; --help: #1c222b;
        --ours: #6cb6ff; --grpo: #f0a35e }
}
text { fill: var(--soft) } .title { fill: var(--ink); font-size: 20px; font-weight: 600 }
.rule { stroke: var(--rule) } .mark { stroke: var(--soft); stroke-dasharray: 2 4 }
polyline { fill: none; stroke-width: 3; stroke-linejoin: round }
.ours { stroke: var(--ours) } .grpo { stroke: var(--grpo); stroke-dasharray: 8 5 }
text.ours, text.grpo { stroke: none; font-weight: 600 }
text.ours { fill: var(--ours) } text.grpo { fill: var(--grpo) }
"""


def curves_of(run: Path) -> dict[str, list[float]]:
    """Of a demonstration: each step's share of rollouts that reflect, and p_s."""
    metrics = {}
    for method in ("grpo", "thinktuning"):
        lines = (run / method / "metrics.jsonl").read_text().splitlines()
        metrics[method] = [json.loads(line) for line in lines]
    return {
        "grpo": [m["reflection_rate"] for m in metrics["grpo"]],
        "thinktuning": [m["reflection_rate"] for m in metrics["thinktuning"]],
        "fraction": [m["fraction"] for m in metrics["thinktuning"]],
    }


def teacher_leaves(curves: dict[str, list[float]]) -> int:
    return curves["fraction"].index(0.0)  # the first step without help


def finding(curves: dict[str, list[float]]) -> str:
    """The picture's title. Raises ValueError where the curves do not show it."""
    if not curves["thinktuning"][-1] > 0.5 > curves["grpo"][-1]:
        raise ValueError(f"{CURVES.name} does not show what the title says: write another title")
    return "ThinkTuning learns to look back, GRPO does not"


def description(curves: dict[str, list[float]]) -> str:
    """The picture in words, for those who do not see it."""
    ours, grpo, leaves = curves["thinktuning"], curves["grpo"], teacher_leaves(curves)
    return (
        f"Line chart of the share of sampled rollouts that reflect, over {len(ours)} training "
        f"steps. "
        f"ThinkTuning: {ours[0]:.0%} at first, {ours[leaves]:.0%} when the teacher leaves at step "
        f"{leaves}, {ours[-1]:.0%} at the end. GRPO: {grpo[0]:.0%} at first, {grpo[-1]:.0%} at "
        f"the end."
    )


def draw(curves: dict[str, list[float]]) -> str:
    """The picture as SVG."""
    last = len(curves["grpo"]) - 1

    def x(step: float) -> float:
        return round(LEFT + step / last * (RIGHT - LEFT), 1)

    def y(share: float) -> float:
        return round(BOTTOM - share * (BOTTOM - TOP), 1)

    def text(x: float, y: float, words: str, style: str = "", anchor: str = "start") -> str:
        return f'<text x="{x}" y="{y}" class="{style}" text-anchor="{anchor}">{words}</text>'

    title, off = finding(curves), teacher_leaves(curves)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="700" '
        f'height="400"'
        f' role="img" aria-labelledby="title told"><title id="title">{title}</title>'
        f'<desc id="told">{description(curves)}</desc><style>{STYLE}</style>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="var(--paper)"/>',
        text(12, 28, title, "title"),
        text(12, 52, "Share of sampled rollouts that reflect (seed 0)"),
        f'<rect x="{LEFT}" y="{TOP}" width="{round(x(off) - LEFT, 1)}" height="{BOTTOM - TOP}"'
        ' fill="var(--help)"/>',
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<path class="rule" d="M{LEFT},{y(share)}H{RIGHT}"/>')
        parts.append(text(LEFT - 8, y(share) + 5, f"{share:.0%}", anchor="end"))
    for step in range(0, last + 1, 20):
        parts.append(text(x(step), BOTTOM + 22, str(step), anchor="middle"))
    parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 44, "training step", anchor="middle"))
    parts.append(f'<path class="mark" d="M{x(off)},{TOP - 8}V{BOTTOM}"/>')
    parts.append(text(x(off), TOP - 14, f"the teacher leaves at step {off}"))
    for key, style, name in (("grpo", "grpo", "GRPO"), ("thinktuning", "ours", "ThinkTuning")):
        points = " ".join(f"{x(step)},{y(share)}" for step, share in enumerate(curves[key]))
        parts.append(f'<polyline class="{style}" points="{points}"/>')
        end = y(curves[key][-1])
        parts.append(text(RIGHT + 10, end + 2, name, style))
        parts.append(text(RIGHT + 10, end + 21, f"{curves[key][-1]:.0%}", style))
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        CURVES.write_text(json.dumps(curves_of(Path(sys.argv[1])), indent=1) + "\n")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(draw(json.loads(CURVES.read_text())))
    print(f"drawn: {PICTURE.relative_to(ROOT)}")
