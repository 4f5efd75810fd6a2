"""The probe: its attempts are wrong where they say, and what a model does is counted rightly."""

import json
import re
from pathlib import Path

import pytest

import tools.probe
from data.reward import final_answer
from data.tokenizer import Tokenizer
from data.wordproblems import DAYS, counts, problem_of, split_of, stories, worked_out
from demo.base import SHIPPED
from demo.texts import continued
from model import LM
from tools.probe import TWO_FRIENDS, Attempt, main, outcome, own_attempts, probe, two_friends

TOKENIZER = Tokenizer.builtin()


@pytest.mark.parametrize("name", TWO_FRIENDS)
def test_two_lines_are_a_friends_and_wrong_where_the_name_says(name):
    for one in two_friends(TWO_FRIENDS[name], 30):
        story = one.asked
        friends = [day for day, told in zip(DAYS, story.days) if told.kind == "friend"]
        assert len(friends) == 2 and len(story.days) in (3, 4) and split_of(story) == "test"
        assert problem_of(story).question.count("a friend") == 2
        lines = re.findall(r"(\w+day)(, a friend)?: (still )?([^.]*)\.", one.text)
        assert [day for day, friend, *_ in lines if friend] == friends
        handled = ["right" if still else "wrong" for _, friend, still, _ in lines if friend]
        assert ", ".join(handled) == name
        assert one.wrong == [day for day, how in zip(friends, handled) if how == "wrong"]
        assert one.right == [day for day, how in zip(friends, handled) if how == "right"]
        value = story.start
        for told, (_, _, still, work) in zip(story.days, lines):
            before, *rest = map(int, re.findall(r"\d+", work))
            assert before == value
            if not still:
                assert rest == [told.amount, value + int(told.sign + "1") * told.amount]
                value = rest[-1]
        assert final_answer(one.text) == str(value)
        assert (value == counts(story)[-1]) or one.wrong


def test_own_attempts_are_wrong_or_right_and_know_the_wrong_line():
    told = [story for story in stories("test") if story.trap is not None][:2]
    texts = worked_out(told[0], mistaken=True), worked_out(told[1])
    records = [(problem_of(story), text, True) for story, text in zip(told, texts)]
    found = own_attempts(told, records)
    assert found["wrong"] == [Attempt(told[0], texts[0], [DAYS[told[0].trap]], [])]
    assert found["right"] == [Attempt(told[1], texts[1], [], [])]


def test_the_shares_count_what_stands_behind_the_forced_words(monkeypatch):
    story = next(story for story in stories("test") if story.trap == 0 and len(story.days) > 2)
    text = worked_out(story, mistaken=True)
    reason = ", that does not fit the story: look at {}."
    rest = f"\n\n{continued(story)}"
    replies = [reason.format("Monday") + rest, reason.format("Tuesday") + rest]
    replies += [reason.format("Friday"), ""]
    asked = []

    def say(model, prompts, **options):
        asked.extend(prompts)
        return [TOKENIZER.encode(reply) + [TOKENIZER.special["<|end|>"]] for reply in replies]

    monkeypatch.setattr(tools.probe, "generate", say)
    attempts = [Attempt(story, text, ["Monday"], ["Tuesday"])] * 4
    found = outcome(None, TOKENIZER, attempts, "\n\nWait", "narrator")
    assert found == {
        "reflects": 0.5,
        "names_wrong": 0.25,
        "names_right": 0.25,
        "names_other": 0.25,
        "accuracy": 0.5,
        "attempts": 4,
    }
    question = problem_of(story).question
    whole = f"<|question|>{question}<|narrator|>{text}\n\nWait"
    assert TOKENIZER.decode(asked[0]) == whole
    assert asked[0][-2:] == [*TOKENIZER.encode("\n\n"), *TOKENIZER.encode("Wait")]
    unended = [TOKENIZER.encode(replies[0])] * 4
    monkeypatch.setattr(tools.probe, "generate", lambda *_, **__: unended)
    assert outcome(None, TOKENIZER, attempts)["accuracy"] == 0


def test_the_shipped_base_reflects_as_the_narrator_and_not_as_the_student():
    base = LM.load(SHIPPED)
    found = probe(dict.fromkeys(("base", "grpo", "thinktuning"), base), TOKENIZER, 6)
    wrong, right = found["forced"]["wrong"], found["forced"]["right"]
    assert wrong["base"]["reflects"] == wrong["base, blank line"]["reflects"] == 0
    assert wrong["base as narrator"]["reflects"] == 1 > right["base as narrator"]["reflects"]
    assert wrong["base"] == wrong["ThinkTuning"] and wrong["base"]["accuracy"] == 0
    assert found["two_friends"].keys() == TWO_FRIENDS.keys()
    assert {"pass@8", "maj@8"} <= found["samples"]["grpo"].keys()
    assert json.loads(json.dumps(found)) == found


def test_a_directory_without_a_run_is_refused():
    with pytest.raises((ValueError, OSError), match="summary.json"):
        main(Path("nowhere"))
