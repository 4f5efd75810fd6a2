"""Exercise 5: Advantage-Aware Shaping, and its gradient.

The teacher's words were not sampled by π_old, so ρ says nothing about them. ThinkTuning weighs them
by

    w = π_θ / (sg(π_θ) + γ(Â))                                              sg: stop-gradient
    γ(Â) = γ_min + (γ_max − γ_min)·(A_max − Â)/(A_max − A_min), kept between its two ends
    γ_min = 0.001, γ_max = −0.001, A_min = −4, A_max = 4

so that γ is 0.001 for the best rollouts, −0.001 for the worst. Two guards: where the denominator
sg(π) + γ is below 0 it becomes 1.0001·sg(π), where it is above 1 it becomes 0.9999·sg(π).

The check looks at w and at its gradient. Only the numerator has one, so

    ∇w = w·∇log π

What you get are log-probabilities; `logprobs.detach()` is sg(log π).

Fill the gap, then run this file: python exercises/5_shaped_ratio.py
"""


def shaped_ratio(logprobs, advantages):
    """log π_θ (B, T), advantages Â (B, 1) -> w (B, T), differentiable by logprobs."""
    raise NotImplementedError("your turn: gamma, the denominator with its guards, the weight")


if __name__ == "__main__":
    from checks import main

    main(__file__)
