"""Scores of an evaluation: means, pass@k, votes, and what a second answer changed."""

from itertools import combinations

import pytest

from data import Problem
from data.scores import majority, mean_and_se, pass_at_k, score


def record(answer, *boxes, finished=True):
    return Problem("q", answer), " ".join(f"\\boxed{{{b}}}" for b in boxes), finished


def test_score_separates_first_answers_from_final_ones():
    scores = score(
        [
            record("1", 1),
            record("1", 2),
            record("1", 2, 1),
            record("1", 1, 2),
            record("1", 1, finished=False),
        ]
    )
    assert scores["accuracy"] == 2 / 5 and scores["first_answer_accuracy"] == 3 / 5
    assert (scores["wrong_to_right"], scores["right_to_wrong"]) == (
        1,
        2,
    )  # unfinished counts as wrong
    assert scores["reflection_rate"] == 2 / 5
    assert (
        scores["reflection_rate_first_wrong"] == 1 / 2
        and scores["reflection_rate_first_right"] == 1 / 3
    )
    assert scores["accuracy_se"] == pytest.approx((0.3 / 5) ** 0.5)


def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_answer():
    for n, c, k in ((5, 2, 3), (6, 0, 2), (6, 6, 1), (4, 1, 4)):
        subsets = list(combinations(range(n), k))
        assert pass_at_k(n, c, k) == pytest.approx(
            sum(any(i < c for i in s) for s in subsets) / len(subsets)
        )


def test_majority_votes_by_value_and_ignores_unfinished_responses():
    assert majority([record("7", "7.0"), record("7", "8"), record("7", "7")]) == 1
    assert majority([record("7", "8"), record("7", "8.0"), record("7", "7")]) == 0
    assert (
        majority(
            [record("7", "7"), record("7", "8", finished=False), record("7", "8", finished=False)]
        )
        == 1
    )
    assert majority([record("7")]) == 0


def test_every_score_of_an_evaluation_comes_from_the_same_grader():
    def lenient(given, answer):
        return given.lower() == answer.lower()

    records = [record("a", "A"), record("a", "b", "A"), record("a", "A", "b")]
    strict, found = score(records, 3), score(records, 3, lenient)
    assert (
        strict["accuracy"],
        strict["first_answer_accuracy"],
        strict["pass@3"],
        strict["maj@3"],
    ) == (0, 0, 0, 0)
    assert (found["accuracy"], found["first_answer_accuracy"], found["pass@3"], found["maj@3"]) == (
        2 / 3,
        2 / 3,
        1,
        1,
    )
    assert (found["wrong_to_right"], found["right_to_wrong"]) == (1, 1)


def test_mean_and_se_are_those_of_the_textbook():
    assert mean_and_se([1.0, 0.0, 1.0, 1.0]) == (0.75, pytest.approx((0.25 / 4) ** 0.5))
    assert mean_and_se([0.3]) == (0.3, 0.0)
