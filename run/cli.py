"""The command line: every flag of every command.

It knows no command's code and does not import torch, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from run.config import DTYPES, MAY_CHANGE, add_config_flags, flag
from run.errors import complain

DESCRIPTION = """ThinkTuning from scratch (arXiv 2508.07616).

  python thinktuning.py                   the demonstration: GRPO and ThinkTuning side by side
  python thinktuning.py --preset mentor   the novelty test: a habit the student hardly ever samples
  python thinktuning.py train --model DIR --data gsm8k   train a model directory on problems
  python thinktuning.py eval  --model DIR --data FILE    accuracy, mean@k, pass@k, maj@k, reflection
  python thinktuning.py ask   --model DIR "question"     watch it think
  python thinktuning.py report RUN [RUN ...]             the HTML page again, or across runs

Each of the four has flags of its own: python thinktuning.py train --help
"""


class Parser(argparse.ArgumentParser):
    def parse_args(self, argv):
        """As argparse does it, but an unknown flag is reported before one that is missing."""
        needed = [action for action in self._actions if action.required]
        for action in needed:
            action.required = False
        _, unknown = self.parse_known_args(argv)
        for action in needed:
            action.required = True
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return super().parse_args(argv)

    def error(self, message):
        sys.exit(complain(f"{message} ({self.prog} --help lists every flag)", 2))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of the command that comes first, or those of the demonstration.

    Argparse's own subcommands are not used: they would take the 3 of `--frobnicate 3` for a
    command.
    """
    argv = sys.argv[1:] if argv is None else argv
    demo, commands = parsers()
    first = argv[0] if argv else "--"
    if first in commands:
        return commands[first].parse_args(argv[1:])
    known = ", ".join(commands)
    if not first.startswith("-"):
        demo.error(f"{first!r} is no command: give one of {known}, or none for the demonstration")
    for word, next_word in zip(argv, argv[1:]):
        # --out is the demonstration's only flag that takes any text, so also a command's name.
        if next_word in commands and word != "--out":
            demo.error(
                f"the command must come first: thinktuning.py {next_word}, and then its flags"
            )
    return demo.parse_args(argv)


def parsers() -> tuple[Parser, dict[str, Parser]]:
    """The demonstration's parser, and one for each command."""
    demo = Parser(
        prog="thinktuning.py",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.set_defaults(command="demo")
    add_demo_flags(demo)
    commands = {}
    for name, (description, add_flags) in COMMANDS.items():
        parser = Parser(prog=f"thinktuning.py {name}", description=description)
        parser.set_defaults(command=name)
        add_flags(parser)
        commands[name] = parser
    return demo, commands


def add_model_flags(parser, needed=True):
    """The flags of every command that loads a model. `needed`: --model must be given."""
    add = parser.add_argument
    add(
        "--model",
        required=needed,
        help="directory with config.json, model.safetensors and a tokenizer",
    )
    add("--device", default="auto", help="cpu, cuda, ... (cuda where there is one)")
    add(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help="of the weights in memory; training bfloat16 keeps a float32 master copy "
        "(float32 on a cpu, else bfloat16)",
    )
    add(
        "--compile",
        default="auto",
        choices=("auto", "off"),
        help="auto: on a GPU, decoding steps are compiled into CUDA graphs (auto)",
    )


def add_train_flags(parser):
    add_model_flags(parser, needed=False)  # a resumed run has its own
    add = parser.add_argument
    add(
        "--data",
        help="wordproblems, gsm8k, or a .jsonl file of questions and answers",
    )
    add("--eval-data", help="problems to evaluate on, likewise")
    add(
        "--teacher",
        help="another model directory for the teacher, of any family "
        "(the student's initial weights)",
    )
    add("--out", help="run directory (out/METHOD-SEED)")
    may_change = ", ".join(sorted(map(flag, MAY_CHANGE)))
    add(
        "--resume",
        action="store_true",
        help="go on from the run directory's newest checkpoint, if there is one; what is left "
        "out, --model and --data too, keeps its value, and only these may change: "
        f"{may_change} (no fewer steps)",
    )
    add("--verbose", action="store_true", help="say how many decoding steps were recorded")
    add(
        "--preset",
        choices=("paper", "demo"),
        help="where the settings below start from (paper); "
        "demo: the demonstration's settings, for a tiny model",
    )
    for name, title in (("tensorboard", "TensorBoard"), ("wandb", "Weights & Biases")):
        add(
            f"--{name}",
            dest="sinks",
            action="append_const",
            const=name,
            default=[],
            help=f"send the metrics to {title} as well (pip install {name})",
        )
    add_config_flags(parser)


def add_eval_flags(parser):
    add_model_flags(parser)
    add = parser.add_argument
    add("--data", required=True, help="wordproblems, gsm8k, or a .jsonl file")
    add("--split", help="of wordproblems or gsm8k (test)")
    add("--count", type=natural, default=0, help="only the first so many problems; 0 is all")
    add("--samples", type=positive, default=1, help="k, responses to each problem")
    add("--temperature", type=from_zero, help="0 with one sample, else 1")
    add("--rows", type=positive, default=256, help="responses sampled side by side (memory)")
    add(
        "--grader",
        default="auto",
        choices=("auto", "builtin", "math-verify"),
        help="what compares answers (auto: math-verify where it is installed)",
    )
    add_sampling_flags(parser)


def add_ask_flags(parser):
    add_model_flags(parser)
    add = parser.add_argument
    add("question")
    add(
        "--samples",
        type=positive,
        default=1,
        help="sample so many answers and count their votes instead (1)",
    )
    add("--temperature", type=from_zero, help="0 is greedy (0 with one sample, else 1)")
    add(
        "--teacher",
        action="store_true",
        help="also print the feedback of a teacher with the model's own weights; "
        "it reads the response up to any reflection",
    )
    add("--teacher-model", metavar="DIR", help="the same with a teacher whose weights are in DIR")
    add_sampling_flags(parser)


def add_sampling_flags(parser):
    parser.add_argument(
        "--max-tokens",
        type=positive,
        help="new tokens of a response (1024, or what the context leaves)",
    )
    parser.add_argument("--seed", type=natural, default=0)


def add_report_flags(parser):
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="directory of a run, or of a demonstration with its runs",
    )
    parser.add_argument(
        "--out",
        help="file to write (report.html in RUN; of several runs, in the current directory)",
    )


COMMANDS = {  # name: (what it does, the function that adds its flags)
    "train": (
        "Train a model directory on problems. --model and --data are needed, except with --resume.",
        add_train_flags,
    ),
    "eval": ("Accuracy, mean@k, pass@k, maj@k, reflection, with standard errors.", add_eval_flags),
    "ask": ("Watch a model think.", add_ask_flags),
    "report": ("One HTML page of a run, or across runs.", add_report_flags),
}


def add_demo_flags(parser):
    add = parser.add_argument_group("the demonstration").add_argument
    add(
        "--seed",
        type=natural,
        default=0,
        help="of everything: pretraining, sampling, choosing, data order",
    )
    add(
        "--preset",
        default="demo",
        choices=("demo", "mentor"),
        help="mentor: the novelty test, where the teacher quotes a made-up mentor "
        "and naming this mentor once is rewarded",
    )
    add("--out", help="directory for the runs and summary.json (out/PRESET-SEED)")
    add(
        "--floor",
        type=float,
        default=0.01,
        help="share of the student's pretraining texts that go on after "
        "the answer with an unrelated remark (0.01)",
    )
    add(
        "--ablate",
        nargs="?",
        const="all",
        choices=("all", "long", "rates", "stress"),
        help="on this seed's base model: every variant, only the long GRPO run, "
        "learning rates, or losses under stress",
    )
    add("--repeats", type=positive, help="training seeds of every variant of --ablate (3)")
    add(
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
