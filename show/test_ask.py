"""`ask`: what streams, in which colour, what the teacher says, how the vote is counted, how it ends."""

# ruff: noqa: F811 (fixtures are imported)

import os
import pty
import re
import signal
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data import Problem, load_problems
from data.prompts import student_prompt
from data.reward import equal
from data.scores import score, vote
from data.tokenizer import Tokenizer
from model import LM
from run.test_cli import complaint
from sampler import generate
from show import ask
from teacher import Feedback, Teacher
from test_thinktuning import llama_directory, model_directory, tiny  # noqa: F401 (fixtures)
from thinktuning import main

HERE = Path(__file__).parents[1]
QUESTION = load_problems("wordproblems", "test")[0].question
TOKENIZER = Tokenizer.builtin()
REFLECTS = (
    "The answer is \\boxed{8}.\n\nHmm, I was too quick there.\n\nSo the answer is \\boxed{7}."
)


@pytest.fixture
def says(monkeypatch):
    """Makes `generate` write the given texts, token by token, and end each with the end token unless told otherwise."""

    def script(*texts, ends=True):
        responses = [
            (TOKENIZER.encode(text) if isinstance(text, str) else text)
            + [TOKENIZER.special["<|end|>"]] * ends
            for text in texts
        ]

        def generate(model, prompts, *, on_step=None, **options):
            assert len(responses) == options.get("samples", 1)
            for token in responses[0] if on_step else ():
                on_step(torch.tensor([0]), torch.tensor([token]))
            return responses

        monkeypatch.setattr(ask, "generate", generate)

    return script


def run(capsys, directory, *flags) -> str:
    assert main(["ask", "--model", str(directory), QUESTION, *flags]) == 0
    return capsys.readouterr().out


# The stream


def test_ask_streams_what_generate_gives(model_directory, capsys):
    question = load_problems("wordproblems", "test")[0].question
    assert main(["ask", "--model", str(model_directory), question, "--max-tokens", "9"]) == 0
    model, tokenizer = LM.load(model_directory), Tokenizer.load(model_directory)
    ids = generate(
        model,
        [student_prompt(tokenizer, question)],
        max_tokens=9,
        stop=tokenizer.stop,
        temperature=0,
    )[0]
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(
        [i for i in ids if i not in tokenizer.stop]
    ).rstrip("\n")


def test_characters_split_across_tokens_appear_whole_and_once(
    model_directory, says, capsys, monkeypatch
):
    text = "½ of 🙂🙂 is 🙂, naïve?"
    assert len(TOKENIZER.encode("🙂")) == 4  # a byte each
    printed = []
    monkeypatch.setattr(
        "builtins.print",
        lambda *parts, sep=" ", end="\n", **_: printed.append(sep.join(parts) + end),
    )
    says(text)
    assert main(["ask", "--model", str(model_directory), QUESTION]) == 0
    assert "".join(printed) == text + "\n" and not any("\ufffd" in part for part in printed)
    assert {"½", "🙂"} <= set(printed)  # each as soon as its last byte was there


@pytest.mark.parametrize("ends", (True, False))
def test_bytes_that_never_become_a_character_are_shown_at_the_end(
    model_directory, says, capsys, ends
):
    says(TOKENIZER.encode("A 🙂")[:-1], ends=ends)
    assert run(capsys, model_directory, "--max-tokens", "9") == "A \ufffd\n"


def test_a_response_without_its_end_says_so_beside_the_text(model_directory, says, capsys):
    says("The answer", ends=False)
    assert main(["ask", "--model", str(model_directory), QUESTION, "--max-tokens", "9"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "The answer\n" and printed.err == "cut off after 9 tokens\n"


@pytest.mark.parametrize(
    "text, reflection",
    [
        (REFLECTS, "\n\nHmm, I was too quick there.\n\nSo the answer is \\boxed{7}."),
        ("First,\n\nsecond,\n\n\\boxed{3}", ""),
        ("First\n\n\\boxed{3}\n\nWait.", "\n\nWait."),
        ("\\boxed{3}\nWait.", ""),
        ("\\boxed{3\n\n} and\n\nmore", "\n\nmore"),
        ("", ""),
        ("I put it in \\boxed{}.\n\nSo \\boxed{3}\n\nWait.", "\n\nWait."),
        ("It goes in \\boxed{ }.\n\nmore", ""),
        ("So \\boxed 3.\n\nWait.", "\n\nWait."),
        ("So \\fbox {3}.\n\nWait.", "\n\nWait."),
    ],
)
def test_a_reflection_begins_at_the_blank_line_after_the_first_answer(text, reflection):
    assert text[ask.reflection_start(text) :] == reflection


# Colour


def on_a_terminal(monkeypatch, *flags) -> str:
    """What the command writes when its output is a terminal."""
    ours, theirs = pty.openpty()
    with monkeypatch.context() as patch, os.fdopen(theirs, "w") as terminal:
        patch.setattr(sys, "stdout", terminal)
        assert main(["ask", *map(str, flags)]) == 0
    written = b""
    try:
        while part := os.read(ours, 4096):
            written += part
    except OSError:  # on Linux, the end of what a terminal gives
        pass
    os.close(ours)
    return written.decode().replace("\r\n", "\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_reflection_is_yellow_on_a_terminal_and_plain_with_no_color(
    model_directory, says, monkeypatch
):
    flags = "--model", model_directory, QUESTION
    says(REFLECTS)
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = on_a_terminal(monkeypatch, *flags)
    first, yellow = (
        "The answer is \\boxed{8}.",
        "".join(re.findall("\x1b\\[33m(.*?)\x1b\\[0m", coloured, re.DOTALL)),
    )
    assert yellow == REFLECTS.removeprefix(first)
    assert re.sub("\x1b\\[33m.*?\x1b\\[0m", "", coloured, flags=re.DOTALL) == first + "\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert on_a_terminal(monkeypatch, *flags) == REFLECTS + "\n"
    monkeypatch.setenv("NO_COLOR", "")  # set but empty counts as not set
    assert on_a_terminal(monkeypatch, *flags) == coloured


def test_piped_output_is_plain(model_directory, says, capsys):
    says(REFLECTS)
    assert run(capsys, model_directory) == REFLECTS + "\n"


# The teacher


def test_the_teacher_reads_the_attempt_up_to_the_reflection(
    model_directory, says, capsys, monkeypatch
):
    read = []

    def feedback(self, questions, responses):
        read.append((self.model, questions, responses))
        return [Feedback("incorrect", "Wait.", "So the answer is \\boxed{7}.")]

    monkeypatch.setattr(Teacher, "feedback", feedback)
    says(REFLECTS)
    out = run(capsys, model_directory, "--teacher")
    assert read[0][1:] == ([QUESTION], ["The answer is \\boxed{8}."])
    assert out == (
        REFLECTS + "\n\nteacher's opinion: incorrect\nteacher's reason:  Wait.\n"
        "teacher's phrase:  So the answer is \\boxed{7}.\n"
    )
    other, tokenizer = tiny(3)
    other.save(model_directory.parent / "other", tokenizer)
    run(capsys, model_directory, "--teacher-model", str(model_directory.parent / "other"))
    asked = [model.embed.weight for model, _, _ in read]
    assert torch.equal(asked[1], other.embed.weight) and not torch.equal(
        asked[0], other.embed.weight
    )


def test_a_teacher_that_gives_no_feedback_says_why(model_directory, says, capsys):
    says("The answer is \\boxed{8}.")
    assert "no feedback from the teacher: its reply" in run(
        capsys, model_directory, "--teacher"
    )  # random weights
    says("word " * 60)
    assert (
        "no feedback from the teacher: the attempt makes its prompt longer than 160 tokens"
        in run(capsys, model_directory, "--teacher")
    )


def test_an_attempt_for_the_teacher_is_one(model_directory, capsys):
    assert "--samples" in complaint(
        capsys, "ask", "--model", model_directory, "q", "--teacher", "--samples", "2"
    )
    assert "no-such" in complaint(
        capsys,
        "ask",
        "--model",
        model_directory,
        "q",
        "--teacher-model",
        model_directory / "no-such",
    )


def test_ask_with_a_teacher_works_on_a_directory_made_elsewhere(llama_directory, capsys):
    assert (
        main(
            ["ask", "--model", str(llama_directory), "How many?", "--max-tokens", "5", "--teacher"]
        )
        == 0
    )
    assert re.search(
        r"no feedback from the teacher: its reply (is longer than 1024 tokens|did not follow the format)\n$",
        capsys.readouterr().out,
    )  # its weights are random


# The vote


def test_the_vote_lists_every_answer_and_the_majority(model_directory, says, capsys):
    says("\\boxed{8}", "\\boxed{7}", "so \\boxed{7.0}", "I give up.")
    assert run(capsys, model_directory, "--samples", "4") == (
        "== sample 1 of 4: 8\n\\boxed{8}\n\n"
        "== sample 2 of 4: 7\n\\boxed{7}\n\n"
        "== sample 3 of 4: 7.0\nso \\boxed{7.0}\n\n"
        "== sample 4 of 4: no final answer\nI give up.\n\n"
        "votes: 7 (2), 8 (1)\nmajority: 7 (2 of 4)\n"
    )
    says("\\boxed{8}", "\\boxed{9}", ends=False)
    assert run(capsys, model_directory, "--samples", "2", "--max-tokens", "9") == (
        "== sample 1 of 2: cut off after 9 tokens\n\\boxed{8}\n\n"
        "== sample 2 of 2: cut off after 9 tokens\n\\boxed{9}\n\nvotes: none\n"
    )


def test_votes_are_counted_by_value_and_the_earlier_wins_a_tie():
    assert vote(f"\\boxed{{{a}}}" for a in ("9", "1/2", "9.0", "0.5", "x")) == [
        ("9", 2),
        ("1/2", 2),
        ("x", 1),
    ]
    assert vote(["nothing", "\\boxed{", "\\boxed{}", "\\boxed{ }"]) == []


def boxes(*answers):
    return [f"\\boxed{{{answer}}}" for answer in answers]


def test_votes_are_grouped_by_the_comparison_that_grades():
    assert vote(boxes("y=5", "x=5", "x=5", "x=5")) == [("x=5", 3), ("y=5", 1)]
    assert vote(boxes("5 \\text{ cm}", "5 \\text{ kg}", "5 \\text{ kg}")) == [
        ("5 \\text{ kg}", 2),
        ("5 \\text{ cm}", 1),
    ]
    scores = score(
        [(Problem("q", "x=5"), text, True) for text in boxes("y=5", "x=5", "x=5", "x=5")], samples=4
    )
    assert (scores["accuracy"], scores["maj@4"]) == (0.75, 1)

    def lenient(given, answer):
        return given.lower() == answer.lower()

    assert vote(boxes("A", "b", "B"), lenient) == [("b", 2), ("A", 1)]
    records = [(Problem("q", "b"), text, True) for text in boxes("A", "b", "B")]
    assert score(records, 3)["maj@3"] == 0 and score(records, 3, lenient)["maj@3"] == 1


def test_a_vote_counts_for_the_first_kind_whose_first_answer_it_equals():
    assert vote(boxes("5", "y=5", "x=5")) == [("5", 3)]  # 5 equals both
    assert vote(boxes("x=5", "y=5", "5", "5")) == [("x=5", 3), ("y=5", 1)]
    assert vote(boxes("y=5", "5", "x=5", "x=5")) == [("y=5", 2), ("x=5", 2)]


@given(
    st.lists(
        st.sampled_from(
            ["5", "5.0", "x=5", "y=5", r"5 \text{ cm}", r"5 \text{ kg}", "6", "", " ", "x=", "5%"]
        )
    )
)
def test_every_answer_has_one_vote_and_no_two_kinds_are_equal(answers):
    votes = vote(boxes(*answers))
    assert sum(n for _, n in votes) == sum(equal(a, a) for a in answers)
    assert not any(equal(one, other) for (one, _), (other, _) in combinations(votes, 2))


def test_the_vote_of_ask_tells_names_and_units_apart(model_directory, says, capsys):
    says("\\boxed{y=5}", "\\boxed {x=5}", "\\boxed{}", "\\fbox{x = 5.0}")
    assert run(capsys, model_directory, "--samples", "4").splitlines()[6:] == [
        "== sample 3 of 4: no final answer",
        "\\boxed{}",
        "",
        "== sample 4 of 4: x = 5.0",
        "\\fbox{x = 5.0}",
        "",
        "votes: x=5 (2), y=5 (1)",
        "majority: x=5 (2 of 4)",
    ]


def test_samples_are_those_of_generate_at_temperature_1_unless_told_otherwise(
    model_directory, capsys, monkeypatch
):
    seen = []
    generate = ask.generate
    monkeypatch.setattr(ask, "generate", lambda *a, **k: seen.append(k) or generate(*a, **k))
    run(capsys, model_directory, "--samples", "3", "--max-tokens", "4")
    run(capsys, model_directory, "--samples", "3", "--max-tokens", "4", "--temperature", "0.5")
    run(capsys, model_directory, "--max-tokens", "4")
    assert [k["temperature"] for k in seen] == [1.0, 0.5, 0.0] and [
        k.get("samples", 1) for k in seen
    ] == [3, 3, 1]


# The end


def test_ctrl_c_ends_it_without_a_traceback(model_directory, monkeypatch, capsys):
    def interrupted(*args, **options):
        options["on_step"](torch.tensor([0]), torch.tensor(TOKENIZER.encode("The")))
        raise KeyboardInterrupt

    monkeypatch.setattr(ask, "generate", interrupted)
    assert main(["ask", "--model", str(model_directory), QUESTION]) == 130
    printed = capsys.readouterr()
    assert printed.out == "The" and printed.err == "\nstopped\n"

    def still_loading(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(ask, "load_model", still_loading)
    assert main(["ask", "--model", str(model_directory), QUESTION]) == 130


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_ctrl_c_from_outside(tmp_path):
    model, tokenizer = tiny()
    model.save(tmp_path / "model", tokenizer)
    script = (
        "import signal, sys, time\n"
        # A shell's background jobs ignore SIGINT, and so would this process.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from show import ask\n"
        "def generate(model, prompts, *, on_step, **options):\n"
        "    print('ready', flush=True); time.sleep(60)\n"
        "ask.generate = generate\n"
        f"from thinktuning import main; sys.exit(main(['ask', '--model', {str(tmp_path / 'model')!r}, 'Why?']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=HERE,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "\nstopped\n"
