"""The supervised control: what it is trained on, and that its loss is the cross-entropy."""

import copy

import pytest
import torch
import torch.nn.functional as F

import demo.supervised
from data.reward import is_correct
from data.tokenizer import Tokenizer
from demo.base import SHIPPED
from demo.supervised import rewarded_texts, train_supervised
from model import LM
from run.config import DEMO, Config, RunFailed

TOKENIZER = Tokenizer.builtin()


@pytest.fixture(scope="module")
def base():
    return LM.load(SHIPPED)


def test_its_texts_are_guided_rollouts_with_the_right_answer(base):
    texts = rewarded_texts(base, TOKENIZER, Config(**DEMO), 40)
    assert len(texts) == 40 and len({text.question for text in texts}) > 35
    for text in texts:
        assert text.guided_from and text.finished and is_correct(text.text, text.answer)
        assert text.response[-1] == TOKENIZER.special["<|end|>"]
        assert text.attempt == TOKENIZER.decode(text.response[: text.guided_from])
    assert any(is_correct(text.attempt, text.answer) for text in texts)
    assert any(not is_correct(text.attempt, text.answer) for text in texts)


def test_the_teacher_continues_one_of_every_few(base):
    texts = rewarded_texts(base, TOKENIZER, Config(**DEMO), 200, every=8)
    guided = [text.guided_from is not None for text in texts]
    # One of eight is guided and nearly always right; the others are right in 42% of the cases.
    assert 0.15 < sum(guided) / 200 < 0.4 and 0 < sum(guided[:100]) < sum(guided)
    own = [text for text in texts if text.guided_from is None]
    assert all(text.text == text.attempt and is_correct(text.text, text.answer) for text in own)


def test_a_teacher_that_is_never_right_ends_in_a_message(base, monkeypatch):
    monkeypatch.setattr(demo.supervised, "is_correct", lambda text, answer: False)
    with pytest.raises(RunFailed, match="0 were right, and 8 are needed"):
        rewarded_texts(base, TOKENIZER, Config(**DEMO), 8, most_rounds=1)


@pytest.mark.parametrize("every", (1, 4))
def test_an_update_is_a_step_down_the_cross_entropy_of_all_the_response(base, monkeypatch, every):
    config = Config(**{**DEMO, "steps": 1, "questions": 8, "mini_batch": 8})
    texts = rewarded_texts(base, TOKENIZER, config, 8, every)
    assert all(text.guided_from for text in texts) == (every == 1)
    monkeypatch.setattr(demo.supervised, "rewarded_texts", lambda *_: copy.deepcopy(texts))
    seen = {}
    step = torch.optim.AdamW.step

    def watched(optimizer, *rest):
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        seen["gradient"] = [p.grad.clone() for p in weights]
        return step(optimizer, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    train_supervised(base, TOKENIZER, config)
    model = copy.deepcopy(base).requires_grad_(True)
    losses = []
    for text in texts:
        ids = torch.tensor([text.prompt + text.response])
        logits = model(ids[:, :-1])[0, len(text.prompt) - 1 :]
        losses.append(F.cross_entropy(logits, ids[0, len(text.prompt) :], reduction="sum"))
    (sum(losses) / sum(len(text.response) for text in texts)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    for ours, parameter in zip(seen["gradient"], model.parameters()):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-6)
