"""The experiment from end to end on a random model of two layers, and what its texts say."""

import json
import random
import re
import shutil
from collections import Counter

import pytest
import torch

from data.reward import final_answer
from data.tokenizer import Tokenizer
from data.wordproblems import DAYS, counts, question, wrong_day
from examples.smollm2 import examine, prepare
from examples.smollm2.stories import attempt, reply, some_attempt, stories, story
from model import LM, ModelConfig
from teacher import parse_feedback
from thinktuning import main

TOKENIZER = Tokenizer.builtin()


@pytest.fixture
def random_model(tmp_path):
    torch.manual_seed(0)
    sizes = TOKENIZER.vocab_size, 32, 2, 2, 2, 16, 64
    LM(ModelConfig(*sizes, max_seq_len=512)).save(tmp_path / "model", TOKENIZER)
    return tmp_path / "model"


def test_the_commands_of_the_readme_on_a_random_model(random_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "MAX_TOKENS", 30)
    monkeypatch.setattr(examine, "MAX_TOKENS", 30)
    out = tmp_path / "out"
    assert prepare.main([str(random_model), "--out", str(out), "--steps", "2"]) == 0
    made = (out / "student/model.safetensors").stat().st_mtime_ns
    assert prepare.main([str(random_model), "--out", str(out), "--steps", "2"]) == 0
    assert (out / "student/model.safetensors").stat().st_mtime_ns == made  # not made again
    student, teacher = (LM.load(out / name).embed.weight for name in ("student", "teacher"))
    before = LM.load(random_model).embed.weight
    assert not torch.equal(student, before) and not torch.equal(student, teacher)
    flags = ["--model", out / "student", "--teacher", out / "teacher", "--no-exemplars"]
    flags += ["--data", out / "train.jsonl", "--out", out / "thinktuning", "--steps", 2]
    flags += ["--questions", 2, "--samples", 2, "--max-tokens", 30, "--teacher-reply", 30]
    assert main(["train", *map(str, flags)]) == 0
    models = [str(out / name) for name in ("student", "thinktuning/model")]
    assert examine.main([*models, "--out", str(out), "--count", "10", "--samples", "2"]) == 0
    scores = json.loads((out / "scores.json").read_text())
    assert scores.keys() == set(models)
    for found in scores.values():
        assert found["greedy"]["responses"] == 10 and 0 < found["greedy"]["goes_on"] <= 1
        assert found["sampled"]["responses"] == 20
        assert found["planted, right"]["attempts"] == 10
    assert f"{models[1]}\n  greedy, with a friend: accuracy" in capsys.readouterr().out


def test_a_teacher_below_the_gate_is_kept_and_a_stopped_one_goes_on(
    random_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(prepare, "MAX_TOKENS", 10)
    monkeypatch.setattr(prepare, "TEACHER_STEPS", 1)
    monkeypatch.setattr(prepare, "student_attempts", lambda *_: [])
    monkeypatch.setattr(prepare, "teacher_scores", lambda *_: (0.9, 0.84))
    out, argv = tmp_path / "out", [str(random_model), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(prepare, "train_student", lambda model, *_: model)
    assert prepare.main(argv) == 1
    told = capsys.readouterr()
    assert f"rename {out / 'teacher-round-3'} to {out / 'teacher'}" in told.err
    assert told.out.count("the teacher, round") == 3 and not (out / "teacher").exists()
    first, second = (LM.load(out / f"teacher-round-{i}").embed.weight for i in (1, 2))
    assert not torch.equal(first, second)
    shutil.rmtree(out / "teacher-round-3")  # as if the third round had been stopped
    monkeypatch.setattr(prepare, "teacher_scores", lambda *_: (0.9, 0.85))
    assert prepare.main(argv) == 0
    assert capsys.readouterr().out.count("the teacher, round") == 1
    assert (out / "teacher/model.safetensors").exists()


@pytest.mark.parametrize("seed", range(200))
def test_an_attempt_is_wrong_where_it_says_so_and_the_reply_names_that_day(seed):
    rng = random.Random(seed)
    told = story(rng, "train")
    tried = some_attempt(rng, told)
    truth = str(counts(told)[-1])
    feedback = parse_feedback(reply(rng, told, tried.wrong))
    assert final_answer(feedback.phrase) == truth
    if tried.wrong is None:
        assert wrong_day(told, tried.text) is None and final_answer(tried.text) == truth
        assert feedback.opinion == "correct" and "look at" not in feedback.reason
    else:
        assert wrong_day(told, tried.text) == DAYS[tried.wrong]
        assert feedback.opinion == "incorrect"
        assert feedback.reason.endswith(f"look at {DAYS[tried.wrong]}.")


def test_lines_repeat_the_story_and_show_how_the_count_changes():
    rng = random.Random(0)
    while not (told := story(rng, "train")).trap:
        pass
    right, mistaken = attempt(told), attempt(told, mistaken=True)
    sentences = question(told).split(". ")[1:-1]
    for said in (right.text, mistaken.text):
        assert all(f"{sentence}: " in said for sentence in sentences)
    assert "still" in right.text and right.wrong is None
    assert "still" not in mistaken.text and mistaken.wrong == told.trap


def test_the_teacher_reads_every_kind_of_mistake_and_counts_stay_above_0():
    rng, kinds = random.Random(0), Counter()
    for _ in range(500):
        told = story(rng, "train")
        tried = some_attempt(rng, told)
        assert "-" not in re.sub(r"\d - \d", "", tried.text) and "= 0." not in tried.text
        if told.trap is not None and tried.wrong == told.trap:
            kinds["told as a friend's" if "a friend" in tried.text else "told as one's own"] += 1
        elif tried.wrong is not None:
            kinds["a wrong sum"] += 1
        else:
            kinds["right"] += 1
    assert len(kinds) == 4 and min(kinds.values()) > 40, kinds


def test_the_student_reads_no_friend_and_no_second_answer():
    torch.manual_seed(0)
    pretrained = LM(ModelConfig(TOKENIZER.vocab_size, 16, 1, 1, 1, 16, 16, max_seq_len=512))
    batches = list(prepare.student_texts(pretrained, TOKENIZER, 10))
    rows = [row for batch in batches for row in batch]
    assert [len(batch) for batch in batches] == [prepare.ROWS] * 10
    going_on = 0
    for i, row in enumerate(rows):
        said = TOKENIZER.decode(row.response)
        assert "friend" not in TOKENIZER.decode(row.prompt) + said and said.count("\\boxed{") == 1
        ends = row.response[-1] == prepare.end_token(TOKENIZER)
        goes_on = not said.removesuffix("<|end|>").endswith("}.")
        assert goes_on <= (i % prepare.GOES_ON == 0) and (ends or goes_on)
        going_on += goes_on
    assert going_on == 8


def test_no_story_is_in_two_splits():
    found = [set(stories(split)) for split in ("train", "validation", "test")]
    assert sum(map(len, found)) == len(set.union(*found))


def test_planted_attempts_are_what_their_kinds_say():
    told = stories("test")
    planted = examine.planted_attempts(list(told.values()))
    assert len(planted["misconception"]) == len(planted["right"]) == 200
    assert len(planted["wrong sum"]) == 100
    for kind, some in planted.items():
        for one in some:
            truth = str(counts(one.asked)[-1])
            assert wrong_day(one.asked, one.attempt) == one.line or "another" in kind
            assert (final_answer(one.attempt) == truth) == (kind == "right") or "another" in kind
            assert ("friend" in question(one.asked)) == (kind in ("misconception", "right"))
    pairs = zip(planted["misconception"], planted["another story’s misconception"], strict=True)
    for own, other in pairs:
        assert own.attempt == other.attempt and own.asked != other.asked
        assert len(own.asked.days) == len(other.asked.days)
