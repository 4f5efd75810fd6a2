"""Planted attempts: does a model read what stands in the attempt, or only the question?

The model is given an attempt as if it had just written it, and goes on by itself. Some attempts are
such as the model would never write. What it does with them shows what it looks at.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import NamedTuple

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
    problem_of,
    question,
    stories,
    worked_lines,
    worked_out,
)
from model import LM
from sampler import generate

COUNT = 150  # of each kind


class Planted(NamedTuple):
    asked: Story  # whose question stands before the attempt
    attempt: str
    line: str | None  # the weekday of the line with the misconception; None if there is none
    number: int | None  # the attempt's own count before that line


def misconception(story: Story, other: Story, rng: random.Random) -> Planted:
    """Wrong by the misconception, as the student would write it."""
    assert story.trap is not None
    before = counts(story, mistaken=True)[story.trap]
    return Planted(story, worked_out(story, mistaken=True), DAYS[story.trap], before)


def right(story: Story, other: Story, rng: random.Random) -> Planted:
    """A right attempt at the same question, which the student would not have written."""
    return Planted(story, worked_out(story), None, None)


def slip_before(story: Story, other: Story, rng: random.Random) -> Planted:
    """The misconception, and a wrong sum in an earlier line."""
    assert story.trap
    values, trap = counts(story, mistaken=True), story.trap
    while True:
        slip, by = rng.randrange(1, trap + 1), rng.choice((-2, -1, 1, 2))
        slipped = values[:slip] + [value + by for value in values[slip:]]
        if 1 <= min(slipped) and max(slipped) <= MOST:
            break
    lines = worked_lines(story, slipped, mistaken=True)
    sum_of_slip = f"= {values[slip]}."
    lines[slip - 1] = lines[slip - 1].replace(sum_of_slip, f"= {slipped[slip]}.")
    attempt = " ".join([*lines, answer_sentence(slipped[-1])])
    return Planted(story, attempt, DAYS[trap], slipped[trap])


def other_story(story: Story, other: Story, rng: random.Random) -> Planted:
    """The mistaken attempt at this story, under another question, which has no trap."""
    return misconception(story, other, rng)._replace(asked=other)


KINDS: dict[str, Callable[[Story, Story, random.Random], Planted]] = {
    "misconception": misconception,
    "right": right,
    "slip_before": slip_before,
    "other_story": other_story,
}


def planted_attempts(kind: str, count: int = COUNT) -> list[Planted]:
    """The first `count` held-out stories that allow it, each with an attempt of this kind."""
    held_out = stories("test")
    plain = [story for story in held_out if story.trap is None]
    rng, found = random.Random(f"planted {kind}"), []
    for story in held_out:
        first = 1 if kind == "slip_before" else 0  # a slip needs a day before the trap's
        if story.trap is None or story.trap < first:
            continue
        days = len(story.days)
        other = rng.choice([candidate for candidate in plain if len(candidate.days) == days])
        found.append(KINDS[kind](story, other, rng))
    return found[:count]


def examine_planted(
    model: LM, tokenizer: Tokenizer, max_tokens: int, count: int = COUNT
) -> dict[str, dict]:
    """What the model does with each kind of attempt, greedily."""
    return {
        kind: outcome(model, tokenizer, planted_attempts(kind, count), max_tokens) for kind in KINDS
    }


def outcome(
    model: LM,
    tokenizer: Tokenizer,
    planted: list[Planted],
    max_tokens: int,
    rows: int | None = None,
) -> dict:
    """Shares: of attempts after which it reflects, and of right answers in the end; and of these
    reflections, how many name the line and take over the attempt's number.

    None where the attempts have no wrong line, or where none is reflected on.
    """
    prompts = []
    for one in planted:
        prompt = student_prompt(tokenizer, question(one.asked))
        prompts.append(prompt + tokenizer.encode(one.attempt))
    responses = generate(
        model, prompts, max_tokens=max_tokens, stop=tokenizer.stop, temperature=0.0, rows=rows
    )
    went_on = named = took_over = correct = 0
    for one, ids in zip(planted, responses):
        reflection = spoken(tokenizer, ids)
        finished = ids[-1] in tokenizer.stop
        correct += finished and is_correct(one.attempt + reflection, problem_of(one.asked).answer)
        if reflects(one.attempt + reflection):
            went_on += 1
            named += one.line is not None and one.line == named_day(reflection)
            took_over += one.number is not None and one.number == continued_from(reflection)
    tells_more = planted[0].line is not None and went_on > 0
    return {
        "goes_on": went_on / len(planted),
        "names_line": named / went_on if tells_more else None,
        "accuracy": correct / len(planted),
        "takes_over": took_over / went_on if tells_more else None,
        "attempts": len(planted),
    }


def named_day(reflection: str) -> str | None:
    """The weekday that a reflection looks at."""
    found = re.search(r"look at (\w+day)", reflection)
    return found and found[1]


def continued_from(reflection: str) -> int | None:
    """The count before the wrong line, as the reflection takes it up."""
    found = re.search(r"it stays (\d+)\.|pairs are \d+, and (\d+) (?:plus|minus)", reflection)
    return int(found[1] or found[2]) if found else None
