"""What the demonstration prints: the chart, the table, one question answered three times."""

from __future__ import annotations

from data import wordproblems
from data.reward import is_correct
from data.scores import first_is_right
from run.screen import coloured, in_colour


def table(results, count) -> str:
    names = ("base", "grpo", "thinktuning")
    lines = [
        f"{count} held-out problems, greedy, no teacher",
        f"{'':<34}" + "".join(f"{n:>16}" for n in names),
    ]

    def row(title, cell):
        lines.append(f"{title:<34}" + "".join(f"{cell(results[n]):>16}" for n in names))

    row("accuracy ± standard error", lambda r: f"{r['accuracy']:.3f} ± {r['accuracy_se']:.3f}")
    row("accuracy, sampled", lambda r: f"{r['sampled_accuracy']:.3f}")
    row("accuracy of the first answer", lambda r: f"{r['first_answer_accuracy']:.3f}")
    row("wrong → right, right → wrong", lambda r: f"{r['wrong_to_right']}, {r['right_to_wrong']}")
    row("reflects: answers a second time", lambda r: f"{r['reflection_rate']:.3f}")
    row("  sampled", lambda r: f"{r['sampled_reflection_rate']:.4f}")
    row("  when the first answer is wrong", lambda r: f"{r['reflection_rate_first_wrong']:.3f}")
    row("  when the first answer is right", lambda r: f"{r['reflection_rate_first_right']:.3f}")
    for n in wordproblems.DIFFICULTY:
        row(
            f"  {n} operation{'s' * (n > 1)}: accuracy, reflects",
            lambda r, n=n: (
                f"{r.get(f'accuracy_{n}_operations', 0):.2f}, {r.get(f'reflection_{n}_operations', 0):.2f}"
            ),
        )
    row("mean length, tokens", lambda r: f"{r['mean_length']:.1f}")
    for name in wordproblems.WORDING:
        row(
            f"  {name}, greedy, sampled",
            lambda r, name=name: (
                f"{r['behaviours'].get(name, 0) / count:.2f}, "
                f"{r['sampled_behaviours'].get(name, 0) / r['sampled_rollouts']:.2f}"
            ),
        )
    base = results["base"]
    lines.append(
        f"\nthe same base weights under the teacher prompt: {base['teacher_prompt_accuracy']:.3f} "
        f"± {base['teacher_prompt_accuracy_se']:.3f}"
    )
    lines.append(
        f"the base, sampled at temperature 1: {round(base['sampled_reflection_rate'] * base['sampled_rollouts'])} of "
        f"{base['sampled_rollouts']:,} rollouts reflect"
    )
    return "\n".join(lines)


def chart(curves, height=10) -> str:
    """Sampled reflection rate by step as text: T ThinkTuning, g GRPO, | the step at which the teacher went off."""
    steps = len(curves["thinktuning"])
    off = next((m["step"] for m in curves["thinktuning"] if m["fraction"] == 0), steps)
    grid = [[" "] * steps for _ in range(height + 1)]
    for line in grid:
        if off < steps:
            line[off] = "|"
    for name, mark in (("grpo", "g"), ("thinktuning", "T")):
        for m in curves[name]:
            grid[height - round(m["reflection_rate"] * height)][m["step"]] = mark
    lines = [f"{(height - i) / height:>5.0%} {''.join(line)}" for i, line in enumerate(grid)]
    title = f"share of sampled rollouts that reflect, by step (T ThinkTuning, g GRPO; | teacher off at step {off})"
    return "\n".join([title, *lines, f"      0{str(steps):>{steps - 1}}"])


def same_question(records) -> str:
    """One test question that ThinkTuning gets right after a wrong first answer, as all three answer it."""

    def telling(i):
        problem, text, _ = records["thinktuning"][i]
        return is_correct(text, problem.answer) and not first_is_right(text, problem.answer)

    chosen = next(filter(telling, range(len(records["base"]))), None)
    title = "The first test question whose wrong first answer ThinkTuning mends:"
    if chosen is None:
        chosen, title = 0, "ThinkTuning mends no wrong first answer; the first test question:"
    problem = records["base"][chosen][0]
    parts = [title, f"{problem.question}  (answer: {problem.answer})"]
    for name, record in records.items():
        first, _, reflection = record[chosen][1].partition("\n\n")
        parts.append(f"{name:>12}: {first}")
        for line in filter(None, reflection.split("\n\n")):
            parts.append(f"{'':>12}  " + (coloured(line) if in_colour() else f"| {line}"))
    return "\n".join(parts)
