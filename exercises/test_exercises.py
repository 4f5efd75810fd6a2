"""The exercises: unfilled they fail, the program's own functions fill them, and what usually goes wrong is called by its name."""

import inspect
import os
import subprocess
import sys
from functools import partial
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import calling
import check_loss
import check_model
import check_sampler
import check_teacher
import checks
import pytest
import torch
import torch.nn.functional as F
from comparing import Task, compare, equal, joined, together
from handed_in import HANDED_IN, RIGHT
from remote import EXERCISES

import grpo
from model import LM, ModelConfig

HERE = Path(__file__).parent
FILES = [HERE / f"{stem}.py" for stem in EXERCISES]
GAPS = {gap.name: gap for gap in checks.GAPS}
MODULES = (check_loss, check_model, check_sampler, check_teacher)
TASKS = [x for module in MODULES for x in vars(module).values() if isinstance(x, Task)]
EXPENSIVE = ("sample", "target_logprobs", "decode_step")  # every fifth pair is tried


def verdict(name, solution, seed=0):
    call = partial(calling.call, SimpleNamespace(**{name: solution}))
    return checks.verdict(GAPS[name], call, seed)


def gaps_of(file):
    return [gap for gap in checks.GAPS if gap.exercise == file.stem]


def test_there_are_twelve_and_each_gap_has_a_check_and_a_question():
    assert len(EXERCISES) == 12
    assert [gap.exercise for gap in checks.GAPS if gap.name != "augment"] == EXERCISES
    for gap in checks.GAPS:
        assert gap.question.endswith(("?", ".")) and "?" in gap.question
        # The lines shown are the program's, and what is called stands in them.
        assert all(line in checks.explained(gap) for line in ("In the program, ", "To think about"))
    assert "losses.sum() / max(1, n_tokens)" in checks.explained(GAPS["accumulate"])
    assert "searchsorted" in checks.explained(GAPS["draw"])


def test_the_readme_and_the_reasons_name_every_exercise():
    readme, reasons = ((HERE / page).read_text() for page in ("README.md", "solutions.md"))
    for file in FILES:
        assert f"[{file.name}]({file.name})" in readme and f"[{file.name}]({file.name})" in reasons
    assert reasons.count("<details>") == reasons.count("</details>") == len(FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_an_unfilled_file_fails_and_says_what_is_to_be_done(file):
    messages = checks.verdicts(file, gaps_of(file))
    assert messages and all(
        message.startswith("not filled in yet: your turn") for message in messages
    )


def test_a_file_run_as_told_says_right_or_what_is_missing(tmp_path, capsys):
    """In this process: importing torch in another one takes seconds."""
    texts = {FILES[0]: [RIGHT[0]], FILES[5]: [RIGHT[5]]}  # of two gaps one
    outputs = []
    for file, functions in texts.items():
        text = file.read_text()
        for function in functions:
            text = text.replace(f"def {function.__name__}(", f"def unfilled_{function.__name__}(")
            text += "\n\nimport torch\n\n" + inspect.getsource(function)
        copy = tmp_path / file.name
        copy.write_text(text)
        with pytest.raises(SystemExit) as exit:
            checks.main(copy)
        outputs.append((capsys.readouterr().out, exit.value.code))
    (one, status), (two, status_of_two) = outputs
    assert one.startswith("1_group_advantages.py: right\n") and not status
    assert inspect.getsource(grpo.group_advantages).splitlines()[0] in one and "To think" in one
    assert two.startswith(
        "6_choose_and_augment.py: choose right\n6_choose_and_augment.py: augment not"
    )
    assert status_of_two == 1 and "def choose(" in two and "def augment(" not in two


def test_a_file_of_another_name_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        checks.main(tmp_path / "mine.py")
    assert exit.value.code == 2 and "must keep its name" in capsys.readouterr().err


def test_an_exercise_runs_as_a_program():
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [sys.executable, FILES[0]], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stderr) == (1, "") and "your turn" in done.stdout


@pytest.mark.parametrize("seed", [0, 2**31 - 1])
def test_the_programs_own_functions_and_other_ways_to_write_them_are_right(seed):
    for gap in checks.GAPS:
        assert verdict(gap.name, gap.right, seed) is None
    for function in RIGHT:
        assert verdict(function.__name__, function, seed) is None
    assert [f.__name__ for f in RIGHT] == list(GAPS)


@pytest.mark.parametrize(
    "name, solution, hint", HANDED_IN, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(HANDED_IN)]
)
def test_a_usual_slip_is_told_by_its_name(name, solution, hint):
    message = verdict(name, solution)
    assert message and hint in message
    assert ("more than one mistake" in message) == hint.startswith("First, it ")


def told(task, *hints, seed=0):
    options = together(hints, task.slips)
    return compare(calling.observe(task.name, partial(task.variant, **options)), task, seed)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_slip_that_is_known_is_told_from_the_others(task):
    assert told(task) is None  # the variant without a slip
    for seed in (0, 1):
        for hint in task.slips:
            assert told(task, hint, seed=seed) == hint


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_two_slips_at_once_are_told_unless_one_hides_the_other(task):
    alone = {hint: results(task, hint) for hint in task.slips}
    pairs = [pair for pair in combinations(task.slips, 2) if together(pair, task.slips)]
    if task.name in EXPENSIVE:
        pairs = pairs[::5]
    several = 0
    for pair in pairs:
        message = told(task, *pair)
        if message == joined(pair):
            several += 1
        elif message in alone:  # with the other slip nothing changes
            assert same_results(results(task, *pair), alone[message], task.close)
        else:
            assert message.startswith("makes more than one mistake")
    assert several > len(pairs) / 2


def results(task, *hints):
    slip = task.look(
        calling.observe(task.name, partial(task.variant, **together(hints, task.slips)))
    )
    found = [slip(*case) for case in task.cases(torch.Generator().manual_seed(0))]
    return [
        part for result in found for part in (result if isinstance(result, tuple) else [result])
    ]


def same_results(found, expected, close):
    return all(equal(a, b, close) for a, b in zip(found, expected, strict=True))


def test_what_nobody_foresaw_is_shown_with_its_first_element():
    message = verdict("group_advantages", lambda rewards: rewards * 7)
    assert message.startswith("gives advantages[0, 0] = ")
    assert "(15 of 15 numbers differ). The inputs: rewards[0] = (5,) [" in message


def test_the_element_shown_is_the_one_that_differs():
    def odd(ratio, advantages, clip=0.2, dual_clip=3.0):
        loss = grpo.clipped_loss(ratio, advantages, clip, dual_clip)[0].clone()
        loss[4, 10] += 1
        return loss

    message = verdict("clipped_loss", odd)
    assert message.startswith("gives losses[4, 10] = 7.") and "; right is 6." in message
    assert "(1 of 55 numbers differ). The inputs: ratio[4, 10] = 5.0" in message
    assert "advantages[4, 0] = -2.0" in message and "clip = 0.2, dual_clip = 3" in message


def test_two_lists_are_told_apart_by_their_first_entry_that_differs():
    def odd(rollout, feedback, tokenizer, max_tokens):
        rollout.response, rollout.guided_from, rollout.old_logprobs = [7, 8], 1, None
        return True

    message = verdict("augment", odd)
    assert message.startswith("gives response[0] = 7; right is") and "it has 2 entries" in message


def test_a_result_that_no_check_can_use_is_told_too():
    def odd(rollout, feedback, tokenizer, max_tokens):
        rollout.response = [torch.zeros(2)] * len(rollout.response)
        return True

    assert verdict("augment", odd).startswith("gives what cannot be checked (RuntimeError: ")


def test_lists_of_tensors_are_shown_on_one_line():
    message = verdict("accumulate", lambda batches, forward: 0.5)
    assert message.isprintable() and "batches = [[a tensor of shape (2, 3, 4), (2, 3) [" in message
    assert verdict("accumulate", lambda batches, forward: None).isprintable()


def test_an_error_in_a_solution_is_told_with_its_line():
    def crashes(rewards):
        return rewards / "std"

    message = verdict("group_advantages", crashes)
    assert "TypeError" in message and f"line {crashes.__code__.co_firstlineno + 1}" in message


def test_the_commonest_errors_of_torch_come_with_a_hint():
    without = lambda rewards: (rewards - rewards.mean(1)) / rewards.std(1, keepdim=True)
    assert "does a mean or std need keepdim=True?" in verdict("group_advantages", without)
    larger = lambda ratio, advantages, *_: max(-advantages * ratio, -advantages)
    assert "torch.maximum" in verdict("clipped_loss", larger)


def test_a_file_that_does_not_load_is_told(tmp_path):
    file = tmp_path / "6_choose_and_augment.py"
    for text, words in (
        ("x = (", "SyntaxError: '(' was never closed (line 1)"),
        ("import sys\nsys.exit(0)", "SystemExit: 0 (line 2)"),
    ):
        file.write_text(text)
        both = checks.verdicts(file, gaps_of(file))
        assert len(both) == 2 and all("cannot be loaded: " in m and words in m for m in both)
    file.write_text("def choose(*_):\n    raise SystemExit(0)")
    assert [m.split(":")[0] for m in checks.verdicts(file, gaps_of(file))] == [
        "stops with SystemExit",
        "is missing",
    ]


def test_sizes_taken_for_given_are_found_in_the_model():
    def fixed(q, k, v, keys, values):
        keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        return (
            F.scaled_dot_product_attention(q, keys, values, enable_gqa=True, scale=8**-0.5),
            keys,
            values,
        )

    assert "take sizes from the tensors" in verdict("attend", fixed)


def test_the_cache_is_what_attention_over_the_whole_sequence_gives():
    """The right answers of exercises 2 and 8 against attention without a cache."""
    q, k, v, keys, values, lengths = check_model.ragged(torch.Generator().manual_seed(5))[0]
    stale = keys.clone(), values.clone()
    y = check_model.program_step(q, k, v, *stale, lengths, calling.turn)
    for b, n in enumerate(lengths.tolist()):
        at = lengths[b : b + 1, None]
        row = slice(b, b + 1)
        all_keys = torch.cat((keys[row, :, :n], calling.turn(k[row], at)), 2)
        all_values = torch.cat((values[row, :, :n], v[row]), 2)
        queries = torch.cat((torch.randn(1, 6, n, 8), calling.turn(q[row], at)), 2)
        whole = F.scaled_dot_product_attention(
            queries, all_keys, all_values, is_causal=True, enable_gqa=True
        )
        torch.testing.assert_close(y[row], whole[:, :, -1:])


def test_the_token_mean_is_that_of_the_update():
    """The right answer of exercise 9 against the step that grpo.update takes."""
    torch.manual_seed(0)
    lm = LM(ModelConfig(20, 16, 1, 2, 1, 8, 16))
    lengths = (2, 5, 3)
    rollouts = [
        grpo.Rollout([1, 2], list(range(3, 3 + n)), True, advantage=a)
        for n, a in zip(lengths, (1.0, -0.5, 2.0))
    ]
    before = lm.head.weight.detach().clone()

    def forward(some):
        return grpo.batch_losses(lm, some, grpo.LossSettings(), None, None)[0]

    grpo.snapshot(lm, rollouts)
    batches = [([r], torch.ones(1, n + 1) > 0) for r, n in zip(rollouts, lengths)]
    for _, mask in batches:
        mask[:, 0] = False  # position 0 predicts the prompt's second token
    check_loss.program_mean(batches, forward)
    ours = lm.head.weight.grad.clone()
    optimizer = torch.optim.SGD(lm.parameters(), lr=1.0)
    grpo.update(lm, optimizer, rollouts, micro_batch=4, max_grad_norm=1e9)
    torch.testing.assert_close(before - lm.head.weight, ours, rtol=1e-4, atol=1e-6)
