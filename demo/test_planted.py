"""Planted attempts: each is what its name says, and what a model does with it is counted rightly."""

import re

import pytest

import demo.planted
from data.reward import final_answer
from data.tokenizer import Tokenizer
from data.wordproblems import DAYS, counts, problem_of, stories, worked_out, wrong_day
from demo.base import RECIPE
from demo.comparison import names_line
from demo.planted import COUNT, KINDS, continued_from, named_day, outcome, planted_attempts
from demo.pretraining import new_model
from demo.texts import continued

TOKENIZER = Tokenizer.builtin()


@pytest.mark.parametrize("kind", KINDS)
def test_there_are_enough_attempts_of_held_out_stories(kind):
    planted = planted_attempts(kind)
    held_out = set(stories("test"))
    assert len(planted) == COUNT >= 100 and all(one.asked in held_out for one in planted)


def test_each_kind_is_wrong_where_its_name_says():
    for one in planted_attempts("misconception"):
        assert wrong_day(one.asked, one.attempt) == one.line == DAYS[one.asked.trap]
        assert one.number == counts(one.asked)[one.asked.trap]
    for one in planted_attempts("right"):
        assert final_answer(one.attempt) == problem_of(one.asked).answer
        assert one.line is None and one.number is None
    for one in planted_attempts("slip_before"):
        first = wrong_day(one.asked, one.attempt)
        assert DAYS.index(first) < DAYS.index(one.line) == one.asked.trap
        assert one.number != counts(one.asked)[one.asked.trap]
        wrong = 0
        for before, sign, amount, after in re.findall(r"(\d+) ([-+]) (\d+) = (\d+)\.", one.attempt):
            wrong += int(before) + int(sign + amount) != int(after)
        assert wrong == 1  # one sum is wrong, and the lines after it go on from there
        assert f"{one.line}" in one.attempt and f": {one.number} " in one.attempt
    for one in planted_attempts("other_story"):
        assert one.asked.trap is None and re.search("a friend|pairs", one.attempt)


def test_what_a_reflection_names_and_takes_up_is_read_from_its_words():
    for one in planted_attempts("misconception"):
        reason = f"\n\nHmm, I was too quick there: look at {one.line}.\n\n"
        assert named_day(reason + continued(one.asked)) == one.line
        assert continued_from(reason + continued(one.asked)) == one.number
    assert named_day("On Monday each line fits.") is None
    assert continued_from("Each line fits.") is None


def say(replies, end=(TOKENIZER.special["<|end|>"],)):
    """A generate that goes on from each prompt with what `replies` has for it."""

    def generate(model, prompts, *, max_tokens, stop, temperature, rows):
        return [TOKENIZER.encode(reply) + [*end] for reply in replies]

    return generate


def test_the_shares_count_what_the_model_did(monkeypatch):
    planted = planted_attempts("misconception", 4)
    full = [f"\n\nWait: look at {one.line}.\n\n{continued(one.asked)}" for one in planted]
    elsewhere = next(day for day in DAYS if day != planted[1].line)
    replies = [
        full[0],
        full[1].replace(f"look at {planted[1].line}", f"look at {elsewhere}"),
        "",
        "\n\nIt rained a lot.",
    ]
    monkeypatch.setattr(demo.planted, "generate", say(replies))
    model = new_model(dict(RECIPE, seed=0), TOKENIZER.vocab_size)
    found = outcome(model, TOKENIZER, planted, 100)
    assert found == {
        "goes_on": 0.5,
        "names_line": 0.5,
        "accuracy": 0.5,
        "takes_over": 1.0,
        "attempts": 4,
    }
    monkeypatch.setattr(demo.planted, "generate", say(full, end=()))
    assert outcome(model, TOKENIZER, planted, 100)["accuracy"] == 0  # unfinished
    monkeypatch.setattr(demo.planted, "generate", say([""] * 4))
    right = outcome(model, TOKENIZER, planted_attempts("right", 4), 100)
    assert right["goes_on"] == 0 and right["accuracy"] == 1
    assert right["names_line"] is None and right["takes_over"] is None


def test_a_reflection_names_the_line_only_if_it_is_the_wrong_one():
    one, other = planted_attempts("misconception", 2)
    problem = problem_of(one.asked)
    good = f"{one.attempt}\n\nWait: look at {one.line}.\n\n{continued(one.asked)}"
    elsewhere = next(day for day in DAYS if day != one.line)
    bad = good.replace(f"look at {one.line}", f"look at {elsewhere}")
    on_right = f"{worked_out(one.asked)}\n\nWait: look at {one.line}.\n\n{continued(one.asked)}"
    assert names_line([(problem, good, True)]) == 1
    assert names_line([(problem, good, True), (problem, bad, True)]) == 0.5
    assert names_line([(problem, on_right, True)]) == 0
    assert names_line([(problem, one.attempt, True)]) is None
