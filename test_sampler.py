"""Tests of the sampler: against the same model without a cache, and plain Python."""

import math
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import sampler
from model import LM
from sampler import generate, prefill, sample
from test_model import (
    MODEL,
    PEERS,
    PROPERTY,
    SMALL,
    assert_close,
    liven,
    prompts_of,
    random_tokens,
    uncached,
)

STOP = range(0, 61, 7)  # 9 of 61 tokens: some responses finish at once, some never


# ------------------------------------------------------------------ generate


def argmax_loop(prompt, max_tokens, model=MODEL):
    response = []
    while len(response) < max_tokens and not (response and response[-1] in STOP):
        response.append(uncached(prompt + response, model)[-1].argmax().item())
    return response


@pytest.mark.parametrize("seed", range(3))
def test_greedy_generation_is_argmax_token_by_token_without_a_cache(seed):
    prompts = prompts_of(4, 1, 11, 6, 2, seed=10 * seed)
    expected = [argmax_loop(p, 12) for p in prompts]
    assert len(set(map(len, expected))) > 1  # rows leave at different steps
    assert generate(MODEL, prompts, max_tokens=12, stop=STOP, temperature=0) == expected


def test_a_prefix_in_the_cache_is_a_prefix_of_every_prompt():
    head, prompts = prompts_of(6)[0], prompts_of(3, 8, 1, seed=5)
    options = dict(max_tokens=10, stop=STOP, samples=4)
    cached = generate(
        MODEL,
        prompts,
        prefix=prefill(MODEL, [head])[0],
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    assert cached == generate(
        MODEL, [head + p for p in prompts], generator=torch.Generator().manual_seed(0), **options
    )


def record_shapes(monkeypatch):
    shapes, hidden = [], LM.hidden

    def recorded(self, tokens, cache=None):
        shapes.append(tuple(tokens.shape))
        return hidden(self, tokens, cache)

    monkeypatch.setattr(LM, "hidden", recorded)
    return shapes


@pytest.mark.parametrize("n_heads, n_kv_heads", ((2, 2), (6, 2), (4, 1)))
@pytest.mark.parametrize("shared", (0, 40))
def test_greedy_generation_in_groups_of_every_size_with_and_without_a_prefix(
    n_heads, n_kv_heads, shared, monkeypatch
):
    model = liven(LM(replace(SMALL, n_heads=n_heads, n_kv_heads=n_kv_heads)))
    head, tails = random_tokens(shared, seed=7).tolist(), prompts_of(3, 8, 1, 5)
    expected = [argmax_loop(head + tail, 10, model) for tail in tails]
    monkeypatch.setattr(sampler, "PREFILL", 16)  # two passes
    assert (
        generate(
            model, [head + tail for tail in tails], max_tokens=10, stop=STOP, temperature=0, rows=3
        )
        == expected
    )


def test_a_prompt_is_computed_once_for_all_samples_and_finished_rows_leave_the_batch(monkeypatch):
    shapes = record_shapes(monkeypatch)
    responses = generate(
        MODEL,
        prompts_of(3, 9),
        max_tokens=12,
        stop=STOP,
        samples=8,
        generator=torch.Generator().manual_seed(0),
    )
    running = [
        sum(len(r) > t for r in responses) for t in range(1, 12)
    ]  # samples that need a token t
    assert len(set(running)) > 2  # rows leave at different steps
    assert shapes == [(2, 9)] + [(n, 1) for n in running if n]


@pytest.mark.parametrize("block", (0, 1, 5))
@pytest.mark.parametrize("rows", (1, 2, 5, 11, 100))
def test_results_do_not_depend_on_how_many_rows_there_are_nor_on_which_one_a_response_takes(
    rows, block, monkeypatch
):
    prompts = prompts_of(3, 9, 1, 6)
    options = dict(max_tokens=12, stop=STOP, samples=6, logprobs=True)
    expected, expected_logs = generate(
        MODEL, prompts, generator=torch.Generator().manual_seed(0), **options
    )
    assert {1, 12} <= set(map(len, expected))
    monkeypatch.setitem(sampler.BLOCK, "cpu", block)
    monkeypatch.setattr(sampler, "WINDOW", 8)
    shapes = record_shapes(monkeypatch)
    found, logs = generate(
        MODEL, prompts, generator=torch.Generator().manual_seed(0), rows=rows, **options
    )
    assert found == expected
    for a, b in zip(logs, expected_logs, strict=True):
        assert_close(torch.tensor(a), torch.tensor(b))
    assert max(B for B, T in shapes if T == 1) <= rows
    assert sum(B for B, T in shapes if T > 1) in (
        3,
        4,
    )  # a prompt once for all its samples; the one of 1 token may pass alone


def test_prompts_are_computed_in_passes_of_bounded_size(monkeypatch):
    prompts, options = prompts_of(3, 9, 4, 6, 10, 2), dict(max_tokens=12, stop=STOP, samples=2)
    expected = generate(MODEL, prompts, generator=torch.Generator().manual_seed(0), **options)
    shapes = record_shapes(monkeypatch)
    for size, passes in (
        (20, [(2, 9), (2, 6), (2, 10)]),
        (5, [(1, n) for n in (3, 9, 4, 6, 10, 2)]),
    ):  # one that is too long: alone
        monkeypatch.setattr(sampler, "PREFILL", size)
        shapes.clear()
        assert (
            generate(MODEL, prompts, generator=torch.Generator().manual_seed(0), **options)
            == expected
        )
        assert [shape for shape in shapes if shape[1] > 1] == passes


def test_a_long_prompt_makes_no_pass_smaller_but_its_own_and_a_pass_is_forgotten_when_it_has_entered(
    monkeypatch,
):
    prompts, kept = prompts_of(2, 2, 2, 2, 2, 9), []
    monkeypatch.setattr(sampler, "PREFILL", 10)
    shapes = record_shapes(monkeypatch)
    compute = sampler.Queue.compute
    monkeypatch.setattr(
        sampler.Queue,
        "compute",
        lambda self, *given: (kept.append(self.computed), compute(self, *given)),
    )
    generate(
        MODEL,
        prompts,
        max_tokens=3,
        stop=(),
        samples=3,
        rows=7,
        generator=torch.Generator().manual_seed(0),
    )
    assert [shape for shape in shapes if shape[1] > 1] == [
        (3, 2),
        (2, 2),
        (1, 9),
    ]  # 7 rows ask for 3 prompts at first
    assert kept == [None] * 3


def test_a_place_that_becomes_free_is_taken(monkeypatch):
    shapes = record_shapes(monkeypatch)
    responses = generate(
        MODEL,
        prompts_of(3),
        max_tokens=12,
        stop=STOP,
        samples=40,
        rows=4,
        generator=torch.Generator().manual_seed(0),
    )
    steps = [B for B, T in shapes if T == 1]
    assert sum(steps) == sum(len(r) - 1 for r in responses)  # no row runs that is not asked for
    last_entry = max(i for i, B in enumerate(steps) if B == 4)
    assert all(B == 4 for B in steps[:last_entry])  # all are in use until none is waiting


def test_what_all_prompts_begin_with_is_computed_once(monkeypatch):
    head, tails = prompts_of(40)[0], prompts_of(3, 8, 1, seed=5)
    prompts, options = [head + tail for tail in tails], dict(max_tokens=10, stop=STOP, samples=4)
    expected = [argmax_loop(p, 10) for p in prompts]
    shapes = record_shapes(monkeypatch)
    assert generate(MODEL, prompts, temperature=0, max_tokens=10, stop=STOP) == expected
    assert shapes[:2] == [(1, 40), (3, 8)]
    monkeypatch.setattr("sampler.SHARE_FROM", 99)
    apart = generate(MODEL, prompts, generator=torch.Generator().manual_seed(0), **options)
    monkeypatch.setattr("sampler.SHARE_FROM", 1)
    assert generate(MODEL, prompts, generator=torch.Generator().manual_seed(0), **options) == apart


@pytest.mark.parametrize(
    "prompts, shared",
    [
        ([[1, 2, 3]], 0),
        ([[1, 2, 3], [1, 2, 4], [1, 2]], 1),
        ([[1, 2, 3]] * 2, 2),
        ([[1, 2], [2, 2]], 0),
        ([[1], [1, 2]], 0),
        ([[5, 6, 7, 1], [5, 6, 7, 9], [5, 6, 8]], 2),
    ],
)
def test_the_common_prefix_leaves_every_prompt_a_token(prompts, shared):
    assert sampler.shared_prefix(prompts) == shared


def test_generation_ends_with_its_last_row(monkeypatch):
    shapes = record_shapes(monkeypatch)
    responses = generate(MODEL, prompts_of(5), max_tokens=50, stop=range(61), samples=3)
    assert [len(r) for r in responses] == [1, 1, 1]
    assert shapes == [(1, 5)]


def test_a_finished_response_holds_one_stop_token_at_its_end():
    responses = generate(
        MODEL,
        prompts_of(4, 7),
        max_tokens=10,
        stop=STOP,
        samples=20,
        generator=torch.Generator().manual_seed(0),
    )
    finished = [r for r in responses if r[-1] in STOP]
    cut = [r for r in responses if r[-1] not in STOP]
    assert finished and cut and len(responses) == 40
    assert all(sum(t in STOP for t in r) == 1 for r in finished)
    assert all(len(r) == 10 and not any(t in STOP for t in r) for r in cut)


def test_a_stop_id_that_the_model_cannot_emit_is_ignored(tmp_path):
    """As transformers does with the eos_token_id of a file that was written for a larger model."""
    theirs = liven(transformers.AutoModelForCausalLM.from_config(PEERS["llama"]))
    theirs.save_pretrained(tmp_path)
    ours, prompt = LM.load(tmp_path), prompts_of(5)[0]

    def greedy(stop):
        tokens = torch.tensor([prompt])
        return theirs.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=stop,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()

    fifth = greedy(None)[4]
    for stop in ([128001, 128009], [fifth, 128009, 61], [fifth, -1]):
        known = [i for i in stop if i >= 0]  # transformers warns of the others
        assert generate(ours, [prompt], max_tokens=20, stop=stop, temperature=0) == [greedy(known)]


def test_responses_come_question_by_question():
    prompts = prompts_of(2, 5, 9)
    expected = [argmax_loop(p, 6) for p in prompts for _ in range(3)]
    assert generate(MODEL, prompts, max_tokens=6, stop=STOP, samples=3, temperature=0) == expected


def test_the_generator_decides_everything_and_nothing_else_is_drawn_from():
    def run(seed):
        return generate(
            MODEL,
            prompts_of(3, 6),
            max_tokens=10,
            stop=STOP,
            samples=4,
            generator=torch.Generator().manual_seed(seed),
        )

    first, state = run(0), torch.get_rng_state()
    torch.rand(7)
    assert run(0) == first != run(1)
    torch.set_rng_state(state)
    run(0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("place", range(4))
def test_a_response_does_not_depend_on_its_neighbours(place):
    def response(neighbour_seed):
        prompts = prompts_of(2, 9, 4, 6, seed=neighbour_seed)
        prompts[place] = prompts_of(5, seed=99)[0]
        responses = generate(
            MODEL,
            prompts,
            max_tokens=12,
            stop=STOP,
            generator=torch.Generator().manual_seed(3 + place),
        )
        return responses.pop(place), responses

    (a, neighbours), *others = [response(seed) for seed in (10, 20, 30)]
    assert all(a == b and neighbours != n for b, n in others)


@pytest.mark.parametrize(
    "temperature, top_p", [(0, 1.0), (0.5, 1.0), (1.0, 1.0), (1.0, 0.8), (1.5, 0.8)]
)
def test_sampled_log_probs_are_those_of_the_sampled_policy_before_top_p_and_greedy_ones_the_models_own(
    temperature, top_p
):
    prompts = prompts_of(3, 8)
    responses, logs = generate(
        MODEL,
        prompts,
        max_tokens=10,
        stop=STOP,
        samples=4,
        temperature=temperature,
        top_p=top_p,
        generator=torch.Generator().manual_seed(0),
        logprobs=True,
    )
    for prompt, response, log in zip(
        [p for p in prompts for _ in range(4)], responses, logs, strict=True
    ):
        logits = uncached(prompt + response)[len(prompt) - 1 : -1].double()  # (len(response), V)
        expected = (logits / (temperature or 1)).log_softmax(-1)
        assert_close(torch.tensor(log), expected[torch.arange(len(response)), response].float())


def test_a_temperature_next_to_0_is_greedy_and_overflows_nowhere():
    logits, uniform = torch.randn(50, 9) * 30, 1 - torch.rand(50)
    tokens, logprobs = sample(logits, uniform, 1e-38, 1.0)
    assert torch.equal(tokens, logits.argmax(-1)) and (logprobs == 0).all()


def test_every_step_is_seen_while_it_happens():
    seen = [[] for _ in range(6)]

    def on_step(rows, tokens):
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            seen[row].append(token)

    assert (
        generate(MODEL, prompts_of(3, 5), max_tokens=10, stop=STOP, samples=3, on_step=on_step)
        == seen
    )


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="1 to 60 tokens"):
        generate(MODEL, [[1, 2], []], max_tokens=4, stop=STOP)


def test_a_prompt_may_fill_the_context_and_no_more():
    head, full = prefill(MODEL, prompts_of(10))[0], prompts_of(64 - 4 - 10)
    generate(MODEL, full, max_tokens=4, stop=(), prefix=head)
    with pytest.raises(ValueError, match="context is 64"):
        generate(MODEL, [full[0] + [1]], max_tokens=4, stop=(), prefix=head)


@pytest.mark.parametrize("options", [{"top_p": 0.0}, {"top_p": 1.5}, {"temperature": -1.0}])
def test_sampling_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        generate(MODEL, prompts_of(3), max_tokens=4, stop=STOP, **options)


def test_no_prompts_give_no_responses():
    assert generate(MODEL, [], max_tokens=4, stop=STOP) == []
    assert generate(MODEL, [], max_tokens=4, stop=STOP, logprobs=True) == ([], [])


# ------------------------------------------------------------------ sample


def naive_distribution(logits, temperature, top_p):
    """Plain Python, float64: {token: probability} of the fewest likeliest tokens that together reach top_p."""
    weight = {token: math.exp(x / temperature) for token, x in enumerate(logits)}
    total, nucleus = sum(weight.values()), {}
    for token in sorted(weight, key=weight.get, reverse=True):
        if sum(nucleus.values()) < top_p * total:
            nucleus[token] = weight[token]
    return {token: w / sum(nucleus.values()) for token, w in nucleus.items()}


@PROPERTY
@given(
    st.lists(st.floats(-4, 4), min_size=1, max_size=9, unique_by=lambda x: round(x, 2)),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.sampled_from([1.0, 0.95, 0.6, 0.1]),
)
def test_an_even_grid_of_uniforms_draws_each_token_its_naive_share(logits, temperature, top_p):
    n = 10_000
    uniform = (torch.arange(n) + 0.5) / n
    tokens, _ = sample(torch.tensor(logits).expand(n, -1), uniform, temperature, top_p)
    counts = torch.bincount(tokens, minlength=len(logits)).tolist()
    expected = naive_distribution(logits, temperature, top_p)
    assert all(abs(count - n * expected.get(token, 0)) <= 2 for token, count in enumerate(counts))
    assert sum(counts[token] for token in expected) == n  # nothing at all from outside the nucleus


def test_tokens_of_probability_zero_are_never_drawn():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf])
    uniform = torch.tensor([2**-24, 0.2, 0.9, 1.0])  # the smallest, two of the middle, the largest
    tokens, _ = sample(logits.expand(4, -1), uniform, 1.0, 1.0)
    assert tokens.tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24])
def test_no_random_number_draws_from_outside_the_nucleus(extreme, monkeypatch):
    monkeypatch.setattr("torch.rand", lambda *shape, **_: torch.full(shape, extreme))
    (response,) = generate(MODEL, prompts_of(3), max_tokens=5, stop=(), top_p=1e-6)
    (greedy,) = generate(MODEL, prompts_of(3), max_tokens=5, stop=(), temperature=0)
    assert response == greedy and 0 not in greedy


def test_generated_tokens_are_distributed_like_the_models_probabilities():
    prompt, n = prompts_of(5)[0], 4000
    responses = generate(
        MODEL,
        [prompt],
        max_tokens=1,
        stop=STOP,
        samples=n,
        temperature=1.5,
        generator=torch.Generator().manual_seed(0),
    )
    expected = n * (uncached(prompt)[-1] / 1.5).softmax(-1)
    counts = torch.bincount(torch.tensor(responses).flatten(), minlength=61).float()
    rare = expected < 5  # one cell together
    observed = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    cells = len(observed)
    assert cells > 10
    assert ((observed - expected) ** 2 / expected).sum() < cells + 4 * math.sqrt(2 * cells)
