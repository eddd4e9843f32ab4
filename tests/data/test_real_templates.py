"""Chat templates of real model families: what is scored is what generation has to produce after what it is fed.

The templates are read where TRL's wheel has them. The reference is transformers' own rendering of the same messages; where a
template takes tool calls, parts or reasoning in one form only, all forms are tried here, independently of the code tested.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from simpo.data.settings import RenderSettings, TokenizeSettings
from simpo.data.supervised import prepare_sft
from simpo.data.tokenize import prepare
from simpo.errors import SimpoError

SPEC = importlib.util.find_spec("trl")
FOLDER = Path(SPEC.origin).parent / "chat_templates" if SPEC and SPEC.origin else Path("absent")
TEMPLATES = sorted(FOLDER.glob("*.jinja"))
pytestmark = pytest.mark.skipif(not TEMPLATES, reason="TRL's chat templates are not here")

TOKEN = re.compile(r"<[|｜]?/?[A-Za-z][\w▁./|｜-]*[|｜]?>|\[/?[A-Z][A-Z_]+\]|</s>|\[gMASK\]")
# As in Qwen's, GLM's and other tokenizers: the model's own markup, which is not special.
MARKUP = re.compile(r"</?(think|tool_call|tool_response|tools|arg_key|arg_value|function|parameter|parameters)>")

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name"}},
            "required": ["city"],
        },
    },
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def thought(text, reasoning):
    return assistant(text, reasoning_content=reasoning)


def inline(text, reasoning):
    return assistant(f"<think>\n{reasoning}\n</think>\n\n{text}")


CALLING = [
    user("Weather in Oslo?"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": "3 C and rain"},
    assistant("It is 3 C."),
]
TALK = [user("What is 2 and 2?"), assistant("It is 4."), user("And 3 and 3?"), assistant("It is 6.")]
CASES = {
    "single": (TALK[:2], None, {}),
    "multi": (TALK, None, {}),
    "system": ([{"role": "system", "content": "Be a pirate."}, *TALK], None, {}),
    "tools": (TALK, [TOOL], {}),
    "tool calls": (CALLING, [TOOL], {}),
    "call last": (CALLING[:2], [TOOL], {}),
    "thinking": ([TALK[0], thought("It is 4.", "Two plus two.")], None, {}),
    "thinking turns": (
        [TALK[0], thought("It is 4.", "Two plus two."), TALK[2], thought("It is 6.", "Three and three.")],
        None,
        {},
    ),
    "inline thinking": (
        [TALK[0], inline("It is 4.", "Two plus two."), TALK[2], inline("It is 6.", "Three and three.")],
        None,
        {},
    ),
    "thinking on": ([TALK[0], thought("It is 4.", "Two plus two.")], None, {"enable_thinking": True}),
    "thinking off": (TALK, None, {"enable_thinking": False}),
}


@cache
def base():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()


@cache
def tokenizer_of(path):
    template = path.read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_str(base())
    found = dict.fromkeys(["<bos>", "<eos>", *TOKEN.findall(template)])
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in found if not MARKUP.fullmatch(text)])
    tokenizer.add_tokens([AddedToken(text, special=False) for text in found if MARKUP.fullmatch(text)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", chat_template=template
    )


def forms(messages):
    """The same messages in every form that some template wants."""
    for as_text, absent, key, parts in product((False, True), (None, "", ...), ("", "thinking", "inline"), (False, True)):
        found = copy.deepcopy(messages)
        for message in found:
            for call in message.get("tool_calls", []):
                if as_text:
                    call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
            if message.get("tool_calls") and not message.get("content"):
                message["content"] = absent
                if absent is ...:
                    del message["content"]
            if key and "reasoning_content" in message:
                reasoning = message.pop("reasoning_content")
                if key == "inline":
                    message["content"] = f"<think>\n{reasoning}\n</think>\n\n{message['content']}"
                else:
                    message[key] = reasoning
            if parts and isinstance(message.get("content"), str):
                message["content"] = [{"type": "text", "text": message["content"]}]
        yield found


def rendered(tokenizer, messages, tools, kwargs, **options):
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **kwargs, **options)
    except Exception:
        return None


def pieces(message):
    """What has to be in the rendering of an answer."""
    found = [message["content"] or ""]
    if "reasoning_content" in message:
        found.append(message["reasoning_content"])
    if found[0].startswith("<think>"):
        found = re.fullmatch(r"<think>\n(.*)\n</think>\n\n(.*)", found[0], re.DOTALL).groups()
    for call in message.get("tool_calls", []):
        found = [*found, call["function"]["name"], *call["function"]["arguments"].values()]
    return [text for text in found if text]


def reference(tokenizer, messages, tools, kwargs):
    """Per answer: the prompt that generation is fed, and whole conversations that show all of the answer."""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        shown = pieces(message)
        context = [m for m in messages[:i]]
        said = [m["content"] for m in context if m["role"] != "assistant"]
        calls = [text for m in context if m.get("tool_calls") for text in pieces(m)]
        prompts, wholes = {}, []
        for form in forms(messages[: i + 1]):
            prompt = rendered(tokenizer, form[:i], tools, kwargs, add_generation_prompt=True)
            if prompt is None or not all(text in prompt for text in said):
                continue
            prompts.setdefault(all(text in prompt for text in calls), prompt)
            whole = rendered(tokenizer, form, tools, kwargs)
            if whole is not None and all(text in whole[len(os_prefix(prompt, whole)) :] for text in shown):
                wholes.append((prompt, whole))
        yield i, prompts.get(True) or prompts.get(False), wholes


def os_prefix(a, b):
    import os

    return os.path.commonprefix([a, b])


def sequences(tokenizer, messages, tools, kwargs, kind):
    """Prompts with the scored text that follows, as the code tested gives them."""
    columns = {"chat_template_kwargs": json.dumps(kwargs)} if kwargs else {}
    if tools:
        columns["tools"] = json.dumps(tools)

    def text(ids):
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    if kind == "sft":
        row = {"messages": messages}
        rows = prepare_sft(as_rows(row | columns), tokenizer, TokenizeSettings()).dataset
        for row in rows:
            ids, marks = row["response_ids"][0], row["scored"][0]
            start = 0
            while start < len(ids):
                if not marks[start]:
                    start += 1
                    continue
                end = next((k for k in range(start, len(ids)) if not marks[k]), len(ids))
                yield text(row["prompt_ids"] + ids[:start]), text(ids[start:end]), ids[start:end]
                start = end
    else:
        row = {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": [assistant("No idea.")]}
        found = prepare(as_rows(row | columns), tokenizer, TokenizeSettings()).dataset[0]
        yield text(found["prompt_ids"]), text(found["response_ids"][0]), found["response_ids"][0]


def as_rows(row):
    return Dataset.from_dict({"_row": [json.dumps(row)], "_where": ["row 0"]})
