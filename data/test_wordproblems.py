"""The built-in problems: right answers, the misconception, held-out content on both paths."""

import itertools
import random
import re

import pytest

from data import load_problems, wordproblems
from data.prompts import student_prompt
from data.reward import final_answer, is_correct
from data.tokenizer import Tokenizer
from data.wordproblems import counts, make_story, question, split_of_content, worked_out, wrong_day


def read(text, mistaken=False):
    """A question worked out from its words alone: what each beginning adds up, and the end."""
    n = int(re.match(r"\w+ has (\d+) ", text)[1])
    arithmetic, beginnings = str(n), []
    for sentence in text.split(" On ")[1:]:
        amount = int(re.search(r"\d+", sentence)[0])
        if not mistaken:
            amount *= 0 if "a friend" in sentence else 2 if "pairs" in sentence else 1
        change = amount if re.search("finds|buys", sentence) else -amount
        n += change
        if change:
            arithmetic += f"{change:+d}"
            beginnings.append(arithmetic)
    return beginnings or [arithmetic], n


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_built_in_answer_is_right_and_held_out_problems_differ_in_content(split):
    problems = load_problems("wordproblems", split)
    assert [str(read(question)[1]) for question, _ in problems] == [p.answer for p in problems]
    assert all(1 <= read(p.question, wrong)[1] <= 20 for p in problems for wrong in (False, True))
    assert len({p.question for p in problems}) == len(problems) == wordproblems.SIZES[split]
    if split != "train":
        both = {(read(q)[0][-1], read(q, mistaken=True)[0][-1]) for q, _ in problems}
        assert len(both) == len(problems)
    trapped = sum("a friend" in q or "pairs" in q for q, _ in problems) / len(problems)
    assert 0.53 < trapped < 0.64  # 65% of those of two days or more


def test_no_training_story_passes_through_held_out_content_rightly_or_mistakenly():
    held_out = {}
    for split in ("validation", "test"):
        questions = [p.question for p in load_problems("wordproblems", split)]
        held_out[split] = {read(q, wrong)[0][-1] for q in questions for wrong in (False, True)}
    assert not held_out["validation"] & held_out["test"]
    rng = random.Random(0)
    stories = [question(make_story(rng, 1 + i % 4, "train")) for i in range(3000)]
    for text in stories + [p.question for p in load_problems("wordproblems")]:
        passed = {*read(text)[0], *read(text, mistaken=True)[0]}
        assert not passed & (held_out["validation"] | held_out["test"])


def test_content_is_split_by_a_hash_and_both_paths_of_a_story_belong_to_one_split():
    rng = random.Random(1)
    for split in ("validation", "test"):
        for _ in range(200):
            text = question(make_story(rng, rng.randint(2, 4), split))
            ends = read(text)[0][-1], read(text, mistaken=True)[0][-1]
            assert {split_of_content(end) for end in ends} == {split}


def test_an_attempt_shows_each_line_and_the_misconception_changes_the_trap_alone():
    rng = random.Random(2)
    seen = set()
    for _ in range(500):
        story = make_story(rng, rng.randint(1, 4), "train")
        right, mistaken = worked_out(story), worked_out(story, mistaken=True)
        for text, values in ((right, counts(story)), (mistaken, counts(story, mistaken=True))):
            assert final_answer(text) == str(values[-1])
            sums = re.findall(r"(\d+) ([-+]) (\d+) = (\d+)\.", text)
            assert all(eval(a + sign + b) == int(total) for a, sign, b, total in sums)
        assert (right == mistaken) == (story.trap is None)
        assert wrong_day(story, right) is None
        if story.trap is not None:
            seen.add(story.days[story.trap].kind)
            day = wordproblems.DAYS[story.trap]
            assert wrong_day(story, mistaken) == day
            ours, theirs = (re.split(r"(?<=\.) ", text) for text in (right, mistaken))
            assert ours[: story.trap] == theirs[: story.trap]
            assert ours[story.trap].startswith(day) and ours[story.trap] != theirs[story.trap]
    assert seen == {"friend", "pairs"}


def test_the_lines_read_as_they_are_told():
    own = wordproblems.Day("+", 5, "finds", "own")
    friend, pairs = own._replace(kind="friend"), own._replace(kind="pairs", amount=2)
    story = wordproblems.Story("Mia", "stamps", 3, (friend, pairs._replace(sign="+")))
    assert question(story) == (
        "Mia has 3 stamps. On Monday a friend finds 5. On Tuesday she finds 2 pairs. "
        "How many stamps does Mia have now?"
    )
    assert worked_out(story) == (
        "Monday, a friend: still 3. Tuesday, 2 pairs make 4: 3 + 4 = 7. So the answer is \\boxed{7}."
    )
    assert worked_out(story, mistaken=True) == (
        "Monday, a friend: 3 + 5 = 8. Tuesday, 2 pairs: 8 + 2 = 10. So the answer is \\boxed{10}."
    )
    assert not is_correct(worked_out(story, mistaken=True), "7")


def test_problems_are_the_same_each_time():
    again = itertools.islice(wordproblems.problems("test"), 50)
    assert list(again) == load_problems("wordproblems", "test")[:50]


def test_numbers_are_single_tokens_wherever_they_stand():
    tokenizer = Tokenizer.builtin()
    for text in (
        "Gus has 17 keys.",
        "17 + 2 = 19.",
        "so it stays 17.",
        "\\boxed{17}.",
        "a friend: still 17.",
        "2 pairs make 4: 17 - 4 = 13.",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode("17")[0] in tokenizer.encode(text)
    assert len(tokenizer.encode("17")) == 1


def test_the_student_prompt_is_the_question_alone_for_the_built_in_problems():
    tokenizer = Tokenizer.builtin()
    asked = load_problems("wordproblems")[0].question
    prompt = tokenizer.decode(student_prompt(tokenizer, asked))
    assert prompt == f"<|question|>{asked}<|student|>"
