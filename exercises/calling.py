"""Call a gap's function on plain data: tensors, numbers, texts, None, lists and tuples of them.

A submission's own process runs this file and none of the checks (remote.py): it knows no right
answer.
"""

import importlib.util
import itertools
import random
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

from data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.builtin()


class Wrong(Exception):
    """A solution gave no result; the text says why."""


def load(file):
    """The module in a file; its name is the file's, without .py."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise Wrong(f"cannot be loaded: {told(error, str(file))}") from error
    return module


def call(module, name, arguments):
    """What a gap's function gives, as its observer sees it. Raises Wrong."""
    function = getattr(module, name, None)
    if not callable(function):
        raise Wrong("is missing: the file has no function of this name")
    try:
        return observe(name, function)(*arguments)
    except NotImplementedError as error:
        raise Wrong(f"not filled in yet: {error}") from error
    # Whatever a first attempt may raise: its author needs the name and the line.
    except (Exception, SystemExit) as error:
        code = getattr(function, "__code__", None)
        raise Wrong(f"stops with {told(error, code and code.co_filename)}") from error


HINTS = {  # part of an error of torch's: what its author has usually forgotten
    "must match the size of tensor": "shapes do not fit; does a mean or std need keepdim=True?",
    "Boolean value of Tensor": "Python's max, min and if take one number; torch.maximum, "
    "torch.minimum and torch.where take each element",
}


def told(error, file):
    """An error, the line of a file where it came up, and what may help."""
    lines, trace = [], error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == file:
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    message = str(error)
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
        message = error.msg
    hints = [hint for part, hint in HINTS.items() if part in message]
    place = f" (line {lines[-1]})" if lines else ""
    return ": ".join([f"{type(error).__name__}: {message}{place}", *hints])


def observe(name, function):
    """The function of plain data that shows what the gap `name` does."""
    return OBSERVERS.get(name, lambda function: function)(function)


# The observers: from a gap's function to one of plain data.


def with_gradient(shaped_ratio):
    """log π, Â -> w, and the gradient of Σ w by log π."""

    def both(logprobs, advantages):
        leaf = logprobs.requires_grad_()
        w = shaped_ratio(leaf, advantages)
        if not torch.is_tensor(w):
            return w
        slope = torch.autograd.grad(w.sum(), leaf)[0] if w.requires_grad else torch.zeros_like(leaf)
        return w.detach(), slope

    return both


def seeded(choose):
    """The random numbers as their seed."""
    return lambda finished, size, fraction, seed: choose(
        finished, size, fraction, random.Random(seed)
    )


def augmented(augment):
    """A rollout before and after: response, guided_from, old_logprobs, and what was returned."""

    def run(response, reason, phrase, max_tokens):
        rollout = SimpleNamespace(
            prompt=[1, 2],
            response=response,
            finished=True,
            guided_from=None,
            old_logprobs=[-0.5] * len(response),
        )
        feedback = SimpleNamespace(opinion="incorrect", reason=reason, phrase=phrase)
        changed = augment(rollout, feedback, TOKENIZER, max_tokens)
        return rollout.response, rollout.guided_from, rollout.old_logprobs, bool(changed)

    return run


def turn(x, positions):
    """Rotary positions: x (B, heads, 1, E), positions (B, 1); neighbours in E are a pair."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())  # (B, heads, 1, E/2)
    angles = positions[:, None, :, None] * 0.5 ** torch.arange(pairs.shape[-1])
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


def one_step(step):
    """The step's y, and the cache that it leaves behind."""

    def run(q, k, v, keys, values, lengths):
        y = step(q, k, v, keys, values, lengths, turn)
        return y, keys, values

    return run


def accumulated(accumulate):
    """The gradient it leaves, the loss it returns, and how many passes it kept at once.

    weights (D,); batches of features (B, T, D) and mask (B, T). ℓ = (features · weights)².
    """

    def run(weights, batches):
        weights.requires_grad_()
        kept, most, numbers = set(), 0, itertools.count()

        def forward(features):
            nonlocal most
            losses = (features @ weights) ** 2
            number = next(numbers)
            kept.add(number)
            most = max(most, len(kept))
            losses.register_hook(lambda _: kept.discard(number))  # called by backward()
            return losses

        loss = accumulate(batches, forward)
        if torch.is_tensor(loss) and loss.numel() == 1:
            loss = loss.item()
        gradient = torch.zeros_like(weights) if weights.grad is None else weights.grad
        loss = torch.tensor(loss).double() if isinstance(loss, (int, float)) else loss
        return gradient, loss, most

    return run


class Largest(TorchFunctionMode):
    """Within it, how many numbers the largest tensor has that torch returned."""

    numbers = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (list, tuple)) else [result]:
            if torch.is_tensor(x):
                self.numbers = max(self.numbers, x.numel())
        return result


def without_logits(logprobs):
    """log p (N,), whether all (N, V) logits were made at once, and Σ log p's gradient or None."""

    def run(states, weight, targets, size):
        leaf = states.requires_grad_()
        with Largest() as largest:
            result = logprobs(leaf, weight, targets, size)
        whole = largest.numbers >= len(states) * len(weight)
        if not torch.is_tensor(result):
            return result, whole, None
        slope = torch.autograd.grad(result.sum(), leaf)[0] if result.requires_grad else None
        return result.detach(), whole, slope

    return run


def over_the_steps(guidance_fraction):
    """p_s of every step of a training, (S,) float64."""

    def run(total_steps, *settings):
        steps = [guidance_fraction(step, total_steps, *settings) for step in range(total_steps)]
        if not all(isinstance(p, (int, float)) for p in steps):
            return steps
        return torch.tensor(steps, dtype=torch.float64)

    return run


OBSERVERS = {
    "shaped_ratio": with_gradient,
    "choose": seeded,
    "augment": augmented,
    "decode_step": one_step,
    "accumulate": accumulated,
    "target_logprobs": without_logits,
    "guidance_fraction": over_the_steps,
}
