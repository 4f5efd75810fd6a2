"""What `train` and `eval` print at their end."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from run.compiled import RECORDER
from run.config import Config


def print_outcome(
    out: Path, history: list[dict[str, Any]], config: Config, args: argparse.Namespace
) -> None:
    summary = {}
    for name, value in history[-1].items():
        if name in ("reward", "reflection_rate") or name.startswith("eval_"):
            summary[name] = round(value, 4)
    stopped = f" of {config.steps}, stopped; {args.again}" if len(history) < config.steps else ""
    print(f"{len(history)} steps{stopped} -> {out}/model  {summary}")
    if args.verbose:
        traces, count = RECORDER.traces, RECORDER.count
        print(f"decoding steps: {traces} traced by torch.compile, {count} recorded as CUDA graphs")


def print_scores(scores: dict[str, Any]) -> None:
    for name, value in scores.items():
        if name.endswith("_se"):
            continue
        shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        if f"{name}_se" in scores:
            shown += f" ± {scores[f'{name}_se']:.4f}"
        print(f"{name:<30} {shown}")
