"""Exercise 9: the token mean, when a mini-batch is too large for one pass.

The loss of a mini-batch is the mean over all its tokens, whichever rollout they belong to:

    loss = Σ ℓ / (number of tokens)

A mini-batch may be too large for the memory. Then it is cut into micro-batches. Each one goes
through the model alone, and its backward pass adds its part to the gradient. The gradient must be
that of the loss above, as if there were no cut. But the micro-batches have different numbers of
tokens.

mask says which places are tokens of a response. What ℓ is at the others means nothing.

Memory is saved only if one micro-batch's backward pass comes before the next one's forward pass.
The check looks at this, too.

Fill the gap, then run this file: python exercises/9_token_mean.py
"""


def accumulate(batches, forward):
    """batches: list of (inputs, mask), mask (B, T) bool, B and T different in each; forward(inputs)
    -> ℓ (B, T), a pass through the model.

    Calls backward() for each micro-batch; no optimizer step. Returns the loss, a float.
    """
    raise NotImplementedError("your turn: each micro-batch's part of the mean, and its gradient")


if __name__ == "__main__":
    from checks import main

    main(__file__)
