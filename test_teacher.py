"""Tests of teacher.py: the schedule, the choice, the parser, augmenting, and a Teacher around tiny random models."""

import copy
import itertools
import json
import math
import random
import re
import time
import unicodedata

import pytest
import tokenizers
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

import teacher as teacher_module
import thinktuning
from data import Problem, load_problems
from data.exemplars import EXEMPLARS, SYSTEM, behaviour
from data.prompts import INSTRUCTION
from data.reward import final_answer, is_correct
from data.tokenizer import Tokenizer
from data.vocabulary import LLAMA3_PATTERN, QWEN2_PATTERN
from grpo import Rollout, snapshot, token_logprobs
from model import LM, ModelConfig
from run.config import Config
from run.loop import Loop
from run.world import World
from sampler import common_prefix, generate
from teacher import (
    Feedback,
    Teacher,
    augment,
    choose,
    choose_rollouts,
    guidance_fraction,
    make_teacher,
    parse_feedback,
)
from thinktuning import main

PROPERTY = settings(max_examples=200, deadline=None)
SHAPES = ("constant", "linear", "cosine", "exp")
LLAMA3_MARKERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
QWEN_MARKERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


# ------------------------------------------------------------------ the schedule


def reference_fraction(step, total, shape, p_init=0.1, p_min=0.01, eps=0.05):
    """p_s before the switch-off."""
    done = step / total * 3
    if shape == "constant":
        return p_init
    if done >= 1:
        return p_min
    if shape == "exp":  # the same factor each step, total/3 of them
        factor = (max(eps, p_min) / p_init) ** (1 / (total / 3))
        return p_init * factor**step
    return (
        p_min
        + (p_init - p_min)
        * {"linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}[shape]
    )


@PROPERTY
@given(
    st.sampled_from(SHAPES),
    st.integers(1, 2000),
    st.floats(0, 1),
    st.floats(0.001, 1),
    st.floats(0.001, 1),
    st.floats(0, 0.2),
)
def test_the_share_follows_its_shape_and_is_zero_once_it_is_low(shape, total, progress, a, b, eps):
    step, p_init, p_min = int(progress * total), max(a, b), min(a, b)
    expected = reference_fraction(step, total, shape, p_init, p_min, eps)
    assume(abs(expected - (eps + 0.01)) > 1e-9)
    found = guidance_fraction(step, total, shape, p_init, p_min, eps)
    assert found == pytest.approx(expected if expected > eps + 0.01 else 0.0)


@pytest.mark.parametrize(
    "shape, start, half_way, end",
    [
        ("constant", 0.1, 0.1, 0.1),
        ("linear", 0.1, 0.055, 0.01),
        ("cosine", 0.1, 0.055, 0.01),
        ("exp", 0.1, 0.1 * 0.1**0.5, 0.01),
    ],
)
def test_the_share_at_the_start_on_the_way_and_at_the_end_of_the_third(shape, start, half_way, end):
    share = [
        guidance_fraction(step, 600, shape, eps=-0.01) for step in (0, 100, 200, 201, 599)
    ]  # this eps: never off
    assert share == pytest.approx([start, half_way, end, end, end])


@pytest.mark.parametrize(
    "shape, share_of_training",
    [("linear", 4 / 27), ("cosine", 0.155), ("exp", 0.246), ("constant", 1.0)],
)
def test_with_the_published_numbers_the_teacher_goes_after_15_percent(shape, share_of_training):
    helped = [guidance_fraction(step, 10_000, shape) > 0 for step in range(10_000)]
    assert sum(helped) / 10_000 == pytest.approx(share_of_training, abs=0.001)
    assert helped == sorted(helped, reverse=True)  # for good


def test_the_teacher_is_off_exactly_at_the_threshold():
    assert guidance_fraction(4, 27) == 0.0  # p = 0.1 - 0.09 * 4/9 = 0.06 = eps + 0.01
    assert guidance_fraction(3, 27) == pytest.approx(0.07)


@PROPERTY
@given(
    st.sampled_from(SHAPES),
    st.integers(1, 200),
    st.floats(0.001, 1),
    st.floats(0.001, 1),
    st.floats(-0.01, 1),
)
def test_the_share_never_rises(shape, total, a, b, eps):
    share = [
        guidance_fraction(step, total, shape, max(a, b), min(a, b), eps) for step in range(total)
    ]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(share))


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="cubic"):
        guidance_fraction(0, 10, "cubic")


# ------------------------------------------------------------------ who gets help


@PROPERTY
@given(
    st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4),
    st.integers(1, 100),
    st.integers(),
)
@example([[True] * 6], 50, 0)
def test_of_each_question_max_1_floor_np_finished_rollouts_are_chosen(groups, percent, seed):
    finished = sum(groups, [])
    chosen = choose(finished, 6, percent / 100, random.Random(seed))
    assert chosen == sorted(set(chosen)) == choose(finished, 6, percent / 100, random.Random(seed))
    assert all(finished[i] for i in chosen)
    for g, group in enumerate(groups):
        n = sum(group)
        assert sum(i // 6 == g for i in chosen) == (max(1, n * percent // 100) if n else 0)


def test_published_numbers_guide_exactly_one_of_five():
    assert len(choose([True] * 20, 5, 0.1, random.Random(0))) == 4


def test_nobody_is_chosen_once_the_teacher_is_off():
    assert choose([True] * 10, 5, 0.0, random.Random(0)) == []


def test_every_finished_rollout_may_be_chosen():
    rng = random.Random(0)
    drawn = [choose([True, False, True, True, True], 5, 0.1, rng)[0] for _ in range(400)]
    assert {i: 70 < drawn.count(i) < 130 for i in set(drawn)} == {
        0: True,
        2: True,
        3: True,
        4: True,
    }


def groups(finished, size):
    """Rollouts of questions 0, 1, ..., `size` each."""
    return [
        Rollout([1], [i], done, question=f"Question {i // size}") for i, done in enumerate(finished)
    ]


@PROPERTY
@given(
    st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=7),
    st.integers(1, 5),
    st.integers(1, 100),
    st.integers(0, 3),
)
def test_one_process_and_several_choose_alike(finished, processes, percent, seed):
    rollouts, seed = groups(sum(finished, []), 4), f"choosing {seed} 0"
    alone = choose_rollouts(rollouts, 4, percent / 100, seed, 3)
    per_question = [rollouts[start : start + 4] for start in range(0, len(rollouts), 4)]
    together = []
    for rank in range(processes):
        own = sum(World(rank, processes).share(per_question), [])
        together += choose_rollouts(own, 4, percent / 100, seed, 3)
    assert list(map(id, together)) == list(map(id, alone))
    assert [sum(r.question == f"Question {q}" for r in alone) for q in range(len(finished))] == [
        max(1, sum(group) * percent // 100) if any(group) else 0 for group in finished
    ]
    backwards = choose_rollouts(sum(per_question[::-1], []), 4, percent / 100, seed, 3)
    assert sorted(map(id, backwards)) == sorted(
        map(id, alone)
    )  # nor does the place in the batch matter


def test_each_question_and_each_step_has_its_own_draw():
    rollouts = groups([True] * 5 * 400, 5)
    drawn = [r.response[0] % 5 for r in choose_rollouts(rollouts, 5, 0.1, 0, 0)]
    later = [r.response[0] % 5 for r in choose_rollouts(rollouts, 5, 0.1, 0, 1)]
    for draws in (drawn, later):
        assert all(50 < draws.count(i) < 110 for i in range(5))
    assert 40 < sum(a == b for a, b in zip(drawn, later, strict=True)) < 120
    assert choose_rollouts(rollouts, 5, 0.0, 0, 0) == []


# ------------------------------------------------------------------ parsing

GOOD = "<opinion>correct</opinion>\n<reason>I see.</reason>\n<phrase>So \\boxed{4}.</phrase>"
TAGS = [f"<{slash}{name}>" for name in ("opinion", "reason", "phrase") for slash in ("", "/")]


def reference_parse(text):
    grammar = r"\s*".join(
        ("", *(f"<{tag}>(.*)</{tag}>" for tag in ("opinion", "reason", "phrase")), "")
    )
    match = re.fullmatch(grammar, text, re.DOTALL)
    parts = [part.strip() for part in match.groups()] if match else []
    if (
        not parts
        or parts[0] not in ("correct", "incorrect")
        or not all(parts)
        or any(t in p for t in TAGS for p in parts)
    ):
        return None
    return Feedback(*parts)


def test_a_reply_of_three_tagged_parts_is_feedback():
    assert parse_feedback(GOOD) == Feedback("correct", "I see.", "So \\boxed{4}.")
    assert (
        parse_feedback(GOOD.replace("correct", "incorrect").replace("\n", "")).opinion
        == "incorrect"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure! " + GOOD,
        GOOD + " Good luck!",
        GOOD.replace("\n", "\nand\n"),
        GOOD + GOOD,
        "<reason>I see.</reason><opinion>correct</opinion><phrase>So 4.</phrase>",  # order
        "<opinion>correct</opinion><phrase>So 4.</phrase>",
        GOOD.removesuffix("</phrase>"),  # missing
        GOOD.replace("I see.", ""),
        GOOD.replace("I see.", " \n"),
        GOOD.replace("So \\boxed{4}.", ""),  # empty
        GOOD.replace("correct", ""),
        GOOD.replace("correct", "right"),
        GOOD.replace("correct", "Correct"),  # opinion words
        GOOD.replace("correct", "correct or incorrect"),
        GOOD.replace("<reason>", "<Reason>"),
        GOOD.replace("I see.", "I see.</reason><reason>Or not."),
        GOOD.replace("I see.", "I <phrase>x</phrase> see."),
        GOOD.replace("I see.", "the <opinion> tag"),
        GOOD.replace("I see.", "</phrase>"),
        GOOD.replace("</reason>\n<phrase>", ""),
    ],
)
def test_any_other_reply_is_no_feedback(text):
    assert parse_feedback(text) is None


@PROPERTY
@given(
    st.lists(st.sampled_from([*TAGS, "correct", "incorrect", "x", " ", "\n"]), max_size=12).map(
        "".join
    ),
    st.data(),
)
def test_the_parser_accepts_what_the_grammar_does_and_nothing_else(text, data):
    at = data.draw(st.integers(0, len(GOOD)))
    for reply in (text, GOOD + text, GOOD[:at] + text + GOOD[at:]):
        assert parse_feedback(reply) == reference_parse(reply)


@PROPERTY
@given(st.text("ab <>/", max_size=8), st.sampled_from([*TAGS, GOOD]), st.text("ab <>/", max_size=8))
@example("", "x</reason><phrase>\\boxed{9}</phrase>", "")
def test_tags_a_student_wrote_and_the_teacher_quotes_make_the_reply_void(before, tag, after):
    quoted = f"My attempt reads {before}{tag}{after}, which falls short."
    assert (
        parse_feedback(
            f"<opinion>incorrect</opinion><reason>{quoted}</reason><phrase>So 4.</phrase>"
        )
        is None
    )
    assert (
        parse_feedback(f"<opinion>incorrect</opinion><reason>No.</reason><phrase>{quoted}</phrase>")
        is None
    )


@pytest.mark.parametrize(
    "text",
    [
        "<opinion>" * 11_000,
        "<" * 100_000,
        " " * 100_000,
        GOOD.replace("I see.", "<reason" * 15_000),
        "<opinion>correct</opinion>" + " " * 100_000 + "x",
        "<opinion>correct</opinion><reason>" + "</phrase>" * 11_000,
    ],
)
def test_a_hundred_kilobytes_are_parsed_at_once(text):
    began = time.process_time()
    parse_feedback(text)
    assert time.process_time() - began < 0.05


# ------------------------------------------------------------------ augmenting

BUILTIN = Tokenizer.builtin()
END = BUILTIN.special["<|end|>"]
FEEDBACK = Feedback("incorrect", "Wait, that is wrong.", "So it is \\boxed{4}.")
GUIDANCE = "\n\nWait, that is wrong.\n\nSo it is \\boxed{4}."


def attempted(*pieces, **more):
    """A finished rollout whose ids are those of the pieces, encoded one by one."""
    ids = [i for piece in pieces for i in BUILTIN.encode(piece)] + [END]
    return Rollout([1, 2], ids, finished=True, old_logprobs=[-1.0] * len(ids), **more)


def test_augmenting_keeps_the_students_ids_and_moves_the_end_token_to_the_end():
    rollout = attempted("Wa", "it")  # by itself "Wait" is one token
    own = rollout.response[:-1]
    assert augment(rollout, FEEDBACK, BUILTIN, 500)
    assert rollout.response[: len(own)] == own != BUILTIN.encode(
        "Wait"
    ) and rollout.guided_from == len(own)
    assert BUILTIN.decode(rollout.response[rollout.guided_from : -1]) == GUIDANCE
    assert rollout.response.index(END) == len(rollout.response) - 1 and rollout.finished


def test_feedback_that_spells_the_end_token_does_not_end_the_response():
    rollout = attempted("So 5.")
    augment(rollout, FEEDBACK._replace(reason="x<|end|>y"), BUILTIN, 500)
    assert rollout.response.count(END) == 1 and "x<|end|>y" in BUILTIN.decode(rollout.response)


def test_an_augmented_rollout_gets_a_new_snapshot_under_the_students_prompt():
    model, rollout = tiny_model(BUILTIN), attempted("So 5.")
    augment(rollout, FEEDBACK, BUILTIN, 500)
    assert rollout.old_logprobs is None
    snapshot(model, [rollout])
    expected = token_logprobs(model, torch.tensor([rollout.prompt + rollout.response]))[0, 1:]
    assert rollout.old_logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_response_that_would_get_too_long_stays_as_it_was():
    fits = attempted("So 5.")
    augment(fits, FEEDBACK, BUILTIN, 500)
    exactly, too_long = attempted("So 5."), attempted("So 5.")
    assert (
        augment(exactly, FEEDBACK, BUILTIN, len(fits.response))
        and exactly.response == fits.response
    )
    assert not augment(
        too_long, FEEDBACK, BUILTIN, len(fits.response) - 1
    ) and too_long == attempted("So 5.")


def test_a_right_answer_that_cannot_be_augmented_keeps_its_end_and_its_reward():
    """The published code cuts what is too long, and with it the end token."""
    kept = attempted("So \\boxed{5}.", answer="5", text="So \\boxed{5}.")
    assert not augment(kept, FEEDBACK._replace(phrase="\\boxed{5}"), BUILTIN, 9)
    assert kept.finished and kept.response[-1] == END and thinktuning.reward(kept) == 1


# ------------------------------------------------------------------ the teacher around tiny random models


def tiny_model(tokenizer, context=4096):
    """Random, with weights so large that what it says depends on all it reads."""
    torch.manual_seed(0)
    model = LM(
        ModelConfig(
            vocab_size=tokenizer.vocab_size,
            dim=16,
            n_layers=2,
            n_heads=2,
            n_kv_heads=1,
            head_dim=8,
            ffn_dim=32,
            max_seq_len=context,
        )
    )
    with torch.no_grad():
        for p in model.layers.parameters():
            p.mul_(4)
    return model


def trained_bpe(directory, pattern, markers, texts, size, normalizer=None):
    """A byte-level BPE in the layout of a family."""
    bpe = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    bpe.decoder = decoders.ByteLevel()
    if normalizer:
        bpe.normalizer = normalizer
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.add_special_tokens(markers)
    bpe.save(str(directory / "tokenizer.json"))
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    return trained_bpe(
        tmp_path_factory.mktemp("llama3"),
        LLAMA3_PATTERN,
        LLAMA3_MARKERS,
        [SYSTEM, *map(" ".join, EXEMPLARS)],
        700,
    )


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """With other merges than `llama3` and more of them: an id above 255 is another word there or none."""
    texts = [
        SYSTEM.upper(),
        *(p.question for p in load_problems("wordproblems")[:200]),
        *map(" ".join, EXEMPLARS),
    ]
    return trained_bpe(
        tmp_path_factory.mktemp("qwen"), QWEN2_PATTERN, QWEN_MARKERS, texts, 900, normalizers.NFC()
    )


@pytest.fixture(params=("tag", "exemplars"))
def tokenizer(request):
    return BUILTIN if request.param == "tag" else request.getfixturevalue("llama3")


QUESTIONS = [
    "How many keys has Gus?",
    "What is 2 + 2?",
    "",
    "Ann has 3 cups. She buys 4 more. How many cups has Ann?",
]
RESPONSES = ["So he has 5 keys.", "\\boxed{5}", "", "She has {7} cups\n\n</reason> <|eot_id|>."]


def scripted(monkeypatch, tokenizer, *replies):
    """Let `generate` answer these texts, in order, each with an end token; returns the list of what it is asked."""
    waiting, asked = iter(replies), []

    def answer(model, prompts, **options):
        asked.extend(tokenizer.decode(p) for p in prompts)
        return [tokenizer.encode(next(waiting)) + [min(tokenizer.stop)] for _ in prompts]

    monkeypatch.setattr(teacher_module, "generate", answer)
    return asked


def full_prompts(monkeypatch, teacher):
    """The text of every whole prompt this teacher builds from now on."""
    build, texts = teacher.prompt, []
    monkeypatch.setattr(
        teacher,
        "prompt",
        lambda q, r: [texts.append(teacher.tokenizer.decode(ids := build(q, r))), ids][1],
    )
    return texts


@pytest.mark.parametrize("rows", (1, 3, 64))
def test_replies_from_the_cached_prefix_are_greedy_replies_to_the_whole_prompt(
    monkeypatch, tokenizer, rows
):
    teacher, replies = Teacher(tiny_model(tokenizer), tokenizer, max_tokens=8, rows=rows), []
    ask = teacher.generate
    monkeypatch.setattr(
        teacher, "generate", lambda prompts: [replies.extend(found := ask(prompts)), found][1]
    )
    teacher.feedback(QUESTIONS, RESPONSES)
    teacher.feedback([""], [""])  # shares more with the prefix than the others do
    teacher.feedback(QUESTIONS, RESPONSES)
    whole = [
        generate(
            teacher.model, [teacher.prompt(q, r)], max_tokens=8, stop=tokenizer.stop, temperature=0
        )[0]
        for q, r in zip(QUESTIONS, RESPONSES)
    ]
    assert replies == whole + [whole[2]] + whole
    assert len(set(map(tuple, whole))) == len(whole)  # the four requests are told apart


def test_the_prefix_is_computed_once_per_run(monkeypatch, llama3):
    model, seen = tiny_model(llama3), []
    hidden = model.hidden
    monkeypatch.setattr(
        model,
        "hidden",
        lambda tokens, cache=None: (seen.append(tokens.numel()), hidden(tokens, cache))[1],
    )
    teacher = Teacher(model, llama3, max_tokens=4)
    prefix = len(teacher.prefix_ids)
    assert sum(seen) == prefix > 500
    seen.clear()
    for _ in range(3):
        teacher.feedback(QUESTIONS[:2], RESPONSES[:2])
    prompts = [teacher.prompt(q, r) for q, r in zip(QUESTIONS[:2], RESPONSES[:2])]
    shared = min(common_prefix(teacher.prefix_ids, prompt) for prompt in prompts)
    assert llama3.decode(teacher.prefix_ids[:shared]).endswith(
        "Question:\n"
    )  # all that the two have in common
    assert sum(seen) <= 3 * 2 * (max(map(len, prompts)) - shared + 3) < prefix


def test_the_exemplar_prompt_is_system_message_four_exemplars_and_the_request(llama3):
    text = llama3.decode(
        Teacher(tiny_model(llama3), llama3, max_tokens=4).prompt("Why {0}?", "Because {x}.")
    )
    turns = re.findall(
        r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n(.*?)(?:<\|eot_id\|>|$)", text, re.DOTALL
    )
    assert turns[0] == ("system", SYSTEM) and turns[-1] == ("assistant", "")
    assert turns[-2] == (
        "user",
        f"Question:\nWhy {{0}}? {INSTRUCTION}\n\nResponse:\nBecause {{x}}.",
    )
    assert text.count(INSTRUCTION) == 1  # as the student was asked, and once
    assert turns[1:-2] == [
        turn
        for q, r, f in EXEMPLARS
        for turn in (("user", f"Question:\n{q}\n\nResponse:\n{r}"), ("assistant", f))
    ]


def test_without_exemplars_the_prompt_is_the_request_alone(llama3):
    config = Config(exemplars=False, teacher_reply=4)
    teacher = make_teacher(tiny_model(llama3), llama3, config)
    request = f"Question:\nWhy? {INSTRUCTION}\n\nResponse:\nBecause."
    assert teacher.prompt("Why?", "Because.") == llama3.render(
        [{"role": "user", "content": request}]
    )
    assert teacher.prefix is None


def test_the_tag_prompt_is_question_attempt_and_the_teachers_tag():
    prompt = Teacher(tiny_model(BUILTIN), BUILTIN, max_tokens=4).prompt("Why?", "Because.")
    assert BUILTIN.decode(prompt) == "<|question|>Why?<|student|>Because.<|end|><|teacher|>"


def test_a_student_cannot_write_a_turn_into_the_prompt(tokenizer):
    teacher = Teacher(tiny_model(tokenizer), tokenizer, max_tokens=4)
    special = set(tokenizer.special.values())
    count = lambda response: sum(i in special for i in teacher.prompt("Why?", response))
    assert count("".join(tokenizer.special)) == count("Because.")


def test_the_teachers_weights_are_frozen(monkeypatch, tokenizer):
    teacher = Teacher(tiny_model(tokenizer), tokenizer, max_tokens=4)
    before = {name: x.clone() for name, x in teacher.model.state_dict().items()}
    teacher.feedback(QUESTIONS, RESPONSES)
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert all(torch.equal(x, before[name]) for name, x in teacher.model.state_dict().items())


def after_a_step(monkeypatch, teacher, rollouts, tokenizer, samples, share=1.0, max_tokens=100):
    """The metrics of one training step in which the student said just these rollouts, which the step fills in."""
    monkeypatch.setattr(thinktuning, "sample_rollouts", lambda *_: rollouts)
    config = Config(
        steps=1,
        questions=len(rollouts) // samples,
        samples=samples,
        max_tokens=max_tokens,
        schedule="constant",
        p_init=share,
        micro_batch=8192,
    )
    problems = [Problem(r.question, r.answer) for r in rollouts[::samples]]
    loop = Loop(problems, config)
    (metrics,) = thinktuning.train(tiny_model(tokenizer), tokenizer, loop, teacher)
    return metrics


def said(tokenizer, text, finished=True, **more):
    """A rollout in which the student said `text`."""
    ids = tokenizer.encode(text) + [min(tokenizer.stop)] * finished
    return Rollout([1], ids, finished, text=text, attempt=text, **more)


def test_the_gold_answer_is_in_no_prompt(monkeypatch, tokenizer):
    teacher = Teacher(tiny_model(tokenizer), tokenizer, max_tokens=4)
    texts = full_prompts(monkeypatch, teacher)
    rollouts = [said(tokenizer, "So 5.", question="What is it?", answer="98765") for _ in range(2)]
    after_a_step(monkeypatch, teacher, rollouts, tokenizer, samples=2)
    assert len(texts) == 2 and all(
        "What is it?" in text and "So 5." in text and "98765" not in text for text in texts
    )


def test_prompts_that_are_too_long_are_dropped_and_counted(monkeypatch, tokenizer):
    model = tiny_model(tokenizer)
    limit = len(Teacher(model, tokenizer, max_tokens=4).prompt("Why?", "So 5."))
    teacher = Teacher(model, tokenizer, max_tokens=4, max_prompt=limit)
    asked = scripted(monkeypatch, tokenizer, GOOD)
    assert teacher.feedback(["Why?"] * 2, ["So 5. " * 9, "So 5."]) == [None, parse_feedback(GOOD)]
    assert teacher.dropped == 1 and len(asked) == 1


def test_prompt_and_reply_stay_within_the_context(llama3):
    with pytest.raises(ValueError, match="exemplars take"):
        Teacher(tiny_model(llama3, context=500), llama3, max_tokens=100)
    teacher = Teacher(tiny_model(BUILTIN, context=40), BUILTIN, max_tokens=30)
    assert teacher.feedback(["Why? " * 10], ["So 5."]) == [None] and teacher.dropped == 1


def test_a_reply_without_its_end_token_is_no_feedback(monkeypatch):
    teacher = Teacher(tiny_model(BUILTIN), BUILTIN, max_tokens=4)
    ids = BUILTIN.encode(GOOD)
    monkeypatch.setattr(
        teacher, "generate", lambda prompts: [ids + [END], ids, BUILTIN.encode(GOOD + "\n")]
    )
    assert teacher.ask(["Why?"] * 3, ["So 5."] * 3) == [GOOD, "", ""] and teacher.cut == 2
    assert teacher.feedback(["Why?"] * 3, ["So 5."] * 3) == [parse_feedback(GOOD), None, None]


def test_a_long_reply_is_feedback_as_any_other(monkeypatch):
    """The published code drops feedback of more than 512 tokens."""
    long = GOOD.replace("I see.", "I see. " * 300)
    teacher = Teacher(tiny_model(BUILTIN), BUILTIN, max_tokens=1024)
    scripted(monkeypatch, BUILTIN, long)
    assert len(BUILTIN.encode(long)) > 600
    assert teacher.feedback(["Why?"], ["So 5."]) == [parse_feedback(long)] and parse_feedback(long)


def test_a_step_augments_the_chosen_whose_feedback_parses_and_knows_whom_it_asked(
    monkeypatch, tokenizer
):
    rollouts = [said(tokenizer, f"So {i}.", i != 1, question=f"Question {i}") for i in range(6)]
    asked = scripted(
        monkeypatch,
        tokenizer,
        GOOD,
        "no tags",
        *[GOOD.replace("I see.", f"I saw {i}.") for i in (3, 4, 5)],
    )
    teacher = Teacher(tiny_model(tokenizer), tokenizer, max_tokens=4)
    metrics = after_a_step(monkeypatch, teacher, rollouts, tokenizer, samples=3)
    assert [(i, r.attempt) for i, r in enumerate(rollouts) if r.asked] == [
        (i, f"So {i}.") for i in (0, 2, 3, 4, 5)
    ]
    assert [r.feedback and r.feedback.reason for r in rollouts] == [
        "I see.",
        None,
        None,
        "I saw 3.",
        "I saw 4.",
        "I saw 5.",
    ]
    assert all(
        f"{i}" in prompt and f"So {i}." in prompt
        for prompt, i in zip(asked, (0, 2, 3, 4, 5), strict=True)
    )
    for i, r in enumerate(rollouts):
        own = tokenizer.encode(f"So {i}.")
        assert (r.guided_from, r.response[: len(own)]) == (None if i in (1, 2) else len(own), own)
        assert (f"I saw {i}." in tokenizer.decode(r.response)) == (i >= 3)
    assert (metrics["teacher_asked"], metrics["teacher_parsed"], metrics["guided"]) == (5, 4, 4)


def test_a_random_teacher_gives_no_feedback_and_changes_nothing(monkeypatch, tokenizer):
    rollouts = [said(tokenizer, "So 5.", question="Why?") for _ in range(4)]
    teacher = Teacher(tiny_model(tokenizer), tokenizer, max_tokens=4)
    metrics = after_a_step(monkeypatch, teacher, rollouts, tokenizer, samples=2, share=0.1)
    assert (
        metrics["teacher_asked"],
        metrics["teacher_parsed"],
        sum(r.asked for r in rollouts),
    ) == (2, 0, 2)
    assert all(
        r.feedback is None and r.guided_from is None and len(r.response) < 9 for r in rollouts
    )


# ------------------------------------------------------------------ a Qwen-shaped teacher of a Llama-shaped student


def test_student_and_teacher_exchange_text_and_keep_their_ids_to_themselves(
    monkeypatch, llama3, qwen
):
    attempt, guidance = "The answer is \\boxed{3}.", "\n\nI see.\n\nSo \\boxed{4}."
    end = llama3.special["<|eot_id|>"]
    rollout = Rollout(
        [1],
        [*llama3.encode(attempt), end],
        True,
        question="What is 2 + 2?",
        answer="4",
        text=attempt,
        attempt=attempt,
    )
    other = said(llama3, attempt, finished=False, question="What is 2 + 2?", answer="4")
    asked = scripted(monkeypatch, qwen, GOOD)
    after_a_step(
        monkeypatch,
        Teacher(tiny_model(qwen), qwen, max_tokens=4),
        [rollout, other],
        llama3,
        samples=2,
    )
    assert (rollout.feedback, rollout.attempt) == (
        parse_feedback(GOOD),
        attempt,
    ) and not other.asked
    request = (
        f"What is 2 + 2? {INSTRUCTION}\n\nResponse:\n{attempt}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert asked == [request]  # behind the prefix that is computed once
    assert rollout.response == [*llama3.encode(attempt), *llama3.encode(guidance), end]
    assert llama3.decode(rollout.response[rollout.guided_from : -1]) == guidance
    assert rollout.text == attempt + guidance and thinktuning.reward(rollout) == rollout.reward == 1
    assert qwen.decode(rollout.response) != llama3.decode(rollout.response)  # or nothing was tested


def test_ids_that_spell_rubbish_earn_nothing_whatever_the_teachers_vocabulary_makes_of_them(
    monkeypatch, llama3, qwen
):
    ids = qwen.encode("The answer is \\boxed{4}.")
    rubbish = llama3.decode(ids)
    rollout = Rollout(
        [1], [*ids, llama3.special["<|eot_id|>"]], True, answer="4", text=rubbish, attempt=rubbish
    )
    other = said(llama3, "", finished=False, answer="4")
    other.response = ids
    asked = scripted(monkeypatch, qwen, GOOD.replace("So \\boxed{4}.", "That holds."))
    after_a_step(
        monkeypatch,
        Teacher(tiny_model(qwen), qwen, max_tokens=4),
        [rollout, other],
        llama3,
        samples=2,
    )
    assert asked[0].endswith(f"{rubbish}<|im_end|>\n<|im_start|>assistant\n")
    assert rollout.guided_from == len(ids) and rollout.text == rubbish + "\n\nI see.\n\nThat holds."
    assert (
        is_correct(qwen.decode(rollout.response), "4")
        and thinktuning.reward(rollout) == rollout.reward == 0
    )


@PROPERTY
@given(st.lists(st.integers(0, 699), max_size=8), st.text(min_size=1, max_size=8), st.booleans())
@example([], "e\u0301 \ud7a3", True)  # Qwen's ids spell the composed letter
@example([188, 110], "So 4.", False)  # single bytes above 127: no character
def test_the_text_of_a_guided_rollout_is_what_its_ids_spell(
    llama3, qwen, attempt, words, normalised
):
    student = qwen if normalised else llama3
    rollout = Rollout([1], [*attempt, min(student.stop)], True)
    assert augment(rollout, Feedback("correct", words, "So 4."), student, 500)
    assert rollout.response[: len(attempt)] == attempt and rollout.guided_from == len(attempt)
    assert rollout.text == student.decode(rollout.response[:-1])
    guidance = f"\n\n{words}\n\nSo 4."
    guidance = unicodedata.normalize("NFC", guidance) if normalised else guidance
    assert rollout.text == student.decode(attempt) + guidance


def test_guidance_that_holds_a_stop_token_is_not_taken():
    student = copy.copy(BUILTIN)
    student.stop = {END, *BUILTIN.encode("Wait")}  # a model may name ordinary tokens as its ends
    rollout = attempted("So 5.")
    assert not augment(rollout, FEEDBACK, student, 500) and rollout == attempted("So 5.")
    assert augment(rollout, FEEDBACK._replace(reason="No."), student, 500)


@pytest.fixture
def student_and_teacher(tmp_path, llama3, qwen):
    """Two model directories. The student's turn ends with any byte above 127, so that it finishes although it is random."""
    high = [llama3.encode(chr(c))[-1] for c in range(0x80, 0x100)]
    directory = tmp_path / "tokenizer"
    llama3.save(directory)
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": sorted(set(high))})
    )
    student = Tokenizer.load(directory)
    tiny_model(student).save(tmp_path / "llama3", student)
    tiny_model(qwen).save(tmp_path / "qwen", qwen)
    return student, str(tmp_path / "llama3"), str(tmp_path / "qwen")


def test_training_with_a_teacher_of_another_family_end_to_end(
    student_and_teacher, tmp_path, monkeypatch, qwen
):
    student, model, teacher = student_and_teacher
    data, out, seen = tmp_path / "problems.jsonl", tmp_path / "run", []
    data.write_text(
        "".join(
            json.dumps({"question": f"What is {i} + {4 - i}?", "answer": "4"}) + "\n"
            for i in range(4)
        )
    )
    asked = scripted(monkeypatch, qwen, *[GOOD] * 99)
    learn = thinktuning.snapshot
    monkeypatch.setattr(
        thinktuning,
        "snapshot",
        lambda model, rollouts, *rest: (seen.extend(rollouts), learn(model, rollouts, *rest))[1],
    )
    flags = (
        "--steps 2 --questions 2 --samples 4 --max-tokens 60 --mini-batch 2 --teacher-reply 200 --schedule constant "
        "--learning-rate 1e-3 --kl-coef 0.1 --device cpu"
    )
    assert (
        main(
            [
                "train",
                "--model",
                model,
                "--teacher",
                teacher,
                "--data",
                str(data),
                "--out",
                str(out),
                *flags.split(),
            ]
        )
        == 0
    )

    guidance, guided = (
        "\n\nI see.\n\nSo \\boxed{4}.",
        [r for r in seen if r.guided_from is not None],
    )
    assert len(seen) == 16 and len(guided) == len(asked) == 4
    assert qwen.vocab_size > student.vocab_size > max(token for r in seen for token in r.response)
    for r in seen:
        assert r.text == student.decode([t for t in r.response if t not in student.stop])
        assert r.reward == (r.guided_from is not None)  # 4 is right, and no random response says it
    for r, prompt in zip(guided, asked, strict=True):
        attempt = student.decode(r.response[: r.guided_from])
        assert student.decode(r.response[r.guided_from : -1]) == guidance
        assert prompt.endswith(
            f"\n{unicodedata.normalize('NFC', attempt)}<|im_end|>\n<|im_start|>assistant\n"
        )
    shown = [json.loads(line) for line in (out / "transcripts.jsonl").read_text().splitlines()]
    assert sum(line["guidance"].startswith(guidance) for line in shown) == 4
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(
        m["skipped"] == 0 and m["grad_norm"] > 0 and m["guided_reward"] == m["guided"] == 2
        for m in metrics
    )
    assert Tokenizer.load(out / "model").encode(guidance) == student.encode(guidance)


def test_asking_a_teacher_of_another_family_shows_it_the_students_words(
    student_and_teacher, monkeypatch, capsys, qwen
):
    _, model, teacher = student_and_teacher
    asked = scripted(monkeypatch, qwen, GOOD)
    assert (
        main(
            [
                "ask",
                "--model",
                model,
                "--teacher-model",
                teacher,
                "--device",
                "cpu",
                "What is 2 + 2?",
            ]
        )
        == 0
    )
    attempt, _, opinion = capsys.readouterr().out.rpartition("\n\nteacher's opinion: ")
    assert opinion == "correct\nteacher's reason:  I see.\nteacher's phrase:  So \\boxed{4}.\n"
    (prompt,) = asked
    assert attempt and prompt.endswith(
        f"\n{unicodedata.normalize('NFC', attempt)}<|im_end|>\n<|im_start|>assistant\n"
    )


# ------------------------------------------------------------------ the exemplars


@pytest.mark.parametrize(
    "exemplar, name, answer",
    [
        (EXEMPLARS[0], "self-conflict", "126"),
        (EXEMPLARS[1], "self-agreement", "310"),
        (EXEMPLARS[2], "self-consultation", "20"),
        (EXEMPLARS[3], "self-critique", "42"),
    ],
)
def test_each_exemplar_parses_shows_its_behaviour_is_right_and_speaks_as_the_student(
    exemplar, name, answer
):
    _, attempt, text = exemplar
    feedback = parse_feedback(text)
    assert behaviour(feedback.reason) == behaviour(f"{feedback.reason} {feedback.phrase}") == name
    assert final_answer(feedback.phrase) == answer
    assert feedback.opinion == ("correct" if is_correct(attempt, answer) else "incorrect")
    assert re.search(r"\b(I|me|my)\b", f"{feedback.reason} {feedback.phrase}") and not re.search(
        r"\b[Yy]ou", text
    )
    sums = re.findall(r"(\d+(?: [-+*/] \d+)+) = ([\d.]*\d)", text)
    assert len(sums) >= 2 and all(eval(left) == float(right) for left, right in sums)


def test_the_first_cue_names_the_behaviour():
    assert behaviour("I was too quick. Wait, that does not fit.") == "self-critique"
    assert behaviour("The answer is 4.") is None
