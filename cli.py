"""The command line. Each command is prepared first (everything that bad input can break) and then run.

torch and the files that need it are imported inside the commands: --help and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

from config import DEMO, MAY_CHANGE, Config, RunFailed, add_config_flags, flag


def main(argv=None) -> int:
    try:
        return run(parse(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def run(args) -> int:
    try:
        job = args.prepare(args)
    except (ValueError, OSError) as error:
        return complain(error, 2)
    except RuntimeError as error:
        return complain(trouble(error, {}), 1)
    try:
        job()
    except (OSError, RunFailed) as error:
        return complain(error, 1)
    except RuntimeError as error:
        return complain(trouble(error, vars(args)), 1)
    return 0


TROUBLE = {  # what torch's own errors say on a GPU, on a CPU, and of several processes: what that means
    "out of memory": "out of memory: {memory}",
    "can't allocate memory": "out of memory: {memory}",
    "Connection closed by peer": "another process of this run has ended: see its message; {again}",
    "Connection reset by peer": "another process of this run has ended: see its message; {again}",
}


def trouble(error: RuntimeError, advice: dict) -> str:
    """One sentence for an error of torch's that is no fault of the program; all others go on."""
    known = {"memory": "end what else runs on the device, or take a larger one",
             "again": "start again"}
    for telling, sentence in TROUBLE.items():
        if telling in str(error):
            return sentence.format_map({**known, **advice})
    raise error


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
    from record import Run, steps_without_checkpoint
    from sampler import RECORDER
    from thinktuning import make_teacher, train

    out = Path(args.out or "out/{method}-{seed}".format_map({**asdict(Config()), **vars(args)}))
    if (out / "metrics.jsonl").exists() and not args.resume:
        go_on = "" if steps_without_checkpoint(out) else "continue it with --resume, or "
        raise ValueError(f"{out} already holds a run: {go_on}give another directory with --out")
    stored = out / "config.json"
    before = read_json(stored) if args.resume and stored.exists() else {}
    config = chosen(args, before)
    config.check()
    sinks.check(args.sinks)
    if not before:
        check_used(args, config)
    teacher_path = (args.teacher or args.model) if config.method == "thinktuning" else None
    device, dtype = device_and_dtype(args)
    world = World.start(device, dtype)
    sizes = plan.Sizes.read(args.model, teacher_path, dtype, world.size, device)
    free = plan.free_memory(device)
    config = plan.fit(config, sizes, device, free, resumed=bool(before))
    # Of several processes the parts are the masters themselves.
    student, tokenizer = load_model(args.model, device, dtype if world.size == 1 else torch.float32)
    room = config.max_tokens, config.max_prompt
    problems = fitting(load_problems(args.data, "train"), student, tokenizer, args.data, *room)
    config = replace(config, steps=config.steps or max(1, len(problems) // config.questions))
    config = replace(config, schedule_steps=config.schedule_steps or config.steps)
    if world.is_first:
        print(plan.describe(config, sizes, device, free) + told_longer(config, before))
    validation = []
    if args.eval_data:
        validation = load_problems(args.eval_data, "test")
        validation = fitting(validation, student, tokenizer, args.eval_data, *room)
        validation = validation[: config.eval_count or None]
    teacher = make_teacher(*load_model(teacher_path, device, dtype), config) if teacher_path else None
    names = [name for name in ("model", "data", *KEPT) if getattr(args, name) is not None]
    named = {name: getattr(args, name) for name in names}
    run = Run(out, {**named, **asdict(config)}, config.method, args.resume, world, args.sinks)
    args.again = ("--resume goes on" if config.save_every else
                  "it cannot be resumed, because --save-every 0 kept no checkpoint")
    args.memory = f"lower --rows (sampling) or --micro-batch (update); {args.again}"

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
        short = f" of {config.steps}, stopped; {args.again}" if len(history) < config.steps else ""
        print(f"{len(history)} steps{short} -> {out}/model  {summary}")
        if args.verbose:
            print(f"decoding steps: {RECORDER.traces} traced by torch.compile, {RECORDER.count} recorded as CUDA graphs")

    return job


DTYPES = ("auto", "float32", "bfloat16")
KEPT = ("dtype", "preset", "teacher", "eval_data")  # flags of train that are no settings of Config


def chosen(args, before: dict) -> Config:
    """The settings of a run: flags first, then those of the run that is resumed, then the preset's.

    So a flag that is left out on --resume is what it was, and what the program chose itself stays: the
    micro-batch (another would round differently), the steps, those of the schedule.
    """
    for name in KEPT:
        if getattr(args, name) in (None, "auto") and isinstance(before.get(name), str):
            setattr(args, name, before[name])
    if args.dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {args.dtype!r}")
    args.preset = args.preset or "paper"
    # Only the demonstration itself saves nothing.
    preset = {**DEMO, "save_every": Config.save_every} if args.preset == "demo" else {}
    kinds = {f.name: type(f.default) for f in fields(Config)}
    kept = {name: before[name] for name, kind in kinds.items() if type(before.get(name)) is kind}
    given = {name: getattr(args, name) for name in kinds if hasattr(args, name)}
    return Config(**{**preset, **kept, **given})


def check_used(args, config: Config) -> None:
    """Raises ValueError where a flag would do nothing, so that nobody believes that it did."""
    if args.teacher and config.method == "grpo":
        raise ValueError("--method grpo has no teacher: leave --teacher out")
    if not args.eval_data and (config.eval_every or config.eval_count):
        flag = "--eval-every" if config.eval_every else "--eval-count"
        raise ValueError(f"{flag} needs problems to evaluate on: give --eval-data too, or leave {flag} out")


def told_longer(config: Config, before: dict) -> str:
    """A line about a run whose steps were raised: which schedule now holds."""
    was = before.get("steps")
    if type(was) is not int or config.steps <= was:
        return ""
    schedule = (f"; the teacher's share p_s stays that of a run of {config.schedule_steps} steps, so a "
                "teacher that has gone stays away") if config.method == "thinktuning" else ""
    return f"\n{config.steps} steps instead of {was}{schedule}"


def device_and_dtype(args):
    import torch

    from model import LM

    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device, or no driver for it
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"--device {device}: {reason}; give another one, such as cpu") from None
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
        raise ValueError(f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, its model only "
                         f"{model.config.vocab_size}; put the tokenizer there that the model was trained with")
    return model, tokenizer


def fitting(problems: list, model, tokenizer, source, max_tokens: int, limit=None) -> list:
    """The problems whose prompt leaves room for an answer; says how many were dropped.

    `limit`: tokens of a prompt, beside the model's context.
    """
    from thinktuning import student_prompt

    context = model.config.max_seq_len
    room = min(limit or context, context - max_tokens)
    lengths = [len(student_prompt(tokenizer, p.question)) for p in problems]
    kept = [p for p, length in zip(problems, lengths) if length <= room]
    if not kept:
        how = make_room(min(lengths), context, max_tokens, limit)
        raise ValueError(f"{source}: no question fits; {how}")
    if len(kept) < len(problems):
        dropped = len(problems) - len(kept)
        print(f"{source}: dropped {dropped} of {len(problems)} questions longer than {room} tokens")
    return kept


def make_room(shortest: int, context: int, max_tokens: int, limit: int | None) -> str:
    """What to do so that a prompt of `shortest` tokens fits the model and the limit."""
    told = f"the shortest prompt has {shortest} tokens and the model's context {context}"
    if shortest >= context:
        return f"{told}: give shorter questions, or a model with a longer context"
    flags = []
    if max_tokens > context - shortest:
        flags.append(f"lower --max-tokens to {context - shortest} or less")
    if limit and shortest > limit:
        flags.append(f"raise --max-prompt to {shortest} or more")
    return f"{told}: {' and '.join(flags)}"


def prepare_eval(args):
    from data import SPLITS, load_problems
    from data.grading import Grader
    from thinktuning import evaluate

    if args.split and args.data not in SPLITS:
        raise ValueError(f"--split is of {' and '.join(SPLITS)}, and a file is all one split: leave it out")
    grader = Grader(args.grader)
    model, tokenizer = load_model(args.model, *device_and_dtype(args))
    max_tokens = args.max_tokens or min(1024, model.config.max_seq_len // 2)
    problems = load_problems(args.data, args.split or "test")
    problems = fitting(problems, model, tokenizer, args.data, max_tokens)
    problems = problems[: args.count or None]
    temperature = args.temperature if args.temperature is not None else float(args.samples > 1)
    args.memory = "lower --rows or --max-tokens"

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
    context = model.config.max_seq_len
    room = context - len(student_prompt(tokenizer, args.question))
    if room < (args.max_tokens or 1):
        shorter = "shorten it" if room < 1 else f"shorten it, or lower --max-tokens to {room} or less"
        raise ValueError(f"the question leaves {max(0, room)} tokens of the model's context of {context}: {shorter}")
    args.memory = "lower --max-tokens" + " or --samples" * (args.samples > 1)
    options = {"max_tokens": args.max_tokens or min(1024, room), "seed": args.seed,
               "temperature": float(args.samples > 1) if args.temperature is None else args.temperature}
    if args.samples > 1:
        return lambda: hold_vote(model, tokenizer, args.question, samples=args.samples, **options)
    teacher = None
    if asks_teacher:
        theirs, their_tokenizer = load_model(args.teacher_model, *place) if args.teacher_model else (model, tokenizer)
        longest = theirs.config.max_seq_len
        reply = min(Config.teacher_reply, longest * 3 // 8)
        settings = Config(teacher_reply=reply, teacher_prompt=longest)
        teacher = make_teacher(theirs, their_tokenizer, settings)
    return lambda: think_aloud(model, tokenizer, args.question, teacher=teacher, **options)


def prepare_demo(args):
    from demo import prepare

    return prepare(args)


DESCRIPTION = """ThinkTuning from scratch (arXiv 2508.07616).

  python thinktuning.py                            the demonstration: base model, GRPO, ThinkTuning, side by side
  python thinktuning.py --preset mentor            the novelty test: a habit that the student hardly ever samples
  python thinktuning.py train --model DIR --data gsm8k   train a model directory on problems
  python thinktuning.py eval  --model DIR --data FILE    accuracy, mean@k, pass@k, maj@k, reflection
  python thinktuning.py ask   --model DIR "question"     watch it think
  python thinktuning.py report RUN [RUN ...]       the HTML page again, or across runs

Each of the four has flags of its own: python thinktuning.py train --help
"""


def prepare_report(args):
    from report import prepare

    return prepare(args)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        sys.exit(complain(f"{message} ({self.prog} --help lists every flag)", 2))


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags of the command that comes first, or else those of the demonstration.

    These are no subcommands of argparse's, which takes the 3 of `--frobnicate 3` for a command.
    """
    demo, commands = parsers()
    first = argv[0] if argv else "--"
    if first in commands:
        return commands[first].parse_args(argv[1:])
    known = ", ".join(commands)
    if not first.startswith("-"):
        demo.error(f"{first!r} is no command: give one of {known}, or none for the demonstration")
    for word, behind in zip(argv, argv[1:]):
        if behind in commands and word != "--out":  # the only flag of the demonstration with a free text
            demo.error(f"the command must come first: thinktuning.py {behind}, and then its flags")
    return demo.parse_args(argv)


def parsers() -> tuple[Parser, dict[str, Parser]]:
    """The demonstration's parser, and one for each command."""
    top = Parser(prog="thinktuning.py", description=DESCRIPTION,
                 formatter_class=argparse.RawDescriptionHelpFormatter)
    top.set_defaults(prepare=prepare_demo)
    add_demo_flags(top)
    commands: dict[str, Parser] = {}

    def command(name, about, **more) -> Parser:
        commands[name] = Parser(prog=f"thinktuning.py {name}", description=about, **more)
        return commands[name]

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", required=True, help="directory with config.json, model.safetensors and a tokenizer")
    common.add_argument("--device", default="auto", help="cpu, cuda, ... (cuda where there is one)")
    common.add_argument("--dtype", default="auto", choices=DTYPES,
                        help="of the weights in memory; training bfloat16 keeps a float32 master copy "
                        "(float32 on a cpu, else bfloat16)")

    common.add_argument("--compile", default="auto", choices=("auto", "off"),
                        help="auto: on a GPU, decoding steps are compiled into CUDA graphs (auto)")

    t = command("train", "Train a model directory on problems.", parents=[common])
    t.add_argument("--data", required=True, help="wordproblems, gsm8k, or a .jsonl file of questions and answers")
    t.add_argument("--eval-data", help="problems to evaluate on, likewise")
    t.add_argument("--teacher", help="another model directory for the teacher, of any family "
                   "(the student's initial weights)")
    t.add_argument("--out", help="run directory (out/METHOD-SEED)")
    t.add_argument("--resume", action="store_true",
                   help="go on from the run directory's newest checkpoint, if there is one; settings left out stay what "
                   f"they were, and only these may change: {', '.join(sorted(map(flag, MAY_CHANGE)))} (no fewer steps)")
    t.add_argument("--verbose", action="store_true", help="say how many decoding steps were recorded")
    t.add_argument("--preset", choices=("paper", "demo"), help="where the settings below start from (paper); "
                   "demo: what a model of the demonstration can take")
    for name, title in (("tensorboard", "TensorBoard"), ("wandb", "Weights & Biases")):
        t.add_argument(f"--{name}", dest="sinks", action="append_const", const=name, default=[],
                       help=f"the metrics to {title} as well (pip install {name})")
    t.set_defaults(prepare=prepare_train)
    add_config_flags(t)

    e = command("eval", "Accuracy, mean@k, pass@k, maj@k, reflection, with standard errors.", parents=[common])
    e.add_argument("--data", required=True, help="wordproblems, gsm8k, or a .jsonl file")
    e.add_argument("--split", help="of wordproblems or gsm8k (test)")
    e.add_argument("--count", type=natural, default=0, help="only the first so many problems; 0 is all")
    e.add_argument("--samples", type=positive, default=1, help="k, responses to each problem")
    e.add_argument("--temperature", type=from_zero, help="0 with one sample, else 1")
    e.add_argument("--rows", type=positive, default=256, help="responses sampled side by side (memory)")
    e.add_argument("--grader", default="auto", choices=("auto", "builtin", "math-verify"),
                   help="who compares answers (auto: math-verify where it is installed)")
    e.set_defaults(prepare=prepare_eval)

    a = command("ask", "Watch a model think.", parents=[common])
    a.add_argument("question")
    a.add_argument("--samples", type=positive, default=1, help="so many answers and their vote instead (1)")
    a.add_argument("--temperature", type=from_zero, help="0 is greedy (0 with one sample, else 1)")
    a.add_argument("--teacher", action="store_true", help="and what a teacher with the model's own weights says to "
                   "that attempt, up to any reflection on it")
    a.add_argument("--teacher-model", metavar="DIR", help="likewise a teacher with the weights in DIR")
    a.set_defaults(prepare=prepare_ask)

    r = command("report", "One HTML page of a run, or across runs.")
    r.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, or of a demonstration with its runs")
    r.add_argument("--out", help="file to write (report.html in RUN; of several runs, in the current directory)")
    r.set_defaults(prepare=prepare_report)
    for p in (e, a):
        p.add_argument("--max-tokens", type=positive, help="new tokens of a response (1024, or what the context leaves)")
        p.add_argument("--seed", type=natural, default=0)
    return top, commands


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
