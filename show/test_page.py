"""The page one can play with: its models say what Python's say, and no text can break it."""

import base64
import hashlib
import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
import torch

from data import load_problems
from data.prompts import spoken, student_prompt
from data.reward import is_correct
from data.tokenizer import Tokenizer
from demo.base import SHIPPED
from demo.planted import planted_attempts
from model import LM, ModelConfig
from run.config import DEMO
from sampler import generate
from show import page
from thinktuning import main

TOKENIZER = Tokenizer.builtin()
QUESTIONS = [problem.question for problem in load_problems("wordproblems", "test")[:200]]


@pytest.fixture(scope="module")
def models():
    """The shipped base model, and two that are enough like it to write answers, but others."""
    made = {name: LM.load(SHIPPED) for name in ("base", "grpo", "thinktuning")}
    for size, name in ((0.05, "grpo"), (0.07, "thinktuning")):
        generator = torch.Generator().manual_seed(1)
        for _, tensor in made[name].disk_tensors():
            tensor.data += size * torch.randn(tensor.shape, generator=generator)
    return made


@pytest.fixture(scope="module")
def written(models, tmp_path_factory):
    """A demonstration's directory, as far as the page reads it, with its page."""
    run = tmp_path_factory.mktemp("demo")
    (run / "summary.json").write_text(json.dumps({"planted": {}}))
    for name, model in models.items():
        model.save(run / name / "model", TOKENIZER)
    assert main(["page", str(run)]) == 0
    return run


@pytest.fixture
def run(written, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(written, tmp_path / "run")


class Scripts(HTMLParser):
    """Collects the page's scripts, and the tags of its body."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags[-1:] == ["script"] and data.strip():
            self.scripts[-1] += data


def stored(text):
    return json.loads(Scripts(text).scripts[0])


# What is written.


def test_one_small_file_that_asks_no_network_and_runs_one_script(written):
    text = (written / "page.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 5_000_000
    assert not re.search(r"https?:|src=|@import|url\(", text.replace(page.SCRIPT, ""))
    assert not re.search(r"https?:|fetch|XMLHttp|import|innerHTML|eval\(", page.SCRIPT)
    script = Scripts(text).scripts[1]
    assert len(script.splitlines()) <= 250 and max(map(len, script.splitlines())) <= 100
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in text and "default-src 'none'" in text


def test_the_stored_weights_are_the_models_to_half_a_step(written, models):
    data = stored((written / "page.html").read_text(encoding="utf-8"))
    base = np.frombuffer(base64.b64decode(data["base"]), "<f4")
    assert np.array_equal(base, page.flat(models["base"]).numpy())
    assert set(data["trained"]) == {"grpo", "thinktuning"}
    for name, change in data["trained"].items():
        steps = np.frombuffer(base64.b64decode(change["steps"]), "<i2")
        off = base + change["step"] * steps - page.flat(models[name]).numpy()
        assert abs(steps.astype(int)).max() == page.LARGEST
        assert abs(off).max() < 0.51 * change["step"] + 2e-7  # and float32's own rounding


def test_an_untrained_model_has_no_change(models):
    alike = page.flat(models["base"])
    data = page.stored_weights({"base": alike, "grpo": alike})
    assert set(base64.b64decode(data["trained"]["grpo"]["steps"])) == {0}


def test_the_problems_are_held_out_ones_with_their_answers(written):
    data = stored((written / "page.html").read_text(encoding="utf-8"))
    expected = load_problems("wordproblems", "test")[:200]
    assert [(p["question"], p["right"]) for p in data["problems"]] == expected
    slip = planted_attempts("slip_before")[3]
    assert data["planted"]["slip_before"][3]["attempt"] == slip.attempt
    assert slip.line in data["planted"]["slip_before"][3]["note"]
    assert data["planted"]["right"][0]["note"] == "No line is wrong."
    assert data["max_tokens"] == DEMO["max_tokens"]


NASTY = "</script><script>alert(1)</script><!-- <script> & ' \" \u2028 \\u003c {0} é"


def test_no_text_can_leave_the_data(models):
    data = {"problems": [{"question": NASTY, "right": NASTY}], NASTY: NASTY}
    text = page.page(models["base"].config, data)
    found = Scripts(text)
    assert len(found.scripts) == 2 and found.scripts[1] == page.SCRIPT
    assert json.loads(found.scripts[0]) == data


# Errors.


def complaint(capsys, *argv):
    assert main([str(word) for word in ("page", *argv)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


def test_each_mistake_is_named(run, tmp_path, capsys):
    assert "no finished demonstration" in complaint(capsys, tmp_path)
    assert "no finished demonstration" in complaint(capsys, tmp_path / "nowhere")
    assert "nowhere" in complaint(capsys, run, "--out", tmp_path / "nowhere" / "x.html")
    assert str(tmp_path) in complaint(capsys, run, "--out", tmp_path)
    (run / "page.html").unlink()
    (run / "page.html").symlink_to(tmp_path / "elsewhere")
    assert main(["page", str(run)]) == 1 and "is a link" in capsys.readouterr().err
    shutil.rmtree(run / "grpo")
    assert "grpo/model" in complaint(capsys, run)


def test_a_summary_of_another_run_is_refused(run, capsys):
    path = run / "summary.json"
    path.write_text("[]")
    assert "summary.json" in complaint(capsys, run)
    path.write_text("{}")  # a novelty test has no planted attempts
    assert "no finished demonstration" in complaint(capsys, run)


def test_models_that_the_page_cannot_run_are_refused(run, capsys):
    sizes = dict(vocab_size=402, dim=96, n_layers=3, n_heads=2, n_kv_heads=2, head_dim=48)
    sizes |= dict(ffn_dim=256, max_seq_len=320)
    for changed, says in (
        (dict(qk_norm=True, n_layers=4), "440,000 at most"),
        (dict(), "not laid out"),
        (dict(qk_norm=True, ffn_dim=128), "not laid out"),
    ):
        shutil.rmtree(run / "grpo" / "model")
        LM(ModelConfig(**{**sizes, **changed})).save(run / "grpo" / "model", TOKENIZER)
        assert says in complaint(capsys, run)
    (run / "grpo" / "model" / "model.safetensors").write_bytes(b"x")
    assert "model.safetensors" in complaint(capsys, run)


# In the browser.


@pytest.fixture
def in_browser(written, models, tmp_path, monkeypatch):
    """ask(script, what) -> what `script`, put behind the page's own, returns for `what`.

    The console must stay empty. `other` is another model to put into the place of the base.
    """
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if not chromium:
        pytest.skip("no Chromium here")
    data = stored((written / "page.html").read_text(encoding="utf-8"))

    def ask(script, what, other=None):
        config = (other or models["base"]).config
        data["config"] = vars(config)
        if other:
            data.update(page.stored_weights({"base": page.flat(other)}))
        asked = json.dumps(what).replace("<", "\\u003c")
        harness = f"""
            window.requestAnimationFrame = (next) => next();
            (async (asked) => {{ {script} }})({asked}).then((found) => {{
              const text = encodeURIComponent(JSON.stringify(found));
              document.body.append(element("pre", {{ id: "found", textContent: text }}));
            }});"""
        monkeypatch.setattr(page, "SCRIPT", page.SCRIPT + harness)
        file = tmp_path / "page.html"
        file.write_text(page.page(config, data), encoding="utf-8")
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
        flags += " --disable-background-networking --disable-component-update --disable-sync"
        flags += " --hide-scrollbars --enable-logging=stderr --dump-dom"
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        words = [chromium, *flags.split(), profile, file.as_uri()]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        found = re.search('<pre id="found">(.*?)</pre>', done.stdout)
        assert found, done.stderr[-2000:]
        assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
        return json.loads(unquote(found[1], errors="surrogatepass"))

    return ask


GREEDY = """
  const found = {};
  for (const [name, model] of Object.entries(models)) {
    found[name] = asked.map(([question, right]) => {
      const ids = [...generate(model, question, [], 0)].map((step) => step.id);
      return [ids, verdict(ids, right)];
    });
  }
  return found;"""


@pytest.mark.parametrize("count", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_the_greedy_answers_are_python_s(in_browser, models, count):
    problems = load_problems("wordproblems", "test")[:count]
    found = in_browser(GREEDY, problems)
    prompts = [student_prompt(TOKENIZER, problem.question) for problem in problems]
    for name, model in models.items():
        most = DEMO["max_tokens"]
        ids = generate(model, prompts, max_tokens=most, stop=TOKENIZER.stop, temperature=0.0)
        assert [ours for ours, _ in found[name]] == ids
        for problem, response, (_, said) in zip(problems, ids, found[name]):
            right = response[-1] in TOKENIZER.stop
            right &= is_correct(spoken(TOKENIZER, response), problem.answer)
            assert said.endswith("right ✓" if right else "wrong ✗"), said
    others = sum(a != b for a, b in zip(found["base"], found["thinktuning"]))
    assert others > count / 20  # or three equal models would pass


def any_texts(count):
    """Texts of what the tokenizer knows and of what it does not know."""
    rng = random.Random(0)
    parts = ["Tuesday", " look at", "\\boxed{", "</reason>", "<|end|>", "12", "345", ": ", " - "]
    parts += ["\n", "\n\n\n", " ", "\t", "é", "ﬁ", "漢", "🙂", "\ud83d", "\x00", "\ufeff", "\u0085"]
    parts += ["'", "}", ".", "zzz", "ſ", "٣", "\u2028"]
    return ["".join(rng.choices(parts, k=rng.randrange(9))) for _ in range(count)]


SAID = (  # with and without an end, these are right or wrong answers to what 3 is right for
    "So the answer is \\boxed{3}.",
    "\\boxed{7}. Wait. \\boxed{3}.",
    "\\boxed{3}. Wait. \\boxed{7}.",
    "\\boxed{13}.",
    "So the answer is 3.",
    "\\boxed{3}. \\boxed{}",
)


def test_the_page_reads_writes_computes_and_draws_as_python_does(in_browser):
    texts = [*QUESTIONS, *any_texts(300)]
    rng = random.Random(1)
    lists = [rng.choices(range(402), k=rng.randrange(12)) for _ in range(300)]
    lists.append([0xEF, 0xBB, 0xBF, 65])  # a byte order mark
    said = [TOKENIZER.encode(text) for text in SAID]
    said += [[*ids, TOKENIZER.special["<|end|>"]] for ids in said]
    uniform = [rng.random() for _ in range(200)]
    torch.manual_seed(0)
    sizes = dict(n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=20, qk_norm=True, max_seq_len=90)
    other = LM(ModelConfig(vocab_size=402, dim=12, n_layers=2, rope_theta=500.0, **sizes))
    for _, tensor in other.disk_tensors():
        tensor.data += 0.3 * torch.randn(tensor.shape)
    tokens = [rng.randrange(402) for _ in range(80)]
    with torch.no_grad():
        logits = other(torch.tensor([tokens]))[0, -1].double()
    script = """
      const cache = new KVCache();
      let states;
      for (const token of asked.tokens) states = models.base.hidden(token, cache);
      const logits = linear(models.base.head, states);
      const drawn = asked.uniform.map((number) => {
        Math.random = () => number;
        return sample(logits, 0.7);
      });
      const ids = asked.texts.map(encode);
      const verdicts = asked.said.map((ids) => verdict(ids, "3"));
      return { ids, drawn, verdicts, logits: [...logits], texts: asked.lists.map(decode) };"""
    what = dict(texts=texts, lists=lists, tokens=tokens, uniform=uniform, said=said)
    found = in_browser(script, what, other)
    assert found["ids"] == [TOKENIZER.encode(text) for text in texts]
    assert found["texts"] == [TOKENIZER.decode(ids) for ids in lists]
    for ids, verdict in zip(said, found["verdicts"]):
        right = ids[-1] in TOKENIZER.stop and is_correct(spoken(TOKENIZER, ids), "3")
        assert verdict.endswith("right ✓" if right else "wrong ✗"), (ids, verdict)
    assert found["logits"] == pytest.approx(logits.tolist(), abs=2e-5)
    shares = (logits / 0.7).softmax(-1).cumsum(-1)
    expected = torch.searchsorted(shares, torch.tensor(uniform).double()).tolist()
    assert sum(a != b for a, b in zip(found["drawn"], expected)) <= 1 and len(set(expected)) > 20


def test_what_one_sees(in_browser, models):
    one = planted_attempts("misconception")[5]
    attempt = one.attempt + "\n\n"  # where a reflection begins
    script = """
      document.documentElement.style.width = "390px";
      pose({ question: asked.question, right: "3", attempt: asked.attempt });
      await run();
      const spans = [...columns[0].tokens.children];
      const text = columns[0].tokens.textContent;
      const classes = spans.map((span) => span.className);
      spans[0].focus();
      spans[0].dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
      const place = spans.indexOf(document.activeElement);
      const seen = [...columns[0].likeliest.querySelectorAll("code, mark")].map((code) => code.textContent);
      const marked = columns[0].likeliest.querySelectorAll("mark").length;
      $("base-edit").click();
      const edited = $("attempt").value;
      const edges = Array.from(document.querySelectorAll("body *"), (e) => e.getBoundingClientRect());
      const wide = Math.max(...edges.map((edge) => edge.right));
      pose({ attempt: "<b>no</b><img src=x onerror=alert(1)>" });
      await run();
      const tags = columns[0].tokens.querySelectorAll("b, img").length;
      const before = columns[0].tokens.textContent;
      pose({ attempt: "é".repeat(400) });
      await run();
      const status = $("status").value;
      const requests = performance.getEntriesByType("resource").length;
      return { wide, marked, text, classes, place, seen, edited, tags, before, status, requests };"""
    question = QUESTIONS[3]
    found = in_browser(script, dict(question=question, attempt=attempt))
    assert 300 < found["wide"] <= 390 and found["requests"] == 0
    given = len(TOKENIZER.encode(attempt))
    assert found["classes"][:given] == ["given"] * given
    assert set(found["classes"][given:]) == {"reflection"}
    assert found["text"].startswith(attempt.replace("\n\n", "↵↵\n\n"))
    assert found["text"].endswith("‹end›")
    prompt = student_prompt(TOKENIZER, question)
    with torch.no_grad():
        p = models["base"](torch.tensor([[*prompt, TOKENIZER.encode(attempt)[0]]]))[0, -1]
    five = [TOKENIZER.decode([i]).replace("<|end|>", "‹end›") for i in p.topk(5).indices.tolist()]
    assert found["place"] == 1 and [x.replace("↵", "\n") for x in found["seen"][:5]] == five
    assert found["edited"] == one.attempt and found["marked"] == 1
    assert found["tags"] == 0 and found["before"].startswith(
        "<b>no</b><img src=x onerror=alert(1)>"
    )
    assert "320 is the most" in found["status"]
