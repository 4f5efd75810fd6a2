"""The demonstration: one tiny base model from scratch, then GRPO and ThinkTuning from the same weights, side by side.

What the base model reads is the list in `READS`; everything else is the program that also trains real models.
"""

from __future__ import annotations

import copy
import random
import time
from dataclasses import replace

from data import load_problems
from data.scores import score
from demo.base import Setup, base_model, teacher_prompt_scores
from demo.printed import chart, same_question, table
from run.record import Run, write_json
from show.report import write_report
from teacher import make_teacher

CURVE = dict(
    eval_every=5, eval_count=100
)  # validation problems answered while training, for the report's curves


def demonstrate(setup: Setup):
    out, tokenizer, config, quick = setup.out, setup.tokenizer, setup.config, setup.quick
    began = time.perf_counter()
    for name in ("summary.json", "report.html"):
        (out / name).unlink(missing_ok=True)  # an old table must not stand beside new models
    base, seconds = base_model(setup)
    test = load_problems("wordproblems", "test")
    test = test[:50] if quick else test
    results, records, curves = {}, {}, {}
    results["base"], records["base"] = examine(setup, base, test, samples=2 if quick else 24)
    results["base"] |= teacher_prompt_scores(base, tokenizer, test, records["base"], config)
    for method in ("grpo", "thinktuning"):
        started = time.perf_counter()
        student, curves[method] = train_one(
            setup, base, replace(config, method=method, **CURVE), out / method
        )
        seconds[method] = time.perf_counter() - started
        student.save(out / method / "model", tokenizer)
        if len(curves[method]) < config.steps:
            return print(
                f"stopped at step {len(curves[method])}; that model is in {out / method / 'model'}"
            )
        results[method], records[method] = examine(setup, student, test)
    seconds["total"] = time.perf_counter() - began
    for name, phase in (("base", "pretrain"), ("grpo", "grpo"), ("thinktuning", "thinktuning")):
        results[name]["seconds"] = seconds[phase]
    write_json(
        out / "summary.json",
        {
            **results,
            "seconds": seconds,
            "seed": config.seed,
            "floor": setup.recipe["floor"],
            "steps": config.steps,
            "quick": quick,
        },
    )
    write_report(out)
    print(
        "\n" + chart(curves) + "\n\n" + table(results, len(test)) + "\n\n" + same_question(records)
    )
    print(
        f"\n{seconds['total']:.0f} s in all ({', '.join(f'{k} {v:.0f}' for k, v in seconds.items() if k != 'total')}); "
        f"models, metrics and transcripts are in {out}/, "
        f"{out}/report.html shows them"
    )


def train_one(
    setup: Setup, base, config, path=None, wrap=None, name="the demonstration's base", **more
):
    """Train a copy of `base` by `config.method`; returns it and the metrics of every step. The base is the teacher."""
    student = copy.deepcopy(base).requires_grad_(True)
    teacher = (
        make_teacher(base, setup.tokenizer, config) if config.method == "thinktuning" else None
    )
    if teacher and wrap:
        teacher.ask = wrap(teacher.ask, random.Random(config.seed))
    run = Run(path, {"model": name, **vars(config)}, config.method) if path else None
    validation = load_problems("wordproblems", "validation")[: config.eval_count] if path else ()
    history = setup.train(
        student,
        setup.tokenizer,
        load_problems("wordproblems", "train"),
        config,
        teacher=teacher,
        run=run,
        validation=validation,
        **more,
    )
    if run:
        run.close()
        write_report(path)
    return student, history


def examine(setup: Setup, student, problems, samples=1):
    """Greedy scores on the test problems, also by number of operations, sampled ones, and the greedy records."""
    tokenizer, max_tokens = setup.tokenizer, setup.config.max_tokens
    scores, records = setup.evaluate(student, tokenizer, problems, max_tokens=max_tokens)
    for n in sorted({operations(p) for p in problems}):
        part = score([r for r in records if operations(r[0]) == n])
        scores[f"accuracy_{n}_operations"], scores[f"reflection_{n}_operations"] = (
            part["accuracy"],
            part["reflection_rate"],
        )
    sampled, texts = setup.evaluate(
        student, tokenizer, problems, max_tokens=max_tokens, samples=samples, temperature=1.0
    )
    for key in ("accuracy", "reflection_rate", "behaviours"):
        scores[f"sampled_{key}"] = sampled[key]
    return scores | {"sampled_rollouts": len(texts)}, records


def operations(problem) -> int:
    return problem.question.count(" On ")
