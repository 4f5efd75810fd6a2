"""Exercise 7: drawing a token from one uniform number.

A sampler has a weight for each token of the vocabulary, and one random number u, uniform in (0, 1].
With the cumulative sums c_1 ≤ c_2 ≤ … ≤ c_V of a row's weights, the token drawn is

    the first token i with c_i ≥ u · c_V

so each token is drawn with a probability in proportion to its weight. The weights of a row need not
sum to 1. Some are 0, and such a token is never drawn.

All random numbers of a batch are made at once, before the sampling begins. So a response does not
depend on its neighbours in the batch, and the same seed gives the same responses.

Fill the gap, then run this file: python exercises/7_inverse_cdf.py
"""


def draw(weights, uniform):
    """weights (B, V), 0 or more, at least one of a row above 0; uniform (B,) in (0, 1] -> token ids
    (B,) int64.
    """
    raise NotImplementedError("your turn: one token a row, where the cumulative sum reaches u")


if __name__ == "__main__":
    from checks import main

    main(__file__)
