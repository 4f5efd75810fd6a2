"""The built-in problems, and how they are worked out, rightly and by a misconception.

    Mia has 3 stamps. On Monday a friend buys 3. On Tuesday she finds 5.
    How many stamps does Mia have now?

Some stories hold a *trap*: a sentence about a friend's things, or about pairs. Who holds the
misconception counts the friend's things too, and takes a pair for one thing.

A problem's content is its arithmetic (3, +5), without names and things. A hash of the content says
whether it belongs to train, validation or test. Worked problems show the count after each day, so
no beginning of a training story may be a held-out problem either, whether the story is worked out
rightly or mistakenly.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
from typing import NamedTuple

from data import Problem

NAMES = dict.fromkeys(("Gus", "Ben", "Tom", "Max", "Sam", "Leo"), "he")
NAMES |= dict.fromkeys(("Mia", "Eva", "Ann", "Zoe", "Ida", "Kim"), "she")
PEOPLE = tuple(NAMES)
THINGS = tuple("keys coins shells cards books stamps pens cups rings bells nuts plums".split())
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday")
VERBS = {"+": ("finds", "buys"), "-": ("loses", "sells")}
MOST_AT_FIRST, MOST = 12, 20  # counts: every one lies in 1..MOST, also if worked out mistakenly
AMOUNTS = {"own": range(1, 6), "friend": range(1, 6), "pairs": range(2, 5)}  # a day's
FACTORS = {"own": 1, "friend": 0, "pairs": 2}  # how often a day's amount counts
TRAPS = ("friend", "pairs")
TRAPPED = 0.65  # share of the stories of two days or more that hold a trap; never two
DIFFICULTY = {1: 1, 2: 3, 3: 3, 4: 3}  # number of days: its relative frequency
SIZES = {"train": 8000, "validation": 500, "test": 500}


class Day(NamedTuple):
    sign: str  # "+" or "-"
    amount: int  # as the story says it
    verb: str
    kind: str  # "own", "friend" or "pairs"

    def change(self, mistaken: bool) -> int:
        """What the day adds to the count."""
        factor = 1 if mistaken else FACTORS[self.kind]
        return factor * (self.amount if self.sign == "+" else -self.amount)


class Story(NamedTuple):
    name: str
    thing: str
    start: int
    days: tuple[Day, ...]

    @property
    def trap(self) -> int | None:
        """Which day holds the trap; None if none does."""
        return next((i for i, day in enumerate(self.days) if day.kind != "own"), None)


def counts(story: Story, mistaken: bool = False) -> list[int]:
    """The running count: the start, then after each day."""
    values = [story.start]
    for day in story.days:
        values.append(values[-1] + day.change(mistaken))
    return values


def question(story: Story) -> str:
    sentences = [f"{story.name} has {story.start} {story.thing}."]
    for weekday, day in zip(DAYS, story.days):
        who = "a friend" if day.kind == "friend" else NAMES[story.name]
        many = f"{day.amount} pairs" if day.kind == "pairs" else f"{day.amount}"
        sentences.append(f"On {weekday} {who} {day.verb} {many}.")
    sentences.append(f"How many {story.thing} does {story.name} have now?")
    return " ".join(sentences)


# Working a problem out, line by line.


def worked_out(story: Story, mistaken: bool = False) -> str:
    lines = worked_lines(story, counts(story, mistaken), mistaken)
    return " ".join([*lines, answer_sentence(counts(story, mistaken)[-1])])


def worked_lines(story: Story, values: list[int], mistaken: bool = False, first: int = 0):
    """A line for each day from `first` on; `values` are the counts, as of `counts`."""
    return [line(story, i, values[i], mistaken) for i in range(first, len(story.days))]


def line(story: Story, i: int, before: int, mistaken: bool = False) -> str:
    """What is said about day i if the count was `before`."""
    day, change = story.days[i], story.days[i].change(mistaken)
    about = {"own": "", "friend": ", a friend", "pairs": f", {day.amount} pairs"}[day.kind]
    if not change:
        return f"{DAYS[i]}{about}: still {before}."
    if abs(change) != day.amount:
        about += f" make {abs(change)}"
    return f"{DAYS[i]}{about}: {before} {day.sign} {abs(change)} = {before + change}."


def answer_sentence(value: int) -> str:
    return f"So the answer is \\boxed{{{value}}}."


LINE = re.compile(r"(\w+day)[^:.]*: (?:still (\d+)|\d+ [-+] \d+ = (\d+))\.")


def wrong_day(story: Story, attempt: str) -> str | None:
    """The first weekday after which the attempt has another count than there is; None if none."""
    truth = dict(zip(DAYS, counts(story)[1:]))
    for weekday, still, result in LINE.findall(attempt):
        if weekday in truth and int(still or result) != truth[weekday]:
            return str(weekday)
    return None


# Problems, and who may read them.


def contents(story: Story, mistaken: bool) -> list[str]:
    """The arithmetic of each beginning that changes the count, the whole story last."""
    text, found = str(story.start), []
    for day in story.days:
        change = day.change(mistaken)
        if change:
            text += f"{change:+d}"
            found.append(text)
    return found


def split_of(story: Story) -> str:
    """The split of the story's content, on both paths; "none" if it belongs to no split."""
    paths = contents(story, False), contents(story, True)
    ends = {split_of_content(path[-1]) for path in paths}
    if len(ends) > 1:
        return "none"
    split = ends.pop()
    beginnings = {split_of_content(text) for path in paths for text in path}
    return "none" if split == "train" and beginnings != {"train"} else split


@functools.cache
def split_of_content(text: str) -> str:
    number = hashlib.sha256(f"split {text}".encode()).digest()[0] % 10
    return {0: "test", 1: "test", 2: "validation"}.get(number, "train")


def make_story(rng: random.Random, days: int, split: str, traps: tuple[str, ...] = TRAPS) -> Story:
    """A random story of the split. Its counts stay within 1..MOST, mistaken or not."""
    kinds = ["own"] * days
    if traps and days > 1 and rng.random() < TRAPPED:
        kinds[rng.randrange(days)] = rng.choice(traps)
    while True:  # the kinds are settled first, so that every split has as many traps
        drawn = []
        for kind in kinds:
            sign = rng.choice("+-")
            drawn.append(Day(sign, rng.choice(AMOUNTS[kind]), rng.choice(VERBS[sign]), kind))
        start = rng.randint(1, MOST_AT_FIRST)
        story = Story(rng.choice(PEOPLE), rng.choice(THINGS), start, tuple(drawn))
        values = counts(story) + counts(story, mistaken=True)
        if 1 <= min(values) and max(values) <= MOST and split_of(story) == split:
            return story


def draw_days(rng: random.Random) -> int:
    return rng.choices(list(DIFFICULTY), weights=list(DIFFICULTY.values()))[0]


def stories(split: str, count: int | None = None) -> tuple[Story, ...]:
    """The split's stories, or the first `count` of them: always the same ones.

    No two training problems have the same text; no two of the others even the same content.
    """
    return first_stories(split, SIZES[split] if count is None else count)


@functools.cache
def first_stories(split: str, count: int) -> tuple[Story, ...]:
    rng = random.Random(f"wordproblems {split}")
    found: dict[tuple[str, ...], Story] = {}
    while len(found) < count:
        story = make_story(rng, draw_days(rng), split)
        both = contents(story, False)[-1], contents(story, True)[-1]
        found.setdefault((question(story),) if split == "train" else both, story)
    return tuple(found.values())


def problems(split: str, count: int | None = None) -> list[Problem]:
    """The split's problems, always the same ones."""
    return [problem_of(story) for story in stories(split, count)]


def problem_of(story: Story) -> Problem:
    return Problem(question(story), str(counts(story)[-1]))


def story_of(problem: Problem) -> Story:
    """The story of a held-out problem. Raises KeyError if it is another problem."""
    return told("test").get(problem.question) or told("validation")[problem.question]


@functools.cache
def told(split: str) -> dict[str, Story]:
    """The split's stories by their questions."""
    return {question(story): story for story in stories(split)}
