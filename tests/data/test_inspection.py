from __future__ import annotations

import pytest
from datasets import Dataset

from simpo.data.inspection import examples, inspect_prepared, shared_rows
from simpo.data.rows import DataReport
from simpo.data.settings import TokenizeSettings
from simpo.data.tokenizing import Prepared, prepare

BOS, END = 0, 1


class Ids:
    """A tokenizer with nothing but special ids."""

    bos_token_id, eos_token_id, eos_token = BOS, END, "<end>"
    chat_template, added_tokens_decoder = None, {}


def tokenized(*rows):
    columns = {
        "prompt_ids": [prompt for prompt, *_ in rows],
        "response_ids": [list(responses) for _, *responses in rows],
        "where": [f"row {number}" for number in range(len(rows))],
    }
    return Dataset.from_dict(columns)


def inspect(*rows, bad=None):
    report = DataReport("train", rows=len(rows), used=len(rows), bad=bad or {})
    return inspect_prepared(Prepared(tokenized(*rows), report), Ids(), TokenizeSettings())


def test_lengths_and_length_bias_are_counted():
    rows = [([BOS] + [5] * count, [7] * count + [END], [8] * 3 + [END]) for count in range(1, 11)]
    found = inspect(*rows)
    assert found.lengths["prompt"] == {"p5": 2, "p25": 4, "p50": 6, "p75": 9, "p95": 11, "max": 11}
    assert set(found.lengths["rejected"].values()) == {4}
    assert (found.longer, found.ties) == (0.7, 0.1)


def test_repetitions_are_counted():
    a, b, c = [5, END], [6, END], [7, END]
    found = inspect(
        ([BOS, 2], a, b), ([BOS, 2], a, b), ([BOS, 2], a, c), ([BOS, 3], a, a), bad={"identical responses": 2}
    )
    assert (found.repeated, found.repeated_prompts, found.identical) == (1, 2, 3)


def test_rows_with_equal_concatenated_ids_are_not_repetitions():
    assert inspect(([BOS, 2], [5, 6, END], [7, END]), ([BOS, 2], [5], [6, END, 7, END])).repeated == 0


def test_special_tokens_are_counted():
    good, two, none = [BOS, 2], [BOS, BOS, 2], [2]
    late = [2, BOS]
    found = inspect(
        (good, [5, END], [6, END]), (two, [5], [6, END, END]), (none, [5, END], [END, 5]), (late, [5, END], [6, END])
    )
    assert (found.one_bos, found.ended) == (0.25, 5 / 8)


def test_overlap_counts_test_comparisons():
    train = tokenized(([BOS, 2], [5, END], [6, END]), ([BOS, 3], [5, END], [6, END]))
    test = tokenized(([BOS, 3], [5, END], [6, END]), ([BOS, 3], [7, END], [9, END]), ([BOS, 4], [7, END], [8, END]))
    assert shared_rows(train, test) == (1, 2)


def test_examples_of_pretokenized_data_are_shown(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    dataset = Dataset.from_dict({"prompt_ids": [[5, 6]], "response_ids": [[[7], [8]]]})
    prepared = prepare(dataset, tokenizer, TokenizeSettings())
    (example,) = examples(prepared.dataset, tokenizer)
    assert (example.where, example.prompt) == ("row 0", tokenizer.decode([5, 6]))


def test_metric_names_are_unique():
    names = [metric.name for metric in inspect(([BOS, 2], [5, END], [6, END])).metrics()]
    assert len(set(names)) == len(names) and "data/train/tokens/chosen/p95" in names


@pytest.mark.parametrize("kind", ["chatml", "sentencepiece", "tiny-english"])
def test_statistics_and_examples_work_with_real_tokenizers(build_tokenizer, kind):
    tokenizer = build_tokenizer(kind)
    rows = [{"prompt": "The answer is:", "chosen": f"yes {number}", "rejected": "no"} for number in range(9)]
    prepared = prepare(Dataset.from_list(rows), tokenizer, TokenizeSettings())
    found = inspect_prepared(prepared, tokenizer, TokenizeSettings())
    assert found.ended == 1.0 and found.one_bos == (None if kind == "chatml" else 1.0)
    assert found.repeated_prompts == 8
    shown = examples(prepared.dataset, tokenizer)
    assert [example.where for example in shown] == ["train row 0", "train row 4", "train row 8"]
    for example, number in zip(shown, (0, 4, 8), strict=True):
        messages = [{"role": "user", "content": "The answer is:"}, {"role": "assistant", "content": f"yes {number}"}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        assert whole.startswith(example.prompt + "".join(text for text, _ in example.responses[0]))


def test_contradicting_pairs_are_counted():
    a, b, c = [5, END], [6, END], [7, END]
    found = inspect(([BOS, 2], a, b), ([BOS, 2], b, a), ([BOS, 2], a, b), ([BOS, 2], c, a), ([BOS, 3], b, a))
    assert found.contradicted == 3
