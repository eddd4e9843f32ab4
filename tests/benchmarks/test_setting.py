"""What both sides of the comparison are given."""

from __future__ import annotations

import gzip
import json

from benchmarks.setting import Setting, load_comparisons, load_text, make_up_pairs, prepare, read_pairs


def test_a_pair_is_cut_at_its_last_shared_cue(tmp_path) -> None:
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = {"chosen": start + " yes, b", "rejected": start + " yes\n\nAssistant: d"}
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(row).encode()))
    (pair,) = read_pairs(path)
    assert pair.prompt == start
    assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (row["chosen"], row["rejected"])


def test_ids_are_the_texts_and_end_in_the_end_of_text_token(tmp_path) -> None:
    setting = Setting(str(tmp_path), pairs=4, pairs_per_step=2)
    rows = make_up_pairs(30)
    counts = prepare(setting, rows)
    comparisons, text = load_comparisons(setting), load_text(setting)
    assert len(comparisons) == len(text) == setting.steps * setting.pairs_per_step == 6
    assert [row["prompt"] for row in text] == [pair.prompt for pair in rows[:6]]
    assert all(ids[-1] == 0 for comparison in comparisons for ids in comparison.response_ids)
    measured = comparisons[2:]
    assert counts["prompt_tokens"] == sum(len(comparison.prompt_ids) for comparison in measured)
