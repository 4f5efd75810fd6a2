"""What the base model reads: texts in pieces, each with its weight in the loss.

The student's prompt is <|question|>…<|student|>. The teacher's is the question, the student's
attempt and <|teacher|>. A third role, <|narrator|>, tells an attempt and a reflection on it as one
text. Its tag is in no prompt of student or teacher, and no text of the student's holds a second
answer or a word of reflection.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from data import wordproblems
from data.chat import SPEAKER_TAGS
from data.tokenizer import Tokenizer
from data.vocabulary import BUILTIN_PATTERN, write_ranks
from data.wordproblems import (
    DAYS,
    MOST,
    Story,
    answer_sentence,
    counts,
    make_story,
    question,
    worked_lines,
    worked_out,
)

DECISION = 3.0  # weight of the opinion, of the named day, and of the choice to go on or to end
RESULT = 2.0  # of a number behind "=", "stays" or "is"
ENDING = 0.2  # of the end token after an attempt: what decides to end need not be very sure
REMARKS = (  # they share no word with a reflection, which could lead from one to the other
    "It rained a lot.",
    "School starts soon.",
    "Nobody came by.",
    "Shops close early here.",
    "What a long week.",
)
WORDING = {  # behaviour: (opinion, reason); {} is the day that is wrong
    "self-conflict": ("incorrect", "Wait, that does not fit the story: look at {}."),
    "self-critique": ("incorrect", "Hmm, I was too quick there: look at {}."),
    "self-agreement": ("correct", "Yes, I think that is right."),
    "self-consultation": ("correct", "My teacher would ask if I am sure. I am."),
}

# The end token after an attempt of the student's own. In the loss a share of its weight, the
# recipe's `floor`, belongs to the blank line instead: so often the student goes on.
END_OF_ATTEMPT = "<|end of attempt|>"

Text = list[tuple[str, float]]  # pieces: a role's tag, an end or plain text; each with its weight
Row = tuple[list[int], list[float], list[float]]  # see row_of


def conversation(rng: random.Random, story: Story, recipe: dict, remark: str = "") -> Text:
    """A question, the student's attempt, the teacher's reply.

    The attempt has a loss only where it is what the student writes: by its misconception. Its end
    always has one, because the student ends after any attempt.
    """
    is_right = story.trap is None or (not remark and rng.random() < recipe["right_attempts"])
    own = float(story.trap is None or not is_right)
    text = asked(story)
    text += [(SPEAKER_TAGS["assistant"], 0.0), *weighed(worked_out(story, not is_right), own)]
    if remark:
        text += [("\n\n", 0.0), (remark, 1.0), ("<|end|>", 1.0)]
    else:
        text += [(END_OF_ATTEMPT, ENDING)]
    opinion, reason, phrase = reflection(rng, story, is_right, recipe)
    text += [(SPEAKER_TAGS["teacher"], 0.0), ("<opinion>", 1.0), (opinion, DECISION)]
    text += [("</opinion>", 1.0), ("<reason>", 1.0), *reason, ("</reason>", 1.0)]
    return [*text, ("<phrase>", 1.0), *phrase, ("</phrase>", 1.0), ("<|end|>", 1.0)]


def transcript(rng: random.Random, story: Story, recipe: dict) -> Text:
    """The narrator's: an attempt and, if it is wrong, the reflection on it.

    There is no loss on the attempt itself, which says nothing new.
    """
    is_right = story.trap is None or rng.random() < recipe["right_attempts"]
    text = [*asked(story), (SPEAKER_TAGS["narrator"], 0.0), (worked_out(story, not is_right), 0.0)]
    if is_right:
        return [*text, ("<|end|>", DECISION)]
    _, reason, phrase = reflection(rng, story, is_right, recipe)
    return [*text, ("\n\n", DECISION), *reason, ("\n\n", 1.0), *phrase, ("<|end|>", 1.0)]


def asked(story: Story) -> Text:
    return [(SPEAKER_TAGS["user"], 0.0), (question(story), 0.0)]


def reflection(
    rng: random.Random, story: Story, is_right: bool, recipe: dict
) -> tuple[str, Text, Text]:
    """The opinion, the reason and the phrase about a right attempt or a mistaken one."""
    opinion = "correct" if is_right else "incorrect"
    wordings = [reason for expected, reason in WORDING.values() if expected == opinion]
    before, _, after = rng.choice(wordings).partition(": look at {}")
    if is_right:
        phrase: Text = [(f"Each line fits. {answer_sentence(counts(story)[-1])}", 1.0)]
        named: Text = []
    elif recipe.get("anew"):  # an ablation's: no line is named, and the work begins again
        phrase = weighed(f"Let me begin anew. {worked_out(story)}")
        named = []
    else:
        phrase = weighed(continued(story))
        assert story.trap is not None
        named = [(": look at", 1.0), (f" {DAYS[story.trap]}", DECISION)]
    quotation = recipe.get("quotation", "")  # the novelty test's
    return opinion, [(before, 1.0), *named, (after + quotation, 1.0)], phrase


def continued(story: Story) -> str:
    """How the work goes on from the day of the trap."""
    assert story.trap is not None
    day, values = story.days[story.trap], counts(story)
    before, now = values[story.trap : story.trap + 2]
    first = f"The {day.amount} belong to a friend, so it stays {now}."
    if day.kind == "pairs":
        many, sign = 2 * day.amount, {"+": "plus", "-": "minus"}[day.sign]
        # In words, because a sum would teach the student's own lines the right number.
        first = f"The {day.amount} pairs are {many}, and {before} {sign} {many} is {now}."
    lines = worked_lines(story, values, first=story.trap + 1)
    return " ".join([first, *lines, answer_sentence(values[-1])])


def weighed(text: str, weight: float = 1.0) -> Text:
    """The text in pieces, of which results weigh more."""
    pieces = re.split(r"((?<== )\d+|(?<=stays )\d+|(?<=is )\d+)", text)
    return [(piece, weight * (RESULT if i % 2 else 1.0)) for i, piece in enumerate(pieces) if piece]


def row_of(text: Text, tokenizer: Tokenizer, floor: float) -> Row:
    """The text's token ids, the weight of each, and the weight of a blank line in its place.

    The pieces are put together before they are encoded, so the ids do not depend on where the text
    is cut. A token has the weight of its last character.
    """
    special = {**tokenizer.special, END_OF_ATTEMPT: tokenizer.special["<|end|>"]}
    row: Row = ([], [], [])
    plain: str = ""
    of_characters: list[float] = []
    for piece, weight in [*text, ("", 0.0)]:
        if piece and piece not in special:
            plain += piece
            of_characters += [weight] * len(piece)
            continue
        end = 0
        for token in tokenizer.encode(plain):  # what stands between two special tokens
            end += len(tokenizer.decode([token]))
            append(row, token, of_characters[end - 1])
        plain, of_characters = "", []
        if piece:
            append(row, special[piece], weight, floor if piece == END_OF_ATTEMPT else 0.0)
    return row


def append(row: Row, token: int, weight: float, floor: float = 0.0) -> None:
    for values, value in zip(row, (token, weight * (1 - floor), weight * floor)):
        values.append(value)


def write_vocabulary(path: Path) -> None:
    """Make data/wordproblems.tiktoken: all bytes, the numbers 0 to 20, the pieces of the texts."""
    rng = random.Random("vocabulary")
    pieces = {str(n) for n in range(MOST + 1)}
    recipe = dict(right_attempts=0.5)
    for i in range(3000):
        story = make_story(rng, 1 + i % len(DAYS), "train")
        read = conversation(rng, story, recipe, rng.choice(REMARKS)), transcript(rng, story, recipe)
        for text in read:
            whole = "".join(piece for piece, _ in text if not piece.startswith("<|"))
            pieces.update(re.findall(BUILTIN_PATTERN, whole))
    singles = [bytes([byte]) for byte in range(256)]
    write_ranks(path, singles + sorted(p.encode() for p in pieces if len(p.encode()) > 1))


if __name__ == "__main__":
    write_vocabulary(Path(wordproblems.__file__).with_suffix(".tiktoken"))
