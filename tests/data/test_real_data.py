"""Real comparisons and a real chat model's tokenizer, where they are at hand beside the repository."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from simpo.data.sources import load_rows
from simpo.data.tokenize import TokenizeSettings, prepare

PREFERENCES = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "preferences"

pytestmark = pytest.mark.skipif(not PREFERENCES.is_dir(), reason="shared data are not here")


@pytest.fixture
def tokenizer(build_tokenizer):
    return build_tokenizer("tiny-english")


def rows_of(name):
    with gzip.open(PREFERENCES / name, "rt") as file:
        return [json.loads(line) for line in file]


def turns(transcript):
    """An own reading of a transcript, word by word instead of by pattern."""
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


def test_transcripts_against_rendering_whole_conversations(tokenizer):
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


def test_prompts_and_answers_against_rendering_whole_conversations(tokenizer):
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
