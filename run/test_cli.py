"""The commands' flags, and what they say about bad input: one sentence that can be followed."""

# ruff: noqa: F811 (fixtures are imported)

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import thinktuning
from data import load_problems
from data.prompts import student_prompt
from data.tokenizer import Tokenizer
from model import LM
from run.cli import parsers
from test_thinktuning import llama_directory, model_directory  # noqa: F401 (fixtures)
from thinktuning import main

HERE = Path(__file__).parents[1]


def complaint(capsys, *argv, status=2):
    """The one sentence on stderr that a command ends with."""
    try:
        code = main([str(a) for a in argv])
    except SystemExit as exit:  # argparse
        code = exit.code
    err = capsys.readouterr().err
    assert (
        code == status
        and "Traceback" not in err
        and err.startswith("error: ")
        and err.count("\n") == 1
    )
    can_be_followed(err, *argv)
    return err


def can_be_followed(message, *argv):
    """Every flag that a message names is one of the command's, unless it says whose it is or the user gave it."""
    demonstration, commands = parsers()
    known = commands.get(argv[0], demonstration)._option_string_actions.keys() | {"--help"}
    named = re.findall(r"(--[a-z][a-z0-9-]*)(?![a-z0-9-])(?! of train)", message)
    assert set(named) <= known | {str(a).partition("=")[0] for a in argv}, message


def test_bad_input_ends_with_one_sentence_and_status_2(model_directory, tmp_path, capsys):
    broken, empty = tmp_path / "broken.jsonl", tmp_path / "empty.jsonl"
    broken.write_text('{"question": "a", "answer": "1"}\n{"question": \n')
    empty.write_text("\n")
    base = ["train", "--model", model_directory, "--out", tmp_path / "run"]
    assert "broken.jsonl, line 2" in complaint(capsys, *base, "--data", broken)
    assert "empty.jsonl" in complaint(capsys, *base, "--data", empty)
    assert "no-such" in complaint(
        capsys, "train", "--model", tmp_path / "no-such", "--data", "wordproblems"
    )
    assert "gsm9k" in complaint(capsys, *base, "--data", "gsm9k")
    assert "--clip" in complaint(capsys, *base, "--data", "wordproblems", "--clip", "-1")
    assert "--p-min" in complaint(capsys, *base, "--data", "wordproblems", "--p-init", "0.001")
    assert "--clip-high" in complaint(capsys, *base, "--data", "wordproblems", "--clip-high", "0.1")
    assert "--published" in complaint(
        capsys, *base, "--data", "wordproblems", "--published", "gama"
    )
    assert "--steps" in complaint(capsys, *base, "--data", "wordproblems", "--steps", "three")
    assert "--floor" in complaint(capsys, "--floor", "2", "--out", tmp_path / "x")
    assert "--temperature" in complaint(
        capsys, "ask", "--model", model_directory, "q", "--temperature", "-1"
    )
    assert "--device" in complaint(
        capsys, "ask", "--model", model_directory, "q", "--device", "tpu9"
    )
    assert "tokens" in complaint(
        capsys, "ask", "--model", model_directory, "q", "--max-tokens", "999"
    )
    assert "--grader" in complaint(
        capsys, "eval", "--model", model_directory, "--data", "wordproblems", "--grader", "me"
    )
    assert not (tmp_path / "run").exists()  # nothing was begun


def test_a_wrong_flag_is_named_and_nothing_else_is_blamed():
    """From a shell, as a user would."""
    for argv, told in (
        (["--frobnicate", "3"], "unrecognized arguments: --frobnicate 3"),
        (["--quick", "--frobnicate=3"], "unrecognized arguments: --frobnicate=3"),
        (["report", "x", "--frobnicate", "3"], "unrecognized arguments: --frobnicate 3"),
        (["trian", "--model", "x"], "'trian' is no command: give one of train, eval, ask, report"),
        (
            ["--seed", "3", "train", "--preset", "paper"],
            "the command must come first: thinktuning.py train",
        ),
        (["eval", "--model", "x"], "required: --data"),
        (["train", "--data", "x"], "required: --model"),
        (["train", "--frobnicate", "3"], "unrecognized arguments: --frobnicate 3"),
        (["eval", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["ask", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["train", "--advantage", "centred"], "unrecognized arguments: --advantage centred"),
        (["--see", "3"], "unrecognized arguments: --see 3"),
    ):
        done = subprocess.run(
            [sys.executable, "thinktuning.py", *argv], cwd=HERE, capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stdout == ""
        assert (
            done.stderr.startswith("error: ")
            and done.stderr.count("\n") == 1
            and told in done.stderr
        )
        can_be_followed(done.stderr, *argv)


def test_bad_problems_are_reported_before_a_model_is_loaded(
    model_directory, tmp_path, capsys, monkeypatch
):
    def load_model(*_):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(thinktuning, "load_model", load_model)
    monkeypatch.setattr("show.ask.load_model", load_model)
    empty, absent = tmp_path / "empty.jsonl", tmp_path / "absent.jsonl"
    empty.write_text("")
    train = ["train", "--model", model_directory, "--out", tmp_path / "run", "--max-tokens", "8"]
    train += ["--teacher-reply", "30", "--data"]
    for file, says in ((empty, "holds no problems"), (absent, "is not a file")):
        assert says in complaint(capsys, *train, file)
        assert says in complaint(capsys, *train, "wordproblems", "--eval-data", file)
        assert says in complaint(capsys, "eval", "--model", model_directory, "--data", file)
    assert "question is empty" in complaint(capsys, "ask", "--model", model_directory, " ")
    assert not (tmp_path / "run").exists()


def test_a_flag_that_would_do_nothing_is_refused(model_directory, tmp_path, capsys):
    file = tmp_path / "p.jsonl"
    file.write_text('{"question": "q", "answer": "1"}')
    base = [
        "train",
        "--model",
        model_directory,
        "--data",
        "wordproblems",
        "--out",
        tmp_path / "run",
    ]
    assert "--split" in complaint(
        capsys, "eval", "--model", model_directory, "--data", file, "--split", "train"
    )
    assert "leave --teacher out" in complaint(
        capsys, *base, "--method", "grpo", "--teacher", model_directory
    )
    assert "give --eval-data too" in complaint(capsys, *base, "--eval-count", "5")
    assert "give --eval-data too" in complaint(capsys, *base, "--eval-every", "5")
    assert "--beta1 must be below 1" in complaint(capsys, *base, "--beta1", "1")


def test_whoever_follows_the_advice_about_length_gets_an_answer(model_directory, tmp_path, capsys):
    """The model's context is 256 tokens."""
    question = load_problems("wordproblems")[0].question
    short, long = tmp_path / "short.jsonl", tmp_path / "long.jsonl"
    short.write_text(json.dumps({"question": question, "answer": "1"}))
    long.write_text(json.dumps({"question": question * 20, "answer": "1"}))
    n = len(student_prompt(Tokenizer.builtin(), question))
    of_eval = ["eval", "--model", model_directory, "--grader", "builtin", "--data"]
    err = complaint(capsys, *of_eval, short, "--max-tokens", 255)
    assert err.endswith(
        f"no question fits; the shortest prompt has {n} tokens and the model's context 256: "
        f"lower --max-tokens to {256 - n} or less\n"
    )
    assert main([str(a) for a in (*of_eval, short, "--max-tokens", 256 - n)]) == 0
    err = complaint(capsys, *of_eval, long)
    assert "--" not in err and err.endswith(
        "the model's context 256: give shorter questions, or a model with a longer context\n"
    )
    of_train = [
        "train",
        "--model",
        model_directory,
        "--data",
        short,
        "--out",
        tmp_path / "run",
        "--method",
        "grpo",
        "--steps",
        "1",
        "--questions",
        "1",
        "--samples",
        "2",
    ]
    err = complaint(capsys, *of_train, "--max-prompt", 2)
    assert err.endswith(
        f"lower --max-tokens to {256 - n} or less and raise --max-prompt to {n} or more\n"
    )
    assert main([str(a) for a in (*of_train, "--max-prompt", n, "--max-tokens", 256 - n)]) == 0
    of_ask = ["ask", "--model", model_directory, question]
    assert f"lower --max-tokens to {256 - n} or less" in complaint(
        capsys, *of_ask, "--max-tokens", 255
    )
    assert main([str(a) for a in (*of_ask, "--max-tokens", 256 - n)]) == 0
    capsys.readouterr()
    err = complaint(capsys, "ask", "--model", model_directory, question * 20, "--max-tokens", 5)
    assert err.endswith("leaves 0 tokens of the model's context of 256: shorten it\n")


@pytest.mark.parametrize(
    "context, advice",
    [
        (300, "give a teacher with a longer context\n"),
        (2200, "lower --teacher-reply of train well below"),
    ],
)
def test_a_teacher_without_room_for_its_exemplars_says_what_would_help(
    llama_directory, tmp_path, capsys, context, advice
):
    short = tmp_path / "short"
    shutil.copytree(llama_directory, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": context}))
    err = complaint(capsys, "ask", "--model", short, "How many?", "--max-tokens", 5, "--teacher")
    assert (
        "the teacher's exemplars take" in err
        and advice in err
        and "give a teacher with a longer context" in err
    )
    assert "--teacher-prompt" not in err
    assert (
        main(
            [
                "ask",
                "--model",
                str(short),
                "How many?",
                "--max-tokens",
                "5",
                "--teacher-model",
                str(llama_directory),
            ]
        )
        == 0
    )
    capsys.readouterr()
    err = complaint(
        capsys,
        "train",
        "--model",
        llama_directory,
        "--data",
        "wordproblems",
        "--teacher-prompt",
        900,
        "--rows",
        2,
        "--out",
        tmp_path / "run",
    )
    assert "raise --teacher-prompt well above" in err


def test_out_of_memory_names_flags_that_the_command_has(
    model_directory, tmp_path, capsys, monkeypatch
):
    run, generate = tmp_path / "run", thinktuning.generate
    train = [
        "train",
        "--model",
        str(model_directory),
        "--data",
        "wordproblems",
        "--out",
        str(run),
        "--method",
        "grpo",
        "--steps",
        "3",
        "--questions",
        "2",
        "--samples",
        "2",
        "--max-tokens",
        "8",
        "--save-every",
        "1",
    ]
    calls = []

    def too_large(*args, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return generate(*args, **kwargs)

    monkeypatch.setattr(thinktuning, "generate", too_large)
    err = complaint(capsys, *train, status=1)
    assert (
        err
        == "error: out of memory: lower --rows (sampling) or --micro-batch (update); --resume goes on\n"
    )
    err = complaint(
        capsys, *train[:6], tmp_path / "other", *train[7:], "--save-every", "0", status=1
    )
    assert "it cannot be resumed, because --save-every 0 kept no checkpoint" in err
    err = complaint(
        capsys,
        "eval",
        "--model",
        model_directory,
        "--data",
        "wordproblems",
        "--grader",
        "builtin",
        status=1,
    )
    assert err == "error: out of memory: lower --rows or --max-tokens\n"
    monkeypatch.setattr("show.ask.generate", too_large)
    for samples, told in ((1, "lower --max-tokens"), (2, "lower --max-tokens or --samples")):
        err = complaint(
            capsys, "ask", "--model", model_directory, "q", "--samples", samples, status=1
        )
        assert err == f"error: out of memory: {told}\n"
    monkeypatch.setattr(LM, "load", lambda *_: too_large())
    err = complaint(
        capsys, "ask", "--model", model_directory, "q", status=1
    )  # while it loads no flag would help
    assert err == "error: out of memory: end what else runs on the device, or take a larger one\n"
    monkeypatch.undo()
    assert main([*train, "--resume", "--rows", "1", "--micro-batch", "300"]) == 0  # as it was told
    assert [json.loads(line)["step"] for line in open(run / "metrics.jsonl")] == [0, 1, 2]


def test_a_finished_run_is_not_written_over(model_directory, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("precious\n")
    for flags in ([], ["--resume"]):  # no checkpoint: there is nothing to go on from
        err = complaint(
            capsys,
            "train",
            "--model",
            model_directory,
            "--data",
            "wordproblems",
            "--out",
            tmp_path,
            *flags,
            "--max-tokens",
            "8",
            "--teacher-reply",
            "30",
        )
        assert "--out" in err and "continue it with --resume" not in err
        assert (tmp_path / "metrics.jsonl").read_text() == "precious\n"
    (tmp_path / "checkpoint" / "step-00000001").mkdir(parents=True)
    assert "continue it with --resume" in complaint(
        capsys, "train", "--model", model_directory, "--data", "wordproblems", "--out", tmp_path
    )


def test_an_output_directory_that_cannot_be_made_is_named(model_directory, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    err = complaint(
        capsys,
        "train",
        "--model",
        model_directory,
        "--data",
        "wordproblems",
        "--max-tokens",
        "8",
        "--teacher-reply",
        "30",
        "--out",
        tmp_path / "file" / "run",
    )
    assert "file" in err


def test_a_full_disk_ends_the_run_with_a_sentence(model_directory, tmp_path, capsys, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("/dev/full is not here")
    run = tmp_path / "run"
    full = lambda path, mode: open("/dev/full" if "transcripts" in str(path) else path, mode)
    monkeypatch.setattr("run.record.open", full, raising=False)
    err = complaint(
        capsys,
        "train",
        "--model",
        model_directory,
        "--data",
        "wordproblems",
        "--out",
        run,
        "--method",
        "grpo",
        "--steps",
        "1",
        "--questions",
        "2",
        "--max-tokens",
        "8",
        status=1,
    )
    assert "No space left" in err


def test_eval_says_who_graded_and_does_not_pretend(model_directory, tmp_path, capsys, monkeypatch):
    problems = tmp_path / "problems.json"
    problems.write_text(
        json.dumps(
            [{"problem": "p", "answer": "p - q"}, {"problem": "q", "answer": r"\frac{1}{2}"}]
        )
    )
    command = [
        "eval",
        "--model",
        str(model_directory),
        "--data",
        str(problems),
        "--max-tokens",
        "9",
    ]
    version = (
        re.escape(importlib.metadata.version("math-verify"))
        if importlib.util.find_spec("math_verify")
        else None
    )
    monkeypatch.setattr(thinktuning, "spoken", lambda tokenizer, ids: r"\boxed{-q+p}")
    assert main(command) == 0
    out = capsys.readouterr().out
    assert re.search(
        rf"graded by math-verify {version} or the"
        if version
        else "graded by the built-in .*not installed",
        out,
    )
    assert (
        main([*command, "--grader", "builtin"]) == 0
        and "graded by the built-in comparison\n" in capsys.readouterr().out
    )
    monkeypatch.setattr("data.grading.importlib.util.find_spec", lambda name: None)
    assert (
        main(command) == 0
        and "graded by the built-in comparison (math-verify is not installed)"
        in capsys.readouterr().out
    )
    err = complaint(capsys, *command, "--grader", "math-verify")
    assert "pip install math-verify" in err and "--grader builtin" in err and err.count("\n") == 1
