"""The command line. Each command is prepared first (everything that bad input can break) and then run.

torch and the files that need it are imported inside the commands: --help and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

from config import DEMO, Config, RunFailed, add_config_flags


def main(argv=None) -> int:
    try:
        return run(parser().parse_args(argv))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def run(args) -> int:
    try:
        job = args.prepare(args)
    except (ValueError, OSError) as error:
        return complain(error, 2)
    try:
        job()
    except (OSError, RunFailed) as error:
        return complain(error, 1)
    except RuntimeError as error:
        for telling, sentence in TROUBLE.items():
            if telling in str(error):
                return complain(sentence, 1)
        raise
    return 0


TROUBLE = {  # what torch's own errors say on a GPU, on a CPU, and of several processes: what a user can do
    "out of memory": "out of memory: lower --rows (sampling) or --micro-batch (update)",
    "can't allocate memory": "out of memory: lower --rows (sampling) or --micro-batch (update)",
    "Connection closed by peer": "another process of this run has ended: see its message, and go on with --resume",
    "Connection reset by peer": "another process of this run has ended: see its message, and go on with --resume",
}


def complain(error, status: int) -> int:
    if isinstance(error, OSError) and error.strerror:
        error = f"{error.filename or 'writing'}: {error.strerror}"
    # Names and values out of a stranger's files may stand in it: one line, which moves no cursor.
    print("error:", "".join(c if c.isprintable() else "\ufffd" for c in str(error)[:2000]), file=sys.stderr)
    return status


def prepare_train(args):
    import torch

    import plan
    import report
    import sinks
    from data import load_problems
    from distributed import World
    from files import read_json
    from record import Run
    from sampler import RECORDER
    from thinktuning import make_teacher, train

    preset = {**DEMO, "save_every": Config.save_every} if args.preset == "demo" else {}  # only the demonstration saves nothing
    config = Config(**{**preset, **{f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}})
    config.check()
    sinks.check(args.sinks)
    out = Path(args.out or f"out/{config.method}-{config.seed}")
    if (out / "metrics.jsonl").exists():
        if not args.resume:
            raise ValueError(f"{out} already holds a run: continue it with --resume, or give another directory with --out")
        if not config.micro_batch and (out / "config.json").exists():  # what was chosen then: another would round differently
            before = read_json(out / "config.json").get("micro_batch")
            config = replace(config, micro_batch=before if type(before) is int and before > 0 else 0)
    teacher_path = (args.teacher or args.model) if config.method == "thinktuning" else None
    device, dtype = device_and_dtype(args)
    world = World.start(device, dtype)
    sizes = plan.Sizes.read(args.model, teacher_path, dtype, world.size, device)
    free = plan.free_memory(device)
    config = plan.fit(config, sizes, device, free)
    # Of several processes the parts are the masters themselves.
    student, tokenizer = load_model(args.model, device, dtype if world.size == 1 else torch.float32)
    problems = fitting(load_problems(args.data, "train"), student, tokenizer, config, args.data)
    config = replace(config, steps=config.steps or max(1, len(problems) // config.questions))
    if world.is_first:
        print(plan.describe(config, sizes, device, free))
    validation = []
    if args.eval_data:
        validation = fitting(load_problems(args.eval_data, "test"), student, tokenizer, config, args.eval_data)
        validation = validation[: config.eval_count or None]
    teacher = make_teacher(*load_model(teacher_path, device, dtype), config) if teacher_path else None
    run = Run(out, {"model": args.model, "data": args.data, "dtype": args.dtype, **asdict(config)}, config.method,
              args.resume, world, args.sinks)

    def job():
        history = train(student, tokenizer, problems, config, teacher=teacher, run=run, validation=validation, world=world)
        trained = world.whole(student)
        if world.is_first:
            trained.save(out / "model", tokenizer)
        run.close()
        if not world.is_first:
            return
        report.write_report(out)
        summary = {k: round(v, 4) for k, v in history[-1].items() if k in ("reward", "reflection_rate") or k.startswith("eval_")}
        short = f" of {config.steps}, stopped; --resume goes on" if len(history) < config.steps else ""
        print(f"{len(history)} steps{short} -> {out}/model  {summary}")
        if args.verbose:
            print(f"decoding steps: {RECORDER.traces} traced by torch.compile, {RECORDER.count} recorded as CUDA graphs")

    return job


def device_and_dtype(args):
    import torch

    from model import LM

    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device, or no driver for it
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
    LM.compiled = args.compile == "auto"
    if args.dtype == "auto":
        args.dtype = "float32" if device == "cpu" else "bfloat16"
    return device, getattr(torch, args.dtype)


def load_model(path, device, dtype):
    from data.tokenizer import Tokenizer
    from model import LM

    tokenizer = Tokenizer.load(path)
    model = LM.load(path, device, dtype)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, its model only {model.config.vocab_size}")
    return model, tokenizer


def fitting(problems: list, model, tokenizer, config, source) -> list:
    """The problems whose prompt leaves room for an answer; says how many were dropped."""
    from thinktuning import student_prompt

    context = model.config.max_seq_len
    room = min(config.max_prompt, context - config.max_tokens)
    if room < 1:
        raise ValueError(f"the model's context is {context} tokens, and --max-tokens {config.max_tokens} leaves none of it for a "
                         f"question; lower --max-tokens (a model of the demonstration: --preset demo)")
    kept = [p for p in problems if len(student_prompt(tokenizer, p.question)) <= room]
    if len(kept) < len(problems):
        print(f"{source}: dropped {len(problems) - len(kept)} of {len(problems)} questions longer than {room} tokens")
    if not kept:
        raise ValueError(f"{source}: no question fits into {room} tokens; "
                         f"{'raise --max-prompt' if room == config.max_prompt else 'lower --max-tokens'}")
    return kept


def prepare_eval(args):
    from data import load_problems
    from data.grading import Grader
    from thinktuning import evaluate

    grader = Grader(args.grader)
    model, tokenizer = load_model(args.model, *device_and_dtype(args))
    context = model.config.max_seq_len
    max_tokens = args.max_tokens or min(1024, context // 2)
    config = Config(max_tokens=max_tokens, max_prompt=max(1, context - max_tokens))
    problems = fitting(load_problems(args.data, args.split), model, tokenizer, config, args.data)[: args.count or None]
    temperature = args.temperature if args.temperature is not None else float(args.samples > 1)

    def job():
        scores, _ = evaluate(model, tokenizer, problems, max_tokens=max_tokens, samples=args.samples,
                             temperature=temperature, rows=args.rows, seed=args.seed, equal=grader.equal)
        grader.close()
        print(f"{len(problems)} problems, {args.samples} samples each, temperature {temperature:g}; graded by {grader}")
        for key, value in scores.items():
            if not key.endswith("_se"):
                error = f" ± {scores[key + '_se']:.4f}" if key + "_se" in scores else ""
                print(f"{key:<30} {value:.4f}{error}" if isinstance(value, float) else f"{key:<30} {value}")

    return job


def prepare_ask(args):
    from ask import hold_vote, think_aloud
    from thinktuning import make_teacher, student_prompt

    asks_teacher = args.teacher or args.teacher_model
    if asks_teacher and args.samples > 1:
        raise ValueError("the teacher reads one attempt: leave out --samples or the teacher")
    place = device_and_dtype(args)
    model, tokenizer = load_model(args.model, *place)
    if not args.question.strip():
        raise ValueError("the question is empty")
    room = model.config.max_seq_len - len(student_prompt(tokenizer, args.question))
    if room < (args.max_tokens or 1):
        raise ValueError(f"the question leaves {room} tokens of the model's context of {model.config.max_seq_len}; "
                         "shorten it or lower --max-tokens")
    options = {"max_tokens": args.max_tokens or min(1024, room), "seed": args.seed,
               "temperature": float(args.samples > 1) if args.temperature is None else args.temperature}
    if args.samples > 1:
        return lambda: hold_vote(model, tokenizer, args.question, samples=args.samples, **options)
    teacher = None
    if asks_teacher:
        theirs, their_tokenizer = load_model(args.teacher_model, *place) if args.teacher_model else (model, tokenizer)
        reply = min(Config.teacher_reply, theirs.config.max_seq_len * 3 // 8)
        teacher = make_teacher(theirs, their_tokenizer, Config(teacher_reply=reply))
    return lambda: think_aloud(model, tokenizer, args.question, teacher=teacher, **options)


def prepare_demo(args):
    from demo import prepare

    return prepare(args)


DESCRIPTION = """ThinkTuning from scratch (arXiv 2508.07616).

  python thinktuning.py                            the demonstration: base model, GRPO, ThinkTuning, side by side
  python thinktuning.py --preset mentor            the novelty test: a habit that the student hardly ever samples
  python thinktuning.py train --model DIR --data gsm8k
  python thinktuning.py eval  --model DIR --data FILE
  python thinktuning.py ask   --model DIR "question"
  python thinktuning.py report RUN [RUN ...]       the HTML page again, or across runs
"""


def prepare_report(args):
    from report import prepare

    return prepare(args)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="thinktuning.py", description=DESCRIPTION,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    top.set_defaults(prepare=prepare_demo)
    add_demo_flags(top)
    commands = top.add_subparsers(title="commands", metavar="train | eval | ask | report")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", required=True, help="directory with config.json, model.safetensors and a tokenizer")
    common.add_argument("--device", default="auto", help="cpu, cuda, ... (cuda where there is one)")
    common.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                        help="of the weights in memory; training bfloat16 keeps a float32 master copy "
                        "(float32 on a cpu, else bfloat16)")

    common.add_argument("--compile", default="auto", choices=("auto", "off"),
                        help="auto: on a GPU, decoding steps are compiled into CUDA graphs (auto)")

    t = commands.add_parser("train", parents=[common], help="train a model directory on problems")
    t.add_argument("--data", required=True, help="wordproblems, gsm8k, or a .jsonl file of questions and answers")
    t.add_argument("--eval-data", help="problems to evaluate on, likewise")
    t.add_argument("--teacher", help="another model directory for the teacher, of any family "
                   "(the student's initial weights)")
    t.add_argument("--out", help="run directory (out/METHOD-SEED)")
    t.add_argument("--resume", action="store_true", help="go on from the run directory's newest checkpoint, if there is one")
    t.add_argument("--verbose", action="store_true", help="say how many decoding steps were recorded")
    t.add_argument("--preset", default="paper", choices=("paper", "demo"), help="where the settings below start from")
    for name, title in (("tensorboard", "TensorBoard"), ("wandb", "Weights & Biases")):
        t.add_argument(f"--{name}", dest="sinks", action="append_const", const=name, default=[],
                       help=f"the metrics to {title} as well (pip install {name})")
    t.set_defaults(prepare=prepare_train)
    add_config_flags(t)

    e = commands.add_parser("eval", parents=[common], help="accuracy, mean@k, pass@k, maj@k, reflection, standard errors")
    e.add_argument("--data", required=True, help="wordproblems, gsm8k, or a .jsonl file")
    e.add_argument("--split", default="test", help="of wordproblems or gsm8k (test)")
    e.add_argument("--count", type=natural, default=0, help="only the first so many problems; 0 is all")
    e.add_argument("--samples", type=positive, default=1, help="k, responses to each problem")
    e.add_argument("--temperature", type=from_zero, help="0 with one sample, else 1")
    e.add_argument("--rows", type=positive, default=256, help="responses sampled side by side (memory)")
    e.add_argument("--grader", default="auto", choices=("auto", "builtin", "math-verify"),
                   help="who compares answers (auto: math-verify where it is installed)")
    e.set_defaults(prepare=prepare_eval)

    a = commands.add_parser("ask", parents=[common], help="watch it think")
    a.add_argument("question")
    a.add_argument("--samples", type=positive, default=1, help="so many answers and their vote instead (1)")
    a.add_argument("--temperature", type=from_zero, help="0 is greedy (0 with one sample, else 1)")
    a.add_argument("--teacher", action="store_true", help="and what a teacher with the model's own weights says to "
                   "that attempt, up to any reflection on it")
    a.add_argument("--teacher-model", metavar="DIR", help="likewise a teacher with the weights in DIR")
    a.set_defaults(prepare=prepare_ask)

    r = commands.add_parser("report", help="one HTML page of a run, or across runs")
    r.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, or of a demonstration with its runs")
    r.add_argument("--out", help="file to write (report.html in RUN; of several runs, in the current directory)")
    r.set_defaults(prepare=prepare_report)
    for p in (e, a):
        p.add_argument("--max-tokens", type=positive, help="new tokens of a response (1024, or what the context leaves)")
        p.add_argument("--seed", type=natural, default=0)
    return top


def add_demo_flags(top):
    demo = top.add_argument_group("the demonstration")
    demo.add_argument("--seed", type=natural, default=0, help="of everything: pretraining, sampling, choosing, data order")
    demo.add_argument("--preset", default="demo", choices=("demo", "mentor"),
                      help="mentor: the novelty test, where the teacher quotes a made-up mentor and naming him once is rewarded")
    demo.add_argument("--out", help="directory for the runs and summary.json (out/PRESET-SEED)")
    demo.add_argument("--floor", type=float, default=0.01, help="share of the student's pretraining texts that go on after "
                      "the answer with an unrelated remark (0.01)")
    demo.add_argument("--length-cost", type=float, default=0.0, help="what a response of the longest length costs a right answer "
                      "once the teacher is gone (0)")
    demo.add_argument("--ablate", nargs="?", const="all", choices=("all", "long", "rates", "stress"),
                      help="on this seed's base model: every variant, only the long GRPO run, learning rates, the stress regime")
    demo.add_argument("--repeats", type=positive, help="training seeds of every variant of --ablate (3)")
    demo.add_argument("--quick", action="store_true", help="a smoke test of a few steps: too short to show anything")


def natural(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up (and below 10^18)")
    return int(text)


def positive(text: str) -> int:
    if natural(text) == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def from_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up")
    return value
