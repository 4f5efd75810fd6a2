"""A run's metrics to TensorBoard or Weights & Biases as well, for those who have the package: `train --tensorboard --wandb`.

metrics.jsonl stays the record; what stands here can be made from it again.
"""

from __future__ import annotations

import importlib
import secrets
from pathlib import Path

from run.config import RunFailed

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def check(names) -> None:
    """Raises ValueError if the package of one of the sinks is not there."""
    for name in names:
        try:
            importlib.import_module(MODULES[name])
        except ImportError:
            raise ValueError(f"--{name}: that package is not installed; pip install {name}, or leave --{name} out") from None


def open_sinks(names, path: Path, config: dict, done: int) -> list:
    """The sinks of the run in `path`, of which `done` steps are kept; those after them will come again."""
    return [{"tensorboard": TensorBoard, "wandb": WandB}[name](path, config, done) for name in names]


class TensorBoard:
    def __init__(self, path, config, done):
        module = importlib.import_module(MODULES["tensorboard"])
        self.writer = module.SummaryWriter(path / "tensorboard", purge_step=done)  # hides what was written of `done` and later

    def log(self, step, metrics):
        for key, value in scalars(metrics).items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def close(self):
        self.writer.close()


class WandB:
    def __init__(self, path, config, done):
        file = path / "wandb-id"  # a resumed run goes on in the one that it began
        if not done or not file.exists():
            file.write_text(secrets.token_hex(8))
        try:
            self.run = importlib.import_module("wandb").init(project="thinktuning", name=path.name, dir=str(path), config=config,
                                                             id=file.read_text(), resume="allow")
        except Exception as error:  # no login, no network: its own kinds of error, one of which is a plain Exception
            raise RunFailed(f"--wandb: {error}; run `wandb login`, set WANDB_MODE=offline, or leave --wandb out") from None

    def log(self, step, metrics):
        if step >= self.run.step:  # it keeps what it has of a step: steps that come again are the same
            self.run.log(scalars(metrics), step=step)

    def close(self):
        self.run.finish()


def scalars(metrics: dict) -> dict[str, float]:
    """Every number of a step's metrics; those of a dictionary inside as `behaviours/self-critique`."""
    flat = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            flat |= {f"{key}/{name}": n for name, n in value.items()}
        elif key != "step":
            flat[key] = value
    return flat
