"""TensorBoard and Weights & Biases, played by modules of ours: what they are given, and when."""

# ruff: noqa: F811 (the fixture model_directory is imported)

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from run.record import Run
from run.sinks import open_sinks
from run.world import World
from test_thinktuning import model_directory  # noqa: F401 (a fixture)
from thinktuning import main

FLAGS = [
    "--data",
    "wordproblems",
    "--method",
    "grpo",
    "--steps",
    "5",
    "--questions",
    "2",
    "--samples",
    "2",
    "--max-tokens",
    "6",
    "--save-every",
    "2",
]


@pytest.fixture
def opened(monkeypatch):
    """What was opened, in order, with its options, and what was logged."""
    sinks, stored = [], {}

    def sink(kind, **options):
        sinks.append(
            SimpleNamespace(kind=kind, options=options, logged=[], repeated=[], closed=False)
        )
        return sinks[-1]

    class SummaryWriter:
        def __init__(self, log_dir, purge_step=None):
            self.sink = sink("tensorboard", log_dir=log_dir, purge_step=purge_step)

        def add_scalar(self, key, value, step):
            self.sink.logged.append((step, key, value))

        def close(self):
            self.sink.closed = True

    class WandBRun:
        def __init__(self, **options):
            self.sink = sink("wandb", **options)
            self.id = options["id"] or f"made-{len(sinks)}"

        @property
        def step(self):
            return stored.get(self.id, 0)

        def log(self, metrics, step):
            if step < self.step:  # wandb warns, and ignores it
                self.sink.repeated.append(metrics)
                return
            self.sink.logged.append(metrics)
            stored[self.id] = step + 1

        def finish(self):
            self.sink.closed = True

    tensorboard, wandb = ModuleType("torch.utils.tensorboard"), ModuleType("wandb")
    tensorboard.SummaryWriter, wandb.init = SummaryWriter, WandBRun
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return sinks


def train(model, out, *flags) -> int:
    return main(["train", "--model", str(model), "--out", str(out), *FLAGS, *flags])


def recorded(out):
    return [json.loads(line) for line in open(out / "metrics.jsonl")]


def numbers(metrics):
    """(step, key, value) of every number in lines of metrics.jsonl."""
    found = []
    for m in metrics:
        for key, value in m.items():
            if key == "behaviours":
                found += [(m["step"], f"behaviours/{name}", n) for name, n in value.items()]
            elif key != "step":
                found.append((m["step"], key, value))
    return found


def test_both_are_given_the_numbers_of_metrics_jsonl(model_directory, tmp_path, opened):
    out = tmp_path / "run"
    assert train(model_directory, out, "--tensorboard", "--wandb") == 0
    tensorboard, wandb = opened
    assert tensorboard.logged == numbers(recorded(out)) and wandb.logged == recorded(out)
    assert [m["step"] for m in wandb.logged] == list(range(5)) and "loss" in wandb.logged[0]
    assert tensorboard.closed and wandb.closed
    assert tensorboard.options["log_dir"] == out / "tensorboard" and wandb.options["name"] == "run"
    assert wandb.options["config"] == json.loads((out / "config.json").read_text())


def test_without_a_flag_nothing_is_opened(model_directory, tmp_path, opened):
    assert train(model_directory, tmp_path / "run") == 0
    assert train(model_directory, tmp_path / "other", "--tensorboard") == 0
    assert [s.kind for s in opened] == ["tensorboard"]


def test_a_resumed_run_writes_no_step_twice(model_directory, tmp_path, opened, monkeypatch):
    out, save = tmp_path / "run", Run.save

    def killed(run, step, *rest):
        if step == 4:
            # Steps 0 to 3 are logged, and the newest checkpoint is that of step 2.
            raise KeyboardInterrupt
        save(run, step, *rest)

    monkeypatch.setattr(Run, "save", killed)
    assert train(model_directory, out, "--tensorboard", "--wandb") == 130
    monkeypatch.setattr(Run, "save", save)
    first = recorded(out)
    assert train(model_directory, out, "--resume", "--tensorboard", "--wandb") == 0
    before, began, after, went_on = opened
    assert before.options["purge_step"] == 0 and after.options["purge_step"] == 2
    assert after.logged == numbers(recorded(out)[2:])
    assert began.options["id"] is None and went_on.options["id"] == "made-2"
    assert went_on.options["resume"] == "allow"
    assert began.logged == first and [m["step"] for m in first] == [0, 1, 2, 3]
    assert went_on.logged == recorded(out)[4:] and [m["step"] for m in went_on.repeated] == [2, 3]


def test_a_new_run_is_a_new_run_there_too(model_directory, tmp_path, opened):
    out = tmp_path / "run"
    assert train(model_directory, out, "--wandb") == 0
    first = (out / "wandb-id").read_text()
    (out / "metrics.jsonl").unlink()
    assert train(model_directory, out, "--wandb") == 0
    assert [sink.options["id"] for sink in opened] == [None, None]
    assert (out / "wandb-id").read_text() != first


def test_only_the_first_process_writes(tmp_path, opened):
    for rank in (1, 0):
        run = Run(
            tmp_path / "run", {}, "grpo", world=World(rank, 2), sinks=["tensorboard", "wandb"]
        )
        run.restore(None, None)
        assert len(opened) == (0 if rank else 2)
        run.close()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_told_before_anything_is_begun(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(
        sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(name, name), None
    )
    assert train(tmp_path / "no-such-model", tmp_path / "run", f"--{name}") == 2
    err = capsys.readouterr().err
    assert f"pip install {name}" in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_refusal_of_wandb_ends_the_run_with_a_sentence(
    model_directory, tmp_path, capsys, monkeypatch, opened
):
    def refuse(**options):
        raise RuntimeError("no API key")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    assert train(model_directory, tmp_path / "run", "--wandb") == 1
    err = capsys.readouterr().err
    assert "error: --wandb: no API key; run `wandb login`" in err and err.count("\n") == 1
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_numbers_in_a_dictionary_get_names_of_their_own(tmp_path, opened):
    (sink,) = open_sinks(["tensorboard"], tmp_path, {}, 0)
    sink.log(3, {"loss": 0.5, "guided": 2, "behaviours": {"self-critique": 4}})
    assert opened[0].logged == [
        (3, "loss", 0.5),
        (3, "guided", 2),
        (3, "behaviours/self-critique", 4),
    ]
