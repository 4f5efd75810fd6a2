"""What a solution of an exercise is held against, and what is said about it.

    python exercises/1_group_advantages.py       checks one file; `main` below

A check returns None for a right solution and otherwise one message. Where a wrong result is the
very one that a usual slip gives, the message names the slip; else it shows the first case that
differs.
"""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import check_model  # noqa: E402
import check_training  # noqa: E402

import grpo  # noqa: E402
import teacher  # noqa: E402

CHECKS = {  # a gap's function: its check
    "group_advantages": check_training.check_group_advantages,
    "attend": check_model.check_attend,
    "sample": check_model.check_sample,
    "clipped_loss": check_training.check_clipped_loss,
    "shaped_ratio": check_training.check_shaped_ratio,
    "choose": check_training.check_choose,
    "augment": check_training.check_augment,
}
SOLUTIONS = SimpleNamespace(  # the program's own functions
    group_advantages=grpo.group_advantages,
    attend=check_model.full_attention,  # as Attention.forward calls it
    sample=check_model.program_sample,
    clipped_loss=lambda *args: grpo.clipped_loss(*args)[0],
    shaped_ratio=grpo.shaped_ratio,
    choose=teacher.choose,
    augment=teacher.augment,
)


def main(file):
    """Check one exercise's file and say what came of it; status 1 if it is not right yet."""
    message = verdict(load(file))
    print(f"{Path(file).name}: {message or 'right'}")
    sys.exit(message is not None)


def load(file):
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verdict(exercise):
    """None if an exercise's functions are right, else what is wrong with the first."""
    for name, check in CHECKS.items():
        if solution := getattr(exercise, name, None):
            try:
                message = check(solution)
            except NotImplementedError as error:
                message = f"not filled in yet: {error}"
            # whatever a first attempt may raise: its author needs the name and the line
            except Exception as error:
                message = f"stops with {type(error).__name__}: {error}{line_of(error, solution)}"
            if message:
                return f"{name} {message}"
    return None


def line_of(error, solution):
    """Where in the solution's own file an error came up."""
    lines, trace = [], error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == solution.__code__.co_filename:
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f" (line {lines[-1]})" if lines else ""
