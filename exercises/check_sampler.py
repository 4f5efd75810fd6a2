"""Checks of the exercises about sampling: 3 temperature and top-p, 7 the inverse of the CDF."""

import torch
from comparing import Task, as_tuple, clone, compare, misfit, same

import sampler

GRID = (
    1000  # equally spaced random numbers: the share of them that draws a token is its probability
)
OWN_NUMBERS = (
    "draws other tokens when it gets the same numbers again; take the randomness from `uniform`, "
    "none of your own"
)

# 3. Top-p sampling.


def shares(draw):
    """The distribution (B, V) a sampler draws from, and the log-probability (B, V) of each token.

    A log-probability is 0 where a token is never drawn.
    """

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


def sample_by_hand(
    logits,
    uniform,
    temperature,
    top_p,
    heat="divides",
    cut="after",
    crossing=True,
    ranks=False,
    scaled=True,
    told="policy",
):
    """`heat`: what the temperature does; `cut`: when top-p is applied; `told`: the log-probs."""
    t = {"divides": temperature, "multiplies": 1 / temperature, "nothing": 1}[heat]
    hot = logits / t
    probs = hot.softmax(-1)
    before = logits.softmax(-1) if cut == "before" else probs
    if cut != "never":
        ranked, order = before.sort(-1, descending=True)
        total = ranked.cumsum(-1)
        beyond = total - ranked >= top_p if crossing else total > top_p
        beyond[:, 0] = False
        probs = probs.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
    weights = probs.sort(-1, descending=True)[0] if ranks else probs
    cdf = weights.cumsum(-1)
    target = uniform[:, None] * (cdf[:, -1:] if scaled else 1)
    tokens = torch.searchsorted(cdf, target).clamp(max=logits.shape[1] - 1)
    logprobs = {
        "policy": hot.log_softmax(-1),
        "cold": logits.log_softmax(-1),
        "cut": (probs / probs.sum(-1, keepdim=True)).log(),
        "p": hot.softmax(-1),
    }[told]
    ids = probs.argsort(-1, descending=True).gather(-1, tokens) if ranks == "ids" else tokens
    return tokens.squeeze(-1), logprobs.gather(-1, ids).squeeze(-1)


def distributions(generator):
    logits = torch.randn(3, 7, generator=generator)
    return [(logits, t, p) for t, p in ((1.0, 1.0), (1.0, 0.8), (0.6, 0.9), (0.4, 0.7), (1.5, 0.7))]


SAMPLE = Task(
    "sample",
    lambda *arguments: sampler.sample(*arguments),
    sample_by_hand,
    {
        "drops the token that crosses top_p; it is the last one that stays": {"crossing": False},
        "does not cut anything off: top_p makes no difference": {"cut": "never"},
        "multiplies by the temperature; divide by it": {"heat": "multiplies"},
        "takes no notice of the temperature": {"heat": "nothing"},
        "cuts before it applies the temperature; top-p is of the probabilities at that "
        "temperature": {"cut": "before"},
        "returns places in the sorted order; look up which id of the vocabulary stands there": {
            "ranks": True
        },
        "returns the right log-probabilities, but of tokens only their places in the sorted order; "
        "look up which id of the vocabulary stands there": {"ranks": "ids"},
        "draws wrongly after the cut: what is left must sum to 1 again (or scale u by its sum)": {
            "scaled": False
        },
        "gives log-probabilities of what is left after the cut; π_old is the policy at that "
        "temperature, nothing cut off": {"told": "cut"},
        "gives log-probabilities at temperature 1; π_old is the policy that was sampled, at that "
        "temperature": {"told": "cold"},
        "gives probabilities where log-probabilities are asked for": {"told": "p"},
    },
    distributions,
    "logits temperature top_p",
    "the shares of the tokens drawn, the log-probabilities",
    close=2.5 / GRID,
    look=shares,
)


def check_sample(solution, seed):
    generator = torch.Generator().manual_seed(seed)
    logits, uniform = torch.randn(600, 7, generator=generator), torch.rand(600, generator=generator)
    arguments = [logits, uniform, 1.0, 0.9]
    result = solution(*clone(arguments))
    ids = torch.zeros(600, dtype=torch.int64)
    if not isinstance(result, tuple) or len(result) != 2:
        return "should return two tensors, token ids (B,) and their log-probabilities (B,)"
    tokens, logprobs = result
    if not torch.is_tensor(tokens) or tokens.shape != ids.shape or tokens.dtype != ids.dtype:
        return misfit(tokens, ids, "token ids")
    if not torch.is_tensor(logprobs) or logprobs.shape != ids.shape:
        return misfit(logprobs, ids, "log-probabilities")
    if not torch.equal(tokens, solution(*clone(arguments))[0]):
        return OWN_NUMBERS
    if not 0 <= tokens.min() <= tokens.max() < 7:
        return (
            f"draws token {tokens.max()} of a vocabulary of 7: what is left after the cut must "
            "sum to 1 again (or scale u by its sum)"
        )
    return compare(solution, SAMPLE, seed)


# 7. The inverse of the CDF.


def program_draw(weights, uniform):
    return sampler.sample(weights.log(), uniform, 1.0, 1.0)[0]


def draw_by_hand(
    weights,
    uniform,
    scaled=True,
    strict=False,
    shift=0,
    u="own",
    softmax=False,
    keep=False,
):
    uniform = {"own": uniform, "first": uniform[:1].expand(len(uniform)), "1 − u": 1 - uniform}[u]
    cdf = (weights.softmax(-1) if softmax else weights).cumsum(-1)
    target = uniform[:, None] * (cdf[:, -1:] if scaled else 1)
    tokens = torch.searchsorted(cdf.contiguous(), target, right=strict) + shift
    return tokens if keep else tokens.squeeze(-1)


def weights_and_numbers(generator):
    random = torch.rand(16, 9, generator=generator) + 0.01
    random[:, 0] = 0  # the first two tokens are impossible
    random[:, 1] = 0
    uniform = 1 - torch.rand(16, generator=generator)
    tiny = torch.full((16,), 1e-9)
    # Four tokens of 9 are possible, so that u lies exactly on a step of the CDF.
    chosen = torch.rand(8, 9, generator=generator).argsort() < 4
    steps = torch.tensor([0.25, 0.5, 0.75, 1.0]).repeat(2)
    return [(random, uniform), (chosen.float(), steps), (random, tiny)]


DRAW = Task(
    "draw",
    program_draw,
    draw_by_hand,
    {
        "takes the weights to sum to 1; scale u by their sum, or divide them by it": {
            "scaled": False
        },
        "looks for a cumulative sum above u; the first that is at least u counts. At u = 1 "
        "there is none above": {"strict": True},
        "draws the token before the right one": {"shift": -1},
        "draws the token behind the right one": {"shift": 1},
        "draws every row with the first row's number; row b has uniform[b]": {"u": "first"},
        "goes through the tokens from the other end (1 − u); that has the same probabilities, but "
        "the task fixes the token for each u": {"u": "1 − u"},
        "applies a softmax; the weights are probabilities already, but for their sum": {
            "softmax": True
        },
        "returns ids of shape (B, 1); they should be (B,)": {"keep": True},
    },
    weights_and_numbers,
    "weights uniform",
    "tokens",
)


def check_draw(solution, seed):
    case = DRAW.cases(torch.Generator().manual_seed(seed))[0]
    weights, uniform = case
    once, again = (as_tuple(solution(weights.clone(), uniform.clone())) for _ in range(2))
    if not same(once, again, 0):
        return OWN_NUMBERS
    if torch.is_tensor(once[0]) and torch.equal(once[0], weights.argmax(-1)):
        return "takes the likeliest token whatever u is; draw it with u"
    return compare(solution, DRAW, seed)
