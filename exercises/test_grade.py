"""The grader: right, wrong, looping, crashing, cheating and importing submissions."""

import contextlib
import inspect
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import checks
import grade
import pytest
import remote
import torch
from handed_in import RIGHT

HERE = Path(__file__).parent
HEADER = "import math\nimport re\n\nimport torch\nimport torch.nn.functional as F\n\n\n"
OF = {gap.name: gap.exercise for gap in checks.GAPS}
RIGHT_TEXTS = {f.__name__: inspect.getsource(f) for f in RIGHT}

# What is handed in: the exercise, its text, and what the grader says ("right" for a point).
STRANGE = [
    ("1_group_advantages", "from grpo import group_advantages", "a submission may not import"),
    (
        "1_group_advantages",
        "import importlib.util as u\n"
        f"spec = u.spec_from_file_location('grpo', {str(HERE.parent / 'grpo.py')!r})\n"
        "module = u.module_from_spec(spec)\nspec.loader.exec_module(module)\n"
        "group_advantages = module.group_advantages",
        "a submission may not read grpo.py",
    ),
    ("1_group_advantages", "from checks import GAPS", "a submission may not import"),
    (
        "1_group_advantages",
        "from run.head import HeadLogprobs",
        "a submission may not import",
    ),
    (
        "1_group_advantages",  # a classmate's
        "from pathlib import Path\n"
        "exec((Path(__file__).parent.parent / 'right' / '1_group_advantages.py').read_text())",
        "a submission may not read 1_group_advantages.py",
    ),
    (
        "1_group_advantages",  # patches all that could compare or judge
        "import sys, torch\n"
        "for module in list(sys.modules.values()):\n"
        "    for name in ('compare', 'equal', 'same', 'verdict', 'observe', 'call', 'isclose'):\n"
        "        if hasattr(module, name) and module.__name__ in ('calling', 'torch', 'remote'):\n"
        "            setattr(module, name, lambda *a, **k: None)\n"
        "def group_advantages(rewards):\n    return rewards",
        "returns None where advantages should be",
    ),
    ("1_group_advantages", "import sys\nsys.exit(0)", "SystemExit: 0 (line 2)"),
    (
        "1_group_advantages",
        "import os\ndef group_advantages(rewards):\n    os._exit(0)",
        "ends its process with status 0",
    ),
    (
        "1_group_advantages",
        "import ctypes\ndef group_advantages(rewards):\n    ctypes.string_at(0)",
        "ends its process by signal 11",
    ),
    (
        "1_group_advantages",
        "import subprocess\ndef group_advantages(rewards):\n    subprocess.run(['true'])",
        "may not start or signal processes",
    ),
    (
        "1_group_advantages",
        "import os\ndef group_advantages(rewards):\n    os.kill(os.getppid(), 9)",
        "may not start or signal processes",
    ),
    (
        "1_group_advantages",
        "import torch\ndef group_advantages(rewards):\n    return torch.zeros(10**11)",
        "stops with RuntimeError",
    ),
    (
        "1_group_advantages",
        "def group_advantages(rewards):\n    return rewards.new_zeros(1).expand(10**12)",
        "where advantages should be",
    ),
    (
        "1_group_advantages",
        "def group_advantages(rewards):\n    return 'x' * 10**8",
        "gives more than 16 MB",
    ),
    (
        "1_group_advantages",  # speaks for the other side
        "import os\ndef group_advantages(rewards):\n"
        "    for fd in range(3, 40):\n"
        "        try:\n"
        '            os.write(fd, b\'["wrong", "right"]\\n\')\n'
        "        except OSError:\n            pass",
        "- group_advantages right",
    ),
    (
        "1_group_advantages",
        "class Like:\n    __eq__ = __bool__ = lambda *_: True\n"
        "    def __getattr__(self, name):\n        return self\n"
        "    def __repr__(self):\n        return '\\x1b[2J' + 'x' * 10**7\n"
        "def group_advantages(rewards):\n    return Like()",
        "returns �[2J",
    ),
    (
        "1_group_advantages",
        "print('x' * 10**7)\n" + HEADER + RIGHT_TEXTS["group_advantages"],
        "right",
    ),
    ("6_choose_and_augment", HEADER + RIGHT_TEXTS["augment"], "choose is missing"),
    ("12_schedule", (HERE / "12_schedule.py").read_text(), "not filled in yet: your turn"),
]


def run(*argv):
    """The status, and what is printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = grade.main([str(word) for word in argv])
    return status, out.getvalue()


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """A class graded once: the person `right`, and one for each of the others."""
    folder = tmp_path_factory.mktemp("class")
    texts = {}
    for name, text in RIGHT_TEXTS.items():
        texts[OF[name]] = texts.get(OF[name], HEADER) + text + "\n\n"
    for i, (exercise, text, _) in enumerate(STRANGE):
        (folder / f"p{i:02}").mkdir()
        (folder / f"p{i:02}" / f"{exercise}.py").write_text(text)
    (folder / "right").mkdir()
    for exercise, text in texts.items():
        (folder / "right" / f"{exercise}.py").write_text(text)
    (folder / "right" / "notes.py").write_text("1 / 0")
    (folder / "empty").mkdir()
    out = folder / "grades.json"
    status, text = run(folder, "--seed", 5, "--out", out)
    return status, text, json.loads(out.read_text()), folder


def test_right_solutions_get_every_point(graded):
    status, text, record, _ = graded
    assert status == 0 and record["people"]["right"]["points"] == 13
    assert list(record["people"]["right"]["exercises"]) == remote.EXERCISES
    row = next(line for line in text.splitlines() if line.startswith("right "))
    assert row.split() == "right 1 1 1 1 1 2 1 1 1 1 1 1 13 of 13".split()
    assert text.splitlines()[0] == "seed 5"


@pytest.mark.parametrize("i", range(len(STRANGE)), ids=lambda i: f"p{i:02}-{STRANGE[i][2][:30]}")
def test_a_strange_one_gets_what_it_has_earned(graded, i):
    _, text, record, _ = graded
    exercise, _, words = STRANGE[i]
    person = record["people"][f"p{i:02}"]
    part = text.partition(f"\np{i:02}\n")[2].partition("\n\n")[0]
    assert words in part and part.isprintable() == ("\n" not in part) and "\x1b" not in part
    # Of the two gaps of exercise 6 one is filled rightly.
    earned = int(words in ("right", "choose is missing"))
    assert person["points"] == person["exercises"][exercise]["points"] == earned
    assert len(part) < 1500


def test_what_has_another_name_is_told(graded):
    _, text, record, folder = graded
    line = text.splitlines()[1]
    assert line.startswith("not graded") and "notes.py" in line and str(folder / "empty") in line
    assert str(folder / "empty") in record["ungraded"]


def test_the_record_says_what_is_wrong_and_how_to_repeat_it(graded):
    _, _, record, _ = graded
    assert record["seed"] == 5 and record["seconds"] == 30
    functions = record["people"]["p17"]["exercises"]["6_choose_and_augment"]["functions"]
    assert functions["augment"] is None and functions["choose"].startswith("is missing")


def test_the_program_is_not_in_a_submissions_process(tmp_path):
    file = tmp_path / "1_group_advantages.py"
    file.write_text(
        "import sys\ndef group_advantages(rewards):\n    return sorted({*sys.modules, *sys.path})"
    )
    with remote.Submission(file, 30) as submission:
        seen = submission.call("group_advantages", [torch.zeros(2, 2)])
    assert "calling" in seen and "torch" in seen
    assert not {"grpo", "model", "sampler", "teacher", "checks", "comparing", "run.head"} & {*seen}
    assert str(HERE) not in seen and str(HERE.parent) not in seen


def test_one_that_never_ends_is_ended_and_the_next_is_graded(tmp_path):
    texts = {
        "1_group_advantages": "def group_advantages(rewards):\n    while True:\n        pass",
        "4_ppo_clip": "import time\ntime.sleep(1000)",
    }
    for exercise, text in texts.items():
        (tmp_path / f"{exercise}.py").write_text(text)
    began = time.monotonic()
    status, text = run(tmp_path, "--seconds", 1.5)
    assert status == 0 and text.count("takes longer than 1.5 seconds") == 2
    assert time.monotonic() - began < 20 and text.startswith("seed ")


@pytest.mark.slow
def test_the_process_that_starts_the_others_may_be_ended(tmp_path):
    """Past the fence, so the point is earned; what matters is that the grading goes on."""
    text = "import ctypes, os\nctypes.CDLL(None).kill(os.getppid(), 9)\n"
    for person in ("ann", "bob"):
        (tmp_path / person).mkdir()
        file = tmp_path / person / "1_group_advantages.py"
        file.write_text(text + HEADER + RIGHT_TEXTS["group_advantages"])
    status, printed = run(tmp_path)
    assert status == 0 and printed.count("group_advantages right") == 2


def test_another_seed_gives_other_inputs(tmp_path):
    """A table of the right answers to one seed's inputs earns nothing with another seed."""
    file = tmp_path / "1_group_advantages.py"
    case = checks.check_loss.ADVANTAGES.cases(torch.Generator().manual_seed(0))[0]
    right = checks.GAPS[0].right(*case).tolist()
    file.write_text(
        f"import torch\ndef group_advantages(rewards):\n    return torch.tensor({right})"
    )
    message = grade.grade(file, 0, 30)["functions"]["group_advantages"]
    assert "advantages of shape (3, 5); it should be (4, 4)" in message  # the first case was right
    message = grade.grade(file, 1, 30)["functions"]["group_advantages"]
    assert message.startswith("gives advantages[0, 0]")


def test_what_passes_between_the_two_is_plain():
    for x in (torch.tensor([[1.5, float("nan")]]), torch.zeros(0, 2, dtype=torch.int64), [1, (2,)]):
        again = remote.decode(json.loads(json.dumps(remote.encode(x))))
        assert repr(again) == repr(x)
    assert repr(remote.decode(remote.encode({1: 2}))) == "{1: 2}"
    assert isinstance(remote.decode(remote.encode(object())), remote.Other)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["nowhere"], "nowhere: there is no such file or folder"),
        (["{tmp}"], "a file needs an exercise's name, such as 1_group_advantages.py"),
        (["{tmp}/x.py"], "a file needs an exercise's name"),
        (["{file}", "--out", "{tmp}/nowhere/grades.json"], "--out: there is no folder"),
        (["{file}", "--out", "{tmp}"], "is a folder"),
        (["{file}", "--seconds", "0"], "--seconds must be above 0"),
        (["{file}", "--seed", "x"], "--seed"),
        ([], "FILE"),
    ],
)
def test_bad_usage_is_told_in_a_sentence(argv, words, tmp_path, capsys):
    (tmp_path / "x.py").write_text("")
    file = HERE / "1_group_advantages.py"
    argv = [word.format(tmp=tmp_path, file=file) for word in argv]
    try:
        status = grade.main(argv)
    except SystemExit as exit:
        status = exit.code
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("error: ") and words in error and error.count("\n") == 1


def test_people_are_told_apart_by_their_folders(tmp_path):
    for folder in ("a/ann", "b/ann", "b/bob"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "12_schedule.py").write_text("")
    people, others = grade.find([tmp_path / "a", tmp_path / "b", tmp_path / "b/bob/12_schedule.py"])
    assert list(people) == [str(tmp_path / "a/ann"), str(tmp_path / "b/ann"), "bob"]
    assert others == [] and list(people["bob"]) == ["12_schedule"]


def test_help_does_not_import_torch():
    code = "import sys\ntry:\n    import grade; grade.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
