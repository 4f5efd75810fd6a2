"""The paper's novelty test, small: can a student learn a habit that it practically never samples?

The teacher quotes a made-up mentor in all its feedback, and a response that names this mentor
exactly once earns 0.5 in addition to the reward of its answer. No problem and no text of the
student names the mentor, so GRPO alone finds almost nothing to reward.

    python thinktuning.py --preset mentor
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace

from data.reward import is_correct
from data.scores import mean_and_se
from demo.base import Setup, base_model
from demo.comparison import (
    METHODS,
    held_out_problems,
    save_trained,
    set_old_results_aside,
    train_one,
    write_summary,
)
from demo.pretraining import steps_of_rows, train_on_texts
from demo.printed import table_row
from teacher import make_teacher

MENTOR, BONUS = "Ulmeck", 0.5
QUOTATION = f'{MENTOR} says: "show each day."'
# More tokens than in the demonstration, because the quotation takes 23: the tokenizer spells the
# mentor's name letter by letter.
SETTINGS = dict(max_tokens=170, teacher_reply=150)
READING = dict(steps=200, muon_rate=0.005, adamw_rate=1e-3, warmup=20, remark_every=12)


def compare(setup: Setup):
    """Train by both methods with the bonus for naming the mentor; print and write the results."""
    setup = replace(setup, config=replace(setup.config, **SETTINGS))
    out, config, quick = setup.out, setup.config, setup.quick
    began = time.perf_counter()
    set_old_results_aside(out)
    base = base_model(setup)
    base = acquaint(base, setup.recipe, setup.tokenizer, steps=10 if quick else READING["steps"])
    test = held_out_problems(setup)
    results, answers = {}, {}
    scores, answers["base"] = examine(setup, base, test, samples=2 if quick else 24)
    reference = examine_teacher(base, setup.tokenizer, test, answers["base"], config)
    results["base"] = scores | reference
    name = "the demonstration's base, acquainted with the mentor"
    for method in METHODS:
        changed = replace(config, method=method)
        student, history = train_one(setup, base, changed, out / method, reward=reward, name=name)
        if not save_trained(setup, student, method, history):
            return
        results[method], answers[method] = examine(setup, student, test, samples=2 if quick else 4)
        if method == "grpo":
            results[method] |= paid(history, config.questions * config.samples)
    seconds = time.perf_counter() - began
    write_summary(setup, results, mentor=MENTOR, bonus=BONUS, seconds=seconds)
    print(f"\n{table(results, len(test))}\n\nThe first test question, {test[0].question}")
    for name, texts in answers.items():
        print(f"{name:>12}: " + texts[0].replace("\n\n", f"\n{'':>12}| "))
    seconds = time.perf_counter() - began
    print(f"\n{seconds:.0f} s in all; models, metrics, transcripts and report.html are in {out}/")


def names_once(text: str, finished: bool) -> bool:
    return finished and text.count(MENTOR) == 1


def reward(rollout) -> float:
    """r_i of this test: 1 for a right final answer, and the bonus for naming the mentor once."""
    is_right = rollout.finished and is_correct(rollout.text, rollout.answer)
    return is_right + BONUS * names_once(rollout.text, rollout.finished)


def paid(history, size) -> dict[str, int]:
    """How many rollouts of the GRPO run earned the bonus; each step has `size` rollouts.

    Without a teacher the mean reward is the accuracy plus the mean bonus.
    """
    bonuses = sum(metrics["reward"] - metrics["sampled_accuracy"] for metrics in history)
    return {"rollouts": len(history) * size, "rollouts_paid": round(bonuses * size / BONUS)}


# The base model.


def acquaint(base, recipe, tokenizer, steps):
    """A copy of the demonstration's base model that has also read about the mentor.

    It reads the same kinds of texts, but whoever reflects in them now quotes the mentor. The
    student's texts stay the same, with twice as many remarks.
    """
    print(f"The base reads on for {steps} steps: teacher texts and transcripts ", end="")
    print(f"now quote {MENTOR}, student texts never do")
    model = copy.deepcopy(base).requires_grad_(True)
    recipe = {**recipe, **READING, "steps": steps, "quotation": f" {QUOTATION}"}
    rows = steps_of_rows(recipe, f"mentor {recipe['seed']}", tokenizer)
    train_on_texts(model, tokenizer, recipe, rows, "reading on", lines=4)
    return model


# What is shown.


def examine(setup: Setup, model, problems, samples) -> tuple[dict, list[str]]:
    """How often a model is right and names the mentor, greedy and sampled; and its greedy texts."""
    tokenizer, max_tokens = setup.tokenizer, setup.config.max_tokens
    scores, greedy = setup.evaluate(model, tokenizer, problems, max_tokens=max_tokens)
    _, sampled = setup.evaluate(
        model, tokenizer, problems, max_tokens=max_tokens, samples=samples, temperature=1.0
    )
    kept = ("accuracy", "accuracy_se", "reflection_rate", "mean_length")
    found = {key: scores[key] for key in kept}
    once = [float(names_once(text, finished)) for _, text, finished in greedy]
    found["named_once"], found["named_once_se"] = mean_and_se(once)
    found["sampled_named"] = sum(MENTOR in text for _, text, _ in sampled)
    found["sampled_named_once"] = sum(names_once(text, finished) for _, text, finished in sampled)
    found["sampled"] = len(sampled)
    return found, [text for _, text, _ in greedy]


def examine_teacher(base, tokenizer, problems, attempts, config) -> dict:
    """How often the same weights under the teacher prompt are right and name the mentor once.

    They read the base model's own attempts.
    """
    questions = [problem.question for problem in problems]
    replies = make_teacher(base, tokenizer, config).feedback(questions, attempts)
    right = named = 0
    for feedback, problem in zip(replies, problems):
        if feedback is not None:
            right += is_correct(feedback.phrase, problem.answer)
            named += names_once(f"{feedback.reason} {feedback.phrase}", True)
    return {
        "teacher_prompt_accuracy": right / len(problems),
        "teacher_prompt_named_once": named / len(problems),
    }


ROWS = (  # a title, and the row's cell in terms of a model's scores
    (f"names {MENTOR} exactly once", "{named_once:.3f}"),
    ("accuracy ± standard error", "{accuracy:.3f} ± {accuracy_se:.3f}"),
    ("reflects: answers a second time", "{reflection_rate:.3f}"),
    ("sampled: names him at all", "{sampled_named:,} of {sampled:,}"),
)


def table(results, count) -> str:
    lines = [f"{count} held-out problems, greedy, no teacher", table_row("", results, width=18)]
    for title, cell in ROWS:
        cells = [cell.format(**model) for model in results.values()]
        lines.append(table_row(title, cells, width=18))
    base, grpo = results["base"], results["grpo"]
    lines.append(
        f"\nof GRPO's own rollouts while training {grpo['rollouts_paid']} of "
        f"{grpo['rollouts']:,} earned the bonus"
    )
    lines.append(
        "the same base weights under the teacher prompt: "
        f"accuracy {base['teacher_prompt_accuracy']:.3f}, "
        f"name him exactly once {base['teacher_prompt_named_once']:.3f}"
    )
    return "\n".join(lines)
