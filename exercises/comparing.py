"""Hold a solution against the program's own function, and name a usual mistake by its result.

Each gap's function is written once more, as a *variant* with options: without options it is right,
and each usual mistake is a setting of the options. So two mistakes at once can be named, too.
"""

from collections.abc import Callable
from functools import partial
from itertools import combinations, islice
from typing import NamedTuple

import torch
from calling import observe

SHOWN = 12  # a message shows the numbers of tensors that have no more


class Task(NamedTuple):
    """What `compare` needs to know about a gap."""

    name: str  # the gap's function; `right` and `variant` are called as it is
    right: Callable  # the program's own
    variant: Callable  # the same by hand, with options
    slips: dict[str, dict]  # what is said about a usual mistake: the options that make it
    cases: Callable  # torch.Generator -> lists of arguments
    inputs: str  # the arguments' names
    parts: str  # the results' names, separated by commas
    close: float = 1e-5
    elementwise: bool = False  # an element of the result depends on that element of the inputs
    look: Callable = lambda solution: solution  # what is compared, if it is not the results


def compare(solution, task, seed):
    """What is wrong with a solution, or None. It takes and returns plain data (calling.py)."""
    cases = task.cases(torch.Generator().manual_seed(seed))

    def results(function, i):
        return as_tuple(task.look(function)(*clone(cases[i])))

    found = [results(solution, i) for i in range(len(cases))]
    right = [results(observe(task.name, task.right), i) for i in range(len(cases))]
    wrong = [i for i in range(len(cases)) if not same(found[i], right[i], task.close)]
    if not wrong:
        return None
    everywhere = sorted(range(len(cases)), key=lambda i: i not in wrong)  # the wrong ones first
    one, two = combinations(task.slips, 1), combinations(task.slips, 2)
    # Most convincing first: a mistake that explains all cases, two that do, one for a single case.
    for hints, where in (
        *((hints, everywhere) for hints in (*one, *two)),
        *(([hint], [i]) for i in wrong for hint in task.slips),
    ):
        if options := together(hints, task.slips):
            slip = observe(task.name, partial(task.variant, **options))
            if all(same(found[i], results(slip, i), task.close) for i in where):
                return joined(hints)
    first = wrong[0]
    return difference(found[first], right[first], cases[first], task)


def together(hints, slips):
    """The options of these slips; None where two of them set the same option."""
    options = [slips[hint] for hint in hints]
    merged = {name: value for some in options for name, value in some.items()}
    return merged if len(merged) == sum(map(len, options)) else None


def joined(hints):
    """One message of at most two different hints; None if there is none."""
    hints = list(islice(dict.fromkeys(hints), 2))
    if len(hints) == 2:
        return f"makes more than one mistake. First, it {hints[0]}. Second, it {hints[1]}"
    return hints[0] if hints else None


def clone(case):
    if isinstance(case, (list, tuple)):
        return type(case)(map(clone, case))
    return case.clone() if torch.is_tensor(case) else case


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def same(found, expected, close):
    if len(found) != len(expected):
        return False
    return all(equal(a, b, close) for a, b in zip(found, expected))


def equal(a, b, close):
    if not torch.is_tensor(b):
        return type(a) is type(b) and a == b
    return fits(a, b) and not unequal(a, b, close).any()


def fits(a, b):
    """Whether it is a tensor of the shape, and where ids are asked for, of their type."""
    if not torch.is_tensor(a) or a.shape != b.shape:
        return False
    return b.is_floating_point() or a.dtype == b.dtype


def unequal(a, b, close):
    """Where two tensors of one shape differ."""
    return ~torch.isclose(a.double(), b.double(), rtol=close, atol=close, equal_nan=True)


def difference(found, expected, case, task):
    """The first element that differs, with its inputs."""
    parts = task.parts.split(", ")
    if len(found) != len(expected):
        return f"returns {len(found)} value(s); it should return {len(expected)}: {task.parts}"
    for a, b, part in zip(found, expected, parts):
        if equal(a, b, task.close):
            continue
        at = ()
        if torch.is_tensor(b):
            if not fits(a, b):
                return misfit(a, b, part)
            wrong = unequal(a, b, task.close)
            at = tuple(wrong.nonzero()[0].tolist())
            count = f" ({int(wrong.sum())} of {b.numel()} numbers differ)"
            part += str(list(at)) if at else ""
            a, b = a[at], b[at]
        elif isinstance(a, list) and isinstance(b, list):
            i = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
            count = f" (it has {len(a)} entries; right are {len(b)})"
            part += f"[{i}]"
            a, b = (x[i] if i < len(x) else "missing" for x in (a, b))
        else:
            count = ""
        return f"gives {part} = {show(a)}; right is {show(b)}{count}. {inputs(case, at, task)}"
    return None


def misfit(a, b, part):
    shape = tuple(b.shape)
    if not torch.is_tensor(a):
        return f"returns {a!r:.60} where {part} should be: a tensor of shape {shape}"
    if a.shape != b.shape:
        return f"returns {part} of shape {tuple(a.shape)}; it should be {shape}"
    return f"returns {part} as {a.dtype}; it should be {b.dtype}"


def inputs(case, at, task):
    """The arguments behind the element `at`: itself, or its row where they are long."""
    shown = []
    for name, x in zip(task.inputs.split(), case):
        if at and torch.is_tensor(x):
            if task.elementwise:
                place = [i if n > 1 else 0 for i, n in zip(at, x.shape)]
                name, x = f"{name}{place}", x[tuple(place)]
            elif x.numel() > SHOWN and at[0] < len(x):
                name, x = f"{name}[{at[0]}]", x[at[0]]
        shown.append(f"{name} = {show(x)}")
    return "The inputs: " + ", ".join(shown)


def show(x):
    if isinstance(x, (list, tuple)):
        return f"[{', '.join(map(show, x))}]" if len(x) <= SHOWN else f"a list of {len(x)}"
    if not torch.is_tensor(x):
        return f"{x:.6g}" if isinstance(x, float) else f"{x!r:.120}"
    if x.dim() == 0:
        return f"{x.item():.6g}"
    if x.numel() > SHOWN:
        return f"a tensor of shape {tuple(x.shape)}"
    return f"{tuple(x.shape)} [{', '.join(f'{n:.4g}' for n in x.flatten().tolist())}]"
