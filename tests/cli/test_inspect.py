from __future__ import annotations

import json

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from simpo import cli
from simpo.cli.inspect import inspect

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ROWS = [{"prompt": f"question {number}", "chosen": "a longer answer", "rejected": "short"} for number in range(4)]


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A folder with a byte-level tokenizer."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "train.jsonl", ROWS)


def test_statistics_are_printed_and_written(model, data, tmp_path, capsys):
    test = write(tmp_path / "test.jsonl", [{**ROWS[0], "chosen": "other"}, {**ROWS[0], "prompt": "new"}])
    options = ["--model", model, "--eval_dataset_name", test, "--output_dir", str(tmp_path / "out")]
    inspect([data, *options])
    printed = capsys.readouterr().out
    assert "train: 4 comparisons of 4 rows" in printed
    assert "chosen longer                100.0% of comparisons; same length in 0.0%" in printed
    assert "1 of 2 eval comparisons (50.0%) have a training prompt" in printed
    assert (
        "<bos>[user]question 0<eos>[assistant]\nchosen: >>>a longer answer<eos><<<\nrejected: >>>short<eos><<<"
        in printed
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    metrics = {metric["name"]: metric["value"] for metric in results["metrics"]}
    assert results["command"] == "inspect"
    # One token per byte: the bytes of the answers and the end of turn.
    assert metrics["data/train/tokens/chosen/max"] == len("a longer answer") + 1
    assert metrics["data/train/tokens/prompt/p50"] == len("[user]question 0[assistant]") + 2
    assert metrics["data/eval/prompts_in_train"] == 1 and metrics["data/eval/ties"] == 0.5


def test_rows_that_would_be_dropped_or_truncated_are_reported(model, tmp_path, capsys):
    rows = [*ROWS, {**ROWS[0], "prompt": "q" * 200}, {**ROWS[0], "chosen": "c" * 200}]
    path = write(tmp_path / "a.jsonl", rows)
    inspect([path, "--model", model, "--max_length=100", "--max_prompt_length=40"])
    printed = capsys.readouterr().out
    assert "cut 1: prompt cut to max_prompt_length (a.jsonl:5)" in printed
    assert "dropped 1: longer than max_length even after its prompt is cut (a.jsonl:6)" in printed


def test_options_reach_tokenization(model, data, capsys):
    inspect([data, "--model", model, "--paper_tokenization", "true"])
    assert "chosen: >>>[assistant]a longer answer<eos><<<" in capsys.readouterr().out
    inspect([data, "--model", model, "--chat_template", "none"])
    assert "question 0\nchosen: >>>a longer answer<eos><<<" in capsys.readouterr().out


def test_data_cannot_control_the_terminal(model, tmp_path, capsys):
    path = write(
        tmp_path / "a.jsonl", [{"prompt": "[red]\x1b[2J\u202e", "chosen": "[/bold] a\r", "rejected": "b\n\x07c"}]
    )
    inspect([path, "--model", model])
    printed = capsys.readouterr().out
    assert r"[red]\x1b[2J\u202e" in printed and r">>>[/bold] a\r<eos><<<" in printed and "b\n\\x07c" in printed


def test_long_examples_say_what_is_omitted(model, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{**ROWS[0], "chosen": "c" * 1000}])
    inspect([path, "--model", model])
    assert f">>>{'c' * 300} [... 405 characters ...] {'c' * 295}<eos><<<" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--truncation", "cut"], "truncation: 'cut' is not one of prompt, drop, paper"),
        (["--max_length", "many"], "--max_length: 'many' is not a whole number"),
        (["--paper_tokenization", "maybe"], "'maybe' is not true or false"),
        (["--lenght", "3"], "--lenght: unknown key; did you mean max_length?"),
        (["--max_length", "8"], "fits max_length 8"),
    ],
)
def test_mistakes_give_a_one_line_error(model, data, capsys, options, message):
    assert cli.main(["inspect", data, "--model", model, *options]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("simpo: error: ") and message in last


def test_a_missing_file_is_reported(model, capsys):
    assert cli.main(["inspect", "nowhere.jsonl", "--model", model]) == 2
    assert "nowhere.jsonl: file not found" in capsys.readouterr().err


@pytest.mark.parametrize("scores", [[1, "x"], [1, [2]], [1, float("nan")]])
def test_non_numeric_scores_are_reported(scores, model, tmp_path, capsys):
    rows = [{"prompt": "p", "responses": ["a", "b"], "scores": scores}]
    assert cli.main(["inspect", write(tmp_path / "k.jsonl", rows), "--model", model]) == 2
    printed = capsys.readouterr()
    assert "k.jsonl:1: a score is not a number" in printed.err and printed.err.count("\n") == 1
    assert "nan" not in printed.out


def test_rankings_are_inspected(model, tmp_path, capsys):
    rows = [
        {"prompt": [{"role": "user", "content": f"q {n}"}], "responses": answers, "scores": [3.0, 1.0, 2.0]}
        for n, answers in enumerate(
            [["a long one", "b", "c d"], [[{"role": "assistant", "content": t}] for t in "xyz"]]
        )
    ]
    inspect([write(tmp_path / "k.jsonl", rows), "--model", model])
    printed = capsys.readouterr().out
    assert "train: 2 comparisons of 2 rows" in printed


def test_conversations_are_shown_as_they_are_learned(model, tmp_path, capsys):
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    rows.append({"instruction": "Add.", "input": "1", "output": "2"})
    options = ["--model", model, "--output_dir", str(tmp_path / "out")]
    inspect([write(tmp_path / "a.jsonl", rows), *options])
    printed = capsys.readouterr().out
    assert "train: 2 conversations of 2 rows" in printed
    assert "recognized 1: instruction and input as prompt; output as completion (a.jsonl:2)" in printed
    assert "response: >>>two<eos><<<[user]three<eos>[assistant]>>>four<eos><<<" in printed
    assert "[user]Add.\n\n1<eos>[assistant]\nresponse: >>>2<eos><<<" in printed and "rejected" not in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    metrics = {metric["name"]: metric["value"] for metric in results["metrics"]}
    assert metrics["data/train/tokens/response/p5"] == 2 and metrics["data/train/ended"] == 1


def test_feedback_columns_can_be_renamed(model, tmp_path, capsys):
    (tmp_path / "a.csv").write_text("ask,text,label\na,b,1\nc,d,0\n")
    options = ["--model", model, "--column_mapping", '{"ask": "prompt", "text": "completion"}']
    inspect([str(tmp_path / "a.csv"), *options])
    assert "train: 2 judged responses of 2 rows" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path / "a.csv"), "--model", model, "--column_mapping", "ask=prompt"]) == 2
    assert "column_mapping: " in capsys.readouterr().err


def test_splits_of_one_file_can_be_inspected(model, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", ROWS)
    inspect([path, "--model", model, "--split", "train[:1]"])
    assert "train: 1 comparisons of 1 rows" in capsys.readouterr().out
    assert cli.main(["inspect", path, "--model", model, "--split", "test"]) == 2
    assert "no split 'test'" in capsys.readouterr().err
