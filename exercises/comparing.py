"""Holding a solution against the program's own function, and telling a usual slip by its result."""

import torch


def compare(solution, right, cases, slips, parts, close=1e-5):
    """Hold tensors or tuples of them, named by `parts`, against `right`'s, case by case.

    slips: {hint: wrong function}.
    """
    for case in cases:
        found, expected = as_tuple(solution(*clone(case))), as_tuple(right(*clone(case)))
        if same(found, expected, close):
            continue
        for hint, wrong in slips.items():
            if same(found, as_tuple(wrong(*clone(case))), close):
                return hint
        return difference(found, expected, parts, close) + f"; the case was {show(case)}"
    return None


def clone(case):
    return [x.clone() if torch.is_tensor(x) else x for x in case]


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def same(found, expected, close):
    return len(found) == len(expected) and all(
        equal(a, b, close) for a, b in zip(found, expected, strict=True)
    )


def equal(a, b, close):
    return (
        torch.is_tensor(a)
        and a.shape == b.shape
        and torch.allclose(a.double(), b.double(), rtol=close, atol=close, equal_nan=True)
    )


def difference(found, expected, parts, close):
    if len(found) != len(expected):
        return (
            f"returns {len(found)} value(s); it should return {len(expected)}: {', '.join(parts)}"
        )
    for a, b, part in zip(found, expected, parts, strict=True):
        if not torch.is_tensor(a):
            return f"returns {a!r:.60} where {part} should be: a tensor of shape {tuple(b.shape)}"
        if a.shape != b.shape:
            return f"returns {part} of shape {tuple(a.shape)}; it should be {tuple(b.shape)}"
        if not equal(a, b, close):
            return f"gives {part} {show(a)}; right is {show(b)}"


def show(x):
    if torch.is_tensor(x):
        numbers = [f"{n:.4g}" for n in x.flatten().tolist()]
        return f"{tuple(x.shape)} [{', '.join(numbers[:12])}{', …' * (len(numbers) > 12)}]"
    return "; ".join(map(show, x)) if isinstance(x, (list, tuple)) else str(x)
