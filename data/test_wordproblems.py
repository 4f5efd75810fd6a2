"""The built-in problems: right answers, held-out content, the texts of each role, the vocabulary."""

import random
import re
from pathlib import Path

import pytest

from data import load_problems, wordproblems
from data.exemplars import behaviour
from data.prompts import student_prompt
from data.reward import is_correct
from data.tokenizer import Tokenizer
from teacher import parse_feedback

HERE = Path(__file__).parent


def worked_out(question):
    """The content of a question as (start, (sign, amount) ...) and its answer, from its words alone."""
    n = int(re.match(r"\w+ has (\d+) ", question)[1])
    content = [n]
    for day in question.split(" On ")[1:]:
        signs = (
            ("finds", "+"),
            ("buys", "+"),
            ("loses", "-"),
            ("sells", "-"),
            ("doubles", "*"),
            ("half", "/"),
        )
        sign = next(sign for word, sign in signs if word in day)
        amount = int(re.search(r"\d+", day)[0]) if sign in "+-" else 2
        n = {"+": n + amount, "-": n - amount, "*": 2 * n, "/": n / 2}[sign]
        content.append((sign, amount))
    return tuple(content), n


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_built_in_answer_is_right_and_held_out_problems_differ_in_content(split):
    problems = load_problems("wordproblems", split)
    solved = [worked_out(question) for question, _ in problems]
    assert [str(int(n)) for _, n in solved] == [p.answer for p in problems]
    assert all(n == int(n) and 1 <= n <= 20 for _, n in solved)
    assert len({p.question for p in problems}) == len(problems) == wordproblems.SIZES[split]
    if split != "train":
        assert len({content for content, _ in solved}) == len(problems)


def test_no_training_story_passes_through_a_held_out_problem():
    held_out = {
        worked_out(p.question)[0]
        for split in ("validation", "test")
        for p in load_problems("wordproblems", split)
    }
    validation, test = (
        {worked_out(p.question)[0] for p in load_problems("wordproblems", split)}
        for split in ("validation", "test")
    )
    assert not validation & test
    rng = random.Random(0)
    stories = [
        wordproblems.question(wordproblems.make_story(rng, 1 + i % 6, "train")) for i in range(3000)
    ]
    for question in stories + [p.question for p in load_problems("wordproblems")]:
        content, _ = worked_out(question)
        assert not any(content[:end] in held_out for end in range(2, len(content) + 1))


def test_the_student_never_reads_a_second_answer_and_no_remark_at_floor_0():
    rng = random.Random(0)
    stories = [wordproblems.make_story(rng, 1 + i % 4, "train") for i in range(300)]
    texts = [wordproblems.student_row(rng, s, floor=0.5).text for s in stories]
    assert all(t.count("\\boxed") == 1 for t in texts)
    share = sum("\n\n" in t for t in texts) / len(texts)
    assert 0.4 < share < 0.6
    assert not any("\n\n" in wordproblems.student_row(rng, s, floor=0.0).text for s in stories)
    reflective = {reason.split()[0] for _, reason, _ in wordproblems.WORDING.values()}
    assert not reflective & {r.split()[0] for r in wordproblems.REMARKS}


def test_built_in_teacher_texts_are_feedback_the_parser_takes_and_mostly_right_in_opinion():
    rng, right, seen = random.Random(0), 0, set()
    for i in range(400):
        story = wordproblems.make_story(rng, 1 + i % 4, "train")
        messages, role, text, _ = wordproblems.teacher_row(rng, story)
        feedback = parse_feedback(text)
        answer = str(wordproblems.counts(story)[-1])
        assert role == "teacher" and is_correct(feedback.phrase, answer)
        right += (feedback.opinion == "correct") == is_correct(messages[1]["content"], answer)
        seen.add(behaviour(feedback.reason))
    assert 0.7 < right / 400 < 0.9 and seen == set(wordproblems.WORDING)


def test_the_shipped_vocabulary_is_what_its_script_makes(tmp_path):
    wordproblems.write_vocabulary(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (HERE / "wordproblems.tiktoken").read_bytes()


def test_numbers_are_single_tokens_wherever_they_stand():
    tokenizer = Tokenizer.builtin()
    for text in (
        "Gus has 17 keys.",
        "17 + 2 = 19.",
        "starts with 17.",
        "\\boxed{17}.",
        "finds 17: 17 - 3 = 14.",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode("17")[0] in tokenizer.encode(text)
    assert len(tokenizer.encode("17")) == 1


def test_the_student_prompt_is_the_question_alone_for_the_built_in_problems():
    tokenizer = Tokenizer.builtin()
    question = load_problems("wordproblems")[0].question
    assert (
        tokenizer.decode(student_prompt(tokenizer, question))
        == f"<|question|>{question}<|student|>"
    )
