"""The house as it is built: who may import whom, what stands on the first screen, how wide a line may be."""

import ast
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ORDER = (
    "data model sampler run grpo teacher show demo thinktuning tools".split()
)  # an import never points up
OURS = {"data", "run", "show", "demo", "tools"}


def files():
    """Every file of the program; tests may import what they like."""
    found = [
        *ROOT.glob("*.py"),
        *(file for folder in OURS for file in (ROOT / folder).glob("*.py")),
    ]
    return [
        file for file in found if not file.name.startswith("test_") and file.name != "conftest.py"
    ]


def module_of(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file) for file in files()}


def imports_of(file):
    """The modules of the program that a file imports, wherever in it that stands."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & MODULES or {node.module}
    return found & MODULES


def layer(module):
    return ORDER.index(module.partition(".")[0])


def test_every_file_has_a_place_in_the_order():
    assert {module.partition(".")[0] for module in MODULES} == set(ORDER)


def test_an_import_never_points_up():
    upwards = []
    for file in files():
        for imported in imports_of(file):
            if layer(imported) > layer(module_of(file)):
                upwards.append(f"{module_of(file)} imports {imported}")
    assert upwards == []


def test_nothing_imports_the_tools_and_only_they_import_the_loop():
    for file in files():
        if not module_of(file).startswith("tools"):
            assert not any(
                name.startswith("tools") or name == "thinktuning" for name in imports_of(file)
            ), file


def test_only_the_update_and_what_surrounds_a_run_know_of_several_processes():
    knowing = {module_of(file) for file in files() if "run.world" in imports_of(file)}
    assert {module for module in knowing if not module.startswith("run.")} == {
        "grpo",
        "thinktuning",
    }
    loop = (
        (ROOT / "thinktuning.py")
        .read_text(encoding="utf-8")
        .partition("\ndef train(")[2]
        .partition("\ndef ")[0]
    )
    assert "world." not in loop  # the loop hands it on and asks it nothing


def test_no_two_files_import_each_other_directly_or_in_a_circle():
    graph = {module_of(file): imports_of(file) for file in files()}
    finished = set()

    def visit(module, path):
        assert module not in path, " imports ".join([*path, module])
        if module not in finished:
            for imported in graph[module]:
                visit(imported, [*path, module])
            finished.add(module)

    for module in graph:
        visit(module, [])


def test_the_order_is_noticed(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "def f():\n    from data import reward\n    import run.config\nfrom data.reward import is_correct\nfrom data import load_problems"
    )
    assert imports_of(file) == {"data.reward", "run.config", "data"}


def test_the_first_screen_has_at_most_27_entries():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    entries = {name.partition("/")[0] for name in tracked.stdout.split()}
    assert len(entries) <= 27, sorted(entries)


def test_the_core_is_as_short_as_it_is_meant_to_be():
    limits = {"model": 420, "sampler": 320, "grpo": 440, "teacher": 280, "thinktuning": 420}
    for name, most in limits.items():
        assert len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= most, name
