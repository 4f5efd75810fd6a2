"""Run directories read back, for the report."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from data.files import read_json
from run.record import read_lines


class Recorded(NamedTuple):
    path: Path
    config: dict
    metrics: list[dict]
    transcripts: list[dict]


def read_runs(paths) -> tuple[list[Recorded], list[dict]]:
    """The runs in `paths`, and the summaries found there.

    Each path is a run directory or one that holds some, as a demonstration's does. A run given
    twice counts once. ValueError names the file, and the line, that is not what a run writes.
    """
    runs, summaries = {}, {}
    for path in map(Path, paths):
        for directory in run_directories(path):
            config = read_json(directory / "config.json")
            metrics = read_entries(directory / "metrics.jsonl")
            transcripts = read_entries(directory / "transcripts.jsonl")
            runs[directory.resolve()] = Recorded(directory, config, metrics, transcripts)
        if (path / "summary.json").exists():
            summaries[path.resolve()] = read_json(path / "summary.json")
    return list(runs.values()), list(summaries.values())


def check_steps(runs: list[Recorded]) -> None:
    """Raises ValueError if no run has a finished step, because there is nothing to show."""
    if not any(run.metrics for run in runs):
        names = ", ".join(str(run.path) for run in runs)
        raise ValueError(f"{names}: no step has finished yet, so there is nothing to show")


def run_directories(path: Path) -> list[Path]:
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; give that of a run or of a demonstration")
    if (path / "metrics.jsonl").exists():
        return [path]
    found = sorted(file.parent for file in path.glob("*/metrics.jsonl"))
    if not found:
        raise ValueError(f"no metrics.jsonl in {path} or its directories; give that of a run")
    return found


def read_entries(path: Path) -> list[dict]:
    entries = []
    for number, (line, entry) in enumerate(read_lines(path) if path.exists() else (), start=1):
        if entry is not None:
            entries.append(entry)
        elif line.strip():
            problem = f'line {number}: not a JSON object with a "step"'
            raise ValueError(f"{path}, {problem}; restore or delete that line")
    return entries
