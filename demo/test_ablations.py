"""Ablations: every variant runs, and each does to the feedback what its name says."""

import json
import random

import demo.ablations
from data.reward import final_answer
from teacher import parse_feedback
from thinktuning import main


def test_ablations_run_every_variant(tmp_path, capsys):
    (tmp_path / "summary.json").write_text("the demonstration's table")
    assert main(["--quick", "--out", str(tmp_path), "--ablate", "stress", "--repeats", "2"]) == 0
    assert (tmp_path / "summary.json").read_text() == "the demonstration's table"
    rows = json.loads((tmp_path / "ablate-stress.json").read_text())
    assert rows.keys() == demo.ablations.VARIANTS["stress"].keys() and all(
        len(v) == 2 for v in rows.values()
    )


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
