"""Tests of bench.py: that it measures what it says. How fast anything is, no test looks at."""

import json
import time

import pytest
import torch

from grpo import Rollout
from model import LM, ModelConfig
from tools import bench, peers


class Sleeper:
    def outer(self):
        time.sleep(0.02)
        return self.inner() + 1

    def inner(self):
        time.sleep(0.03)
        return 1


def test_nested_functions_are_clocked_once_and_are_themselves_again_afterwards():
    before = Sleeper.outer
    with bench.clocked({"outer": (Sleeper, "outer"), "inner": (Sleeper, "inner")}) as clocks:
        assert Sleeper().outer() == 2
        assert clocks["inner"] == 0.0 and clocks["outer"] >= 0.05
        assert Sleeper().inner() == 1
    assert clocks["inner"] >= 0.03
    assert Sleeper.outer is before


def test_all_passes_leave_the_same_gradients():
    torch.manual_seed(0)
    model = LM(ModelConfig(50, 16, 2, 2, 1, 8, 24, tie_embeddings=True))
    ids = torch.randint(50, (3, 5)).tolist()
    rollouts = [Rollout(prompt, row, True) for prompt, row in zip([[1, 2], [1, 2], [3]], ids)]
    gradients = []
    for run in bench.PASSES.values():
        model.zero_grad(set_to_none=True)
        run(model, rollouts)
        run(model, rollouts)  # onto the gradients that are there
        gradients.append([p.grad.clone() for p in model.parameters()])
    for ours, *others in zip(*gradients, strict=True):
        for other in others:
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)


def test_the_peers_read_the_same_tokens_and_sample_as_many():
    pytest.importorskip("transformers")
    text = " ".join(f"t{token}" for token in [7, 3, 49, 1])
    assert peers.words(50)(text)["input_ids"] == [7, 3, 49, 1]
    model = LM(ModelConfig(50, 16, 2, 2, 1, 8, 24, tie_embeddings=True))
    found = peers.transformers_generate(model, [[7, 3], [49, 4]], length=5)()
    assert found[:, :2].tolist() == [[7, 3], [49, 4]] and found.shape == (2, 7)


def test_trl_and_ours_take_turns():
    pytest.importorskip("trl")
    model, calls = LM(ModelConfig(50, 16, 2, 2, 1, 8, 24, tie_embeddings=True)), []
    prompts = [[7, 3], [49, 4]]
    ours, theirs = peers.beside_trl(model, prompts, 4, 5, 2, step=lambda: calls.append(1))
    assert len(calls) == 3 and len(ours) == len(theirs) == 2
    assert max(ours) < min(theirs)


def test_an_unknown_part_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(["--parts", "rollout"])
    assert end.value.code == 2
    assert "choose from rollouts, update" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--base", "nowhere"], "nowhere"),
        (["--json", "/proc/nowhere/x"], "/proc/nowhere/x"),
    ],
)
def test_bad_input_is_told_before_anything_is_measured(flags, said, capsys, monkeypatch):
    monkeypatch.setattr(bench, "Bench", None)
    assert bench.main(flags) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_run_measures_every_part_of_a_shape(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "tiny", bench.shape(512, 32, 1, 2, 1, 64))
    monkeypatch.setattr(bench, "LENGTH", 16)
    monkeypatch.setitem(bench.SAMPLING, "max_tokens", 16)
    monkeypatch.setitem(bench.PROMPTS, "tiny", 2)
    monkeypatch.delitem(bench.PASSES, "compiled")  # it takes longest, and has a test of its own
    threads = torch.get_num_threads()
    path = tmp_path / "bench.json"
    assert (
        bench.main(
            [
                "--shapes",
                "tiny",
                "--repeats",
                "1",
                "--threads",
                "1",
                "--no-startup",
                "--json",
                str(path),
            ]
        )
        == 0
    )
    torch.set_num_threads(threads)
    found = json.loads(path.read_text())
    assert {
        "device",
        "torch",
        "date",
        "threads",
        "bytes_per_second",
        "flops_per_second",
    } <= found.keys()
    assert {r["part"] for r in found["results"]} == set(bench.PARTS)
    # Ours, a prompt a sample, transformers (or that it is not there), no cache.
    assert len([r for r in found["results"] if r["part"] == "rollouts"]) == 4
    assert all(
        r["share_of_floor"] == r["floor_s"] / r["median_s"] > 0
        for r in found["results"]
        if "share_of_floor" in r
    )
    assert "of the floor's speed" in capsys.readouterr().out
