"""Exercise 10: log-probabilities without the full logits.

The output head has a row for each of the V tokens of the vocabulary. At a position with the state
h, the logits are z = head · h, and the log-probability of the target y is

    log p(y) = z_y − log Σ e^z          the sum goes over the whole vocabulary

With a vocabulary of 128,256 tokens the logits of 16,384 positions take 8.4 GB. They need not exist
all at once: go through the head `size` rows at a time, and keep two numbers for each position, z_y
and the log Σ e^z of the rows so far. The check looks for a tensor of N · V numbers.

The forward pass is enough. A gradient is optional: if your result has one, it is checked, too.

Fill the gap, then run this file: python exercises/10_head_in_slices.py
"""


def target_logprobs(states, weight, targets, size):
    """states (N, D), weight of the head (V, D), targets (N,) int64; size: rows of the head in a
    slice (V is not always a multiple of it) -> log p of each target (N,).
    """
    raise NotImplementedError("your turn: z of the target and log Σ e^z, slice by slice")


if __name__ == "__main__":
    from checks import main

    main(__file__)
