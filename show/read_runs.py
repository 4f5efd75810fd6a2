"""Run directories read back, for the report."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from data.files import regular
from run.record import is_entry, parse


class Recorded(NamedTuple):
    """A run directory read back."""
    path: Path
    config: dict
    metrics: list[dict]
    transcripts: list[dict]


def read_runs(paths) -> tuple[list[Recorded], list[dict]]:
    """The runs in `paths`, each a run directory or one that holds some (a demonstration's), and the summaries found there.

    ValueError names the file, and the line, that is not what a run writes.
    """
    runs, summaries = {}, {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise ValueError(f"{path} is not a directory; give that of a run or of a demonstration")
        found = [path] if (path / "metrics.jsonl").exists() else sorted(p.parent for p in path.glob("*/metrics.jsonl"))
        if not found:
            raise ValueError(f"{path} holds no metrics.jsonl, nor does a directory in it; give the directory of a run")
        for p in found:
            lines = read_lines(p / "transcripts.jsonl") if (p / "transcripts.jsonl").exists() else []
            runs[p.resolve()] = Recorded(p, read_object(p / "config.json"), read_lines(p / "metrics.jsonl"), lines)
        if (path / "summary.json").exists():
            summaries[path.resolve()] = read_object(path / "summary.json")
    return list(runs.values()), list(summaries.values())


def read_object(path: Path) -> dict:
    value = parse(regular(path).read_text(encoding="utf-8", errors="replace"))
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object; restore it or run again")
    return value


def read_lines(path: Path) -> list[dict]:
    entries = []
    for number, line in enumerate(regular(path).read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        if line.strip():
            entry = parse(line)
            if not is_entry(entry):
                raise ValueError(f'{path}, line {number}: not a JSON object with a "step"; restore or delete that line')
            entries.append(entry)
    return entries
