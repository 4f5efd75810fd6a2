"""Pretraining: the weighted loss against a naive one, Muon against a singular value decomposition."""

import itertools

import pytest
import torch

from data.tokenizer import Tokenizer
from demo.base import FLOOR, RECIPE
from demo.pretraining import Muon, new_model, orthogonal, padded, steps_of_rows, weighted_loss
from demo.texts import REMARKS

TOKENIZER = Tokenizer.builtin()
RECIPE0 = dict(RECIPE, seed=0, floor=FLOOR)


def test_the_weighted_loss_equals_a_naive_sum_over_tokens():
    torch.manual_seed(0)
    model = new_model(RECIPE0, TOKENIZER.vocab_size)
    rows = next(steps_of_rows(dict(RECIPE0, floor=0.2), "a", TOKENIZER))
    (blank,) = TOKENIZER.encode("\n\n")
    loss = weighted_loss(model, rows, blank)
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    total = weight_of_all = 0.0
    for ids, weights, instead in rows:
        logprobs = model(torch.tensor([ids]))[0].log_softmax(-1)
        for t in range(1, len(ids)):
            said, blank_line = logprobs[t - 1, ids[t]], logprobs[t - 1, blank]
            total = total - weights[t] * said - instead[t] * blank_line
        weight_of_all += sum(weights) + sum(instead)
    naive = total / weight_of_all
    naive.backward()
    assert loss == pytest.approx(naive.item(), rel=1e-5)
    for parameter, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-6)


def test_padding_weighs_nothing():
    tokens, weights, instead = padded(
        [([5, 6, 7], [0.0, 1.0, 2.0], [0.0, 0.0, 0.5]), ([8], [1.0], [0.0])]
    )
    assert tokens.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert weights.tolist() == [[0, 1, 2], [1, 0, 0]]
    assert instead.tolist() == [[0, 0, 0.5], [0, 0, 0]]


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)])
def test_muons_direction_keeps_the_singular_vectors_and_evens_out_the_values(shape):
    torch.manual_seed(1)
    matrix = torch.randn(shape)
    U, values, Vh = torch.linalg.svd(matrix, full_matrices=False)
    x = U.T @ orthogonal(matrix) @ Vh.T  # in the matrix's own singular vectors
    torch.testing.assert_close(x, torch.diag(x.diagonal()), rtol=0, atol=1e-4)
    assert 0.6 < x.diagonal().min() and x.diagonal().max() < 1.3  # Muon's weights aim no closer
    assert values.max() / values.min() > 2


def test_a_step_of_muon_is_momentum_then_its_direction():
    torch.manual_seed(2)
    weight = torch.nn.Parameter(torch.randn(6, 3))
    optimizer, momentum = Muon([weight], lr=0.1), torch.zeros(6, 3)
    for _ in range(3):
        gradient = torch.randn(6, 3)
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        direction = orthogonal(0.05 * gradient + 0.95 * momentum)
        expected = before * (1 - 0.001) - 0.1 * 2**0.5 * direction
        torch.testing.assert_close(weight.detach(), expected)


def test_a_steps_texts_are_of_the_kinds_and_numbers_that_the_recipe_names():
    steps = list(itertools.islice(steps_of_rows(RECIPE0, "a", TOKENIZER), 50))
    assert all(len(rows) == RECIPE["conversations"] + RECIPE["transcripts"] for rows in steps)
    texts = [TOKENIZER.decode(ids) for rows in steps for ids, _, _ in rows]
    conversations = [text for text in texts if "<|teacher|>" in text]
    transcripts = [text for text in texts if "<|narrator|>" in text]
    assert len(conversations) == 50 * RECIPE["conversations"]
    assert len(transcripts) == 50 * RECIPE["transcripts"]
    remarks = sum(any(remark in text for remark in REMARKS) for text in conversations)
    assert remarks == len(conversations) // RECIPE["remark_every"]
    plain = list(itertools.islice(steps_of_rows(dict(RECIPE0, floor=0.0), "a", TOKENIZER), 20))
    assert not any(sum(instead) for rows in plain for _, _, instead in rows)
    texts = [TOKENIZER.decode(ids) for rows in plain for ids, _, _ in rows]
    assert not any(remark in text for text in texts for remark in REMARKS)
