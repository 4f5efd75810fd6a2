"""Ablations: every variant runs, and each does to the feedback what its name says."""

import json
import random
from types import SimpleNamespace

import pytest

import demo.ablations
import demo.base
from data.reward import final_answer
from data.tokenizer import Tokenizer
from demo.ablations import settings_of
from demo.base import FLOOR, SHIPPED, recipe_of
from demo.pretraining import steps_of_rows
from model import LM
from run.config import DEMO, Config
from teacher import parse_feedback
from thinktuning import main


@pytest.fixture
def trained(monkeypatch):
    """Every base model is the shipped one: a quick one's responses are long and say nothing."""
    monkeypatch.setitem(DEMO, "questions", 2)
    monkeypatch.setattr(demo.base, "pretrain_until_good", lambda setup: LM.load(SHIPPED))


def test_ablations_run_every_variant(trained, tmp_path):
    (tmp_path / "summary.json").write_text("the demonstration's table")
    assert main(["--quick", "--out", str(tmp_path), "--ablate", "stress", "--repeats", "1"]) == 0
    assert (tmp_path / "summary.json").read_text() == "the demonstration's table"
    rows = json.loads((tmp_path / "ablate-stress.json").read_text())
    assert rows.keys() == demo.ablations.VARIANTS["stress"].keys()
    assert all(len(outcomes) == 1 for outcomes in rows.values())


def test_controls_run_one_after_the_other_and_say_when_they_take_off(
    trained, tmp_path, capsys, monkeypatch
):
    names = ("ThinkTuning", "supervised, guided as in RL", "guidance begins anew")
    names += ("GRPO", "GRPO, as many tokens")
    variants = {name: demo.ablations.VARIANTS["all"][name] for name in names}
    monkeypatch.setitem(demo.ablations.VARIANTS, "all", variants)
    shares = []
    monkeypatch.setattr(
        "demo.ablations.train_supervised", lambda base, *rest: (base, shares.append(rest[-1]) or [])
    )
    assert main(["--quick", "--out", str(tmp_path), "--ablate", "--repeats", "1"]) == 0
    rows = json.loads((tmp_path / "ablate-all.json").read_text())
    assert shares == [DEMO["samples"]]
    assert tuple(rows) == names and len(list(tmp_path.glob("base-*"))) == 1
    for (outcome,) in rows.values():
        assert {"reflection_rate_first_right", "names_line", "generated_tokens"} <= outcome.keys()
        assert outcome["take_off"] is None or 0 <= outcome["take_off"] < outcome["steps"]
    assert "takes off at" in capsys.readouterr().out


def test_without_a_narrator_a_step_reads_conversations_only():
    tokenizer = Tokenizer.builtin()
    found = {}
    for name, variant in demo.ablations.VARIANTS["narrator"].items():
        recipe = {**recipe_of(0, FLOOR), **variant.texts}
        rows = next(steps_of_rows(recipe, "a seed", tokenizer))
        tags = [tokenizer.special[f"<|{role}|>"] for role in ("narrator", "student")]
        found[name] = [sum(tag in ids for ids, _, _ in rows) for tag in tags]
        assert sum(found[name]) == len(rows)  # each text has one of the two
    assert found.pop("ThinkTuning") == [5, 8]
    assert found.pop("no narrator, fewer texts") == [0, 8]
    assert found and all(counts == [0, 13] for counts in found.values())


def test_each_repeat_has_another_seed_and_the_same_base(trained, tmp_path, monkeypatch):
    variants = {"GRPO": demo.ablations.VARIANTS["all"]["GRPO"]}
    monkeypatch.setitem(demo.ablations.VARIANTS, "long", variants)
    options = ["--quick", "--out", str(tmp_path), "--ablate", "long", "--repeats", "2"]
    assert main(options) == 0
    rows = json.loads((tmp_path / "ablate-long.json").read_text())
    assert [outcome["seed"] for outcome in rows["GRPO"]] == [0, 1000]
    assert not list(tmp_path.glob("base-*"))  # the shipped one both times


def test_grpo_gets_as_many_steps_as_thinktunings_tokens_are_worth():
    variant = demo.ablations.VARIANTS["all"]["GRPO, as many tokens"]
    setup = SimpleNamespace(config=Config(**DEMO), quick=False)
    rows = {"ThinkTuning": [{"generated_tokens": 900}], "GRPO": [{"generated_tokens": 600}]}
    assert settings_of(setup, variant, rows, 0).steps == 1.5 * DEMO["steps"]
    assert settings_of(setup, variant, rows, 0).method == "grpo"


def test_a_content_teacher_confirms_the_attempts_own_answer():
    ask = demo.ablations.always_content(None, random.Random(0))
    replies = ask(["q"] * 2, ["So the answer is \\boxed{11}.", "nothing"])
    first, second = map(parse_feedback, replies)
    assert first.opinion == second.opinion == "correct"
    assert final_answer(first.phrase) == "11" and final_answer(second.phrase) == "0"


def test_corrupted_and_shuffled_feedback_do_what_they_say():
    form = "<opinion>correct</opinion><reason>r</reason><phrase>So 1 + 1 = 2. The answer is \\boxed{%d}.</phrase>"
    replies = [form % n for n in range(1, 11)]
    spoilt = demo.ablations.corrupted(1.0)(lambda q, a: replies, random.Random(0))([], [])
    for after, before in zip(map(parse_feedback, spoilt), map(parse_feedback, replies)):
        assert final_answer(after.phrase) != final_answer(before.phrase)
        assert after._replace(phrase="") == before._replace(phrase="")
        assert after.phrase.startswith("So 1 + 1 = 2. The answer is \\boxed{")  # the steps stay
    assert demo.ablations.corrupted(0.0)(lambda q, a: replies, random.Random(0))([], []) == replies
    unparsed = ["", "no tags \\boxed{3}"]
    assert (
        demo.ablations.corrupted(1.0)(lambda q, a: unparsed, random.Random(0))([], []) == unparsed
    )
    moved = demo.ablations.shuffled(lambda q, a: replies, random.Random(0))([], [])
    assert all(a != b for a, b in zip(moved, replies)) and sorted(moved) == sorted(replies)


def test_a_reason_is_taken_away_or_given_to_another_and_the_phrase_stays():
    form = "<opinion>incorrect</opinion><reason>look at {0}.</reason><phrase>It is {0}. Then 3. \\boxed{{{0}}}.</phrase>"
    replies = [form.format(n) for n in range(3)] + ["no reply"]
    cut = demo.ablations.without_reason(lambda q, a: replies, None)([], [])
    found = [parse_feedback(reply) for reply in cut]
    assert found[1] == ("incorrect", "It is 1.", "Then 3. \\boxed{1}.") and found[3] is None
    mixed = demo.ablations.reasons_shuffled(lambda q, a: replies, None)([], [])
    found = [parse_feedback(reply) for reply in mixed]
    assert [one.reason for one in found[:3]] == ["look at 1.", "look at 2.", "look at 2."]
    assert [one.phrase for one in found[:3]] == [parse_feedback(r).phrase for r in replies[:3]]
    assert found[3] is None
