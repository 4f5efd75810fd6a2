"""Scores of graded responses: accuracy, reflection, mean@k, pass@k, maj@k, with standard errors."""

import math

from data.reward import answers, equal, final_answer, is_correct


def score(records, samples=1, equal=equal) -> dict:
    """Accuracy and reflection of (problem, text, finished) records, `samples` in a row per problem.

    Standard errors are over problems. With several samples `accuracy` is mean@k, and pass@k and
    maj@k are added. `equal(given, answer)` compares a final answer with the reference, and final
    answers with each other for the votes of maj@k.
    """
    right = [finished and is_correct(text, p.answer, equal) for p, text, finished in records]
    first_right = [first_is_right(text, p.answer, equal) for p, text, _ in records]
    first_wrong = [not first for first in first_right]
    reflecting = [reflects(text) for _, text, _ in records]
    correct = [sum(group) for group in in_groups(right, samples)]  # right responses a problem
    accuracy, se = mean_and_se([c / samples for c in correct])
    scores = {
        "accuracy": accuracy,
        "accuracy_se": se,
        "reflection_rate": sum(reflecting) / max(1, len(records)),
        "reflection_rate_first_wrong": share_among(reflecting, first_wrong),
        "reflection_rate_first_right": share_among(reflecting, first_right),
        "first_answer_accuracy": sum(first_right) / len(records),
        "wrong_to_right": sum(last and not first for last, first in zip(right, first_right)),
        "right_to_wrong": sum(first and not last for last, first in zip(right, first_right)),
        "finished": sum(finished for _, _, finished in records) / len(records),
    }
    if samples > 1:
        for k in sorted({1, 2, 4, 8, 16, 32, 64, samples}):
            if k <= samples:
                estimates = [pass_at_k(samples, c, k) for c in correct]
                scores[f"pass@{k}"], scores[f"pass@{k}_se"] = mean_and_se(estimates)
        votes = [majority(group, equal) for group in in_groups(records, samples)]
        scores[f"maj@{samples}"], scores[f"maj@{samples}_se"] = mean_and_se(votes)
    return scores


def in_groups(items, size) -> list:
    return [items[start : start + size] for start in range(0, len(items), size)]


def share_among(flags, selected) -> float:
    """The share of set flags among those that are selected; 0 if none is."""
    both = sum(flag for flag, is_selected in zip(flags, selected) if is_selected)
    return both / max(1, sum(selected))


def mean_and_se(values) -> tuple[float, float]:
    """Mean and its standard error (Bessel's correction; 0 for a single value)."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def pass_at_k(n: int, correct: int, k: int) -> float:
    """An unbiased estimate that at least one of k samples is right, if `correct` of n were.

    It is 1 - C(n - correct, k) / C(n, k).
    """
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(records, equal=equal) -> float:
    """1 if the most common final answer of a problem's finished responses is right, else 0.

    Of two equally common answers the earlier one counts.
    """
    votes = vote((text for _, text, finished in records if finished), equal)
    if not votes:
        return 0.0
    (answer, _), problem = votes[0], records[0][0]
    return float(equal(answer, problem.answer))


def vote(texts, equal=equal) -> list[tuple[str, int]]:
    """The final answers of `texts` and how often each was given, the most common first.

    An answer is counted under the first earlier answer that it equals, or else under itself. So
    each text has one vote although `equal` is not transitive. The earlier of a tie comes first.
    """
    votes: dict[str, int] = {}
    for given in filter(None, map(final_answer, texts)):
        counted_as = given
        for earlier in votes:
            if equal(given, earlier):
                counted_as = earlier
                break
        votes[counted_as] = votes.get(counted_as, 0) + 1
    return sorted(votes.items(), key=lambda item: -item[1])


def first_is_right(text: str, answer: str, equal=equal) -> bool:
    found = answers(text)
    return bool(found) and equal(found[0], answer)


def reflects(text: str) -> bool:
    """The response gives an answer and then another: it has several boxes that are not empty."""
    return len(answers(text)) > 1
