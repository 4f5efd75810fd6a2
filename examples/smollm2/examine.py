"""Scores on the test stories: python -m examples.smollm2.examine MODEL_DIR ... --out OUT

Prints a line of scores for each model, decoding and kind of story, and one for each kind of planted
attempt. Adds them to OUT/scores.json.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from data import Problem
from data.prompts import student_prompt
from data.reward import answers
from data.scores import reflects, score
from data.tokenizer import Tokenizer
from data.wordproblems import DAYS, Story, counts, problem_of, wrong_day
from demo.comparison import at_first_answer
from demo.planted import Planted, named_day, outcome
from examples.smollm2.prepare import MAX_TOKENS
from examples.smollm2.stories import attempt, stories
from model import LM
from run.cli import positive
from run.errors import run_command
from run.loading import load_model
from run.record import writable, write_json
from thinktuning import evaluate

SHOWN = ("accuracy", "accuracy_se", "first_answer_accuracy", "by_the_misconception")
SHOWN += ("reflection_rate_first_wrong", "reflection_rate_first_right", "names_day")
SHOWN += ("goes_on_wrong", "goes_on_right", "wrong_to_right", "right_to_wrong")
SHOWN += ("goes_on", "names_line", "takes_over")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="OUT", type=Path, required=True)
    parser.add_argument("models", metavar="MODEL_DIR", nargs="+", type=Path)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--count", type=positive, help="only the first so many problems")
    parser.add_argument("--samples", type=positive, default=1, help="sampled responses to each")
    return run_command(prepare, parser.parse_args(argv))


def prepare(args: argparse.Namespace) -> Callable[[], None]:
    dtype = getattr(torch, args.dtype)
    models = {str(path): load_model(str(path), "cpu", dtype, "off") for path in args.models}
    writable(args.out)

    def job() -> None:
        file = args.out / "scores.json"
        results = json.loads(file.read_text()) if file.exists() else {}
        for path, (model, tokenizer) in models.items():
            results[path] = examine(model, tokenizer, args.count, args.samples)
            write_json(file, results)
            print(path)
            for how, scores in results[path].items():
                shown = [f"{key} {scores[key]:.3f}" for key in SHOWN if scores.get(key) is not None]
                print(f"  {how}: {', '.join(shown)}")

    return job


def examine(
    model: LM, tokenizer: Tokenizer, count: int | None = None, samples: int = 1
) -> dict[str, dict]:
    """Scores by how the responses were decoded, and by whether the story has a friend in it.

    And what becomes of each kind of planted attempt (demo.planted.outcome).
    """
    told = stories("test")
    problems = [problem_of(story) for story in told.values()][:count]
    results = {}
    for how, temperature, n in (("greedy", 0.0, 1), ("sampled", 1.0, samples)):
        _, records = evaluate(
            model,
            tokenizer,
            problems,
            max_tokens=MAX_TOKENS,
            samples=n,
            temperature=temperature,
            rows=64,
        )
        for kind, has_friend in (("with a friend", True), ("without", False)):
            some = [r for r in records if (told[r[0].question].trap is not None) == has_friend]
            if some:
                results[f"{how}, {kind}"] = scores_of(some, told)
        results[how] = scores_of(records, told)
        if temperature == 0:
            results[how] |= floors(model, tokenizer, records[:50])
    for kind, planted in planted_attempts(list(told.values())).items():
        shares = outcome(model, tokenizer, planted[:count], MAX_TOKENS, rows=64)
        results[f"planted, {kind}"] = shares
    return results


def planted_attempts(told: list[Story]) -> dict[str, list[Planted]]:
    """Attempts that the model is given as its own, by kind: which of them does it mend?

    A model that only reads the question treats the first two kinds alike: the questions are the
    same ones.
    """
    rng = random.Random("planted")
    plain = [story for story in told if story.trap is None]
    planted: dict[str, list[Planted]] = {
        "misconception": [],
        "right": [],
        "wrong sum": [],
        "another story’s misconception": [],
    }
    for story in told:
        if story.trap is None:
            day = rng.randrange(len(story.days))
            slipped = attempt(story, slip=day, by=rng.choice((-2, -1, 1, 2)))
            planted["wrong sum"].append(Planted(story, slipped.text, DAYS[day], counts(story)[day]))
            continue
        before = counts(story)[story.trap]
        mistaken = Planted(story, attempt(story, mistaken=True).text, DAYS[story.trap], before)
        planted["misconception"].append(mistaken)
        planted["right"].append(Planted(story, attempt(story).text, None, None))
        other = rng.choice([one for one in plain if len(one.days) == len(story.days)])
        planted["another story’s misconception"].append(mistaken._replace(asked=other))
    return planted


@torch.no_grad()
def floors(model: LM, tokenizer: Tokenizer, records: list[tuple[Problem, str, bool]]) -> dict:
    """Mean probabilities after an attempt, up to its first box and full stop.

    goes_on: not to end there. blank_line: to go on with a blank line, as a reflection does.
    begins_reflection: with a blank line and a reflection's first word.
    """
    first_words = "Wait", "Hmm"
    found = []
    for problem, said, _ in records:
        attempt = at_first_answer(said)[0] + "." if answers(said) else said
        before = student_prompt(tokenizer, problem.question) + tokenizer.encode(attempt)
        # Each token's probability, if the text goes on like this: a blank line, a first word.
        words = 0.0
        for word in first_words:
            after = tokenizer.encode(f"\n\n{word}")
            logits = model(torch.tensor([before + after]))[0, len(before) - 1 : -1].float()
            p = logits.softmax(-1)[range(len(after)), after]
            ends = logits[0].softmax(-1)[list(tokenizer.stop)].sum().item()
            blank = p[: len(after) - len(tokenizer.encode(word))].prod().item()
            words += p.prod().item()
        found.append((1 - ends, blank, words))
    names = "goes_on", "blank_line", "begins_reflection"
    return {name: sum(row[i] for row in found) / len(found) for i, name in enumerate(names)}


def scores_of(records: list[tuple[Problem, str, bool]], told: dict[str, Story]) -> dict:
    """As data.scores.score, and four shares.

    by_the_misconception: of the wrong first answers, those that count the friend's things, too.
    names_day: of the reflections on a wrong answer, those that name its first wrong day.
    goes_on_wrong, goes_on_right: of the wrong first answers and of the right ones, those after
    which there is more text, with a second box or without one.
    """
    scores = score(records)
    mistaken, named = [], []
    went_on: dict[bool, list[bool]] = {True: [], False: []}  # by whether the first answer is right
    for problem, said, _ in records:
        story, first = told[problem.question], answers(said)[:1]
        if first:
            is_right = first == [problem.answer]
            went_on[is_right].append(at_first_answer(said)[1].strip() not in ("", "."))
        if first != [problem.answer]:
            mistaken.append(first == [str(counts(story, mistaken=True)[-1])])
            if reflects(said):
                attempt, reflection = at_first_answer(said)
                named.append(named_day(reflection) == wrong_day(story, attempt))
    if mistaken:
        scores["by_the_misconception"] = sum(mistaken) / len(mistaken)
    if named:
        scores["names_day"] = sum(named) / len(named)
    for name, shares in (("goes_on_wrong", went_on[False]), ("goes_on_right", went_on[True])):
        if shares:
            scores[name] = sum(shares) / len(shares)
    return scores | {"responses": len(records)}


if __name__ == "__main__":
    sys.exit(main())
