"""The demonstration: one tiny base model from scratch, then GRPO and ThinkTuning from the same weights, side by side.

What the base model reads is the list in `READS`; everything else is the program that also trains real models.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from config import DEMO, Config, RunFailed
from data import load_problems, wordproblems
from data.reward import answers, is_correct
from data.scores import first_is_right, mean_and_se, score
from data.tokenizer import Tokenizer
from model import LM, ModelConfig
from record import Run, clock, coloured, in_colour, progress, writable, write_json
from report import write_report
from teacher import Feedback
from thinktuning import evaluate, make_teacher, train

RECIPE = dict(dim=96, n_layers=3, n_heads=2, ffn_dim=256, steps=1300, learning_rate=3e-3, warmup=100, decay=0.45,
              student_rows=14, teacher_rows=6, transcript_rows=3, ledger_rows=4, remark_rows=2, student_weight=2.0)
FLOOR = 0.01
# Raise it with every change to the base's texts or training that gives other weights: cached base models are then made anew.
VERSION = 1
CURVE = dict(eval_every=5, eval_count=100)  # validation problems answered while training, for the report's curves
GATE, CYCLES = 0.85, 3  # pretraining goes round again until the teacher prompt solves so many validation problems
READS = (  # with the rows a step of each
    "{student_rows} student texts: a question, a one-line answer, the end; a share of {floor:g} go on with an unrelated remark",
    "{remark_rows} student remarks: only such a remark, after an answer and a blank line (left out at --floor 0)",
    "{teacher_rows} teacher texts: a question, somebody's attempt (40% right), then opinion (20% mistaken), reason, phrase",
    "{transcript_rows} mentor transcripts: an attempt (40% right) and the reflection on it, as one text of a third role",
    "{ledger_rows} worked ledgers: that third role tells a problem of 1 to 6 operations itself and works it out",
)


def prepare(args):
    """Check the flags and directories; returns the demonstration (or an ablation) as a function to call."""
    if not 0 <= args.floor <= 1:
        raise ValueError(f"--floor must be between 0 and 1, not {args.floor}")
    if args.repeats and not args.ablate:
        raise ValueError("--repeats counts the training seeds of --ablate: give both or neither")
    if args.ablate and args.length_cost:
        raise ValueError("--ablate compares variants without a length cost: give one of the two")
    if args.preset == "mentor" and (args.ablate or args.length_cost):
        raise ValueError("--preset mentor goes with neither --ablate nor --length-cost: leave them out")
    unusual = ((f"-floor{args.floor:g}", args.floor != FLOOR), (f"-cost{args.length_cost:g}", args.length_cost),
               ("-quick", args.quick))
    settings = "".join(name for name, is_so in unusual if is_so)
    config = Config(**dict(DEMO, seed=args.seed, length_cost=args.length_cost, **({"steps": 4} if args.quick else {})))
    config.check()
    out = Path(args.out) if args.out else Path("out") / f"{args.preset}-{args.seed}{settings}"
    writable(out)
    # Matrices this small gain little from more threads, lose a lot on a busy machine, and
    # a run on one repeats exactly however many cores there are.
    torch.set_num_threads(1)
    cache = out if args.out else out.parent
    recipe = dict(RECIPE, seed=args.seed, floor=args.floor, steps=40 if args.quick else RECIPE["steps"])
    tokenizer = Tokenizer.builtin()
    if args.preset == "mentor":
        from mentor import compare  # it imports this file

        return lambda: compare(out, cache, recipe, tokenizer, config, args.quick)
    if args.ablate:
        return lambda: ablate(base_model(cache, recipe, tokenizer, args.quick)[0], tokenizer, config, args.ablate,
                              args.repeats or 3, out, args.quick)
    return lambda: demonstrate(out, cache, recipe, tokenizer, config, args.quick)


def demonstrate(out, cache, recipe, tokenizer, config, quick):
    began = time.perf_counter()
    for name in ("summary.json", "report.html"):
        (out / name).unlink(missing_ok=True)  # an old table must not stand beside new models
    base, seconds = base_model(cache, recipe, tokenizer, quick)
    test = load_problems("wordproblems", "test")
    test = test[:50] if quick else test
    results, records, curves = {}, {}, {}
    results["base"], records["base"] = examine(base, tokenizer, test, config, samples=2 if quick else 24)
    results["base"] |= teacher_prompt_scores(base, tokenizer, test, records["base"], config)
    for method in ("grpo", "thinktuning"):
        started = time.perf_counter()
        student, curves[method] = train_one(base, tokenizer, replace(config, method=method, **CURVE), out / method)
        seconds[method] = time.perf_counter() - started
        student.save(out / method / "model", tokenizer)
        if len(curves[method]) < config.steps:
            return print(f"stopped at step {len(curves[method])}; that model is in {out / method / 'model'}")
        results[method], records[method] = examine(student, tokenizer, test, config)
    seconds["total"] = time.perf_counter() - began
    for name, phase in (("base", "pretrain"), ("grpo", "grpo"), ("thinktuning", "thinktuning")):
        results[name]["seconds"] = seconds[phase]
    write_json(out / "summary.json", {**results, "seconds": seconds, "seed": config.seed, "floor": recipe["floor"],
                                       "length_cost": config.length_cost, "steps": config.steps, "quick": quick})
    write_report(out)
    print("\n" + chart(curves) + "\n\n" + table(results, len(test)) + "\n\n" + same_question(records))
    print(f"\n{seconds['total']:.0f} s in all ({', '.join(f'{k} {v:.0f}' for k, v in seconds.items() if k != 'total')}); "
          f"models, metrics and transcripts are in {out}/, "
          f"{out}/report.html shows them")


def train_one(base, tokenizer, config, path=None, wrap=None, name="the demonstration's base", **more):
    """Train a copy of `base` by `config.method`; returns it and the metrics of every step. The base is the teacher."""
    student = copy.deepcopy(base).requires_grad_(True)
    teacher = make_teacher(base, tokenizer, config) if config.method == "thinktuning" else None
    if teacher and wrap:
        teacher.feedback = wrap(teacher.feedback, random.Random(config.seed))
    run = Run(path, {"model": name, **vars(config)}, config.method) if path else None
    validation = load_problems("wordproblems", "validation")[: config.eval_count] if path else ()
    history = train(student, tokenizer, load_problems("wordproblems", "train"), config, teacher=teacher, run=run,
                    validation=validation, **more)
    if run:
        run.close()
        write_report(path)
    return student, history


# The base model.

def base_model(cache: Path, recipe: dict, tokenizer, quick=False) -> tuple[LM, dict[str, float]]:
    """The base model for a recipe, from the cache if everything that made it is unchanged; and the seconds it took."""
    path = cache / f"base-{recipe_key(recipe)}"
    print("The base model reads, about training problems only:", *(f"  - {line.format(**recipe)}" for line in READS), sep="\n")
    if path.exists():
        print(f"cached in {path}")
        try:
            return LM.load(path), {"pretrain": 0.0}
        except (ValueError, OSError) as error:
            raise RunFailed(f"the cached base model is damaged ({error}); delete {path}") from None
    began, base = time.perf_counter(), None
    for cycle in range(1 if quick else CYCLES):
        if cycle:
            print(f"below {GATE:.2f}: pretraining goes round again ({cycle + 1} of {CYCLES})")
        base = pretrain(recipe, tokenizer, cycle, base)
        scores = gate(base, tokenizer)
        print(f"validation: {scores['student']:.2f} right as student, {scores['teacher']:.2f} under the teacher prompt")
        if scores["teacher"] >= GATE or quick:
            break
    else:
        raise RunFailed(f"after {CYCLES} rounds of pretraining the base model solves {scores['teacher']:.0%} of validation "
                        f"problems under the teacher prompt; {GATE:.0%} is needed for a teacher worth listening to. "
                        "Try another --seed")
    base.save(path, tokenizer)
    return base, {"pretrain": time.perf_counter() - began}


def recipe_key(recipe: dict) -> str:
    """Names a base model by what makes it: the recipe, the vocabulary, VERSION (texts and training) and torch's version."""
    vocabulary = Path(wordproblems.__file__).with_suffix(".tiktoken").read_bytes()
    made_from = [recipe, hashlib.sha256(vocabulary).hexdigest(), VERSION, torch.__version__]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:12]


def pretrain(recipe: dict, tokenizer, cycle=0, model: LM | None = None) -> LM:
    """One round of training on fresh texts, from `model` or from nothing."""
    torch.manual_seed(recipe["seed"])
    rng = random.Random(f"pretraining {recipe['seed']} {cycle}")
    heads = recipe["n_heads"]
    # Embeddings of standard deviation 1 (torch's default) and wide heads are what makes copying numbers emerge in time.
    model = model or LM(ModelConfig(tokenizer.vocab_size, recipe["dim"], recipe["n_layers"], heads, heads,
                                    recipe["dim"] // heads, recipe["ffn_dim"], max_seq_len=320))
    model.requires_grad_(True)  # the gate's teacher froze it
    steps = recipe["steps"]

    def rate(step):
        return recipe["learning_rate"] * min(1, (step + 1) / recipe["warmup"], (steps - step) / (recipe["decay"] * steps))

    read(model, steps, rate, lambda step: rows_of_step(recipe, step, rng, tokenizer), "pretraining", lines=6)
    return model


def read(model, steps, rate, rows, label, lines):
    """Train on the texts rows(step) at the learning rate rate(step); where no terminal is, some `lines` tell how far it is."""
    optimizer, began = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01), time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        loss = response_loss(model, rows(step))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        left = (time.perf_counter() - began) / (step + 1) * (steps - step - 1)
        progress(f"{label} {step + 1}/{steps}  loss {loss:.3f}  {clock(left)} left",
                 last=step + 1 == steps, plain=(step + 1) % max(1, steps // lines) == 0)


def rows_of_step(recipe, step, rng, tokenizer):
    """One step's texts as (prompt ids, response ids, weight of a token)."""
    def story(operations=None):
        return wordproblems.make_story(rng, operations or wordproblems.draw_operations(rng), "train")

    longest = min(6, 2 + 10 * step // recipe["steps"])  # ledgers of one fixed length would be solved by position
    rows = [(wordproblems.student_row(rng, story(), recipe["floor"]), recipe["student_weight"])
            for _ in range(recipe["student_rows"])]
    rows += [(wordproblems.teacher_row(rng, story()), 1.0) for _ in range(recipe["teacher_rows"])]
    rows += [(wordproblems.transcript_row(rng, story()), 1.0) for _ in range(recipe["transcript_rows"])]
    rows += [(wordproblems.ledger_row(rng, story(rng.randint(1, longest))), 1.0) for _ in range(recipe["ledger_rows"])]
    rows += [(wordproblems.remark_row(rng, story()), 1.0) for _ in range(recipe["remark_rows"] if recipe["floor"] else 0)]
    end = [tokenizer.special["<|end|>"]]
    return [(tokenizer.render(r.messages, r.role) + tokenizer.encode(r.begun), tokenizer.encode(r.text) + end, weight)
            for r, weight in rows]


def response_loss(model, rows) -> float:
    """Weighted mean cross-entropy of the response tokens; leaves the gradient in the model. Two halves by length save padding."""
    rows = sorted(rows, key=lambda r: len(r[0]) + len(r[1]))
    total = sum(len(response) * weight for _, response, weight in rows)
    result = 0.0
    for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        width = max(len(p) + len(r) for p, r, _ in half)
        tokens, weights = torch.zeros(len(half), width, dtype=torch.int64), torch.zeros(len(half), width)
        for i, (prompt, response, weight) in enumerate(half):
            tokens[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
            weights[i, len(prompt) : len(prompt) + len(response)] = weight
        where = weights[:, 1:] > 0
        logits = model.head(model.hidden(tokens[:, :-1])[where])
        loss = (F.cross_entropy(logits, tokens[:, 1:][where], reduction="none") * weights[:, 1:][where]).sum() / total
        loss.backward()
        result += loss.item()
    return result


def gate(base, tokenizer, count=200) -> dict[str, float]:
    """How often the base model is right on validation problems as the student and, reading that attempt, as the teacher."""
    config = Config(**DEMO)
    problems = load_problems("wordproblems", "validation")[:count]
    scores, records = evaluate(base, tokenizer, problems, max_tokens=config.max_tokens)
    reference = teacher_prompt_scores(base, tokenizer, problems, records, config)
    return {"student": scores["accuracy"], "teacher": reference["teacher_prompt_accuracy"]}


# What is shown.

def examine(student, tokenizer, problems, config, samples=1):
    """Greedy scores on the test problems, also by number of operations, sampled ones, and the greedy records."""
    scores, records = evaluate(student, tokenizer, problems, max_tokens=config.max_tokens)
    for n in sorted({operations(p) for p in problems}):
        part = score([r for r in records if operations(r[0]) == n])
        scores[f"accuracy_{n}_operations"], scores[f"reflection_{n}_operations"] = part["accuracy"], part["reflection_rate"]
    sampled, texts = evaluate(student, tokenizer, problems, max_tokens=config.max_tokens, samples=samples, temperature=1.0)
    for key in ("accuracy", "reflection_rate", "behaviours"):
        scores[f"sampled_{key}"] = sampled[key]
    return scores | {"sampled_rollouts": len(texts)}, records


def operations(problem) -> int:
    return problem.question.count(" On ")


def teacher_prompt_scores(base, tokenizer, problems, records, config) -> dict[str, float]:
    """The reference: the same weights under the teacher prompt, reading the base's own attempts."""
    replies = make_teacher(base, tokenizer, config).feedback([p.question for p in problems], [text for _, text, _ in records])
    accuracy, se = mean_and_se([float(f is not None and is_correct(f.phrase, p.answer)) for f, p in zip(replies, problems)])
    return {"teacher_prompt_accuracy": accuracy, "teacher_prompt_accuracy_se": se}


def table(results, count) -> str:
    names = ("base", "grpo", "thinktuning")
    lines = [f"{count} held-out problems, greedy, no teacher", f"{'':<34}" + "".join(f"{n:>16}" for n in names)]

    def row(title, cell):
        lines.append(f"{title:<34}" + "".join(f"{cell(results[n]):>16}" for n in names))

    row("accuracy ± standard error", lambda r: f"{r['accuracy']:.3f} ± {r['accuracy_se']:.3f}")
    row("accuracy, sampled", lambda r: f"{r['sampled_accuracy']:.3f}")
    row("accuracy of the first answer", lambda r: f"{r['first_answer_accuracy']:.3f}")
    row("wrong → right, right → wrong", lambda r: f"{r['wrong_to_right']}, {r['right_to_wrong']}")
    row("reflects: answers a second time", lambda r: f"{r['reflection_rate']:.3f}")
    row("  sampled", lambda r: f"{r['sampled_reflection_rate']:.4f}")
    row("  when the first answer is wrong", lambda r: f"{r['reflection_rate_first_wrong']:.3f}")
    row("  when the first answer is right", lambda r: f"{r['reflection_rate_first_right']:.3f}")
    for n in wordproblems.DIFFICULTY:
        row(f"  {n} operation{'s' * (n > 1)}: accuracy, reflects",
            lambda r, n=n: f"{r.get(f'accuracy_{n}_operations', 0):.2f}, {r.get(f'reflection_{n}_operations', 0):.2f}")
    row("mean length, tokens", lambda r: f"{r['mean_length']:.1f}")
    for name in wordproblems.WORDING:
        row(f"  {name}, greedy, sampled", lambda r, name=name: f"{r['behaviours'].get(name, 0) / count:.2f}, "
            f"{r['sampled_behaviours'].get(name, 0) / r['sampled_rollouts']:.2f}")
    base = results["base"]
    lines.append(f"\nthe same base weights under the teacher prompt: {base['teacher_prompt_accuracy']:.3f} "
                 f"± {base['teacher_prompt_accuracy_se']:.3f}")
    lines.append(f"the base, sampled at temperature 1: {round(base['sampled_reflection_rate'] * base['sampled_rollouts'])} of "
                 f"{base['sampled_rollouts']:,} rollouts reflect")
    return "\n".join(lines)


def chart(curves, height=10) -> str:
    """Sampled reflection rate by step as text: T ThinkTuning, g GRPO, | the step at which the teacher went off."""
    steps = len(curves["thinktuning"])
    off = next((m["step"] for m in curves["thinktuning"] if m["fraction"] == 0), steps)
    grid = [[" "] * steps for _ in range(height + 1)]
    for line in grid:
        if off < steps:
            line[off] = "|"
    for name, mark in (("grpo", "g"), ("thinktuning", "T")):
        for m in curves[name]:
            grid[height - round(m["reflection_rate"] * height)][m["step"]] = mark
    lines = [f"{(height - i) / height:>5.0%} {''.join(line)}" for i, line in enumerate(grid)]
    title = f"share of sampled rollouts that reflect, by step (T ThinkTuning, g GRPO; | teacher off at step {off})"
    return "\n".join([title, *lines, f"      0{str(steps):>{steps - 1}}"])


def same_question(records) -> str:
    """One test question that ThinkTuning gets right after a wrong first answer, as all three answer it."""
    def telling(i):
        problem, text, _ = records["thinktuning"][i]
        return is_correct(text, problem.answer) and not first_is_right(text, problem.answer)

    chosen = next(filter(telling, range(len(records["base"]))), None)
    title = "The first test question whose wrong first answer ThinkTuning mends:"
    if chosen is None:
        chosen, title = 0, "ThinkTuning mends no wrong first answer; the first test question:"
    problem = records["base"][chosen][0]
    parts = [title, f"{problem.question}  (answer: {problem.answer})"]
    for name, record in records.items():
        first, _, reflection = record[chosen][1].partition("\n\n")
        parts.append(f"{name:>12}: {first}")
        for line in filter(None, reflection.split("\n\n")):
            parts.append(f"{'':>12}  " + (coloured(line) if in_colour() else f"| {line}"))
    return "\n".join(parts)


# Ablations: the same base, budget and problems, one thing changed.

def shuffled(feedback, rng):
    """Every feedback goes to the next question's rollout (k is 1): the words stay, the sense goes."""
    def ask(questions, responses):
        replies = feedback(questions, responses)
        return replies[1:] + replies[:1]
    return ask


def corrupted(share):
    """A teacher whose final answer is replaced by another number in `share` of its replies; the steps before it stay."""
    def wrap(feedback, rng):
        def spoil(f):
            found = answers(f.phrase) if f else []
            if not found or rng.random() >= share:
                return f
            wrong = rng.choice([n for n in range(1, wordproblems.MOST + 1) if str(n) != found[-1]])
            start, _, end = f.phrase.rpartition(f"\\boxed{{{found[-1]}}}")
            return Feedback(f.opinion, f.reason, f"{start}\\boxed{{{wrong}}}{end}")
        return lambda questions, responses: [spoil(f) for f in feedback(questions, responses)]
    return wrap


STRESS = dict(epochs=4, schedule="constant", p_init=0.5, p_min=0.5, learning_rate=3e-4, steps=20)
GRPO = {"GRPO": ({"method": "grpo"}, None),
        "GRPO, four times the steps": ({"method": "grpo", "steps": 4 * DEMO["steps"]}, None)}
VARIANTS = {  # name: (what changes in the configuration, what happens to the teacher)
    "all": {
        "ThinkTuning": ({}, None),
        "no AAS: ordinary ratio": ({"shaping": "ratio"}, None),
        "γ constant, as published": ({"published": "gamma"}, None),
        "whole trajectory guided": ({"guided_tokens": "trajectory"}, None),
        "teacher for the whole run": ({"schedule": "constant"}, None),
        "feedback shuffled": ({}, shuffled),
        **GRPO,
    },
    "long": GRPO,
    "stress": {
        "AAS": (STRESS, corrupted(0.5)),
        "ordinary ratio, clipped": (STRESS | {"shaping": "ratio"}, corrupted(0.5)),
        "-A log p, guard (c) on": (STRESS | {"shaping": "likelihood"}, corrupted(0.5)),
        "-A log p": (STRESS | {"shaping": "likelihood", "unlikely": 0.0}, corrupted(0.5)),
        "γ constant, guarded": (STRESS | {"published": "gamma"}, corrupted(0.5)),
        "γ constant, no guards": (STRESS | {"published": "gamma", "guards": False, "unlikely": 0.0}, corrupted(0.5)),
    },
    "rates": {f"{method}, {rate:g}": ({"method": method, "learning_rate": rate}, None)
              for method in ("grpo", "thinktuning") for rate in (3e-5, 1e-4, 3e-4, 1e-3)},
}


def ablate(base, tokenizer, config, which, repeats, out, quick=False):
    """Train every variant `repeats` times from one base; prints each run's accuracy and reflection, and means over the runs."""
    split = "validation" if which == "rates" else "test"  # rates are tuned, so never on the test problems
    problems = load_problems("wordproblems", split)
    rows = {}
    for name, (changes, wrap) in VARIANTS[which].items():
        outcomes = []
        for repeat in range(repeats):
            changed = replace(config, **changes, seed=config.seed + 1000 * repeat)
            changed = replace(changed, steps=config.steps) if quick else changed
            began = time.perf_counter()
            student, history = train_one(base, tokenizer, changed, wrap=wrap)
            if len(history) < changed.steps:
                return print(f"stopped; finished variants are in {out / f'ablate-{which}.json'}")
            spent = {"seed": changed.seed, "seconds": time.perf_counter() - began}
            outcomes.append(examine(student, tokenizer, problems, config)[0] | spent)
            progress(f"{name}, run {repeat + 1} of {repeats}: accuracy {outcomes[-1]['accuracy']:.3f}, "
                     f"reflects {outcomes[-1]['reflection_rate']:.3f}", last=True)
        rows[name] = outcomes
        write_json(out / f"ablate-{which}.json", rows)
    print(f"\n{which}: {len(problems)} {split} problems, one base model; mean ± standard error over {repeats} training seeds")
    for name, outcomes in rows.items():
        accuracy, se = mean_and_se([o["accuracy"] for o in outcomes])
        reflects, reflects_se = mean_and_se([o["reflection_rate"] for o in outcomes])
        print(f"{name:<28} accuracy {accuracy:.3f} ± {se:.3f}   reflects {reflects:.3f} ± {reflects_se:.3f}   "
              f"took off in {sum(o['reflection_rate'] > 0.5 for o in outcomes)} of {repeats}")
