"""What the demonstration prints: the chart, the table, one question answered three times."""

from __future__ import annotations

from data.reward import is_correct
from data.scores import first_is_right
from data.wordproblems import DIFFICULTY
from demo.texts import WORDING
from run.screen import coloured, in_colour
from show.report import PLANTED

NAMES = ("base", "grpo", "thinktuning")
ROWS = (  # a title, and the row's cell in terms of a model's scores
    ("accuracy ± standard error", "{accuracy:.3f} ± {accuracy_se:.3f}"),
    ("accuracy, sampled", "{sampled_accuracy:.3f}"),
    ("accuracy of the first answer", "{first_answer_accuracy:.3f}"),
    ("wrong → right, right → wrong", "{wrong_to_right}, {right_to_wrong}"),
    ("writes the teacher's tags", "{teacher_format:.3f}"),
    ("reflects: answers a second time", "{reflection_rate:.3f}"),
    ("  sampled", "{sampled_reflection_rate:.4f}"),
    ("  when the first answer is wrong", "{reflection_rate_first_wrong:.3f}"),
    ("  when the first answer is right", "{reflection_rate_first_right:.3f}"),
    ("  sampled, when it is wrong", "{sampled_reflection_rate_first_wrong:.3f}"),
    ("  sampled, when it is right", "{sampled_reflection_rate_first_right:.3f}"),
)


def table(results, teacher_prompt, count) -> str:
    """The scores of the three models on `count` problems."""
    models = [results[name] for name in NAMES]
    lines = [f"{count} held-out problems, greedy, no teacher", table_row("", NAMES)]
    for title, cell in ROWS:
        lines.append(table_row(title, [cell.format(**model) for model in models]))
    names = [shown(model["names_line"]) for model in models]
    lines.append(table_row("  names the line that is wrong", names))
    for n in DIFFICULTY:
        title = f"  {n} day{'s' * (n > 1)}: accuracy, reflects"
        lines.append(table_row(title, [by_operations(model, n) for model in models]))
    lines.append(table_row("mean length, tokens", [f"{m['mean_length']:.1f}" for m in models]))
    for name in WORDING:
        cells = [behaviour_shares(model, name, count) for model in models]
        lines.append(table_row(f"  {name}, greedy, sampled", cells))
    lines.append(
        "\nthe same base weights under the teacher prompt: {accuracy:.3f} ± {accuracy_se:.3f} "
        "right;\nits opinion is right in {opinion_accuracy:.3f}, of right attempts planted under "
        "questions with a trap in {opinion_accuracy_planted_right:.3f}".format_map(teacher_prompt)
    )
    base = results["base"]
    rollouts = base["sampled_rollouts"]
    reflecting = round(base["sampled_reflection_rate"] * rollouts)
    lines.append(
        f"the base, sampled at temperature 1: {reflecting} of {rollouts:,} rollouts reflect;\n"
        f"its floor: {base['floor']:.4f}, {shown(base['floor_wrong'], 4)} after wrong attempts "
        f"and {shown(base['floor_right'], 4)} after right ones"
    )
    return "\n".join(lines)


def planted_table(planted) -> str:
    """What the ThinkTuning model does with attempts that it did not write."""
    lines = ["planted attempts, greedy: ThinkTuning's model goes on from an attempt it is given"]
    lines.append(table_row("", ("reflects", "names the line", "its number", "right")))
    for kind, title in PLANTED.items():
        found = planted[kind]
        cells = [found[key] for key in ("goes_on", "names_line", "takes_over", "accuracy")]
        lines.append(table_row(f"{title} ({found['attempts']})", map(shown, cells)))
    return "\n".join(lines)


def shown(share: float | None, digits: int = 3) -> str:
    return "-" if share is None else f"{share:.{digits}f}"


def table_row(title, cells, width=16) -> str:
    return f"{title:<40}" + "".join(f"{cell:>{width}}" for cell in cells)


def by_operations(scores, n) -> str:
    names = f"accuracy_{n}_operations", f"reflection_{n}_operations"
    return ", ".join(f"{scores[name]:.2f}" if name in scores else "-" for name in names)


def behaviour_shares(scores, name, count) -> str:
    greedy = scores["behaviours"].get(name, 0) / count
    sampled = scores["sampled_behaviours"].get(name, 0) / scores["sampled_rollouts"]
    return f"{greedy:.2f}, {sampled:.2f}"


CURVES = (  # mark, method, metric; later ones are drawn over earlier ones
    ("g", "grpo", "reflection_rate"),
    ("r", "thinktuning", "reflection_rate_first_right"),
    ("W", "thinktuning", "reflection_rate_first_wrong"),
)


def chart(curves, height=10) -> str:
    """The share of sampled rollouts that reflect, by step, as text."""
    steps = len(curves["thinktuning"])
    grid = [[" "] * steps for _ in range(height + 1)]
    off = step_of_teachers_end(curves["thinktuning"])
    if off < steps:
        for line in grid:
            line[off] = "|"
    for mark, name, metric in CURVES:
        for metrics in curves[name]:
            above = round(metrics[metric] * height)
            grid[height - above][metrics["step"]] = mark
    lines = [
        "share of sampled rollouts that reflect, by step: W ThinkTuning after a wrong answer,",
        f"r after a right one; g GRPO; | the teacher leaves at step {off}",
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
