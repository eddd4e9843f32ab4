"""Real comparisons and a real chat model's tokenizer, if they are available next to the repository."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset

from simpo.data.prompts import prepare_prompts
from simpo.data.settings import TokenizeSettings
from simpo.data.sources import load_rows
from simpo.data.tokenizing import prepare, prepare_sft

DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
PREFERENCES = DATA / "preferences"
DEMONSTRATIONS = DATA / "sft" / "alpacaeval_sft.jsonl.gz"

pytestmark = pytest.mark.skipif(not PREFERENCES.is_dir(), reason="the shared data is not available")


@pytest.fixture
def tokenizer(build_tokenizer):
    return build_tokenizer("tiny-english")


def rows_of(name):
    with gzip.open(PREFERENCES / name, "rt") as file:
        return [json.loads(line) for line in file]


def turns(transcript):
    """Parse a transcript independently, word by word instead of by pattern."""
    messages = []
    for piece in transcript.split("\n\n"):
        for cue, role in (("Human:", "user"), ("Assistant:", "assistant")):
            if piece.startswith(cue):
                messages.append({"role": role, "content": piece.removeprefix(cue)})
                break
        else:
            if messages:
                messages[-1]["content"] += "\n\n" + piece
    return messages


def test_transcripts_match_rendering_whole_conversations(tokenizer):
    name = "hh_harmless_test.jsonl.gz"
    prepared = prepare(load_rows(str(PREFERENCES / name), split="test"), tokenizer, TokenizeSettings())
    assert (prepared.report.rows, prepared.report.bad) == (300, {"empty response": 1})
    rows = rows_of(name)
    for found in prepared.dataset:
        row = rows[int(found["where"].rpartition(":")[2]) - 1]
        for side, ids in zip(("chosen", "rejected"), found["response_ids"], strict=True):
            if (
                row[side].count("Assistant:")
                == row["chosen"].count("Assistant:")
                == row["rejected"].count("Assistant:")
            ):
                whole = tokenizer.apply_chat_template(turns(row[side]), return_dict=False)
                assert found["prompt_ids"] + ids == whole


def test_prompts_and_answers_match_rendering_whole_conversations(tokenizer):
    name = "alpacaeval_balanced_test.jsonl.gz"
    settings = TokenizeSettings(max_length=1024)
    prepared = prepare(load_rows(str(PREFERENCES / name), split="test"), tokenizer, settings)
    rows = rows_of(name)
    assert prepared.report.rows == len(rows) == prepared.report.used + sum(prepared.report.dropped.values())
    for found in prepared.dataset.select(range(0, len(prepared.dataset), 7)):
        row = rows[int(found["where"].rpartition(":")[2]) - 1]
        for side, ids in zip(("chosen", "rejected"), found["response_ids"], strict=True):
            messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
            whole = tokenizer.apply_chat_template(messages, return_dict=False)
            assert found["prompt_ids"] + ids == whole and len(whole) <= 1024
        assert json.loads(found["extra"])["chosen_model"] == row["chosen_model"]


@pytest.mark.skipif(not DEMONSTRATIONS.is_file(), reason="the shared data is not available")
def test_demonstrations_match_rendering_whole_conversations(tokenizer):
    rows = load_rows(str(DEMONSTRATIONS), split="train").select(range(0, 12000, 12))
    prepared = prepare_sft(rows, tokenizer, TokenizeSettings(max_length=1024))
    assert (
        prepared.report.rows
        == 1000
        == prepared.report.used + sum(sum(counts.values()) for counts in (prepared.report.bad, prepared.report.dropped))
    )
    sources = {where: json.loads(text) for where, text in zip(rows["_where"], rows["_row"], strict=True)}
    for found in prepared.dataset.select(range(0, len(prepared.dataset), 7)):
        row = sources[found["where"]]
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        assert found["prompt_ids"] + found["response_ids"][0] == tokenizer.apply_chat_template(
            messages, return_dict=False
        )
        assert found["prompt_ids"] == tokenizer.apply_chat_template(
            messages[:1], add_generation_prompt=True, return_dict=False
        )
        assert all(found["scored"][0])


def test_conversations_and_their_prompts_agree(tokenizer):
    """Transcripts as messages: only answers are scored, and a sampling prompt equals a pair's prompt."""
    conversations = [turns(row["chosen"]) for row in rows_of("hh_harmless_test.jsonl.gz")]
    conversations = [messages for messages in conversations if all(m["content"].strip() for m in messages)]
    dataset = Dataset.from_list([{"messages": messages} for messages in conversations])
    prepared = prepare_sft(dataset, tokenizer, TokenizeSettings())
    assert prepared.report.used == len(conversations)
    for found, messages in zip(prepared.dataset, conversations, strict=True):
        assert found["prompt_ids"] + found["response_ids"][0] == tokenizer.apply_chat_template(
            messages, return_dict=False
        )
        kept = [i for i, mark in zip(found["response_ids"][0], found["scored"][0], strict=True) if mark]
        answers = [m["content"].strip() for m in messages if m["role"] == "assistant"]
        assert tokenizer.decode(kept) == "".join(answer + tokenizer.eos_token for answer in answers)
    prompts = prepare_prompts(dataset, tokenizer)
    assert len(prompts) + prompts.report.dropped.get("repeated prompt", 0) == len(conversations)
    assert prompts.prompts[0].ids == tokenizer.apply_chat_template(
        conversations[0][:-1], add_generation_prompt=True, return_dict=False
    )
