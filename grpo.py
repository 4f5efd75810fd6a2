"""Group-relative policy optimisation with Advantage-Aware Shaping: from rewarded rollouts to one optimiser step.

Symbols as in the paper: π_θ the policy being trained, π_old its snapshot at sampling time, Â the advantage,
ρ = π_θ/π_old, w the shaped weight of guided tokens, γ(Â) its coefficient, sg(·) stop-gradient.
Nothing here knows of teachers beyond a per-token `guided` mask.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from run.world import World, full

if TYPE_CHECKING:
    from model import LM


@dataclass
class Rollout:
    prompt: list[int]
    response: list[int]
    finished: bool  # exactly one stop token, at the end
    guided_from: int | None = None  # index in response where the teacher's words begin; None: nobody helped
    reward: float = 0.0
    advantage: float = 0.0
    question: str = ""
    answer: str = ""
    text: str = ""  # the response without its stop token
    old_logprobs: list[float] | None = field(default=None, repr=False)  # log π_old a token; None: to be computed


def group_advantages(rewards: Tensor) -> Tensor:
    """Z-score rewards inside each question's group: (Q, G) -> (Q, G). METHOD step 7.

    A group whose rewards are all equal gets zeros: it carries no signal. Raises ValueError for anything but a matrix of
    finite numbers.
    """
    if rewards.dim() != 2 or not rewards.isfinite().all():
        raise ValueError(f"rewards must be a matrix of finite numbers, (questions, samples), not {tuple(rewards.shape)}")
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # not left to rounding, which 1e-6 would blow up
    if equal.all():
        return torch.zeros_like(rewards)
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return (centred / (rewards.std(dim=1, keepdim=True) + 1e-6)).masked_fill(equal, 0.0)  # std uses n-1


def shaping_coefficient(advantages: Tensor, gamma_min: float = 0.001, gamma_max: float = -0.001, a_min: float = -4.0,
                        a_max: float = 4.0, published: bool = False) -> Tensor:
    """γ(Â) of Advantage-Aware Shaping, any shape: γ_min for the best advantage, γ_max for the worst."""
    gamma = gamma_min + (gamma_max - gamma_min) * (a_max - advantages) / (a_max - a_min)
    if published:  # the published bounds are the wrong way round, so clamp returns γ_max everywhere
        return torch.clamp(gamma, gamma_min, gamma_max)
    return torch.clamp(gamma, min(gamma_min, gamma_max), max(gamma_min, gamma_max))


def shaped_ratio(logprobs: Tensor, advantages: Tensor, guards: bool = True, **shaping: Any) -> Tensor:
    """w = π_θ / (sg(π_θ) + γ(Â)): (B, T) -> (B, T), differentiable; ∇w = π/(π+γ)·∇log π.

    Guards: (a) a denominator below 0 becomes 1.0001·sg(π), (b) one above 1 becomes 0.9999·sg(π).
    """
    pi = logprobs.detach().exp()  # sg(π_θ)
    denominator = pi + shaping_coefficient(advantages, **shaping)
    scale = pi / denominator
    if guards:
        scale = torch.where(denominator > 1, 1 / 0.9999, scale)  # (b)
        scale = torch.where(denominator <= 0, 1 / 1.0001, scale)  # (a); 0 itself would divide by zero
    return (logprobs - logprobs.detach()).exp() * scale  # the first factor is 1 and carries ∇log π, even where π underflows


def clipped_loss(ratio: Tensor, advantages: Tensor, clip: float = 0.2,
                 dual_clip: float | None = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's pessimistic bound with a dual clip for Â < 0, a token: (B, T), and the masks of where each one binds."""
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = torch.maximum(plain, clipped)  # ℓ = max(−Âρ, −Â·clip(ρ, 1−ε, 1+ε))
    dual_bound = torch.zeros_like(loss, dtype=torch.bool)
    if dual_clip is not None:
        dual_bound = (advantages < 0) & (loss > -advantages * dual_clip)
        loss = torch.where(dual_bound, -advantages * dual_clip, loss)  # if Â < 0: ℓ = min(ℓ, −Â·c)
    return loss, clipped > plain, dual_bound


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, guided: Tensor | None = None,
                **options: Any) -> tuple[Tensor, dict[str, float]]:
    """Mean loss over the tokens in `mask` and its metrics; options and metrics are those of token_losses."""
    losses, measured = token_losses(logprobs, old_logprobs, advantages, mask, guided, **options)
    loss = losses.sum() / mask.sum().clamp(min=1)
    means = {key: (values.sum() / where.sum().clamp(min=1)).item() for key, (values, where) in measured.items()}
    return loss, {"loss": loss.item(), **means}


def token_losses(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, guided: Tensor | None = None, *,
                 clip: float = 0.2, dual_clip: float | None = 3.0, unlikely: float = 0.01, shaping: str = "aas",
                 guards: bool = True, kl_coef: float = 0.0, ref_logprobs: Tensor | None = None,
                 **coefficients: Any) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The loss of every token (B, T), 0 outside `mask`, and {metric: (values, the tokens it is a mean over)}.

    METHOD section 3. logprobs, old_logprobs, mask, guided: (B, T); advantages: (B, T) or (B, 1). Guided tokens are
    weighed by `shaping`: "aas" (w), "ratio" (none of it: PPO-clip like every token) or "likelihood" (−Â·log π).
    `coefficients` go to shaping_coefficient; `kl_coef` adds the k3 estimate of KL(π_θ ‖ π_ref).
    """
    B, T = logprobs.shape
    if not old_logprobs.shape == mask.shape == (B, T) or advantages.shape not in ((B, 1), (B, T)):
        raise ValueError(f"policy_loss: logprobs {tuple(logprobs.shape)}, old_logprobs {tuple(old_logprobs.shape)}, "
                         f"mask {tuple(mask.shape)} and advantages {tuple(advantages.shape)} do not fit together")
    mask = mask.bool()
    guided = torch.zeros_like(mask) if guided is None else guided.bool() & mask
    # Padding may hold anything, also NaN; 0 keeps it out of both the loss and its gradient.
    dtype = torch.promote_types(logprobs.dtype, torch.float32)  # half precision is too coarse to sum in
    logprobs, old_logprobs, advantages = (x.to(dtype).expand(B, T).masked_fill(~mask, 0.0)
                                          for x in (logprobs, old_logprobs, advantages))
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.clamp(-20, 20).exp()  # ρ; e^20 is far beyond every clip and far from overflow

    loss, clipped, dual_clipped = clipped_loss(ratio, advantages, clip, dual_clip)
    pi = logprobs.detach().exp()
    shaped = guided & ~((advantages < 0) & (pi < unlikely)) if shaping != "ratio" else torch.zeros_like(mask)  # guard (c)
    # Elsewhere log π counts as 0: unguarded, a w of 0/0 that nobody uses would still send NaN back through where().
    weight = shaped_ratio(logprobs.masked_fill(~guided, 0.0), advantages, guards, **coefficients)  # w
    if shaping == "aas":
        loss = torch.where(shaped, -advantages * weight, loss)  # ℓ = −Â·w, unclipped
    elif shaping == "likelihood":
        loss = torch.where(shaped, -advantages * logprobs, loss)
    if kl_coef:
        if ref_logprobs is None:
            raise ValueError("kl_coef needs ref_logprobs, the log-probabilities of the reference")
        log_r = (ref_logprobs - logprobs).masked_fill(~mask, 0.0).clamp(-20, 20)
        loss = loss + kl_coef * (log_r.exp() - 1 - log_r)  # k3

    ordinary = mask & ~shaped
    means = {"kl_old": (ratio - 1 - log_ratio, mask),  # k3 estimate of KL(π_old ‖ π_θ)
             "clip_fraction": (clipped & ordinary, mask), "dual_clip_fraction": (dual_clipped & ordinary, mask),
             "guided_share": (guided, mask), "shaped_share": (shaped, mask), "w_guided": (weight, guided),
             "pi_guided": (pi, guided)}
    return loss * mask, {key: (values.detach() * where, where) for key, (values, where) in means.items()}


def token_logprobs(model: LM, tokens: Tensor, where: Tensor | None = None, entropy: bool = False,
                   head_grad: Tensor | None = None, temperature: float = 1.0) -> Any:
    """log p(token t+1 | tokens up to t): (B, T) -> (B, T-1) float32, of the policy softmax(z / temperature).

    With `where` (B, T-1) bool only those positions pass the output head; the others are 0. With entropy=True also
    returns each position's entropy (B, T-1), without gradient. The logits never exist as a whole: HeadLogprobs.
    """
    if not temperature > 0:
        raise ValueError(f"log-probabilities to train on need a temperature above 0, not {temperature}")
    shape = tokens[:, 1:].shape
    at = torch.arange(shape.numel(), device=tokens.device) if where is None else where.flatten().nonzero().squeeze(1)

    def placed(values: Tensor) -> Tensor:
        return values.new_zeros(shape.numel()).index_copy(0, at, values).view(shape)

    size = min(slice_size(len(at), tokens.device), model.config.vocab_size)
    chosen, spread = logprobs_at(model, tokens, at, size, head_grad, temperature)
    return (placed(chosen), placed(spread)) if entropy else placed(chosen)


def logprobs_at(model: LM, tokens: Tensor, at: Tensor, size: int, head_grad: Tensor | None,
                temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log p of the next token and the entropy at the positions `at` (N,) of the flattened (B, T-1): (N,) each.

    This much a compiler takes as one graph forward and one backward, a handful of them for all B, T and N.
    """
    states, targets = model.hidden(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
    both: tuple[Tensor, Tensor] = HeadLogprobs.apply(  # type: ignore[no-untyped-call]
        states[at], model.head.weight, targets[at], size, head_grad, temperature)
    return both


class HeadLogprobs(torch.autograd.Function):
    """states (N, D), head weight (V, D), targets (N,) -> log p(target) and entropy (N,), `size` rows of the head at a time.

    p = softmax(z / temperature), z the logits. Those of a slice are used and forgotten; the backward pass computes them
    again, and p from the saved log-normaliser.
    Slices of the vocabulary rather than of positions: the weights and their gradient, by far the larger side, are then
    read and written once. `head_grad` is a buffer (what an optimizer reads as the weight's gradient) to add the head's
    gradient to, in place: a tied embedding would otherwise wait for it, as large as itself, until the end of the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, size: int,
                head_grad: Tensor | None, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        ctx.size, ctx.temperature = size, temperature
        log_z = torch.full(targets.shape, -1e30, device=states.device)  # of the slices so far
        mean, chosen = torch.zeros_like(log_z), torch.zeros_like(log_z)  # mean: of log p, so minus the entropy
        for start, rows in slices(weight, ctx.size):
            logits = scaled_logits(states, rows, temperature)
            before, log_z = log_z, torch.logaddexp(log_z, logits.logsumexp(-1))
            at, inside = place(targets, start, len(rows))
            chosen = torch.where(inside, logits.gather(-1, at).squeeze(-1), chosen)
            shrunk, log_p = before - log_z, logits.sub_(log_z[:, None])
            mean = shrunk.exp() * (mean + shrunk) + (log_p.exp() * log_p).sum(-1)
        ctx.save_for_backward(states, weight, targets, log_z)
        ctx.head_grad = head_grad
        entropy = -mean
        ctx.mark_non_differentiable(entropy)
        return chosen - log_z, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        states, weight, targets, log_z = ctx.saved_tensors
        states_grad = torch.zeros_like(states, dtype=torch.float32)
        weight_grad = torch.zeros_like(weight) if ctx.head_grad is None else ctx.head_grad
        grad = grad / ctx.temperature  # of z / temperature by z
        for start, rows in slices(weight, ctx.size):
            # d log p(target) / dz = (one-hot - p) / temperature
            log_p = scaled_logits(states, rows, ctx.temperature).sub_(log_z[:, None])
            logits_grad = log_p.exp_().mul_(-grad[:, None])
            at, inside = place(targets, start, len(rows))
            logits_grad = logits_grad.scatter_add_(-1, at, (grad * inside)[:, None]).to(weight.dtype)
            states_grad += logits_grad @ rows
            here = weight_grad[start : start + len(rows)]
            here.addmm_(logits_grad.T, states) if here.dtype == states.dtype else here.add_(logits_grad.T @ states)
        return states_grad.to(states.dtype), weight_grad if ctx.head_grad is None else None, None, None, None, None


def scaled_logits(states: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """z / temperature for some rows of the head: (N, D), (R, D) -> (N, R) float32."""
    logits = (states @ rows.T).float()
    return logits if temperature == 1 else logits.div_(temperature)


def slice_size(positions: int, device: torch.device | str) -> int:
    """Rows of the head that are computed at once: up to 16 MB of logits on a CPU, whose caches they should fit, 256 MB on a GPU.

    A power of two, so that there are few sizes to compile for.
    """
    logits: int = 1 << (22 if torch.device(device).type == "cpu" else 26)
    return max(512, 1 << (logits // max(1, positions)).bit_length() - 1)


def slices(weight: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    return ((start, weight[start : start + size]) for start in range(0, len(weight), size))


def place(targets: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Where a target stands in a slice of the vocabulary, (N, 1), and whether it is in there at all, (N,)."""
    at = targets - start
    return at.clamp(0, size - 1)[:, None], (at >= 0) & (at < size)


def collate(rollouts: list[Rollout], guided_tokens: str = "guidance", device: str | torch.device = "cpu") -> list[Tensor]:
    """Pad rollouts to one batch: tokens (B, T), and (B, T-1) mask, guided, old_logprobs, and advantages (B, 1)."""
    width = max(len(r.prompt) + len(r.response) for r in rollouts)
    tokens = torch.zeros(len(rollouts), width, dtype=torch.int64)
    mask = torch.zeros(len(rollouts), width - 1, dtype=torch.bool)
    guided, old = torch.zeros_like(mask), torch.zeros(mask.shape)
    for i, r in enumerate(rollouts):
        start, end = len(r.prompt) - 1, len(r.prompt) + len(r.response) - 1  # position t predicts token t+1
        tokens[i, : end + 1] = torch.tensor(r.prompt + r.response)
        mask[i, start:end] = True
        if r.guided_from is not None:
            guided[i, start + (r.guided_from if guided_tokens == "guidance" else 0) : end] = True
        if r.old_logprobs is not None:
            old[i, start:end] = torch.tensor(r.old_logprobs)
    advantages = torch.tensor([[r.advantage] for r in rollouts])
    return [x.to(device) for x in (tokens, mask, guided, old, advantages)]


def micro_batches(rollouts: list[Rollout], size: int) -> list[list[Rollout]]:
    """Rollouts sorted by length, cut into batches of at most `size` tokens, padding counted (at least one rollout each).

    Of all such cuts the cheapest: a batch costs its tokens, padding counted, and for being a pass of its own size / 16 more.
    """
    rollouts = sorted(rollouts, key=lambda r: len(r.prompt) + len(r.response))
    cheapest = [(0.0, 0)]  # of the first i rollouts: the cost, and where the last batch begins
    for i, r in enumerate(rollouts):
        width = len(r.prompt) + len(r.response)
        starts = range(max(0, i + 1 - max(1, size // width)), i + 1)
        cheapest.append(min((cheapest[j][0] + (i + 1 - j) * width + size / 16, j) for j in starts))
    batches, end = [], len(rollouts)
    while end:
        start = cheapest[end][1]
        batches.append(rollouts[start:end])
        end = start
    return batches[::-1]


class MasterAdamW(torch.optim.AdamW):
    """AdamW on float32 master copies of half-precision weights; on float32 weights it is AdamW itself.

    A step of 1e-6 is lost in bfloat16's 8 bits. Each gradient is added to its master's in float32 as soon as the backward
    pass has it, so micro-batches add up exactly as well; after a step the weights are the masters, rounded.
    """

    def __init__(self, parameters: Iterable[Tensor], **options: Any) -> None:
        self.copies: list[tuple[Tensor, Tensor]] = []  # (half-precision weight, its master)
        super().__init__([self.master_of(p) for p in parameters], **options)

    def master_of(self, weight: Tensor) -> Tensor:
        if weight.dtype == torch.float32:
            return weight
        master = weight.detach().float().requires_grad_(True)
        self.copies.append((weight, master))

        def collect(_: Tensor) -> None:
            if weight.grad is not None:  # none came by this way: see gradient_buffer
                master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
                weight.grad = None

        weakref.finalize(self, weight.register_post_accumulate_grad_hook(collect).remove)  # goes when this optimizer goes
        return master

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for weight, master in self.copies:
            weight.copy_(master)


def gradient_buffer(optimizer: torch.optim.Optimizer, weight: Tensor) -> Tensor:
    """Zeros that `optimizer` will read as the gradient of `weight`: the weight's own .grad, or its master's."""
    owner: Tensor = dict(getattr(optimizer, "copies", ())).get(weight, weight)
    buffer = owner.grad = torch.zeros_like(owner)
    return buffer


@torch.no_grad()
def snapshot(model: LM, rollouts: list[Rollout], micro_batch: int = 16384, world: World = World(),
             temperature: float = 1.0) -> None:
    """Fill in log π_old of every rollout that has none, under the student's prompt, the guided part included."""
    if not (waiting := [r for r in rollouts if r.old_logprobs is None]):
        return
    model = world.whole(model)
    for batch in micro_batches(world.share(waiting), micro_batch):
        tokens, mask, *_ = collate(batch, device=model.device)
        logprobs = token_logprobs(model, tokens, mask, temperature=temperature)
        for r, row, m in zip(batch, logprobs, mask):
            r.old_logprobs = row[m].tolist()
    for r, known in zip(waiting, world.gather([r.old_logprobs for r in world.share(waiting)])):
        r.old_logprobs = known


def update(model: LM, optimizer: torch.optim.Optimizer, rollouts: list[Rollout], *, micro_batch: int = 16384,
           guided_tokens: str = "guidance", max_grad_norm: float = 1.0, reference: LM | None = None,
           published_dual_clip: bool = False, world: World = World(), temperature: float = 1.0,
           **loss_options: Any) -> dict[str, float]:
    """One optimiser step on a mini-batch of rollouts; returns its metrics, token-means over the whole mini-batch.

    The gradient does not depend on `micro_batch` (tokens a forward pass). Rollouts with Â = 0 have no gradient: without
    a KL term they are not computed, but their tokens count in the mean loss. A gradient that is not finite is not
    applied; metrics["skipped"] is then 1. `published_dual_clip` leaves the dual clip out where no rollout is guided.
    π_θ, π_old, the reference and the entropy are all of softmax(z / temperature), the policy that was sampled.
    All processes of `world` give the same rollouts, and each computes its share of the gradient.
    """
    snapshot(model, rollouts, micro_batch, world, temperature)
    for r in rollouts:
        if (known := len(r.old_logprobs or ())) != len(r.response):
            raise ValueError(f"a rollout has {len(r.response)} tokens and {known} log-probabilities of the old policy")
    if published_dual_clip and all(r.guided_from is None for r in rollouts):
        loss_options["dual_clip"] = None
    total = max(1, sum(len(r.response) for r in rollouts))
    active = [r for r in rollouts if r.advantage != 0 or loss_options.get("kl_coef")]
    batches = micro_batches(world.share(active), micro_batch)
    mine: tuple[dict[str, float], dict[str, float]] = defaultdict(float), defaultdict(float)  # sums, and of how many tokens
    optimizer.zero_grad(set_to_none=True)
    head_grad = gradient_buffer(optimizer, model.head.weight) if world.size == 1 else None
    # Of a tied embedding the rows of these tokens are then added to it as well, not a whole second gradient.
    model.embed.sparse = model.embed.weight.grad is not None
    for i in range(max(world.gather([len(batches)]))):
        idle = i >= len(batches)  # the others have more to do, and every pass is made together
        tokens, mask, guided, old, advantages = collate(active[:1] if idle else batches[i], guided_tokens, model.device)
        logprobs, entropy = token_logprobs(model, tokens, mask, entropy=True, head_grad=head_grad,
                                           temperature=temperature)
        if reference is not None:
            with torch.no_grad():
                loss_options["ref_logprobs"] = token_logprobs(reference, tokens, mask, temperature=temperature)
        losses, measured = token_losses(logprobs, old, advantages, mask, guided, **loss_options)
        (losses.sum() / total * (0 if idle else world.size)).backward()  # FSDP takes the mean over the processes
        if not idle:
            for key, (values, where) in {**measured, "entropy": (entropy, mask), "loss": (losses.detach(), mask)}.items():
                mine[0][key] += values.sum().item()
                mine[1][key] += int(where.sum())
    model.embed.sparse = False
    norm = full(torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_grad_norm))
    finite = bool(torch.isfinite(norm))
    if active and finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    parts = world.gather([mine])
    sums, counts = ({key: sum(part[i][key] for part in parts) for part in parts for key in part[i]} for i in (0, 1))
    counts["loss"] = total
    return {"loss": 0.0, **{key: sums[key] / n for key, n in counts.items() if n and key in sums}, "grad_norm": norm.item(),
            "skipped": float(not finite), "active_share": sum(len(r.response) for r in active) / total}
