"""The training loop and evaluation, and the commands `train` and `eval` on a model made elsewhere."""

import json
import re
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import thinktuning
from data import Problem, load_problems
from data.tokenizer import Tokenizer
from grpo import Rollout
from model import LM, ModelConfig
from run.config import Config
from run.loop import Loop
from teacher import guidance_fraction, make_teacher
from thinktuning import evaluate, main, reward, train

HERE = Path(__file__).parent
GSM8K = HERE.parent / "shared" / "gsm8k"


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    tokenizer = Tokenizer.builtin()
    return LM(
        ModelConfig(tokenizer.vocab_size, 32, 2, 2, 1, 16, 64, max_seq_len=256, **changes)
    ), tokenizer


def tiny_config(**changes):
    return Config(
        **{
            **dict(
                steps=3,
                questions=4,
                samples=3,
                max_tokens=12,
                mini_batch=2,
                learning_rate=1e-2,
                teacher_reply=40,
                teacher_prompt=128,
                micro_batch=8192,
            ),
            **changes,
        }
    )


@pytest.fixture
def model_directory(tmp_path):
    model, tokenizer = tiny()
    model.save(tmp_path / "model", tokenizer)
    return tmp_path / "model"


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


STEPS_OF_THE_PAPER = {  # function of thinktuning.py: its letter in the order of the eight steps
    "sample_rollouts": "1",
    "choose_rollouts": "2",
    "parse_feedback": "4",
    "augment": "5",
    "reward": "6",
    "set_advantages": "7",
    "snapshot": "8",
    "update": "8",
}


def watched(monkeypatch, teacher):
    """What a training does from now on, in order: the letter of each step and what it was given."""
    calls = []

    def watch(holder, name, letter):
        function = getattr(holder, name)

        def watched_function(*args, **kwargs):
            calls.append((letter, args))
            return function(*args, **kwargs)

        monkeypatch.setattr(holder, name, watched_function)

    for name, letter in STEPS_OF_THE_PAPER.items():
        watch(thinktuning, name, letter)
    watch(teacher, "ask", "3")
    return calls


def test_a_step_is_the_papers_eight_steps_in_their_order(monkeypatch):
    student, tokenizer = finishing_student()
    teacher = scripted_teacher(tokenizer, "So the answer is \\boxed{7}.")
    calls = watched(monkeypatch, teacher)
    problems = [Problem(q, "7") for q, _ in load_problems("wordproblems")[:8]]
    config = tiny_config(max_tokens=60, samples=4, schedule="constant", p_init=0.5, epochs=2)
    train(student, tokenizer, Loop(problems, config), teacher, reward=thinktuning.reward)
    rollouts, updates = (
        config.questions * config.samples,
        config.epochs * config.questions // config.mini_batch,
    )
    order = "".join(letter for letter, _ in calls)
    # Parsing and augmenting take turns, and each rollout is rewarded by itself.
    assert re.fullmatch(f"(123(45)+6{{{rollouts}}}78{{{1 + updates}}}){{{config.steps}}}", order), (
        order
    )


def test_the_teacher_reads_question_and_attempt_and_each_group_is_compared_with_itself(monkeypatch):
    student, tokenizer = finishing_student()
    teacher = scripted_teacher(tokenizer, "So the answer is \\boxed{7}.")
    calls = watched(monkeypatch, teacher)
    problems = [
        Problem(q, "7" if i % 2 else "8")
        for i, (q, _) in enumerate(load_problems("wordproblems")[:8])
    ]
    config = tiny_config(steps=1, max_tokens=60, samples=4, schedule="constant", p_init=0.5)
    train(student, tokenizer, Loop(problems, config), teacher, reward=thinktuning.reward)
    given = {letter: args for letter, args in calls}
    rollouts, *_ = given["7"]
    helped = [r for r in rollouts if r.asked]
    assert helped and given["3"] == ([r.question for r in helped], [r.attempt for r in helped])
    batches = [
        args[2]
        for letter, args in calls
        if letter == "8"
        and args[0] is student
        and len(args) > 2
        and isinstance(args[1], torch.optim.Optimizer)
    ]
    size = config.mini_batch * config.samples
    assert batches == [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
    for start in range(0, len(rollouts), config.samples):
        group = rollouts[start : start + config.samples]
        assert len({r.question for r in group}) == 1
        assert sum(r.advantage for r in group) == pytest.approx(0, abs=1e-5)
    assert any(r.advantage > 0 for r in rollouts)


def test_without_a_teacher_nobody_is_asked_and_the_rest_is_the_same_step(monkeypatch):
    student, tokenizer = finishing_student()
    calls = watched(monkeypatch, scripted_teacher(tokenizer, "never read"))
    loop = Loop(load_problems("wordproblems"), tiny_config(steps=2))
    train(student, tokenizer, loop, reward=thinktuning.reward)
    order = "".join(letter for letter, _ in calls)
    assert re.fullmatch("(126{12}78{3}){2}", order), order


def test_after_the_training_nothing_holds_the_loop_and_with_it_the_lock_of_its_directory():
    student, tokenizer = finishing_student()
    loop = Loop(load_problems("wordproblems"), tiny_config(steps=1))
    train(student, tokenizer, loop)
    gone = weakref.ref(loop)
    del loop
    assert gone() is None


@pytest.mark.filterwarnings("error")
def test_a_process_without_questions_has_nothing_to_compare():
    thinktuning.set_advantages([], 4)


@pytest.mark.parametrize("method", ["grpo", "thinktuning"])
def test_two_runs_with_one_seed_give_the_same_weights_to_the_bit(method, monkeypatch):
    def run(seed):
        student, tokenizer = finishing_student()
        # A random model is never right: pay for texts of even length, so that there is something to learn.
        monkeypatch.setattr(thinktuning, "is_correct", lambda text, answer: len(text) % 2 == 0)
        teacher = (
            make_teacher(tiny(1)[0], tokenizer, tiny_config()) if method == "thinktuning" else None
        )
        loop = Loop(load_problems("wordproblems"), tiny_config(method=method, seed=seed))
        train(student, tokenizer, loop, teacher)
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
    (metrics,) = train(student, tokenizer, Loop([Problem("Why?", "7")], config), teacher)
    assert metrics["guided"] > 0
    assert metrics["kl_old"] == pytest.approx(
        0, abs=1e-6
    )  # π_old, sampled or from the snapshot, and π_θ
    assert (
        metrics["reward"] == 0 and metrics["grad_norm"] < 1e-4
    )  # nothing but the KL term: π_θ and π_ref


def scripted_teacher(tokenizer, phrase):
    """A teacher that always says the same, in the real format, so that guidance happens whatever the weights are."""
    teacher = make_teacher(tiny(1)[0], tokenizer, tiny_config())
    reply = f"<opinion>incorrect</opinion><reason>Wait, that does not fit the story.</reason><phrase>{phrase}</phrase>"
    teacher.ask = lambda questions, attempts: [reply] * len(questions)
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
    teacher = scripted_teacher(tokenizer, "So the answer is \\boxed{7}.")
    train(student, tokenizer, Loop(problems, config, run=run), teacher)
    assert sum(m["guided"] for m in run.metrics) > 5
    assert all(
        m["guided_reward"] == m["guided"] for m in run.metrics
    )  # the box says 7, and 7 is right
    guided = [line for line in run.lines if line["guidance"]]
    words = "\n\nWait, that does not fit the story.\n\nSo the answer"
    assert guided and all(line["guidance"].startswith(words) for line in guided)
    assert all(line["reward"] == 1.0 and line["opinion"] == "incorrect" for line in guided)


def test_a_wrong_teacher_earns_its_student_nothing():
    student, tokenizer = finishing_student()
    problems = [Problem(q, "7") for q, _ in load_problems("wordproblems")[:8]]
    run = Recorder()
    config = tiny_config(max_tokens=60, schedule="constant", samples=4)
    teacher = scripted_teacher(tokenizer, "So the answer is \\boxed{8}.")
    train(student, tokenizer, Loop(problems, config, run=run), teacher)
    assert sum(m["guided"] for m in run.metrics) > 5 and sum(m["reward"] for m in run.metrics) == 0


def test_the_teacher_goes_off_for_good_and_evaluation_never_involves_it():
    student, tokenizer = finishing_student()
    run = Recorder()
    teacher = scripted_teacher(tokenizer, "So the answer is \\boxed{8}.")
    config = tiny_config(steps=20, max_tokens=50)
    train(student, tokenizer, Loop(load_problems("wordproblems"), config, run=run), teacher)
    asked = [m["teacher_asked"] > 0 for m in run.metrics]
    assert asked == [True] * 3 + [False] * 17  # 15% of the steps with the published schedule
    teacher.ask = None  # evaluate could not call it
    evaluate(student, tokenizer, load_problems("wordproblems", "test")[:3], max_tokens=8)


def test_published_7_a_schedule_started_anew_brings_the_teacher_back_and_a_function_of_the_step_does_not():
    stopped_at, total = 30, 60
    assert (
        guidance_fraction(0, total) == 0.1
    )  # what a resumed run without schedule state starts from
    assert all(guidance_fraction(step, total) == 0.0 for step in range(stopped_at, total))


def test_sampling_in_slices_changes_the_memory_and_not_the_order():
    model, tokenizer = tiny()
    problems = load_problems("wordproblems", "test")[:7]
    whole, records = evaluate(model, tokenizer, problems, max_tokens=8, rows=256)
    sliced, again = evaluate(model, tokenizer, problems, max_tokens=8, rows=2)
    assert records == again and whole == sliced


@pytest.fixture(scope="module")
def llama_directory(tmp_path_factory):
    """A random Llama with a byte-level BPE tokenizer in Llama 3's layout, trained on GSM8K, made by other tools."""
    if not GSM8K.is_dir():
        pytest.skip(f"{GSM8K} is not here")
    transformers, tokenizers = (
        pytest.importorskip("transformers"),
        pytest.importorskip("tokenizers"),
    )
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

    path = tmp_path_factory.mktemp("llama")
    special = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
    t = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    t.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    t.decoder = decoders.ByteLevel()
    text = [json.loads(line)["question"] for line in open(GSM8K / "train.jsonl")][:1500]
    t.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=1000,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=t, eos_token="<|eot_id|>"
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def test_a_model_directory_trains_on_gsm8k_and_other_tools_load_the_result(
    llama_directory, tmp_path, capsys
):
    import transformers

    flags = "--steps 3 --questions 4 --samples 3 --max-tokens 24 --teacher-reply 24 --mini-batch 2 --eval-count 6"
    assert (
        main(
            [
                "train",
                "--model",
                str(llama_directory),
                "--data",
                str(GSM8K / "train.jsonl"),
                "--eval-data",
                str(GSM8K / "test.jsonl"),
                "--out",
                str(tmp_path / "run"),
                *flags.split(),
            ]
        )
        == 0
    )
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
    assert (
        main(
            [
                "eval",
                "--model",
                str(run / "model"),
                "--data",
                str(GSM8K / "test.jsonl"),
                "--count",
                "3",
                "--samples",
                "2",
                "--max-tokens",
                "8",
                "--grader",
                "builtin",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "maj@2" in out and "graded by the built-in comparison\n" in out


def test_training_in_bfloat16_says_what_it_needs_and_saves_bfloat16(
    llama_directory, tmp_path, capsys
):
    flags = "--dtype bfloat16 --steps 1 --questions 2 --samples 3 --max-tokens 16 --teacher-reply 16 --mini-batch 2 --rows 4"
    assert (
        main(
            [
                "train",
                "--model",
                str(llama_directory),
                "--data",
                str(GSM8K / "train.jsonl"),
                "--out",
                str(tmp_path),
                *flags.split(),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "bfloat16, float32 master weights" in out and "it fits" in out
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert all(file.get_tensor(name).dtype == torch.bfloat16 for name in file.keys())
    assert (
        json.loads((tmp_path / "config.json").read_text())["micro_batch"] >= 512 + 16
    )  # chosen, and written down


def test_prompts_longer_than_the_context_are_counted_and_dropped(llama_directory, tmp_path, capsys):
    long = tmp_path / "problems.jsonl"
    long.write_text(
        "".join(json.dumps({"question": "word " * n, "answer": "1"}) + "\n" for n in (1, 5000, 3))
    )
    assert (
        main(["eval", "--model", str(llama_directory), "--data", str(long), "--max-tokens", "4"])
        == 0
    )
    assert "dropped 1 of 3 questions" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, earns",
    [
        (r"\boxed{3} \boxed{5} \boxed{7}", 1),
        (r"\boxed{7} \boxed{3}", 0),
        (r"\boxed{7} and so \boxed{", 0),
        (r"\boxed{7} \boxed{3", 0),
        (r"\boxed{7 or 8}", 0),
        (r"\boxed{7, 8}", 0),
        (r"\boxed{\boxed{7}}", 1),
        (r"\boxed{\boxed{8}7}", 0),
        (r"\boxed{x = 7}", 1),
        (r"\boxed{7 \text{ cm}}", 1),
        (r"\boxed{7\%}", 0),
        (r"\boxed{7k}", 0),
        (r"\boxed{x = 8 = 7}", 0),
        (r"\boxed{8}<|end|>\boxed{7}", 1),
        (r"\boxed{7}<|end|><|student|>\boxed{8}", 0),
        (r"<opinion>correct</opinion><reason>x</reason><phrase>\boxed{7}</phrase> \boxed{8}", 0),
        ("\\boxed{\uff17}", 0),
        ("\\boxed{\u0667}", 0),
        ("\\boxed{\u2077}", 0),
        (r"\boxed{seven}", 0),
        (r"\boxed{7e0}", 0),
        (r"\boxed{07e0}", 0),
        (r"\boxed{inf}", 0),
        (r"\boxed{nan}", 0),
        (r"\boxed{1e400}", 0),
        (r"\boxed{" + "7" * 100_000 + "}", 0),
        ("{" * 100_000, 0),
        ("", 0),
        ("7", 0),
        (r"\boxed{7.0}", 1),
        (r"\boxed{14/2}", 1),
    ],
)
def test_what_a_policy_might_try(text, earns):
    rollout = Rollout(
        [1], [2], finished=True, question=r"It is \boxed{7}, is it not?", answer="7", text=text
    )
    assert reward(rollout) == earns
    rollout.finished = False
    assert reward(rollout) == 0
