"""The demonstration's base model: what its name depends on, the gate, the one that is shipped."""

import hashlib
import itertools
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import demo.base
from data import wordproblems
from data.tokenizer import Tokenizer
from demo.base import (
    FLOOR,
    GATE,
    LEAK,
    RECIPE,
    SHIPPED,
    VERSION,
    Setup,
    base_model,
    floors,
    gate,
    recipe_key,
    shipped_key,
)
from demo.pretraining import steps_of_rows
from model import LM
from run.config import DEMO, Config, RunFailed
from thinktuning import evaluate, main, train
from tools.ship_base import first_losses

RECIPE0 = dict(RECIPE, seed=0, floor=FLOOR)
TOKENIZER = Tokenizer.builtin()


def setup_in(directory):
    return Setup(train, evaluate, TOKENIZER, Config(**DEMO), RECIPE0, directory, directory, False)


def test_the_texts_that_make_the_base_are_those_of_its_version():
    """Another hash means other texts: raise demo.base.VERSION and ship the base model anew."""
    steps = itertools.islice(steps_of_rows(RECIPE0, "pretraining 0 0", TOKENIZER), 5)
    digest = hashlib.sha256(json.dumps(list(steps)).encode()).hexdigest()[:16]
    assert (VERSION, digest) == (3, TEXTS)


TEXTS = "2d440da4bbc5882f"


def test_the_shipped_base_is_of_the_present_recipe_and_small():
    assert shipped_key() == recipe_key(RECIPE0)
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 2_000_000


def test_the_first_steps_of_pretraining_are_those_that_made_the_shipped_base():
    """Another loss means another training: raise demo.base.VERSION and ship the base anew."""
    stored = json.loads((SHIPPED / "recipe.json").read_text())["first_losses"]
    assert first_losses(RECIPE0, TOKENIZER) == pytest.approx(stored, rel=1e-3)  # machines round
    other = first_losses(dict(RECIPE0, muon_rate=0.021), TOKENIZER, 12)
    assert other != pytest.approx(stored[:12], rel=1e-3)


def test_the_shipped_base_passes_the_gate(tmp_path):
    scores = gate(setup_in(tmp_path), LM.load(SHIPPED), count=100)
    assert all(scores[name] >= least for name, least in GATE.items())
    assert scores["leak"] <= LEAK
    assert FLOOR / 2.5 < scores["floor"] < FLOOR  # see docs/base-model.md


def test_seed_0_takes_the_shipped_base_and_nothing_is_pretrained(tmp_path, capsys):
    base = base_model(setup_in(tmp_path))
    shipped = LM.load(SHIPPED).state_dict()
    assert all(torch.equal(x, shipped[name]) for name, x in base.state_dict().items())
    assert not list(tmp_path.iterdir())
    assert str(SHIPPED) in capsys.readouterr().out


def test_a_damaged_base_is_named_with_what_helps(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.base, "shipped_key", lambda: None)
    setup = setup_in(tmp_path)
    path = demo.base.base_path(tmp_path, setup.recipe)
    shutil.copytree(SHIPPED, path)
    os.truncate(path / "model.safetensors", 1000)
    with pytest.raises(RunFailed, match=re.escape(f"); delete {path}")):
        base_model(setup)
    monkeypatch.setattr(demo.base, "SHIPPED", path)
    monkeypatch.setattr(demo.base, "shipped_key", lambda: recipe_key(setup.recipe))
    with pytest.raises(RunFailed, match=re.escape(f"); restore {path}")):
        base_model(setup)


def test_a_base_is_made_once_for_each_floor_and_anew_from_scratch(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        demo.base, "pretrain_until_good", lambda setup: made.append(setup) or LM.load(SHIPPED)
    )
    first = replace(setup_in(tmp_path), recipe=dict(RECIPE0, seed=1))
    fresh, cached = base_model(first).state_dict(), base_model(first).state_dict()
    assert made == [first]
    assert all(torch.equal(x, cached[name]) for name, x in fresh.items())
    scratch = replace(first, from_scratch=True)
    base_model(scratch)
    base_model(replace(setup_in(tmp_path), from_scratch=True))  # the shipped one is not taken
    other = replace(first, recipe=dict(RECIPE0, seed=1, floor=0.0))
    base_model(other)
    assert made[1] == scratch and len(made) == 4
    assert len(list(tmp_path.glob("base-*"))) == 3


def test_the_flags_reach_the_base_model(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("demo.command.demonstrate", lambda setup, page: seen.append(setup))
    assert main(["--out", str(tmp_path)]) == 0
    assert main(["--out", str(tmp_path), "--from-scratch", "--floor", "0"]) == 0
    assert [setup.from_scratch for setup in seen] == [False, True]
    assert [setup.recipe["floor"] for setup in seen] == [FLOOR, 0]


def test_a_quick_run_takes_the_shipped_base_or_pretrains_for_a_few_steps(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        demo.base, "pretrain_until_good", lambda setup: made.append(setup) or LM.load(SHIPPED)
    )
    quick = replace(setup_in(tmp_path), quick=True)
    base_model(quick)
    assert not made
    base_model(replace(quick, from_scratch=True))
    other = dict(RECIPE0, transcripts=0)  # as an ablation's
    for _ in range(2):
        base_model(replace(quick, recipe=other))
    assert [setup.recipe for setup in made] == [dict(RECIPE0, steps=10), dict(other, steps=10)]


def test_the_floors_are_mean_probabilities_of_a_blank_line_after_attempts():
    base = LM.load(SHIPPED)
    told = [story for story in wordproblems.stories("validation", 20) if story.trap is not None]
    tag = TOKENIZER.special["<|question|>"], TOKENIZER.special["<|student|>"]
    blank_line = TOKENIZER.encode("\n\n")[0]
    records, expected, reflections = [], {True: [], False: []}, []
    for i, story in enumerate(told[:5]):
        right = i > 2
        problem, text = wordproblems.problem_of(story), wordproblems.worked_out(story, not right)
        ids = [tag[0], *TOKENIZER.encode(problem.question), tag[1], *TOKENIZER.encode(text)]
        probabilities = base(torch.tensor([ids]))[0, -1].softmax(-1)
        expected[right].append(probabilities[blank_line].item())
        after = base(torch.tensor([[*ids, blank_line]]))[0, -1].softmax(-1)
        words = [after[TOKENIZER.encode(word)[0]].item() for word in ("Wait", "Hmm", "Yes", "My")]
        reflections += [] if right else [expected[right][-1] * sum(words)]
        records.append((problem, text, True))
    found = floors(base, TOKENIZER, records)
    assert found["floor"] == pytest.approx(sum(expected[True] + expected[False]) / 5)
    assert found["floor_wrong"] == pytest.approx(sum(expected[False]) / 3)
    assert found["floor_right"] == pytest.approx(sum(expected[True]) / 2)
    assert found["begins_reflection"] == pytest.approx(sum(reflections) / 3)
    assert floors(base, TOKENIZER, records[:2])["floor_right"] is None


def test_a_base_models_name_changes_with_everything_that_makes_it(monkeypatch, tmp_path):
    names = {
        recipe_key(RECIPE0),
        recipe_key(dict(RECIPE0, seed=1)),
        recipe_key(dict(RECIPE0, floor=0.0)),
    }
    monkeypatch.setattr(demo.base, "VERSION", VERSION + 1)
    names.add(recipe_key(RECIPE0))
    here = demo.base.base_path(tmp_path, RECIPE0)
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert demo.base.base_path(tmp_path, RECIPE0) != here
    monkeypatch.setattr(wordproblems, "__file__", "other.py")
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"another vocabulary")
    names.add(recipe_key(RECIPE0))
    assert len(names) == 5


def test_a_base_that_reflects_by_itself_goes_round_again(tmp_path, monkeypatch, capsys):
    good = dict(student=0.4, teacher=0.95, opinion=1.0, floor=0.005)
    found = iter([dict(good, leak=2e-4), dict(good, leak=5e-5)])
    monkeypatch.setattr(demo.base, "gate", lambda *_: next(found))
    rounds = []
    monkeypatch.setattr(demo.base, "pretrain", lambda *options: rounds.append(options) or "a model")
    assert demo.base.pretrain_until_good(setup_in(tmp_path)) == "a model"
    assert [cycle for _, _, cycle, _ in rounds] == [0, 1]
    assert "begins a reflection after a wrong one with 2.0e-04" in capsys.readouterr().out


def test_a_base_below_the_gate_goes_round_again_and_then_fails_loudly(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(RECIPE, "steps", 2)
    monkeypatch.setattr(demo.base, "gate", lambda setup, base, count: gate(setup, base, 20))
    assert main(["--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("validation:") == demo.base.CYCLES
    assert "under the teacher prompt" in printed.err
    assert "begins a reflection" in printed.err
    assert not list(tmp_path.glob("base-*"))
