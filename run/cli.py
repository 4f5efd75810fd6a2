"""The command line: every flag of every command. It knows no command's code, and imports no torch."""

from __future__ import annotations

import argparse
import sys

from run.config import DTYPES, MAY_CHANGE, add_config_flags, flag
from run.errors import complain

DESCRIPTION = """ThinkTuning from scratch (arXiv 2508.07616).

  python thinktuning.py                            the demonstration: base model, GRPO, ThinkTuning, side by side
  python thinktuning.py --preset mentor            the novelty test: a habit that the student hardly ever samples
  python thinktuning.py train --model DIR --data gsm8k   train a model directory on problems
  python thinktuning.py eval  --model DIR --data FILE    accuracy, mean@k, pass@k, maj@k, reflection
  python thinktuning.py ask   --model DIR "question"     watch it think
  python thinktuning.py report RUN [RUN ...]       the HTML page again, or across runs

Each of the four has flags of its own: python thinktuning.py train --help
"""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        sys.exit(complain(f"{message} ({self.prog} --help lists every flag)", 2))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command that comes first, or else those of the demonstration.

    These are no subcommands of argparse's, which takes the 3 of `--frobnicate 3` for a command.
    """
    argv = sys.argv[1:] if argv is None else argv
    demo, commands = parsers()
    first = argv[0] if argv else "--"
    if first in commands:
        return commands[first].parse_args(argv[1:])
    known = ", ".join(commands)
    if not first.startswith("-"):
        demo.error(f"{first!r} is no command: give one of {known}, or none for the demonstration")
    for word, behind in zip(argv, argv[1:]):
        if (
            behind in commands and word != "--out"
        ):  # the only flag of the demonstration with a free text
            demo.error(f"the command must come first: thinktuning.py {behind}, and then its flags")
    return demo.parse_args(argv)


def parsers() -> tuple[Parser, dict[str, Parser]]:
    """The demonstration's parser, and one for each command."""
    top = Parser(
        prog="thinktuning.py",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.set_defaults(command="demo")
    add_demo_flags(top)
    commands: dict[str, Parser] = {}

    def command(name, about, **more) -> Parser:
        commands[name] = Parser(prog=f"thinktuning.py {name}", description=about, **more)
        return commands[name]

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--model",
        required=True,
        help="directory with config.json, model.safetensors and a tokenizer",
    )
    common.add_argument("--device", default="auto", help="cpu, cuda, ... (cuda where there is one)")
    common.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help="of the weights in memory; training bfloat16 keeps a float32 master copy "
        "(float32 on a cpu, else bfloat16)",
    )

    common.add_argument(
        "--compile",
        default="auto",
        choices=("auto", "off"),
        help="auto: on a GPU, decoding steps are compiled into CUDA graphs (auto)",
    )

    t = command("train", "Train a model directory on problems.", parents=[common])
    t.add_argument(
        "--data",
        required=True,
        help="wordproblems, gsm8k, or a .jsonl file of questions and answers",
    )
    t.add_argument("--eval-data", help="problems to evaluate on, likewise")
    t.add_argument(
        "--teacher",
        help="another model directory for the teacher, of any family "
        "(the student's initial weights)",
    )
    t.add_argument("--out", help="run directory (out/METHOD-SEED)")
    t.add_argument(
        "--resume",
        action="store_true",
        help="go on from the run directory's newest checkpoint, if there is one; settings left out stay what "
        f"they were, and only these may change: {', '.join(sorted(map(flag, MAY_CHANGE)))} (no fewer steps)",
    )
    t.add_argument(
        "--verbose", action="store_true", help="say how many decoding steps were recorded"
    )
    t.add_argument(
        "--preset",
        choices=("paper", "demo"),
        help="where the settings below start from (paper); "
        "demo: what a model of the demonstration can take",
    )
    for name, title in (("tensorboard", "TensorBoard"), ("wandb", "Weights & Biases")):
        t.add_argument(
            f"--{name}",
            dest="sinks",
            action="append_const",
            const=name,
            default=[],
            help=f"the metrics to {title} as well (pip install {name})",
        )
    t.set_defaults(command="train")
    add_config_flags(t)

    e = command(
        "eval",
        "Accuracy, mean@k, pass@k, maj@k, reflection, with standard errors.",
        parents=[common],
    )
    e.add_argument("--data", required=True, help="wordproblems, gsm8k, or a .jsonl file")
    e.add_argument("--split", help="of wordproblems or gsm8k (test)")
    e.add_argument(
        "--count", type=natural, default=0, help="only the first so many problems; 0 is all"
    )
    e.add_argument("--samples", type=positive, default=1, help="k, responses to each problem")
    e.add_argument("--temperature", type=from_zero, help="0 with one sample, else 1")
    e.add_argument(
        "--rows", type=positive, default=256, help="responses sampled side by side (memory)"
    )
    e.add_argument(
        "--grader",
        default="auto",
        choices=("auto", "builtin", "math-verify"),
        help="who compares answers (auto: math-verify where it is installed)",
    )
    e.set_defaults(command="eval")

    a = command("ask", "Watch a model think.", parents=[common])
    a.add_argument("question")
    a.add_argument(
        "--samples", type=positive, default=1, help="so many answers and their vote instead (1)"
    )
    a.add_argument("--temperature", type=from_zero, help="0 is greedy (0 with one sample, else 1)")
    a.add_argument(
        "--teacher",
        action="store_true",
        help="and what a teacher with the model's own weights says to "
        "that attempt, up to any reflection on it",
    )
    a.add_argument(
        "--teacher-model", metavar="DIR", help="likewise a teacher with the weights in DIR"
    )
    a.set_defaults(command="ask")

    r = command("report", "One HTML page of a run, or across runs.")
    r.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="directory of a run, or of a demonstration with its runs",
    )
    r.add_argument(
        "--out",
        help="file to write (report.html in RUN; of several runs, in the current directory)",
    )
    r.set_defaults(command="report")
    for p in (e, a):
        p.add_argument(
            "--max-tokens",
            type=positive,
            help="new tokens of a response (1024, or what the context leaves)",
        )
        p.add_argument("--seed", type=natural, default=0)
    return top, commands


def add_demo_flags(top):
    demo = top.add_argument_group("the demonstration")
    demo.add_argument(
        "--seed",
        type=natural,
        default=0,
        help="of everything: pretraining, sampling, choosing, data order",
    )
    demo.add_argument(
        "--preset",
        default="demo",
        choices=("demo", "mentor"),
        help="mentor: the novelty test, where the teacher quotes a made-up mentor and naming him once is rewarded",
    )
    demo.add_argument("--out", help="directory for the runs and summary.json (out/PRESET-SEED)")
    demo.add_argument(
        "--floor",
        type=float,
        default=0.01,
        help="share of the student's pretraining texts that go on after "
        "the answer with an unrelated remark (0.01)",
    )
    demo.add_argument(
        "--ablate",
        nargs="?",
        const="all",
        choices=("all", "long", "rates", "stress"),
        help="on this seed's base model: every variant, only the long GRPO run, learning rates, the stress regime",
    )
    demo.add_argument(
        "--repeats", type=positive, help="training seeds of every variant of --ablate (3)"
    )
    demo.add_argument(
        "--quick",
        action="store_true",
        help="a smoke test of a few steps: too short to show anything",
    )


def natural(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number from 0 up (and below 10^18)"
        )
    return int(text)


def positive(text: str) -> int:
    if natural(text) == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def from_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up")
    return value
