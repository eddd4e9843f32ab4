"""Everything in a row besides its texts reaches the template, is rejected by name, or is counted."""

from __future__ import annotations

import json
import resource
import signal
import time

import pytest
from datasets import Dataset
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from simpo.data.prompts import prepare_prompts
from simpo.data.settings import RenderSettings, TokenizeSettings
from simpo.data.sources import load_rows
from simpo.data.tokenizing import UNANSWERED_CUT, prepare, prepare_sft
from simpo.errors import SimpoError

TOOL_CHAT = (
    "{% if shout %}{{ '!' }}{% endif %}{% if tools %}{{ '<|im_start|>tools\n' }}"
    "{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m.reasoning_content and loop.last %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function.name }}"
    "{% for k, v in c.function.arguments.items() %}{{ ' ' + k + '=' + (v | tojson) }}{% endfor %}{{ '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def user(text, **more):
    return {"role": "user", "content": text, **more}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(arguments, **more):
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}, **more}


def pair(chosen="It is 3 C.", **more):
    chosen = chosen if isinstance(chosen, dict) else assistant(chosen)
    return {"prompt": [user("Weather?")], "chosen": [chosen], "rejected": [assistant("No idea.")], **more}


@pytest.fixture
def tokenizer(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    tokenizer.add_tokens(
        [AddedToken(text, special=False) for text in ("<think>", "</think>", "<tool_call>", "</tool_call>")]
    )
    tokenizer.chat_template = TOOL_CHAT
    return tokenizer


def json_rows(*rows):
    return Dataset.from_dict(
        {"_row": [json.dumps(row) for row in rows], "_where": [f"rows.jsonl:{n}" for n in range(1, len(rows) + 1)]}
    )


def text(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def generation_prompt(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)


def pairs(tokenizer, *rows, **settings):
    prepared = prepare(json_rows(*rows), tokenizer, TokenizeSettings(**settings))
    texts = [
        (text(tokenizer, row["prompt_ids"]), [text(tokenizer, ids) for ids in row["response_ids"]])
        for row in prepared.dataset
    ]
    return texts, prepared.report


def conversations(tokenizer, *rows, **settings):
    """Return the prompt and scored text of every sequence, and the report."""
    prepared = prepare_sft(json_rows(*rows), tokenizer, TokenizeSettings(**settings))
    texts = [
        (
            text(tokenizer, row["prompt_ids"]),
            text(tokenizer, [i for i, mark in zip(row["response_ids"][0], row["scored"][0], strict=True) if mark]),
        )
        for row in prepared.dataset
    ]
    return texts, prepared.report


# ---- columns ----


@pytest.mark.parametrize("prompt", ["Hi?", [user("Hi?")], "\n\nHuman: Hi?\n\nAssistant:"], ids=["text", "list", "hh"])
def test_a_system_column_becomes_the_system_message(tokenizer, prompt):
    row = {"system": "Be brief.", "prompt": prompt, "chosen": "Yes.", "rejected": "No."}
    expected = generation_prompt(tokenizer, [{"role": "system", "content": "Be brief."}, user("Hi?")])
    assert pairs(tokenizer, row)[0] == [(expected, ["Yes.<|im_end|>", "No.<|im_end|>"])]
    for nothing in ("", None):
        assert pairs(tokenizer, row | {"system": nothing})[0][0][0] == generation_prompt(tokenizer, [user("Hi?")])
    (prompt,) = prepare_prompts(json_rows({"system": "Be brief.", "prompt": prompt}), tokenizer)
    assert text(tokenizer, prompt.ids) == expected
    completion = {"system": "Be brief.", "prompt": "Hi?", "completion": "Yes."}
    assert conversations(tokenizer, completion)[0] == [(expected, "Yes.<|im_end|>")]


def test_equal_system_column_and_message_are_merged(tokenizer):
    system = {"role": "system", "content": "Be brief."}
    row = pair(system="Be brief.") | {"prompt": [system, user("Hi?")]}
    assert pairs(tokenizer, row)[0][0][0] == generation_prompt(tokenizer, [system, user("Hi?")])
    with pytest.raises(SimpoError, match=r"rows.jsonl:1: the column system differs"):
        pairs(tokenizer, row | {"system": "Be long."})


@pytest.mark.parametrize("given", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]], ids=["list", "text", "texts"])
def test_tools_reach_the_template(tokenizer, given):
    expected = generation_prompt(tokenizer, [user("Weather?")], tools=[TOOL])
    assert "weather" in expected
    assert pairs(tokenizer, pair(tools=given))[0][0][0] == expected
    in_message = pair() | {"prompt": [{"role": "system", "content": None, "tools": given}, user("Weather?")]}
    assert pairs(tokenizer, in_message)[0][0][0] == expected
    (prompt,) = prepare_prompts(json_rows({"prompt": "Weather?", "tools": given}), tokenizer)
    assert text(tokenizer, prompt.ids) == expected
    assert prompt.context.columns == {"tools": [TOOL]}


def test_the_same_prompt_with_different_tools_is_a_different_prompt(tokenizer):
    rows = json_rows({"prompt": "Hi?"}, {"prompt": "Hi?", "tools": [TOOL]}, {"prompt": "Hi?", "tools": []})
    found = prepare_prompts(rows, tokenizer)
    assert len({prompt.id for prompt in found}) == len(found) == 2


def test_row_variables_take_precedence_over_the_recipes(tokenizer):
    rendering = RenderSettings({"shout": True})
    found, _ = pairs(tokenizer, pair(), pair(chat_template_kwargs={"shout": False}), rendering=rendering)
    assert [prompt.startswith("!") for prompt, _ in found] == [True, False]
    found, _ = pairs(tokenizer, pair(chat_template_kwargs='{"shout": true}'))
    assert found[0][0].startswith("!")


def test_variables_the_template_never_reads_are_rejected_or_counted(tokenizer):
    with pytest.raises(SimpoError, match=r"^chat_template_kwargs: .* never reads 'shuot'; it reads .*shout"):
        pairs(tokenizer, pair(), rendering=RenderSettings({"shuot": True}))
    _, report = pairs(tokenizer, pair(chat_template_kwargs={"shuot": True}))
    assert report.ignored == {"variable 'shuot', which the chat template never reads": 1}
    for name in ("tools", "messages", "tokenize"):
        with pytest.raises(SimpoError, match=rf"^chat_template_kwargs: '{name}'"):
            RenderSettings({name: True})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (pair(images=["a.png"]), "images, but there is no processor"),
        (
            pair({"role": "assistant", "content": [{"type": "image_url", "image_url": "a"}]}),
            "content part of type 'image_url'",
        ),
        (pair(tools="[{"), "tools is text that is neither JSON"),
        (pair(tools={"a": 1}), "tools is dict, not a list"),
        (pair(system=1), "system is int, not text"),
        (pair(chat_template_kwargs={"tools": []}), "chat_template_kwargs has 'tools'"),
        (pair(assistant("Hm.", weight=0)), "chosen ends with a message that is not trained on"),
        (pair(assistant("Hm.", weight=0.5)), "weight: 0.5; only 0 and 1"),
        (pair(assistant("Hm.", tool_calls=[{"function": {}}])), "a tool call without a function name"),
    ],
)
def test_unsupported_content_makes_a_bad_row(tokenizer, row, reason):
    with pytest.raises(SimpoError, match=r"rows.jsonl:1: ") as error:
        pairs(tokenizer, row)
    assert reason in str(error.value)


def test_columns_and_keys_without_effect_are_counted(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    row = pair(tools=[TOOL], weight=0.3) | {"prompt": [user("Weather?", name="alice")]}
    found, report = pairs(tokenizer, row)
    assert found[0][0] == generation_prompt(tokenizer, [user("Weather?")])
    assert report.ignored == {
        "column 'weight', which has no effect": 1,
        "tools, which the chat template does not render": 1,
        "message key 'name', which the chat template never reads": 1,
    }
    assert ("data/train/ignored", 3) in report.metrics()


# ---- tool calls ----


@pytest.mark.parametrize("absent", [{"content": None}, {"content": ""}, {}], ids=["null", "empty", "missing"])
@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'], ids=["object", "text"])
def test_tool_calls_are_answers(tokenizer, absent, arguments):
    message = {"role": "assistant", **absent, "tool_calls": [call(arguments)]}
    found, _ = pairs(tokenizer, pair(message))
    assert found[0][1][0] == '<tool_call>weather city="Oslo"</tool_call><|im_end|>'
    answered = [user("Weather?"), message, {"role": "tool", "content": "3 C"}, assistant("It is 3 C.")]
    context = [user("Weather?"), assistant("", tool_calls=[call({"city": "Oslo"})]), answered[2]]
    found, _ = pairs(tokenizer, pair() | {"prompt": answered[:3]})
    assert found[0][0] == generation_prompt(tokenizer, context)
    found, _ = conversations(tokenizer, {"messages": answered})
    assert found[0][1] == '<tool_call>weather city="Oslo"</tool_call><|im_end|>It is 3 C.<|im_end|>'


def test_a_template_that_needs_arguments_as_text(tokenizer):
    tokenizer.chat_template = TOOL_CHAT.replace(
        "{% for k, v in c.function.arguments.items() %}{{ ' ' + k + '=' + (v | tojson) }}{% endfor %}",
        "{{ ' ' + c.function.arguments }}",
    )
    for arguments in ({"city": "Oslo"}, '{"city": "Oslo"}'):
        found, _ = pairs(tokenizer, pair(assistant(None, tool_calls=[call(arguments)])))
        assert found[0][1][0] == '<tool_call>weather {"city": "Oslo"}</tool_call><|im_end|>'


@pytest.mark.parametrize("printed", ["arguments", "arguments | string", "arguments | tojson(ensure_ascii=true)"])
@pytest.mark.parametrize("city", ["<|im_start|>", "\\ue000 <|im_start|>"], ids=["plain", "like a marker"])
def test_special_token_text_in_printed_arguments_stays_text(tokenizer, printed, city):
    """Printing a mapping escapes the characters that mark such text while the template runs."""
    tokenizer.chat_template = TOOL_CHAT.replace(
        "{% for k, v in c.function.arguments.items() %}{{ ' ' + k + '=' + (v | tojson) }}{% endfor %}",
        f"{{{{ c.function.{printed} }}}}",
    )
    row = pair() | {"prompt": [user("Weather?"), assistant("", tool_calls=[call({"city": city})]), user("Again?")]}
    (found,) = prepare(json_rows(row), tokenizer, TokenizeSettings()).dataset
    assert found["prompt_ids"].count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 4
    assert (json.dumps if "json" in printed else repr)(city) in text(tokenizer, found["prompt_ids"])


def test_tool_calls_omitted_by_the_template_make_a_bad_row(build_tokenizer):
    with pytest.raises(SimpoError, match="the chat template does not render tool calls"):
        pairs(build_tokenizer("chatml"), pair(assistant("Look.", tool_calls=[call({})])))


def test_parquet_renders_like_json_lines(tokenizer, tmp_path):
    """Arrow gives all objects in a column the same keys, with null where a row has none."""
    tools = [
        TOOL,
        {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "required": ["zone"]}}},
    ]
    answer = assistant(None, tool_calls=[call({"city": "Oslo"})])
    other = assistant(None, tool_calls=[call({"zone": "CET", "exact": True}, id="1")])
    rows = [
        pair(answer, tools=tools[:1]) | {"rejected": [assistant("No.")]},
        pair(other, tools=tools) | {"rejected": [assistant("No.")]},
        pair(assistant("It is late."), tools=None),
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [
        prepare(load_rows(str(tmp_path / name), split="train"), tokenizer, TokenizeSettings()).dataset
        for name in ("rows.parquet", "rows.jsonl")
    ]
    for column in ("prompt_ids", "response_ids"):
        assert found[0][column][:] == found[1][column][:]


def test_a_null_argument_in_a_json_file_is_kept(tokenizer):
    for arguments in ({"city": None}, '{"city": null}'):
        found, _ = pairs(tokenizer, pair(assistant(None, tool_calls=[call(arguments)])))
        assert found[0][1][0] == "<tool_call>weather city=null</tool_call><|im_end|>"


# ---- what is trained on ----


@pytest.mark.parametrize(
    "key", [{"weight": 0}, {"train": False}, {"weight": 0.0}, {"train_on_turn": False}, {"loss": False}]
)
def test_a_turn_with_weight_zero_is_context(tokenizer, key):
    messages = [user("Hi?"), assistant("WRONG", **key), user("No."), assistant("Right.", weight=1), user("Ok.")]
    found, report = conversations(tokenizer, {"messages": messages})
    context = [user("Hi?"), assistant("WRONG"), user("No.")]
    assert found == [(generation_prompt(tokenizer, context), "Right.<|im_end|>")]
    assert report.cut == {UNANSWERED_CUT: 1}
    last = [user("Hi?"), assistant("Right."), user("And?"), assistant("WRONG", **key)]
    found, report = conversations(tokenizer, {"messages": last})
    assert found == [(generation_prompt(tokenizer, last[:1]), "Right.<|im_end|>")]
    assert report.cut == {UNANSWERED_CUT: 1}
    with pytest.raises(SimpoError, match="no answer to train on"):
        conversations(tokenizer, {"messages": [user("Hi?"), assistant("WRONG", **key)]})
    with pytest.raises(SimpoError, match="only answers are trained on"):
        conversations(tokenizer, {"messages": [user("Hi?", weight=1), assistant("Right.")]})


# ---- what a template drops ----


def test_a_conversation_is_split_if_earlier_answers_are_rendered_differently(tokenizer):
    messages = [
        user("2 and 2?"), assistant("4", reasoning_content="Two and two."),
        user("3 and 3?"), assistant("6", reasoning_content="Three and three."),
    ]  # fmt: skip
    found, report = conversations(tokenizer, {"messages": messages}, {"messages": messages[:2]})
    assert found == [
        (generation_prompt(tokenizer, messages[:1]), "<think>Two and two.</think>4<|im_end|>"),
        (generation_prompt(tokenizer, messages[:3]), "<think>Three and three.</think>6<|im_end|>"),
        (generation_prompt(tokenizer, messages[:1]), "<think>Two and two.</think>4<|im_end|>"),
    ]
    assert (report.rows, report.used, list(report.split.values())) == (2, 3, [1])
    assert report.lines()[0] == "train: 3 conversations of 2 rows"
    # Reasoning under a different key is rendered the same way.
    renamed = [
        {("thinking" if key == "reasoning_content" else key): value for key, value in m.items()} for m in messages
    ]
    assert conversations(tokenizer, {"messages": renamed})[0] == found[:2]


def test_reasoning_unknown_to_the_template_is_not_lost(build_tokenizer):
    with pytest.raises(SimpoError, match=r"rows.jsonl:1: the chat template does not render the reasoning"):
        pairs(build_tokenizer("chatml"), pair(assistant("4", reasoning_content="Two and two.")))


def test_unfinished_reasoning_makes_a_bad_row(tokenizer, build_tokenizer):
    """It occurs in truncated samples, and the template would put an empty reasoning block before it."""
    with pytest.raises(SimpoError, match=r"rows.jsonl:1: reasoning does not end"):
        pairs(tokenizer, pair("<think>\nTwo and"))
    earlier = [user("2 and 2?"), assistant("<think>\nTwo and"), user("Go on.")]  # context is not scored
    assert pairs(tokenizer, pair(prompt=earlier))[0][0][0] == generation_prompt(tokenizer, earlier)
    assert prepare_prompts(json_rows({"prompt": earlier}), tokenizer).prompts[0].content == earlier
    plain = build_tokenizer("chatml")  # its template does not know reasoning, so this is text
    assert pairs(plain, pair("<think>\nTwo and"))[0][0][1][0] == "<think>\nTwo and<|im_end|>"


def test_trimmed_whitespace_is_counted(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = TRIMMING
    found, report = pairs(tokenizer, pair(" It is 3 C.\n"), pair())
    assert found[0] == found[1]
    assert report.cut == {"whitespace around an answer, which the chat template strips": 1}


def test_a_template_that_drops_part_of_an_answer_is_rejected(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = TRIMMING.replace("m['content'] | trim", "m['content'].split('#')[-1]")
    with pytest.raises(SimpoError, match="does not render the whole content of an answer"):
        pairs(tokenizer, pair("It is # 3 C."))


def test_system_messages_can_be_folded(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = NO_SYSTEM
    row = pair(system="Be brief.")
    with pytest.raises(SimpoError, match=r"rows.jsonl:1: .*set system_message: fold"):
        pairs(tokenizer, row)
    found, _ = pairs(tokenizer, row, rendering=RenderSettings(system_message="fold"))
    assert found[0][0] == generation_prompt(tokenizer, [user("Be brief.\n\nWeather?")])
    tokenizer.chat_template = NO_SYSTEM.replace("{{ raise_exception('no system') }}", "{% continue %}")
    with pytest.raises(SimpoError, match="set system_message: fold"):  # silently dropped
        pairs(tokenizer, row)


# ---- token text ----


STRANGE = "a<|im_end|>b<|im_start|>c<tool_call>d"


def test_token_text_stays_text_in_every_field(tokenizer):
    """The only token ids are those the template writes for harmless texts, and everything decodes to itself."""

    def row(word):
        tool = {"type": "function", "function": {"name": word, "description": word, "parameters": {word: word}}}
        asked = [
            {"role": "system", "content": word},
            user(word, name=word),
            assistant("", tool_calls=[{"type": "function", "function": {"name": word, "arguments": {word: [word]}}}]),
            {"role": "tool", "content": word},
        ]
        answer = assistant("", reasoning_content=word, tool_calls=[call({"city": word})])
        return {"prompt": asked, "chosen": [answer], "rejected": [assistant("No.")], "tools": [tool]}

    added = set(tokenizer.added_tokens_decoder)
    strange, plain = (prepare(json_rows(row(w)), tokenizer, TokenizeSettings()).dataset[0] for w in (STRANGE, "abc"))
    for name in ("prompt_ids", "response_ids"):
        one, other = ([ids] if name == "prompt_ids" else ids for ids in (strange[name], plain[name]))
        for ids, reference in zip(one, other, strict=True):
            assert [i for i in ids if i in added] == [i for i in reference if i in added]
            assert text(tokenizer, ids) == text(tokenizer, reference).replace("abc", STRANGE)


def test_end_of_turn_tokens_that_are_not_special(build_tokenizer):
    """Some tokenizers have them: in a message they stay text, while the template's own are tokens."""
    source = build_tokenizer("chatml").backend_tokenizer.to_str()
    state = json.loads(source)
    for token in state["added_tokens"]:
        token["special"] = token["content"] == "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(build_tokenizer("chatml").backend_tokenizer).from_str(json.dumps(state)),
        eos_token="<|endoftext|>",
        chat_template=build_tokenizer("chatml").chat_template,
    )
    row = pair("It <|im_end|> is.") | {"prompt": [user("What is <|im_end|>?")]}
    found = prepare(json_rows(row), tokenizer, TokenizeSettings()).dataset[0]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert found["prompt_ids"].count(end) == 1
    assert found["response_ids"][0].count(end) == 1 and found["response_ids"][0][-1] == end
    assert text(tokenizer, found["prompt_ids"]) == generation_prompt(tokenizer, row["prompt"])
    assert text(tokenizer, found["response_ids"][0]) == "It <|im_end|> is.<|im_end|>"


def test_the_models_own_markup_in_an_answer_becomes_tokens(tokenizer):
    row = pair("<think>Two.</think>4<tool_call>x</tool_call>")
    ids = prepare(json_rows(row), tokenizer, TokenizeSettings()).dataset[0]["response_ids"][0]
    for token in ("<think>", "</think>", "<tool_call>", "</tool_call>"):
        assert ids.count(tokenizer.convert_tokens_to_ids(token)) == 1


def test_words_added_to_the_vocabulary_stay_tokens(tokenizer):
    tokenizer.add_tokens(["Weather"])
    found = prepare(json_rows(pair()), tokenizer, TokenizeSettings()).dataset[0]
    assert tokenizer.convert_tokens_to_ids("Weather") in found["prompt_ids"]


def test_tokens_the_template_searches_for_stay_tokens(tokenizer):
    """Qwen's templates, for example, use them to tell tool results from questions."""
    tokenizer.add_tokens([AddedToken("<tool_response>", special=False)])
    found = "{% if m.content and m.content.startswith('<tool_response>') %}{{ 'result: ' }}{% endif %}"
    tokenizer.chat_template = TOOL_CHAT.replace("{% if m.content %}", found + "{% if m.content %}")
    asked = [user("Weather?"), assistant("Look."), user("<tool_response>3 C, <tool_call>")]
    row = prepare(json_rows(pair() | {"prompt": asked}), tokenizer, TokenizeSettings()).dataset[0]
    assert text(tokenizer, row["prompt_ids"]) == generation_prompt(tokenizer, asked)
    assert tokenizer.convert_tokens_to_ids("<tool_response>") in row["prompt_ids"]
    assert tokenizer.convert_tokens_to_ids("<tool_call>") not in row["prompt_ids"]


def test_variables_and_tools_require_a_template(build_tokenizer):
    plain_tokenizer = build_tokenizer("chatml")
    plain_tokenizer.chat_template = None
    row = {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}
    with pytest.raises(SimpoError, match="there is no chat template"):
        pairs(plain_tokenizer, row, rendering=RenderSettings({"enable_thinking": False}))
    with pytest.raises(SimpoError, match="tools, but the tokenizer has no chat template"):
        pairs(plain_tokenizer, row | {"tools": [TOOL]})


THINKING = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>' + m['content'] }}"
    "{% else %}{{ '<|im_end|></think>' + m['content'].split('</think>')[-1] + '<|endoftext|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_end|>' }}{{ '<think>' if thinking else '</think>' }}{% endif %}"
)


@pytest.mark.parametrize("answer_with_reasoning", [assistant("4", reasoning="Two."), assistant("<think>Two.</think>4")])
def test_a_template_that_opens_reasoning_only_in_prompts(build_tokenizer, answer_with_reasoning):
    """As in DeepSeek-V3.1: reasoning is never rendered, and an answer without any closes the block at once."""
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = THINKING
    bare = [user("2 and 2?"), assistant("4"), user("3 and 3?"), assistant("6")]
    found, report = conversations(tokenizer, {"messages": bare})
    assert found == [("<|im_start|>2 and 2?<|im_end|></think>", "4<|endoftext|>6<|endoftext|>")]
    thinking = RenderSettings({"thinking": True})
    found, report = conversations(
        tokenizer, {"messages": [bare[0], answer_with_reasoning, *bare[2:]]}, rendering=thinking
    )
    assert found == [
        ("<|im_start|>2 and 2?<|im_end|><think>", "Two.</think>4<|endoftext|>"),
        (
            "<|im_start|>2 and 2?<|im_end|></think>4<|endoftext|><|im_start|>3 and 3?<|im_end|><think>",
            "</think>6<|endoftext|>",
        ),
    ]
    assert list(report.split.values()) == [1]
    with pytest.raises(SimpoError, match="the generation prompt already closes it"):
        conversations(tokenizer, {"messages": [bare[0], answer_with_reasoning]})


def test_an_eos_that_always_follows_a_response_ends_the_turn(build_tokenizer):
    tokenizer = build_tokenizer("two-bos")  # its EOS is <|eot|>
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end_response|>"]})
    turn = (
        "{{ '[' + m['role'] + ']' + m['content'] }}{% if m['role'] == 'assistant' %}{{ '<|end_response|>' }}{% endif %}"
    )
    asked = "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{{{ eos_token }}}}{{% endfor %}}{asked}"
    found, _ = pairs(tokenizer, pair())
    assert found[0][1] == ["It is 3 C.<|end_response|><|eot|>", "No idea.<|end_response|><|eot|>"]
    messages = [user("Hi?"), assistant("A."), user("And?"), assistant("B.")]
    found, _ = conversations(tokenizer, {"messages": messages})
    assert [answer for _, answer in found] == ["A.<|end_response|><|eot|>B.<|end_response|><|eot|>"]
    # In Phi-3's template, an EOS after the last turn only ends the conversation.
    last = "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}{last}{asked}"
    assert pairs(tokenizer, pair())[0][0][1] == ["It is 3 C.<|end_response|>", "No idea.<|end_response|>"]


def test_an_omitted_message_is_detected_even_if_others_have_the_same_text(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    asked = [user("yes"), assistant("yes"), user("yes")]
    assert pairs(tokenizer, pair(prompt=asked))[0][0][0] == generation_prompt(tokenizer, asked)
    tokenizer.chat_template = tokenizer.chat_template.replace("for m in messages", "for m in messages[-2:]")
    with pytest.raises(SimpoError, match="does not render a message with role 'user'"):
        pairs(tokenizer, pair(prompt=asked))


def test_one_of_several_templates_is_chosen(build_tokenizer):
    """A tool template next to the default, as in Command R; without a default, no template is used."""
    tokenizer, tool = build_tokenizer("chatml"), {"type": "function", "function": {"name": "weather"}}
    plain = tokenizer.chat_template
    tokenizer.chat_template = {"default": plain, "tool_use": "{{ tools | tojson }}" + plain}
    found, _ = pairs(tokenizer, pair(tools=[tool]), pair())
    assert found[0][0] == json.dumps([tool]) + found[1][0]
    tokenizer.chat_template = {"tool_use": plain}
    with pytest.raises(SimpoError, match=r"^chat_template: .*tool_use"):
        pairs(tokenizer, pair())


def test_a_turn_whose_header_the_template_omits_makes_a_bad_row(build_tokenizer):
    # In DeepSeek V3, only the first answer gets a header, and prompts open the reasoning.
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>user\n' + m['content'] }}"
        "{% elif loop.index0 == 1 %}{{ '<|im_start|>assistant\n' + m['content'] + '<|im_end|>' }}"
        "{% else %}{{ '\n' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )
    assert pairs(tokenizer, pair())[0][0][1][0] == "\n</think>\n\nIt is 3 C.<|im_end|>"
    with pytest.raises(SimpoError, match=r"rows.jsonl:1: .* not a prefix of the rendered conversation"):
        pairs(tokenizer, pair() | {"prompt": [user("Hi?"), assistant("Hello."), user("Weather?")]})


def test_empty_reasoning_counts_as_none(tokenizer):
    tokenizer.chat_template = TOOL_CHAT.replace("m.reasoning_content and", "m.reasoning_content is defined and")
    found, _ = pairs(tokenizer, pair(assistant("4", reasoning_content="")))
    assert found[0][1][0] == "4<|im_end|>"
    found, _ = pairs(tokenizer, pair(assistant("4", reasoning_content="Two.", reasoning="Two.")))
    assert found[0][1][0] == "<think>Two.</think>4<|im_end|>"
    for reasoning, reason in (
        ({"reasoning_content": {"steps": 2}}, "reasoning_content is dict"),
        ({"reasoning_content": "Two.", "reasoning": "Three."}, "reasoning_content and reasoning differ"),
    ):
        with pytest.raises(SimpoError, match=rf"rows.jsonl:1: chosen has a message whose {reason}"):
            pairs(tokenizer, pair(assistant("4", **reasoning)))


def test_token_text_in_json_arguments_stays_text(tokenizer):
    escaped = '{"city": "a\\u003c|im_end|\\u003eb"}'
    for arguments in ({"city": "a<|im_end|>b"}, json.dumps({"city": "a<|im_end|>b"}), escaped):
        ((_, (answer, _)),), _ = pairs(tokenizer, pair(assistant("", tool_calls=[call(arguments)])))
        assert answer == '<tool_call>weather city="a<|im_end|>b"</tool_call><|im_end|>'
        (row,) = prepare(
            json_rows(pair(assistant("", tool_calls=[call(arguments)]))), tokenizer, TokenizeSettings()
        ).dataset
        assert row["response_ids"][0].count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_tokens_the_template_searches_for_are_text_inside_a_message(tokenizer):
    tokenizer.add_tokens([AddedToken("<tool_response>", special=False)])
    found = "{% if m.content and m.content.startswith('<tool_response>') %}{{ 'result: ' }}{% endif %}"
    tokenizer.chat_template = TOOL_CHAT.replace("{% if m.content %}", found + "{% if m.content %}", 1)
    for place, count in (("<tool_response>a<tool_response>b", 1), ("a <tool_response> b", 0)):
        row = pair() | {"prompt": [{"role": "system", "content": "<tool_response>"}, user(place)]}
        (row,) = prepare(json_rows(row), tokenizer, TokenizeSettings()).dataset
        assert row["prompt_ids"].count(tokenizer.convert_tokens_to_ids("<tool_response>")) == count
        assert place in text(tokenizer, row["prompt_ids"])


def test_the_papers_tokenization_does_not_drop_part_of_an_answer_either(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    for answer in (assistant("4", reasoning_content="Two."), assistant("", tool_calls=[call({"city": "Oslo"})])):
        with pytest.raises(SimpoError, match=r"rows.jsonl:1: .*does not render"):
            pairs(tokenizer, pair(answer), paper_tokenization=True)


def test_all_leading_system_messages_are_folded(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = NO_SYSTEM
    rules = [{"role": "system", "content": "Be brief."}, {"role": "developer", "content": "Be kind."}]
    found, _ = pairs(tokenizer, pair() | {"prompt": [*rules, user("Hi?")]}, rendering=RenderSettings({}, "fold"))
    assert found[0][0] == generation_prompt(tokenizer, [user("Be brief.\n\nBe kind.\n\nHi?")])
    with pytest.raises(SimpoError, match=r"rows.jsonl:1: a system message cannot be folded"):
        pairs(
            tokenizer,
            pair() | {"prompt": [*rules, {"role": "tool", "content": "3 C"}]},
            rendering=RenderSettings({}, "fold"),
        )


def test_a_conversation_with_a_system_message_does_not_get_a_second_one(tokenizer):
    for row in (
        pair(system="Be brief."),
        pair() | {"prompt": [{"role": "system", "content": "Be brief."}, user("Weather?")]},
    ):
        found, _ = pairs(tokenizer, row, auto_insert_empty_system_msg=True)
        assert found == pairs(tokenizer, row)[0]
        assert found[0][0].count("<|im_start|>system") == 1
    inserted = pairs(tokenizer, pair(), auto_insert_empty_system_msg=True)[0][0][0]
    assert inserted.startswith("<|im_start|>system\n<|im_end|>")


@pytest.mark.parametrize("asked", ["Weather?", "What is <|im_start|>?"], ids=["plain", "marked"])
def test_the_longest_of_overlapping_special_tokens_wins(tokenizer, asked):
    """The beginning and the end of the end-of-turn token are tokens as well."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|im_end", "end|>"]})
    end, *parts = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_end", "end|>"])
    for answer in (assistant("It is 3 C."), assistant("", tool_calls=[call({"city": "Oslo"})])):
        row = pair(answer) | {"prompt": [user(asked)]}
        (found,) = prepare(json_rows(row), tokenizer, TokenizeSettings()).dataset
        assert found["prompt_ids"].count(end) == 1
        for ids in found["response_ids"]:
            assert ids[-1] == end and ids.count(end) == 1
        assert not set(parts) & {*found["prompt_ids"], *found["response_ids"][0], *found["response_ids"][1]}
        assert text(tokenizer, found["prompt_ids"]) == generation_prompt(tokenizer, [user(asked)])
    messages = [user(asked), assistant("A."), user(asked), assistant("B.")]
    found, _ = conversations(tokenizer, {"messages": messages})
    assert [answer for _, answer in found] == ["A.<|im_end|>B.<|im_end|>"]


@pytest.mark.parametrize(
    "template",
    [
        *("{{ 1/0 }}", "{{ 'a' + 1 }}", "{% include 'x' %}", "{{ messages[99].a.b }}", "{% if %}", "{{ x() }}"),
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ 'a' * 9999999999 }}",
        "{{ 'x'|center(9999999999) }}",
        "{{ [1] * 999999999 }}",
        "{{ 10**10**8 }}",
        "{% set n = namespace(x=9) %}{% for i in range(100) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(9999) %}{{ 'aaaaaaaaaaaa' }}{% endfor %}{% endfor %}",
    ],
)
def test_hostile_templates_give_a_one_line_error_in_time(build_tokenizer, template):
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = template
    limit, handler = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    start = time.process_time()
    with pytest.raises(SimpoError):
        prepare(Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]), tokenizer, TokenizeSettings())
    assert time.process_time() - start < 8
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == (limit, handler)
