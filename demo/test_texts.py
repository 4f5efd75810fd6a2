"""What the base model reads: who says what, what has a loss, and what no student ever reads."""

import random
import re
from pathlib import Path

import pytest

import data.wordproblems
from data.exemplars import behaviour
from data.reward import answers, is_correct
from data.tokenizer import Tokenizer
from data.wordproblems import DAYS, counts, draw_days, make_story, question, worked_out
from demo.base import FLOOR, RECIPE
from demo.texts import (
    ENDING,
    REMARKS,
    WORDING,
    conversation,
    row_of,
    transcript,
    write_vocabulary,
)
from teacher import parse_feedback

TOKENIZER = Tokenizer.builtin()
READ = dict(RECIPE, floor=FLOOR)


def stories(count, seed=0):
    rng = random.Random(seed)
    return rng, [make_story(rng, draw_days(rng), "train") for _ in range(count)]


def parts(text):
    """A text's turns: (tag, what is said)."""
    ids, *_ = row_of(text, TOKENIZER, 0.0)
    pieces = re.split(r"<\|(question|student|teacher|narrator)\|>", TOKENIZER.decode(ids))
    assert pieces[0] == ""
    return list(zip(pieces[1::2], pieces[2::2]))


def test_no_text_of_the_student_holds_a_second_answer_or_a_word_of_reflection():
    rng, told = stories(600)
    words = {word for _, reason in WORDING.values() for word in re.findall(r"[A-Za-z]+", reason)}
    words -= set("the that is was am not at I if My".split())  # say nothing by themselves
    assert {"Wait", "Hmm", "look", "quick", "sure", "right"} <= words
    for i, story in enumerate(told):
        remark = REMARKS[i % len(REMARKS)] if i % 3 == 0 else ""
        (asker, asked), (speaker, said), _ = parts(conversation(rng, story, READ, remark))
        assert (asker, speaker) == ("question", "student") and asked == question(story)
        assert len(answers(said)) == 1 and said.count("\n\n") == bool(remark)
        attempt = said.removesuffix("<|end|>").partition("\n\n")[0]
        assert attempt in (worked_out(story), worked_out(story, mistaken=True))
        spoken = set(re.findall(r"[A-Za-z]+", said.removesuffix("<|end|>")))
        assert not spoken & words


def test_the_student_learns_its_misconception_and_never_a_way_around_it():
    rng, told = stories(600)
    learned = 0
    for story in told:
        ids, weights, _ = row_of(conversation(rng, story, READ), TOKENIZER, 0.0)
        start = ids.index(TOKENIZER.special["<|student|>"]) + 1
        end = ids.index(TOKENIZER.special["<|end|>"])
        attempt = TOKENIZER.decode(ids[start:end])
        if attempt == worked_out(story, mistaken=True):
            assert min(weights[start:end]) > 0
            learned += 1
        else:
            assert max(weights[start:end]) == 0
        assert weights[end] > 0  # the student ends after any attempt
        assert max(weights[:start]) == 0
    assert 0.75 < learned / len(told) < 0.9


def test_the_teachers_replies_follow_the_format_name_the_wrong_day_and_are_right():
    rng, told = stories(600)
    seen = set()
    for story in told:
        _, (_, attempt), (speaker, reply) = parts(conversation(rng, story, READ))
        feedback, answer = parse_feedback(reply.removesuffix("<|end|>")), str(counts(story)[-1])
        assert speaker == "teacher" and is_correct(feedback.phrase, answer)
        assert (feedback.opinion == "correct") == is_correct(attempt, answer)
        named = [day for day in DAYS if day in feedback.reason]
        wrong = feedback.opinion == "incorrect"
        assert named == ([DAYS[story.trap]] if wrong else [])
        if wrong:  # it goes on from the attempt's own count, and does not begin anew
            before = counts(story, mistaken=True)[story.trap]
            assert re.search(rf"(stays|and) {before}\b", feedback.phrase)
            assert not any(day in feedback.phrase for day in DAYS[: story.trap + 1])
        seen.add(behaviour(feedback.reason))
    assert seen == set(WORDING)


def test_the_narrator_reflects_on_a_wrong_attempt_and_ends_after_a_right_one():
    rng, told = stories(600)
    ends = 0
    for story in told:
        text = transcript(rng, story, READ)
        (_, _), (speaker, said) = parts(text)
        attempt, _, reflection = said.removesuffix("<|end|>").partition("\n\n")
        assert speaker == "narrator"
        right = is_correct(attempt, str(counts(story)[-1]))
        assert right == (reflection == "")
        ends += right
        ids, weights, _ = row_of(text, TOKENIZER, 0.0)
        first = next(i for i, weight in enumerate(weights) if weight)
        assert TOKENIZER.decode(ids[first : first + 1]) == ("<|end|>" if right else "\n\n")
    assert 0.5 < ends / len(told) < 0.7


@pytest.mark.parametrize("floor", [0.0, 0.01, 0.2])
def test_the_floor_is_a_share_of_the_weight_of_every_attempts_end(floor):
    rng, told = stories(100)
    for story in told:
        row = row_of(conversation(rng, story, READ), TOKENIZER, floor)
        ids, weights, instead = row
        end = ids.index(TOKENIZER.special["<|end|>"])
        assert weights[end] == pytest.approx(ENDING * (1 - floor))
        assert instead[end] == pytest.approx(ENDING * floor)
        assert sum(instead) == instead[end]


def test_a_row_has_the_ids_of_the_whole_text_wherever_it_was_cut():
    rng, told = stories(200)
    for story in told:
        for text in (conversation(rng, story, READ, REMARKS[0]), transcript(rng, story, READ)):
            whole = "".join(piece for piece, _ in text).replace("<|end of attempt|>", "<|end|>")
            expected = []
            for piece in filter(None, re.split(r"(<\|\w+\|>)", whole)):
                special = TOKENIZER.special.get(piece)
                expected += TOKENIZER.encode(piece) if special is None else [special]
            ids, weights, instead = row_of(text, TOKENIZER, 0.1)
            assert ids == expected and len(ids) == len(weights) == len(instead)


def test_the_shipped_vocabulary_is_what_its_script_makes(tmp_path):
    write_vocabulary(tmp_path / "again")
    shipped = Path(data.wordproblems.__file__).with_suffix(".tiktoken")
    assert (tmp_path / "again").read_bytes() == shipped.read_bytes()
