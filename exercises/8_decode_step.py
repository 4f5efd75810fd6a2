"""Exercise 8: one decoding step of rows that have different lengths.

Do exercise 2 first. There all rows of the cache were equally long. In a batch of responses they are
not: row b holds lengths[b] tokens, at the places 0 … lengths[b] − 1. What stands in the places
behind them is left over from earlier responses, and must not be read. The keys and values have S
places, enough for one token more in each row. The step changes them in place.

For the new token of row b:

    it stands at place lengths[b], which is its position, too
    its query and its key are turned by that position (rotary positions), before the key is stored
    it sees the places 0 … lengths[b]

Attention itself is that of exercise 2: scores divided by √E, a softmax, and H query heads that
share K key/value heads: H/K neighbouring query heads read the same one.

Fill the gap, then run this file: python exercises/8_decode_step.py
"""


def decode_step(q, k, v, keys, values, lengths, turn):
    """q (B, H, 1, E), k and v (B, K, 1, E), not turned yet; keys and values (B, K, S, E), in which
    the new k and v are to be written; lengths (B,) int64.

    turn(x, positions): x (B, any number of heads, 1, E) turned by positions (B, 1).
    Returns y (B, H, 1, E).
    """
    raise NotImplementedError("your turn: turn, store, hide what is not the row's own, attend")


if __name__ == "__main__":
    from checks import main

    main(__file__)
