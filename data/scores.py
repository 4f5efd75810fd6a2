"""What a list of graded responses amounts to: accuracy, reflection, mean@k, pass@k, maj@k, with standard errors."""

import math

from data.reward import answers, equal, final_answer, is_correct


def score(records, samples=1, equal=equal) -> dict:
    """Accuracy and reflection of (problem, text, finished) records, `samples` in a row for each problem.

    Standard errors are over problems. With several samples `accuracy` is mean@k, and pass@k and maj@k join it.
    `equal(given, answer)` compares final answers: with the reference, and for maj@k with each other.
    """
    right = [finished and is_correct(text, p.answer, equal) for p, text, finished in records]
    first = [first_is_right(text, p.answer, equal) for p, text, _ in records]
    second = [reflects(text) for _, text, _ in records]
    groups = [right[i : i + samples] for i in range(0, len(right), samples)]
    accuracy, se = mean_and_se([sum(g) / samples for g in groups])

    def rate(where):
        return sum(s for s, w in zip(second, where) if w) / max(1, sum(where))

    scores = {
        "accuracy": accuracy, "accuracy_se": se, "reflection_rate": rate([True] * len(second)),
        "reflection_rate_first_wrong": rate([not f for f in first]), "reflection_rate_first_right": rate(first),
        "first_answer_accuracy": sum(first) / len(first),
        "wrong_to_right": sum(r and not f for r, f in zip(right, first)),
        "right_to_wrong": sum(f and not r for r, f in zip(right, first)),
        "finished": sum(f for _, _, f in records) / len(records),
    }
    if samples > 1:
        ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k < samples] + [samples]
        for k in ks:
            scores[f"pass@{k}"], scores[f"pass@{k}_se"] = mean_and_se([pass_at_k(samples, sum(g), k) for g in groups])
        votes = [majority(records[i : i + samples], equal) for i in range(0, len(records), samples)]
        scores[f"maj@{samples}"], scores[f"maj@{samples}_se"] = mean_and_se(votes)
    return scores


def mean_and_se(values) -> tuple[float, float]:
    """Mean and its standard error (Bessel's correction; 0 for a single value)."""
    mean = sum(values) / len(values)
    spread = sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
    return mean, math.sqrt(spread / len(values))


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate that at least one of k samples is right, from n of which `correct` were: 1 - C(n-c, k)/C(n, k)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(records, equal=equal) -> float:
    """1 if the commonest final answer of one problem's finished responses is right; the earlier one wins a tie."""
    votes = vote((text for _, text, finished in records if finished), equal)
    return float(bool(votes) and equal(votes[0][0], records[0][0].answer))


def vote(texts, equal=equal) -> list[tuple[str, int]]:
    """The final answers of `texts` and how often each was given: commonest first, earlier of a tie.

    An answer is counted with the first of the earlier kinds whose first member it equals, and is the
    first of a new kind if there is none. So it has one vote although `equal` is not transitive.
    """
    votes: dict[str, int] = {}
    for given in filter(None, map(final_answer, texts)):
        kind = next((first for first in votes if equal(given, first)), given)
        votes[kind] = votes.get(kind, 0) + 1
    return sorted(votes.items(), key=lambda kind: -kind[1])


def first_is_right(text: str, answer: str, equal=equal) -> bool:
    found = answers(text)
    return bool(found) and equal(found[0], answer)


def reflects(text: str) -> bool:
    """The response commits to an answer and then to another: more than one box that holds one."""
    return len(answers(text)) > 1
