"""Exercise 4: PPO's clipped loss, with a dual clip.

A token was sampled by π_old and is now weighed by π_θ; ρ = π_θ/π_old. The loss of one token, to be
minimised:

    ℓ = max(−Â·ρ, −Â·clip(ρ, 1 − ε, 1 + ε))
    if Â < 0:  ℓ = min(ℓ, −Â·c)

The max is pessimistic: once ρ has moved by more than ε in the direction that Â asks for, the loss
is flat and has no gradient. If ρ has moved in the other direction, the loss is not clipped. The
second line bounds what one token of a bad rollout can cost, whose ρ may be large.

Fill the gap, then run this file: python exercises/4_ppo_clip.py
"""


def clipped_loss(ratio, advantages, clip=0.2, dual_clip=3.0):
    """ratio ρ (B, T), advantages Â (B, 1) or (B, T) -> the loss of every token (B, T)."""
    raise NotImplementedError("your turn: the larger of two losses, bounded where Â < 0")


if __name__ == "__main__":
    from checks import main

    main(__file__)
