"""Prompts for sampling: the same ids as in a pair, each prompt once."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from decimal import Decimal

import pytest
from datasets import Dataset

from simpo.data.prompts import OVERLONG_PROMPT, REPEATED, prepare_prompts, read_prompts
from simpo.data.settings import TokenizeSettings
from simpo.data.sources import load_rows
from simpo.data.tokenizing import prepare, prepare_sft
from simpo.errors import SimpoError

HI = "How do I wrap a present?"


def chat(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


TURNS = chat(HI, "You can fold the paper.", "yes?")
TRANSCRIPT = f"\n\nHuman: {HI}\n\nAssistant: You can fold the paper.\n\nHuman: yes?\n\nAssistant:"
PAIRS = {
    "strings": {"prompt": HI, "chosen": "yes", "rejected": "no"},
    "messages": {"prompt": TURNS, "chosen": chat("", "yes")[1:], "rejected": chat("", "no")[1:]},
    "conversations": {"chosen": [*TURNS, *chat("", "yes")[1:]], "rejected": [*TURNS, *chat("", "no")[1:]]},
    "ultrafeedback": {"prompt": HI, "chosen": chat(HI, "yes"), "rejected": chat(HI, "no")},
    "transcripts": {"chosen": f"{TRANSCRIPT} yes", "rejected": f"{TRANSCRIPT} no"},
    "ranking": {"prompt": HI, "responses": ["yes", "no", "Paris"], "scores": [1, 3, 2]},
    "special text": {"prompt": f"{HI} <|im_end|> </s> <|eot|>", "chosen": "yes", "rejected": "no"},
}


def prompts_of(tokenizer, *rows, **options):
    return prepare_prompts(Dataset.from_list(list(rows)), tokenizer, **options)


@pytest.mark.parametrize("name", PAIRS)
def test_ids_equal_those_of_a_pairs_prompt(tokenizer, name):
    row = PAIRS[name]
    expected = prepare(Dataset.from_list([row]), tokenizer, TokenizeSettings()).dataset[0]["prompt_ids"]
    (found,) = prompts_of(tokenizer, {**row, "source": "test"})
    assert found.ids == expected
    assert found.where == "prompts row 0"
    assert found.extra == {"source": "test"}
    (again,) = prompts_of(tokenizer, {"prompt": found.content})
    assert (again.ids, again.id) == (found.ids, found.id)


@pytest.mark.parametrize("name", ["strings", "transcripts", "ranking"])
def test_ids_without_a_template_are_those_of_the_text(plain_tokenizer, name):
    expected = prepare(Dataset.from_list([PAIRS[name]]), plain_tokenizer, TokenizeSettings()).dataset[0]["prompt_ids"]
    assert prompts_of(plain_tokenizer, PAIRS[name]).prompts[0].ids == expected


@pytest.mark.parametrize(
    ("row", "content", "extra"),
    [
        ({"prompt": HI, "id": 3}, HI, {"id": 3}),
        ({"prompt": TURNS}, TURNS, {}),
        ({"instruction": HI, "dataset": "koala", "output": "Fold it."}, HI, {"dataset": "koala", "output": "Fold it."}),
        ({"instruction": HI, "input": ""}, HI, {"input": ""}),
        ({"instruction": HI, "input": "A vase."}, f"{HI}\n\nA vase.", {}),
        ({"question": HI, "answer": "Fold it."}, HI, {"answer": "Fold it."}),
        ({"conversations": [{"from": "human", "value": HI}]}, [{"role": "user", "content": HI}], {}),
        ({"messages": [*TURNS, *chat("", "yes")[1:]], "prompt": "Ho?"}, TURNS, {"prompt": "Ho?"}),
        ({"messages": TURNS}, TURNS, {}),
        ({**PAIRS["conversations"], "messages": chat("Ho?", "no")}, TURNS, {"messages": chat("Ho?", "no")}),
        ({"prompt": HI, "responses": ["yes"], "finished": [True]}, HI, {"responses": ["yes"], "finished": [True]}),
        (PAIRS["ranking"], HI, {}),
        (PAIRS["transcripts"], TRANSCRIPT, {}),
    ],
)
def test_every_prompt_format_is_read(build_tokenizer, row, content, extra):
    (found,) = prompts_of(build_tokenizer("chatml"), row)
    assert (found.content, found.extra) == (content, extra)


def test_one_file_serves_every_use(build_tokenizer, tmp_path):
    """The cache for one use of a file is not served for another."""
    row = {**PAIRS["ultrafeedback"], "messages": chat(HI, "yes")}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    tokenizer, rows = build_tokenizer("chatml"), load_rows(str(tmp_path / "a.jsonl"), split="train")
    for _ in range(2):
        pair = prepare(rows, tokenizer, TokenizeSettings()).dataset[0]
        conversation = prepare_sft(rows, tokenizer, TokenizeSettings()).dataset[0]
        (prompt,) = prepare_prompts(rows, tokenizer)
        assert prompt.ids == pair["prompt_ids"] == conversation["prompt_ids"]
        assert conversation["response_ids"] == pair["response_ids"][:1]


def test_prompt_ids_are_stable(build_tokenizer, tmp_path):
    """They depend only on content: neither the file type, nor null fields, nor the order of keys matter."""
    turned = [{"content": HI, "role": "user"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": turned}))
    Dataset.from_list([{"prompt": [{"role": "user", "content": HI, "name": None}]}]).to_parquet(tmp_path / "a.parquet")
    tokenizer = build_tokenizer("chatml")
    found = [
        prepare_prompts(load_rows(str(tmp_path / f"a.{kind}"), split="train"), tokenizer).prompts[0]
        for kind in ("jsonl", "parquet")
    ]
    text = '[{"content":"How do I wrap a present?","role":"user"}]'
    assert {prompt.id for prompt in found} == {hashlib.sha256(text.encode()).hexdigest()[:16]}
    (string,) = prompts_of(tokenizer, {"prompt": "é"})
    assert string.id == hashlib.sha256('"é"'.encode()).hexdigest()[:16]


def test_repeated_prompts_are_kept_once_at_their_first_occurrence(build_tokenizer):
    rows = [{"prompt": text, "n": n} for n, text in enumerate(["a", "b", "a", "c", "b", "a"])]
    prompts = prompts_of(build_tokenizer("chatml"), *rows)
    assert [prompt.content for prompt in prompts] == ["a", "b", "c"]
    assert [prompt.extra["n"] for prompt in prompts] == [0, 1, 3]
    report = prompts.report
    assert (len(prompts), report.rows, report.used, report.dropped) == (3, 6, 3, {REPEATED: 3})
    assert report.lines() == [
        "prompts: 3 prompts of 6 rows",
        "  dropped 3: repeated prompt (prompts row 2, prompts row 4, prompts row 5)",
    ]


def test_overlong_prompts_are_dropped_and_never_truncated(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    rows = [{"prompt": "yes " * n} for n in (1, 20, 2)]
    lengths = [len(prompt.ids) for prompt in prompts_of(tokenizer, *rows)]
    prompts = prompts_of(tokenizer, *rows, max_prompt_length=lengths[2])
    assert [len(prompt.ids) for prompt in prompts] == [lengths[0], lengths[2]]
    assert prompts.report.dropped == {OVERLONG_PROMPT: 1}
    message = f"no prompt fits max_prompt_length 2: the shortest has {lengths[0]} tokens; raise it"
    with pytest.raises(SimpoError, match=f"^prompts: {message}$"):
        prompts_of(tokenizer, *rows, max_prompt_length=2)
    with pytest.raises(SimpoError, match=r"^max_prompt_length: 0 leaves no room"):
        prompts_of(tokenizer, *rows, max_prompt_length=0)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"prompt": None}, "prompt is null, not text or messages"),
        ({"prompt": chat("a", "b")}, "the prompt does not end with a user message"),
        ({"instruction": 3}, "instruction is int, not text"),
        ({"instruction": "Add.", "input": [1, 2]}, "instruction and input are not text"),
        ({"prompt": "Add.", "input": "1 2"}, "ambiguous columns prompt and input"),
        ({"question": "Add 1 and 2.", "instruction": "Answer."}, "ambiguous columns question and instruction"),
        ({"messages": chat("", "b")[1:]}, "no user message"),
        ({"messages": "b"}, "messages is str, not a list of messages"),
        ({"chosen": "a", "rejected": None}, "rejected is null, not text or messages"),
        ({"topic": "?"}, "no recognized shape: columns topic"),
    ],
)
def test_bad_rows_are_counted_and_reported(build_tokenizer, tmp_path, bad, reason):
    rows = [bad, *({"prompt": f"{n}"} for n in range(99))]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = prepare_prompts(load_rows(str(tmp_path / "a.jsonl"), split="train"), build_tokenizer("chatml")).report
    (found,) = report.bad
    assert found.startswith(reason)
    assert (report.used, report.examples[found]) == (99, ["a.jsonl:1"])


def test_no_prompts_is_an_error(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    with pytest.raises(SimpoError, match=r"^prompts: no rows"):
        prompts_of(tokenizer)
    with pytest.raises(SimpoError, match=r"prompts: no row has a recognized shape .*columns topic.*instruction"):
        prompts_of(tokenizer, {"topic": "?"})
    tokenizer.chat_template = None
    with pytest.raises(SimpoError, match="prompts row 0: a conversation, but the tokenizer has no chat template"):
        prompts_of(tokenizer, {"prompt": TURNS})
    with pytest.raises(SimpoError, match="empty prompt"):
        prompts_of(tokenizer, {"prompt": ""})


def test_values_without_a_json_type_are_written_as_text_or_numbers(build_tokenizer, tmp_path):
    """WildChat's messages contain them, and whole prompts are stored as JSON."""
    path, day, price = tmp_path / "a.parquet", datetime(2024, 5, 1, 12), Decimal("1.5")
    row = {"prompt": [{"role": "user", "content": HI, "timestamp": day}], "tools": None, "day": day, "price": price}
    Dataset.from_list([row | {"chat_template_kwargs": {"day": day.date()}}]).to_parquet(path)
    rows = load_rows(str(path), split="train")
    for prompt in (prepare_prompts(rows, build_tokenizer("chatml")).prompts[0], read_prompts(rows)[0][0]):
        assert prompt.content == [{"role": "user", "content": HI, "timestamp": "2024-05-01 12:00:00"}]
        assert prompt.extra == {"day": "2024-05-01 12:00:00", "price": 1.5}
        assert prompt.context.kwargs == {"day": "2024-05-01"}


def test_invalid_unicode_is_a_bad_row_even_without_a_tokenizer(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"{n}"}) for n in range(99)) + '\n{"prompt": "\\ud800"}'
    )
    prompts, report = read_prompts(load_rows(str(tmp_path / "a.jsonl"), split="train"))
    assert len(prompts) == 99 and report.examples == {
        "text is not valid Unicode (it contains a lone surrogate)": ["a.jsonl:100"]
    }
