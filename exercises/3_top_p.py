"""Exercise 3: sampling with temperature and top-p.

    p = softmax(log p / temperature)

Top-p keeps the most probable tokens: go down from the most probable one until what is kept sums to
top_p or more (the token that gets you there is kept too), set the rest to 0, and let what is left
sum to 1 again. Then draw one token.

The random number is given: u, uniform in (0, 1]. Invert the cumulative distribution: the token
drawn is the first whose cumulative probability is at least u. Any order of the tokens will do, as
long as you return ids of the vocabulary.

Also return the token's log-probability at that temperature, before anything is cut off: log
softmax(log p / temperature). Training needs that one (π_old).

Fill the gap, then run this file: python exercises/3_top_p.py
"""


def sample(logits, uniform, temperature, top_p):
    """logits (B, V), uniform (B,) in (0, 1], temperature > 0, top_p in (0, 1] -> token ids (B,)
    int64, log-probabilities (B,).
    """
    raise NotImplementedError("your turn: keep the most probable tokens, draw one a row")


if __name__ == "__main__":
    from checks import main

    main(__file__)
