"""The pictures of the pages on the method and on memory, computed by the program's own functions.

`python -m show.figure` draws them. Every number in them is asked of the function that trains.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor

from grpo import LossSettings, clipped_loss, group_advantages, shaped_ratio, shaping_coefficient
from model import ModelConfig
from run.config import Config
from show import plan
from show.svg import (
    EDGE,
    LEFT,
    LINE,
    RIGHT,
    Axis,
    Picture,
    Plot,
    number,
    path,
    rect,
    text,
)

SETTINGS = LossSettings()


def row(values) -> Tensor:
    """(1, T) in float64, as the loss takes tokens and a group its rewards."""
    return torch.tensor([list(values)], dtype=torch.float64)


# A group's rewards and advantages: docs/grpo.md.

REWARDS = (0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0)
GUIDED = 6  # o_6 is the rollout that the teacher continued


def advantages() -> Picture:
    values = group_advantages(row(REWARDS))[0].tolist()
    mean = sum(REWARDS) / len(REWARDS)
    x = Axis(0.5, len(REWARDS) + 0.5, LEFT, RIGHT)
    rewards, normed = Plot(x, Axis(0, 1, 86, 26)), Plot(x, Axis(-1, 3, 280, 140))
    names = {i: f"o{chr(ord('₀') + i)}" for i in range(1, len(REWARDS) + 1)}
    parts = [
        *rewards.axes({}, {0: "0", 1: "1"}, y_title="reward r"),
        path("mark", f"M{LEFT},{rewards.y(mean)}H{RIGHT}"),
        text(LEFT, rewards.y(mean) - 6, f"mean r = {mean:g}", "small"),
        *normed.axes(names, {i: number(i, 0) for i in range(-1, 4)}, y_title="advantage Â"),
    ]
    for i, reward, value in zip(names, REWARDS, values):
        style = "green" if reward else "orange"
        y = normed.y(value) + (18 if value < 0 else -6)  # below the bar, or above it
        parts += [
            rewards.bar(i, 30, reward, style),
            normed.bar(i, 30, value, style),
            text(x(i), y, number(value), f"label {style}", "middle"),
        ]
    words = f"{names[GUIDED]} is guided: the teacher has continued this attempt"
    parts.append(text((LEFT + RIGHT) / 2, 280 + 2 * LINE, words, "small", "middle"))
    of_right, of_wrong = number(values[GUIDED - 1]), number(values[0])
    told = (
        "Two bar charts of a group of eight rollouts. Rewards: 1 for the sixth, which is guided, "
        f"and 0 for the seven others; their mean is {mean:g}. Advantages: {of_right} for the "
        f"sixth, {of_wrong} for each of the others."
    )
    return Picture(
        f"The one right rollout of eight gets {of_right}, each wrong one {of_wrong}",
        "Rewards and advantages of the rollouts of one question",
        told,
        280 + 2 * LINE + 14,
        parts,
    )


# PPO's clip and the dual clip: docs/grpo.md.


def clip() -> Picture:
    epsilon, c = SETTINGS.clip, SETTINGS.dual_clip
    low, high = 1 - epsilon, 1 + epsilon
    plot = Plot(Axis(0, 4, LEFT, RIGHT), Axis(-2, 4, 296, 26))
    x, y = plot.x, plot.y
    rhos = {rho: f"{rho:g}" for rho in (0, low, high, 2, c, 4)}
    losses = {loss: number(loss, 0) for loss in range(-2, 5)}
    parts = plot.axes(rhos, losses, "ρ = π_θ/π_old", "loss ℓ")
    for rho, loss in ((low, low), (high, -high), (c, c)):
        parts.append(path("mark", f"M{x(rho)},{y(loss)}V{y.start}"))
    for advantage, style in ((1.0, "blue"), (-1.0, "orange")):
        for is_flat, points in pieces(advantage):
            parts.append(plot.line(points, f"{style} dots" if is_flat else style))
    parts += [
        text(x(high) + 8, y(-high) - 8, "Â = +1", "label blue"),
        text(x(high) + 8, y(-high) + 20, "flat above 1 + ε", "label blue"),
        text(x(0) + 6, y(low) - 28, "flat below 1 − ε", "label orange"),
        text(x(2) - 6, y(2) - 6, "Â = −1", "label orange", "end"),
        text(x(c) + 6, y(c) - 12, "flat above c", "label orange"),
    ]
    told = (
        "Line chart of the loss of an ordinary token over ρ from 0 to 4. With an advantage of +1 "
        f"it falls from 0 to {number(-high, 1)} at ρ = {high:g} and is flat from there on. With "
        f"−1 it is flat at {low:g} up to ρ = {low:g}, rises to {c:g} at ρ = {c:g}, and is flat "
        "from there on, because of the dual clip."
    )
    return Picture(
        "Outside the clip there is no gradient",
        f"Loss of an ordinary token (dotted: it is flat); ε\xa0=\xa0{epsilon:g}, c\xa0=\xa0{c:g}",
        told,
        296 + 2 * LINE + 14,
        parts,
    )


def pieces(advantage: float) -> list[tuple[bool, list[tuple[float, float]]]]:
    """(whether a clip makes it flat, its points (ρ, ℓ)) of each piece of the loss."""
    rhos = [i / 20 for i in range(81)]  # from 0 to 4, with the ends of both clips among them
    middles = [rho + 1 / 40 for rho in rhos[:-1]]
    settings = row([advantage]), SETTINGS.clip, SETTINGS.dual_clip
    losses, *_ = clipped_loss(row(rhos), *settings)
    _, clipped, dual_clipped = clipped_loss(row(middles), *settings)
    is_flat = (clipped | dual_clipped)[0].tolist()
    points, found = list(zip(rhos, losses[0].tolist())), []
    for flat, group in groupby(range(len(is_flat)), key=is_flat.__getitem__):
        places = list(group)
        found.append((flat, points[places[0] : places[-1] + 2]))
    return found


# Advantage-Aware Shaping: docs/off-policy.md.

GOOD, BAD = {4.0: "blue", 2.0: "green"}, {-4.0: "orange", -2.0: "green"}  # Â: its colour
PIS = [10 ** (i / 60) for i in range(-300, 1)]
DECADES = {1e-5: "0.00001", 1e-4: "0.0001", 1e-3: "0.001", 1e-2: "0.01", 0.1: "0.1", 1.0: "1"}
LOWEST, HIGHEST = -2.0, 4.0  # w that is drawn, of bad rollouts


def weights(advantage: float, guards=True) -> list[tuple[float, float]]:
    """(π, w) at every π in PIS."""
    w = shaped_ratio(row(PIS).log(), row([advantage]), guards)
    return list(zip(PIS, w[0].tolist()))


def weight(pi: float, advantage: float) -> float:
    return shaped_ratio(row([pi]).log(), row([advantage])).item()


def aas() -> Picture:
    x = Axis(PIS[0], PIS[-1], LEFT, RIGHT, log=True)
    good, bad = Plot(x, Axis(0, 1, 136, 26)), Plot(x, Axis(LOWEST, HIGHEST, 390, 198))
    top, unlikely = bad.y.end, SETTINGS.unlikely
    edge = x(unlikely)
    parts = [
        rect(LEFT, top, round(edge - LEFT, 1), bad.y.start - top, "help"),
        *good.axes({}, {0: "0", 0.5: "0.5", 1: "1"}, y_title="w in good rollouts (Â > 0)"),
        *bad.axes(
            DECADES, {i: number(i, 0) for i in range(-2, 5)}, "π", "w in bad rollouts (Â < 0)"
        ),
        *(good.line(weights(advantage), style) for advantage, style in GOOD.items()),
    ]
    for advantage, style in BAD.items():
        parts += lines_of_bad(bad, advantage, style)
    of_4, of_2 = (number(weight(unlikely, advantage)) for advantage in BAD)
    poles = [f"{-gamma:g}" for gamma in shaping_coefficient(row(BAD))[0].tolist()]
    parts += [
        text(x(0.0004) - 8, good.y(0.5), "Â = 2", "label green", "end"),
        text(x(0.001) + 8, good.y(0.5) + 16, "Â = 4", "label blue"),
        text(RIGHT, good.y(1) + 26, "(b) π + γ > 1:", "small", "end"),
        text(RIGHT, good.y(1) + 44, "w = 1/0.9999", "small", "end"),
        text(edge + 8, bad.y(4) + 22, "(c) where shaded,", "small"),
        text(edge + 8, bad.y(3) + 22, "w is not used", "small"),
        text(edge + 8, bad.y(1) + 22, f"at π = {unlikely:g}:", "small"),
        text(edge + 8, bad.y(0) + 22, f"{of_4} for Â = −4", "label orange"),
        text(edge + 8, bad.y(-1) + 22, f"{of_2} for Â = −2", "label green"),
        text(LEFT + 4, bad.y(3) + 22, "(a) π + γ ≤ 0:", "small"),
        text(LEFT + 4, bad.y(2) + 22, "w = 1/1.0001", "small"),
        text(LEFT + 4, bad.y(-1) + 22, "without (a)", "small"),
    ]
    told = (
        "Two line charts of w over π from 0.00001 to 1. In good rollouts w rises with π to 1; at "
        f"π = 0.001 it is {number(weight(0.001, 4.0))} for Â = 4 and "
        f"{number(weight(0.001, 2.0))} for Â = 2. In bad rollouts it falls to 1 from a pole at "
        f"π = {poles[0]} for Â = −4 and at {poles[1]} for Â = −2; at π = {unlikely:g} it is {of_4} "
        f"and {of_2}. Below the pole guard (a) makes it nearly 1, where π/(π + γ) would be "
        f"negative. Below π = {unlikely:g} guard (c) sets w aside in bad rollouts."
    )
    caption = "Weight w of a guided token's gradient over its probability π, with guards (a) to (c)"
    return Picture("AAS reweights rare tokens only", caption, told, 390 + 2 * LINE + 14, parts)


def lines_of_bad(plot: Plot, advantage: float, style: str) -> list[str]:
    """w in bad rollouts: thick where it is used, dashed where guard (c) sets it aside.

    The thin line is π/(π + γ) below its pole, where guard (a) replaces it.
    """
    thin, replaced, set_aside, used = [], [], [], []
    for (pi, w), (_, without) in zip(weights(advantage), weights(advantage, guards=False)):
        if without < 0:
            replaced.append((pi, w))
        if LOWEST <= without < 0:
            thin.append((pi, without))
        if 0 < without <= HIGHEST and pi <= SETTINGS.unlikely:
            set_aside.append((pi, w))
        if pi >= SETTINGS.unlikely:
            used.append((pi, w))
    return [
        plot.line(thin, f"thin {style}"),
        plot.line(replaced, f"{style} dashes"),
        plot.line(set_aside, f"{style} dashes"),
        plot.line(used, style),
    ]


# The memory of a training step: docs/memory.md.

LLAMA_3B = ModelConfig(
    128256, 3072, 28, 24, 8, 128, 8192, rope_theta=5e5, max_seq_len=131072, tie_embeddings=True
)
SIZES = plan.Sizes(LLAMA_3B, LLAMA_3B, torch.bfloat16, device="cuda")
RUNS = {
    "rows 128, micro-batch 16,384, blocks kept": Config(micro_batch=16384, recompute=False),
    "the same, blocks computed again": Config(micro_batch=16384),
    "rows 16, micro-batch 2,048, blocks computed again": Config(micro_batch=2048, rows=16),
}
STAYS = {"weights": "ink", "optimizer": "blue", "teacher": "green"}
PHASES = ("sampling", "asking the teacher", "update")


def gib(config: Config) -> tuple[dict[str, float], float]:
    """What a run needs, in GiB: its parts, and its peak."""
    parts = plan.memory(config, SIZES)
    return {name: size / plan.GIB for name, size in parts.items()}, plan.peak(parts) / plan.GIB


def memory() -> Picture:
    first, _ = gib(next(iter(RUNS.values())))
    keys = [(style, f"{name} {first[name]:.1f}") for name, style in STAYS.items()]
    parts, y = [], 0
    for i, (style, words) in enumerate([*keys, ("orange", "the phase")]):
        left, y = EDGE + i % 2 * 160, i // 2 * LINE
        parts.append(rect(left, y + 4, 12, 12, f"bar {style}"))
        parts.append(text(left + 18, y + 15, words, "small"))
    peaks, told = [], []
    for settings, config in RUNS.items():
        y += LINE + 12
        sizes, peak = gib(config)
        parts.append(text(EDGE, y + 15, settings, "label ink"))
        for phase in PHASES:
            y += LINE
            parts += bar_of_phase(y + 2, sizes, phase, peak)
        peaks.append(f"{peak:.0f}")
        phases = ", ".join(f"{phase} {sizes[phase]:.1f}" for phase in PHASES)
        told.append(f"({settings}) {phases}, at the peak {peak:.1f}")
    stays = ", ".join(words for _, words in keys)
    return Picture(
        f"The largest phase decides the peak: {peaks[0]},\xa0{peaks[1]} or\xa0{peaks[2]}\xa0GiB",
        "Memory of a training step in GiB, estimated, with the sum of each bar; Llama 3.2 3B in "
        "bfloat16 on one GPU",
        f"Bar charts of the memory of three runs, in GiB. What stays in each: {stays}. The phases: "
        f"{'; '.join(told)}.",
        y + LINE + 12,
        parts,
    )


def bar_of_phase(y: float, sizes: dict[str, float], phase: str, peak: float) -> list[str]:
    """What stays, the phase on top of it, and the sum; the largest phase's sum is the peak."""
    x, end, parts = Axis(0, 160, 150, 380), 0.0, [text(142, y + 13, phase, "small", "end")]
    for name, style in {**STAYS, phase: "orange"}.items():
        width = round(x(end + sizes[name]) - x(end) - 1, 1)  # a gap of 1 pixel follows
        parts.append(rect(x(end), y, width, 16, f"bar {style}"))
        end += sizes[name]
    is_peak = end > peak - 1e-6
    words, style = (f"{end:.1f} GiB", "label ink") if is_peak else (f"{end:.1f}", "small")
    return [*parts, text(x(end) + 6, y + 13, words, style)]


DIAGRAMS: dict[str, Callable[[], Picture]] = {
    "advantages": advantages,
    "clip": clip,
    "aas": aas,
    "memory": memory,
}
