r"""Exercise 6: who gets help, and what help does to a rollout. Two gaps.

choose. Of each question's n finished rollouts k get help, picked at random without replacement:

    k = max(1, ⌊n·p⌋)

None where p is 0, and none of a question without a finished rollout. The rollouts of a step stand
in one list, question after question.

augment. The teacher has read the attempt o and answered with a reason and a phrase. The rollout
becomes

    ô = o without its end token ⊕ "\n\n" + reason + "\n\n" + phrase ⊕ end token

in place of o. The student's own ids stay as they were sampled: text that is decoded and encoded
again may get other ids. A rollout that would have more than max_tokens is left alone: cut off, it
would lose its end token and with it the reward. What was known of log π_old belongs to the old ids:
it must be computed again, so set it to None.

Fill the gaps, then run this file: python exercises/6_choose_and_augment.py
"""


def choose(finished, group_size, fraction, rng):
    """finished: list of bool, group_size of them a question; fraction p; rng: random.Random ->
    sorted indices into `finished`.
    """
    raise NotImplementedError("your turn: pick k of each question's finished rollouts")


def augment(rollout, feedback, tokenizer, max_tokens):
    """Change the rollout in place; returns whether it was changed.

    rollout.response: list of ids, the last of them the end token; rollout.guided_from: set it to
    the index in the new response where the teacher's ids begin; rollout.old_logprobs: set it to
    None. feedback.reason, feedback.phrase: str. tokenizer.encode(text) -> list of ids.
    """
    raise NotImplementedError("your turn: the teacher's words between attempt and end token")


if __name__ == "__main__":
    from checks import main

    main(__file__)
