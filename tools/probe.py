"""Three objections to the demonstration, measured on a finished run.

    python -m tools.probe RUN > results/probe-seed0.json

`forced`: does the base model lack more than one token? It goes on after its own attempts, with
nothing, a blank line, or a blank line and a first word put behind them; or as the narrator.
`two_friends`: does a reflection only name the day with the word "friend"? The attempts are at
stories with two such days. `samples`: do several samples of a problem do as well?
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from data.chat import SPEAKER_TAGS
from data.prompts import spoken, student_prompt
from data.reward import is_correct
from data.scores import reflects
from data.tokenizer import Tokenizer
from data.wordproblems import (
    DAYS,
    MOST,
    Story,
    answer_sentence,
    counts,
    line,
    make_story,
    problem_of,
    question,
    split_of,
    stories,
    wrong_day,
)
from demo.command import models_of
from demo.planted import COUNT, named_day
from model import LM
from run.config import DEMO
from sampler import generate
from thinktuning import evaluate

SAMPLES, MAX_TOKENS = 8, DEMO["max_tokens"]
BLANK_LINE, FIRST_WORD = "\n\n", "\n\nHmm"
TWO_FRIENDS = {  # which of the two friends' lines are wrong, in the order of the days
    "wrong, right": (True, False),
    "right, wrong": (False, True),
    "wrong, wrong": (True, True),
    "right, right": (False, False),
}


class Attempt(NamedTuple):
    asked: Story
    text: str
    wrong: list[str]  # the weekdays of the lines with the misconception
    right: list[str]  # of the friend's lines without it


def probe(models: dict[str, LM], tokenizer: Tokenizer, count: int | None = None) -> dict:
    """All three; `count` makes them shorter, for a test."""
    base, ours = models["base"], models["thinktuning"]

    def rows(attempts: list[Attempt]) -> dict[str, dict]:
        return {
            "base": outcome(base, tokenizer, attempts),
            "base, blank line": outcome(base, tokenizer, attempts, BLANK_LINE),
            "base, blank line and Hmm": outcome(base, tokenizer, attempts, FIRST_WORD),
            "base as narrator": outcome(base, tokenizer, attempts, role="narrator"),
            "ThinkTuning": outcome(ours, tokenizer, attempts),
            "ThinkTuning, blank line": outcome(ours, tokenizer, attempts, BLANK_LINE),
        }

    told = stories("test")[:count]
    problems = [problem_of(story) for story in told]
    _, records = evaluate(base, tokenizer, problems, max_tokens=MAX_TOKENS)
    own = own_attempts(told, records)
    planted = {
        name: two_friends(wrong, min(count or COUNT, COUNT)) for name, wrong in TWO_FRIENDS.items()
    }
    samples = {}
    for name, model in models.items():
        options = dict(max_tokens=MAX_TOKENS, samples=SAMPLES, temperature=1.0)
        samples[name], _ = evaluate(model, tokenizer, problems, **options)
    return {
        "forced": {which: rows(attempts) for which, attempts in own.items()},
        "two_friends": {which: rows(attempts) for which, attempts in planted.items()},
        "samples": samples,
    }


def outcome(
    model: LM, tokenizer: Tokenizer, attempts: list[Attempt], forced="", role="assistant"
) -> dict:
    """Shares of the attempts, after which the model goes on greedily behind the `forced` words.

    Does it give a second answer; which line does it name, of the wrong ones, the friend's right
    ones or the others; and is the answer right in the end?
    """
    prompts = []
    for one in attempts:
        asked = student_prompt(tokenizer, question(one.asked))[:-1]  # without the student's tag
        tag = tokenizer.special[SPEAKER_TAGS[role]]
        prompts.append([*asked, tag, *tokenizer.encode(one.text + forced)])
    options = dict(max_tokens=MAX_TOKENS, stop=tokenizer.stop, temperature=0.0)
    found = dict(reflects=0, names_wrong=0, names_right=0, names_other=0, accuracy=0)
    for one, ids in zip(attempts, generate(model, prompts, **options)):
        whole = one.text + forced + spoken(tokenizer, ids)
        finished, answer = ids[-1] in tokenizer.stop, problem_of(one.asked).answer
        found["reflects"] += reflects(whole)
        found["accuracy"] += finished and is_correct(whole, answer)
        if day := named_day(whole):
            kind = "wrong" if day in one.wrong else "right" if day in one.right else "other"
            found[f"names_{kind}"] += 1
    shares = {name: count / len(attempts) for name, count in found.items()}
    return {**shares, "attempts": len(attempts)}


def own_attempts(told, records) -> dict[str, list[Attempt]]:
    """Wrong and right attempts, of the records of responses to the stories `told`."""
    found: dict[str, list[Attempt]] = {"wrong": [], "right": []}
    for story, (problem, text, _) in zip(told, records):
        which = "right" if is_correct(text, problem.answer) else "wrong"
        day = wrong_day(story, text)
        found[which].append(Attempt(story, text, [day] if day else [], []))
    return found


def two_friends(wrong: tuple[bool, bool], count: int) -> list[Attempt]:
    """Attempts at held-out stories of three or four days, of which two are a friend's.

    `wrong` says which of these two lines count the friend's things. No model has read such a story:
    those that it knows have one trap at the most.
    """
    rng, found = random.Random("two friends"), []
    while len(found) < count:
        length = rng.choice((3, 4))
        friends = sorted(rng.sample(range(length), 2))
        story = make_story(rng, length, "test", traps=())
        days = list(story.days)
        for i in friends:
            days[i] = days[i]._replace(kind="friend")
        story = story._replace(days=tuple(days))
        mistaken = [i for i, is_wrong in zip(friends, wrong) if is_wrong]
        values = [story.start]
        for i, day in enumerate(days):
            values.append(values[-1] + day.change(i in mistaken))
        seen = values + counts(story) + counts(story, mistaken=True)
        if split_of(story) == "test" and 1 <= min(seen) and max(seen) <= MOST:
            lines = [line(story, i, values[i], i in mistaken) for i in range(length)]
            text = " ".join([*lines, answer_sentence(values[-1])])
            right = [DAYS[i] for i in friends if i not in mistaken]
            found.append(Attempt(story, text, [DAYS[i] for i in mistaken], right))
    return found


def main(run: Path) -> None:
    torch.set_num_threads(1)
    models = {name: LM.load(path) for name, path in models_of(run).items()}
    print(json.dumps(probe(models, Tokenizer.builtin()), indent=1))


if __name__ == "__main__":
    try:
        if len(sys.argv) != 2:
            raise ValueError("usage: python -m tools.probe RUN")
        main(Path(sys.argv[1]))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
