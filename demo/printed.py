"""What the demonstration prints: the chart, the table, one question answered three times."""

from __future__ import annotations

from data import wordproblems
from data.reward import is_correct
from data.scores import first_is_right
from run.screen import coloured, in_colour

NAMES = ("base", "grpo", "thinktuning")
ROWS = (  # a title, and the row's cell in terms of a model's scores
    ("accuracy ± standard error", "{accuracy:.3f} ± {accuracy_se:.3f}"),
    ("accuracy, sampled", "{sampled_accuracy:.3f}"),
    ("accuracy of the first answer", "{first_answer_accuracy:.3f}"),
    ("wrong → right, right → wrong", "{wrong_to_right}, {right_to_wrong}"),
    ("reflects: answers a second time", "{reflection_rate:.3f}"),
    ("  sampled", "{sampled_reflection_rate:.4f}"),
    ("  when the first answer is wrong", "{reflection_rate_first_wrong:.3f}"),
    ("  when the first answer is right", "{reflection_rate_first_right:.3f}"),
)


def table(results, count) -> str:
    """The scores of the three models on `count` problems."""
    models = [results[name] for name in NAMES]
    lines = [f"{count} held-out problems, greedy, no teacher", table_row("", NAMES)]
    for title, cell in ROWS:
        lines.append(table_row(title, [cell.format(**model) for model in models]))
    for n in wordproblems.DIFFICULTY:
        title = f"  {n} operation{'s' * (n > 1)}: accuracy, reflects"
        lines.append(table_row(title, [by_operations(model, n) for model in models]))
    lines.append(table_row("mean length, tokens", [f"{m['mean_length']:.1f}" for m in models]))
    for name in wordproblems.WORDING:
        cells = [behaviour_shares(model, name, count) for model in models]
        lines.append(table_row(f"  {name}, greedy, sampled", cells))
    base = results["base"]
    lines.append(
        "\nthe same base weights under the teacher prompt: "
        f"{base['teacher_prompt_accuracy']:.3f} ± {base['teacher_prompt_accuracy_se']:.3f}"
    )
    rollouts = base["sampled_rollouts"]
    reflecting = round(base["sampled_reflection_rate"] * rollouts)
    lines.append(
        f"the base, sampled at temperature 1: {reflecting} of {rollouts:,} rollouts reflect"
    )
    return "\n".join(lines)


def table_row(title, cells) -> str:
    return f"{title:<34}" + "".join(f"{cell:>16}" for cell in cells)


def by_operations(scores, n) -> str:
    accuracy = scores.get(f"accuracy_{n}_operations", 0)
    reflects = scores.get(f"reflection_{n}_operations", 0)
    return f"{accuracy:.2f}, {reflects:.2f}"


def behaviour_shares(scores, name, count) -> str:
    greedy = scores["behaviours"].get(name, 0) / count
    sampled = scores["sampled_behaviours"].get(name, 0) / scores["sampled_rollouts"]
    return f"{greedy:.2f}, {sampled:.2f}"


def chart(curves, height=10) -> str:
    """The share of sampled rollouts that reflect, by step, as text."""
    steps = len(curves["thinktuning"])
    grid = [[" "] * steps for _ in range(height + 1)]
    off = step_of_teachers_end(curves["thinktuning"])
    if off < steps:
        for line in grid:
            line[off] = "|"
    for name, mark in (("grpo", "g"), ("thinktuning", "T")):
        for metrics in curves[name]:
            above = round(metrics["reflection_rate"] * height)
            grid[height - above][metrics["step"]] = mark
    lines = [
        "share of sampled rollouts that reflect, by step "
        f"(T ThinkTuning, g GRPO; | teacher off at step {off})"
    ]
    for i, line in enumerate(grid):
        lines.append(f"{(height - i) / height:>5.0%} {''.join(line)}")
    lines.append(f"      0{str(steps):>{steps - 1}}")
    return "\n".join(lines)


def step_of_teachers_end(curve) -> int:
    """The first step without a teacher; the number of steps if there is none."""
    for metrics in curve:
        if metrics["fraction"] == 0:
            return metrics["step"]
    return len(curve)


def same_question(records) -> str:
    """One test question as all three models answer it.

    If there is one, it is the first whose wrong first answer ThinkTuning corrects.
    """
    title = "ThinkTuning mends no wrong first answer; the first test question:"
    chosen = 0
    for i, (problem, text, _) in enumerate(records["thinktuning"]):
        if is_correct(text, problem.answer) and not first_is_right(text, problem.answer):
            title = "The first test question whose wrong first answer ThinkTuning mends:"
            chosen = i
            break
    problem = records["base"][chosen][0]
    parts = [title, f"{problem.question}  (answer: {problem.answer})"]
    for name, record in records.items():
        first, *later = record[chosen][1].split("\n\n")
        parts.append(f"{name:>12}: {first}")
        for line in filter(None, later):
            parts.append(f"{'':>12}  " + (coloured(line) if in_colour() else f"| {line}"))
    return "\n".join(parts)
