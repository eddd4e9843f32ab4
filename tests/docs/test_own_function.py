"""The documented reward function scores answers with a column of their row, in every command with annotators."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path

import pytest
import yaml
from tests.forked import run_ranks

from simpo.cli import main
from simpo.data.messages import Context
from simpo.judging.protocol import Answers
from simpo.judging.registry import make_scorer
from simpo.judging.settings import JudgeOptions
from simpo.runs.files import read_lines

_TEXT = (Path(__file__).parents[2] / "docs/judges.md").read_text(encoding="utf-8")
_FUNCTION, _FROM_TRL = re.findall(r"^```python\n(import re\n.*?|def from_trl.*?)^```$", _TEXT, re.MULTILINE | re.DOTALL)
_RECIPE = yaml.safe_load(re.search(r"^```yaml\n(.*?)^```$", _TEXT, re.MULTILINE | re.DOTALL)[1])  # type: ignore[index]
# Adds the response length to the documented function, so that an untrained model's answers get different scores.
_ALSO = """
def short(prompt, response, answer, level=0, **others):
    assert not {"prompt", "question"} & set(others), others
    return correct(prompt, response, answer) - len(response) + 100 * level
"""
ROWS = [
    {"question": f"What is {a} and {b}?", "answer": f"That is easy. #### {a + b}", "level": a, "id": f"{a}-{b}"}
    for a in range(3)
    for b in range(4)
]


@pytest.fixture
def problems(chat_world, tmp_path, monkeypatch):
    """Write the documented files for a tiny model; each test uses its own module name."""
    monkeypatch.chdir(tmp_path)
    Path("rewards.py").write_text(_FUNCTION + _ALSO)
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.delitem(__import__("sys").modules, "rewards", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return chat_world


def expected(row, response):
    """Apply the rule independently: the last run of digits, as a decimal number."""
    found = [token for token in re.split(r"[^\d.-]+", response) if any(map(str.isdigit, token))]
    answer = Decimal(row["answer"].rsplit(" ", 1)[1])
    return float(bool(found) and Decimal(found[-1].strip(".-")) == answer)


def small(world, **changes):
    """Return the documented recipe with a tiny model, few tokens and few steps."""
    assert _RECIPE["annotator"] == "function:rewards:correct" and _RECIPE["dataset_name"] == "problems.jsonl"
    recipe = _RECIPE | {"model_name_or_path": str(world / "model"), "max_length": 40, "max_new_tokens": 8}
    recipe |= {"num_generations": 4, "max_steps": 2, "per_device_train_batch_size": 6, "report_to": "none"}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe | {"use_cpu": True, "save_strategy": "no"} | changes))
    return ["online", "recipe.yaml"]


def test_the_documented_function_works(problems):
    scorer = make_scorer("function:rewards:correct", JudgeOptions(trust_remote_code=True))
    texts = ["It is 5.", "1,005", "5/1", "5.50", "It is 5 or 6.", "none", "10/2 = 5.0", ""]
    row = Answers("p", "What is 2 and 3?", texts, extra={"answer": "2 + 3 #### 5"})
    assert scorer.score([row]) == [[1, 0, 1, 0, 0, 0, 1, 0]]
    row = Answers("p", "?", ["-1005.5"], extra={"answer": "#### -1,005.5"})
    assert scorer.score([row]) == [[1]]


def test_the_documented_recipe_runs(problems):
    """The rollouts include the columns and scores based on them; different answers in the data make a different run."""
    by_question = {row["question"]: row for row in ROWS}
    arguments = small(problems)
    assert main(arguments) == 0
    records = [row for path in Path(_RECIPE["output_dir"], "rollouts").glob("0*.jsonl") for row in read_lines(path)]
    assert len(records) == 12
    for record in records:
        row = by_question[record["prompt"]]
        assert record["extra"] == {key: row[key] for key in ("answer", "level", "id")}
        assert record["scores"] == [expected(row, text) for text in record["responses"]]
    assert main(arguments) == 0  # already finished
    changed = [row | {"answer": "#### 7"} for row in ROWS]
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    assert main(arguments) == 2


def test_an_interrupted_run_rejects_changed_columns(problems, capsys):
    """It must not continue with different answers in the data."""
    Path("rewards.py").write_text(
        _FUNCTION
        + "import os\ndef correct_once(prompt, response, answer):\n"
        + "    if response != 'Answer.' and os.environ.get('STOP'):\n        os._exit(7)\n"
        + "    return correct(prompt, response, answer)\n"
    )
    arguments = small(problems, annotator="function:rewards:correct_once")
    assert run_ranks(1, main, arguments, folder=Path.cwd(), environment={"STOP": "1"}).codes == [7]
    Path("problems.jsonl").write_text("".join(json.dumps(row | {"answer": "#### 7"}) + "\n" for row in ROWS))
    assert main(arguments) == 2
    assert "data/train" in capsys.readouterr().err
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert main(arguments) == 0


def test_sampled_answers_are_annotated_with_their_columns(problems, capsys):
    sample = [
        "sample",
        str(problems / "model"),
        "problems.jsonl",
        "--n=3",
        "--max_new_tokens=8",
        "--output_dir=sampled",
    ]
    assert main(sample) == 0
    annotate = ["annotate", "sampled", "--annotator=function:rewards:short", "--trust_remote_code", "--output_dir=out"]
    assert main(annotate) == 0
    for row, record in zip(ROWS, read_lines(Path("out/annotated.jsonl")), strict=True):
        found = [expected(row, text) - len(text) + 100 * row["level"] for text in record["responses"]]
        assert record["scores"] == found
    assert [row["extra"]["answer"] for row in read_lines(Path("out/best.jsonl"))] == [row["answer"] for row in ROWS]
    capsys.readouterr()
    Path("problems.jsonl").write_text("".join(json.dumps(row | {"level": 7}) + "\n" for row in ROWS))
    assert main(sample) == 2  # the file already has the columns, so this would be a different run
    assert "columns" in capsys.readouterr().err


@pytest.mark.slow
def test_a_loop_passes_the_columns(problems):
    recipe = {
        "model_name_or_path": str(problems / "model"),
        "prompts": "problems.jsonl",
        "eval_prompts": "problems.jsonl",
    }
    recipe |= {"annotator": "function:rewards:short", "trust_remote_code": True, "rounds": 1, "n": 3, "eval_n": 1}
    recipe |= {"max_new_tokens": 8, "keep_unfinished": True, "per_device_train_batch_size": 4, "use_cpu": True}
    Path("loop.yaml").write_text(yaml.safe_dump(recipe | {"report_to": "none", "output_dir": "out"}))
    assert main(["loop", "loop.yaml"]) == 0
    for row, record in zip(ROWS, read_lines(Path("out/round-1/annotated/annotated.jsonl")), strict=True):
        found = [expected(row, text) - len(text) + 100 * row["level"] for text in record["responses"]]
        assert record["scores"] == found
    levels = {row["id"]: row["extra"]["level"] for row in read_lines(Path("out/round-1/answers/responses.jsonl"))}
    verdicts = read_lines(Path("out/round-1/comparison/verdicts.jsonl"))
    assert len(verdicts) == len(levels) == 12 and set(levels.values()) == {0, 1, 2}


def test_a_comparison_judges_with_columns(problems):
    models = [str(problems / "model")] * 2
    options = ["--prompts=problems.jsonl", "--judge=function:rewards:short", "--trust_remote_code", "--n=2"]
    options += ["--temperature=1", "--max_new_tokens=8", "--output_dir=compared"]
    assert main(["compare", *models, *options]) == 0
    by_question = {row["question"]: row for row in ROWS}
    verdicts = read_lines(Path("compared/verdicts.jsonl"))
    assert len(verdicts) == 12 * 4
    for one in verdicts:
        row = by_question[one["prompt"]]
        a, b = (expected(row, text) - len(text) for text in (one["a"], one["b"]))
        assert one["margins"] == {"function": a - b}


@pytest.mark.parametrize("command", ["online", "annotate", "loop", "compare", "eval"])
def test_a_missing_column_is_named_before_sampling(problems, capsys, command):
    """With function, parameter and columns, even if only the last row lacks it."""
    Path("rewards.py").write_text(_FUNCTION)
    rows = [*ROWS[:-1], {"question": "What is 9 and 9?", "anwser": "#### 18"}]
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, name = str(problems / "model"), "function:rewards:correct"
    if command == "online":
        arguments = small(problems)
    elif command == "annotate":
        Path("responses.jsonl").write_text(
            json.dumps({"id": "i", "prompt": "?", "responses": ["a"], "where": "p:12", "extra": {"anwser": 1}}) + "\n"
        )
        arguments = ["annotate", "responses.jsonl", f"--annotator={name}", "--trust_remote_code", "--output_dir=out"]
    elif command == "loop":
        recipe = {"model_name_or_path": model, "prompts": "problems.jsonl", "eval_prompts": "problems.jsonl"}
        recipe |= {"annotator": name, "trust_remote_code": True, "n": 2, "max_new_tokens": 8, "output_dir": "out"}
        Path("loop.yaml").write_text(yaml.safe_dump(recipe | {"report_to": "none"}))
        arguments = ["loop", "loop.yaml"]
    elif command == "compare":
        options = ["--prompts=problems.jsonl", f"--judge={name}", "--trust_remote_code", "--max_new_tokens=8"]
        arguments = ["compare", model, model, *options, "--output_dir=out"]
    else:
        held_out = [
            {"prompt": "What is 1 and 2?", "chosen": "It is 3.", "rejected": "It is 4.", "anwser": "#### 3"},
            {"prompt": "What is 1 and 3?", "chosen": "It is 4.", "rejected": "It is 5.", "anwser": "#### 4"},
        ]
        Path("held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
        Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        evaluated = {"eval_dataset_name": "held-out.jsonl", "eval_strategy": "steps", "eval_steps": 1}
        arguments = small(problems, **evaluated, eval_generations=2, eval_judge=name)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in (name, "'answer'", "did you mean anwser?"):
        assert part in error, error
    if command in ("online", "loop", "annotate"):
        assert ":12)" in error
    assert not list(Path().glob("**/responses.jsonl"))[command == "annotate" :]
    assert not list(Path().glob("**/rollouts/0*"))


def test_a_conversation_is_passed_as_messages(problems):
    Path("rewards.py").write_text(
        "def seen(prompt, response, /, tools, **columns):\n"
        "    assert [turn['role'] for turn in prompt] == ['system', 'user', 'assistant', 'user'], prompt\n"
        "    assert prompt[0]['content'] == 'Be brief.' and columns == {'prompt': 'mine', 'response': 4}, columns\n"
        "    return float(len(tools)) + (response == columns['prompt'])\n"
    )
    history = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "1."},
        {"role": "user", "content": "2?"},
    ]
    system = [{"role": "system", "content": "Be brief."}]
    tool = {"type": "function", "function": {"name": "add"}}
    scorer = make_scorer("function:rewards:seen", JudgeOptions(trust_remote_code=True))
    row = Answers("p", system + history, ["a", "mine"], Context([tool]), {"prompt": "mine", "response": 4})
    assert scorer.score([row]) == [[1.0, 2.0]]


def test_a_trl_reward_function_can_be_adapted(problems):
    """The documented adapter passes lists of one element, and a conversation's completion as a message."""
    Path("rewards.py").write_text(
        "def accuracy_reward(prompts, completions, solution, **kwargs):\n"
        "    texts = [one if isinstance(one, str) else one[0]['content'] for one in completions]\n"
        "    assert len(prompts) == len(kwargs['level']) == 1\n"
        "    return [2.0 if text == right else 0.0 for text, right in zip(texts, solution)]\n" + _FROM_TRL
    )
    scorer = make_scorer("function:rewards:from_trl", JudgeOptions(trust_remote_code=True))
    extra = {"solution": "3", "level": 1}
    messages = [{"role": "user", "content": "1 + 2?"}]
    rows = [Answers("p", "1 + 2?", ["3", "4"], extra=extra), Answers("q", messages, ["4", "3"], extra=extra)]
    assert scorer.score(rows) == [[2.0, 0.0], [0.0, 2.0]]
