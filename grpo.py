"""Group-relative policy optimisation with Advantage-Aware Shaping (AAS): the loss and the update.

Symbols as in the paper: π_θ the policy being trained, π_old its snapshot at sampling time,
Â the advantage, ρ = π_θ/π_old, w the weight of guided tokens, γ(Â) its coefficient,
sg(·) stop-gradient. A *guided* token counts as the teacher's; a *shaped* one has the guided loss.
Shapes: Q questions, G rollouts of each; B rows, T tokens; N tokens with a loss. A row's first token
is not predicted, so what belongs to a predicted token is (B, T-1).
In this order: advantages, loss, update, log-probabilities.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from model import LM
from run.batches import SharedPrompts, checked, collate, mean_metrics, micro_batches
from run.config import check_choices
from run.head import HeadLogprobs, gradient_buffer, slice_size
from run.optimizer import MasterAdamW as MasterAdamW  # what `update` is given for bfloat16 weights
from run.world import World, full

Measured = dict[str, tuple[Tensor, Tensor]]  # metric: values, and the tokens it is a mean over


@dataclass
class Rollout:
    """A response with its prompt; the fields are filled in as it travels through a step.

    It is *asked* about if the teacher was to read it, *parsed* if the reply followed the format
    (`feedback`), and *guided* if the teacher's words were appended (`guided_from`).
    """

    # From sampling.
    prompt: list[int]
    response: list[int]  # o_i, or ô_i where guided
    finished: bool  # exactly one stop token, at the end
    question: str = ""
    answer: str = ""
    text: str = ""  # the response without its stop token
    attempt: str = ""  # the student's own words, before any help
    old_logprobs: list[float] | None = field(default=None, repr=False)  # log π_old of each token
    # From the teacher.
    asked: bool = False
    feedback: tuple[str, str, str] | None = None  # opinion, reason, phrase, as parsed
    # Where guided: from this index of response on all counts as the teacher's, the stop token too.
    guided_from: int | None = None
    # From the reward and the update.
    reward: float = 0.0  # r_i
    advantage: float = 0.0  # Â_i


@dataclass(frozen=True)
class LossSettings:
    """What the loss and the update of a step depend on."""

    clip: float = 0.2  # ε
    clip_high: float = 0.0  # upper ε: ρ is clipped at 1 + clip_high (DAPO); 0: as `clip`
    ratio: str = "token"  # or "response": ρ of a whole response, of GSPO
    dual_clip: float | None = 3.0  # c, bounds the loss where Â < 0; None: it has no bound
    unlikely: float = 0.01  # guard (c): bad tokens below this π are ordinary
    shaping: str = "aas"  # of guided tokens: "aas", "ratio" (none) or "likelihood" (log π)
    guards: bool = True  # (a) and (b); (c) is off with unlikely = 0
    # The paper's names: γ_min belongs to the best advantage, and is the larger number.
    gamma_min: float = 0.001
    gamma_max: float = -0.001  # γ of the worst advantage
    kl_coef: float = 0.0  # weight of KL(π_θ ‖ π_ref)
    guided_tokens: str = "guidance"  # or "trajectory": the attempt before it, too
    loss_mean: str = "token"  # over tokens, or "response" or "constant": see mean_loss
    max_tokens: int = 1024  # L, the divisor of loss_mean="constant"
    max_grad_norm: float = 1.0
    micro_batch: int = 16384  # tokens a forward pass, padding counted; changes no result
    temperature: float = 1.0  # π = softmax(z / temperature), as it was sampled
    published_gamma: bool = False  # γ is γ_max whatever Â is
    published_dual_clip: bool = False  # no dual clip where no rollout is guided

    def __post_init__(self) -> None:
        check_choices(self)  # raises ValueError


def group_advantages(rewards: Tensor, kind: str = "z-score") -> Tensor:
    """Z-score rewards inside each question's group: (Q, G) -> (Q, G).

    A group whose rewards are all equal gets zeros: it carries no signal.
    Other kinds: "centred" leaves the std out (Dr. GRPO); "leave-one-out" subtracts the mean of the
    other rollouts (RLOO).
    Raises ValueError for another kind, and for anything but a matrix of finite numbers.
    """
    shape = tuple(rewards.shape)
    if len(shape) != 2 or not rewards.isfinite().all():
        raise ValueError(f"rewards must be a matrix of finite numbers (Q, G), not {shape}")
    if shape[0] == 0 or shape[1] < 2:  # no group, or one number, whose std does not exist
        return torch.zeros_like(rewards)
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    # Â_i = (r_i − mean r) / (std r + 1e-6)
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if kind == "z-score":
        advantages = centred / (rewards.std(dim=1, keepdim=True) + 1e-6)  # std uses n-1
    elif kind == "centred":
        advantages = centred
    elif kind == "leave-one-out":
        advantages = centred * shape[1] / (shape[1] - 1)  # = r_i − mean of the others
    else:
        raise ValueError(f"advantages are z-score, centred or leave-one-out, not {kind!r}")
    return advantages.masked_fill(equal, 0.0)  # a mean is rounded, and 1e-6 blows the rest up


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    guided: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, float]]:
    """The mean of token_losses (mean_loss), and metrics, which are 0 over no tokens.

    options: fields of LossSettings, of which those that only `update` reads change nothing here:
    published_dual_clip, guided_tokens, temperature, micro_batch, max_grad_norm.
    """
    guided = torch.zeros_like(mask) if guided is None else guided
    batch = logprobs, old_logprobs, advantages, mask, guided
    settings = LossSettings(**options)
    losses, measured = token_losses(*batch, settings, ref_logprobs)
    loss = mean_loss(losses, mask, int(mask.sum()), len(mask), settings)
    metrics = {"loss": loss.item()}
    for name, (values, where) in measured.items():
        metrics[name] = ((values * where).sum() / where.sum().clamp(min=1)).item()
    return loss, metrics


def token_losses(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    guided: Tensor,
    settings: LossSettings,
    ref_logprobs: Tensor | None = None,
) -> tuple[Tensor, Measured]:
    """ℓ of every token, (B, T-1), 0 outside `mask`, and what is measured on the way.

    logprobs (log π_θ), old_logprobs, mask, guided, ref_logprobs: (B, T-1); advantages: (B, T-1) or
    (B, 1). Raises ValueError if they do not fit together, or if a KL term has no ref_logprobs.
    """
    batch = checked(logprobs, old_logprobs, advantages, mask, guided, ref_logprobs)
    logprobs, old_logprobs, advantages, mask = batch
    guided = guided.bool() & mask
    pi = logprobs.detach().exp()  # sg(π_θ)
    # Shaped tokens: guided, and not set aside by guard (c). All others have PPO's loss.
    shaped = torch.zeros_like(guided)
    if settings.shaping != "ratio":
        shaped = guided & ~guard_c(advantages, pi, settings.unlikely)
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.clamp(-20, 20).exp()  # ρ; e^20 is beyond any clip and far from overflow
    kl_old = ratio - 1 - log_ratio  # k3 estimate of KL(π_old ‖ π_θ)
    if settings.ratio == "response":
        ratio = response_ratio(log_ratio, mask & ~shaped)
    clips = settings.clip, settings.dual_clip, settings.clip_high
    loss, clipped, dual_clipped = clipped_loss(ratio, advantages, *clips)
    w = None
    if settings.shaping != "ratio":
        # Elsewhere log π counts as 0: a w of 0/0 that nobody uses would still send NaN back.
        shaped_logprobs = logprobs.masked_fill(~shaped, 0.0)
        loss_if_shaped, w = guided_loss(shaped_logprobs, advantages, settings)
        loss = torch.where(shaped, loss_if_shaped, loss)
    if settings.kl_coef:
        loss = loss + settings.kl_coef * kl_to_reference(logprobs, ref_logprobs, mask)
    measured = {
        "kl_old": (kl_old, mask & ~guided),  # π_old did not draw guided tokens
        "clip_fraction": (clipped & ~shaped, mask),
        "dual_clip_fraction": (dual_clipped & ~shaped, mask),
        "guided_share": (guided, mask),
        "shaped_share": (shaped, mask),
        "pi_guided": (pi, guided),
    }
    if w is not None:
        measured["w_guided"] = (w.detach(), shaped)
    return loss * mask, measured


def clipped_loss(
    ratio: Tensor,
    advantages: Tensor,
    clip: float = 0.2,
    dual_clip: float | None = 3.0,
    clip_high: float = 0.0,  # the upper ε; 0: as `clip`
) -> tuple[Tensor, Tensor, Tensor]:
    """ℓ of ordinary tokens, and where each clip binds: PPO's pessimistic bound, and a dual clip.

    ratio ρ: (B, T-1); advantages: (B, T-1) or (B, 1); returns three of (B, T-1).
    """
    bounded = ratio.clamp(1 - clip, 1 + (clip_high or clip))
    plain, clipped = -advantages * ratio, -advantages * bounded
    loss = torch.maximum(plain, clipped)  # ℓ = max(−Âρ, −Â·clip(ρ, 1−ε, 1+ε))
    c = math.inf if dual_clip is None else dual_clip
    dual_clipped = (advantages < 0) & (loss > -advantages * c)
    loss = torch.where(dual_clipped, -advantages * c, loss)  # Â < 0: ℓ = min(ℓ, −Â·c)
    return loss, clipped > plain, dual_clipped


def response_ratio(log_ratio: Tensor, where: Tensor) -> Tensor:
    """GSPO's ρ, one of each row: (π_θ/π_old of its tokens together)^(1/their number), (B, T-1)."""
    mean = (log_ratio * where).sum(1, keepdim=True) / where.sum(1, keepdim=True).clamp(min=1)
    return mean.clamp(-20, 20).exp().expand_as(log_ratio)


def guided_loss(
    logprobs: Tensor, advantages: Tensor, settings: LossSettings
) -> tuple[Tensor, Tensor | None]:
    """ℓ of guided tokens, and their w if it has one. π_old did not write them: no ρ, no clip.

    logprobs: (B, T-1); advantages: (B, T-1) or (B, 1); returns (B, T-1) each.
    """
    if settings.shaping == "likelihood":
        return -advantages * logprobs, None
    ends = {"gamma_min": settings.gamma_min, "gamma_max": settings.gamma_max}
    published = settings.published_gamma
    w = shaped_ratio(logprobs, advantages, settings.guards, published=published, **ends)
    return -advantages * w, w  # ℓ = −Â·w


def shaped_ratio(
    logprobs: Tensor, advantages: Tensor, guards: bool = True, **coefficients: Any
) -> Tensor:
    """w = π_θ / (sg(π_θ) + γ(Â)): (B, T-1) -> (B, T-1). Differentiable: ∇w = π/(π+γ)·∇log π.

    Guards: (a) a denominator below 0 becomes 1.0001·sg(π), (b) one above 1 becomes 0.9999·sg(π).
    """
    pi = logprobs.detach().exp()  # sg(π_θ)
    denominator = pi + shaping_coefficient(advantages, **coefficients)
    w = pi / denominator
    if guards:
        w = torch.where(denominator <= 0, 1 / 1.0001, w)  # (a), and 0 itself would divide by zero
        w = torch.where(denominator > 1, 1 / 0.9999, w)  # (b)
    one = (logprobs - logprobs.detach()).exp()  # carries ∇log π, even where π underflows to 0
    return one * w


def shaping_coefficient(
    advantages: Tensor,
    gamma_min: float = 0.001,
    gamma_max: float = -0.001,
    a_min: float = -4.0,
    a_max: float = 4.0,
    published: bool = False,
) -> Tensor:
    """γ(Â), any shape: γ_min for the best advantage (A_max), γ_max for the worst (A_min).

    γ = γ_min + (γ_max − γ_min)·(A_max − Â)/(A_max − A_min), kept between γ_min and γ_max.
    """
    gamma = gamma_min + (gamma_max - gamma_min) * (a_max - advantages) / (a_max - a_min)
    if published:  # its bounds are the wrong way round, so clamp returns γ_max everywhere
        return gamma.clamp(gamma_min, gamma_max)
    return gamma.clamp(min(gamma_min, gamma_max), max(gamma_min, gamma_max))


def guard_c(advantages: Tensor, pi: Tensor, unlikely: float) -> Tensor:
    """Where a guided token counts as ordinary, bool (B, T-1): Â < 0 and π < `unlikely`.

    PPO's loss pushes it down until the clip ends the push. AAS has no clip.
    """
    return (advantages < 0) & (pi < unlikely)


def mean_loss(
    losses: Tensor, mask: Tensor, n_tokens: int, n_rollouts: int, settings: LossSettings
) -> Tensor:
    """What these rows, (B, T-1), add to the mean loss of their mini-batch of n_rollouts.

    The method's mean is that over all its n_tokens tokens.
    """
    if settings.loss_mean == "response":  # GRPO in DeepSeekMath: of each response, then of all
        return (losses.sum(1) / mask.sum(1).clamp(min=1)).sum() / max(1, n_rollouts)
    if settings.loss_mean == "constant":  # Dr. GRPO: by a length that no response can change
        return losses.sum() / (max(1, n_rollouts) * settings.max_tokens)
    return losses.sum() / max(1, n_tokens)  # token mean: Σ ℓ / tokens of the mini-batch


def kl_to_reference(logprobs: Tensor, ref_logprobs: Tensor | None, mask: Tensor) -> Tensor:
    """An estimate of KL(π_θ ‖ π_ref) from each token, (B, T-1), which is never negative."""
    if ref_logprobs is None:
        raise ValueError("kl_coef needs ref_logprobs, the log-probabilities of the reference")
    log_r = (ref_logprobs - logprobs).masked_fill(~mask, 0.0).clamp(-20, 20)  # log π_ref/π_θ
    return log_r.exp() - 1 - log_r  # k3


def update(
    model: LM,
    optimizer: torch.optim.Optimizer,
    rollouts: list[Rollout],
    *,
    settings: LossSettings | None = None,
    reference: LM | None = None,
    world: World = World(),
    **changes: Any,
) -> dict[str, float]:
    """One optimizer step on a mini-batch; returns its loss, and means over the tokens computed.

    `rollouts` are this process's part of it; `changes` are fields of `settings`. Without a KL term
    rollouts with Â = 0 are not computed, but their tokens count in the mean loss. Where no rollout
    has a loss there is no step: no weight decay, no momentum. A gradient that is not finite is not
    applied: metrics["skipped"] is then 1.
    """
    settings = replace(settings or LossSettings(), **changes)
    # `train` has filled in log π_old for the whole step; a caller with one mini-batch need not.
    some_unknown = any(world.gather([r.old_logprobs is None for r in rollouts]))
    whole = world.whole(model) if some_unknown else model  # to put it in one piece is expensive
    snapshot(whole, rollouts, settings.micro_batch, settings.temperature)
    # What the whole mini-batch decides: the published dual clip, and the tokens of the mean.
    some_guided = any(world.gather([r.guided_from is not None for r in rollouts]))
    if settings.published_dual_clip and not some_guided:
        settings = replace(settings, dual_clip=None)
    lengths = world.gather([len(r.response) for r in rollouts])
    total, count = max(1, sum(lengths)), len(lengths)
    # Micro-batches of the rollouts that have a loss, and empty ones up to the number of passes.
    active = [r for r in rollouts if r.advantage != 0 or settings.kl_coef]
    batches = micro_batches(active, settings.micro_batch)
    passes = max(world.gather([len(batches)]))  # made together: each process has some weights
    batches += [[NOTHING]] * (passes - len(batches))
    # The gradient: each pass adds its part.
    optimizer.zero_grad(set_to_none=True)
    loss: float | Tensor = 0.0
    sums = []  # (metric, sum, over how many tokens) of each pass
    with gradient_buffer(model, optimizer, world) as head_grad:
        for batch in batches:
            losses, mask, measured = batch_losses(model, batch, settings, reference, head_grad)
            mean = mean_loss(losses, mask, total, count, settings)
            loss = loss + mean.detach()
            (mean * world.size).backward()  # FSDP takes the mean over the processes
            for name, (values, where) in measured.items():
                sums.append((name, (values * where).sum().item(), int(where.sum())))
    # Clip the gradient, and take one step along it if it is finite.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(full(torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)))
    if passes and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    # The metrics of all processes.
    metrics = {"loss": sum(world.gather([float(loss)])), **mean_metrics(world.gather(sums))}
    skipped = float(not math.isfinite(norm))
    share = sum(world.gather([len(r.response) for r in active])) / total
    return metrics | {"grad_norm": norm, "skipped": skipped, "active_share": share}


NOTHING = Rollout([0], [], finished=True, old_logprobs=[])  # a pass over it has no loss


def batch_losses(
    model: LM,
    rollouts: list[Rollout],
    settings: LossSettings,
    reference: LM | None,
    head_grad: Tensor | None,
) -> tuple[Tensor, Tensor, Measured]:
    """One forward pass over a micro-batch: ℓ of every token and the mask, (B, T-1), and metrics."""
    batch = collate(rollouts, settings.guided_tokens, model.device)
    tokens, mask, guided, old_logprobs, advantages = batch
    # One policy everywhere: π_θ, π_old, π_ref and the entropy have the same temperature.
    temperature, shared = settings.temperature, SharedPrompts(rollouts, model)
    logprobs, entropy = token_logprobs(
        model, tokens, mask, True, head_grad, temperature=temperature, shared=shared
    )
    ref_logprobs = None
    if reference is not None:
        with torch.no_grad():
            ref_logprobs = token_logprobs(
                reference, tokens, mask, temperature=temperature, shared=shared
            )
    losses, measured = token_losses(
        logprobs, old_logprobs, advantages, mask, guided, settings, ref_logprobs
    )
    return losses, mask, measured | {"entropy": (entropy, mask)}


@torch.no_grad()
def snapshot(
    model: LM, rollouts: list[Rollout], micro_batch: int = 16384, temperature: float = 1.0
) -> None:
    """Fill in log π_old where it is missing, of guided tokens too, all after the student's prompt.

    Raises ValueError for a rollout whose old_logprobs do not fit its response.
    """
    waiting = [r for r in rollouts if r.old_logprobs is None]
    for batch in micro_batches(waiting, micro_batch):
        tokens, mask, *_ = collate(batch, device=model.device)
        shared = SharedPrompts(batch, model)
        logprobs = token_logprobs(model, tokens, mask, temperature=temperature, shared=shared)
        for r, row, own in zip(batch, logprobs.cpu(), mask.cpu()):
            r.old_logprobs = row[own].tolist()
    for r in rollouts:
        n, known = len(r.response), len(r.old_logprobs or ())
        if n != known:
            raise ValueError(f"a rollout has {n} tokens and {known} log-probabilities of π_old")


def token_logprobs(
    model: LM,
    tokens: Tensor,
    where: Tensor | None = None,
    entropy: bool = False,
    head_grad: Tensor | None = None,
    temperature: float = 1.0,
    shared: SharedPrompts | None = None,
) -> Any:
    """log p(token t+1 | tokens up to t), float32, p = softmax(z / temperature): (B, T) -> (B, T-1).

    With `where` (B, T-1) bool only those positions pass the output head; the others are 0.
    With entropy=True also each position's entropy, (B, T-1), without gradient. `head_grad`: see
    HeadLogprobs. With `shared` the rows are rollouts whose prompts are computed once, and `where`
    are their responses. Raises ValueError unless the temperature is above 0.
    """
    if not temperature > 0:
        raise ValueError(f"log-probabilities need a temperature above 0, not {temperature}")
    if where is None:
        where = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
    at = where.flatten().nonzero().squeeze(1)  # (N,)
    size = min(slice_size(len(at), tokens.device), model.config.vocab_size)
    both = logprobs_at(model, tokens, at, shared, size, head_grad, temperature)
    placed = [x.new_zeros(where.shape).masked_scatter(where, x) for x in both]
    return placed if entropy else placed[0]


def logprobs_at(
    model: LM, tokens: Tensor, at: Tensor, shared: SharedPrompts | None, *options: Any
) -> tuple[Tensor, Tensor]:
    """log p of the next token and the entropy at positions `at` of the flattened (B, T-1): (N,).

    options: size, head_grad, temperature of HeadLogprobs. torch.compile makes one graph of the
    forward pass and one of the backward pass.
    """
    if shared:
        states = model.hidden(shared.tokens, shared)[0, shared.predicting]
    else:
        states = model.hidden(tokens[:, :-1]).flatten(0, 1)[at]
    targets = tokens[:, 1:].flatten()[at]
    return HeadLogprobs.apply(states, model.head.weight, targets, *options)  # type: ignore
