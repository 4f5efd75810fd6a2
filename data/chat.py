"""Chat prompts: each family's template, and how to tell which one a model was trained with.

The ids are those of transformers' apply_chat_template with the models' published templates, for
messages without tools. No template is executed: llama3_chat and chatml_chat do what templates do,
and `variant` finds in a template's text how models of one family differ.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

# Each template yields pairs of a special token and the plain text that follows it.


def llama3_chat(messages, reply_as, header=""):
    yield "<|begin_of_text|>", ""
    if header:
        messages = with_system(messages, "")
    for i, message in enumerate(messages):
        yield "<|start_header_id|>", message["role"]
        yield "<|end_header_id|>", "\n\n" + (header if i == 0 else "") + message["content"].strip()
        yield "<|eot_id|>", ""
    yield "<|start_header_id|>", reply_as
    yield "<|end_header_id|>", "\n\n"


def chatml_chat(messages, reply_as, system=None, thinks=False):
    if system is not None:
        messages = with_system(messages, system)
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    last_user = users[-1] if users else len(messages)
    for i, message in enumerate(messages):
        role, thought, text = message["role"], "", message["content"]
        if thinks and role == "assistant" and "</think>" in text:
            thought = text.split("</think>")[0].split("<think>")[-1].strip("\n")
            text = text.split("</think>")[-1].lstrip("\n")
        # Replies to earlier questions lose their thought. A reply that ends the conversation has
        # one even if it is empty.
        if thinks and role == "assistant" and i > last_user and (thought or i == len(messages) - 1):
            yield "<|im_start|>", "assistant\n"
            yield "<think>", f"\n{thought}\n"
            yield "</think>", "\n\n" + text.lstrip("\n")
        else:
            yield "<|im_start|>", f"{role}\n{text}"
        yield "<|im_end|>", "\n"
    yield "<|im_start|>", f"{reply_as}\n"
    if thinks:  # the non-thinking form: an empty thought that has ended
        yield "<think>", "\n\n"
        yield "</think>", "\n\n"


def with_system(messages, content):
    if messages and messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": content}, *messages]


SPEAKER_TAGS = {"user": "<|question|>", "assistant": "<|student|>"}
SPEAKER_TAGS |= {"teacher": "<|teacher|>", "narrator": "<|narrator|>"}
BUILTIN_SPECIAL = (*SPEAKER_TAGS.values(), "<|end|>")  # their ids follow the ranks, in this order


def wordproblems_chat(messages, reply_as):
    for message in messages:
        if message["role"] == "system":
            continue  # the tiny model has not learned to read instructions
        yield SPEAKER_TAGS[message["role"]], message["content"]
        if message["role"] != "user":
            yield "<|end|>", ""
    yield SPEAKER_TAGS[reply_as], ""


class Family(NamedTuple):
    markers: tuple[str, ...]  # the special tokens of its template, by which it is recognised
    end: str  # the one that ends a turn
    speakers: tuple[str, ...]  # the roles that can reply to a prompt
    template: Callable


LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML = ("<|im_start|>", "<|im_end|>")
FAMILIES = {
    "llama3": Family(LLAMA3, "<|eot_id|>", ("assistant",), llama3_chat),
    "chatml": Family(CHATML, "<|im_end|>", ("assistant",), chatml_chat),
    "wordproblems": Family(
        BUILTIN_SPECIAL, "<|end|>", ("assistant", "teacher", "narrator"), wordproblems_chat
    ),
}


def recognise(special: dict[str, int], published: str) -> str:
    """The name of the family whose markers are all special tokens.

    If there is a `published` template, one of the markers must also be in it.
    """
    for name, family in FAMILIES.items():
        has_all = special.keys() >= set(family.markers)
        is_used = not published or any(marker in published for marker in family.markers)
        if has_all and is_used:
            return name
    known = [f"{name} has {' '.join(family.markers)}" for name, family in FAMILIES.items()]
    found = "the special tokens and the chat template" if published else "the special tokens"
    raise ValueError(f"{found} belong to no known chat family ({'; '.join(known)})")


# Llama 3.1's template always writes this date, and 3.2's if it cannot ask for today's. Here it is
# fixed, so that runs repeat.
DATE_HEADER = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
# A default system message in a template: '<|im_start|>system\nYou are ...<|im_end|>'. The line
# break is written as \n or as itself.
DEFAULT_SYSTEM = re.compile(
    r"""(?s)(['"])<\|im_start\|>system(?:\\n|\n)((?:\\.|(?!\1)[^\\])+?)<\|im_end\|>"""
)
ALWAYS_THINKS = re.compile(r"<\|im_start\|>assistant(\\n|\n)<think>")


def variant(family: str, special: dict[str, int], published: str) -> dict:
    """How a model differs from others of its family: keyword arguments for the family's template.

    The published template's words show it or, if there is no template (""), the special tokens.
    """
    if family == "llama3":
        # tokenizer.model has the same names in every version. Without a template it gets no date,
        # as in Meta's own code.
        dated = "Cutting Knowledge Date" in published if published else "<|python_tag|>" in special
        return {"header": DATE_HEADER} if dated else {}
    if family != "chatml":
        return {}
    return variant_of_template(special, published) if published else variant_of_tokens(special)


def variant_of_template(special: dict[str, int], published: str) -> dict:
    thinks = "enable_thinking" in published
    lacks_tokens = thinks and not special.keys() >= {"<think>", "</think>"}
    if ALWAYS_THINKS.search(published) or lacks_tokens:
        raise ValueError("its chat template has no non-thinking form; use a model that has one")
    system = None
    if found := DEFAULT_SYSTEM.search(published):
        system = found[2].encode("ascii", "backslashreplace").decode("unicode-escape")
    return {"thinks": thinks, "system": system}


def variant_of_tokens(special: dict[str, int]) -> dict:
    if "<think>" in special:
        if "</think>" not in special:
            raise ValueError("it has the special token <think> but not </think>")
        return {"thinks": True}
    if "<tool_call>" in special:  # Qwen2.5
        return {"system": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."}
    if special.keys() == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}:  # Qwen2
        return {"system": "You are a helpful assistant."}
    return {}
