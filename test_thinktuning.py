"""The whole program: runs end to end, repeats to the bit, speaks plainly about bad input."""



import hashlib
import importlib.metadata
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import demo.ablations
import demo.base
import demo.command
import demo.comparison
import demo.printed
import thinktuning
from data import Problem, load_problems, wordproblems
from data.prompts import student_prompt
from data.scores import majority, mean_and_se, pass_at_k, score
from data.tokenizer import Tokenizer
from grpo import Rollout
from model import LM, ModelConfig
from run.cli import parsers
from run.config import Config
from teacher import guidance_fraction, make_teacher, parse_feedback
from thinktuning import evaluate, main, questions_of_step, reward, seeds_of_step, train

HERE = Path(__file__).parent
GSM8K = HERE.parent / "shared" / "gsm8k"


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    tokenizer = Tokenizer.builtin()
    return LM(ModelConfig(tokenizer.vocab_size, 32, 2, 2, 1, 16, 64, max_seq_len=256, **changes)), tokenizer


def tiny_config(**changes):
    return Config(**{**dict(steps=3, questions=4, samples=3, max_tokens=12, mini_batch=2, learning_rate=1e-2, teacher_reply=40,
                            teacher_prompt=128, micro_batch=8192), **changes})


@pytest.fixture
def model_directory(tmp_path):
    model, tokenizer = tiny()
    model.save(tmp_path / "model", tokenizer)
    return tmp_path / "model"


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# The loop


@pytest.mark.parametrize("method", ["grpo", "thinktuning"])
def test_two_runs_with_one_seed_give_the_same_weights_to_the_bit(method, monkeypatch):
    def run(seed):
        student, tokenizer = finishing_student()
        # A random model is never right: pay for texts of even length, so that there is something to learn.
        monkeypatch.setattr(thinktuning, "is_correct", lambda text, answer: len(text) % 2 == 0)
        teacher = make_teacher(tiny(1)[0], tokenizer, tiny_config()) if method == "thinktuning" else None
        train(student, tokenizer, load_problems("wordproblems"), tiny_config(method=method, seed=seed), teacher=teacher)
        return weights(student)

    first, second, other = run(1), run(1), run(2)
    assert torch.equal(first, second)
    assert not torch.equal(first, other) and not torch.equal(first, weights(finishing_student()[0]))


def test_the_kl_terms_reference_is_the_teachers_model_where_that_is_the_initial_policy():
    student, tokenizer = tiny()
    teacher = make_teacher(tiny()[0], tokenizer, tiny_config())
    assert thinktuning.initial_policy(student, teacher) is teacher.model
    for other in (None, make_teacher(tiny(1)[0], tokenizer, tiny_config())):
        alone = thinktuning.initial_policy(student, other)
        assert alone is not student and torch.equal(weights(alone), weights(student))
        assert not any(p.requires_grad for p in alone.parameters())
    elsewhere = make_teacher(tiny(rope_theta=1e6)[0], tokenizer, tiny_config())  # the same weights
    assert thinktuning.initial_policy(student, elsewhere) is not elsewhere.model
    with torch.no_grad():
        student.norm.weight[0] += 1e-6
    assert thinktuning.initial_policy(student, teacher) is not teacher.model


def test_a_step_trains_the_policy_that_it_sampled_at_any_temperature(monkeypatch):
    student, tokenizer = finishing_student()
    with torch.no_grad():
        student.head.weight.mul_(20)  # far from uniform, where the temperature would not matter
    config = tiny_config(steps=1, mini_batch=4, temperature=0.6, kl_coef=1.0, max_tokens=60)
    teacher = scripted_teacher(tokenizer, "So the answer is \\boxed{8}.")
    (metrics,) = train(student, tokenizer, [Problem("Why?", "7")], config, teacher=teacher)
    assert metrics["guided"] > 0
    assert metrics["kl_old"] == pytest.approx(0, abs=1e-6)  # π_old, sampled or from the snapshot, and π_θ
    assert metrics["reward"] == 0 and metrics["grad_norm"] < 1e-4  # nothing but the KL term: π_θ and π_ref


def scripted_teacher(tokenizer, phrase):
    """A teacher that always says the same, in the real format, so that guidance happens whatever the weights are."""
    teacher = make_teacher(tiny(1)[0], tokenizer, tiny_config())
    reply = f"<opinion>incorrect</opinion><reason>Wait, that does not fit the story.</reason><phrase>{phrase}</phrase>"
    teacher.feedback = lambda questions, responses: [parse_feedback(reply) for _ in questions]
    return teacher


class Recorder:
    def __init__(self):
        self.metrics, self.lines = [], []

    def restore(self, student, optimizer):
        return 0, []

    def save(self, step, student, optimizer):
        pass

    def log(self, metrics, steps, transcripts):
        self.metrics.append(metrics)
        self.lines += transcripts


def finishing_student():
    """A random student whose turn ends with any byte above 127, so that it finishes often enough to be eligible for help."""
    student, tokenizer = tiny()
    tokenizer.stop = set(range(128, 256))
    return student, tokenizer


def test_guided_rollouts_are_rewarded_by_the_same_reward_and_shown_in_transcripts():
    student, tokenizer = finishing_student()
    problems = [Problem(q, "7") for q, _ in load_problems("wordproblems")[:8]]
    run = Recorder()
    config = tiny_config(max_tokens=60, schedule="constant", p_init=0.5, samples=4)
    train(student, tokenizer, problems, config, teacher=scripted_teacher(tokenizer, "So the answer is \\boxed{7}."), run=run)
    assert sum(m["guided"] for m in run.metrics) > 5
    assert all(m["guided_reward"] == m["guided"] for m in run.metrics)  # the box says 7, and 7 is right
    guided = [line for line in run.lines if line["guidance"]]
    words = "\n\nWait, that does not fit the story.\n\nSo the answer"
    assert guided and all(line["guidance"].startswith(words) for line in guided)
    assert all(line["reward"] == 1.0 and line["opinion"] == "incorrect" for line in guided)


def test_a_wrong_teacher_earns_its_student_nothing():
    student, tokenizer = finishing_student()
    problems = [Problem(q, "7") for q, _ in load_problems("wordproblems")[:8]]
    run = Recorder()
    train(student, tokenizer, problems, tiny_config(max_tokens=60, schedule="constant", samples=4),
          teacher=scripted_teacher(tokenizer, "So the answer is \\boxed{8}."), run=run)
    assert sum(m["guided"] for m in run.metrics) > 5 and sum(m["reward"] for m in run.metrics) == 0


def test_the_teacher_goes_off_for_good_and_evaluation_never_involves_it():
    student, tokenizer = finishing_student()
    run = Recorder()
    teacher = scripted_teacher(tokenizer, "So the answer is \\boxed{8}.")
    train(student, tokenizer, load_problems("wordproblems"), tiny_config(steps=20, max_tokens=50), teacher=teacher, run=run)
    asked = [m["teacher_asked"] > 0 for m in run.metrics]
    assert asked == [True] * 3 + [False] * 17  # 15% of the steps with the published schedule
    teacher.feedback = None  # evaluate could not call it
    evaluate(student, tokenizer, load_problems("wordproblems", "test")[:3], max_tokens=8)


def test_published_7_a_schedule_started_anew_brings_the_teacher_back_and_a_function_of_the_step_does_not():
    stopped_at, total = 30, 60
    assert guidance_fraction(0, total) == 0.1  # what a resumed run without schedule state starts from
    assert all(guidance_fraction(step, total) == 0.0 for step in range(stopped_at, total))


def test_every_epoch_shows_every_problem_once_in_an_order_of_its_own():
    problems = list(range(10))
    shown = [p for step in range(5) for p in questions_of_step(problems, 4, 3, step)]
    assert Counter(shown[:10]) == Counter(shown[10:]) == Counter(problems) and shown[:10] != shown[10:]
    assert len(questions_of_step(problems, 25, 3, 0)) == 25  # a step may be longer than an epoch


def test_the_random_streams_of_a_step_depend_on_seed_and_step_alone():
    def draws(seed, step):
        generator, rng = seeds_of_step(seed, step)
        return torch.rand(3, generator=generator).tolist(), rng.random()

    assert draws(1, 2) == draws(1, 2)
    assert len({str(draws(seed, step)) for seed in range(20) for step in range(20)}) == 400


def test_sampling_in_slices_changes_the_memory_and_not_the_order():
    model, tokenizer = tiny()
    problems = load_problems("wordproblems", "test")[:7]
    whole, records = evaluate(model, tokenizer, problems, max_tokens=8, rows=256)
    sliced, again = evaluate(model, tokenizer, problems, max_tokens=8, rows=2)
    assert records == again and whole == sliced


def test_the_student_prompt_is_the_question_alone_for_the_built_in_problems():
    tokenizer = Tokenizer.builtin()
    question = load_problems("wordproblems")[0].question
    assert tokenizer.decode(student_prompt(tokenizer, question)) == f"<|question|>{question}<|student|>"


# Scores


def record(answer, *boxes, finished=True):
    return Problem("q", answer), " ".join(f"\\boxed{{{b}}}" for b in boxes), finished


def test_score_separates_first_answers_from_final_ones():
    scores = score([record("1", 1), record("1", 2), record("1", 2, 1), record("1", 1, 2), record("1", 1, finished=False)])
    assert scores["accuracy"] == 2 / 5 and scores["first_answer_accuracy"] == 3 / 5
    assert (scores["wrong_to_right"], scores["right_to_wrong"]) == (1, 2)  # unfinished counts as wrong
    assert scores["reflection_rate"] == 2 / 5
    assert scores["reflection_rate_first_wrong"] == 1 / 2 and scores["reflection_rate_first_right"] == 1 / 3
    assert scores["accuracy_se"] == pytest.approx((0.3 / 5) ** 0.5)


def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_answer():
    from itertools import combinations
    for n, c, k in ((5, 2, 3), (6, 0, 2), (6, 6, 1), (4, 1, 4)):
        subsets = list(combinations(range(n), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(any(i < c for i in s) for s in subsets) / len(subsets))


def test_majority_votes_by_value_and_ignores_unfinished_responses():
    assert majority([record("7", "7.0"), record("7", "8"), record("7", "7")]) == 1
    assert majority([record("7", "8"), record("7", "8.0"), record("7", "7")]) == 0
    assert majority([record("7", "7"), record("7", "8", finished=False), record("7", "8", finished=False)]) == 1
    assert majority([record("7")]) == 0


def test_every_score_of_an_evaluation_comes_from_the_same_grader():
    def lenient(given, answer):
        return given.lower() == answer.lower()

    records = [record("a", "A"), record("a", "b", "A"), record("a", "A", "b")]
    strict, found = score(records, 3), score(records, 3, lenient)
    assert (strict["accuracy"], strict["first_answer_accuracy"], strict["pass@3"], strict["maj@3"]) == (0, 0, 0, 0)
    assert (found["accuracy"], found["first_answer_accuracy"], found["pass@3"], found["maj@3"]) == (2 / 3, 2 / 3, 1, 1)
    assert (found["wrong_to_right"], found["right_to_wrong"]) == (1, 1)


def test_mean_and_se_are_those_of_the_textbook():
    assert mean_and_se([1.0, 0.0, 1.0, 1.0]) == (0.75, pytest.approx((0.25 / 4) ** 0.5))
    assert mean_and_se([0.3]) == (0.3, 0.0)


# The built-in problems


def worked_out(question):
    """The content of a question as (start, (sign, amount) ...) and its answer, from its words alone."""
    n = int(re.match(r"\w+ has (\d+) ", question)[1])
    content = [n]
    for day in question.split(" On ")[1:]:
        signs = (("finds", "+"), ("buys", "+"), ("loses", "-"), ("sells", "-"), ("doubles", "*"), ("half", "/"))
        sign = next(sign for word, sign in signs
                    if word in day)
        amount = int(re.search(r"\d+", day)[0]) if sign in "+-" else 2
        n = {"+": n + amount, "-": n - amount, "*": 2 * n, "/": n / 2}[sign]
        content.append((sign, amount))
    return tuple(content), n


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_built_in_answer_is_right_and_held_out_problems_differ_in_content(split):
    problems = load_problems("wordproblems", split)
    solved = [worked_out(question) for question, _ in problems]
    assert [str(int(n)) for _, n in solved] == [p.answer for p in problems]
    assert all(n == int(n) and 1 <= n <= 20 for _, n in solved)
    assert len({p.question for p in problems}) == len(problems) == wordproblems.SIZES[split]
    if split != "train":
        assert len({content for content, _ in solved}) == len(problems)


def test_no_training_story_passes_through_a_held_out_problem():
    held_out = {worked_out(p.question)[0] for split in ("validation", "test") for p in load_problems("wordproblems", split)}
    validation, test = ({worked_out(p.question)[0] for p in load_problems("wordproblems", split)}
                        for split in ("validation", "test"))
    assert not validation & test
    rng = random.Random(0)
    stories = [wordproblems.question(wordproblems.make_story(rng, 1 + i % 6, "train")) for i in range(3000)]
    for question in stories + [p.question for p in load_problems("wordproblems")]:
        content, _ = worked_out(question)
        assert not any(content[:end] in held_out for end in range(2, len(content) + 1))


def test_everything_the_base_model_reads_is_about_training_problems(monkeypatch):
    splits = set()
    make_story = wordproblems.make_story
    monkeypatch.setattr(wordproblems, "make_story", lambda rng, n, split: splits.add(split) or make_story(rng, n, split))
    demo.base.rows_of_step(dict(demo.base.RECIPE, floor=0.5), 0, random.Random(0), Tokenizer.builtin())
    assert splits == {"train"}


def short_recipe():
    return dict(demo.base.RECIPE, seed=0, floor=demo.base.FLOOR, steps=5)


def test_the_texts_that_make_the_base_are_those_of_its_version():
    """Another hash means other texts: raise demo.base.VERSION, or cached base models stay as they were."""
    rng, digest = random.Random("pretraining 0 0"), hashlib.sha256()
    for step in range(5):
        digest.update(json.dumps(demo.base.rows_of_step(short_recipe(), step, rng, Tokenizer.builtin())).encode())
    assert (demo.base.VERSION, digest.hexdigest()[:16]) == (1, "b3457f4742c82483")


WEIGHTS_AFTER_FIVE_STEPS = {("2.13.0", "AuthenticAMD", "AVX2"): "a43ce74e1a525eb0"}  # (torch, processor, its instructions): hash


def test_the_weights_of_the_base_are_those_of_its_version():
    """Another hash means another training: raise demo.base.VERSION, or cached base models stay as they were."""
    cpu = Path("/proc/cpuinfo")
    vendor = re.search(r"vendor_id\s*: (\S+)", cpu.read_text() if cpu.exists() else "")
    kind = (torch.__version__.partition("+")[0], vendor and vendor[1], torch.backends.cpu.get_cpu_capability())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = demo.base.pretrain(short_recipe(), Tokenizer.builtin())
    torch.set_num_threads(threads)
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    if kind not in WEIGHTS_AFTER_FIVE_STEPS:
        pytest.skip(f"no hash is stored for {kind}, which may round differently; here it is {digest.hexdigest()[:16]}")
    assert (demo.base.VERSION, digest.hexdigest()[:16]) == (1, WEIGHTS_AFTER_FIVE_STEPS[kind])


def test_a_base_models_name_changes_with_everything_that_makes_it(monkeypatch):
    recipe = short_recipe()
    names = {demo.base.recipe_key(recipe), demo.base.recipe_key(dict(recipe, seed=1)), demo.base.recipe_key(dict(recipe, floor=0.0))}
    monkeypatch.setattr(demo, "VERSION", demo.base.VERSION + 1)
    names.add(demo.base.recipe_key(recipe))
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    names.add(demo.base.recipe_key(recipe))
    monkeypatch.setattr(wordproblems, "__file__", str(HERE / "data" / "other.py"))
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"another vocabulary")
    names.add(demo.base.recipe_key(recipe))
    assert len(names) == 6


def test_the_student_never_reads_a_second_answer_and_no_remark_at_floor_0():
    rng = random.Random(0)
    stories = [wordproblems.make_story(rng, 1 + i % 4, "train") for i in range(300)]
    texts = [wordproblems.student_row(rng, s, floor=0.5).text for s in stories]
    assert all(t.count("\\boxed") == 1 for t in texts)
    share = sum("\n\n" in t for t in texts) / len(texts)
    assert 0.4 < share < 0.6
    assert not any("\n\n" in wordproblems.student_row(rng, s, floor=0.0).text for s in stories)
    reflective = {reason.split()[0] for _, reason, _ in wordproblems.WORDING.values()}
    assert not reflective & {r.split()[0] for r in wordproblems.REMARKS}


def test_built_in_teacher_texts_are_feedback_the_parser_takes_and_mostly_right_in_opinion():
    from data.exemplars import behaviour
    from data.reward import is_correct
    from teacher import parse_feedback
    rng, right, seen = random.Random(0), 0, set()
    for i in range(400):
        story = wordproblems.make_story(rng, 1 + i % 4, "train")
        messages, role, text, _ = wordproblems.teacher_row(rng, story)
        feedback = parse_feedback(text)
        answer = str(wordproblems.counts(story)[-1])
        assert role == "teacher" and is_correct(feedback.phrase, answer)
        right += (feedback.opinion == "correct") == is_correct(messages[1]["content"], answer)
        seen.add(behaviour(feedback.reason))
    assert 0.7 < right / 400 < 0.9 and seen == set(wordproblems.WORDING)


def test_the_shipped_vocabulary_is_what_its_script_makes(tmp_path):
    wordproblems.write_vocabulary(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (HERE / "data" / "wordproblems.tiktoken").read_bytes()


def test_numbers_are_single_tokens_wherever_they_stand():
    tokenizer = Tokenizer.builtin()
    for text in ("Gus has 17 keys.", "17 + 2 = 19.", "starts with 17.", "\\boxed{17}.", "finds 17: 17 - 3 = 14."):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode("17")[0] in tokenizer.encode(text)
    assert len(tokenizer.encode("17")) == 1


# The demonstration


def test_quick_demonstration_writes_the_summary_and_caches_the_base(tmp_path, capsys):
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    for name in ("base", "grpo", "thinktuning"):
        assert {"accuracy", "accuracy_se", "reflection_rate", "reflection_rate_first_wrong", "reflection_rate_first_right",
                "first_answer_accuracy", "mean_length", "seconds"} <= summary[name].keys()
    assert summary["seconds"]["pretrain"] > 0
    first = capsys.readouterr().out
    assert "T ThinkTuning, g GRPO" in first and "under the teacher prompt" in first
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    assert "cached in" in capsys.readouterr().out
    again = json.loads((tmp_path / "summary.json").read_text())
    assert again["seconds"]["pretrain"] == 0
    for name in ("base", "grpo", "thinktuning"):  # the same to the digit, from the cached base as from the fresh one
        assert {**again[name], "seconds": 0} == {**summary[name], "seconds": 0}
    other = main(["--quick", "--out", str(tmp_path), "--floor", "0"])
    assert other == 0 and len(list(tmp_path.glob("base-*"))) == 2  # another floor is another base


def test_a_base_below_the_gate_goes_round_again_and_then_fails_loudly(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(demo.base.RECIPE, "steps", 2)
    assert main(["--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("validation:") == demo.base.CYCLES and "under the teacher prompt" in printed.err
    assert not list(tmp_path.glob("base-*"))


def test_ablations_run_every_variant(tmp_path, capsys):
    (tmp_path / "summary.json").write_text("the demonstration's table")
    assert main(["--quick", "--out", str(tmp_path), "--ablate", "stress", "--repeats", "2"]) == 0
    assert (tmp_path / "summary.json").read_text() == "the demonstration's table"
    rows = json.loads((tmp_path / "ablate-stress.json").read_text())
    assert rows.keys() == demo.ablations.VARIANTS["stress"].keys() and all(len(v) == 2 for v in rows.values())


def test_corrupted_and_shuffled_feedback_do_what_they_say():
    from data.reward import final_answer
    from teacher import Feedback
    replies = [Feedback("correct", "r", f"So the answer is \\boxed{{{n}}}.") for n in range(1, 11)]
    spoilt = demo.ablations.corrupted(1.0)(lambda q, r: replies, random.Random(0))([], [])
    assert all(final_answer(s.phrase) != final_answer(f.phrase) for s, f in zip(spoilt, replies))
    assert demo.ablations.corrupted(0.0)(lambda q, r: replies, random.Random(0))([], []) == replies
    moved = demo.ablations.shuffled(lambda q, r: replies, random.Random(0))([], [])
    assert all(a != b for a, b in zip(moved, replies)) and sorted(moved) == sorted(replies)


# Real input


@pytest.fixture(scope="module")
def llama_directory(tmp_path_factory):
    """A random Llama with a byte-level BPE tokenizer in Llama 3's layout, trained on GSM8K, made by other tools."""
    if not GSM8K.is_dir():
        pytest.skip(f"{GSM8K} is not here")
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    path = tmp_path_factory.mktemp("llama")
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    t = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+")
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                               pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    text = [json.loads(line)["question"] for line in open(GSM8K / "train.jsonl")][:1500]
    t.train_from_iterator(text, trainers.BpeTrainer(vocab_size=1000, special_tokens=special, show_progress=False,
                                                    initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    transformers.PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|eot_id|>").save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=1000, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
                                      tie_word_embeddings=True, initializer_range=0.3)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def test_a_model_directory_trains_on_gsm8k_and_other_tools_load_the_result(llama_directory, tmp_path, capsys):
    import transformers
    flags = "--steps 3 --questions 4 --samples 3 --max-tokens 24 --teacher-reply 24 --mini-batch 2 --eval-count 6"
    assert main(["train", "--model", str(llama_directory), "--data", str(GSM8K / "train.jsonl"), "--eval-data",
                 str(GSM8K / "test.jsonl"), "--out", str(tmp_path / "run"), *flags.split()]) == 0
    run = tmp_path / "run"
    metrics = [json.loads(line) for line in open(run / "metrics.jsonl")]
    assert [m["step"] for m in metrics] == [0, 1, 2] and "eval_accuracy" in metrics[-1]
    assert json.loads((run / "config.json").read_text())["samples"] == 3
    ours = LM.load(run / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "model").eval()
    tokens = torch.randint(0, 1000, (2, 30))
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    text = "Natalia sold 48 clips."
    ids = transformers.AutoTokenizer.from_pretrained(run / "model")(text)["input_ids"]
    assert ids == Tokenizer.load(run / "model").encode(text)
    assert main(["eval", "--model", str(run / "model"), "--data", str(GSM8K / "test.jsonl"), "--count", "3", "--samples", "2",
                 "--max-tokens", "8", "--grader", "builtin"]) == 0
    out = capsys.readouterr().out
    assert "maj@2" in out and "graded by the built-in comparison\n" in out


def test_training_in_bfloat16_says_what_it_needs_and_saves_bfloat16(llama_directory, tmp_path, capsys):
    flags = "--dtype bfloat16 --steps 1 --questions 2 --samples 3 --max-tokens 16 --teacher-reply 16 --mini-batch 2 --rows 4"
    assert main(["train", "--model", str(llama_directory), "--data", str(GSM8K / "train.jsonl"), "--out", str(tmp_path),
                 *flags.split()]) == 0
    out = capsys.readouterr().out
    assert "bfloat16, float32 master weights" in out and "it fits" in out
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert all(file.get_tensor(name).dtype == torch.bfloat16 for name in file.keys())
    assert json.loads((tmp_path / "config.json").read_text())["micro_batch"] >= 512 + 16  # chosen, and written down


def test_prompts_longer_than_the_context_are_counted_and_dropped(llama_directory, tmp_path, capsys):
    long = tmp_path / "problems.jsonl"
    long.write_text("".join(json.dumps({"question": "word " * n, "answer": "1"}) + "\n" for n in (1, 5000, 3)))
    assert main(["eval", "--model", str(llama_directory), "--data", str(long), "--max-tokens", "4"]) == 0
    assert "dropped 1 of 3 questions" in capsys.readouterr().out


def test_ask_with_a_teacher_works_on_a_directory_made_elsewhere(llama_directory, capsys):
    assert main(["ask", "--model", str(llama_directory), "How many?", "--max-tokens", "5", "--teacher"]) == 0
    assert re.search(r"no feedback from the teacher: its reply (is longer than 1024 tokens|has not the asked form)\n$",
                     capsys.readouterr().out)  # its weights are random


def test_ask_streams_what_generate_gives(model_directory, capsys):
    question = load_problems("wordproblems", "test")[0].question
    assert main(["ask", "--model", str(model_directory), question, "--max-tokens", "9"]) == 0
    model, tokenizer = LM.load(model_directory), Tokenizer.load(model_directory)
    ids = thinktuning.generate(model, [student_prompt(tokenizer, question)], max_tokens=9, stop=tokenizer.stop, temperature=0)[0]
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode([i for i in ids if i not in tokenizer.stop]).rstrip("\n")


@pytest.mark.parametrize("text, earns", [
    (r"\boxed{3} \boxed{5} \boxed{7}", 1), (r"\boxed{7} \boxed{3}", 0), (r"\boxed{7} and so \boxed{", 0),
    (r"\boxed{7} \boxed{3", 0),
    (r"\boxed{7 or 8}", 0), (r"\boxed{7, 8}", 0), (r"\boxed{\boxed{7}}", 1), (r"\boxed{\boxed{8}7}", 0),
    (r"\boxed{x = 7}", 1), (r"\boxed{7 \text{ cm}}", 1), (r"\boxed{7\%}", 0), (r"\boxed{7k}", 0), (r"\boxed{x = 8 = 7}", 0),
    (r"\boxed{8}<|end|>\boxed{7}", 1), (r"\boxed{7}<|end|><|student|>\boxed{8}", 0),
    (r"<opinion>correct</opinion><reason>x</reason><phrase>\boxed{7}</phrase> \boxed{8}", 0),
    ("\\boxed{\uff17}", 0), ("\\boxed{\u0667}", 0), ("\\boxed{\u2077}", 0), (r"\boxed{seven}", 0), (r"\boxed{7e0}", 0),
    (r"\boxed{07e0}", 0), (r"\boxed{inf}", 0), (r"\boxed{nan}", 0), (r"\boxed{1e400}", 0), (r"\boxed{" + "7" * 100_000 + "}", 0),
    ("{" * 100_000, 0), ("", 0), ("7", 0), (r"\boxed{7.0}", 1), (r"\boxed{14/2}", 1)])
def test_what_a_policy_might_try(text, earns):
    rollout = Rollout([1], [2], finished=True, question=r"It is \boxed{7}, is it not?", answer="7", text=text)
    assert reward(rollout) == earns
    rollout.finished = False
    assert reward(rollout) == 0


# Bad input


def complaint(capsys, *argv, status=2):
    """The one sentence on stderr that a command ends with."""
    try:
        code = main([str(a) for a in argv])
    except SystemExit as exit:  # argparse
        code = exit.code
    err = capsys.readouterr().err
    assert code == status and "Traceback" not in err and err.startswith("error: ") and err.count("\n") == 1
    can_be_followed(err, *argv)
    return err


def can_be_followed(message, *argv):
    """Every flag that a message names is one of the command's, unless it says whose it is or the user gave it."""
    demonstration, commands = parsers()
    known = commands.get(argv[0], demonstration)._option_string_actions.keys() | {"--help"}
    named = re.findall(r"(--[a-z][a-z0-9-]*)(?![a-z0-9-])(?! of train)", message)
    assert set(named) <= known | {str(a).partition("=")[0] for a in argv}, message


def test_bad_input_ends_with_one_sentence_and_status_2(model_directory, tmp_path, capsys):
    broken, empty = tmp_path / "broken.jsonl", tmp_path / "empty.jsonl"
    broken.write_text('{"question": "a", "answer": "1"}\n{"question": \n')
    empty.write_text("\n")
    base = ["train", "--model", model_directory, "--out", tmp_path / "run"]
    assert "broken.jsonl, line 2" in complaint(capsys, *base, "--data", broken)
    assert "empty.jsonl" in complaint(capsys, *base, "--data", empty)
    assert "no-such" in complaint(capsys, "train", "--model", tmp_path / "no-such", "--data", "wordproblems")
    assert "gsm9k" in complaint(capsys, *base, "--data", "gsm9k")
    assert "--clip" in complaint(capsys, *base, "--data", "wordproblems", "--clip", "-1")
    assert "--p-min" in complaint(capsys, *base, "--data", "wordproblems", "--p-init", "0.001")
    assert "--published" in complaint(capsys, *base, "--data", "wordproblems", "--published", "gama")
    assert "--steps" in complaint(capsys, *base, "--data", "wordproblems", "--steps", "three")
    assert "--floor" in complaint(capsys, "--floor", "2", "--out", tmp_path / "x")
    assert "--temperature" in complaint(capsys, "ask", "--model", model_directory, "q", "--temperature", "-1")
    assert "--device" in complaint(capsys, "ask", "--model", model_directory, "q", "--device", "tpu9")
    assert "tokens" in complaint(capsys, "ask", "--model", model_directory, "q", "--max-tokens", "999")
    assert "--grader" in complaint(capsys, "eval", "--model", model_directory, "--data", "wordproblems", "--grader", "me")
    assert not (tmp_path / "run").exists()  # nothing was begun


def test_a_wrong_flag_is_named_and_nothing_else_is_blamed():
    """From a shell, as a user would."""
    for argv, told in ((["--frobnicate", "3"], "unrecognized arguments: --frobnicate 3"),
                       (["--quick", "--frobnicate=3"], "unrecognized arguments: --frobnicate=3"),
                       (["report", "x", "--frobnicate", "3"], "unrecognized arguments: --frobnicate 3"),
                       (["trian", "--model", "x"], "'trian' is no command: give one of train, eval, ask, report"),
                       (["--seed", "3", "train", "--preset", "paper"], "the command must come first: thinktuning.py train"),
                       (["eval", "--model", "x"], "required: --data")):
        done = subprocess.run([sys.executable, "thinktuning.py", *argv], cwd=HERE, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and told in done.stderr
        can_be_followed(done.stderr, *argv)


def test_a_flag_that_would_do_nothing_is_refused(model_directory, tmp_path, capsys):
    file = tmp_path / "p.jsonl"
    file.write_text('{"question": "q", "answer": "1"}')
    base = ["train", "--model", model_directory, "--data", "wordproblems", "--out", tmp_path / "run"]
    assert "--split" in complaint(capsys, "eval", "--model", model_directory, "--data", file, "--split", "train")
    assert "leave --teacher out" in complaint(capsys, *base, "--method", "grpo", "--teacher", model_directory)
    assert "give --eval-data too" in complaint(capsys, *base, "--eval-count", "5")
    assert "give --eval-data too" in complaint(capsys, *base, "--eval-every", "5")
    assert "--beta1 must be below 1" in complaint(capsys, *base, "--beta1", "1")


def test_whoever_follows_the_advice_about_length_gets_an_answer(model_directory, tmp_path, capsys):
    """The model's context is 256 tokens."""
    question = load_problems("wordproblems")[0].question
    short, long = tmp_path / "short.jsonl", tmp_path / "long.jsonl"
    short.write_text(json.dumps({"question": question, "answer": "1"}))
    long.write_text(json.dumps({"question": question * 20, "answer": "1"}))
    n = len(student_prompt(Tokenizer.builtin(), question))
    of_eval = ["eval", "--model", model_directory, "--grader", "builtin", "--data"]
    err = complaint(capsys, *of_eval, short, "--max-tokens", 255)
    assert err.endswith(f"no question fits; the shortest prompt has {n} tokens and the model's context 256: "
                        f"lower --max-tokens to {256 - n} or less\n")
    assert main([str(a) for a in (*of_eval, short, "--max-tokens", 256 - n)]) == 0
    err = complaint(capsys, *of_eval, long)
    assert "--" not in err and err.endswith("the model's context 256: give shorter questions, or a model with a longer context\n")
    of_train = ["train", "--model", model_directory, "--data", short, "--out", tmp_path / "run", "--method", "grpo",
                "--steps", "1", "--questions", "1", "--samples", "2"]
    err = complaint(capsys, *of_train, "--max-prompt", 2)
    assert err.endswith(f"lower --max-tokens to {256 - n} or less and raise --max-prompt to {n} or more\n")
    assert main([str(a) for a in (*of_train, "--max-prompt", n, "--max-tokens", 256 - n)]) == 0
    of_ask = ["ask", "--model", model_directory, question]
    assert f"lower --max-tokens to {256 - n} or less" in complaint(capsys, *of_ask, "--max-tokens", 255)
    assert main([str(a) for a in (*of_ask, "--max-tokens", 256 - n)]) == 0
    capsys.readouterr()
    err = complaint(capsys, "ask", "--model", model_directory, question * 20, "--max-tokens", 5)
    assert err.endswith("leaves 0 tokens of the model's context of 256: shorten it\n")


@pytest.mark.parametrize("context, advice", [(300, "give a teacher with a longer context\n"),
                                             (2200, "lower --teacher-reply of train well below")])
def test_a_teacher_without_room_for_its_exemplars_says_what_would_help(llama_directory, tmp_path, capsys, context, advice):
    short = tmp_path / "short"
    shutil.copytree(llama_directory, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": context}))
    err = complaint(capsys, "ask", "--model", short, "How many?", "--max-tokens", 5, "--teacher")
    assert "the teacher's exemplars take" in err and advice in err and "give a teacher with a longer context" in err
    assert "--teacher-prompt" not in err
    assert main(["ask", "--model", str(short), "How many?", "--max-tokens", "5", "--teacher-model", str(llama_directory)]) == 0
    capsys.readouterr()
    err = complaint(capsys, "train", "--model", llama_directory, "--data", "wordproblems", "--teacher-prompt", 900, "--rows", 2,
                    "--out", tmp_path / "run")
    assert "raise --teacher-prompt well above" in err


def test_out_of_memory_names_flags_that_the_command_has(model_directory, tmp_path, capsys, monkeypatch):
    run, generate = tmp_path / "run", thinktuning.generate
    train = ["train", "--model", str(model_directory), "--data", "wordproblems", "--out", str(run), "--method", "grpo", "--steps", "3",
             "--questions", "2", "--samples", "2", "--max-tokens", "8", "--save-every", "1"]
    calls = []

    def too_large(*args, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return generate(*args, **kwargs)

    monkeypatch.setattr(thinktuning, "generate", too_large)
    err = complaint(capsys, *train, status=1)
    assert err == "error: out of memory: lower --rows (sampling) or --micro-batch (update); --resume goes on\n"
    err = complaint(capsys, *train[:6], tmp_path / "other", *train[7:], "--save-every", "0", status=1)
    assert "it cannot be resumed, because --save-every 0 kept no checkpoint" in err
    err = complaint(capsys, "eval", "--model", model_directory, "--data", "wordproblems", "--grader", "builtin", status=1)
    assert err == "error: out of memory: lower --rows or --max-tokens\n"
    monkeypatch.setattr("ask.generate", too_large)
    for samples, told in ((1, "lower --max-tokens"), (2, "lower --max-tokens or --samples")):
        err = complaint(capsys, "ask", "--model", model_directory, "q", "--samples", samples, status=1)
        assert err == f"error: out of memory: {told}\n"
    monkeypatch.setattr(LM, "load", lambda *_: too_large())
    err = complaint(capsys, "ask", "--model", model_directory, "q", status=1)  # while it loads no flag would help
    assert err == "error: out of memory: end what else runs on the device, or take a larger one\n"
    monkeypatch.undo()
    assert main([*train, "--resume", "--rows", "1", "--micro-batch", "300"]) == 0  # as it was told
    assert [json.loads(line)["step"] for line in open(run / "metrics.jsonl")] == [0, 1, 2]


def test_eval_says_who_graded_and_does_not_pretend(model_directory, tmp_path, capsys, monkeypatch):
    problems = tmp_path / "problems.json"
    problems.write_text(json.dumps([{"problem": "p", "answer": "p - q"}, {"problem": "q", "answer": r"\frac{1}{2}"}]))
    command = ["eval", "--model", str(model_directory), "--data", str(problems), "--max-tokens", "9"]
    version = re.escape(importlib.metadata.version("math-verify")) if importlib.util.find_spec("math_verify") else None
    monkeypatch.setattr(thinktuning, "spoken", lambda tokenizer, ids: r"\boxed{-q+p}")
    assert main(command) == 0
    out = capsys.readouterr().out
    assert re.search(rf"graded by math-verify {version} or the" if version else "graded by the built-in .*not installed", out)
    assert main([*command, "--grader", "builtin"]) == 0 and "graded by the built-in comparison\n" in capsys.readouterr().out
    monkeypatch.setattr("data.grading.importlib.util.find_spec", lambda name: None)
    assert main(command) == 0 and "graded by the built-in comparison (math-verify is not installed)" in capsys.readouterr().out
    err = complaint(capsys, *command, "--grader", "math-verify")
    assert "pip install math-verify" in err and "--grader builtin" in err and err.count("\n") == 1


def test_a_finished_run_is_not_written_over(model_directory, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("precious\n")
    for flags in ([], ["--resume"]):  # no checkpoint: there is nothing to go on from
        err = complaint(capsys, "train", "--model", model_directory, "--data", "wordproblems", "--out", tmp_path, *flags,
                        "--max-tokens", "8", "--teacher-reply", "30")
        assert "--out" in err and "continue it with --resume" not in err
        assert (tmp_path / "metrics.jsonl").read_text() == "precious\n"
    (tmp_path / "checkpoint" / "step-00000001").mkdir(parents=True)
    assert "continue it with --resume" in complaint(capsys, "train", "--model", model_directory, "--data", "wordproblems",
                                                    "--out", tmp_path)


def test_an_output_directory_that_cannot_be_made_is_named(model_directory, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    err = complaint(capsys, "train", "--model", model_directory, "--data", "wordproblems", "--max-tokens", "8", "--teacher-reply",
                    "30", "--out", tmp_path / "file" / "run")
    assert "file" in err


def test_a_full_disk_ends_the_run_with_a_sentence(model_directory, tmp_path, capsys, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("/dev/full is not here")
    run = tmp_path / "run"
    full = lambda path, mode: open("/dev/full" if "transcripts" in str(path) else path, mode)
    monkeypatch.setattr("record.open", full, raising=False)
    err = complaint(capsys, "train", "--model", model_directory, "--data", "wordproblems", "--out", run, "--method", "grpo",
                    "--steps", "1", "--questions", "2", "--max-tokens", "8", status=1)
    assert "No space left" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_cleanly(number, model_directory, tmp_path):
    run = tmp_path / "run"
    flags = "--data wordproblems --method grpo --steps 100000 --questions 2 --samples 2 --max-tokens 8"
    command = [sys.executable, "thinktuning.py", "train", "--model", model_directory, "--out", run, *flags.split()]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") > 2:
            break
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err
    LM.load(run / "model")
    assert all(json.loads(line) for line in open(run / "metrics.jsonl"))
