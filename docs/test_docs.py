"""Compare the pages with the program: links, edits, computed tables and numbers.

`PYTHONPATH=. python docs/test_docs.py` writes the computed tables again.
"""

import ast
import json
import math
import re
import statistics
import textwrap
from pathlib import Path

import pytest
import torch

import grpo
from data.scores import mean_and_se
from data.wordproblems import stories
from run.config import Config
from show import plan
from show.diagrams import LLAMA_3B, RUNS, SIZES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "exercises").glob("*.md")),
]
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


# ------------------------------------------------------------------ links


def names(node):
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id]
    return [getattr(node, "name", None)]  # a function or a class


def defines(file, name):
    """Whether a file has a function, class, constant or method (`Teacher.feedback`) at its top."""
    nodes = ast.parse(file.read_text()).body
    for part in name.split("."):
        found = [node for node in nodes if part in names(node)]
        if not found:
            return False
        nodes = getattr(found[0], "body", [])
    return True


def headings(page):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.M)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def complaint(page, text, target):
    """What is wrong with a link of a page, or None.

    The text of a link to a function is `module.function`, its target the module's file.
    """
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.exists():
        return "there is no such file"
    if anchor and file.suffix == ".md" and anchor not in headings(file):
        return "there is no such heading"
    if anchor and file.suffix == ".py":
        return "name the function, not the line"
    if file.suffix != ".py" or not re.fullmatch(r"`[\w.]+`", text) or text.endswith(".py`"):
        return None
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    name = text.strip("`")
    if name != module and not defines(file, name.removeprefix(module + ".")):
        return "there is no such name in the file"
    return None


def complaints(page, text):
    links = LINK.findall(FENCE.sub("", text))
    inside = [(t, target) for t, target in links if not re.match(r"[a-z]+:", target)]
    found = [(f"[{t}]({target})", complaint(page, t, target)) for t, target in inside]
    return [f"{page.name}: {link}: {wrong}" for link, wrong in found if wrong]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_where_it_says(page):
    assert complaints(page, page.read_text()) == []


def test_wrong_links_are_found_and_right_ones_are_not():
    page = ROOT / "docs" / "memory.md"
    for right in ("[a](reading.md#6-reward)", "[a](https://nowhere.example)", "[a](../grpo.py)"):
        assert complaints(page, right) == []
    for right in ("[`grpo.update`](../grpo.py)", "[`teacher.Teacher.feedback`](../teacher.py)"):
        assert complaints(page, right) == []
    assert complaints(page, "[`data.load_problems`](../data/__init__.py)") == []
    for wrong in ("[a](nowhere.md)", "[a](reading.md#nowhere)", "[a](../grpo.py#L10)"):
        assert len(complaints(page, wrong)) == 1
    for wrong in ("nowhere", "grpo.nowhere", "teacher.update", "Rollout.nowhere"):
        assert len(complaints(page, f"[`{wrong}`](../grpo.py)")) == 1


def test_the_reading_guide_links_what_it_explains():
    text = (ROOT / "docs" / "reading.md").read_text()
    for file in ("thinktuning.py", "grpo.py", "teacher.py"):
        functions = {text for text, target in LINK.findall(text) if target == f"../{file}"}
        assert len(functions) >= 4, file


# ------------------------------------------------------------------ the edits of docs/reading.md


def edits():
    """(file, old lines, new lines) of every `diff` block; its first line names the file."""
    text = (ROOT / "docs" / "reading.md").read_text()
    for block in re.findall(r"^```diff\n(.*?)^```$", text, re.M | re.S):
        file, *lines = block.splitlines()
        old = "\n".join(line[1:] for line in lines if line.startswith("-"))
        new = "\n".join(line[1:] for line in lines if line.startswith("+"))
        yield file, old, new


@pytest.mark.parametrize("file, old, new", list(edits()))
def test_every_edit_can_be_made(file, old, new):
    source = (ROOT / file).read_text()
    assert source.count(old + "\n") == 1, f"{file} must have this once: {old}"
    ast.parse(source.replace(old, new))


def test_what_the_edits_did_is_what_was_measured():
    measured = json.loads((ROOT / "results" / "try-this.json").read_text())
    text = (ROOT / "docs" / "reading.md").read_text()
    numbers = re.findall(r"\*Try this \(edit (\d+)\)", text)
    said = dict(zip(numbers, text.split("*Try this (edit ")[1:]))
    for name, run in measured.items():
        ours = run["thinktuning"]
        shares = [run["grpo"]["accuracy"], ours["accuracy"]]
        shares += [ours[f"reflection_rate_first_{which}"] for which in ("wrong", "right")]
        shares.append(ours["names_line"])
        cells = [name, *("–" if share is None else f"{share:.3f}" for share in shares)]
        cells.append("–" if run["take_off"] is None else str(run["take_off"]))
        assert "| " + " | ".join(cells) + " |" in text, name
        number = name.split()[0]
        assert name == "no edit" or f"{ours['accuracy']:.3f}" in said.pop(number), name
    for part in said.values():  # the rest claims no numbers
        assert "have not measured this edit on the present problems" in " ".join(part.split())


def test_the_settings_in_the_table_of_symbols():
    text = (ROOT / "docs" / "symbols.md").read_text()
    settings = re.findall(r"`(\w+)` = (-?[\d.]+)", text)
    assert len(settings) >= 10
    for name, value in settings:
        assert str(getattr(Config(), name)) == value, name


# ------------------------------------------------------------------ computed tables


def row(*cells):
    return "| " + " | ".join(cells) + " |\n"


def head(*cells):
    return row(*cells) + row(*["---"] * len(cells))


def number(x):
    return f"{x:.4g}".replace("-", "−") if abs(x) >= 1e-12 else "0"


def pull(pi, advantage, rho=1.0, shaping="aas"):
    """−∂ℓ/∂log π of one guided token, by the program's own loss."""
    logp = torch.tensor([[math.log(pi)]], dtype=torch.float64, requires_grad=True)
    old = logp.detach() - math.log(rho)
    here = torch.ones(1, 1)
    advantages = torch.full((1, 1), advantage, dtype=torch.float64)
    loss, _ = grpo.policy_loss(logp, old, advantages, mask=here, guided=here, shaping=shaping)
    loss.backward()
    return -logp.grad.item()


POINTS = [(pi, a) for a in (2.0, -2.0) for pi in (1e-4, 0.01, 0.5)]


def table_weights():
    weights = ("γ(Â)", "π + γ", "w", "pull: AAS", "pull: ρ, fresh", "pull: π/π_T, π_T = 1")
    text = head("π", "Â", *weights)
    for pi, a in POINTS:
        logp = torch.tensor([[math.log(pi)]], dtype=torch.float64)
        advantages = torch.tensor([[a]], dtype=torch.float64)
        gamma = grpo.shaping_coefficient(advantages).item()
        w = grpo.shaped_ratio(logp, advantages).item()
        pulls = (pull(pi, a), pull(pi, a, shaping="ratio"), a * pi)
        text += row(*map(number, (pi, a, gamma, pi + gamma, w, *pulls)))
    return text


def table_stale():
    rhos = (0.5, 1.0, 1.5, 4.0)
    text = head("π", "Â", *(f"pull by ρ = {rho:g}" for rho in rhos), "pull by AAS, any ρ")
    for pi, a in POINTS[1:3] + POINTS[4:]:
        pulls = [pull(pi, a, rho, "ratio") for rho in rhos]
        text += row(*map(number, (pi, a, *pulls, pull(pi, a, 1.5))))
    return text


def group(right, size):
    """The rewards of a group, right ones first, and their advantages: (G,) each."""
    rewards = torch.tensor([1.0] * right + [0.0] * (size - right), dtype=torch.float64)
    return rewards, grpo.group_advantages(rewards[None])[0]


def table_groups():
    text = head("right of 8", "mean r", "std r", "Â of a right one", "Â of a wrong one")
    for right in (0, 1, 2, 4, 7, 8):
        rewards, a = group(right, 8)
        of_right = number(a[0].item()) if right > 0 else "–"
        of_wrong = number(a[-1].item()) if right < 8 else "–"
        mean, std = rewards.mean().item(), rewards.std().item()
        text += row(str(right), number(mean), number(std), of_right, of_wrong)
    return text


def expected_factor(p, size):
    """x in E[mean over the group of Â·∇log π(o)] = x·∇p, over all groups of a question.

    For p = 1/(1 + e^−θ) a right response has ∂log π/∂θ = 1 − p and a wrong one −p, and
    ∂p/∂θ = p(1 − p).
    """
    step = 0.0
    for right in range(size + 1):
        rewards, advantages = group(right, size)
        chance = math.comb(size, right) * p**right * (1 - p) ** (size - right)
        step += chance * (advantages * (rewards - p)).mean().item()
    return step / (p * (1 - p))


def table_std():
    text = head("p", "G = 8", "G = 64", "large G: 1/√(p(1−p))")
    for p in (0.01, 0.1, 0.5, 0.9, 0.99):
        factors = (expected_factor(p, 8), expected_factor(p, 64), 1 / math.sqrt(p * (1 - p)))
        text += row(f"{p:g}", *(f"{x:.2f}" for x in factors))
    return text


def table_means():
    """What each mean makes of a guided rollout of 75 tokens among seven of 35."""
    _, a = group(1, 8)
    lengths = torch.tensor([75] + [35] * 7)
    mask = torch.arange(75) < lengths[:, None]
    text = head("mean", "weight of its tokens", "of the others' tokens", "its share", "balance")
    for name, kind in (
        ("token", "token"),
        ("response", "response"),
        ("constant, L = 140", "constant"),
    ):
        losses = torch.zeros(8, 75, dtype=torch.float64, requires_grad=True)
        settings = grpo.LossSettings(loss_mean=kind, max_tokens=140)
        grpo.mean_loss(losses, mask, int(mask.sum()), 8, settings).backward()
        weights = losses.grad * mask  # of each token in the mean
        pulls = weights.sum(1) * a
        share = pulls[0].abs() / pulls.abs().sum()
        cells = (weights[0, 0].item(), weights[1, 0].item(), 100 * pulls.sum().item())
        text += row(name, f"{cells[0]:.5f}", f"{cells[1]:.5f}", f"{share:.0%}", f"{cells[2]:.1f}")
    return text


SHOWN = {
    "accuracy": "accuracy",
    "reflects when wrong": "reflection_rate_first_wrong",
    "when right": "reflection_rate_first_right",
    "names the line": "names_line",  # None where none reflects
}


def table_ablation(which):
    text = head("variant", *SHOWN, "take-off")
    for name, runs in result(f"ablate-{which}").items():
        columns = [[run[key] for run in runs] for key in SHOWN.values()]
        cells = [
            "–" if None in values else "{:.3f} ± {:.3f}".format(*mean_and_se(values))
            for values in columns
        ]
        steps = ["–" if run["take_off"] is None else str(run["take_off"]) for run in runs]
        text += row(name, *cells, ", ".join(steps))
    return text


def table_forced():
    """Each cell: after the base model's wrong attempts, after its right ones."""
    found = result("probe-seed0")["forced"]
    text = head("who goes on, behind what", "names a line", "answers again", "right in the end")
    for name in found["wrong"]:
        rows = [found[which][name] for which in ("wrong", "right")]
        named = [
            sum(share for key, share in one.items() if key.startswith("names")) for one in rows
        ]
        columns = named, [one["reflects"] for one in rows], [one["accuracy"] for one in rows]
        text += row(name, *("{:.3f}, {:.3f}".format(*column) for column in columns))
    return text


def table_narrator():
    text = head(
        "base model and training", "accuracy", "of the first answer", *list(SHOWN)[1:3], "take-off"
    )
    for name, (run,) in result("ablate-narrator-seed0").items():
        keys = ("accuracy", "first_answer_accuracy", *list(SHOWN.values())[1:3])
        take_off = "–" if run["take_off"] is None else str(run["take_off"])
        text += row(name, *(f"{run[key]:.3f}" for key in keys), take_off)
    return text


SECOND = {  # the models of SmolLM2's second student
    "student": "student",
    "GRPO": "grpo",
    "ThinkTuning": "thinktuning",
    "with −Â·log π from step 11": "likelihood_from_step_11",
}


def table_second():
    found = [result("smollm2-second")[key] for key in SECOND.values()]
    titles = [f"{name}, {one['steps']} steps" for name, one in zip(SECOND, found) if "steps" in one]
    text = head("", "student", *titles)
    scores = [one.get("scores", one) for one in found]
    all_, friend, plain = (
        [score[key] for score in scores]
        for key in ("greedy", "greedy, with a friend", "greedy, without")
    )
    text += row("stories", *(str(one["responses"]) for one in all_))
    cells = [f"{one['accuracy']:.3f} ± {one['accuracy_se']:.3f}" for one in all_]
    text += row("accuracy ± standard error", *cells)
    text += row("with a friend", *(f"{one['accuracy']:.3f}" for one in friend))
    text += row("without one", *(f"{one['accuracy']:.3f}" for one in plain))
    for name, key in (
        ("accuracy of the first answer", "first_answer_accuracy"),
        ("goes on after a wrong answer", "goes_on_wrong"),
        ("goes on after a right one", "goes_on_right"),
        ("reflects (a second box) when wrong", "reflection_rate_first_wrong"),
        ("reflects when right", "reflection_rate_first_right"),
    ):
        text += row(name, *(f"{one[key]:.3f}" for one in all_))
    flips = [f"{one['wrong_to_right']}, {one['right_to_wrong']}" for one in all_]
    text += row("wrong → right, right → wrong", *flips)
    named = [one.get("names_day") for one in all_]
    text += row(
        "of its reflections on wrong answers, name the wrong day",
        *("–" if n is None else f"{n:.3f}" for n in named),
    )
    for kind, share in (("misconception", "mended"), ("right", "right in the end")):
        cells = [f"{one[f'planted, {kind}']['accuracy']:.3f}" for one in scores]
        text += row(f"planted attempts, {kind}: {share}", *cells)
    return text


WORDS = "Wait", "look", "the day", "belong"
SPANS = (0, 5), (5, 10), (11, 13), (13, 15), (15, 17), (17, 19), (19, 21), (21, 24)


def table_words():
    """Mean π of guided words; of two numbers the first is AAS's."""
    runs = [result("smollm2-second")[key]["pi_of_words"] for key in list(SECOND.values())[2:]]
    text = head("steps", *(f"“{word}”" if word != "the day" else word for word in WORDS))
    for first, end in SPANS:
        cells = []
        for word in WORDS:
            seen = [[r[word] for r in run if first <= r["step"] < end] for run in runs]
            means = [f"{sum(pis) / len(pis):.4f}" if pis else "–" for pis in seen]
            cells.append(", ".join(means) if first > 10 else means[0])
        text += row(f"{first}–{end - 1}", *cells)
    return text


def memory(**settings):
    return plan.memory(Config(**settings), SIZES)


def table_memory():
    columns = [plan.memory(config, SIZES) for config in RUNS.values()]
    text = head("GiB", *RUNS)
    for key in columns[0]:
        text += row(key, *(f"{c[key] / plan.GIB:.1f}" for c in columns))
    return text + row("**at the peak**", *(f"**{plan.peak(c) / plan.GIB:.1f}**" for c in columns))


def refusal():
    with pytest.raises(ValueError) as error:
        plan.fit(Config(), SIZES, "cuda", 80 * plan.GIB)
    lines = textwrap.wrap(f"error: {error.value}", 96)
    return "".join(f"    {line}\n" for line in lines)


TABLES = {
    "weights": table_weights,
    "stale": table_stale,
    "groups": table_groups,
    "std": table_std,
    "means": table_means,
    "variants": lambda: table_ablation("grpo"),
    "ablations": lambda: table_ablation("all"),
    "forced": table_forced,
    "narrator": table_narrator,
    "second": table_second,
    "words": table_words,
    "memory": table_memory,
    "refusal": refusal,
}
TABLE = re.compile(r"(<!-- computed: (\w+) -->\n).*?(?=<!-- end -->)", re.S)


def computed(text):
    """A page's text with its tables computed again."""
    return TABLE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n", text)


def test_every_computed_table_is_what_the_program_computes():
    texts = [page.read_text() for page in PAGES]
    found = [match[2] for text in texts for match in TABLE.finditer(text)]
    assert sorted(found) == sorted(TABLES)
    for text in texts:
        assert text == computed(text), "run PYTHONPATH=. python docs/test_docs.py"


def test_the_std_makes_the_step_the_gradient_of_an_arcsine():
    for p in (0.2, 0.5, 0.9):
        ascent = 2 * math.asin(math.sqrt(p + 1e-6)) - 2 * math.asin(math.sqrt(p - 1e-6))
        slope = ascent / 2e-6
        assert slope == pytest.approx(1 / math.sqrt(p * (1 - p)), rel=1e-6)
        assert expected_factor(p, 300) == pytest.approx(slope, rel=0.01)


# ------------------------------------------------------------------ numbers in sentences


def missing(page, *sentences):
    text = " ".join((ROOT / "docs" / page).read_text().split())
    return [sentence for sentence in sentences if sentence not in text]


def result(name):
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


TOP = {G: (G - 1) / math.sqrt(G) for G in range(2, 99)}  # Â of the only right answer of G


def test_numbers_of_the_page_on_weights():
    gamma = 0.001 * TOP[8] / 4
    seen = result("try-this")["no edit"]
    assert not missing(
        "off-policy.md",
        f"w is {1e-4 / (1e-4 + 0.0005):.3f}. At π = 1e-7 it is {1e-7 / (1e-7 + 0.0005):.4f}",
        f"{TOP[5]:.2f} with G = 5 and {TOP[8]:.2f} with G = 8",
        f"from G = {min(G for G in TOP if TOP[G] >= 4)} on",
        f"between −{gamma:.2g} and {gamma:.2g}",
        f"between {0.01 / (0.01 + gamma):.3f} (at Â = {TOP[8]:.2f})",
        f"and {0.01 / (0.01 - gamma):.3f} (at Â = −{TOP[8]:.2f})",
        f"by at most {0.01 / (0.01 - gamma) - 1:.1%}",
        f"{seen['teacher_tokens_below_0.01']} of the {seen['teacher_tokens']:,} teacher tokens",
        f"w is {0.00101 / (0.00101 - 0.001):.0f} at π = 0.00101",
    )


def test_numbers_of_the_reading_guide():
    top = torch.tensor(TOP[8], dtype=torch.float64)
    before = grpo.shaping_coefficient(top).item()
    after = grpo.shaping_coefficient(top, gamma_min=0.1).item()
    pi = 0.0002
    _, group_of_8 = group(1, 8)  # its last rollout is a bad one
    bad = grpo.shaping_coefficient(group_of_8[-1]).item()
    lifted = grpo.shaping_coefficient(group_of_8[-1], gamma_min=0.1).item()
    assert not missing(
        "reading.md",
        f"Where Â = {TOP[8]:.2f}, a token with π = {pi} had w = {pi / (pi + before):.2f} "
        f"and now has w = {pi / (pi + after):.4f}",
        f"at Â = −{-group_of_8[-1]:.2f} from −{-bad:.5f} to {lifted:.3f}",
    )


def test_numbers_of_the_results():
    demos = [result(f"demo-seed{n}") for n in range(15)]
    ends = [demo["thinktuning"]["accuracy"] for demo in demos]
    beyond = [end - demo["teacher_prompt"]["accuracy"] for end, demo in zip(ends, demos)]
    assert sum(x > 0 for x in beyond) == 9
    longer = [result(f"ablate-long-seed{n}") for n in range(10)]
    runs = [seed[name][0] for seed in longer for name in seed if name.startswith("GRPO")]
    assert {run["reflection_rate"] for run in runs} == {0.0}
    sampled = sum(run["sampled_rollouts"] for run in runs)
    reflect = sum(run["sampled_rollouts"] * run["sampled_reflection_rate"] for run in runs)
    in_training = 128 * sum(result("curves-seed0")["grpo"])
    leaks = [demo["base"]["begins_reflection"] for demo in demos[9:]]
    expected = [7680 * (1 - demos[0]["base"]["accuracy"]) * leak for leak in leaks]
    teacher = result("novelty-seed0")["base"]
    assert teacher["teacher_prompt_named_once"] == 1.0
    without_a_trap = sum(story.trap is None for story in stories("test")[:500])
    assert without_a_trap / 500 == demos[0]["base"]["accuracy"]

    def span(numbers):
        return f"{min(numbers):.3f} to {max(numbers):.3f}"

    assert not missing(
        "results.md",
        f"at {statistics.fmean(ends[:10]):.3f} in the mean ({span(ends[:10])})",
        f"They end at {statistics.fmean(ends[10:]):.3f} ({span(ends[10:])})",
        f"The median of all fifteen is {statistics.median(ends):.3f}",
        f"These are {without_a_trap} of the 500",
        f"by {100 * max(beyond):.1f} points at most",
        f"seed 0 ends at {result('demo-seed0-floor0')['thinktuning']['accuracy']:.3f}",
        f"Of {sampled:,} answers that they sampled, {reflect:.0f} reflects",
        f"{in_training:.0f} of seed 0's 7,680 rollouts did",
        f"expect {min(expected):.1g} to {max(expected):.1g} reflections",
        f"is right in {teacher['teacher_prompt_accuracy']}",
    )


def test_numbers_of_the_page_on_grpo():
    _, advantages = group(1, 8)
    right, wrong = advantages[0].item(), advantages[-1].item()
    words = f"the right one gets {right:.2f} and each wrong one −{-wrong:.2f}"
    assert not missing("grpo.md", words)


def test_numbers_of_the_page_on_memory():
    n, gib = 3_212_749_824, 1 << 30
    cached = 2 * 28 * 8 * 128 * 2  # keys and values, layers, heads, head size, bytes
    assert plan.parameters(LLAMA_3B) == n
    longer, usual = memory(max_tokens=1025, micro_batch=16384), memory(micro_batch=16384)
    assert longer["sampling"] - usual["sampling"] == 128 * cached
    assert not missing(
        "memory.md",
        f"{n:,} parameters",
        f"| the student's weights, bfloat16 | 2 | {2 * n / gib:.1f} |",
        f"| master copy of the weights, float32 | 4 | {4 * n / gib:.1f} |",
        f"| AdamW's two moments, float32 | 8 | {8 * n / gib:.1f} |",
        f"| the teacher's weights, bfloat16 | 2 | {2 * n / gib:.1f} |",
        f"The gradient: 4 bytes for each parameter, {4 * n / gib:.1f} GiB",
        f"= {cached:,} bytes",
        f"128 rows of 512 + 1024 positions takes {128 * 1536 * cached / gib:.1f} GiB",
        f"12 · 128,256 = {12 * 128256:,} bytes",
        f"16,384 tokens {12 * 128256 * 16384 / gib:.1f} GiB",
    )


def test_numbers_of_the_four_objections():
    probe, greedy = result("probe-seed0"), result("demo-seed0")["thinktuning"]
    ours = {name: rows["ThinkTuning"] for name, rows in probe["two_friends"].items()}
    narrator = {name: rows["base as narrator"] for name, rows in probe["two_friends"].items()}
    forced = {name: rows["ThinkTuning, blank line"] for name, rows in probe["two_friends"].items()}
    first, second = forced["wrong, right"], forced["right, wrong"]
    mixed = {who[name]["reflects"] for who in (ours, narrator) for name in list(ours)[:2]}
    assert len(mixed) == 1 and all(one["attempts"] == 150 for one in forced.values())
    assert first["names_other"] == second["names_other"] == 0
    assert second["names_wrong"] + second["names_right"] == pytest.approx(1)
    own = [probe["forced"][which]["base"]["attempts"] for which in ("wrong", "right")]
    without = {name: run for name, (run,) in result("ablate-narrator-seed0").items()}
    gain = without["no narrator"]["accuracy"] - without["no narrator, GRPO"]["accuracy"]
    base, grpo_student = probe["samples"]["base"], probe["samples"]["grpo"]
    assert not missing(
        "results.md",
        f"{own[0]} wrong and {own[1]} right ones",
        f"a quarter of the rollouts reflect at step {without['no narrator']['take_off']}",
        f"{100 * gain:.0f} points above GRPO",
        f"reflects on {mixed.pop():.3f} in either order",
        f"If both lines are wrong, ThinkTuning's student reflects on "
        f"{ours['wrong, wrong']['reflects']:.3f} of the attempts, and if both are right "
        f"on {ours['right, right']['reflects']:.3f}",
        f"names the wrong one of the two in {first['names_wrong']:.3f} if that line comes first, "
        f"in {second['names_wrong']:.3f} if it comes second",
        f"Of these answers {first['accuracy']:.3f} and {second['accuracy']:.3f} are right",
        f"so {8 * base['mean_length']:.0f} tokens a problem",
        f"has pass@8 {base['pass@8']:.3f} and maj@8 {base['maj@8']:.3f}, GRPO's student "
        f"{grpo_student['pass@8']:.3f} and {grpo_student['maj@8']:.3f}",
        f"greedy answer, {greedy['mean_length']:.0f} tokens, has {greedy['accuracy']:.3f}",
    )


def test_numbers_of_the_second_student_of_smollm2():
    first, second = result("smollm2"), result("smollm2-second")
    rows = [[], [], [], [], []]
    for found, floors in (
        (first["student"], first["floors"]["student"]),
        (second["student"], second["student"]["greedy"]),
    ):
        friend, plain = found["greedy, with a friend"], found["greedy, without"]
        rows[0].append(f"{friend['accuracy']:.3f}, {plain['accuracy']:.3f}")
        rows[1].append(f"{friend['by_the_misconception']:.3f}")
        rows[2].append(f"{floors['goes_on']:.3f}, {floors['blank_line']:.3f}")
        mantissa, exponent = f"{floors['begins_reflection']:.1e}".split("e")
        rows[3].append(f"{mantissa}e{int(exponent)}")
    boxes, sampled = first["second_boxes_of_the_student"], second["student"]["sampled"]
    again = round(sampled["reflection_rate"] * sampled["responses"])
    rows[4] = [f"{boxes['with_a_second_box']} of {boxes['samples']:,}"]
    rows[4].append(f"{again} of {sampled['responses']:,}")
    one, two, read, last = second["teacher"]["rounds"]
    own, sums, *others = read["failures"].values()
    assert own[0] == own[1] and sums[0] == sums[1]
    planted = [found for kind, found in second["student"].items() if kind.startswith("planted")]
    assert all(found["goes_on"] == 0 for found in planted)
    assert not missing(
        "results.md",
        *(" | ".join(row) + " |" for row in rows),
        f"| {last['solves']:.2f}, {last['judges']:.2f} of 100 |",
        f"reflects on none of {sum(found['attempts'] for found in planted)} planted attempts",
        f"solved {one['solves']:.0%} after {one['steps']} steps and {two['solves']:.0%} after "
        f"{two['steps']}",
        f"all {own[0]} attempts of the first kind, at all {sums[0]} wrong sums and at "
        f"{others[0][0] + others[1][0]} of the {others[0][1] + others[1][1]} others",
        f"{sampled['wrong_to_right']} mend a wrong answer, and {sampled['right_to_wrong']} spoil",
    )
    run, lever = second["thinktuning"], second["likelihood_from_step_11"]
    greedy, last = run["scores"]["greedy"], lever["metrics"]
    weights = [metrics["w_guided"] for metrics in run["metrics"] if "w_guided" in metrics]
    rare = run["with_pi_below_0.001"] / run["guided_tokens_in_transcripts"]
    assert greedy["names_day"] == 0 and greedy["goes_on_wrong"] == greedy["goes_on_right"] == 1
    assert run["evaluations"][:2] == lever["evaluations"][:2]  # one run up to the checkpoint
    assert not missing(
        "results.md",
        f"after {greedy['reflection_rate_first_wrong']:.0%} of the wrong ones only",
        f"The mean of w, {min(weights):.2f} to {max(weights):.2f} in each step",
        f"{rare:.0%} of the guided tokens have a π below 0.001",
        f"Of {run['guided_in_transcripts']} recorded guided rollouts "
        f"{run['with_text_of_the_students_between']} had gone on",
        f"asked {run['asked']} times and followed the format {run['parsed']} times",
        f"continued {run['guided']} rollouts, of which {run['guided_reward']:.0f} earned",
        f"ThinkTuning {round(run['sampled_tokens'], -3):,}, GRPO "
        f"{round(second['grpo']['sampled_tokens'], -3):,}",
    )


def test_times_of_the_plan_for_a_class():
    text = (ROOT / "docs" / "lecture.md").read_text()
    runs = result("demo-seed0-seconds")["runs"]
    fresh = result("demo-seed1")["seconds"]["total"]  # with its base model
    seconds = [run["from_command_to_end"] for run in runs]
    of_cpu = [run["cpu_seconds"]["total"] for run in runs]
    assert f"| {min(seconds):.0f} to {max(seconds):.0f} s |" in text
    assert f"| {fresh:.0f} s |" in text
    assert len(runs) == 5 and not missing(
        "results.md",
        f"Five runs of seed 0 took {min(seconds):.0f} to {max(seconds):.0f} seconds from the",
        f"{min(of_cpu):.0f} to {max(of_cpu):.0f} seconds of CPU",
    )


if __name__ == "__main__":
    for page in PAGES:
        before = page.read_text()
        if before != computed(before):
            page.write_text(computed(before))
            print("written again:", page.relative_to(ROOT))
