"""Rows in other tools' formats: what each is converted to, and that nothing is guessed."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

from simpo.data.formats import read_comparison
from simpo.data.prompts import prepare_prompts, read_prompts
from simpo.data.rows import BadRow
from simpo.data.settings import TokenizeSettings
from simpo.data.shapes import canonical, parse_text
from simpo.data.sources import load_rows
from simpo.data.tokenizing import prepare, prepare_feedback, prepare_sft
from simpo.errors import SimpoError

PAIR = {"chosen": "yes", "rejected": "no"}
CALL = {"name": "add", "arguments": {"a": 1}}


def chat(*contents, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def sharegpt(*contents, roles=("human", "gpt")):
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(contents)]


COMPARISONS = {
    "question": ({"question": "Hi?", **PAIR}, {"prompt": "Hi?", **PAIR}),
    "instruction": ({"instruction": "Hi?", "input": None, **PAIR}, {"prompt": "Hi?", "input": None, **PAIR}),
    "instruction and input": ({"instruction": "Add", "input": "1", **PAIR}, {"prompt": "Add\n\n1", **PAIR}),
    "input alone": ({"system": "s", "input": "Hi?", **PAIR}, {"system": "s", "prompt": "Hi?", **PAIR}),
    "system prompt": (
        {"system_prompt": "s", "query": "Hi?", **PAIR},
        {"system": "s", "prompt": "Hi?", **PAIR},
    ),
    "OpenAI": (
        {
            "input": {"messages": chat("Hi?"), "tools": [CALL], "parallel_tool_calls": True},
            "preferred_output": chat("yes", first="assistant"),
            "non_preferred_output": chat("no", first="assistant"),
            "id": 1,
        },
        {
            "prompt": chat("Hi?"),
            "chosen": chat("yes", first="assistant"),
            "rejected": chat("no", first="assistant"),
            "tools": [CALL],
            "parallel_tool_calls": True,
            "id": 1,
        },
    ),
    "ShareGPT": (
        {
            "conversations": sharegpt("Hi?"),
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        {
            "prompt": chat("Hi?"),
            "chosen": {"role": "assistant", "content": "yes"},
            "rejected": {"role": "assistant", "content": "no"},
        },
    ),
    "ShareGPT with text": ({"conversations": sharegpt("Hi?"), **PAIR}, {"prompt": chat("Hi?"), **PAIR}),
    "whole ShareGPT conversations": (
        {"chosen": sharegpt("Hi?", "yes"), "rejected": sharegpt("Hi?", "no")},
        {"chosen": chat("Hi?", "yes"), "rejected": chat("Hi?", "no")},
    ),
    "messages as prompt": ({"messages": chat("Hi?"), **PAIR}, {"prompt": chat("Hi?"), **PAIR}),
    "messages as prompt of messages": (
        {"messages": chat("Hi?"), "chosen": chat("yes", first="assistant")[0], "rejected": "no"},
        {"prompt": chat("Hi?"), "chosen": chat("yes", first="assistant")[0], "rejected": "no"},
    ),
    "UltraFeedback": (
        {
            "instruction": "Hi?",
            "completions": [{"response": text, "overall_score": score} for text, score in (("no", 2.0), ("yes", 8.5))],
        },
        {"prompt": "Hi?", "responses": ["no", "yes"], "scores": [2.0, 8.5]},
    ),
    "Nectar": (
        {"prompt": "Hi?", "answers": [{"answer": "yes", "rank": 1.0}, {"answer": "no", "rank": 2.0}]},
        {"prompt": "Hi?", "responses": ["yes", "no"], "scores": [-1.0, -2.0]},
    ),
    "SafeRLHF": (
        {"prompt": "Hi?", "response_0": "no", "response_1": "yes", "better_response_id": 1},
        {"prompt": "Hi?", "better_response_id": 1, **PAIR},
    ),
    "HelpSteer3": (
        {"context": chat("Hi?"), "response1": "yes", "response2": "no", "overall_preference": -3},
        {"prompt": chat("Hi?"), "overall_preference": -3, **PAIR},
    ),
    "HelpSteer2 preference": (
        {"prompt": "Hi?", "response_1": "no", "response_2": "yes", "preference_strength": 1},
        {"prompt": "Hi?", "preference_strength": 1, **PAIR},
    ),
    "Arena": (
        {"conversation_a": chat("Hi?", "no"), "conversation_b": chat("Hi?", "yes"), "winner": "model_b"},
        {"chosen": chat("Hi?", "yes"), "rejected": chat("Hi?", "no"), "winner": "model_b"},
    ),
    "numbers in text": ({"prompt": "p", **PAIR, "margin": "0.5"}, {"prompt": "p", **PAIR, "margin": 0.5}),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_comparison_format_is_read(name):
    row, expected = COMPARISONS[name]
    found, how = canonical(row)
    assert found == expected
    assert (how is None) == (name == "numbers in text")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Add", "input": "1", "output": "2"}, {"prompt": "Add\n\n1", "completion": "2"}),
        ({"question": "Hi?", "response": "yes"}, {"prompt": "Hi?", "completion": "yes"}),
        ({"question": "Hi?", "query": "", "output": ""}, {"prompt": "Hi?", "query": "", "completion": ""}),
        ({"prompt": "Hi?", "answer": "yes", "label": 1}, {"prompt": "Hi?", "completion": "yes", "label": 1}),
        ({"input": "Hi?", "output": "yes"}, {"prompt": "Hi?", "completion": "yes"}),
        (
            {"messages": chat("Hi?", "yes"), "label": False},
            {"prompt": chat("Hi?"), "completion": chat("yes", first="assistant"), "label": False},
        ),
        (
            {"conversations": sharegpt("a", "b", "c", "d"), "kto_tag": True},
            {"prompt": chat("a", "b", "c"), "completion": chat("d", first="assistant"), "label": True},
        ),
        (
            {"instruction": "Hi?", "input": "", "output": "yes", "kto_tag": "1"},
            {"prompt": "Hi?", "input": "", "completion": "yes", "label": "1"},
        ),
        ({"messages": chat("Hi?", "yes"), "label": "math"}, {"messages": chat("Hi?", "yes"), "label": "math"}),
        ({"conversations": sharegpt("Hi?", "yes", "a", "b")}, {"messages": chat("Hi?", "yes", "a", "b")}),
        ({"conversation": chat("Hi?", "yes")}, {"messages": chat("Hi?", "yes")}),
        ({"messages": sharegpt("Hi?", "yes", roles=("user", "assistant"))}, {"messages": chat("Hi?", "yes")}),
        (
            {
                "conversations": [
                    {"from": "human", "value": "1+1?"},
                    {"from": "function_call", "value": json.dumps(CALL)},
                    {"from": "observation", "value": "2"},
                    {"from": "gpt", "value": "2", "weight": 0},
                ],
                "tools": json.dumps([CALL]),
            },
            {
                "messages": [
                    {"role": "user", "content": "1+1?"},
                    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
                    {"role": "tool", "content": "2"},
                    {"role": "assistant", "content": "2", "weight": 0},
                ],
                "tools": [CALL],
            },
        ),
    ],
)
def test_every_conversation_and_feedback_format_is_read(row, expected):
    assert canonical(row)[0] == expected


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", **PAIR, "question": "q", "score": 1},
        {"prompt": "p", "completion": "c", "response": "r"},
        {"messages": chat("a", "b"), "prompt": "p", "answer": "x"},
        {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2], "response_0": "x", "answers": ["y"]},
        {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]},
        {"prompt": '{"type": "object", "text": 1}', "chosen": '[{"a": 1}]', "rejected": "[1, 2]"},
        {"prompt": "007", "chosen": "1.50", "rejected": "None"},
    ],
)
def test_rows_in_known_formats_are_left_unchanged(row):
    assert canonical(row) == (row, None)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "a", "instruction": "b", **PAIR}, "ambiguous columns question and instruction"),
        ({"prompt": "a", "input": "b", **PAIR}, "ambiguous columns prompt and input"),
        ({"prompt": "a", "output": "b", "response": "c"}, "ambiguous columns response and output"),
        ({"system": "a", "system_prompt": "b", "question": "c", **PAIR}, "ambiguous columns system and system_prompt"),
        ({"conversations": sharegpt("a"), "messages": chat("a", "b")}, "ambiguous columns conversations and messages"),
        ({"conversation": sharegpt("a"), "messages": chat("a", "b")}, "ambiguous columns conversation and messages"),
        (
            {**COMPARISONS["SafeRLHF"][0], **COMPARISONS["HelpSteer2 preference"][0]},
            r"ambiguous columns \(response_0, .*\) and \(response_1, ",
        ),
        ({**COMPARISONS["HelpSteer3"][0], "overall_preference": 0}, "overall_preference is a tie"),
        ({**COMPARISONS["HelpSteer3"][0], "overall_preference": float("nan")}, "overall_preference does not"),
        ({**COMPARISONS["HelpSteer3"][0], "overall_preference": 10**400}, "overall_preference does not"),
        ({**COMPARISONS["Arena"][0], "winner": "tie (bothbad)"}, "winner is a tie"),
        ({**COMPARISONS["Arena"][0], "winner": "both_bad"}, "winner is a tie"),
        ({**COMPARISONS["SafeRLHF"][0], "better_response_id": -1}, "better_response_id does not"),
        ({"prompt": "p", "response": "r", "helpfulness": 4, "correctness": 4}, "one response per row, rated by helpf"),
        ({"instruction": "q", "context": "A text.", "response": "r"}, "column context next to instruction"),
        ({"instruction": "q", "history": [["a", "b"]], "output": "r"}, "column history next to instruction"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "conversations has a message from 'narrator'"),
        ({"conversations": [{"from": "function_call", "value": "add(1)"}]}, "conversations has a function_call that"),
        ({"input": "x", "preferred_output": [], "non_preferred_output": []}, "input has no messages"),
        (
            {"prompt": "p", "completions": [{"response": "a", "score": 1}, {"response": "b"}]},
            "completions has items without a",
        ),
        ({"tools": "get_weather", "prompt": "p", **PAIR}, "tools is text that is neither"),
    ],
)
def test_ambiguous_rows_and_values_make_bad_rows(row, reason):
    with pytest.raises(BadRow, match=reason):
        canonical(row)


def test_ties_are_dropped_and_counted(build_tokenizer):
    row = COMPARISONS["HelpSteer3"][0]
    rows = [row | {"overall_preference": value} for value in (1, 0, -2, 0)]
    report = prepare(Dataset.from_list(rows), build_tokenizer("chatml"), TokenizeSettings()).report
    assert (report.used, report.dropped, report.bad) == (2, {"overall_preference is a tie": 2}, {})
    with pytest.raises(SimpoError, match="every row was dropped: overall_preference is a tie"):
        prepare(Dataset.from_list(rows[1:2]), build_tokenizer("chatml"), TokenizeSettings())
    assert len(prepare_prompts(Dataset.from_list(rows), build_tokenizer("chatml"))) == 1


# ---- lists and conversations written as text ----

TURN = chat("yes", first="assistant")


@pytest.mark.parametrize("write", [str, json.dumps, lambda x: json.dumps(json.dumps(x)), lambda x: f" {x}\n"])
@pytest.mark.parametrize("column", ["prompt", "chosen", "messages", "completion"])
def test_conversations_written_as_text_are_parsed(write, column):
    value = chat("It's", 'a "quoted"\nline', "é")
    assert canonical({column: write(value)})[0] == {column: value}
    assert canonical({column: write(sharegpt("a", "b"))})[0] == {column: chat("a", "b")}


def test_single_messages_and_lists_written_as_text_are_parsed():
    row = {"prompt": "p", "responses": "['a, b', \"c's\"]", "scores": "[1, 2.5]"}
    assert canonical(row)[0] == {"prompt": "p", "responses": ["a, b", "c's"], "scores": [1, 2.5]}
    assert canonical({"chosen": str(TURN[0])})[0] == {"chosen": TURN[0]}
    row = {"prompt": "p", "responses": [json.dumps(TURN), "b"], "scores": [1, 2]}
    assert canonical(row)[0]["responses"] == [TURN, "b"]
    assert canonical({"prompt": "p", **PAIR, "tools": ""})[0]["tools"] is None


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("chosen", str(np.array(chat("a", "b"), dtype=object))),
        ("chosen", repr(np.array(TURN, dtype=object))),
        ("prompt", str(chat("a"))[:-2]),
        ("prompt", "[{'role': 'user', 'content': undefined}]"),
        ("chosen", "[{'from': 'gpt', 'value': 'a'} {'from': 'gpt', 'value': 'b'}]"),
        ("responses", str(np.array(["a b", "c"]))),
        ("responses", "['a' 'b']"),
        ("scores", str(np.array([1.0, 2.0]))),
        ("messages", "[{'role': 'user', ..."),
    ],
)
def test_unparsable_text_is_rejected(column, value):
    with pytest.raises(BadRow, match=f"^{column} is "):
        canonical({"prompt": "p", **PAIR, column: value})


def test_parsing_agrees_with_python_reprs():
    for value in ([], [1, 2], ["a", 'b"', "it's"], {"a": None, "b": [True, 1.5]}, "text", -3):
        assert parse_text(repr(value)) == value == parse_text(json.dumps(value))


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_a_repr_is_never_trained_on(kind, build_tokenizer, tmp_path):
    """A frame with message lists, as pandas writes it to CSV, and the same text in other file types."""
    frame = pd.DataFrame(
        {"prompt": ["Hi?", "Ho?"], "chosen": [TURN, TURN], "rejected": [chat("no", first="assistant")] * 2}
    )
    frame = frame.map(str)
    path = tmp_path / f"a.{kind}"
    write = {
        "csv": frame.to_csv,
        "parquet": frame.to_parquet,
        "jsonl": lambda p, **_: frame.to_json(p, orient="records", lines=True),
    }
    write[kind](path, index=False)
    tokenizer = build_tokenizer("chatml")
    prepared = prepare(load_rows(str(path), split="train"), tokenizer, TokenizeSettings())
    expected = prepare(
        Dataset.from_list([{"prompt": p, **PAIR} for p in ("Hi?", "Ho?")]), tokenizer, TokenizeSettings()
    )
    for column in ("prompt_ids", "response_ids"):
        assert prepared.dataset[column][:] == expected.dataset[column][:]
    assert prepared.report.read == {"chosen parsed from text; rejected parsed from text": 2}
    assert any("recognized 2: chosen parsed from text" in line for line in prepared.report.lines())


# ---- CSV ----


def rows_in(tmp_path, text, name="a.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    rows = load_rows(str(path), split="train")
    return [json.loads(row) for row in rows["_row"]]


def test_csv_cells_are_text(tmp_path):
    """Even late in the file, where a reader that infers types has already decided."""
    words = ["None", "N/A", "NA", "null", "nan", "42", "007", "1.50", "true", "", " a ", "1e5", "-inf", "2020-01-01"]
    rows = [f"p,text,r{n}" for n in range(10_000)]
    found = rows_in(tmp_path, "\n".join(["prompt,chosen,rejected", *rows, *(f"p,{word},x" for word in words)]))
    assert [row["chosen"] for row in found[10_000:]] == words


def test_quotes_line_breaks_and_byte_order_marks_in_csv(tmp_path):
    text = b'\xef\xbb\xbfprompt,chosen\r\n"a\nb","say ""hi"", you"\r\n\r\n"\xc3\xa9",\r\n'
    assert rows_in(tmp_path, text) == [{"prompt": "a\nb", "chosen": 'say "hi", you'}, {"prompt": "é", "chosen": ""}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,chosen,rejected\nP1,good,bad,note\n", r"a\.csv:2: 4 fields, but the header has 3"),
        ('prompt,chosen\n"a\nb",c\nd,"e\nf",g\n', r"a\.csv:4: 3 fields, but the header has 2"),
        ("prompt,chosen\na\n", r"a\.csv:2: 1 fields, but the header has 2"),
        ("prompt,chosen,chosen\na,b,c\n", r"a\.csv:1: the header has the column 'chosen' more than once"),
        ("prompt;chosen\na;b\n", r"a\.csv:1: the fields are separated by ';'"),
        ("prompt\tchosen\na\tb\n", r"a\.csv:1: the fields are separated by '\\t'"),
        ('prompt,chosen\na,"b\n', r"a\.csv:2: not a readable csv file: unexpected end of data"),
        ('prompt,chosen\na,"b"c\n', r"a\.csv:2: not a readable csv file"),
        (b"prompt,chosen\na,\xff\n", r"a\.csv: cannot be read: .*UTF-8"),
        ("prompt,chosen\n", r"a\.csv: no rows"),
        ("prompt, chosen\na, b\n", r"a\.csv:1: the column name ' chosen' has whitespace around it"),
    ],
)
def test_malformed_csv_files_are_rejected(tmp_path, text, message):
    with pytest.raises(SimpoError, match=message):
        rows_in(tmp_path, text)


@pytest.mark.parametrize(
    "labels", [("1", "0"), ("True", "False"), ("true", "FALSE"), ("1.0", "0.0"), (1, 0), (1.0, 0.0)]
)
def test_every_spelling_of_labels_is_accepted(labels, build_tokenizer, tmp_path):
    kind = "csv" if isinstance(labels[0], str) else "parquet"
    frame = pd.DataFrame({"prompt": ["a", "b"], "completion": ["yes", "no"], "label": labels})
    getattr(frame, f"to_{kind}")(tmp_path / f"a.{kind}", index=False)
    rows = load_rows(str(tmp_path / f"a.{kind}"), split="train")
    assert prepare_feedback(rows, build_tokenizer("chatml"), TokenizeSettings()).dataset["label"][:] == [True, False]


# ---- columns with other names ----


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_columns_can_be_mapped(kind, tmp_path, build_tokenizer):
    frame = pd.DataFrame({"ask": ["a"], "chosen": ["no"], "rejected": ["yes"]})
    path = tmp_path / f"a.{kind}"
    write = {
        "csv": frame.to_csv,
        "parquet": frame.to_parquet,
        "jsonl": lambda p, **_: frame.to_json(p, orient="records", lines=True),
    }
    write[kind](path, index=False)
    swapped = {"ask": "prompt", "chosen": "rejected", "rejected": "chosen"}
    tokenizer = build_tokenizer("chatml")
    found = prepare(load_rows(str(path), split="train", column_mapping=swapped), tokenizer, TokenizeSettings()).dataset
    expected = prepare(Dataset.from_list([{"prompt": "a", **PAIR}]), tokenizer, TokenizeSettings()).dataset
    assert found["response_ids"][:] == expected["response_ids"][:]
    with pytest.raises(SimpoError, match=r"column_mapping: .* has no column 'asked'; it has ask, chosen, rejected"):
        load_rows(str(path), split="train", column_mapping={"asked": "prompt"})
    with pytest.raises(SimpoError, match=r"column_mapping: .* would have two columns 'chosen'"):
        load_rows(str(path), split="train", column_mapping={"ask": "chosen"})
    with pytest.raises(SimpoError, match=r"column_mapping: .* does not map"):
        load_rows(str(path), split="train", column_mapping=["ask"])


def test_an_unknown_format_lists_its_columns_and_the_known_formats(build_tokenizer):
    rows = Dataset.from_list([{"ask": "a", "good": "b"}])
    for make in (prepare, prepare_sft):
        with pytest.raises(SimpoError, match=r"columns ask, good\).*OpenAI.*ShareGPT.*column_mapping"):
            make(rows, build_tokenizer("chatml"), TokenizeSettings())


# ---- transcripts ----

CONTENTS = ("Hi.", "Hello!\n\nHow are you?", "Fine: and you?")


@pytest.mark.parametrize(
    "turn",
    ["\n\n{}: {}", "{}: {}\n", "\n{}: {}", "{}:{}\n\n\n", "\r\n\r\n{}: {}", "\n \n{}:\n{}", "  {}: {}\n"],
)
def test_transcripts_with_any_whitespace_are_read(turn, build_tokenizer):
    names = ("Human", "Assistant", "Human")
    prompt = "".join(turn.format(name, text) for name, text in zip(names, CONTENTS, strict=True))
    prompt += turn.partition("{}:")[0] + "Assistant:"
    tokenizer = build_tokenizer("chatml")
    expected = prepare(Dataset.from_list([{"prompt": chat(*CONTENTS), **PAIR}]), tokenizer, TokenizeSettings()).dataset
    whole = {"chosen": f"{prompt} yes", "rejected": f"{prompt} no"}
    for row in (whole, {"prompt": f"{prompt} ", **PAIR}, {"prompt": CONTENTS[-1], **whole}):
        found = prepare(Dataset.from_list([row]), tokenizer, TokenizeSettings()).dataset
        assert found["prompt_ids"][:] == expected["prompt_ids"][:]
        assert found["response_ids"][:] == expected["response_ids"][:]
    (asked,) = prepare_prompts(Dataset.from_list([{"prompt": prompt}]), tokenizer)
    assert asked.ids == expected["prompt_ids"][0]


def test_transcripts_that_diverge_before_the_last_answer_make_bad_rows():
    start = "\n\nHuman: a\n\nAssistant:"
    row = {"chosen": f"{start} b\n\nHuman: c\n\nAssistant: d", "rejected": f"{start} e"}
    with pytest.raises(BadRow, match="differ in more than their last answer"):
        read_comparison(row, "here")


@pytest.mark.parametrize("opening", ["Be nice.\n\nHuman: a", "User: a", "\n\nUSER: a"])
def test_transcripts_with_an_unknown_opening_make_bad_rows(opening, build_tokenizer):
    """They cannot be split into turns, and would become a single user message that ends with the cue."""
    rows = Dataset.from_list([{name: f"{opening}\n\nAssistant: {text}" for name, text in PAIR.items()}])
    tokenizer = build_tokenizer("chatml")
    with pytest.raises(SimpoError, match="chosen is already rendered with a chat template"):
        prepare(rows, tokenizer, TokenizeSettings())
    tokenizer.chat_template = None
    assert prepare(rows, tokenizer, TokenizeSettings()).report.used == 1


# ---- rendered text ----

RENDERED = {
    "chatml": "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n",
    "llama 3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>",
    "llama 2": "<s>[INST] Hi? [/INST]",
    "gemma": "<bos><start_of_turn>user\nHi?<end_of_turn>\n<start_of_turn>model\n",
    "phi": "<|system|>\nBe brief.<|end|>\n<|user|>\nHi?<|end|>\n<|assistant|>\n",
    "deepseek": "<\uff5cbegin\u2581of\u2581sentence\uff5c><\uff5cUser\uff5c>Hi?<\uff5cAssistant\uff5c>",
    "preamble": "A chat.\n\nHuman: Hi?\n\nAssistant:",
    "gpt-oss": "<|start|>user<|message|>Hi?<|end|><|start|>assistant",
    "helpsteer 2": "2 and 2?<extra_id_1>Assistant\n4<extra_id_1>User\nAnd 3?",
    "after other text": "Be brief.\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n",
    "llama 2 after other text": "Be brief. [INST] Hi? [/INST] Hm. [INST] Ho? [/INST]",
    "llama 3 after other text": "Be brief.<|start_header_id|>assistant<|end_header_id|>\n\n",
    "reasoning after other text": "Be brief.<\uff5cUser\uff5c>Hi?<\uff5cAssistant\uff5c><think>\n",
    "no reasoning after other text": "Be brief.\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "alpaca": "Below is an instruction.\n\n### Instruction:\nHi?\n\n### Response:\n",
    "vicuna": "A chat between a user and an assistant. USER: Hi? ASSISTANT:",
}


@pytest.mark.parametrize("name", RENDERED)
def test_rendered_prompts_are_not_rendered_again(name, build_tokenizer):
    tokenizer, text = build_tokenizer("chatml"), RENDERED[name]
    for row in ({"prompt": text, **PAIR}, {"prompt": chat(text), **PAIR}):
        with pytest.raises(SimpoError, match=r"train row 0: prompt is already rendered .*chat_template: none"):
            prepare(Dataset.from_list([row]), tokenizer, TokenizeSettings())
    with pytest.raises(SimpoError, match="prompt is already rendered"):
        prepare_prompts(Dataset.from_list([{"prompt": text}]), tokenizer)
    with pytest.raises(SimpoError, match="prompt is already rendered"):
        read_prompts(Dataset.from_list([{"prompt": text}]))
    tokenizer.chat_template = None  # without a template, the text is what the model reads
    assert prepare(Dataset.from_list([{"prompt": text, **PAIR}]), tokenizer, TokenizeSettings()).report.used == 1


def test_text_in_the_models_own_template_is_detected(tokenizer):
    prompt = tokenizer.apply_chat_template(chat("Hi?"), tokenize=False, add_generation_prompt=True)
    with pytest.raises(SimpoError, match="prompt is already rendered"):
        prepare(Dataset.from_list([{"prompt": prompt, **PAIR}]), tokenizer, TokenizeSettings())


def test_questions_about_special_tokens_are_text(build_tokenizer):
    rows = [{"prompt": text, **PAIR} for text in ("What is <|im_start|>?", "Is <s> HTML?", "<s>old</s>", "<|im_end|>")]
    rows += [{"prompt": text, **PAIR} for text in ("Does [/INST] end it?", "Is <|im_start|>assistant a header?")]
    examples = RENDERED["after other text"], RENDERED["llama 3 after other text"] + "Hi.<|eot_id|>"
    rows += [{"prompt": f"What does this mean?\n```\n{example}```", **PAIR} for example in examples]
    assert prepare(Dataset.from_list(rows), build_tokenizer("chatml"), TokenizeSettings()).report.used == 8
    rows = [{"prompt": chat(f"{example}\nExplain this."), **PAIR} for example in examples]
    assert prepare(Dataset.from_list(rows), build_tokenizer("chatml"), TokenizeSettings()).report.used == 2
    with pytest.raises(SimpoError, match="chosen is already rendered"):
        row = {"prompt": "Hi?", "chosen": "<|im_start|>assistant\nyes<|im_end|>", "rejected": "no"}
        prepare(Dataset.from_list([row]), build_tokenizer("chatml"), TokenizeSettings())
    with pytest.raises(SimpoError, match="rejected is already rendered"):
        row = {"prompt": "Hi?", "chosen": "yes", "rejected": "<|channel|>analysis<|message|>Hm.<|end|>"}
        prepare(Dataset.from_list([row]), build_tokenizer("chatml"), TokenizeSettings())


@pytest.mark.parametrize("text", ["[" + "1," * 3_000_000, "-" * 6_000_000 + "1", "0x" + "f" * 6_000_000])
def test_megabytes_of_text_are_not_parsed_as_python(text):
    """It would take tens of seconds and gigabytes; JSON has no such limit."""
    with pytest.raises(ValueError, match="1,000,000 characters"):
        parse_text(text)
    long = [{"role": "user", "content": "x" * 2_000_000}]
    assert parse_text(json.dumps(long)) == long
