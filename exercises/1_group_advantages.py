"""Exercise 1: group advantages.

Of each question G rollouts were sampled, and each has a reward r_i. GRPO asks no critic how good a
rollout is: it compares it with the others of its group.

    Â_i = (r_i − mean r) / (std r + 1e-6)

mean and std are taken over the G rewards of the same question, and the std is that of a sample
(G − 1 in its denominator). Where all rewards of a group are equal, Â is 0.

Fill the gap, then run this file: python exercises/1_group_advantages.py
"""


def group_advantages(rewards):
    """rewards: (Q, G) float tensor, a row for each question -> advantages (Q, G)."""
    raise NotImplementedError("your turn: the advantage of every rollout within its own row")


if __name__ == "__main__":
    from checks import main

    main(__file__)
