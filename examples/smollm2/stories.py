"""Stories, attempts at them and a teacher's replies, in whole sentences for a pretrained model.

The stories are the built-in problems' (data/wordproblems.py), of two or three days. In some of them
a friend does what one day tells. `attempt` works a story out, rightly or with a mistake that it is
given.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from data.wordproblems import DAYS, NAMES, Story, answer_sentence, counts, make_story, question

TRAPS = ("friend",)
SIZES = {"train": 2000, "validation": 200, "test": 300}


class Attempt(NamedTuple):
    text: str
    wrong: int | None  # the first day after which its count is not the story's; None if it is right


def story(rng: random.Random, split: str, traps: tuple[str, ...] = TRAPS) -> Story:
    return make_story(rng, rng.choice((2, 3)), split, traps)


def stories(split: str) -> dict[str, Story]:
    """The split's stories by their questions, always the same ones."""
    rng = random.Random(f"smollm2 {split}")
    found: dict[str, Story] = {}
    while len(found) < SIZES[split]:
        told = story(rng, split)
        found[question(told)] = told
    return found


def sentence(story: Story, i: int) -> str:
    """Day i as the question tells it, without the full stop."""
    return question(story).split(". ")[1 + i]


def line(story: Story, i: int, before: int, after: int, misread: bool = False) -> str:
    """Day i, and how the count becomes `after`. `misread`: a friend's day is told as one's own."""
    told, day = sentence(story, i), story.days[i]
    if misread:
        told = told.replace("a friend", NAMES[story.name])
    if before == after:
        return f"{told}: still {before}."
    return f"{told}: {before} {day.sign} {day.amount} = {after}."


def attempt(
    story: Story,
    mistaken: bool = False,
    slip: int | None = None,
    by: int = 1,
    misread: bool = False,
) -> Attempt:
    """The story worked out. `mistaken`: a friend's things count. The sum of day `slip` is off."""
    count, truth, lines, wrong = story.start, counts(story), [], None
    for i, day in enumerate(story.days):
        before, count = count, count + day.change(mistaken) + (by if i == slip else 0)
        lines.append(line(story, i, before, count, misread))
        if wrong is None and count != truth[i + 1]:
            wrong = i
    return Attempt(" ".join([*lines, answer_sentence(count)]), wrong)


def reply(rng: random.Random, story: Story, wrong: int | None) -> str:
    """What the teacher should say about an attempt whose first wrong day is `wrong`."""
    values = counts(story)
    if wrong is None:
        reason = rng.choice(
            ("Yes, I think that is right.", "A mentor would ask if I am sure. I am.")
        )
        phrase = f"Each line fits. {answer_sentence(values[-1])}"
        return tagged("correct", reason, phrase)
    opening = rng.choice(("Wait, that does not fit the story", "Hmm, I was too quick there"))
    day, before, now = story.days[wrong], *values[wrong : wrong + 2]
    right = f"{before} {day.sign} {day.amount} is {now}."
    if day.kind == "friend":
        right = f"The {day.amount} belong to a friend, so it stays {now}."
    rest = range(wrong + 1, len(story.days))
    lines = [line(story, i, values[i], values[i + 1]) for i in rest]
    phrase = " ".join([right, *lines, answer_sentence(values[-1])])
    return tagged("incorrect", f"{opening}: look at {DAYS[wrong]}.", phrase)


def tagged(opinion: str, reason: str, phrase: str) -> str:
    return f"<opinion>{opinion}</opinion>\n<reason>{reason}</reason>\n<phrase>{phrase}</phrase>"


def some_attempt(rng: random.Random, story: Story) -> Attempt:
    """One for the teacher to read: right, with a friend's things counted, or with a wrong sum.

    Half of those that count a friend's things tell that day as one's own, as the student does.
    """
    mistaken = story.trap is not None and rng.random() < 0.7
    misread = mistaken and rng.random() < 0.5
    own = [i for i, day in enumerate(story.days) if day.kind == "own"]
    if rng.random() >= 0.2:
        return attempt(story, mistaken, misread=misread)
    slip = rng.choice(own)
    lowest = min(counts(story, mistaken)[slip + 1 :])  # all counts stay above 0
    by = rng.choice([n for n in range(1 - lowest, 11) if n])
    return attempt(story, mistaken, slip, by, misread)
