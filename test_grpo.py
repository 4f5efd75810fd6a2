"""Tests of grpo.py. The references work in plain Python, one float64 token at a time, from the paper, not the code."""

import copy
import math
import random
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grpo
from grpo import (
    NOTHING,
    LossSettings,
    MasterAdamW,
    Rollout,
    collate,
    group_advantages,
    guard_c,
    policy_loss,
    shaped_ratio,
    shaping_coefficient,
    snapshot,
    token_logprobs,
    update,
)
from model import LM, ModelConfig
from run.batches import micro_batches
from sampler import generate

PROPERTY = settings(max_examples=100, deadline=None)
GARBAGE = (math.nan, math.inf, -math.inf, 1e30, -7.0)


# ------------------------------------------------------------------ the paper's loss, a token at a time


def reference_gamma(a):
    gamma = 0.001 + (-0.001 - 0.001) * (4 - a) / (4 - -4)
    return max(-0.001, min(0.001, gamma))


def reference_w(pi, a):
    if pi + reference_gamma(a) < 0:
        return 1 / 1.0001
    if pi + reference_gamma(a) > 1:
        return 1 / 0.9999
    return pi / (pi + reference_gamma(a))


def is_shaped(logp, a, guided):
    return guided and not (a < 0 and math.exp(logp) < 0.01)  # guard (c)


def reference_token(logp, old, a, guided, eps=0.2, c=3.0, kl_coef=0.0, ref=0.0):
    """(loss, its derivative by log π) of one token."""
    rho = math.exp(logp - old)
    if is_shaped(logp, a, guided):
        w = reference_w(math.exp(logp), a)
        loss, slope = -a * w, -a * w  # ∇w = w∇log π: the denominator is held fixed
    else:
        clipped = -a * min(max(rho, 1 - eps), 1 + eps)
        loss, slope = (-a * rho, -a * rho) if -a * rho >= clipped else (clipped, 0.0)
        if a < 0 and c is not None and loss > -a * c:
            loss, slope = -a * c, 0.0
    if kl_coef:
        k = ref - logp
        loss, slope = loss + kl_coef * (math.exp(k) - 1 - k), slope + kl_coef * (1 - math.exp(k))
    return loss, slope


def reference_loss(logp, old, a, mask, guided, **options):
    """Token-mean loss and its gradient by log π, from lists of lists."""
    n = sum(map(sum, mask))
    total, slopes = 0.0, [[0.0] * len(row) for row in mask]
    for i, row in enumerate(mask):
        for t, inside in enumerate(row):
            if inside:
                loss, slope = reference_token(logp[i][t], old[i][t], a[i], guided[i][t], **options)
                total, slopes[i][t] = total + loss / n, slope / n
    return total, slopes


@st.composite
def batches(draw, rows=4, width=5):
    """A batch as a dict of float64 tensors, probabilities thick around the guards' thresholds."""
    B, T = draw(st.integers(1, rows)), draw(st.integers(1, width))
    rng = random.Random(draw(st.integers(0, 2**32)))
    grid = lambda f: [[f() for _ in range(T)] for _ in range(B)]
    logp = grid(lambda: math.log(rng.choice((1e-6, 1e-3, 1e-2, 0.3, 1.0)) * rng.uniform(0.3, 1)))
    mask = grid(lambda: rng.random() < 0.7)
    mask[0][0] = True
    return dict(
        logprobs=torch.tensor(logp, dtype=torch.float64),
        mask=torch.tensor(mask),
        old_logprobs=torch.tensor(
            [[x - rng.gauss(0, 1) for x in row] for row in logp], dtype=torch.float64
        ),
        advantages=torch.tensor(
            [[rng.choice((0.0, rng.uniform(-6, 6)))] for _ in range(B)], dtype=torch.float64
        ),
        guided=torch.tensor(grid(lambda: rng.random() < 0.5)),
    )


def loss_and_gradient(batch, **options):
    leaf = batch["logprobs"].clone().requires_grad_()
    loss, metrics = policy_loss(**{**batch, "logprobs": leaf}, **options)
    loss.backward()
    return loss.detach(), leaf.grad, metrics


def as_lists(batch):
    return (
        batch["logprobs"].tolist(),
        batch["old_logprobs"].tolist(),
        batch["advantages"].flatten().tolist(),
        batch["mask"].tolist(),
        batch["guided"].tolist(),
    )


def one_token(logp, advantage, old=None, guided=True, **options):
    batch = dict(
        logprobs=torch.tensor([[logp]]),
        old_logprobs=torch.tensor([[logp if old is None else old]]),
        advantages=torch.tensor([[advantage]]),
        mask=torch.ones(1, 1),
        guided=torch.tensor([[guided]]),
    )
    loss, gradient, _ = loss_and_gradient(batch, **options)
    return loss.item(), gradient.item()


# ------------------------------------------------------------------ advantages


@PROPERTY
@given(st.lists(st.lists(st.floats(-5, 5), min_size=4, max_size=4), min_size=1, max_size=3))
def test_advantages_are_z_scores_with_bessels_correction(rewards):
    found = group_advantages(torch.tensor(rewards, dtype=torch.float64))
    for row, group in zip(found.tolist(), rewards):
        mean, std = statistics.fmean(group), statistics.stdev(group)
        assert row == pytest.approx([(r - mean) / (std + 1e-6) for r in group], abs=1e-6)


def test_one_right_answer_in_two_has_the_advantage_of_one_over_root_two():
    assert group_advantages(torch.tensor([[1.0, 0.0]])).tolist()[0] == pytest.approx(
        [0.5**0.5, -(0.5**0.5)], abs=1e-5
    )


@PROPERTY
@given(st.sampled_from((0.0, 1.0)), st.integers(1, 9))
def test_equal_rewards_teach_nothing(reward, group):
    assert (group_advantages(torch.full((2, group), reward)) == 0).all()


def test_equal_rewards_teach_nothing_even_where_their_mean_is_rounded():
    assert (group_advantages(torch.full((1, 7), 0.7)) == 0).all()


def test_groups_do_not_see_each_other():
    rewards = torch.tensor([[1.0, 0, 0], [1, 1, 0]])
    assert torch.equal(group_advantages(rewards)[1:], group_advantages(rewards[1:]))


# ------------------------------------------------------------------ the shaping coefficient and the shaped weight


@PROPERTY
@given(st.floats(-9, 9))
def test_gamma_is_the_formula_kept_between_its_ends(a):
    assert shaping_coefficient(torch.tensor(a, dtype=torch.float64)).item() == pytest.approx(
        reference_gamma(a), abs=1e-15
    )


@pytest.mark.parametrize(
    "a, gamma",
    [
        (4.0, 0.001),
        (0.0, 0.0),
        (2.0, 0.0005),
        (-2.0, -0.0005),
        (-4.0, -0.001),
        (100.0, 0.001),
        (-100.0, -0.001),
    ],
)
def test_gamma_is_positive_for_good_rollouts_and_ends_at_four(a, gamma):
    assert shaping_coefficient(torch.tensor(a, dtype=torch.float64)).item() == pytest.approx(
        gamma, abs=1e-15
    )


@PROPERTY
@given(st.floats(1e-7, 1.0), st.floats(-6, 6))
def test_the_shaped_weight_is_the_formula_with_its_guards(pi, a):
    w = shaped_ratio(
        torch.tensor([[math.log(pi)]], dtype=torch.float64),
        torch.tensor([[a]], dtype=torch.float64),
    )
    assert w.item() == pytest.approx(reference_w(math.exp(math.log(pi)), a), rel=1e-9)


@pytest.mark.parametrize(
    "pi, a, w",
    [
        (0.5, 4.0, 0.5 / 0.501),
        (0.001, 4.0, 0.5),
        (0.0005, 2.0, 0.5),
        (0.002, -4.0, 2.0),
        (0.3, 0.0, 1.0),
        (0.0005, -4.0, 1 / 1.0001),  # guard (a)
        (0.9999, 4.0, 1 / 0.9999),  # guard (b)
    ],
)
def test_a_rare_token_of_a_good_rollout_is_learned_gently_and_of_a_bad_one_harder(pi, a, w):
    found = shaped_ratio(
        torch.tensor([[math.log(pi)]], dtype=torch.float64),
        torch.tensor([[a]], dtype=torch.float64),
    )
    assert found.item() == pytest.approx(w)


@pytest.mark.parametrize("a", (-3.0, 0.0, 3.0))
@pytest.mark.parametrize("shift", (-8.0, -5.0, 0.0, 6.0))
def test_the_gradient_of_w_is_pi_over_pi_plus_gamma_times_that_of_log_pi(a, shift):
    logits = [shift, 0.3, -0.2, 1.1]

    def pi(first):
        weights = [math.exp(z) for z in [first, *logits[1:]]]
        return weights[0] / sum(weights)

    leaf = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    shaped_ratio(
        leaf.log_softmax(0)[:1][None], torch.tensor([[a]], dtype=torch.float64)
    ).sum().backward()
    h = 1e-4
    slope = (math.log(pi(shift + h)) - math.log(pi(shift - h))) / (
        2 * h
    )  # of log π, by its first logit
    assert leaf.grad[0].item() == pytest.approx(reference_w(pi(shift), a) * slope, rel=1e-5)


@pytest.mark.parametrize("a", (-5.0, 0.0, 5.0))
def test_the_weight_stays_finite_where_pi_underflows(a):
    logp = torch.tensor([[-1e4, -200.0, -104.0, -90.0, 0.0]], requires_grad=True)
    w = shaped_ratio(logp, torch.full((1, 1), a))
    w.sum().backward()
    assert w.isfinite().all() and logp.grad.isfinite().all() and (w >= 0).all()


# ------------------------------------------------------------------ the loss


@PROPERTY
@given(batches())
def test_the_loss_and_its_gradient_are_those_of_the_method(batch):
    loss, gradient, metrics = loss_and_gradient(batch)
    expected, slopes = reference_loss(*as_lists(batch))
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12) == metrics["loss"]
    torch.testing.assert_close(
        gradient, torch.tensor(slopes, dtype=torch.float64), rtol=1e-8, atol=1e-12
    )


@PROPERTY
@given(batches())
def test_metrics_are_means_over_the_tokens_they_name(batch):
    logp, old, a, mask, guided = as_lists(batch)
    _, _, metrics = loss_and_gradient(batch)
    tokens = [
        (logp[i][t], old[i][t], a[i], guided[i][t])
        for i, row in enumerate(mask)
        for t, m in enumerate(row)
        if m
    ]
    ordinary = [(math.exp(p - o), x) for p, o, x, g in tokens if not is_shaped(p, x, g)]
    guided_ones = [(math.exp(p), x) for p, _, x, g in tokens if g]
    shaped = [(math.exp(p), x) for p, _, x, g in tokens if is_shaped(p, x, g)]
    ratios = [p - o for p, o, _, g in tokens if not g]  # π_old did not draw the guided ones
    outside = [(x > 0 and rho > 1.2) or (x < 0 and rho < 0.8) for rho, x in ordinary]
    mean = lambda values: sum(values) / max(1, len(values))
    assert metrics["kl_old"] == pytest.approx(
        mean([math.exp(r) - 1 - r for r in ratios]), rel=1e-6, abs=1e-9
    )
    assert metrics["guided_share"] == pytest.approx(len(guided_ones) / len(tokens))
    assert metrics["shaped_share"] == pytest.approx(1 - len(ordinary) / len(tokens))
    assert metrics["w_guided"] == pytest.approx(
        mean([reference_w(pi, x) for pi, x in shaped]), rel=1e-6
    )
    assert metrics["pi_guided"] == pytest.approx(mean([pi for pi, _ in guided_ones]), rel=1e-6)
    assert metrics["clip_fraction"] == pytest.approx(sum(outside) / len(tokens))
    assert metrics["dual_clip_fraction"] == pytest.approx(
        sum(x < 0 and rho > 3 for rho, x in ordinary) / len(tokens)
    )


@pytest.mark.parametrize("shaping", ["ratio", "likelihood"])
def test_only_aas_has_a_weight_to_report(shaping):
    here, advantages = torch.ones(1, 2), torch.ones(1, 1)
    logprobs = torch.full((1, 2), -1.0)
    _, metrics = policy_loss(logprobs, logprobs, advantages, here, guided=here, shaping=shaping)
    assert "w_guided" not in metrics and metrics["guided_share"] == 1


@pytest.mark.parametrize(
    "advantage, rho, loss, slope",
    [
        (2.0, 1.1, -2.2, -2.2),
        (2.0, 1.5, -2.4, 0.0),
        (2.0, 0.5, -1.0, -1.0),  # a good token: no further up than 1 + ε
        (-2.0, 0.9, 1.8, 1.8),
        (-2.0, 0.5, 1.6, 0.0),
        (-2.0, 1.5, 3.0, 3.0),  # a bad one: no further down than 1 − ε
        (-2.0, 10.0, 6.0, 0.0),  # nor by more than c
    ],
)
def test_an_ordinary_token_is_clipped_pessimistically_and_dual_clipped_when_bad(
    advantage, rho, loss, slope
):
    assert one_token(-3.0, advantage, -3.0 - math.log(rho), guided=False) == pytest.approx(
        (loss, slope), rel=1e-5, abs=1e-7
    )


def test_clip_and_dual_clip_can_be_set():
    assert one_token(-3.0, 1.0, -4.0, guided=False, clip=0.5)[0] == pytest.approx(-1.5)
    assert one_token(-3.0, -1.0, -6.0, guided=False, dual_clip=5.0)[0] == pytest.approx(5.0)


def test_a_guided_token_is_not_clipped():
    assert one_token(math.log(0.5), 2.0, math.log(0.05)) == pytest.approx((-2 * 0.5 / 0.5005,) * 2)


def test_an_unlikely_guided_token_of_a_bad_rollout_is_ordinary():
    """Guard (c): already outside the clip range it is left alone, while just above 0.01 it is pushed down."""
    assert one_token(math.log(0.009), -2.0, math.log(0.05))[1] == 0
    assert one_token(math.log(0.011), -2.0, math.log(0.05))[1] == pytest.approx(2 * 0.011 / 0.0105)
    assert one_token(math.log(0.009), 2.0, math.log(0.05))[1] == pytest.approx(-2 * 0.009 / 0.0095)


def test_guard_c_is_for_bad_rollouts_and_probabilities_below_the_bound():
    pi, advantages = torch.tensor([[0.009, 0.01, 0.5]]), torch.tensor([[-1.0], [0.0], [1.0]])
    found = guard_c(advantages, pi, 0.01)
    assert found.tolist() == [[True, False, False], [False] * 3, [False] * 3]


def test_other_shapings_of_guided_tokens():
    assert one_token(math.log(0.5), 2.0, math.log(0.05), shaping="ratio") == pytest.approx(
        (-2.4, 0.0)
    )
    assert one_token(math.log(0.5), 2.0, math.log(0.05), shaping="likelihood") == pytest.approx(
        (-2 * math.log(0.5), -2.0)
    )


@PROPERTY
@given(batches(), st.integers(0, 99))
def test_the_kl_term_is_the_k3_estimate(batch, seed):
    noise = torch.randn(
        batch["mask"].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    ref = batch["logprobs"] + noise
    loss, gradient, _ = loss_and_gradient(batch, kl_coef=0.3, ref_logprobs=ref)
    logp, old, a, mask, guided = as_lists(batch)
    n, rows = sum(map(sum, mask)), range(len(mask))
    cells = [
        [
            reference_token(
                logp[i][t], old[i][t], a[i], guided[i][t], kl_coef=0.3, ref=ref[i, t].item()
            )
            if m
            else (0, 0)
            for t, m in enumerate(mask[i])
        ]
        for i in rows
    ]
    assert loss.item() == pytest.approx(sum(cell[0] for row in cells for cell in row) / n)
    slopes = torch.tensor([[cell[1] / n for cell in row] for row in cells], dtype=torch.float64)
    torch.testing.assert_close(gradient, slopes, rtol=1e-8, atol=1e-12)


@PROPERTY
@given(batches(), st.lists(st.sampled_from(GARBAGE), min_size=3, max_size=3))
def test_what_padding_holds_changes_neither_loss_nor_gradient(batch, garbage):
    ref = batch["logprobs"] - 0.1
    loss, gradient, metrics = loss_and_gradient(batch, kl_coef=0.1, ref_logprobs=ref)
    logp, old, padded_ref = (
        x.masked_fill(~batch["mask"], g)
        for x, g in zip((batch["logprobs"], batch["old_logprobs"], ref), garbage)
    )
    padded = {
        **batch,
        "logprobs": logp,
        "old_logprobs": old,
        "guided": batch["guided"] | ~batch["mask"],
    }
    again, gradient_again, metrics_again = loss_and_gradient(
        padded, kl_coef=0.1, ref_logprobs=padded_ref
    )
    assert (
        torch.equal(again, loss)
        and torch.equal(gradient_again, gradient)
        and metrics_again == metrics
    )
    assert (gradient[~batch["mask"]] == 0).all()


@pytest.mark.parametrize("garbage", GARBAGE)
def test_advantages_by_token_may_hold_anything_in_padding(garbage):
    mask = torch.tensor([[True, True, False]])
    batch = dict(
        logprobs=torch.tensor([[-1.0, -2, -3]]),
        old_logprobs=torch.tensor([[-1.1, -2, -3]]),
        mask=mask,
        guided=torch.tensor([[False, True, True]]),
    )
    clean = loss_and_gradient({**batch, "advantages": torch.tensor([[1.5]])})
    dirty = loss_and_gradient(
        {**batch, "advantages": torch.full((1, 3), 1.5).masked_fill(~mask, garbage)}
    )
    assert torch.equal(dirty[0], clean[0]) and torch.equal(dirty[1], clean[1])


@PROPERTY
@given(batches(), st.randoms())
def test_the_order_of_rollouts_does_not_matter(batch, rng):
    order = rng.sample(range(len(batch["mask"])), len(batch["mask"]))
    loss, gradient, _ = loss_and_gradient(batch)
    again, gradient_again, _ = loss_and_gradient({key: x[order] for key, x in batch.items()})
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(gradient_again, gradient[order])


def test_the_loss_survives_a_policy_that_moved_beyond_exps_range():
    for advantage in (-1.0, 1.0):
        for logp, old in ((0.0, -500.0), (-500.0, 0.0)):
            loss, slope = one_token(logp, advantage, old, guided=False)
            assert math.isfinite(loss) and math.isfinite(slope)


def test_an_empty_mask_gives_zero():
    loss, _ = policy_loss(*[torch.zeros(1, 2)] * 2, torch.zeros(1, 1), torch.zeros(1, 2))
    assert loss.item() == 0


@pytest.mark.parametrize("advantages", [torch.ones(3, 1), torch.ones(2)])
def test_shapes_that_do_not_fit_are_refused(advantages):
    with pytest.raises(ValueError, match="do not fit"):
        policy_loss(torch.zeros(2, 2), torch.zeros(2, 2), advantages, torch.ones(2, 2))


# ------------------------------------------------------------------ what the published code does instead


@PROPERTY
@given(st.floats(-9, 9))
def test_published_1_gamma_is_one_constant_whatever_the_advantage(a):
    assert shaping_coefficient(torch.tensor(a), published=True).item() == pytest.approx(-0.001)


def test_published_1_a_rare_token_of_a_good_rollout_weighs_101_instead_of_a_half():
    assert one_token(math.log(0.00101), 4.0, published_gamma=True)[0] == pytest.approx(
        -4 * 101, rel=1e-2
    )
    assert one_token(math.log(0.00101), 4.0)[0] == pytest.approx(-4 * 0.00101 / 0.00201, rel=1e-3)


def test_published_1_without_guards_a_good_token_is_pushed_down():
    assert (
        one_token(math.log(0.0005), 2.0, published_gamma=True, guards=False)[1] > 0
    )  # descent lowers log π
    assert one_token(math.log(0.0005), 2.0, published_gamma=True)[1] < 0
    assert one_token(math.log(0.0005), 2.0, guards=False)[1] < 0


# ------------------------------------------------------------------ log-probabilities and batches


def tiny_model(seed=0, dtype=torch.float32, **more):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=11, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, ffn_dim=24)
    return LM(ModelConfig(**{**sizes, **more})).to(dtype)


def ragged_rollouts(model, seed=0, n=6):
    """Different lengths, help, advantages (two are zero) and an old policy that is not quite the model's."""
    rng = random.Random(seed)
    rollouts = []
    for i in range(n):
        ids = lambda size: [rng.randrange(11) for _ in range(size)]
        prompt = rollouts[-1].prompt if i % 3 else ids(rng.randint(1, 6))  # groups of three
        r = Rollout(prompt, ids(rng.randint(2, 9)), finished=True)
        r.advantage = 0.0 if i % 3 == 2 else rng.uniform(-2, 2)
        r.guided_from = rng.randint(1, len(r.response) - 1) if i % 2 else None
        snapshot(model, [r])
        r.old_logprobs = [x + rng.gauss(0, 0.3) for x in r.old_logprobs]
        rollouts.append(r)
    return rollouts


def reference_logprobs(model, tokens, temperature=1.0):
    """All log p(· | the tokens so far), by a pass over each row alone: [row][t][v]."""
    rows = []
    for row in tokens.tolist():
        logits = (model(torch.tensor([row[:-1]]))[0].double() / temperature).tolist()
        rows.append([[z - math.log(sum(map(math.exp, at))) for z in at] for at in logits])
    return rows


@pytest.mark.parametrize("temperature", (0.5, 1.0, 1.3))
def test_token_logprobs_are_the_log_softmax_of_the_full_logits(temperature):
    model, tokens = tiny_model(), torch.randint(11, (3, 7))
    expected = reference_logprobs(model, tokens, temperature)
    logprobs, entropy = token_logprobs(model, tokens, entropy=True, temperature=temperature)
    assert logprobs.shape == entropy.shape == (3, 6) and logprobs.dtype == torch.float32
    for i in range(3):
        for t in range(6):
            at = expected[i][t]
            assert logprobs[i, t].item() == pytest.approx(at[tokens[i, t + 1]], abs=1e-5)
            assert entropy[i, t].item() == pytest.approx(
                -sum(math.exp(x) * x for x in at), abs=1e-5
            )
    assert logprobs.requires_grad and not entropy.requires_grad


def test_only_the_asked_positions_get_logprobs():
    model, tokens = tiny_model(), torch.randint(11, (2, 6))
    where = torch.tensor([[True, False, True, True, False], [False, False, True, False, True]])
    logprobs, full = token_logprobs(model, tokens, where), token_logprobs(model, tokens)
    torch.testing.assert_close(logprobs[where], full[where])
    assert (logprobs[~where] == 0).all()


@pytest.mark.parametrize("temperature", (0.0, -1.0, math.nan))
def test_no_logprobs_to_train_on_without_a_temperature_above_0(temperature):
    with pytest.raises(ValueError, match="temperature above 0"):
        token_logprobs(tiny_model(), torch.randint(11, (2, 3)), temperature=temperature)


@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("recompute_from", (0, 2**40))
def test_token_logprobs_have_the_gradient_of_the_full_logits(tied, recompute_from, monkeypatch):
    monkeypatch.setattr("model.RECOMPUTE_FROM", recompute_from)
    model, tokens = tiny_model(tie_embeddings=tied), torch.randint(11, (3, 7))
    upstream = torch.randn(3, 6)
    gradients = []
    for logprobs in (
        token_logprobs(model, tokens),
        model(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1),
    ):
        gradients.append(torch.autograd.grad((logprobs * upstream).sum(), list(model.parameters())))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_logits_never_exist_as_a_whole(monkeypatch):
    monkeypatch.setattr("grpo.slice_size", lambda *_: 64)
    model, tokens, largest = (
        tiny_model(vocab_size=4000, tie_embeddings=True),
        torch.randint(4000, (4, 16)),
        [],
    )

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            largest.extend(x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor))
            return made

    with Watch():
        logprobs, entropy = token_logprobs(model, tokens, entropy=True)
        logprobs.sum().backward()
    assert max(largest) == model.head.weight.numel() == 4000 * 16
    largest.clear()
    with Watch():
        model(tokens)
    assert max(largest) == 4 * 16 * 4000  # which is more: the check can fail


def test_token_logprobs_of_a_bfloat16_model_are_float32():
    assert (
        token_logprobs(tiny_model(dtype=torch.bfloat16), torch.randint(11, (1, 4))).dtype
        == torch.float32
    )


def test_collate_puts_each_response_token_where_it_is_predicted():
    whole = Rollout([1, 2, 3], [4, 5], True, advantage=0.5, old_logprobs=[-1.0, -2.0])
    helped = Rollout(
        [6],
        [7, 8, 9, 10],
        True,
        guided_from=2,
        advantage=-1.5,
        old_logprobs=[-3.0, -4.0, -5.0, -6.0],
    )
    tokens, mask, guided, old, advantages = collate([whole, helped])
    assert tokens.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert mask.tolist() == [[False, False, True, True], [True] * 4]
    assert guided.tolist() == [[False] * 4, [False, False, True, True]]
    assert old.tolist() == [[0, 0, -1, -2], [-3, -4, -5, -6]]
    assert advantages.tolist() == [[0.5], [-1.5]]
    assert collate([whole, helped], "trajectory")[2].tolist() == [[False] * 4, [True] * 4]


# ------------------------------------------------------------------ the update


def applied_gradient(model, rollouts, **options):
    """The gradient an update applies (by plain descent with rate 1), a tensor a parameter, and its metrics."""
    model = copy.deepcopy(model)
    before = [p.detach().clone() for p in model.parameters()]
    metrics = update(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        copy.deepcopy(rollouts),
        **{"max_grad_norm": 1e9, **options},
    )
    return [old - new.detach() for old, new in zip(before, model.parameters())], metrics


def reference_gradient(model, rollouts, guided_tokens="guidance", temperature=1.0, weights=None):
    """The gradient and the loss, the mean over all response tokens.

    Each rollout is computed by itself, each token's loss by the reference. weights: of a token of
    each rollout, where it is another mean.
    """
    model, loss = copy.deepcopy(model), 0.0
    total = sum(len(r.response) for r in rollouts)
    for r, weight in zip(rollouts, weights or [1 / total] * len(rollouts)):
        ids = r.prompt + r.response
        logp = (model(torch.tensor([ids]))[0] / temperature).log_softmax(-1)
        for t in range(len(r.response)):
            at = len(r.prompt) + t
            here = logp[at - 1, ids[at]]
            guided = r.guided_from is not None and (
                t >= r.guided_from or guided_tokens == "trajectory"
            )
            value, slope = reference_token(here.item(), r.old_logprobs[t], r.advantage, guided)
            loss += value * weight
            (here * slope * weight).backward(retain_graph=True)
    return [p.grad for p in model.parameters()], loss


def assert_same(found, expected):
    assert sum(g.abs().sum() for g in expected) > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("guided_tokens", ("guidance", "trajectory"))
@pytest.mark.parametrize("micro_batch, temperature", ((1, 1.0), (30, 1.0), (10**6, 1.0), (30, 0.7)))
def test_the_gradient_is_the_token_mean_over_the_mini_batch_whatever_the_micro_batch(
    micro_batch, temperature, guided_tokens, tied
):
    model = tiny_model(tie_embeddings=tied)
    rollouts = ragged_rollouts(model)
    options = dict(guided_tokens=guided_tokens, temperature=temperature)
    found, metrics = applied_gradient(model, rollouts, micro_batch=micro_batch, **options)
    expected, loss = reference_gradient(model, rollouts, **options)
    assert_same(found, expected)
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)


# ------------------------------------------------------------------ variants from the literature


@PROPERTY
@given(st.lists(st.lists(st.sampled_from((0.0, 1.0, 0.3)), min_size=5, max_size=5), min_size=1))
def test_other_advantages_leave_out_the_std_or_the_rollouts_own_reward(rewards):
    centred, others = (
        group_advantages(torch.tensor(rewards, dtype=torch.float64), kind).tolist()
        for kind in ("centred", "leave-one-out")
    )
    for i, group in enumerate(rewards):
        for j, r in enumerate(group):
            assert centred[i][j] == pytest.approx(r - statistics.fmean(group), abs=1e-12)
            rest = group[:j] + group[j + 1 :]
            assert others[i][j] == pytest.approx(r - statistics.fmean(rest), abs=1e-12)


@pytest.mark.parametrize(
    "advantage, rho, loss, slope",
    [
        (2.0, 1.27, -2.54, -2.54),  # beyond 1.2 and below 1.28: it may still rise
        (2.0, 1.5, -2.56, 0.0),
        (-2.0, 0.79, 1.6, 0.0),  # the lower bound stays
    ],
)
def test_clip_higher_moves_the_upper_bound_alone(advantage, rho, loss, slope):
    token = one_token(-3.0, advantage, -3.0 - math.log(rho), guided=False, clip_high=0.28)
    assert token == pytest.approx((loss, slope), rel=1e-5, abs=1e-7)


@PROPERTY
@given(batches())
def test_the_ratio_of_a_response_is_the_geometric_mean_of_its_ordinary_tokens_ratios(batch):
    loss, gradient, metrics = loss_and_gradient(batch, ratio="response", clip=0.3, clip_high=0.4)
    logp, old, a, mask, guided = as_lists(batch)
    total, slopes = 0.0, torch.zeros_like(gradient)
    n = sum(map(sum, mask))
    for i, row in enumerate(mask):
        inside = [t for t, m in enumerate(row) if m]
        shaped = [t for t in inside if is_shaped(logp[i][t], a[i], guided[i][t])]
        ordinary = [t for t in inside if t not in shaped]
        for t in shaped:
            loss_here, slope = reference_token(logp[i][t], 0.0, a[i], True)
            total, slopes[i, t] = total + loss_here / n, slope / n
        if not ordinary:
            continue
        product = math.prod(math.exp(logp[i][t] - old[i][t]) for t in ordinary)
        rho = product ** (1 / len(ordinary))
        clipped = -a[i] * min(max(rho, 0.7), 1.4)
        loss_here, slope = max(-a[i] * rho, clipped), -a[i] * rho * (-a[i] * rho >= clipped)
        if a[i] < 0 and loss_here > -3 * a[i]:
            loss_here, slope = -3 * a[i], 0.0
        total += len(ordinary) * loss_here / n
        for t in ordinary:  # each of |o| losses has ∇ρ = ρ/|o|·Σ ∇log π
            slopes[i, t] += slope / n
    assert loss.item() == pytest.approx(total, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(gradient, slopes, rtol=1e-8, atol=1e-12)
    assert metrics["kl_old"] == loss_and_gradient(batch)[2]["kl_old"]  # which is of tokens


@pytest.mark.parametrize("mean", ("response", "constant"))
@pytest.mark.parametrize("micro_batch", (1, 30, 10**6))
def test_other_means_weigh_a_token_as_they_say_whatever_the_micro_batch(mean, micro_batch):
    model = tiny_model()
    rollouts = ragged_rollouts(model)
    weights = [1 / (len(rollouts) * 20) for _ in rollouts]
    if mean == "response":
        weights = [1 / (len(rollouts) * len(r.response)) for r in rollouts]
    options = dict(loss_mean=mean, max_tokens=20, micro_batch=micro_batch)
    found, metrics = applied_gradient(model, rollouts, **options)
    expected, loss = reference_gradient(model, rollouts, weights=weights)
    assert_same(found, expected)
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)  # what is reported is what is trained
    assert applied_gradient(model, [NOTHING], **options)[1]["loss"] == 0  # not NaN


def test_the_mean_of_responses_is_that_of_a_batch_without_a_model():
    mask = torch.tensor([[True, False, False], [True, True, True]])
    batch = dict(logprobs=torch.zeros(2, 3), old_logprobs=torch.zeros(2, 3), mask=mask)
    batch["advantages"] = torch.tensor([[-1.0], [-3.0]])
    losses = {
        kind: policy_loss(**batch, loss_mean=kind)[0].item() for kind in ("token", "response")
    }
    assert losses == {"token": (1 + 3 * 3) / 4, "response": (1 + 3) / 2}


# The policy that is trained is the one that was sampled: softmax(z / T), here of a model with 8 tokens, two of which
# make a response, so that all 64 responses can be enumerated. The loss of response o has its probability as a factor of
# its advantage: summed over all responses, the update's gradient is then the exact expectation.

ALL_PAIRS = [(a, b) for a in range(8) for b in range(8)]


def eight_token_model(scale=3.0):
    """Float64, so that what is left over is no rounding, with probabilities far from uniform."""
    model = tiny_model(seed=1, vocab_size=8, dtype=torch.float64)
    with torch.no_grad():
        model.head.weight.mul_(scale)
    return model


def log_probability_of_each_pair(model, prompt, temperature):
    """log π_T of the first and of the second token of each response, (64, 2), from full logits."""
    tokens = torch.tensor([[*prompt, a, b] for a, b in ALL_PAIRS])
    logp = (model(tokens[:, :-1]) / temperature).log_softmax(-1)
    return logp.gather(-1, tokens[:, 1:, None]).squeeze(-1)[:, len(prompt) - 1 :]


def expected_gradient_of_update(model, rollouts, temperature):
    """What the update applies for rollouts whose advantages hold their probabilities, as a sum over tokens, uphill."""
    change, metrics = applied_gradient(model, rollouts, temperature=temperature)
    assert metrics["kl_old"] == 0  # the snapshot is the update's policy
    tokens = sum(len(r.response) for r in rollouts)
    return torch.cat([-g.flatten().double() for g in change]) * tokens


@pytest.mark.parametrize("temperature", (0.5, 0.7, 1.0, 1.3))
def test_the_updates_gradient_is_that_of_the_expected_reward_under_the_sampled_policy(temperature):
    model, prompt = eight_token_model(), [3, 1, 4]
    rewards = torch.tensor(
        [float(a * 3 + b * 5 % 7 > 12) for a, b in ALL_PAIRS], dtype=torch.float64
    )
    pi = log_probability_of_each_pair(model, prompt, temperature).sum(1).exp()
    torch.testing.assert_close(pi.sum().item(), 1.0)
    true = torch.autograd.grad((pi * rewards).sum(), list(model.parameters()))
    true = torch.cat([g.flatten() for g in true])
    rollouts = [
        Rollout(prompt, list(pair), True, advantage=a)
        for pair, a in zip(ALL_PAIRS, (pi * rewards).tolist())
    ]
    found = expected_gradient_of_update(model, rollouts, temperature)
    assert torch.cosine_similarity(found, true, dim=0).item() == pytest.approx(1, abs=1e-6)
    assert (found - true).norm() < 1e-5 * true.norm()


@pytest.mark.parametrize("temperature", (0.5, 0.7, 1.0, 1.3))
def test_tokens_that_cannot_matter_have_no_gradient(temperature):
    model, prompt = eight_token_model(), [3, 1, 4]
    pi = log_probability_of_each_pair(model, prompt, temperature).detach().sum(1).exp()
    # The reward is for the first token alone, and the second, which is trained here, comes after it.
    rollouts = [
        Rollout([*prompt, a], [b], True, advantage=p * (a > 3))
        for (a, b), p in zip(ALL_PAIRS, pi.tolist())
    ]
    found = expected_gradient_of_update(model, rollouts, temperature)
    assert found.norm() < 1e-6


@pytest.mark.parametrize("temperature", (0.5, 0.7, 1.0, 1.3))
def test_the_sampler_and_the_update_mean_the_same_policy(temperature):
    model = eight_token_model()
    responses, logs = generate(
        model,
        [[3, 1, 4]],
        max_tokens=6,
        stop=(0,),
        samples=40,
        temperature=temperature,
        generator=torch.Generator().manual_seed(0),
        logprobs=True,
    )
    sampled = [
        Rollout([3, 1, 4], ids, True, advantage=1.0, old_logprobs=log)
        for ids, log in zip(responses, logs)
    ]
    computed = [Rollout([3, 1, 4], ids, True) for ids in responses]
    snapshot(model, computed, temperature=temperature)
    for a, b in zip(sampled, computed, strict=True):
        assert a.old_logprobs == pytest.approx(b.old_logprobs, abs=1e-5)
    assert applied_gradient(model, sampled, temperature=temperature)[1]["kl_old"] == pytest.approx(
        0, abs=1e-6
    )


@pytest.mark.parametrize("temperature", (0.5, 1.0, 1.3))
def test_the_kl_terms_reference_has_the_same_temperature(temperature):
    model = eight_token_model()
    rollouts = [Rollout([3, 1, 4], list(pair), True) for pair in ALL_PAIRS]
    _, metrics = applied_gradient(
        model, rollouts, temperature=temperature, kl_coef=1.0, reference=model
    )
    assert metrics["grad_norm"] < 1e-6 and metrics["loss"] == 0  # π_θ is π_ref


@pytest.mark.slow
def test_an_update_compiles_whole_a_handful_of_times_for_all_lengths_and_does_the_same(monkeypatch):
    temperature = 0.7
    model = tiny_model(tie_embeddings=True)
    rng, rollouts = random.Random(0), []
    for i in range(60):
        ids = lambda least, most: [rng.randrange(11) for _ in range(rng.randint(least, most))]
        prompt = rollouts[-1].prompt if i % 2 else ids(3, 6)
        rollouts.append(Rollout(prompt, ids(4, 9), True, advantage=rng.uniform(0.5, 2)))
    sizes = {collate(batch)[1].sum().item() for batch in micro_batches(rollouts, 64)}
    assert len(sizes) > 8  # as many graphs are torch's limit
    snapshot(model, rollouts, temperature=temperature)
    torch.compiler.reset()  # the limit counts other tests' graphs, too
    options = dict(micro_batch=64, temperature=temperature)
    expected, expected_metrics = applied_gradient(model, rollouts, **options)
    compiled = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(
        grpo,
        "logprobs_at",
        torch.compile(grpo.logprobs_at, backend=compiled, fullgraph=True, dynamic=True),
    )
    found, metrics = applied_gradient(model, rollouts, **options)
    # A single prompt is a case of its own, and so is the first shape.
    assert 1 <= compiled.frame_count <= 6
    assert_same(found, expected)
    assert metrics == pytest.approx(expected_metrics, abs=1e-5)


def test_metrics_do_not_depend_on_the_micro_batch():
    model = tiny_model()
    rollouts = ragged_rollouts(model)
    one, all_ = (applied_gradient(model, rollouts, micro_batch=size)[1] for size in (1, 10**6))
    assert one == pytest.approx(all_, abs=1e-5)


def test_without_a_shaped_token_there_is_no_mean_weight():
    model = tiny_model()
    rollouts = [Rollout([1, 2], [3, 4], True, advantage=a, guided_from=1) for a in (-1.0, 1.0)]
    both = applied_gradient(model, rollouts, unlikely=1.0)[1]
    bad = applied_gradient(model, rollouts[:1], unlikely=1.0)[1]  # guard (c) sets all aside
    assert (bad["shaped_share"], both["shaped_share"]) == (0, 0.25)
    assert "w_guided" not in bad and "pi_guided" in bad and "w_guided" in both


def test_published_6_the_dual_clip_is_off_once_nobody_is_guided():
    model = tiny_model()
    rollouts = [Rollout([1, 2], [3], True, advantage=-2.0), Rollout([1, 2], [4, 5, 6], True)]
    snapshot(model, rollouts)
    rollouts[0].old_logprobs[0] -= math.log(10)  # ρ = 10
    published, intended = (
        applied_gradient(model, rollouts, published_dual_clip=p)[1] for p in (True, False)
    )
    assert published["loss"] == pytest.approx(2 * 10 / 4, rel=1e-5) and published["grad_norm"] > 0.1
    assert intended["loss"] == pytest.approx(2 * 3 / 4, rel=1e-5) and intended["grad_norm"] == 0
    rollouts[1].guided_from, rollouts[1].advantage = (
        1,
        1e-9,
    )  # while the teacher is there, the two agree
    published, intended = (
        applied_gradient(model, rollouts, published_dual_clip=p)[1] for p in (True, False)
    )
    assert published["loss"] == intended["loss"] == pytest.approx(2 * 3 / 4, rel=1e-5)


def test_the_published_dual_clip_does_not_depend_on_the_micro_batch():
    model = tiny_model()
    rollouts = ragged_rollouts(model)
    for r in rollouts:
        r.advantage, r.old_logprobs = -1.0, [x - 2 for x in r.old_logprobs]
    one, all_ = (
        applied_gradient(model, rollouts, micro_batch=size, published_dual_clip=True)[0]
        for size in (1, 10**6)
    )
    assert_same(one, all_)


def test_rollouts_without_advantage_are_skipped_but_count_in_the_mean():
    model = tiny_model()
    rollouts = ragged_rollouts(model)
    found, metrics = applied_gradient(model, rollouts)
    full, full_metrics = applied_gradient(
        model, rollouts, kl_coef=1e-30, reference=model
    )  # a KL term needs them all
    assert_same(found, full)
    assert metrics["loss"] == pytest.approx(full_metrics["loss"], abs=1e-6)
    assert full_metrics["active_share"] == 1
    tokens = [len(r.response) for r in rollouts]
    assert metrics["active_share"] == pytest.approx(1 - (tokens[2] + tokens[5]) / sum(tokens))


def test_a_mini_batch_without_any_advantage_changes_nothing():
    model = tiny_model()
    rollouts = ragged_rollouts(model)
    for r in rollouts:
        r.advantage = 0.0
    change, metrics = applied_gradient(model, rollouts)
    assert all((g == 0).all() for g in change) and metrics["grad_norm"] == metrics["skipped"] == 0


def test_the_order_of_rollouts_does_not_change_the_gradient():
    model = tiny_model()
    rollouts = ragged_rollouts(model)
    assert_same(
        applied_gradient(model, rollouts[::-1], micro_batch=30)[0],
        applied_gradient(model, rollouts)[0],
    )


@pytest.mark.parametrize("poison", (math.nan, -math.inf))
def test_a_gradient_that_is_not_finite_is_skipped_and_leaves_weights_and_optimizer_alone(poison):
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    before = copy.deepcopy(model.state_dict())
    rollouts = ragged_rollouts(model)
    rollouts[0].advantage = poison
    assert update(model, optimizer, rollouts)["skipped"] == 1
    assert (
        all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        and not optimizer.state
    )
    assert all(p.grad is None for p in model.parameters())
    assert update(model, optimizer, ragged_rollouts(model))["skipped"] == 0
    assert any(not torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_the_gradient_is_clipped_to_its_norm_and_reported_before():
    model = tiny_model()
    rollouts = ragged_rollouts(model)
    norm = lambda parts: math.sqrt(sum(float((g.double() ** 2).sum()) for g in parts))
    full, _ = applied_gradient(model, rollouts)
    clipped, metrics = applied_gradient(model, rollouts, max_grad_norm=0.01)
    assert norm(clipped) == pytest.approx(0.01, rel=1e-3) and norm(full) > 0.05
    assert metrics["grad_norm"] == pytest.approx(norm(full), rel=1e-3)


def test_settings_are_one_object_whose_fields_may_be_overridden():
    model = tiny_model()
    rollouts = ragged_rollouts(model)
    settings = LossSettings(clip=0.05, kl_coef=0.3, micro_batch=30, max_grad_norm=0.01)
    found = applied_gradient(model, rollouts, settings=settings, max_grad_norm=1e9, reference=model)
    expected = applied_gradient(
        model, rollouts, clip=0.05, kl_coef=0.3, micro_batch=30, reference=model
    )
    assert found[1] == expected[1]
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    with pytest.raises(TypeError, match="clipping"):
        applied_gradient(model, rollouts, clipping=0.1)


@pytest.mark.parametrize("micro_batch", (1, 10**6))
def test_a_pass_over_nothing_changes_neither_gradient_nor_metrics(micro_batch):
    """What a process with less to do joins the others' passes with."""
    model = tiny_model()
    rollouts = ragged_rollouts(model)
    options = dict(micro_batch=micro_batch, kl_coef=0.1, reference=tiny_model(1))
    found, metrics = applied_gradient(model, [NOTHING, *rollouts, NOTHING], **options)
    expected, expected_metrics = applied_gradient(model, rollouts, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert metrics == pytest.approx(expected_metrics, rel=1e-5)
    alone, metrics = applied_gradient(model, [NOTHING], **options)
    assert all((g == 0).all() for g in alone) and metrics["loss"] == metrics["skipped"] == 0


def test_a_guided_rollout_is_snapshot_under_the_students_prompt():
    model = tiny_model()
    rollouts = ragged_rollouts(model)
    kept = list(rollouts[0].old_logprobs)
    for r in rollouts[1:]:
        r.old_logprobs = None
    snapshot(model, rollouts, micro_batch=30)
    for r in rollouts[1:]:
        alone = token_logprobs(model, torch.tensor([r.prompt + r.response]))[0, len(r.prompt) - 1 :]
        assert r.old_logprobs == pytest.approx(alone.tolist(), abs=1e-5) and len(
            r.old_logprobs
        ) == len(r.response)
    assert rollouts[0].old_logprobs == kept


def test_a_fresh_snapshot_makes_every_ratio_one():
    model = tiny_model()
    rollouts = ragged_rollouts(model)
    for r in rollouts:
        r.old_logprobs = None
    _, metrics = applied_gradient(model, rollouts)
    assert metrics["kl_old"] == pytest.approx(0, abs=1e-6) and metrics["clip_fraction"] == 0


def test_a_kl_term_pulls_back_to_the_reference():
    model, reference = tiny_model(0), tiny_model(1)
    rollouts = ragged_rollouts(model)
    change, _ = applied_gradient(model, rollouts, kl_coef=0.5, reference=reference)
    without, _ = applied_gradient(model, rollouts)
    assert max((a - b).abs().max() for a, b in zip(change, without)) > 1e-3
    same, _ = applied_gradient(model, rollouts, kl_coef=0.5, reference=model)
    assert_same(same, without)  # k3 is flat where the policies agree


def test_two_runs_with_one_seed_end_in_the_same_bits():
    def run():
        model = tiny_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(7)
        for _ in range(2):
            responses = generate(
                model, [[1, 2, 3], [4]], max_tokens=6, stop={0}, samples=3, generator=generator
            )
            rollouts = [
                Rollout([[1, 2, 3], [4]][i // 3], ids, ids[-1] == 0)
                for i, ids in enumerate(responses)
            ]
            for r, a in zip(
                rollouts, group_advantages(torch.rand(2, 3, generator=generator)).flatten().tolist()
            ):
                r.advantage = a
            update(model, optimizer, rollouts, micro_batch=20)
        return model.state_dict()

    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embed.weight"], tiny_model().state_dict()["embed.weight"])


@pytest.mark.parametrize(
    "rewards", [torch.ones(4), torch.tensor([[0.0, math.nan]]), torch.tensor([[math.inf, 1.0]])]
)
def test_rewards_that_are_no_finite_matrix_are_refused(rewards):
    with pytest.raises(ValueError, match="matrix of finite numbers"):
        group_advantages(rewards)


def test_a_rollout_that_is_not_whole_is_refused_before_anything_changes():
    model = tiny_model()
    rollouts = ragged_rollouts(model)
    rollouts[3].old_logprobs = [-1.0]
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="a rollout has"):
        update(model, torch.optim.AdamW(model.parameters()), rollouts)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


# ------------------------------------------------------------------ float32 masters of half-precision weights


def test_masters_of_float32_weights_are_the_weights():
    model, plain = tiny_model(), tiny_model()
    rollouts = ragged_rollouts(model)
    for m, optimizer in (
        (model, MasterAdamW(model.parameters(), lr=1e-2)),
        (plain, torch.optim.AdamW(plain.parameters(), lr=1e-2)),
    ):
        for _ in range(3):
            update(m, optimizer, rollouts)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters()))


def test_steps_too_small_for_bfloat16_add_up_in_the_masters():
    weights = {
        name: torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        for name in ("master", "plain")
    }
    exact = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizers = [
        MasterAdamW([weights["master"]], lr=1e-4, weight_decay=0.01),
        torch.optim.AdamW([weights["plain"]], lr=1e-4, weight_decay=0.01),
        torch.optim.AdamW([exact], lr=1e-4, weight_decay=0.01),
    ]
    for _ in range(200):
        for w in (*weights.values(), exact):
            (w * torch.tensor([1.0, 0.5, 0.25, 2.0], dtype=w.dtype)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(
        weights["plain"], torch.ones(4, dtype=torch.bfloat16)
    )  # each step is rounded away
    master = optimizers[0].param_groups[0]["params"][0]
    assert torch.allclose(master.double(), exact, atol=1e-5)
    assert torch.equal(weights["master"], exact.detach().bfloat16())


def test_gradients_of_micro_batches_add_up_in_float32():
    def master_gradient(micro_batch):
        model = tiny_model().bfloat16()
        rollouts = ragged_rollouts(model) * 8
        optimizer = MasterAdamW(model.parameters(), lr=0.0)
        captured = []
        optimizer.register_step_pre_hook(
            lambda o, *_: captured.extend(m.grad.clone() for _, m in o.copies)
        )
        update(model, optimizer, rollouts, micro_batch=micro_batch, max_grad_norm=1e9)
        assert all(p.grad is None for p in model.parameters()) and all(
            g.dtype == torch.float32 for g in captured
        )
        return torch.cat([g.flatten() for g in captured])

    one, many = master_gradient(10**6), master_gradient(1)
    assert (
        torch.nn.functional.cosine_similarity(one, many, dim=0) > 0.999
        and 0.98 < one.norm() / many.norm() < 1.02
    )


def test_a_second_optimizer_of_the_same_half_precision_model_takes_over():
    model = tiny_model().bfloat16()
    rollouts = ragged_rollouts(model)
    for _ in range(2):
        before = [p.clone() for p in model.parameters()]
        optimizer = MasterAdamW(model.parameters(), lr=1e-2)
        update(model, optimizer, rollouts)
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
        assert all(torch.equal(w, m.bfloat16()) for w, m in optimizer.copies)
        del optimizer


def test_recomputing_activations_changes_no_gradient():
    model = tiny_model()
    rollouts = ragged_rollouts(model)
    kept, _ = applied_gradient(model, rollouts)
    calls = []
    model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.recompute = True
    again, _ = applied_gradient(model, rollouts)
    assert len(calls) == 2 and all(
        torch.equal(a, b) for a, b in zip(kept, again)
    )  # the block ran twice


def test_a_choice_that_does_not_exist_is_refused():
    with pytest.raises(
        ValueError, match="shaping must be one of aas, ratio, likelihood, not 'AAS'"
    ):
        LossSettings(shaping="AAS")
    for name in ("ratio", "loss_mean", "guided_tokens"):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            LossSettings(**{name: "tokens"})
    with pytest.raises(ValueError, match="not 'centered'"):
        group_advantages(torch.tensor([[0.0, 1.0]]), "centered")


@pytest.mark.parametrize("name", ["old_logprobs", "guided", "ref_logprobs"])
def test_every_tensor_of_a_loss_must_have_its_shape(name):
    batch = dict.fromkeys(("logprobs", "old_logprobs", "ref_logprobs"), torch.zeros(2, 3))
    batch |= {"mask": torch.ones(2, 3, dtype=bool), "guided": torch.zeros(2, 3, dtype=bool)}
    batch["advantages"] = torch.ones(2, 1)
    policy_loss(**batch, kl_coef=0.1)
    with pytest.raises(ValueError, match="do not fit together"):
        policy_loss(**{**batch, name: batch[name][:, :1]}, kl_coef=0.1)
