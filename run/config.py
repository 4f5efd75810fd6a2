"""Every setting of a run, with its published default, its limits and its flag."""

from __future__ import annotations

import argparse
import math
import operator
from dataclasses import asdict, dataclass, field, fields, replace

# What --published can repeat of the published code. docs/published-code.md lists every difference.
PUBLISHED = ("gamma", "dual-clip", "trajectory")
ITEMS = f"some of {','.join(PUBLISHED)}"


class RunFailed(Exception):
    """The run cannot go on; the message says why."""


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def option(default, group: str, help: str, **limits):
    """A setting. Its limits are choices, least, above, most or below."""
    return field(default=default, metadata={"group": group, "help": help, **limits})


@dataclass
class Config:
    """Every setting of a run.

    The defaults are the published ones (`--preset paper`), except that of guided_tokens.
    """

    method: str = option("thinktuning", "run", "grpo: no teacher", choices=("thinktuning", "grpo"))
    seed: int = option(0, "run", "of sampling, choosing and data order", least=0, most=10**18)
    steps: int = option(0, "run", "training steps; 0 is one epoch", least=0, most=10**9)
    eval_every: int = option(0, "run", "steps between evaluations; 0: only at the end", least=0)
    eval_count: int = option(0, "run", "evaluate on the first so many problems; 0: all", least=0)
    save_every: int = option(10, "run", "steps between checkpoints; 0: none", least=0)
    keep: int = option(2, "run", "checkpoints kept", least=1)

    questions: int = option(128, "rollouts", "B, questions a step", least=1)
    samples: int = option(5, "rollouts", "G, rollouts a question", least=2)
    max_tokens: int = option(1024, "rollouts", "L, new tokens of a response", least=1)
    max_prompt: int = option(512, "rollouts", "tokens; longer questions are dropped", least=1)
    temperature: float = option(1.0, "rollouts", "of sampling while training", above=0)
    rows: int = option(128, "rollouts", "responses sampled side by side (memory)", least=1)

    mini_batch: int = option(32, "update", "questions an optimizer step", least=1)
    epochs: int = option(1, "update", "passes over the same rollouts", least=1)
    micro_batch: int = option(
        0, "update", "tokens a pass (memory; changes no result); 0: as many as fit", least=0
    )
    recompute: bool = option(True, "update", "compute activations twice (saves memory)")
    learning_rate: float = option(1e-6, "update", "constant", above=0)
    weight_decay: float = option(0.01, "update", "of AdamW", least=0)
    beta1: float = option(0.9, "update", "of AdamW", least=0, below=1)
    beta2: float = option(0.999, "update", "of AdamW", least=0, below=1)
    max_grad_norm: float = option(1.0, "update", "gradient clipping", above=0)

    clip: float = option(0.2, "loss", "epsilon of PPO's clip", above=0)
    clip_high: float = option(0.0, "loss", "upper epsilon (DAPO); 0: as --clip", least=0)
    dual_clip: float = option(3.0, "loss", "c, the bound for negative advantages", above=1)
    ratio: str = option(
        "token", "loss", "of each token, or of a response (GSPO)", choices=("token", "response")
    )
    loss_mean: str = option(
        "token",
        "loss",
        "over tokens; of each response first (DeepSeekMath); by a constant (Dr. GRPO)",
        choices=("token", "response", "constant"),
    )
    advantages: str = option(
        "z-score",
        "loss",
        "in a group; centred: no std (Dr. GRPO); leave-one-out: RLOO",
        choices=("z-score", "centred", "leave-one-out"),
    )
    kl_coef: float = option(0.0, "loss", "weight of the k3 KL term to the initial policy", least=0)
    shaping: str = option(
        "aas", "loss", "weight of guided tokens", choices=("aas", "ratio", "likelihood")
    )
    guided_tokens: str = option(
        "guidance", "loss", "which count as guided", choices=("guidance", "trajectory")
    )
    unlikely: float = option(
        0.01, "loss", "guard (c): in bad rollouts, guided tokens below it are ordinary", least=0
    )
    gamma_min: float = option(0.001, "loss", "gamma of the best advantage")
    gamma_max: float = option(-0.001, "loss", "gamma of the worst advantage")
    guards: bool = option(True, "loss", "guards (a) and (b) of the shaped weight")

    schedule: str = option(
        "linear", "teacher", "of p_s", choices=("constant", "linear", "cosine", "exp")
    )
    schedule_steps: int = option(
        0, "teacher", "p_s decays in their first third; 0: as --steps", least=0, most=10**9
    )
    p_init: float = option(
        0.1, "teacher", "share of a group guided at first, at least one rollout", least=0, most=1
    )
    p_min: float = option(0.01, "teacher", "and at the end of the decay", above=0, most=1)
    eps: float = option(
        0.05, "teacher", "the teacher is off for good when p <= eps + 0.01", least=-0.01, most=1
    )
    teacher_prompt: int = option(3072, "teacher", "tokens of its prompt", least=1)
    teacher_reply: int = option(1024, "teacher", "tokens of its reply", least=1)
    exemplars: bool = option(
        True, "teacher", "show it four worked exemplars; one trained on the format needs none"
    )
    published: str = option("", "teacher", f"repeat the published code: all, or {ITEMS}")

    @property
    def published_items(self) -> frozenset[str]:
        if self.published == "all":
            return frozenset(PUBLISHED)
        return frozenset(filter(None, self.published.split(",")))

    def with_steps(self, problems: int) -> Config:
        """With as many steps as one epoch of so many problems has, where no number was given."""
        steps = self.steps or max(1, problems // self.questions)
        return replace(self, steps=steps, schedule_steps=self.schedule_steps or steps)

    def check(self) -> None:
        """Raises ValueError, naming the flag, if a value is out of range."""
        for setting in fields(self):
            check_limits(flag(setting.name), getattr(self, setting.name), setting.metadata)
        if self.published_items - set(PUBLISHED):
            raise ValueError(f"--published must be all, or {ITEMS}, not {self.published!r}")
        if 0 < self.clip_high < self.clip:
            raise ValueError(f"--clip-high {self.clip_high} must not be below --clip {self.clip}")
        if self.p_min > self.p_init:
            raise ValueError(f"--p-min {self.p_min} must not be above --p-init {self.p_init}")


LIMITS = {  # a limit: (whether a value keeps it, how a message says it)
    "least": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


def check_limits(name: str, value, limits) -> None:
    """Raises ValueError if the value of the flag `name` is not within its limits."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {value}")
    choices = limits.get("choices")
    if choices and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    for limit, (keeps, words) in LIMITS.items():
        if limit in limits and not keeps(value, limits[limit]):
            raise ValueError(f"{name} must be {words} {limits[limit]}, not {value}")


def check_choices(settings) -> None:
    """Raises ValueError if a field that Config has, too, is none of its choices."""
    for setting in fields(Config):
        choices = setting.metadata.get("choices")
        if choices and hasattr(settings, setting.name):
            value = getattr(settings, setting.name)
            check_limits(setting.name, value, {"choices": choices})


# What may change when a run is resumed: where its steps end, what they cost, how they are
# evaluated; but not what a step does.
MAY_CHANGE = {"steps", "save_every", "keep", "rows", "micro_batch", "recompute"}
MAY_CHANGE |= {"eval_every", "eval_count", "eval_data"}

# The demonstration's settings. Everything else is as published.
DEMO = dict(steps=60, questions=16, samples=8, max_tokens=140, mini_batch=8, learning_rate=3e-4)
DEMO |= dict(beta2=0.95, teacher_prompt=180, teacher_reply=120)
DEMO |= dict(micro_batch=8192, recompute=False, save_every=0)


def add_config_flags(parser):
    """Add a flag for each field of Config. A flag that is not given sets nothing in `args`."""
    groups = {}
    for setting in fields(Config):
        group, default = setting.metadata["group"], setting.default
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        else:
            kind = {"type": type(default), "choices": setting.metadata.get("choices")}
        name, about = flag(setting.name), f"{setting.metadata['help']} ({default})"
        groups[group].add_argument(name, default=argparse.SUPPRESS, help=about, **kind)


DTYPES = ("auto", "float32", "bfloat16")

# Flags of train that are no settings of Config, and that a resumed run keeps.
KEPT = ("model", "data", "dtype", "preset", "teacher", "eval_data")


def chosen(args, before: dict) -> Config:
    """A run's settings: from its flags; else from the run that is resumed; else from the preset.

    `before` is the config.json of the run that is resumed. So a setting whose flag is left out
    stays what it was. That includes what the program chose: the micro-batch (another one would
    round differently), the steps, and the steps of the schedule.
    """
    for name in KEPT:
        if getattr(args, name) in (None, "auto") and isinstance(before.get(name), str):
            setattr(args, name, before[name])
    if missing := [flag(name) for name in ("model", "data") if getattr(args, name) is None]:
        raise ValueError(f"these flags are required: {', '.join(missing)}")
    if args.dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {args.dtype!r}")
    args.preset = args.preset or "paper"
    settings = {}
    if args.preset == "demo":
        # The demonstration itself keeps no checkpoints, but a run with its settings does.
        settings = dict(DEMO, save_every=Config.save_every)
    for setting in fields(Config):
        name = setting.name
        if type(before.get(name)) is type(setting.default):
            settings[name] = before[name]
        if hasattr(args, name):
            settings[name] = getattr(args, name)
    return Config(**settings)


def check_used(args, config: Config) -> None:
    """Raises ValueError if a flag was given that would have no effect."""
    if args.teacher and config.method == "grpo":
        raise ValueError("--method grpo has no teacher: leave --teacher out")
    if not args.eval_data and (config.eval_every or config.eval_count):
        given = "--eval-every" if config.eval_every else "--eval-count"
        raise ValueError(f"{given} needs problems: give --eval-data too, or leave {given} out")


def note_on_more_steps(config: Config, before: dict) -> str:
    """A line for a resumed run that gets more steps; "" for any other."""
    was = before.get("steps")
    if type(was) is not int or config.steps <= was:
        return ""
    note = f"\n{config.steps} steps instead of {was}"
    if config.method == "grpo":
        return note
    return f"{note}; the teacher's share p_s stays that of a run of {config.schedule_steps} steps"


def named_settings(args: argparse.Namespace, config: Config) -> dict:
    """What config.json keeps of a run.

    Also puts advice into `args` for a run that fails (see run.errors.trouble).
    """
    if config.save_every:
        args.again = "--resume goes on"
    else:
        args.again = "it cannot be resumed, because --save-every 0 kept no checkpoint"
    args.memory = f"lower --rows (sampling) or --micro-batch (update); {args.again}"
    kept = {name: getattr(args, name) for name in KEPT}
    return {name: value for name, value in kept.items() if value is not None} | asdict(config)
