"""The demonstration from its command to its summary."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import demo.comparison
import show.live
from demo.comparison import set_old_results_aside
from run.config import DEMO
from thinktuning import main


@contextmanager
def one_after_the_other(function, *args):
    """In the place of run.beside.beside: no second process."""
    yield lambda: function(*args)


def test_quick_demonstration_writes_the_summary_and_sets_an_earlier_one_aside(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(DEMO, "questions", 4)
    pages = []  # while the demonstration lasts, and at its end

    def write(path, live=False, write_report=show.live.write_report):
        write_report(path, live)
        pages.append((path / "report.html").read_text())

    monkeypatch.setattr(show.live, "write_report", write)
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    for name in ("base", "grpo", "thinktuning"):
        assert {
            "accuracy",
            "accuracy_se",
            "reflection_rate",
            "reflection_rate_first_wrong",
            "reflection_rate_first_right",
            "first_answer_accuracy",
            "mean_length",
            "seconds",
        } <= summary[name].keys()
    for key in ("names_line", "sampled_reflection_rate_first_wrong"):
        assert key in summary["thinktuning"]
    assert "sampled_reflection_rate_first_right" in summary["thinktuning"]
    found = {"accuracy", "opinion_accuracy", "opinion_accuracy_planted_right"}
    assert found <= summary["teacher_prompt"].keys()
    assert {"floor", "floor_wrong", "floor_right"} <= summary["base"].keys()
    assert summary["base"]["teacher_prompt_accuracy"] == summary["teacher_prompt"]["accuracy"]
    kinds = {"misconception", "right", "slip_before", "other_story"}
    assert summary["planted"].keys() == kinds
    for found in summary["planted"].values():
        assert {"goes_on", "names_line", "accuracy", "takes_over"} <= found.keys()
    assert summary["planted"]["right"]["names_line"] is None
    assert summary["seconds"]["pretrain"] > 0
    reloads = ['http-equiv="refresh"' in page for page in pages]
    assert reloads == [True, False]  # ThinkTuning's evaluation, and the end
    first = capsys.readouterr().out
    assert first.startswith(f"{tmp_path / 'report.html'} shows the run")
    assert "W ThinkTuning" in first and "under the teacher prompt" in first
    # Again, with both parts in this process: the same to the digit.
    monkeypatch.setattr(demo.comparison, "beside", one_after_the_other)
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    second = capsys.readouterr().out
    assert f"the earlier results in {tmp_path} are now in {tmp_path / 'earlier-1'}" in second
    assert json.loads((tmp_path / "earlier-1" / "summary.json").read_text()) == summary
    assert (tmp_path / "earlier-1" / "thinktuning" / "model" / "model.safetensors").exists()
    # No run of the first demonstration is on a page of the second.
    counts = [page.count("<td>ThinkTuning</td>") for page in pages]
    assert counts == counts[:2] * 2 and counts[0] > 0
    again = json.loads((tmp_path / "summary.json").read_text())
    for name in ("base", "grpo", "thinktuning"):
        assert {**again[name], "seconds": 0} == {**summary[name], "seconds": 0}


@pytest.mark.slow
@pytest.mark.parametrize("presses, status", [(1, 0), (2, 130)])
def test_ctrl_c_stops_both_processes(tmp_path, presses, status):
    command = [sys.executable, "-u", "thinktuning.py", "--out", str(tmp_path)]
    root = Path(__file__).parent.parent
    run = subprocess.Popen(
        command,
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    said = ""
    while "thinktuning 1/60" not in said or "grpo 1/60" not in said:
        line = run.stdout.readline()
        assert line, said
        said += line
    for _ in range(presses):  # a terminal sends it to all processes of the group
        os.killpg(run.pid, signal.SIGINT)
        time.sleep(0.1)
    # The pipe ends when both have ended, and GRPO alone would go on for longer than this.
    said += run.communicate(timeout=20)[0]
    assert run.returncode == status and "Traceback" not in said, said
    assert said.count("stopping after this step") == 1
    saved = f"that model is in {tmp_path / 'thinktuning' / 'model'}"
    assert (saved in said) == (presses == 1)


def test_earlier_results_never_land_on_each_other(tmp_path):
    (tmp_path / "earlier-2").mkdir()  # whoever ran this has deleted the first ones
    for place in ("earlier-1", "earlier-3"):
        (tmp_path / "summary.json").write_text(place)
        set_old_results_aside(tmp_path)
        assert (tmp_path / place / "summary.json").read_text() == place
    set_old_results_aside(tmp_path)  # nothing is there to move
    assert len(list(tmp_path.iterdir())) == 3
