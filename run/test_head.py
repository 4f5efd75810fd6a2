"""Tests of the output head a slice at a time: against the full logits."""

import pytest
import torch

from run.head import HeadLogprobs, slice_size


def full_logits_logprobs(states, weight, targets, temperature):
    logits = states @ weight.T / temperature
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(
        -1
    ), torch.distributions.Categorical(logits=logits).entropy()


@pytest.mark.parametrize(
    "vocabulary", (11, 512, 1300)
)  # less than one slice, exactly one, three of which the last is short
@pytest.mark.parametrize("size", (0.1, 1.0, 30.0))  # logits all alike, ordinary, hundreds apart
@pytest.mark.parametrize("temperature", (0.5, 1.0, 1.3))
def test_the_sliced_head_is_the_full_one_in_value_and_gradient(vocabulary, size, temperature):
    states, weight = torch.randn(300, 16) * size, torch.randn(vocabulary, 16)
    targets, upstream = torch.randint(vocabulary, (300,)), torch.randn(300) / 300
    targets[:3] = torch.tensor([0, vocabulary - 1, min(512, vocabulary - 1)])
    outcomes = []
    for sliced, dtype in ((False, torch.float64), (True, torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in (states, weight)]
        if sliced:
            logprobs, entropy = HeadLogprobs.apply(*leaves, targets, 512, None, temperature)
        else:
            logprobs, entropy = full_logits_logprobs(*leaves, targets, temperature)
        outcomes.append(
            (logprobs, entropy, *torch.autograd.grad((logprobs * upstream).sum(), leaves))
        )
    for expected, found in zip(*outcomes, strict=True):
        torch.testing.assert_close(
            found, expected.float(), rtol=1e-5, atol=1e-5 * max(1.0, size / temperature)
        )


def test_the_heads_gradient_may_be_added_to_a_buffer_instead():
    states, weight, targets = (
        torch.randn(5, 4, requires_grad=True),
        torch.randn(600, 4, requires_grad=True),
        torch.arange(5) * 140,
    )
    HeadLogprobs.apply(states, weight, targets, 512, None, 1.0)[0].sum().backward()
    expected, weight.grad = weight.grad, torch.ones(600, 4)
    HeadLogprobs.apply(states, weight, targets, 512, weight.grad, 1.0)[0].sum().backward()
    torch.testing.assert_close(weight.grad, expected + 1)


@pytest.mark.parametrize("device, logits", (("cpu", 1 << 22), ("cuda", 1 << 26)))
def test_slices_of_the_head_fill_half_their_room_and_come_in_few_sizes(device, logits):
    sizes = [slice_size(n, device) for n in range(1, logits // 512)]
    assert len(set(sizes)) <= 18 and max(sizes) == logits
    assert all(n * size <= logits < 2 * n * size for n, size in enumerate(sizes, 1))
    assert slice_size(logits, device) == 512 and slice_size(0, device) == logits
