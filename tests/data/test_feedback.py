"""Single responses with labels: detection, tokenization identical to comparisons, and rejected rows."""

from __future__ import annotations

import json

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from simpo.data.formats import read_feedback
from simpo.data.rows import BadRow, as_dataset
from simpo.data.settings import TokenizeSettings
from simpo.data.shapes import canonical
from simpo.data.sources import load_rows
from simpo.data.tokenizing import is_feedback, prepare, prepare_feedback, prepare_sft
from simpo.errors import SimpoError

USER = [{"role": "user", "content": "The answer is:"}]


def feedback(count: int = 4) -> list[dict]:
    return [
        {"prompt": "The answer is:", "completion": f"yes {n}", "label": n % 2 == 0, "score": n} for n in range(count)
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "The answer is:", "completion": "yes"},
        {"prompt": USER, "completion": [{"role": "assistant", "content": "yes"}]},
        {"prompt": USER, "completion": "yes"},
        {"prompt": "The answer is:", "completion": [*USER, {"role": "assistant", "content": "yes"}]},
    ],
)
def test_feedback_is_tokenized_like_a_comparison(row, tokenizer):
    pair = {"prompt": "The answer is:", "chosen": "yes", "rejected": "no"}
    expected = prepare(Dataset.from_list([pair]), tokenizer, TokenizeSettings()).dataset[0]
    rows = Dataset.from_list([{**row, "label": True}, {**row, "label": False}])
    assert is_feedback(rows)
    found = prepare_feedback(rows, tokenizer, TokenizeSettings()).dataset
    assert (found[0]["prompt_ids"], found[0]["response_ids"]) == (expected["prompt_ids"], expected["response_ids"][:1])
    assert found["label"][:] == [True, False]


def test_prepared_feedback_has_labels_and_a_report(build_tokenizer):
    prepared = prepare_feedback(Dataset.from_list(feedback()), build_tokenizer("chatml"), TokenizeSettings())
    assert prepared.dataset.column_names == ["prompt_ids", "response_ids", "label", "where", "extra"]
    assert json.loads(prepared.dataset[3]["extra"]) == {"score": 3}
    assert prepared.report.lines() == ["train: 4 judged responses of 4 rows"]
    assert prepare_feedback(prepared.dataset, None, TokenizeSettings()).dataset is prepared.dataset


@pytest.mark.parametrize("label", [2, -1, 0.5, "yes", None])
def test_a_label_must_be_a_boolean(label, build_tokenizer, tmp_path):
    """Anything else in JSON rows makes a bad row, which is counted and reported."""
    with pytest.raises(BadRow, match="label is neither true nor false"):
        read_feedback({"prompt": "p", "completion": "c", "label": label}, "")
    rows = [*feedback(99), {"prompt": "The answer is:", "completion": "no", "label": label}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = prepare_feedback(load_rows(str(path), split="train"), build_tokenizer("chatml"), TokenizeSettings()).report
    assert report.bad == {"label is neither true nor false (1 or 0)": 1}
    assert report.examples == {"label is neither true nor false (1 or 0)": ["rows.jsonl:100"]}


@pytest.mark.parametrize("given", ["python", "parquet", "save_to_disk"])
@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["false", "true"], [False, True]),
        (["true", "false"], [True, False]),
        (["1", "0"], [True, False]),
        (["good", "bad"], None),  # only the user can say which one is desirable
    ],
)
def test_class_labels_are_read_by_name(names, labels, given, build_tokenizer, tmp_path):
    features = {"prompt": Value("string"), "completion": Value("string"), "label": ClassLabel(names=names)}
    columns = {"prompt": ["p", "p"], "completion": ["yes", "no"], "label": [0, 1]}
    rows = Dataset.from_dict(columns, features=Features(features))
    if given == "python":
        rows = as_dataset(rows, "train_dataset")
    else:
        path = str(tmp_path / "rows.parquet")
        rows.to_parquet(path) if given == "parquet" else rows.save_to_disk(path)
        rows = load_rows(path, split="train")
    if labels:
        found = prepare_feedback(rows, build_tokenizer("chatml"), TokenizeSettings()).dataset
        assert found["label"][:] == labels
    else:
        with pytest.raises(SimpoError, match=r"2 of 2 rows are bad.*label is neither true nor false"):
            prepare_feedback(rows, build_tokenizer("chatml"), TokenizeSettings())


def test_verdict_class_labels_are_read_by_name(build_tokenizer):
    columns = {"prompt": ["p"] * 3, "response_a": ["yes"] * 3, "response_b": ["no"] * 3, "winner": [1, 0, -1]}
    text = Value("string")
    classes = ClassLabel(names=["model_b", "model_a"])
    features = Features({"prompt": text, "response_a": text, "response_b": text, "winner": classes})
    rows = as_dataset(Dataset.from_dict(columns, features=features), "rows")
    assert rows["winner"][:] == ["model_a", "model_b", None]
    again = as_dataset(Dataset.from_dict(columns, features=features), "rows")
    assert again._fingerprint == rows._fingerprint  # so that the cache is found
    alone = Dataset.from_dict({"winner": [1]}, features=Features({"winner": classes}))
    assert as_dataset(alone, "rows")[:] == {"winner": ["model_a"]}
    tokenizer = build_tokenizer("chatml")
    found = prepare(rows.select([0, 1]), tokenizer, TokenizeSettings()).dataset["response_ids"]
    assert [tokenizer.decode(responses[0]) for responses in found] == ["yes<|im_end|>", "no<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"completion": 3}, "completion is int, not text or messages"),
        ({"completion": [*USER]}, "completion does not end with an assistant message"),
        ({"prompt": 3}, "prompt is int, not text or messages"),
    ],
)
def test_bad_rows_give_a_reason(row, reason):
    with pytest.raises(BadRow, match=reason):
        read_feedback({"prompt": "p", "completion": "c", "label": True} | row, "")


@pytest.mark.parametrize("label", [True, False])
def test_identical_labels_are_rejected(label, build_tokenizer):
    rows = Dataset.from_list([row | {"label": label} for row in feedback()])
    with pytest.raises(SimpoError, match=f"^train: every row has the label {str(label).lower()}; both desirable"):
        prepare_feedback(rows, build_tokenizer("chatml"), TokenizeSettings())


def test_which_rows_are_feedback(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(feedback()[0]) + "\n")
    assert is_feedback(load_rows(str(path), split="train"))
    for row in ({"prompt": "p", "completion": "c"}, {"prompt": "p", "chosen": "c", "rejected": "d", "label": True}):
        assert not is_feedback(Dataset.from_list([row]))


@pytest.mark.parametrize("name", ["label", "kto_tag"])
def test_a_labeled_conversation_is_feedback_and_not_plain_training_data(name, build_tokenizer):
    """LLaMA-Factory's format; otherwise the model would learn its undesirable answers."""
    answers = [("yes", True), ("no", False)]
    turns = [[{"role": "user", "content": "p"}, {"role": "assistant", "content": text}] for text, _ in answers]
    rows = Dataset.from_list([{"messages": turn, name: label} for turn, (_, label) in zip(turns, answers, strict=True)])
    plain = Dataset.from_list([{"prompt": "p", "completion": text, "label": label} for text, label in answers])
    tokenizer = build_tokenizer("chatml")
    assert is_feedback(rows)
    found, expected = (prepare_feedback(each, tokenizer, TokenizeSettings()).dataset for each in (rows, plain))
    columns = ["prompt_ids", "response_ids", "label"]
    assert found.select_columns(columns)[:] == expected.select_columns(columns)[:]
    with pytest.raises(BadRow, match="label judges messages that do not end with an assistant message"):
        read_feedback(canonical({"messages": turns[0] + USER, name: True})[0], "")
    with pytest.raises(SimpoError, match="unpaired feedback"):
        prepare_sft(rows, tokenizer, TokenizeSettings())
