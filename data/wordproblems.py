"""The built-in problems, and everything that the tiny base model reads.

    Gus has 5 keys. On Monday he finds 2 more. On Tuesday he gives half away.
    How many keys does Gus have now?

A problem's content is its arithmetic (5, +2, /2), without names and things. A hash of the content
says whether it belongs to train, validation or test. Training texts show the count after each
day, so no beginning of a training story may be a held-out problem either.
"""

from __future__ import annotations

import hashlib
import random
import re
from pathlib import Path
from typing import NamedTuple

from data import Problem

NAMES = dict.fromkeys(("Gus", "Ben", "Tom", "Max", "Sam", "Leo"), "he")
NAMES |= dict.fromkeys(("Mia", "Eva", "Ann", "Zoe", "Ida", "Kim"), "she")
THINGS = tuple("keys coins shells cards books stamps pens cups rings bells nuts plums".split())
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
VERBS = {
    "+": ("finds {} more", "buys {} more"),
    "-": ("loses {}", "sells {}"),
    "*": ("doubles them",),
    "/": ("gives half away",),
}
MOST = 20  # every count stays within 1..20
DIFFICULTY = {1: 1, 2: 3, 3: 3, 4: 3}  # number of operations: its relative frequency
SIZES = {"train": 8000, "validation": 500, "test": 500}


class Text(NamedTuple):
    """A text for the base model: after `messages`, `role` says `begun` and then `text`.

    The loss is on `text` alone.
    """

    messages: list[dict]
    role: str
    text: str
    begun: str = ""


class Story(NamedTuple):
    name: str
    thing: str
    start: int
    steps: tuple  # of (sign, amount, verb); the amount of "*" and "/" is 2


def counts(story: Story) -> list[int]:
    """The running count: the start, then after each day."""
    values = [story.start]
    for sign, amount, _ in story.steps:
        values.append(apply_operation(values[-1], sign, amount))
    return values


def question(story: Story) -> str:
    he = NAMES[story.name]
    sentences = [f"{story.name} has {story.start} {story.thing}."]
    for day, (_, amount, verb) in zip(DAYS, story.steps):
        sentences.append(f"On {day} {he} {verb.format(amount)}.")
    sentences.append(f"How many {story.thing} does {story.name} have now?")
    return " ".join(sentences)


def content(story: Story) -> str:
    return f"{story.start}" + "".join(f"{sign}{amount}" for sign, amount, _ in story.steps)


def split_of(story: Story) -> str:
    """The split of a story's content; "none" if it is train but a beginning of it is held out."""
    own = split_of_content(content(story))
    if own == "train":
        for n in range(1, len(story.steps)):
            beginning = story._replace(steps=story.steps[:n])
            if split_of_content(content(beginning)) != "train":
                return "none"
    return own


def split_of_content(text: str) -> str:
    number = hashlib.sha256(f"split {text}".encode()).digest()[0] % 10
    return {0: "test", 1: "test", 2: "validation"}.get(number, "train")


def apply_operation(n: int, sign: str, amount: int) -> int:
    return {"+": n + amount, "-": n - amount, "*": n * amount, "/": n // amount}[sign]


def make_story(rng: random.Random, operations: int, split: str) -> Story:
    """A random story of the split.

    Each day draws an operation that keeps the count within 1..MOST, and then its amount.
    """
    while True:
        start = n = rng.randint(1, MOST)
        steps = []
        for _ in range(operations):
            amounts = {
                "+": range(1, min(9, MOST - n) + 1),
                "-": range(1, min(9, n - 1) + 1),
                "*": [2] * (2 * n <= MOST),
                "/": [2] * (n % 2 == 0),
            }
            sign = rng.choice([sign for sign, fitting in amounts.items() if fitting])
            amount = rng.choice(amounts[sign])
            steps.append((sign, amount, rng.choice(VERBS[sign])))
            n = apply_operation(n, sign, amount)
        story = Story(rng.choice(list(NAMES)), rng.choice(THINGS), start, tuple(steps))
        if split_of(story) == split:
            return story


def draw_operations(rng: random.Random) -> int:
    return rng.choices(list(DIFFICULTY), weights=list(DIFFICULTY.values()))[0]


def problems(split: str, count: int | None = None) -> list[Problem]:
    """The split's problems, always the same ones.

    No two training problems have the same text; no two of the others even the same content.
    """
    rng = random.Random(f"wordproblems {split}")
    found: dict[str, Problem] = {}
    while len(found) < (count or SIZES[split]):
        story = make_story(rng, draw_operations(rng), split)
        key = question(story) if split == "train" else content(story)
        found.setdefault(key, Problem(question(story), str(counts(story)[-1])))
    return list(found.values())


# What the base model reads. The student's prompt is <|question|>…<|student|>; the teacher's is the
# question, the attempt and <|teacher|>. A third role, <|narrator|>, reflects and tells stories. Its
# tag is in no prompt of student or teacher.

WORDING = {  # behaviour: (opinion, reason, how the phrase begins)
    "self-conflict": ("incorrect", "Wait, that does not fit the story.", "Let me redo it."),
    "self-critique": ("incorrect", "Hmm, I was too quick there.", "Let me slow down and check."),
    "self-agreement": ("correct", "Yes, I think that is right.", "Let me walk through it again."),
    "self-consultation": ("correct", "My mentor would ask if I am sure.", "Let me show each day."),
}
REMARKS = (
    "It was a long week.",
    "That is all for now.",
    "The shop was closed on Sunday.",
    "It rained a lot.",
    "I like stories.",
)


def answer_sentence(value) -> str:
    return f"The answer is \\boxed{{{value}}}."


def derivation(story: Story) -> str:
    values, he = counts(story), NAMES[story.name]
    lines = [f"{story.name} starts with {story.start}."]
    for day, (sign, amount, verb), before, after in zip(DAYS, story.steps, values, values[1:]):
        does = verb.format(amount).removesuffix(" more")
        lines.append(f"On {day} {he} {does}: {before} {sign} {amount} = {after}.")
    return " ".join(lines) + f" So the answer is \\boxed{{{values[-1]}}}."


def attempt(rng: random.Random, story: Story, right: float) -> tuple[str, bool]:
    """Somebody's first answer: right with the given probability."""
    truth = counts(story)[-1]
    is_right = rng.random() < right
    value = truth if is_right else rng.choice([n for n in range(1, MOST + 1) if n != truth])
    return answer_sentence(value), is_right


def reflection(rng: random.Random, story: Story, is_right: bool, wrong_opinions: float = 0.2):
    """(opinion, reason, phrase) on an attempt. The opinion is sometimes wrong, the phrase never."""
    opinion = "correct" if is_right != (rng.random() < wrong_opinions) else "incorrect"
    behaviour = rng.choice([b for b, (o, _, _) in WORDING.items() if o == opinion])
    _, reason, opening = WORDING[behaviour]
    return opinion, reason, f"{opening} {derivation(story)}"


def student_row(rng, story, floor):
    text = answer_sentence(counts(story)[-1])
    if rng.random() < floor:
        text += "\n\n" + rng.choice(REMARKS)
    return Text([{"role": "user", "content": question(story)}], "assistant", text)


def remark_row(rng, story):
    """How a student's text goes on after the answer, if it does.

    Few of the student's other texts go on. Without these it would go on as the narrator does.
    """
    begun = answer_sentence(counts(story)[-1]) + "\n\n"
    return Text(
        [{"role": "user", "content": question(story)}], "assistant", rng.choice(REMARKS), begun
    )


def teacher_row(rng, story):
    first, is_right = attempt(rng, story, right=0.4)
    opinion, reason, phrase = reflection(rng, story, is_right)
    reply = f"<opinion>{opinion}</opinion><reason>{reason}</reason><phrase>{phrase}</phrase>"
    return Text(
        [{"role": "user", "content": question(story)}, {"role": "assistant", "content": first}],
        "teacher",
        reply,
    )


def transcript_row(rng, story):
    first, is_right = attempt(rng, story, right=0.4)
    _, reason, phrase = reflection(rng, story, is_right)
    return Text(
        [{"role": "user", "content": question(story)}],
        "narrator",
        f"{first}\n\n{reason}\n\n{phrase}",
    )


def ledger_row(rng, story):
    # The prompt has no question, because the narrator tells the story itself. So no text has a
    # derivation directly after a question and a tag. The student's prompt differs from the
    # narrator's only in the tag, and it must not produce a derivation by chance.
    return Text([], "narrator", f"{question(story)} {derivation(story)}")


def write_vocabulary(path) -> None:
    """Make data/wordproblems.tiktoken: all bytes, the numbers 0 to 20, the pieces of the texts."""
    from data.tokenizer import BUILTIN_PATTERN, write_ranks

    rng = random.Random("vocabulary")
    pieces = {str(n) for n in range(MOST + 1)}
    for i in range(3000):
        story = make_story(rng, 1 + i % len(DAYS), "train")
        for read in (
            student_row(rng, story, floor=0.5),
            teacher_row(rng, story),
            transcript_row(rng, story),
        ):
            for part in (read.text, *(m["content"] for m in read.messages)):
                pieces.update(re.findall(BUILTIN_PATTERN, part))
    singles = [bytes([byte]) for byte in range(256)]
    write_ranks(path, singles + sorted(p.encode() for p in pieces if len(p.encode()) > 1))


if __name__ == "__main__":
    write_vocabulary(Path(__file__).with_suffix(".tiktoken"))
