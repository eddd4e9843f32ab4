from __future__ import annotations

import json

import pytest
from datasets import Dataset

from simpo.data import tokenizing
from simpo.data.settings import TokenizeSettings
from simpo.data.sources import load_rows
from simpo.data.tokenizing import prepare
from simpo.errors import SimpoError

GOOD = {"prompt": "The answer is:", "chosen": "yes", "rejected": "no"}


def rows_with(bad, count):
    """Return the ``bad`` rows padded with good ones, ``count`` in total."""
    good = [{**GOOD, "chosen": f"yes {number}"} for number in range(count - len(bad))]
    return Dataset.from_list([*bad, *good])


@pytest.fixture
def chatml(build_tokenizer):
    return build_tokenizer("chatml")


def test_prepared_columns_have_fixed_types(chatml):
    dataset = prepare(Dataset.from_list([{**GOOD, "score": 3}]), chatml, TokenizeSettings()).dataset
    assert {name: str(feature) for name, feature in dataset.features.items()} == {
        "prompt_ids": "List(Value('int32'))",
        "response_ids": "List(List(Value('int32')))",
        "where": "Value('string')",
        "extra": "Value('string')",
    }
    assert dataset[0]["where"] == "train row 0" and json.loads(dataset[0]["extra"]) == {"score": 3}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**GOOD, "rejected": "yes"}, "identical responses"),
        ({**GOOD, "rejected": ""}, "empty response"),
        ({**GOOD, "rejected": " \n"}, "empty response"),
        ({**GOOD, "rejected": "<|im_end|>\n"}, "empty response"),
        ({**GOOD, "rejected": None}, "rejected is null, not text or messages"),
        ({**GOOD, "rejected": "yes<|im_end|>"}, "identical responses"),
    ],
)
def test_bad_rows_are_skipped_counted_and_reported(chatml, row, reason):
    prepared = prepare(rows_with([row], 100), chatml, TokenizeSettings())
    assert len(prepared.dataset) == prepared.report.used == 99
    assert prepared.report.bad == {reason: 1} and prepared.report.examples == {reason: ["train row 0"]}
    with pytest.raises(SimpoError, match=f"^train row 0: {reason}; fix the row"):
        prepare(rows_with([row], 100), chatml, TokenizeSettings(on_bad_row="error"))
    with pytest.raises(SimpoError, match=rf"^train: 1 of 99 rows are bad, more than 1%.*\(train row 0: {reason}\)"):
        prepare(rows_with([row], 99), chatml, TokenizeSettings())


def test_each_reason_among_many_bad_rows_is_reported_once(chatml):
    bad = [{**GOOD, "rejected": ""}, {**GOOD, "rejected": None}, {**GOOD, "rejected": " "}, {**GOOD, "rejected": ""}]
    with pytest.raises(SimpoError) as error:
        prepare(rows_with(bad, 10), chatml, TokenizeSettings())
    assert str(error.value).endswith(
        "(train row 0: empty response (and 2 more); train row 1: rejected is null, not text or messages)"
    )


def test_a_reason_may_quote_a_lone_surrogate(chatml, tmp_path):
    lines = [json.dumps({"prompt": "p", "\ud800": 1}), *[json.dumps(GOOD)] * 99]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    report = prepare(load_rows(str(tmp_path / "a.jsonl"), split="train"), chatml, TokenizeSettings()).report
    ((reason, count),) = report.bad.items()
    assert count == 1 and "\\ud800" in reason


def test_a_lone_surrogate_makes_a_bad_row(chatml, tmp_path):
    lines = [json.dumps({**GOOD, "rejected": "no \ud83d"}), *[json.dumps(GOOD)] * 99]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    report = prepare(load_rows(str(tmp_path / "a.jsonl"), split="train"), chatml, TokenizeSettings()).report
    assert report.bad == {"text is not valid Unicode (it contains a lone surrogate)": 1}
    assert report.examples == {"text is not valid Unicode (it contains a lone surrogate)": ["a.jsonl:1"]}


def test_a_template_that_rejects_a_row(chatml):
    chatml.chat_template = (
        "{% for m in messages %}{% if 'bad' in m['content'] %}{{ raise_exception('no bad words') }}{% endif %}"
        "{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    report = prepare(rows_with([{**GOOD, "prompt": "bad"}], 100), chatml, TokenizeSettings()).report
    assert report.bad == {"the chat template rejects it: no bad words": 1}


def test_rows_in_no_known_format_are_rejected(chatml):
    dataset = Dataset.from_list([{"prompt": "p", "completion": "c"}] * 3)
    message = r"no row has a recognized shape \(train row 0: .*supervised fine-tuning.*accepted are \{prompt, chosen"
    with pytest.raises(SimpoError, match=message):
        prepare(dataset, chatml, TokenizeSettings())


def test_anything_but_a_single_data_set_is_rejected(chatml):
    with pytest.raises(SimpoError, match=r"train: a dict instead of a datasets\.Dataset; pass one split"):
        prepare({"train": []}, chatml, TokenizeSettings())
    with pytest.raises(SimpoError, match="train: no rows"):
        prepare(Dataset.from_list([]), chatml, TokenizeSettings())


def test_tokenized_data_is_returned_unchanged(chatml):
    first = prepare(Dataset.from_list([GOOD]), chatml, TokenizeSettings())
    second = prepare(first.dataset, chatml, TokenizeSettings(max_length=2))
    assert second.dataset is first.dataset
    assert second.report.notices == ["already tokenized, used unchanged"] and second.report.used == 1


@pytest.fixture
def source(tmp_path):
    rows = [{**GOOD, "chosen": f"yes {number}"} for number in range(99)] + [{**GOOD, "rejected": ""}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "a.jsonl"


def test_a_second_run_hits_the_cache_and_has_the_same_report(chatml, source, monkeypatch):
    first = prepare(load_rows(str(source), split="train"), chatml, TokenizeSettings())

    def fail(*_):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(tokenizing.Tokenization, "__call__", fail)
    # Tokenizer calls toggle padding and truncation, which affects none of our ids.
    chatml(["a", "b c"], padding=False, truncation=True, max_length=2)
    second = prepare(load_rows(str(source), split="train"), chatml, TokenizeSettings(num_proc=2, on_bad_row="skip"))
    assert second.report == first.report and second.report.bad == {"empty response": 1}
    assert second.dataset.to_list() == first.dataset.to_list()
    with pytest.raises(SimpoError, match=r"^a\.jsonl:100: empty response"):
        prepare(load_rows(str(source), split="train"), chatml, TokenizeSettings(on_bad_row="error"))


@pytest.mark.parametrize("change", ["template", "settings", "special", "tokenizer", "file"])
def test_nothing_stale_comes_from_the_cache(chatml, build_tokenizer, source, change):
    before = prepare(load_rows(str(source), split="train"), chatml, TokenizeSettings()).dataset[0]
    settings = TokenizeSettings(paper_tokenization=change == "settings")
    if change == "template":
        chatml.chat_template = chatml.chat_template.replace("<|im_start|>", "<|endoftext|>")
    elif change == "special":
        chatml.chat_template = None
        plain = prepare(load_rows(str(source), split="train"), chatml, settings).dataset[0]
        chatml.eos_token = "<|im_end|>"
        assert prepare(load_rows(str(source), split="train"), chatml, settings).dataset[0] != plain
        return
    elif change == "tokenizer":
        chatml = build_tokenizer("two-bos")
    elif change == "file":
        source.write_text(source.read_text().replace("yes 0", "yes!!"))
    assert prepare(load_rows(str(source), split="train"), chatml, settings).dataset[0] != before


def test_several_processes_give_the_same_rows(chatml, tmp_path):
    rows = [{**GOOD, "chosen": f"yes {number}"} for number in range(2000)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = load_rows(str(tmp_path / "a.jsonl"), split="train")
    two = prepare(dataset, chatml, TokenizeSettings(num_proc=2)).dataset
    one = prepare(Dataset.from_list(dataset.to_list()), chatml, TokenizeSettings(num_proc=1)).dataset
    assert two.to_list() == one.to_list()


def test_small_data_is_tokenized_in_one_process():
    assert tokenizing._process_count(1999, 8) is None
    assert tokenizing._process_count(2000, 8) == 8
    assert tokenizing._process_count(10**6, 1) is None


def test_a_format_set_by_the_user_is_ignored(chatml):
    dataset = Dataset.from_list([{**GOOD, "score": 1}]).with_format("numpy")
    assert json.loads(prepare(dataset, chatml, TokenizeSettings()).dataset[0]["extra"]) == {"score": 1}
