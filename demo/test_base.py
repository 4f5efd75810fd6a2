"""The demonstration's base model: what it reads, what its name depends on, the gate that it must pass."""

import hashlib
import json
import random
import re
from pathlib import Path

import pytest
import torch

import demo.base
from data import wordproblems
from data.tokenizer import Tokenizer
from thinktuning import main


def short_recipe():
    return dict(demo.base.RECIPE, seed=0, floor=demo.base.FLOOR, steps=5)


def test_everything_the_base_model_reads_is_about_training_problems(monkeypatch):
    splits = set()
    make_story = wordproblems.make_story
    monkeypatch.setattr(
        wordproblems,
        "make_story",
        lambda rng, n, split: splits.add(split) or make_story(rng, n, split),
    )
    demo.base.rows_of_step(
        dict(demo.base.RECIPE, floor=0.5), 0, random.Random(0), Tokenizer.builtin()
    )
    assert splits == {"train"}


def test_the_texts_that_make_the_base_are_those_of_its_version():
    """Another hash means other texts: raise demo.base.VERSION, or cached base models stay as they were."""
    rng, digest = random.Random("pretraining 0 0"), hashlib.sha256()
    for step in range(5):
        digest.update(
            json.dumps(
                demo.base.rows_of_step(short_recipe(), step, rng, Tokenizer.builtin())
            ).encode()
        )
    assert (demo.base.VERSION, digest.hexdigest()[:16]) == (1, "b3457f4742c82483")


WEIGHTS_AFTER_FIVE_STEPS = {
    ("2.13.0", "AuthenticAMD", "AVX2"): "a43ce74e1a525eb0"
}  # (torch, processor, its instructions): hash


def test_the_weights_of_the_base_are_those_of_its_version():
    """Another hash means another training: raise demo.base.VERSION, or cached base models stay as they were."""
    cpu = Path("/proc/cpuinfo")
    vendor = re.search(r"vendor_id\s*: (\S+)", cpu.read_text() if cpu.exists() else "")
    kind = (
        torch.__version__.partition("+")[0],
        vendor and vendor[1],
        torch.backends.cpu.get_cpu_capability(),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = demo.base.pretrain(short_recipe(), Tokenizer.builtin())
    torch.set_num_threads(threads)
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    if kind not in WEIGHTS_AFTER_FIVE_STEPS:
        pytest.skip(
            f"no hash is stored for {kind}, which may round differently; here it is {digest.hexdigest()[:16]}"
        )
    assert (demo.base.VERSION, digest.hexdigest()[:16]) == (1, WEIGHTS_AFTER_FIVE_STEPS[kind])


def test_a_base_models_name_changes_with_everything_that_makes_it(monkeypatch):
    recipe = short_recipe()
    names = {
        demo.base.recipe_key(recipe),
        demo.base.recipe_key(dict(recipe, seed=1)),
        demo.base.recipe_key(dict(recipe, floor=0.0)),
    }
    monkeypatch.setattr(demo.base, "VERSION", demo.base.VERSION + 1)
    names.add(demo.base.recipe_key(recipe))
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    names.add(demo.base.recipe_key(recipe))
    monkeypatch.setattr(wordproblems, "__file__", "other.py")
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"another vocabulary")
    names.add(demo.base.recipe_key(recipe))
    assert len(names) == 6


def test_a_base_below_the_gate_goes_round_again_and_then_fails_loudly(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(demo.base.RECIPE, "steps", 2)
    assert main(["--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert (
        printed.out.count("validation:") == demo.base.CYCLES
        and "under the teacher prompt" in printed.err
    )
    assert not list(tmp_path.glob("base-*"))
