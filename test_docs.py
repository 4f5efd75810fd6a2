"""The documents held against the program: links, line numbers, edits, and numbers.

    python test_docs.py      writes line numbers and computed tables anew, after the program has changed
"""

import ast
import json
import math
import re
import shutil
import statistics
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest
import torch

import grpo
import plan
from config import Config
from model import ModelConfig

ROOT = Path(__file__).resolve().parent
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
TABLE = re.compile(r"(<!-- computed: (\w+) -->\n).*?(?=<!-- end -->)", re.S)
LLAMA_3B = ModelConfig(128256, 3072, 28, 24, 8, 128, 8192, rope_theta=500000.0, max_seq_len=131072, tie_embeddings=True)


def documents(root):
    return [root / "README.md", *sorted((root / "docs").glob("*.md")), *sorted((root / "exercises").glob("*.md"))]


# ------------------------------------------------------------------ links


def symbols(file):
    return symbols_of(file.read_text())


@cache
def symbols_of(source):
    """{name: line} of a file's functions, classes, methods (`Teacher.feedback`) and top-level assignments."""
    found = {}

    def visit(body, prefix):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[prefix + node.name] = node.lineno
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        found[prefix + target.id] = node.lineno

    visit(ast.parse(source).body, "")
    return found


def where(root, document, text, target):
    """What a link to a line should be, (text, target): [`grpo.update`](../grpo.py#L210); None for any other link.

    A symbol that has moved is looked for in the other files beside it. Raises ValueError where there is none, or several.
    """
    path, _, line = target.partition("#")
    if not re.fullmatch(r"L\d+", line):
        return None
    file = (document.parent / path).resolve()
    module = ".".join(file.relative_to(root).with_suffix("").parts)
    name = text.strip("`").removeprefix(module + ".")
    if file.exists() and name in symbols(file):
        return f"`{module}.{name}`", f"{path}#L{symbols(file)[name]}"
    name = re.sub(r"^([a-z_]+\.)+", "", text.strip("`"))
    homes = [f for f in sorted(file.parent.glob("*.py")) if name in symbols(f) and not f.name.startswith("test_")]
    if len(homes) != 1:
        raise ValueError(f"{document.name}: {text} is in {', '.join(f.name for f in homes) or 'no file'} beside {path}")
    moved = ".".join(homes[0].relative_to(root).with_suffix("").parts)
    return f"`{moved}.{name}`", f"{path.rpartition('/')[0]}/{homes[0].name}#L{symbols(homes[0])[name]}"


def links(document):
    return [(text, target) for text, target in LINK.findall(FENCE.sub("", document.read_text()))
            if not re.match(r"[a-z]+:", target)]


def headings(document):
    """The anchors of a document's headings, as code hosts make them."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", document.read_text()), re.M)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def complaints(root):
    """Every link of the documents that leads nowhere, or to another line than it says."""
    wrong = []
    for document in documents(root):
        for text, target in links(document):
            path, _, anchor = target.partition("#")
            file = document.parent / path if path else document
            if not file.exists():
                wrong.append(f"{document.name}: [{text}]({target}): there is no such file")
            elif file.suffix == ".md" and anchor and anchor not in headings(file):
                wrong.append(f"{document.name}: [{text}]({target}): there is no such heading")
            elif (right := where(root, document, text, target)) and right != (text, target):
                wrong.append(f"{document.name}: [{text}]({target}) should be [{right[0]}]({right[1]}): run python test_docs.py")
    return wrong


def refresh(root):
    """Rewrite the links' line numbers (and files, of symbols that moved) and the computed tables; returns the files changed."""
    changed = []
    for document in documents(root):
        def link(match, document=document):
            if re.match(r"[a-z]+:", match[2]) or not (right := where(root, document, match[1], match[2])):
                return match[0]
            return f"[{right[0]}]({right[1]})"

        before = document.read_text()
        after = TABLE.sub(lambda m: f"{m[1]}\n{TABLES[m[2]]()}\n", LINK.sub(link, before))
        if after != before:
            document.write_text(after)
            changed.append(document.name)
    return changed


def test_every_link_leads_where_it_says():
    assert complaints(ROOT) == []


def test_the_reading_guide_links_most_of_what_it_explains():
    lines = [target for text, target in links(ROOT / "docs" / "reading.md") if "#L" in target]
    for file in ("thinktuning.py", "grpo.py", "teacher.py"):
        assert sum(file in target for target in lines) >= 5


@pytest.fixture
def copy(tmp_path):
    for pattern in ("*.py", "*.md", "LICENSE", "data/*.py", "docs/*.md", "exercises/*", "results/*"):
        for file in filter(Path.is_file, ROOT.glob(pattern)):
            (tmp_path / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / file.relative_to(ROOT))
    return tmp_path


def test_lines_that_shift_are_found_and_written_anew(copy):
    texts = [d.read_text() for d in documents(copy)]
    (copy / "grpo.py").write_text("# one\n# more\n" + (copy / "grpo.py").read_text())
    assert any("grpo.py#L" in line for line in complaints(copy))
    assert "reading.md" in refresh(copy)
    assert complaints(copy) == []
    without_lines = [[re.sub(r"#L\d+", "", t) for t in ts] for ts in (texts, [d.read_text() for d in documents(copy)])]
    assert without_lines[0] == without_lines[1]
    assert refresh(copy) == []


def test_a_function_that_moved_is_found_in_its_new_file(copy):
    (copy / "elsewhere.py").write_text("\n\n" + (copy / "grpo.py").read_text())
    (copy / "grpo.py").unlink()
    assert any("no such file" in line for line in complaints(copy))
    refresh(copy)
    assert complaints(copy) == []
    assert "[`elsewhere.group_advantages`](../elsewhere.py#L" in (copy / "docs" / "reading.md").read_text()


def test_files_and_headings_that_are_not_there_are_found(copy):
    page = copy / "docs" / "memory.md"
    page.write_text(page.read_text() + "[a](nowhere.md) [b](reading.md#5-reward) [c](reading.md#nowhere) [d](https://nowhere.example)\n")
    assert [line.partition("[")[2][0] for line in complaints(copy)] == ["a", "c"]


def test_a_function_that_is_gone_is_named(copy):
    (copy / "grpo.py").write_text((copy / "grpo.py").read_text().replace("def shaped_ratio(", "def another_name("))
    with pytest.raises(ValueError, match="`grpo.shaped_ratio` is in no file"):
        refresh(copy)


# ------------------------------------------------------------------ the edits of docs/reading.md


def edits():
    """(file, old lines, new lines) of every `diff` block of the reading guide; its first line names the file."""
    for block in re.findall(r"^```diff\n(.*?)^```$", (ROOT / "docs" / "reading.md").read_text(), re.M | re.S):
        name, *lines = block.splitlines()
        old, new = ([line[2:] for line in lines if line.startswith(sign)] for sign in "-+")
        yield name, "\n".join(old), "\n".join(new)


@pytest.mark.parametrize("file, old, new", [pytest.param(*e, id=f"{i}-{e[0]}") for i, e in enumerate(edits())])
def test_every_edit_can_be_made(file, old, new):
    source = (ROOT / file).read_text()
    assert source.count(old + "\n") == 1, f"{file} does not hold once: {old}"
    ast.parse(source.replace(old, new))


def test_what_the_edits_did_is_what_was_measured():
    measured = json.loads((ROOT / "results" / "try-this.json").read_text())
    assert len(measured) == len(list(edits())) + 1  # and the run without any
    text = (ROOT / "docs" / "reading.md").read_text()
    for name, run in measured.items():
        cells = [f"{run[m][key]:.3f}" for key in ("accuracy", "reflection_rate") for m in ("grpo", "thinktuning")]
        half = run["thinktuning"]["step_at_which_half_of_the_samples_reflect"]
        assert f"| {name} | {' | '.join(cells)} | {'–' if half is None else half} |" in text


# ------------------------------------------------------------------ computed tables


def row(*cells):
    return "| " + " | ".join(cells) + " |\n"


def number(x):
    return f"{x:.4g}".replace("-", "−") if abs(x) >= 1e-12 else "0"


def head(*cells):
    return row(*cells) + row(*["---"] * len(cells))


def pull(pi, advantage, rho=1.0, shaping="aas"):
    """−∂ℓ/∂log π of one guided token, by the program's own loss: how hard and which way its log-probability is pushed."""
    logp = torch.tensor([[math.log(pi)]], dtype=torch.float64, requires_grad=True)
    ones = torch.ones(1, 1)
    losses, _ = grpo.token_losses(logp, logp.detach() - math.log(rho), advantage * ones.double(), ones, ones, shaping=shaping)
    losses.sum().backward()
    return -logp.grad.item()


POINTS = [(pi, a) for a in (2.0, -2.0) for pi in (1e-4, 0.01, 0.5)]


def table_weights():
    text = head("π", "Â", "γ(Â)", "π + γ", "w", "pull: AAS", "pull: ρ, fresh", "pull: π/π_T, π_T = 1")
    for pi, a in POINTS:
        tensors = torch.tensor([[math.log(pi)]], dtype=torch.float64), torch.tensor([[a]], dtype=torch.float64)
        gamma = grpo.shaping_coefficient(tensors[1]).item()
        text += row(*map(number, (pi, a, gamma, pi + gamma, grpo.shaped_ratio(*tensors).item(), pull(pi, a),
                                  pull(pi, a, shaping="ratio"), a * pi)))
    return text


def table_stale():
    rhos = (0.5, 1.0, 1.5, 4.0)
    text = head("π", "Â", *(f"pull by ρ = {rho:g}" for rho in rhos), "pull by AAS, any ρ")
    for pi, a in POINTS[1:3] + POINTS[4:]:
        text += row(number(pi), number(a), *(number(pull(pi, a, rho, "ratio")) for rho in rhos), number(pull(pi, a, 1.5)))
    return text


def table_groups():
    text = head("right of 8", "mean r", "std r", "Â of a right one", "Â of a wrong one")
    for right in (0, 1, 2, 4, 7, 8):
        rewards = torch.tensor([[1.0] * right + [0.0] * (8 - right)])
        a = grpo.group_advantages(rewards)[0].tolist()
        text += row(str(right), number(rewards.mean().item()), number(rewards.std().item()), number(a[0]) if right else "–",
                    number(a[-1]) if right < 8 else "–")
    return text


SETTINGS = {"rows 128, micro-batch 16,384, blocks kept": dict(micro_batch=16384, recompute=False),
            "the same, computed again": dict(micro_batch=16384),
            "rows 16, micro-batch 2,048, computed again": dict(micro_batch=2048, rows=16)}


SIZES = plan.Sizes(LLAMA_3B, LLAMA_3B, torch.bfloat16, device="cuda")


def memory(**settings):
    return plan.memory(Config(**settings), SIZES)


def table_memory():
    columns = [memory(**s) for s in SETTINGS.values()]
    text = head("GiB", *SETTINGS)
    for key in columns[0]:
        text += row(key, *(f"{c[key] / plan.GIB:.1f}" for c in columns))
    return text + row("**at the peak**", *(f"**{plan.peak(c) / plan.GIB:.1f}**" for c in columns))


def refusal():
    with pytest.raises(ValueError) as error:
        plan.fit(Config(), SIZES, "cuda", 80 * plan.GIB)
    return textwrap.fill(f"error: {error.value}", 120, initial_indent="    ", subsequent_indent="    ") + "\n"


TABLES = {"weights": table_weights, "stale": table_stale, "groups": table_groups, "memory": table_memory, "refusal": refusal}


def test_every_computed_table_is_what_the_program_computes():
    found = [(d.name, m[2], m[0]) for d in documents(ROOT) for m in TABLE.finditer(d.read_text())]
    assert sorted(name for _, name, _ in found) == sorted(TABLES)
    for document, name, text in found:
        assert text.endswith(f"-->\n\n{TABLES[name]()}\n"), f"{document}: the table '{name}' is old: run python test_docs.py"


def test_a_wrong_number_in_a_table_is_written_anew(copy):
    page = copy / "docs" / "off-policy.md"
    right = page.read_text()
    page.write_text(right.replace("0.1667", "0.7661"))
    assert page.read_text() != right
    assert refresh(copy) == ["off-policy.md"] and page.read_text() == right


# ------------------------------------------------------------------ numbers in sentences


def missing(document, *sentences):
    text = " ".join((ROOT / "docs" / document).read_text().split())
    return [s for s in sentences if s not in text]


def test_numbers_of_the_page_on_weights():
    top = {G: (G - 1) / math.sqrt(G) for G in range(2, 99)}  # Â of the one right answer of G
    gamma = 0.001 * top[8] / 4
    seen = json.loads((ROOT / "results" / "try-this.json").read_text())["no edit"]
    assert not missing(
        "off-policy.md",
        f"π = 1e-4 is {1e-4 / (1e-4 + 0.0005):.3f}", f"π = 1e-7 it is {1e-7 / (1e-7 + 0.0005):.4f}",
        f"{top[5]:.2f} with G = 5 and {top[8]:.2f} with G = 8", f"from G = {min(G for G in top if top[G] >= 4)} on",
        f"these are {seen['teacher_tokens_below_0.01']} of {seen['teacher_tokens']:,} tokens",
        f"γ stays below {gamma:.2g}", f"w is {0.00101 / (0.00101 - 0.001):.0f} at π = 0.00101")


def test_numbers_of_the_page_on_grpo():
    rewards = [1.0] + [0.0] * 7
    right, wrong = ((r - statistics.fmean(rewards)) / statistics.stdev(rewards) for r in (1, 0))
    assert not missing("grpo.md", f"the right one gets {right:.2f} and each wrong one −{-wrong:.2f}")


def test_numbers_of_the_page_on_memory():
    n, gib = 3_212_749_824, 1 << 30
    cached = 2 * 28 * 8 * 128 * 2  # bytes a position: keys and values, layers, heads, head size, bfloat16
    assert plan.parameters(LLAMA_3B) == n
    assert memory(max_tokens=1025, micro_batch=16384)["sampling"] - memory(micro_batch=16384)["sampling"] == 128 * cached
    assert not missing(
        "memory.md", f"{n:,} parameters",
        f"| weights, bfloat16 | 2 | {2 * n / gib:.1f} |", f"| master copy, float32 | 4 | {4 * n / gib:.1f} |",
        f"| two moments, float32 | 8 | {8 * n / gib:.1f} |", f"| gradient, float32 | 4 | {4 * n / gib:.1f} |",
        f"= {cached:,} bytes", f"128 rows of 512 + 1024 positions take {128 * 1536 * cached / gib:.1f} GiB",
        f"12 · 128,256 = {12 * 128256:,} bytes", f"16,384 tokens {12 * 128256 * 16384 / gib:.1f} GiB")


if __name__ == "__main__":
    print("written anew:", ", ".join(refresh(ROOT)) or "nothing")
    if wrong := complaints(ROOT):
        sys.exit("\n".join(wrong))
