"""Checks of the exercises about the model: 2, the KV cache, and 3, top-p sampling."""

import torch
import torch.nn.functional as F
from comparing import clone, compare

from model import LM, ModelConfig
from sampler import sample as program_sample

# 2. The KV cache.


def full_attention(q, k, v, keys, values):
    """What the model computes without a cache: causal attention over the whole sequence. Of its output, the last position."""
    keys, values = torch.cat((keys, k), 2), torch.cat((values, v), 2)
    queries = torch.cat((q.new_zeros(*q.shape[:2], keys.shape[2] - 1, q.shape[3]), q), 2)
    y = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
    return y[:, :, -1:], keys, values


def by_hand(q, keys, values, power=-0.5, in_turn=False):
    """Attention of one query a row, scores times E^power; query heads take key heads in turn, or neighbours share one."""
    times = q.shape[1] // keys.shape[1]
    keys, values = (
        x.repeat(1, times, 1, 1) if in_turn else x.repeat_interleave(times, 1)
        for x in (keys, values)
    )
    return (q @ keys.mT * q.shape[3] ** power).softmax(-1) @ values


def check_attend(solution):
    generator = torch.Generator().manual_seed(2)

    def tensors(S, B=2, H=6, K=2, E=8):
        return [
            torch.randn(B, heads, T, E, generator=generator)
            for heads, T in ((H, 1), (K, 1), (K, 1), (K, S), (K, S))
        ]

    def grow(cache, new):
        return torch.cat((cache, new), 2)

    def grown(attention):
        return lambda q, k, v, keys, values: (
            attention(q, k, v, keys, values),
            grow(keys, k),
            grow(values, v),
        )

    def all_of(q, k, v, keys, values, **options):
        return by_hand(q, grow(keys, k), grow(values, v), **options)

    def first_of(q, k, v, keys, values):
        return by_hand(q, grow(keys, k)[:, :, :1], grow(values, v)[:, :, :1])

    message = compare(
        solution,
        full_attention,
        [tensors(5), tensors(1), tensors(0)],
        {
            "attends to the cache as it was; the new token sees itself too, so put k and v in first": grown(
                lambda q, k, v, keys, values: by_hand(q, keys, values)
            ),
            "returns the cache as it was; the new k and v belong in it, or the next token will not see this one": lambda q, k, v, keys, values: (
                all_of(q, k, v, keys, values),
                keys,
                values,
            ),
            "puts the new k and v before the others; they go behind them": lambda q, k, v, keys, values: (
                all_of(q, k, v, keys, values),
                grow(k, keys),
                grow(v, values),
            ),
            "leaves out the scale: the scores are divided by √E": grown(
                lambda *a: all_of(*a, power=0)
            ),
            "divides the scores by E; it is √E": grown(lambda *a: all_of(*a, power=-1)),
            "gives the query heads their key heads in turn (0, 1, 0, 1, …); neighbours share one (0, 0, 0, 1, 1, 1), as "
            "repeat_interleave gives them": grown(lambda *a: all_of(*a, in_turn=True)),
            "sees the first position only. With one query is_causal=True hides all but the first key; the one query is the newest "
            "token and may see everything": grown(first_of),
        },
        ["y", "keys", "values"],
    )
    return message or check_inside_the_model(solution)


def check_inside_the_model(solution):
    """Every layer of the program's model, position by position through the solution, against the model itself."""
    torch.manual_seed(2)
    lm = LM(ModelConfig(50, 64, 2, 4, 2, 16, 64)).eval()
    tokens = torch.randint(50, (2, 9))
    whole_sequences, original = [], F.scaled_dot_product_attention

    def step_by_step(q, k, v, *_, **__):
        whole_sequences.append(q.shape)
        keys, values, rows = k[:, :, :0], v[:, :, :0], []
        for t in range(q.shape[2]):
            F.scaled_dot_product_attention = original  # a solution may use it
            y, keys, values = solution(
                q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], keys, values
            )
            rows.append(y)
        F.scaled_dot_product_attention = step_by_step
        return torch.cat(rows, 2)

    with torch.no_grad():
        expected = lm(tokens)
        try:
            F.scaled_dot_product_attention = step_by_step
            found = lm(tokens)
        finally:
            F.scaled_dot_product_attention = original
    if len(whole_sequences) != lm.config.n_layers:
        raise RuntimeError("this check no longer reaches the model's attention")
    if not torch.allclose(found, expected, atol=1e-4):
        return (
            "is right for 6 query heads, 2 key heads and E = 8, but not in the model, which has 4, 2 and 16: "
            "take sizes from the tensors"
        )
    return None


# 3. Top-p sampling.

GRID = 1000  # equally spaced random numbers: the share of them that draws a token is its probability, to 1 in 1000


def shares(draw):
    """Of a sampler, the distribution (B, V) it draws from and the log-probability (B, V) that it gives each token drawn."""

    def observe(logits, temperature, top_p):
        B, V = logits.shape
        rows = torch.arange(B).repeat_interleave(GRID)
        uniform = ((torch.arange(GRID) + 1.0) / GRID).repeat(B)
        tokens, logprobs = draw(logits[rows], uniform, temperature, top_p)
        where = (rows, tokens)
        share = torch.zeros(B, V).index_put(where, torch.ones(len(rows)), accumulate=True) / GRID
        told = torch.zeros(B, V).index_put(where, logprobs.float(), accumulate=True) / GRID
        return share, (told / share).nan_to_num()

    return observe


def check_sample(solution):
    generator = torch.Generator().manual_seed(3)
    logits, uniform = torch.randn(3, 7, generator=generator), torch.rand(3, generator=generator)
    result = solution(logits.clone(), uniform.clone(), 0.7, 0.8)
    if not (
        isinstance(result, tuple)
        and len(result) == 2
        and all(torch.is_tensor(x) and x.shape == (3,) for x in result)
    ):
        return "should return two tensors, token ids (B,) and their log-probabilities (B,)"
    if result[0].dtype != torch.int64:
        return f"returns tokens as {result[0].dtype}; ids are int64"
    many = [logits.repeat(200, 1), torch.rand(600, generator=generator), 1.0, 0.9]
    (tokens, _), (again, _) = solution(*clone(many)), solution(*clone(many))
    if not torch.equal(tokens, again):
        return "draws other tokens when it gets the same numbers again; take the randomness from `uniform`, none of your own"
    if not 0 <= tokens.min() <= tokens.max() < 7:
        return (
            f"draws token {tokens.max()} of a vocabulary of 7: what is left after the cut must sum to 1 again "
            "(or scale u by its sum)"
        )

    def cut(probs, p, crossing=True):
        ranked, order = probs.sort(-1, descending=True)
        beyond = ranked.cumsum(-1) - ranked >= p if crossing else ranked.cumsum(-1) > p
        return probs.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)

    def nucleus(z, t, p):
        return cut((z / t).softmax(-1), p)

    def variant(
        kept=nucleus, logprobs=lambda z, t, p: (z / t).log_softmax(-1), ranks=False, rescaled=True
    ):
        def draw(z, u, t, p):
            probs = kept(z, t, p)
            cdf = (probs.sort(-1, descending=True)[0] if ranks else probs).cumsum(-1)
            tokens = (
                torch.searchsorted(cdf, u[:, None] * (cdf[:, -1:] if rescaled else 1))
                .squeeze(-1)
                .clamp(max=z.shape[1] - 1)
            )
            return tokens, logprobs(z, t, p).gather(-1, tokens[:, None]).squeeze(-1)

        return shares(draw)

    cases = [
        (logits, 1.0, 1.0),
        (logits, 1.0, 0.8),
        (logits, 0.6, 0.9),
        (logits, 0.5, 1.0),
        (logits, 1.5, 0.7),
    ]
    return compare(
        shares(solution),
        shares(program_sample),
        cases,
        {
            "drops the token that crosses top_p; it is the last one that stays": variant(
                lambda z, t, p: cut((z / t).softmax(-1), p, crossing=False)
            ),
            "does not cut anything off: top_p makes no difference": variant(
                lambda z, t, p: (z / t).softmax(-1)
            ),
            "multiplies by the temperature; divide by it": variant(
                lambda z, t, p: nucleus(z, 1 / t, p), lambda z, t, p: (z * t).log_softmax(-1)
            ),
            "takes no notice of the temperature": variant(
                lambda z, t, p: nucleus(z, 1, p), lambda z, t, p: z.log_softmax(-1)
            ),
            "cuts before it applies the temperature; top-p is of the probabilities at that temperature": variant(
                lambda z, t, p: nucleus(z, 1, p) ** (1 / t)
            ),
            "returns places in the sorted order; look up which id of the vocabulary stands there": variant(
                ranks=True
            ),
            "draws wrongly after the cut: what is left must sum to 1 again (or scale u by its sum)": variant(
                rescaled=False
            ),
            "gives log-probabilities of what is left after the cut; π_old is the policy at that temperature, nothing cut off": variant(
                logprobs=lambda z, t, p: (
                    nucleus(z, t, p) / nucleus(z, t, p).sum(-1, keepdim=True)
                ).log()
            ),
            "gives log-probabilities at temperature 1; π_old is the policy that was sampled, at that temperature": variant(
                logprobs=lambda z, t, p: z.log_softmax(-1)
            ),
            "gives probabilities where log-probabilities are asked for": variant(
                logprobs=lambda z, t, p: z.softmax(-1)
            ),
        },
        ["the shares of the tokens drawn", "the log-probabilities"],
        close=2.5 / GRID,
    )
