"""Grade what participants hand in: one point for each gap that is filled rightly.

    python exercises/grade.py FILE …

A FILE is a file that has an exercise's name (1_group_advantages.py), a person's folder with such
files, or a folder with one folder for each person. README.md says how the program guards itself
against what it runs, and against what it does not.
"""

import argparse
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from remote import EXERCISES, Submission, printable  # noqa: E402

from run.cli import Parser  # noqa: E402
from run.errors import run_command  # noqa: E402


def arguments(argv):
    parser = Parser(
        prog="grade.py",
        description=__doc__.partition("\n\n    ")[0],
        epilog="Exit status: 0 if all was graded, however well it was done; 2 for bad usage.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a file or a folder")
    parser.add_argument("--seed", type=int, help="of the inputs (default: a new one, printed)")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="for one gap, loading included (default: 30)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the grades here as JSON")
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace):
    """Find what is to be graded. Raises ValueError for what cannot be."""
    if not 0 < args.seconds < 1e6:
        raise ValueError(f"--seconds must be above 0, not {args.seconds:g}")
    if args.out and not args.out.absolute().parent.is_dir():
        raise ValueError(f"--out: there is no folder {args.out.absolute().parent}; make it first")
    if args.out and args.out.is_dir():
        raise ValueError(f"--out: {args.out} is a folder; name a file in it")
    people, others = find(args.files)
    seed = random.SystemRandom().randrange(1 << 31) if args.seed is None else args.seed

    def job():
        print(f"seed {seed}")
        if others:
            print("not graded, because it has no exercise's name:", ", ".join(others))
        grades = {name: graded(name, files, seed, args.seconds) for name, files in people.items()}
        print_table(grades)
        if args.out:
            record = {"seed": seed, "seconds": args.seconds, "people": grades, "ungraded": others}
            args.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    return job


def find(paths):
    """{person: {exercise: file}}, a person has the folder's name; and what has another name."""
    found, others = {}, []  # folder: exercise: file
    for path in paths:
        files = [path]
        if path.is_dir():
            inside = [p for p in sorted(path.iterdir()) if p.is_dir() and p.name[0] not in "._"]
            files = [f for folder in (path, *inside) for f in sorted(folder.glob("*.py"))]
            others += [str(f) for f in files if f.stem not in EXERCISES]
            others += [str(folder) for folder in inside if not any(folder.glob("*.py"))]
            files = [f for f in files if f.stem in EXERCISES]
        elif not path.exists():
            raise ValueError(f"{path}: there is no such file or folder")
        if not files or not all(f.is_file() and f.stem in EXERCISES for f in files):
            raise ValueError(f"{path}: a file needs an exercise's name, such as {EXERCISES[0]}.py")
        for file in files:
            file = file.absolute()
            found.setdefault(file.parent, {})[file.stem] = file
    names = [folder.name for folder in found]
    people = {}
    for folder, files in sorted(found.items()):
        name = folder.name if names.count(folder.name) == 1 else folder
        people[printable(name)] = {e: files[e] for e in EXERCISES if e in files}
    return people, [printable(other) for other in others]


def graded(person, files, seed, seconds):
    """Grade a person's files, and print what came of each."""
    print(f"\n{person}")
    exercises = {stem: grade(file, seed, seconds) for stem, file in files.items()}
    return {"points": sum(e["points"] for e in exercises.values()), "exercises": exercises}


def grade(file, seed, seconds):
    """The points of a file, and what is wrong with each of its functions (None: nothing)."""
    from checks import GAPS, verdict  # imports torch

    gaps, messages = [gap for gap in GAPS if gap.exercise == file.stem], {}
    width = max(map(len, EXERCISES))
    for gap in gaps:
        # A process for each gap, so that one that fails takes no points from the other.
        with Submission(file, seconds) as submission:
            message = verdict(gap, submission.call, seed)
        messages[gap.name] = None if message is None else printable(message)
        line = f"+ {gap.name} right" if message is None else f"- {gap.name} {messages[gap.name]}"
        print(f"  {file.stem:{width}} {line}", flush=True)
    points = sum(message is None for message in messages.values())
    return {"points": points, "of": len(gaps), "functions": messages}


def print_table(grades):
    """Points by person and exercise; a dash where nothing was handed in."""
    from checks import GAPS

    width = max(map(len, grades))
    numbers = [exercise.split("_")[0] for exercise in EXERCISES]
    print(f"\n{'':{width}}  {' '.join(f'{n:>2}' for n in numbers)}  points")
    for person, grade in grades.items():
        points = [grade["exercises"].get(e, {}).get("points", "–") for e in EXERCISES]
        cells = " ".join(f"{p:>2}" for p in points)
        print(f"{person:{width}}  {cells}  {grade['points']} of {len(GAPS)}")


def main(argv=None):
    return run_command(prepare, arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
