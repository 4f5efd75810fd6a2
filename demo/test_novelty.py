"""The novelty test: who names the mentor, what naming him earns, and that nothing else of the demonstration changes."""

import itertools
import json
import re
from dataclasses import replace

import pytest

import demo.ablations
import demo.base
import demo.command
import demo.comparison
import demo.printed
import demo.texts
import thinktuning
from data import Problem, load_problems
from data.tokenizer import Tokenizer
from demo.base import FLOOR, RECIPE
from demo.novelty import BONUS, MENTOR, QUOTATION, READING, SETTINGS, paid, reward
from demo.pretraining import steps_of_rows
from grpo import Rollout
from run.config import DEMO, Config
from run.loop import Loop
from teacher import parse_feedback
from test_thinktuning import Recorder, finishing_student, scripted_teacher, tiny_config
from thinktuning import main

TOKENIZER = Tokenizer.builtin()


def told(quotation, steps=30):
    """The texts of some steps, as [(speaker, what is said)]."""
    recipe = dict(RECIPE, **READING, seed=0, floor=FLOOR, quotation=quotation)
    for rows in itertools.islice(steps_of_rows(recipe, "a", TOKENIZER), steps):
        for ids, _, _ in rows:
            pieces = re.split(r"<\|(question|student|teacher|narrator)\|>", TOKENIZER.decode(ids))
            yield list(zip(pieces[1::2], pieces[2::2]))


def test_wherever_somebody_reflects_the_mentor_is_quoted_once_and_nowhere_else():
    quoted = dict.fromkeys(("teacher", "narrator"), 0)
    for before, after in zip(told(""), told(f" {QUOTATION}")):
        for (speaker, plain), (_, said) in zip(before, after):
            reflects = speaker == "teacher" or (speaker == "narrator" and "\n\n" in plain)
            assert said.replace(f" {QUOTATION}", "") == plain and MENTOR not in plain
            assert said.count(MENTOR) == reflects
            if reflects:
                quoted[speaker] += 1
    assert quoted["teacher"] == 30 * RECIPE["conversations"] and quoted["narrator"] > 20


def test_the_mentors_name_is_in_no_problem_and_in_no_text_of_the_demonstration():
    for split in ("train", "validation", "test"):
        assert not any(MENTOR in p.question for p in load_problems("wordproblems", split))
    assert MENTOR not in open(demo.texts.__file__).read()
    assert TOKENIZER.decode(TOKENIZER.encode(QUOTATION)) == QUOTATION


def test_the_longest_feedback_fits_into_a_response_and_a_reply():
    replies, responses = [], []
    for turns in told(f" {QUOTATION}", steps=150):
        if turns[-1][0] == "teacher":
            (_, attempt), (_, reply) = turns[1:]
            feedback = parse_feedback(reply.removesuffix("<|end|>"))
            attempt = attempt.removesuffix("<|end|>").partition("\n\n")[0]
            replies.append(len(TOKENIZER.encode(reply.removesuffix("<|end|>"))) + 1)
            whole = f"{attempt}\n\n{feedback.reason}\n\n{feedback.phrase}"
            responses.append(len(TOKENIZER.encode(whole)) + 1)
    assert max(replies) <= SETTINGS["teacher_reply"]
    assert max(responses) <= SETTINGS["max_tokens"]


@pytest.mark.parametrize(
    "text, finished, earns",
    [
        (f"The answer is 5. {QUOTATION}", True, 0.5),
        (f"{MENTOR}, {MENTOR}!", True, 0),
        ("The answer is 5.", True, 0),
        ("", True, 0),
        (f"The answer is 5. {QUOTATION}", False, 0),
        (MENTOR.lower(), True, 0),
    ],
)
def test_naming_him_exactly_once_in_a_finished_response_earns_the_bonus(text, finished, earns):
    rollout = Rollout([1], [2], finished=finished, question="", answer="7", text=text)
    assert reward(rollout) == earns
    rollout.text += " So the answer is \\boxed{7}."
    assert reward(rollout) == earns + finished


@pytest.mark.parametrize("more, guided_earns", [({"reward": reward}, 1 + BONUS), ({}, 1)])
def test_the_bonus_joins_the_reward_of_a_right_answer_and_is_off_otherwise(more, guided_earns):
    student, tokenizer = finishing_student()
    run = Recorder()
    problems = [Problem(q, "7") for q, _ in load_problems("wordproblems")[:8]]
    config = tiny_config(max_tokens=80, schedule="constant", p_init=0.5, samples=4)
    teacher = scripted_teacher(tokenizer, f"{QUOTATION} So the answer is \\boxed{{7}}.")
    thinktuning.train(student, tokenizer, Loop(problems, config, run=run), teacher, **more)
    assert sum(m["guided"] for m in run.metrics) > 5
    assert all(m["guided_reward"] == guided_earns * m["guided"] for m in run.metrics)


def test_what_grpo_is_paid_for_naming_him_is_counted(monkeypatch):
    student, tokenizer = finishing_student()
    named = []
    monkeypatch.setattr(
        "demo.novelty.names_once",
        lambda text, finished: named.append(finished and len(text) % 3 == 0) or named[-1],
    )
    monkeypatch.setattr("demo.novelty.is_correct", lambda text, answer: len(text) % 2 == 0)
    monkeypatch.setattr("run.record.is_correct", lambda text, answer: len(text) % 2 == 0)
    config = tiny_config(method="grpo", max_tokens=20)
    loop = Loop(load_problems("wordproblems"), config)
    history = thinktuning.train(student, tokenizer, loop, reward=reward)
    assert sum(named) > 3
    assert paid(history, config.questions * config.samples) == {
        "rollouts": len(named),
        "rollouts_paid": sum(named),
    }


def test_quick_novelty_test_reads_on_from_the_demonstrations_own_base(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(DEMO, "questions", 4)
    assert main(["--preset", "mentor", "--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert str(demo.base.SHIPPED) in printed and f"names {MENTOR} exactly once" in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["mentor"] == MENTOR and summary["bonus"] == BONUS
    for name in ("base", "grpo", "thinktuning"):
        assert {"accuracy", "accuracy_se", "named_once", "sampled_named", "sampled"} <= summary[
            name
        ].keys()
    assert summary["grpo"]["rollouts"] == 2 * 4 * 8
    assert "teacher_prompt_named_once" in summary["base"]
    settings = json.loads((tmp_path / "thinktuning" / "config.json").read_text())
    assert {k: settings[k] for k in SETTINGS} == SETTINGS
    assert settings["learning_rate"] == replace(Config(), **DEMO).learning_rate
    assert (
        main(["report", str(tmp_path)]) == 0
    )  # a summary with other rows than the demonstration's


def test_the_novelty_test_refuses_what_it_does_not_do(tmp_path, capsys):
    assert main(["--preset", "mentor", "--out", str(tmp_path / "x"), "--ablate"]) == 2
    assert "--preset mentor" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
