"""Exercise 2: the KV cache, one step of it.

While a model writes, the keys and values of what it has read never change. So they are kept, and
for a new token only its own query, key and value are computed. With S tokens in the cache:

    keys′ = keys ⊕ k      values′ = values ⊕ v    (S + 1 positions, the new token among them)
    y = softmax(q·keys′ᵀ / √E) · values′

There are H query heads but only K key/value heads (grouped-query attention): query heads 0 … H/K −
1 read key/value head 0, the next H/K read head 1, and so on. Positions are dealt with already: q
and k come rotated.

Step by step this must give what attention over the whole sequence gives at its last position; the
check compares the two, and then has your function compute every layer of the program's own model.

Fill the gap, then run this file: python exercises/2_kv_cache.py
"""


def attend(q, k, v, keys, values):
    """One new token: q (B, H, 1, E), k and v (B, K, 1, E); the cache so far: keys and values (B, K,
    S, E), S may be 0.

    Returns y (B, H, 1, E), and the cache with the new token in it: keys and values (B, K, S + 1,
    E).
    """
    raise NotImplementedError("your turn: grow the cache by one position, then attend to all of it")


if __name__ == "__main__":
    from checks import main

    main(__file__)
