"""The gaps of the exercises: how each is checked, and what stands there in the program.

    python exercises/1_group_advantages.py       checks one file; `main` below

A check returns None for a right solution and otherwise one message. Where a wrong result is the
very one that a usual mistake gives, the message names the mistake; else it shows the first element
that differs.
"""

import inspect
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import calling  # noqa: E402
import check_loss  # noqa: E402
import check_model  # noqa: E402
import check_sampler  # noqa: E402
import check_teacher  # noqa: E402
from comparing import compare  # noqa: E402

import grpo  # noqa: E402
import model  # noqa: E402
import sampler  # noqa: E402
import teacher  # noqa: E402
from run import head  # noqa: E402
from run.errors import complain  # noqa: E402


class Gap(NamedTuple):
    exercise: str  # the file's name, without .py
    name: str  # the function to be written
    check: Callable  # (solution of plain data, seed) -> a message, or None
    right: Callable  # the program's own, called as the gap is
    # What the program has there: functions, or (function, a word of the first line, of the last).
    shown: tuple
    question: str  # to think about


def by(task):
    """The check that does nothing but compare."""
    return partial(compare, task=task)


GAPS = [
    Gap(
        "1_group_advantages",
        "group_advantages",
        by(check_loss.ADVANTAGES),
        grpo.group_advantages,
        (grpo.group_advantages,),
        "Seven of eight rollouts are right. Which rollout has the largest |Â|, and what would it "
        "be without the division by the std?",
    ),
    Gap(
        "2_kv_cache",
        "attend",
        check_model.check_attend,
        check_model.program_attend,
        (model.KVCache.extend, model.KVCache.attend),
        "The program's cache is allocated once, and yours grows by a copy in each step. How many "
        "positions are copied in total while 1,000 tokens are written?",
    ),
    Gap(
        "3_top_p",
        "sample",
        check_sampler.check_sample,
        sampler.sample,
        (sampler.sample, sampler.keep_top_p),
        "Training samples with top_p = 1. What would be wrong with ρ = π_θ/π_old if tokens were "
        "drawn with top_p = 0.9?",
    ),
    Gap(
        "4_ppo_clip",
        "clipped_loss",
        by(check_loss.CLIPPED),
        check_loss.CLIPPED.right,
        (grpo.clipped_loss,),
        "In the first optimizer step on a batch ρ is 1 for every token. Which of the three terms "
        "counts then, and is anything clipped?",
    ),
    Gap(
        "5_shaped_ratio",
        "shaped_ratio",
        by(check_loss.SHAPED),
        grpo.shaped_ratio,
        (grpo.shaped_ratio, grpo.shaping_coefficient),
        "A guided token has π = 0.0001. By what factor does AAS slow it down at Â = 2, compared "
        "with the plain gradient Â·∇log π, and why would one want that?",
    ),
    Gap(
        "6_choose_and_augment",
        "choose",
        check_teacher.check_choose,
        teacher.choose,
        (teacher.choose,),
        "What happens to the advantages of a group if every one of its rollouts is helped, and "
        "the help is always right?",
    ),
    Gap(
        "6_choose_and_augment",
        "augment",
        by(check_teacher.AUGMENT),
        teacher.augment,
        (teacher.augment,),
        "The teacher's opinion is not part of ô. What would the student learn if it were?",
    ),
    Gap(
        "7_inverse_cdf",
        "draw",
        check_sampler.check_draw,
        check_sampler.program_draw,
        ((sampler.sample, "cdf = ", "clamp("),),
        "Why is u in (0, 1] and not in [0, 1), which torch.rand gives? Try u = 0 with a first "
        "token of weight 0.",
    ),
    Gap(
        "8_decode_step",
        "decode_step",
        by(check_model.STEP),
        check_model.program_step,
        (model.KVCache.extend, model.KVCache.attend),
        "With padding on the left all rows would end at the same place. What would the positions "
        "and the mask be then, and what would be computed in vain?",
    ),
    Gap(
        "9_token_mean",
        "accumulate",
        by(check_loss.TOKEN_MEAN),
        check_loss.program_mean,
        (
            grpo.mean_loss,
            (grpo.update, "for batch in", "backward"),
            (grpo.token_losses, "return loss * mask", "return loss * mask"),
        ),
        "A group has one right rollout of 20 tokens and three wrong ones of 200. Which of them "
        "moves the weights most under the token mean, and which under a mean of rollouts?",
    ),
    Gap(
        "10_head_in_slices",
        "target_logprobs",
        check_model.check_target_logprobs,
        check_model.program_logprobs,
        (head.HeadLogprobs.forward, head.logit_slices),
        "One could also cut the N positions into slices. What would be read from memory more "
        "often then?",
    ),
    Gap(
        "11_parse_feedback",
        "parse_feedback",
        check_teacher.check_parse_feedback,
        teacher.parse_feedback,
        (teacher.parse_feedback,),
        "A reply that cannot be parsed leaves the rollout as it was. Why is that better for the "
        "training than to take what can be read?",
    ),
    Gap(
        "12_schedule",
        "guidance_fraction",
        by(check_teacher.FRACTION),
        check_teacher.program_fraction,
        (teacher.guidance_fraction,),
        "With p_init = 0.1, p_min = 0.01, eps = 0.05 and 60 steps: at which step does the teacher "
        "leave, and how many of 8 rollouts were helped in each step before?",
    ),
]


def main(file):
    """Check one exercise's file and say what came of it; status 1 if it is not right yet."""
    own = [gap for gap in GAPS if gap.exercise == Path(file).stem]
    if not own:
        why = f"{file}: an exercise's file must keep its name, such as {GAPS[0].exercise}.py"
        sys.exit(complain(why, 2))
    messages = verdicts(file, own)
    for gap, message in zip(own, messages):
        name = f"{gap.name} " if message or len(own) > 1 else ""
        print(f"{Path(file).name}: {name}{message or 'right'}")
    for gap, message in zip(own, messages):
        if not message:
            print(explained(gap))
    sys.exit(any(messages))


def verdicts(file, gaps):
    """For each gap of a file, None or what is wrong with its function."""
    try:
        module = calling.load(file)
    except calling.Wrong as wrong:
        return [str(wrong) for _ in gaps]
    return [verdict(gap, partial(calling.call, module)) for gap in gaps]


def verdict(gap, call, seed=0):
    """None if a gap's function is right. call(name, arguments) calls it, or raises Wrong."""
    try:
        return gap.check(lambda *arguments: call(gap.name, arguments), seed=seed)
    except calling.Wrong as wrong:
        return str(wrong)
    except Exception as error:  # the result is so odd that the check could not use it
        return f"gives what cannot be checked ({type(error).__name__}: {error})"


def explained(gap):
    """The program's own lines, and a question."""
    lines = ""
    for part in gap.shown:
        function, first, last = part if isinstance(part, tuple) else (part, None, None)
        name = f"{function.__module__}.{function.__qualname__}"
        lines += f"\nIn the program, {name}:\n\n"
        lines += textwrap.indent(source(function, first, last), "    ")
    question = textwrap.fill(f"To think about: {gap.question}", 100)
    return f"{lines}\n{question}"


def source(function, first=None, last=None):
    """A function's text, or its lines from the one with the word `first` to that with `last`."""
    lines = inspect.getsource(function).splitlines(keepends=True)
    if first:
        start = next(i for i, line in enumerate(lines) if first in line)
        end = next(i for i, line in enumerate(lines) if i >= start and last in line)
        lines = lines[start : end + 1]
    return textwrap.dedent("".join(lines))
