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
  python thinktuning.py page RUN                         the demonstration's models in a browser

Each of the five has flags of its own: python thinktuning.py train --help
"""


class Parser(argparse.ArgumentParser):
    def __init__(self, **about):
        super().__init__(**about, allow_abbrev=False)  # a shortened flag may be a misspelt one

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
    if not first.startswith("-"):
        demo.error(f"{first!r} is no command: give one of {', '.join(commands)}, or none")
    for word, next_word in zip(argv, argv[1:]):
        # --out is the demonstration's only flag that takes any text, so also a command's name.
        if next_word in commands and word != "--out":
            demo.error(f"the command must come first: thinktuning.py {next_word}")
    return demo.parse_args(argv)


def parsers() -> tuple[Parser, dict[str, Parser]]:
    """The demonstration's parser, and one for each command."""
    layout = argparse.RawDescriptionHelpFormatter
    demo = Parser(prog="thinktuning.py", description=DESCRIPTION, formatter_class=layout)
    demo.set_defaults(command="demo")
    add_demo_flags(demo.add_argument_group("the demonstration").add_argument)
    commands = {}
    for name, (description, add_flags) in COMMANDS.items():
        commands[name] = Parser(prog=f"thinktuning.py {name}", description=description)
        commands[name].set_defaults(command=name)
        add_flags(commands[name].add_argument)
    add_config_flags(commands["train"])
    return demo, commands


# Each of these functions gets a parser's `add_argument`.


def add_model_flags(add, needed=True):
    """The flags of every command that loads a model. `needed`: --model must be given."""
    add("--model", required=needed, help="directory with config.json, weights and a tokenizer")
    add("--device", default="auto", help="cpu, cuda, ... (cuda where there is one)")
    about = "of the weights; training bfloat16 keeps a float32 copy (float32 on a cpu)"
    add("--dtype", default="auto", choices=DTYPES, help=about)
    about = "auto: on a GPU, decoding steps are compiled into CUDA graphs (auto)"
    add("--compile", default="auto", choices=("auto", "off"), help=about)


def add_train_flags(add):
    add_model_flags(add, needed=False)  # a resumed run has its own
    add("--data", help="wordproblems, gsm8k, or a .jsonl file of problems")
    add("--eval-data", help="problems to evaluate on, likewise")
    add("--teacher", help="directory of another model as the teacher (the student as it was)")
    add("--out", help="run directory (out/METHOD-SEED)")
    may_change = ", ".join(sorted(map(flag, MAY_CHANGE)))
    about = "go on from the newest checkpoint; what is left out keeps its value, --model and "
    about += f"--data too, and only these may change: {may_change} (no fewer steps)"
    add("--resume", action="store_true", help=about)
    add("--verbose", action="store_true", help="say how many decoding steps were recorded")
    about = "where the settings below start from (paper); demo: the demonstration's"
    add("--preset", choices=("paper", "demo"), help=about)
    sink = dict(dest="sinks", action="append_const", default=[])
    for name in ("tensorboard", "wandb"):
        add(
            f"--{name}", const=name, help=f"also send the metrics there: pip install {name}", **sink
        )


def add_eval_flags(add):
    add_model_flags(add)
    add("--data", required=True, help="wordproblems, gsm8k, or a .jsonl file")
    add("--split", help="of wordproblems or gsm8k (test)")
    add("--count", type=natural, default=0, help="only the first so many problems; 0 is all")
    add("--samples", type=positive, default=1, help="k, responses to each problem")
    add("--temperature", type=number, help="0 with one sample, else 1")
    add("--rows", type=positive, default=256, help="responses sampled side by side (memory)")
    graders = ("auto", "builtin", "math-verify")
    add("--grader", default="auto", choices=graders, help="auto: math-verify if installed (auto)")
    add_sampling_flags(add)


def add_ask_flags(add):
    add_model_flags(add)
    add("question")
    add("--samples", type=positive, default=1, help="count the votes of so many answers (1)")
    add("--temperature", type=number, help="0 is greedy (0 with one sample, else 1)")
    add("--teacher", action="store_true", help="also print the feedback of the model as a teacher")
    add("--teacher-model", metavar="DIR", help="the same with the model in DIR as the teacher")
    add_sampling_flags(add)


def add_sampling_flags(add):
    about = "new tokens of a response (1024, or less where the context is short)"
    add("--max-tokens", type=positive, help=about)
    add("--seed", type=natural, default=0)


def add_report_flags(add):
    add("runs", nargs="+", metavar="RUN", help="directory of a run, or of a demonstration")
    add("--out", help="file to write (report.html in RUN; of several runs, in this directory)")


def add_page_flags(add):
    add("run", metavar="RUN", help="directory of a finished demonstration, such as out/demo-0")
    add("--out", help="file to write (page.html in RUN)")


COMMANDS = {  # name: (what it does, the function that adds its flags)
    "train": (
        "Train a model directory on problems. --model and --data are needed, except with --resume.",
        add_train_flags,
    ),
    "eval": ("Accuracy, mean@k, pass@k, maj@k, reflection, with standard errors.", add_eval_flags),
    "ask": ("Watch a model think.", add_ask_flags),
    "report": ("One HTML page of a run, or across runs.", add_report_flags),
    "page": ("One HTML file that runs a demonstration's models in a browser.", add_page_flags),
}


def add_demo_flags(add):
    add("--seed", type=natural, default=0, help="of everything, pretraining included")
    about = "mentor: the novelty test, where naming a made-up mentor once is rewarded"
    add("--preset", default="demo", choices=("demo", "mentor"), help=about)
    add("--out", help="directory for the runs and summary.json (out/PRESET-SEED)")
    about = "share of a blank line in what pretraining wants after an attempt (0.005)"
    add("--floor", type=float, help=about)
    variants = ("all", "grpo", "long", "narrator", "rates", "stress")
    about = (
        "variants on this seed's base: all, those of GRPO, a long run, no narrator in the base, "
        "learning rates, stress"
    )
    add("--ablate", nargs="?", const="all", choices=variants, help=about)
    add("--repeats", type=positive, help="training seeds of every variant of --ablate (3)")
    add("--from-scratch", action="store_true", help="pretrain the base model anew in any case")
    add("--quick", action="store_true", help="a smoke test: too short to show anything")


def natural(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 10^18")
    return int(text)


def positive(text: str) -> int:
    if natural(text) == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def number(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up")
    return value
