"""The paper's novelty test at the demonstration's scale: does a student take up a habit that it practically never samples?

The teacher quotes a made-up mentor in all it says, and a response that names him exactly once earns 0.5 beside the
reward of its answer. No problem and none of the student's own texts names him: GRPO alone has next to nothing to reward.

    python thinktuning.py --preset mentor
"""

from __future__ import annotations

import copy
import random
import time
from dataclasses import replace

from data import load_problems, wordproblems
from data.reward import is_correct
from data.scores import mean_and_se
from demo.base import Setup, base_model, read, rows_of_step
from demo.comparison import train_one
from run.record import write_json
from show.report import write_report
from teacher import make_teacher

MENTOR, BONUS = "Ulmeck", 0.5
QUOTATION = f'{MENTOR} says: "show each day."'
SETTINGS = dict(
    max_tokens=120, teacher_reply=140
)  # the quotation takes 23 tokens, letter by letter where he speaks
READING = dict(steps=200, learning_rate=1e-3, warmup=20, remark_rows=4)


def compare(setup: Setup):
    """Base, GRPO and ThinkTuning with the mentor's bonus: models, metrics and summary.json in `out`, a table on the screen."""
    out = setup.out
    for name in ("summary.json", "report.html"):
        (out / name).unlink(missing_ok=True)  # an old table must not stand beside new models
    began, setup = time.perf_counter(), replace(setup, config=replace(setup.config, **SETTINGS))
    recipe, tokenizer, config, quick = setup.recipe, setup.tokenizer, setup.config, setup.quick
    base = acquaint(base_model(setup)[0], recipe, tokenizer, 10 if quick else READING["steps"])
    test = load_problems("wordproblems", "test")
    test = test[:50] if quick else test
    results, answers = {}, {}
    results["base"], answers["base"] = examine(setup, base, test, samples=2 if quick else 24)
    results["base"] |= examine_teacher(base, tokenizer, test, answers["base"], config)
    for method in ("grpo", "thinktuning"):
        student, history = train_one(
            setup,
            base,
            replace(config, method=method),
            out / method,
            bonus=bonus,
            name="the demonstration's base, acquainted with the mentor",
        )
        student.save(out / method / "model", tokenizer)
        if len(history) < config.steps:
            return print(
                f"stopped at step {len(history)}; that model is in {out / method / 'model'}"
            )
        results[method], answers[method] = examine(setup, student, test, samples=2 if quick else 4)
        if method == "grpo":
            results[method] |= paid(history, config.questions * config.samples)
    write_json(
        out / "summary.json",
        {
            **results,
            "mentor": MENTOR,
            "bonus": BONUS,
            "seed": config.seed,
            "floor": recipe["floor"],
            "steps": config.steps,
            "quick": quick,
            "seconds": time.perf_counter() - began,
        },
    )
    write_report(out)
    print(f"\n{table(results, len(test))}\n\nThe first test question, {test[0].question}")
    for name, texts in answers.items():
        print(f"{name:>12}: " + texts[0].replace("\n\n", f"\n{'':>12}| "))
    print(
        f"\n{time.perf_counter() - began:.0f} s in all; models, metrics, transcripts and report.html are in {out}/"
    )


def names_once(text: str, finished: bool) -> bool:
    return finished and text.count(MENTOR) == 1


def bonus(rollout) -> float:
    """What step 6 adds to a rollout's reward."""
    return BONUS * names_once(rollout.text, rollout.finished)


def paid(history, size) -> dict[str, int]:
    """How many of GRPO's own rollouts, `size` a step, earned the bonus: what their mean reward has beyond the right answers."""
    beyond = sum(m["reward"] - m["sampled_accuracy"] for m in history)
    return {"rollouts": len(history) * size, "rollouts_paid": round(beyond * size / BONUS)}


# The base model.


def acquaint(base, recipe, tokenizer, steps):
    """A copy of the demonstration's base that has read on for a while, in texts that quote the mentor wherever somebody reflects.

    Those are the teacher's texts and the third role's transcripts. The student's are what they were, with twice as many
    remarks: with as few as before, 1 of 12,000 responses of the base (seed 0) quoted him.
    """
    print(
        f"The base reads on for {steps} steps: teacher texts and transcripts now quote {MENTOR}, student texts never do"
    )
    model = copy.deepcopy(base).requires_grad_(True)
    recipe = recipe | {"remark_rows": READING["remark_rows"]}
    rng = random.Random(f"mentor {recipe['seed']}")

    def rate(step):
        return READING["learning_rate"] * min(
            1, (step + 1) / READING["warmup"], 2 * (steps - step) / steps
        )

    def rows(step):
        texts = rows_of_step(recipe, recipe["steps"], rng, tokenizer)
        return [(prompt, quoted(response, tokenizer), weight) for prompt, response, weight in texts]

    read(model, steps, rate, rows, "reading on", lines=4)
    return model


def quoted(response: list[int], tokenizer) -> list[int]:
    """A text's ids with the quotation after its reason, if it holds one; the end token stays the last."""
    text = tokenizer.decode(response[:-1])
    for _, reason, _ in wordproblems.WORDING.values():
        text = text.replace(reason, f"{reason} {QUOTATION}")
    return tokenizer.encode(text) + response[-1:]


# What is shown.


def examine(setup: Setup, model, problems, samples) -> tuple[dict, list[str]]:
    """Greedy accuracy and naming, how many sampled responses hold the name at all; and the greedy texts."""
    tokenizer, max_tokens = setup.tokenizer, setup.config.max_tokens
    scores, greedy = setup.evaluate(model, tokenizer, problems, max_tokens=max_tokens)
    _, sampled = setup.evaluate(
        model, tokenizer, problems, max_tokens=max_tokens, samples=samples, temperature=1.0
    )
    once, once_se = mean_and_se([float(names_once(text, finished)) for _, text, finished in greedy])
    return {
        **{
            key: scores[key]
            for key in ("accuracy", "accuracy_se", "reflection_rate", "mean_length")
        },
        "named_once": once,
        "named_once_se": once_se,
        "sampled_named": sum(MENTOR in text for _, text, _ in sampled),
        "sampled_named_once": sum(names_once(text, finished) for _, text, finished in sampled),
        "sampled": len(sampled),
    }, [text for _, text, _ in greedy]


def examine_teacher(base, tokenizer, problems, attempts, config) -> dict:
    """The same weights under the teacher prompt, reading the base's own attempts: how often right, how often naming him once."""
    replies = make_teacher(base, tokenizer, config).feedback(
        [p.question for p in problems], attempts
    )
    return {
        "teacher_prompt_accuracy": sum(
            f is not None and is_correct(f.phrase, p.answer) for f, p in zip(replies, problems)
        )
        / len(problems),
        "teacher_prompt_named_once": sum(
            f is not None and names_once(f"{f.reason} {f.phrase}", True) for f in replies
        )
        / len(problems),
    }


def table(results, count) -> str:
    lines = [
        f"{count} held-out problems, greedy, no teacher",
        f"{'':<34}" + "".join(f"{name:>18}" for name in results),
    ]
    for title, cell in (
        (f"names {MENTOR} exactly once", lambda r: f"{r['named_once']:.3f}"),
        ("accuracy ± standard error", lambda r: f"{r['accuracy']:.3f} ± {r['accuracy_se']:.3f}"),
        ("reflects: answers a second time", lambda r: f"{r['reflection_rate']:.3f}"),
        ("sampled: names him at all", lambda r: f"{r['sampled_named']:,} of {r['sampled']:,}"),
    ):
        lines.append(f"{title:<34}" + "".join(f"{cell(r):>18}" for r in results.values()))
    base, grpo = results["base"], results["grpo"]
    lines.append(
        f"\nof GRPO's own rollouts while training {grpo['rollouts_paid']} of {grpo['rollouts']:,} earned the bonus"
    )
    lines.append(
        f"the same base weights under the teacher prompt: accuracy {base['teacher_prompt_accuracy']:.3f}, "
        f"name him exactly once {base['teacher_prompt_named_once']:.3f}"
    )
    return "\n".join(lines)
