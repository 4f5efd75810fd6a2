"""Other programs that the benchmark measures beside this one: transformers and TRL, if installed.

They get the same weights, the same prompts and the same settings.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable

import torch

from model import LM


def loaded(model: LM, transformers):
    """The model in transformers, with the same weights."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=model.embed.weight.dtype
        )


def transformers_generate(model: LM, prompts: list[list[int]], length: int) -> Callable | None:
    """A function that samples `length` tokens to each prompt; None without transformers."""
    try:
        import transformers
    except ImportError:
        return None
    peer, ids = loaded(model, transformers), torch.tensor(prompts)
    options = dict(do_sample=True, top_k=0, min_new_tokens=length, max_new_tokens=length)
    options |= dict(attention_mask=torch.ones_like(ids), pad_token_id=0)
    return lambda: peer.generate(ids, **options)


def beside_trl(
    model: LM, prompts: list[list[int]], samples: int, length: int, count: int, step: Callable
) -> tuple[list[float], list[float]] | None:
    """Seconds of `count` steps of ours, `step`, and of TRL's GRPOTrainer, in turns.

    None if TRL, transformers or datasets is not installed. A first pair is not counted. TRL's step
    samples `samples` responses of `length` tokens to each prompt, rewards every second one, and
    takes one step of AdamW.
    """
    try:
        import datasets
        import transformers
        import trl
    except ImportError:
        return None
    ours: list[float] = []
    theirs: list[float] = []

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            began = time.perf_counter()
            step()
            self.began = time.perf_counter()
            ours.append(self.began - began)

        def on_step_end(self, *_, **__):
            theirs.append(time.perf_counter() - self.began)

    texts = [" ".join(f"t{token}" for token in prompt) for prompt in prompts]
    settings = dict(num_generations=samples, max_completion_length=length, max_steps=count + 1)
    settings |= dict(per_device_train_batch_size=len(prompts) * samples, beta=0.0, temperature=1.0)
    settings |= dict(learning_rate=1e-6, generation_kwargs=dict(min_new_tokens=length))
    settings |= dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[])
    settings |= dict(save_strategy="no", logging_strategy="no", disable_tqdm=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.GRPOTrainer(
            loaded(model, transformers),
            reward_funcs=lambda completions, **_: [i % 2.0 for i in range(len(completions))],
            args=trl.GRPOConfig(output_dir=folder, **settings),
            train_dataset=datasets.Dataset.from_dict({"prompt": texts * (count + 1)}),
            processing_class=words(model.config.vocab_size),
            callbacks=[Turns()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return ours[1:], theirs[1:]


def words(vocab_size: int):
    """A tokenizer of transformers for which token 7 is the word t7."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {f"t{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", eos_token="t1")
