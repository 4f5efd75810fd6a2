"""The report while a run lasts: it reloads until the end, however that comes, and is always whole."""

import json

import pytest
import torch

import show.live
from data.tokenizer import Tokenizer
from model import LM, ModelConfig
from run.config import RunFailed
from show import report
from show.live import live_report
from thinktuning import main

REFRESH = '<meta http-equiv="refresh"'


def recorded(path, steps=2, planned=9):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"method": "grpo", "steps": planned}))
    lines = [json.dumps({"step": step, "sampled_accuracy": 0.5}) for step in range(steps)]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return path / "report.html"


@pytest.fixture
def pages(monkeypatch):
    """Every page that is written while a run lasts, and the one at its end."""
    seen = []

    def write(path, live=False):
        report.write_report(path, live)
        seen.append((path / "report.html").read_text())

    monkeypatch.setattr(show.live, "write_report", write)
    return seen


@pytest.mark.parametrize("end", [None, RunFailed, KeyboardInterrupt, ValueError])
def test_the_page_reloads_until_the_run_ends_however_it_ends(tmp_path, capsys, end):
    page = recorded(tmp_path)
    try:
        with live_report(tmp_path) as write:
            assert not page.exists()
            for steps in (2, 5):
                recorded(tmp_path, steps)
                write()
                text = page.read_text()
                assert f'{REFRESH} content="{report.RELOAD}">' in text and report.LIVE in text
                assert f"<td>{steps} of 9: so far</td>" in text
            recorded(tmp_path, 6)
            if end:
                raise end
    except (RunFailed, KeyboardInterrupt, ValueError) as error:
        assert type(error) is end
    text = page.read_text()
    assert REFRESH not in text and report.LIVE not in text
    assert "<td>6 of 9: stopped early</td>" in text
    assert capsys.readouterr().out.count(str(page)) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "report.html",
    ]


def test_a_run_that_ends_before_its_first_evaluation_gets_no_page(tmp_path, capsys):
    page = recorded(tmp_path)
    with live_report(tmp_path, shown=False):
        pass
    assert not page.exists() and capsys.readouterr().out == ""


def test_nobody_reads_half_a_page(tmp_path, monkeypatch):
    page = recorded(tmp_path)
    report.write_report(tmp_path)
    old = page.read_text()

    def write_half(out, text):
        out.write_text(text[: len(text) // 2])
        raise OSError("the disk is full")

    monkeypatch.setattr(report, "write_page", write_half)
    with pytest.raises(OSError):
        report.write_report(tmp_path, live=True)
    assert page.read_text() == old


def test_training_writes_the_page_at_each_evaluation(tmp_path, pages, monkeypatch, capsys):
    torch.manual_seed(0)
    tokenizer = Tokenizer.builtin()
    config = ModelConfig(tokenizer.vocab_size, 32, 2, 2, 1, 16, 64, max_seq_len=256)
    LM(config).save(tmp_path / "model", tokenizer)
    flags = "--method grpo --steps 3 --questions 2 --samples 2 --max-tokens 8 --data wordproblems"
    flags += " --eval-data wordproblems --eval-count 4 --eval-every 1 --save-every 0"

    def train(out):
        pages.clear()
        places = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / out)]
        return main(["train", *places, *flags.split()])

    assert train("whole") == 0
    assert [REFRESH in page for page in pages] == [True, True, True, False]
    assert [f"{n} of 3: so far" in page for n, page in zip((1, 2), pages)] == [True, True]
    assert capsys.readouterr().out.count("report.html") == 1
    updates = []

    def failing(*_, **__):
        updates.append(0)
        if len(updates) == 3:
            raise RunFailed("enough")
        return {"loss": 0.0, "grad_norm": 1.0, "skipped": 0.0}

    monkeypatch.setattr("thinktuning.update", failing)
    assert train("failed") == 1
    assert [REFRESH in page for page in pages] == [True, True, False]
    assert "2 of 3: stopped early" in pages[-1]
