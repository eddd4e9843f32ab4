"""The data shared by all sides of a comparison."""

from __future__ import annotations

import gzip
import json
from statistics import median

import pytest
from benchmarks.profiles import PROFILES, Profile, synthetic_rows
from benchmarks.rows import byte_pair_tokenizer, read_pairs, tokenize, word_tokenizer
from benchmarks.setting import Setting, load_comparisons, load_text, prepare

TOY = Profile(prompt=12, response=5, spread=0.5)


def test_a_pair_is_split_at_its_last_shared_cue(tmp_path) -> None:
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = {"chosen": start + " yes, b", "rejected": start + " yes\n\nAssistant: d"}
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(row).encode()))
    (pair,) = read_pairs(path)
    assert pair.prompt == start
    assert [pair.prompt + response for response in pair.responses] == [row["chosen"], row["rejected"]]


@pytest.mark.parametrize("responses", [2, 4])
def test_every_synthetic_word_is_one_token(responses) -> None:
    rows = synthetic_rows(TOY, 20, responses, words=99)
    tokenizer = word_tokenizer(99)
    for row in rows:
        comparison = tokenize(row, tokenizer)
        assert len(comparison.prompt_ids) == len(row.prompt.split())
        assert [len(ids) - 1 for ids in comparison.response_ids] == [len(text.split()) for text in row.responses]
        assert all(
            ids[-1] == 0 and 0 not in ids[:-1] for ids in ([*comparison.prompt_ids, 0], *comparison.response_ids)
        )
        assert len(comparison.response_ids) == responses


@pytest.mark.parametrize("name", PROFILES)
def test_lengths_follow_the_profile(name) -> None:
    profile = PROFILES[name].scaled(0.1)
    rows = synthetic_rows(profile, 400, 2, words=9)
    assert median(len(row.prompt.split()) for row in rows) == pytest.approx(profile.prompt, rel=0.2, abs=1)
    lengths = [len(text.split()) for row in rows for text in row.responses]
    assert median(lengths) == pytest.approx(profile.response, rel=0.2, abs=1)
    assert max(lengths) <= 4 * profile.response


@pytest.mark.parametrize("bytewise", [True, False])
def test_ids_match_the_texts_and_end_with_the_end_of_text_token(tmp_path, bytewise) -> None:
    setting = Setting(str(tmp_path), pairs=4, pairs_per_step=2)
    rows = synthetic_rows(TOY, 30, 2, words=40)
    tokenizer = byte_pair_tokenizer(rows, 400) if bytewise else word_tokenizer(40)
    counts = prepare(setting, rows, tokenizer)
    comparisons, text = load_comparisons(setting), load_text(setting)
    assert len(comparisons) == len(text) == setting.steps * setting.pairs_per_step == 6
    assert text == [
        {"prompt": row.prompt, "chosen": row.responses[0], "rejected": row.responses[1]} for row in rows[:6]
    ]
    assert all(ids[-1] == tokenizer.eos_token_id for comparison in comparisons for ids in comparison.response_ids)
    measured = comparisons[2:]
    assert counts["prompt_tokens"] == sum(len(comparison.prompt_ids) for comparison in measured)
    assert counts["responses"] == 8


def test_nothing_is_truncated(tmp_path) -> None:
    setting = Setting(str(tmp_path), pairs=2, pairs_per_step=2, max_length=10)
    with pytest.raises(ValueError, match="more than max_length 10"):
        prepare(setting, synthetic_rows(TOY, 4, 2, words=9), word_tokenizer(9))
