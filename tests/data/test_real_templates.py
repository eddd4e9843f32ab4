"""Chat templates of real model families: what is scored equals what generation must produce after its prompt.

The templates come from TRL's wheel. The reference is transformers' own rendering of the same messages. Where a template
accepts tool calls, parts or reasoning in only one form, all forms are tried here, independently of the code under
test.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from simpo.data.chat_template import ChatTemplate
from simpo.data.settings import RenderSettings, TokenizeSettings
from simpo.data.tokenizing import Comparisons, Conversations

SPEC = importlib.util.find_spec("trl")
FOLDER = Path(SPEC.origin).parent / "chat_templates" if SPEC and SPEC.origin else Path("absent")
TEMPLATES = sorted(path for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))
pytestmark = pytest.mark.skipif(not TEMPLATES, reason="TRL's chat templates are not available")

TOKEN = re.compile(r"<[|｜]?/?[A-Za-z][\w▁./|｜-]*[|｜]?>|\[/?[A-Z][A-Z_]+\]|</s>|\[gMASK\]")  # noqa: RUF001
# In Qwen's, GLM's and other tokenizers, the model's own markup is not special.
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
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=template,
        name_or_path=path.stem,
    )


def forms(messages):
    """Return the same messages in every form that some template needs."""
    calls = any("tool_calls" in message for message in messages)
    reasons = any("reasoning_content" in message for message in messages)
    for parts, as_text, absent, key in product(
        (False, True),
        (False, True)[: 1 + calls],
        (None, "", ...)[: 1 + 2 * calls],
        (None, "thinking", "<think>")[: 1 + 2 * reasons],
    ):
        found = copy.deepcopy(messages)
        for message in found:
            for call in message.get("tool_calls", []):
                if as_text:
                    call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
            if message.get("tool_calls"):
                message["content"] = absent
                if absent is ...:
                    del message["content"]
            if key and "reasoning_content" in message:
                reasoning = message.pop("reasoning_content")
                if key == "thinking":
                    message[key] = reasoning
                else:
                    message["content"] = f"<think>\n{reasoning}\n</think>\n\n{message['content']}"
            if parts and isinstance(message.get("content"), str):
                message["content"] = [{"type": "text", "text": message["content"]}]
        yield key, found


def rendered(tokenizer, messages, tools, kwargs, **options):
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **kwargs, **options)
    except Exception:
        return None


def pieces(message):
    """Return the strings that the rendering of an answer must contain."""
    found = [message["content"] or "", message.get("reasoning_content", "")]
    if found[0].startswith("<think>"):
        found = re.fullmatch(r"<think>\n(.*)\n</think>\n\n(.*)", found[0], re.DOTALL).groups()
    for call in message.get("tool_calls", []):
        found = [*found, call["function"]["name"], *call["function"]["arguments"].values()]
    return [text for text in found if text]


def reference(tokenizer, messages, tools, kwargs):
    """Return, per answer, the prompt for generation and what follows it in each form that shows the whole answer.

    A rendering that does not begin with the prompt is None. A form with tags in the content only counts for templates
    that know these tags.
    """
    found = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        texts = [m["content"] for m in messages[:i] if m["role"] != "assistant"]
        calls = [text for m in messages[:i] if m.get("tool_calls") for text in pieces(m)]
        prompts, rests = {}, []
        for key, form in forms(messages[: i + 1]):
            prompt = rendered(tokenizer, form[:i], tools, kwargs, add_generation_prompt=True)
            if prompt is None or not all(text in prompt for text in texts):
                continue
            prompts.setdefault(all(text in prompt for text in calls), prompt)
            whole = rendered(tokenizer, form, tools, kwargs)
            if whole is None or (key == "<think>" and "</think>" not in tokenizer.chat_template):
                continue
            start = len(os.path.commonprefix([prompt, whole]))  # noqa: RUF071 - texts
            if all(text in whole[start:] for text in pieces(message)):
                rests.append(whole[len(prompt) :] if whole.startswith(prompt) else None)
        found.append((message, prompts.get(True) or prompts.get(False), rests))
    return found


def columns_of(tokenization, rows):
    return tokenization({"_row": [json.dumps(row) for row in rows], "_where": ["row"] * len(rows)}, range(len(rows)))


def answers(tokenizer, messages, tools, kwargs, kind):
    """Return prompts with the ids scored after them, as produced by the code under test, or why the row is rejected."""
    extra = {"chat_template_kwargs": kwargs} if kwargs else {}
    extra |= {"tools": tools} if tools else {}
    if kind == "pairs":
        row = {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": [assistant("No idea.")]}
        found = columns_of(Comparisons(tokenizer, TokenizeSettings(), "train"), [row | extra])
    else:
        found = columns_of(Conversations(tokenizer, TokenizeSettings(), "train"), [{"messages": messages} | extra])
    if bad := [entry for entry in found["_status"][0] if entry.startswith("bad: ")]:
        return bad[0]
    whole = []
    for k, (prompt, responses) in enumerate(zip(found["prompt_ids"], found["response_ids"], strict=True)):
        marks = [True] * len(responses[0]) if kind == "pairs" else found["scored"][k][0]
        places = [place for place in range(len(marks)) if marks[place] and (not place or not marks[place - 1])]
        for start in places:
            end = next((place for place in range(start, len(marks)) if not marks[place]), len(marks))
            whole.append((prompt + responses[0][:start], responses[0][start:end]))
    return whole


def check(tokenizer, expected, found):
    """Assert that the answers found are the expected ones."""

    def text(ids):
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    assert len(found) == len(expected)
    for (message, fed, rests), (prompt, ids) in zip(expected, found, strict=True):
        answer = text(ids)
        assert text(prompt) == fed
        for piece in pieces(message):
            assert piece in answer or json.dumps(piece)[1:-1] in answer
        assert answer.count("</think>") <= 1
        ends = [token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special]
        assert ids[-1] in ends
        # Qwen3.8's template closes the reasoning before writing the tags in the content, so there would be two.
        tagged = str(message["content"]).startswith("<think>") and tokenizer.name_or_path == "qwen3_8"
        if rests and None not in rests and not tagged:
            ours = answer.removesuffix(tokenizer.eos_token)
            assert any(rest.startswith(answer) or rest.rstrip() == ours.rstrip() for rest in rests)


@pytest.mark.parametrize("kind", ["sft", "pairs"])
def test_scored_answers_match_real_templates(kind, capsys):
    counts = Counter()
    for path in TEMPLATES:
        tokenizer = tokenizer_of(path)
        for name, (messages, tools, kwargs) in CASES.items():
            expected = references(path, name)[-1 if kind == "pairs" else 0 :]
            found = answers(tokenizer, messages, tools, kwargs, kind)
            if isinstance(found, str):
                possible = all(prompt is not None and rests for _, prompt, rests in expected)
                closed = any(prompt and re.search(r"<think>\s*</think>\s*$", prompt) for _, prompt, _ in expected)
                assert not possible or ("thinking" in name and closed), f"{path.stem}, {name}: {found}"
                counts[f"refused: {found.removeprefix('bad: ')[:60]}"] += 1
                continue
            try:
                check(tokenizer, expected, found)
            except AssertionError as error:
                raise AssertionError(f"{path.stem}, {name}") from error
            counts["correct"] += 1
    with capsys.disabled():
        print(
            f"\n{kind}: {sum(counts.values())} cases",
            *(f"  {n:4} {what}" for what, n in counts.most_common()),
            sep="\n",
        )
    assert counts["correct"] > 8 * len(TEMPLATES)


@cache
def references(path, name):
    return reference(tokenizer_of(path), *CASES[name])


# ---- token text in any field ----


def calling(call=None, tool=None, answer=None):
    """Return a conversation with a tool call that has other fields than ``CALLING``."""
    asked = [user("Weather in Oslo?"), {"role": "assistant", "content": None, "tool_calls": [CALL | (call or {})]}]
    return [*asked, CALLING[2] | (answer or {}), CALLING[3]], [{**TOOL, "function": TOOL["function"] | (tool or {})}]


def with_text(text):
    """Return messages and tools for each field that holds ``text``."""
    function = CALL["function"]
    return {
        "user": ([user(text), TALK[1]], None),
        "assistant": ([TALK[0], assistant(text)], None),
        "system": ([{"role": "system", "content": text}, *TALK], None),
        "part": ([user([{"type": "text", "text": text}]), TALK[1]], None),
        "role": ([{"role": text, "content": "Hi."}, *TALK], None),
        "name": ([user("Hi.") | {"name": text}, TALK[1]], None),
        "reasoning": ([TALK[0], thought("It is 4.", text)], None),
        "thinking": ([TALK[0], assistant("It is 4.", thinking=text)], None),
        "called": calling(call={"function": function | {"name": text}}),
        "argument": calling(call={"function": function | {"arguments": {"city": text}}}),
        "argument name": calling(call={"function": function | {"arguments": {text: "Oslo"}}}),
        "arguments as text": calling(call={"function": function | {"arguments": json.dumps({"city": text})}}),
        "call id": calling(call={"id": text}),
        "result": calling(answer={"content": text}),
        "result's tool": calling(answer={"name": text}),
        "description": calling(tool={"description": text}),
        "tool": calling(tool={"name": text}),
    }


def added_ids(tokenizer, found):
    return [[number for number in (*prompt, *ids) if number in tokenizer.added_tokens_decoder] for prompt, ids in found]


def recognized(template, token):
    """Return whether the template searches texts for a token, which makes it more than text."""
    quoted = rf"['\"](\\n)*{re.escape(token)}(\\n)*['\"]"
    return re.search(rf"\(\s*{quoted}|{quoted}\s+(not\s+)?in\b", template) is not None


@pytest.mark.parametrize(
    "paths", [pytest.param(TEMPLATES[::8], id="some"), pytest.param(TEMPLATES, id="all", marks=pytest.mark.exhaustive)]
)
def test_token_text_stays_text_in_every_field(paths):
    """The row has the same special and structural tokens as with harmless text, or both rows are rejected."""
    compared = 0
    for path in paths:
        tokenizer = tokenizer_of(path)
        template = tokenizer.chat_template
        tokens = [
            token for token in dict.fromkeys(["<eos>", *TOKEN.findall(template)]) if not recognized(template, token)
        ]
        markup = [token for token in tokens if MARKUP.fullmatch(token)]
        for token in [*[token for token in tokens if token not in markup][:2], *markup[:1]]:
            plain = with_text("aXb")
            for field, (messages, tools) in with_text(f"a{token}b").items():
                if field == "assistant" and token in markup:
                    continue  # an answer may write these as tokens: docs/data-formats.md
                found, expected = (answers(tokenizer, *row, {}, "sft") for row in ((messages, tools), plain[field]))
                if isinstance(found, str) or isinstance(expected, str):
                    assert isinstance(found, str) and isinstance(expected, str), f"{path.stem}, {token}, {field}"
                    continue
                assert added_ids(tokenizer, found) == added_ids(tokenizer, expected), f"{path.stem}, {token}, {field}"
                compared += 1
    assert compared > 20 * len(paths)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3", {"enable_thinking"}),
        ("qwen3_5_think", {"add_vision_id", "enable_thinking"}),
        ("deepseekv3", set()),
        ("gptoss", {"builtin_tools", "model_identity", "reasoning_effort"}),
        ("llama3_2", {"custom_tools", "date_string", "tools_in_user_message"}),
    ],
)
def test_template_options_are_the_documented_ones(name, expected):
    """Variables that a template assigns itself are not options, such as Qwen3's content and reasoning_content."""
    tokenizer = tokenizer_of(FOLDER / f"{name}.jinja")
    assert ChatTemplate(tokenizer, RenderSettings()).options - {"bos_token"} == expected
