"""A run's metrics to TensorBoard or Weights & Biases as well: `train --tensorboard --wandb`.

metrics.jsonl stays the record: what these two show can be made from it again.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from run.config import RunFailed

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def check(names) -> None:
    """Raises ValueError if the package of one of the sinks is not installed."""
    for name in names:
        try:
            importlib.import_module(MODULES[name])
        except ImportError:
            advice = f"pip install {name}, or leave --{name} out"
            raise ValueError(f"--{name} needs a package: {advice}") from None


def open_sinks(names, path: Path, config: dict, done: int) -> list:
    """The sinks of the run in `path`, of which `done` steps are kept: later ones come again."""
    kinds = {"tensorboard": TensorBoard, "wandb": WandB}
    return [kinds[name](path, config, done) for name in names]


class TensorBoard:
    def __init__(self, path, config, done):
        module = importlib.import_module(MODULES["tensorboard"])
        # purge_step hides what an earlier process wrote of step `done` and later.
        self.writer = module.SummaryWriter(path / "tensorboard", purge_step=done)
        self.close = self.writer.close

    def log(self, step, metrics):
        counts = {f"behaviours/{name}": n for name, n in metrics.get("behaviours", {}).items()}
        for key, value in (metrics | counts).items():
            if key not in ("step", "behaviours"):
                self.writer.add_scalar(key, value, step)


class WandB:
    def __init__(self, path, config, done):
        stored = path / "wandb-id"  # a resumed run continues the one that it began there
        known = stored.read_text() if done and stored.exists() else None
        options = {"project": "thinktuning", "name": path.name, "dir": str(path), "config": config}
        try:
            self.run = importlib.import_module("wandb").init(**options, id=known, resume="allow")
        except Exception as error:  # no login or no network: W&B raises kinds of its own
            advice = "run `wandb login`, set WANDB_MODE=offline, or leave --wandb out"
            raise RunFailed(f"--wandb: {error}; {advice}") from None
        stored.write_text(self.run.id)
        self.close = self.run.finish

    def log(self, step, metrics):
        self.run.log(metrics, step=step)  # W&B keeps what it has of a step that comes again
