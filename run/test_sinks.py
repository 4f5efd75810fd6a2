"""TensorBoard and Weights & Biases, played by modules of ours: what they are given, by whom, and how often."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from run.record import Run
from run.sinks import scalars
from run.world import World
from test_thinktuning import complaint, model_directory  # noqa: F401 (a fixture)
from thinktuning import main

FLAGS = ["--data", "wordproblems", "--method", "grpo", "--steps", "5", "--questions", "2", "--samples", "2", "--max-tokens", "6",
         "--save-every", "2"]


@pytest.fixture
def opened(monkeypatch):
    """What was opened, in order: with which options, what was logged as (step, key, value), and whether it was closed."""
    sinks, stored = [], {}

    def sink(kind, **options):
        sinks.append(SimpleNamespace(kind=kind, options=options, logged=[], closed=False))
        return sinks[-1]

    class SummaryWriter:
        def __init__(self, log_dir, purge_step=None):
            self.sink = sink("tensorboard", log_dir=log_dir, purge_step=purge_step)

        def add_scalar(self, key, value, step):
            self.sink.logged.append((step, key, value))

        def flush(self):
            pass

        def close(self):
            self.sink.closed = True

    class WandBRun:
        def __init__(self, **options):
            self.sink, self.id = sink("wandb", **options), options["id"]

        @property
        def step(self):
            return stored.get(self.id, 0)

        def log(self, values, step):
            self.sink.logged += [(step, key, value) for key, value in values.items()]
            stored[self.id] = step + 1

        def finish(self):
            self.sink.closed = True

    tensorboard, wandb = ModuleType("torch.utils.tensorboard"), ModuleType("wandb")
    tensorboard.SummaryWriter, wandb.init = SummaryWriter, WandBRun
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return sinks


def train(model, out, *flags):
    assert main(["train", "--model", str(model), "--out", str(out), *FLAGS, *flags]) == 0


def written(out, first=0):
    """(step, key, value) of every number in metrics.jsonl."""
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    return [(m["step"], key, value) for m in lines[first:] for key, value in scalars(m).items()]


def test_both_are_given_the_numbers_of_metrics_jsonl(model_directory, tmp_path, opened):  # noqa: F811
    out = tmp_path / "run"
    train(model_directory, out, "--tensorboard", "--wandb")
    tensorboard, wandb = opened
    assert tensorboard.logged == wandb.logged == written(out) and {s for s, _, _ in wandb.logged} == set(range(5))
    assert ("loss" in {k for _, k, _ in wandb.logged}) and tensorboard.closed and wandb.closed
    assert tensorboard.options["log_dir"] == out / "tensorboard" and wandb.options["name"] == "run"
    assert wandb.options["config"] == json.loads((out / "config.json").read_text())


def test_without_a_flag_nothing_is_opened(model_directory, tmp_path, opened):  # noqa: F811
    train(model_directory, tmp_path / "run")
    train(model_directory, tmp_path / "other", "--tensorboard")
    assert [s.kind for s in opened] == ["tensorboard"]


def test_a_resumed_run_writes_no_step_twice(model_directory, tmp_path, opened, monkeypatch):  # noqa: F811
    out, save = tmp_path / "run", Run.save

    def killed(run, step, *rest):
        if step == 4:
            raise KeyboardInterrupt  # after steps 0 to 3 were logged, before the checkpoint: the next run goes on from step 2
        save(run, step, *rest)

    monkeypatch.setattr(Run, "save", killed)
    assert main(["train", "--model", str(model_directory), "--out", str(out), *FLAGS, "--tensorboard", "--wandb"]) == 130
    monkeypatch.setattr(Run, "save", save)
    first = written(out)
    train(model_directory, out, "--resume", "--tensorboard", "--wandb")
    before, began, after, went_on = opened
    assert before.options["purge_step"] == 0 and after.options["purge_step"] == 2  # TensorBoard hides what stood there from 2 on
    assert after.logged == written(out, first=2)
    assert began.options["id"] == went_on.options["id"] and went_on.options["resume"] == "allow"
    assert began.logged == first and {s for s, _, _ in began.logged} == {0, 1, 2, 3}
    assert {s for s, _, _ in went_on.logged} == {4} and went_on.logged == written(out, first=4)


def test_a_new_run_is_a_new_run_there_too(model_directory, tmp_path, opened):  # noqa: F811
    train(model_directory, tmp_path / "run", "--wandb")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    train(model_directory, tmp_path / "run", "--wandb")
    assert opened[0].options["id"] != opened[1].options["id"]


def test_only_the_first_process_writes(tmp_path, opened):
    for rank in (1, 0):
        run = Run(tmp_path / "run", {}, "grpo", world=World(rank, 2), sinks=["tensorboard", "wandb"])
        run.restore(None, None)
        assert len(opened) == (0 if rank else 2)
        run.close()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_told_before_anything_is_begun(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(name, name), None)
    err = complaint(capsys, "train", "--model", tmp_path / "no-such-model", "--out", tmp_path / "run", *FLAGS, f"--{name}")
    assert f"pip install {name}" in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_refusal_of_wandb_ends_the_run_with_a_sentence(model_directory, tmp_path, capsys, monkeypatch, opened):  # noqa: F811
    def refuse(**options):
        raise RuntimeError("no API key")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    err = complaint(capsys, "train", "--model", model_directory, "--out", tmp_path / "run", *FLAGS, "--wandb", status=1)
    assert "no API key" in err and "wandb login" in err and (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_numbers_in_a_dictionary_get_names_of_their_own():
    assert scalars({"step": 3, "loss": 0.5, "guided": 2, "behaviours": {"self-critique": 4}}) == {
        "loss": 0.5, "guided": 2, "behaviours/self-critique": 4}
