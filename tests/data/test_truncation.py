from __future__ import annotations

import pytest
from datasets import Dataset

from simpo.data.settings import OVERLONG, PROMPT_CUT, RESPONSE_CUT, STILL_OVERLONG, TokenizeSettings, truncate
from simpo.data.tokenizing import prepare
from simpo.errors import SimpoError

BOS = 1
PROMPT = [BOS, *range(10, 19)]  # ten tokens
SHORT, LONG = [20, 21, 2], [*range(30, 39), 2]


def limits(max_length, max_prompt_length, **settings):
    return TokenizeSettings(max_length=max_length, max_prompt_length=max_prompt_length, **settings)


@pytest.mark.parametrize("truncation", ["prompt", "drop", "paper"])
def test_rows_that_fit_are_left_alone(truncation):
    assert truncate(PROMPT, [SHORT, LONG], limits(20, 4, truncation=truncation), BOS) == (PROMPT, [SHORT, LONG], [])


@pytest.mark.parametrize(("mode", "expected"), [("keep_end", [BOS, 16, 17, 18]), ("keep_start", [BOS, 10, 11, 12])])
def test_a_truncated_prompt_keeps_its_bos(mode, expected):
    truncated = truncate(PROMPT, [SHORT, LONG], limits(19, 4, truncation_mode=mode), BOS)
    assert truncated == (expected, [SHORT, LONG], [f"cut: {PROMPT_CUT}"])


@pytest.mark.parametrize("truncation", ["prompt", "paper"])
def test_a_comparison_that_just_fits_after_truncating_its_prompt_is_kept(truncation):
    """Four prompt tokens and ten response tokens; with one token less it is dropped or truncated."""
    prompt = PROMPT[-4:] if truncation == "paper" else [BOS, *PROMPT[-3:]]
    exact = truncate(PROMPT, [SHORT, LONG], limits(14, 4, truncation=truncation), BOS)
    assert exact == (prompt, [SHORT, LONG], [f"cut: {PROMPT_CUT}"])
    assert truncate(PROMPT, [SHORT, LONG], limits(13, 4, truncation=truncation), BOS) != exact


def test_a_prompt_without_bos_keeps_its_end():
    assert truncate(PROMPT[1:], [SHORT, LONG], limits(18, 4), None)[0] == PROMPT[-4:]


def test_a_comparison_whose_responses_still_do_not_fit_is_dropped():
    truncated = truncate(PROMPT, [SHORT, LONG], limits(13, 4), BOS)
    assert truncated == (PROMPT, [SHORT, LONG], [f"dropped: {STILL_OVERLONG}"])


def test_drop_mode_truncates_nothing():
    truncated = truncate(PROMPT, [SHORT, LONG], limits(19, 4, truncation="drop"), BOS)
    assert truncated == (PROMPT, [SHORT, LONG], [f"dropped: {OVERLONG}"])


def test_paper_mode_cuts_the_end_off_both_responses():
    """max_length - max_prompt_length tokens remain of each; the prompt keeps its end and loses its BOS."""
    truncated = truncate(PROMPT, [SHORT, LONG], limits(12, 4, truncation="paper"), BOS)
    assert truncated == (PROMPT[-4:], [SHORT, LONG[:8]], [f"cut: {PROMPT_CUT}", f"cut: {RESPONSE_CUT}"])


def test_paper_mode_with_a_short_prompt_only_cuts_responses():
    truncated = truncate(PROMPT[:3], [LONG, SHORT], limits(12, 4, truncation="paper"), BOS)
    assert truncated == (PROMPT[:3], [LONG[:8], SHORT], [f"cut: {RESPONSE_CUT}"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 1}, "max_length: must be at least 2, not 1"),
        ({"max_length": 64, "max_prompt_length": 64}, "max_prompt_length: 64 leaves no room"),
        ({"max_length": 2.5}, "max_length: 2.5 is not a whole number"),
        ({"max_prompt_length": 0}, "max_prompt_length: must be at least 1, not 0"),
        ({"truncation_mode": "keep"}, "truncation_mode: 'keep' is not one of keep_end, keep_start"),
        ({"truncation": "cut"}, "truncation: 'cut' is not one of prompt, drop, paper"),
        ({"on_bad_row": "no"}, "on_bad_row: 'no' is not one of skip, error"),
        ({"num_proc": 0}, "num_proc: must be at least 1, not 0"),
        ({"paper_tokenization": "yes"}, "paper_tokenization: 'yes' is not true or false"),
    ],
)
def test_wrong_settings_are_reported_by_key(settings, message):
    with pytest.raises(SimpoError, match=f"^{message}"):
        TokenizeSettings(**settings)


def test_the_default_prompt_limit_is_the_papers_ratio():
    assert TokenizeSettings().prompt_limit == 1800
    assert TokenizeSettings(max_length=1024).prompt_limit == 900


WORDS = "The answer is yes "


def test_everything_truncated_or_dropped_is_counted(build_tokenizer):
    tokenizer = build_tokenizer("two-bos")
    rows = [
        {"prompt": "The", "chosen": "yes", "rejected": "no"},
        {"prompt": WORDS * 40, "chosen": "yes", "rejected": "no"},
        {"prompt": "The", "chosen": WORDS * 60, "rejected": "no"},
    ]
    settings = TokenizeSettings(max_length=60, max_prompt_length=30)
    prepared = prepare(Dataset.from_list(rows), tokenizer, settings, label="test")
    report = prepared.report
    assert (report.rows, report.used) == (3, 2)
    assert report.cut == {PROMPT_CUT: 1} and report.dropped == {STILL_OVERLONG: 1}
    assert report.examples == {PROMPT_CUT: ["test row 1"], STILL_OVERLONG: ["test row 2"]}
    cut = prepared.dataset[1]["prompt_ids"]
    assert len(cut) == 30 and cut.count(tokenizer.bos_token_id) == 1 and cut[0] == tokenizer.bos_token_id
    assert dict(report.metrics())["data/test/dropped"] == 1
    assert f"  dropped 1: {STILL_OVERLONG} (test row 2)" in report.lines()


def test_paper_truncation_has_a_notice_and_no_eos_on_cut_responses(build_tokenizer):
    tokenizer = build_tokenizer("two-bos")
    row = {"prompt": "The", "chosen": WORDS * 60, "rejected": "no"}
    settings = TokenizeSettings(max_length=60, max_prompt_length=40, truncation="paper")
    prepared = prepare(Dataset.from_list([row]), tokenizer, settings)
    chosen, rejected = prepared.dataset[0]["response_ids"]
    assert len(chosen) == 20 and tokenizer.eos_token_id not in chosen
    assert rejected[-1] == tokenizer.eos_token_id
    assert prepared.report.cut == {RESPONSE_CUT: 1}
    assert any("truncation: paper" in notice for notice in prepared.report.notices)


def test_it_is_an_error_if_no_row_fits(build_tokenizer):
    tokenizer = build_tokenizer("two-bos")
    row = {"prompt": "The answer", "chosen": WORDS * 9, "rejected": "no"}
    shortest = len(tokenizer.apply_chat_template([{"role": "user", "content": "The answer"}], return_dict=False)) + 2
    with pytest.raises(SimpoError, match=r"^train: no row fits max_length 8: .*; raise max_length$") as caught:
        prepare(Dataset.from_list([row]), tokenizer, TokenizeSettings(max_length=8))
    header = len(tokenizer("[assistant]", add_special_tokens=False).input_ids)
    assert f"the shortest prompt has {shortest - 2 + header} tokens" in str(caught.value)
