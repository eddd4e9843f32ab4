"""``simpo annotate``: every annotator on real answers, killed runs, and one-line errors."""

from __future__ import annotations

import json
import random
import re
import shutil
from itertools import combinations

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from scipy.stats import rankdata, zscore
from tests.servers.chat_server import ChatServer, Raw, completion

from simpo.cli import main
from simpo.judging import annotate as annotation
from simpo.judging.protocol import Answers
from simpo.judging.registry import make_scorer
from simpo.judging.scorers import ExactScorer
from simpo.judging.settings import JudgeOptions
from simpo.runs.files import read_lines
from simpo.runs.results import read_results
from simpo.world.pairs import make_prompts
from simpo.world.questions import draw_answer, judge, read_question

PROMPTS = [row["prompt"] for row in make_prompts(12, seed=3)]


def rows(n=4):
    rng = random.Random(0)
    return [
        {"id": f"i{number}", "prompt": prompt, "responses": [draw_answer(read_question(prompt), rng) for _ in range(n)]}
        | {"finished": [True] * n, "where": f"p.jsonl:{number}"}
        for number, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture
def sampled(tmp_path):
    """A folder with ``responses.jsonl``."""
    write(tmp_path / "sampled/responses.jsonl", rows())
    return tmp_path


def write(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in records))


def command(folder, annotator, *options, output="out"):
    return ["annotate", str(folder / "sampled"), "--annotator", annotator, f"--output_dir={folder / output}", *options]


def read_metrics(folder):
    return {metric.name: metric for metric in read_results(folder / "results.json").metrics}


def test_the_exact_judge_scores_answers(sampled, capsys):
    assert main(command(sampled, "exact")) == 0
    found = read_lines(sampled / "out/annotated.jsonl")
    for row, given in zip(found, rows(), strict=True):
        scores = [judge(row["prompt"], text) for text in row["responses"]]
        assert row == given | {"scores": scores}
    for best, row in zip(read_lines(sampled / "out/best.jsonl"), found, strict=True):
        place = row["scores"].index(max(row["scores"]))
        assert best == {
            "id": row["id"], "prompt": row["prompt"],
            "responses": [row["responses"][place]], "scores": [max(row["scores"])],
        }  # fmt: skip
    wins = []
    for row in found:
        answers = combinations(zip(row["responses"], row["scores"], strict=True), 2)
        clear = [(len(a) > len(b)) == (x > y) for (a, x), (b, y) in answers if len(a) != len(b) and x != y]
        wins += [sum(clear) / len(clear)] if clear else []
    measured = read_metrics(sampled / "out")
    assert measured["annotate/longer_wins"].value == pytest.approx(sum(wins) / len(wins))
    assert measured["annotate/best_score"].value == pytest.approx(sum(max(row["scores"]) for row in found) / 12)
    assert (measured["annotate/unscored"].value, measured["annotate/score/p50"].n) == (0, 48)
    printed = capsys.readouterr().out
    assert "12 of 12 prompts scored" in printed and "annotate/longer_wins" in printed


def test_a_killed_run_continues(sampled, monkeypatch):
    """Finished parts are not scored again, and the files are identical."""
    monkeypatch.setattr(annotation, "_PROMPTS_PER_PART", 5)
    assert main(command(sampled, "exact")) == 0
    with monkeypatch.context() as patch:
        scored = iter([*[[[float(judge(row["prompt"], text)) for text in row["responses"]] for row in rows()[:5]]]])
        patch.setattr("simpo.judging.scorers.ExactScorer.score", lambda self, part: next(scored))
        assert main(command(sampled, "exact", output="killed")) == 1  # the exit code for unexpected errors
    assert not (sampled / "killed/annotated.jsonl").exists()
    with (sampled / "killed/.scores.jsonl").open("a") as file:
        file.write('{"scores": [[1.')  # as left by a kill
    assert main(command(sampled, "exact", output="killed")) == 0
    for name in ("annotated.jsonl", "best.jsonl", "results.json"):
        assert (sampled / "out" / name).read_bytes() == (sampled / "killed" / name).read_bytes()
    assert not list((sampled / "killed").glob(".scores*"))


def test_a_different_annotator_needs_a_different_folder(sampled, capsys):
    assert main(command(sampled, "exact")) == 0
    before = (sampled / "out/annotated.jsonl").stat().st_mtime_ns
    assert main(command(sampled, "exact")) == 0
    assert (sampled / "out/annotated.jsonl").stat().st_mtime_ns == before
    write(sampled / "sampled/responses.jsonl", rows()[:6])
    assert main(command(sampled, "exact")) == 2
    assert "responses: contents changed" in capsys.readouterr().err


def test_a_policy_scores_by_log_probability(sampled, chat_world):
    write(sampled / "sampled/responses.jsonl", [rows(2)[0] | {"prompt": "What is 1 and 2?", "responses": ["3.", "4."]}])
    name = f"logp:{chat_world / 'model'}"
    assert main(command(sampled, name)) == 0
    [expected] = make_scorer(name, JudgeOptions()).score([Answers("i0", "What is 1 and 2?", ("3.", "4."))])
    assert read_lines(sampled / "out/annotated.jsonl")[0]["scores"] == expected


def test_a_model_that_cannot_be_loaded_leaves_no_folder(sampled, chat_world, capsys, tmp_path):
    shutil.copytree(chat_world / "model", tmp_path / "broken")
    weights = load_file(tmp_path / "broken/model.safetensors")
    weights.pop(lost := min(weights))
    save_file(weights, tmp_path / "broken/model.safetensors", metadata={"format": "pt"})
    assert main(command(sampled, f"logp:{tmp_path / 'broken'}")) == 2
    printed = capsys.readouterr().err
    assert f"1 missing ({lost})" in printed and printed.count("\n") == 1
    assert not (sampled / "out").exists()


def test_a_pairwise_judge_scores_answers(sampled):
    """The score is the mean win probability against the others. A missing verdict does not count as a loss."""
    texts = ["gold", "silver", "bronze", "unspeakable", "silver"]
    ranks = {"gold": 3, "silver": 2, "bronze": 1}
    write(sampled / "sampled/responses.jsonl", [{"id": "a", "prompt": "q", "responses": texts}])

    def answer(body):
        first, second = re.findall(r"<answer_[AB]>\n(.*?)\n</answer_", body["messages"][0]["content"], re.DOTALL)
        if "unspeakable" in (first, second):
            return completion("I would rather not.")
        return completion(f"[[{'A' if ranks[first] > ranks[second] else 'B'}]]")

    with ChatServer(answer, faults=[Raw(500), Raw(429, headers={"Retry-After": "0"})]) as server:
        options = [f"--judge_url={server.url}", "--judge_model=tiny", f"--cache={sampled / 'cache'}"]
        assert main(command(sampled, "api", *options)) == 2  # nobody is there to confirm the cost
        assert not server.bodies and not (sampled / "out").exists()
        assert main(command(sampled, "api", *options, "--yes")) == 0
        asked = len(server.bodies)
        assert main(command(sampled, "api", *options, "--yes", output="again")) == 0
        assert len(server.bodies) == asked
    [row] = read_lines(sampled / "out/annotated.jsonl")
    # silver: lost to gold, beat bronze, tied with itself
    assert row["scores"] == [1.0, 0.5, 0.0, None, 0.5]
    assert (sampled / "out/annotated.jsonl").read_bytes() == (sampled / "again/annotated.jsonl").read_bytes()
    assert read_metrics(sampled / "out")["annotate/unscored"].value == 1
    assert main(["pair", str(sampled / "out"), f"--output_dir={sampled / 'pairs'}"]) == 0
    assert [(row["chosen"], row["rejected"]) for row in read_lines(sampled / "pairs/pairs.jsonl")] == [
        ("gold", "bronze")
    ]


def test_a_refused_request_counts_as_no_comparison(sampled, capsys, monkeypatch):
    """Even if, after a kill, only refused requests are left, in a separate part."""
    monkeypatch.setattr(annotation, "_PROMPTS_PER_PART", 2)
    records = [{"id": name, "prompt": name, "responses": ["gold.", "tin."]} for name in ("one", "two", "long")]
    write(sampled / "sampled/responses.jsonl", records)

    def answer(body):
        text = body["messages"][0]["content"]
        if "<request>\nlong\n</request>" in text:
            return Raw(400, b'{"error": {"message": "too long"}}')
        return completion(f"[[{'A' if text.index('gold.') < text.index('tin.') else 'B'}]]")

    with ChatServer(answer) as server:
        options = [f"--judge_url={server.url}", "--judge_model=tiny", f"--cache={sampled / 'cache'}", "--yes"]
        assert main(command(sampled, "api", *options)) == 0
        assert "2 of 6 requests refused, the first with status 400: too long" in capsys.readouterr().out
        (sampled / "killed").mkdir()
        for name in ("run.json", ".scores.jsonl"):
            (sampled / "killed" / name).touch()
        record = json.loads((sampled / "out/run.json").read_text())
        (sampled / "killed/run.json").write_text(json.dumps(record | {"status": "running", "finished": None}))
        write(sampled / "killed/.scores.jsonl", [{"scores": [[1.0, 0.0], [1.0, 0.0]]}])
        assert main(command(sampled, "api", *options, output="killed")) == 0
    assert [row["scores"] for row in read_lines(sampled / "out/annotated.jsonl")] == [[1, 0], [1, 0], [None, None]]
    assert "2 of 6 answers have no score" in (sampled / "out/log.txt").read_text()
    for name in ("annotated.jsonl", "best.jsonl", "results.json"):
        assert (sampled / "out" / name).read_bytes() == (sampled / "killed" / name).read_bytes()


@pytest.mark.parametrize("normalization", ["none", "rank"])
def test_several_annotators_give_weighted_sums_even_after_a_kill(sampled, monkeypatch, normalization):
    """The weighted sum of normalized scores, with each annotator's own; a killed run ends with identical bytes."""
    monkeypatch.setattr(annotation, "_PROMPTS_PER_PART", 5)
    (sampled / "vowels_of_test.py").write_text("def count(prompt, text): return sum(map(text.count, 'aeiou'))\n")
    monkeypatch.syspath_prepend(sampled)
    name = "function:vowels_of_test:count"
    options = [f"--annotator_normalization={normalization}", "--trust_remote_code"]
    annotators = json.dumps({"exact": 0.25, name: 2})
    assert main(command(sampled, annotators, *options)) == 0
    for row in read_lines(sampled / "out/annotated.jsonl"):
        exact = [judge(row["prompt"], text) for text in row["responses"]]
        vowels = [sum(letter in "aeiou" for letter in text) for text in row["responses"]]
        assert row["annotator_scores"] == {"exact": exact, name: vowels}
        given = row["annotator_scores"].values()
        scales = [(rankdata(own) - 1) / (len(own) - 1) if normalization == "rank" else np.array(own) for own in given]
        assert row["scores"] == pytest.approx(0.25 * scales[0] + 2 * scales[1], abs=1e-12)
    with monkeypatch.context() as patch:
        score, calls = ExactScorer.score, iter(range(2))
        patch.setattr(ExactScorer, "score", lambda self, part: (next(calls), score(self, part))[1])
        assert main(command(sampled, annotators, *options, output="killed")) == 1  # in the third part
    assert main(command(sampled, annotators, *options, output="killed")) == 0
    for name in ("annotated.jsonl", "best.jsonl", "results.json"):
        assert (sampled / "out" / name).read_bytes() == (sampled / "killed" / name).read_bytes()
    assert main(["pair", str(sampled / "out"), f"--output_dir={sampled / 'pairs'}"]) == 0
    assert len(read_lines(sampled / "pairs/pairs.jsonl")) > 1


def test_an_answer_without_a_verdict_has_no_combined_score(sampled):
    """It is counted for the annotator that has none; a different normalization needs a different folder."""
    prompt = PROMPTS[0]
    write(
        sampled / "sampled/responses.jsonl",
        [{"id": "a", "prompt": prompt, "responses": ["gold", "unspeakable", "tin"]}],
    )

    def answer(body):
        text = body["messages"][0]["content"]
        if "unspeakable" in text:
            return completion("I would rather not.")
        return completion(f"[[{'A' if text.index('gold') < text.index('tin') else 'B'}]]")

    with ChatServer(answer) as server:
        options = [f"--judge_url={server.url}", "--judge_model=tiny", f"--cache={sampled / 'cache'}", "--yes"]
        assert main(command(sampled, '{"exact": 1, "api": 3}', *options)) == 0
        changed = [*options, "--annotator_normalization=none"]
        assert main(command(sampled, '{"exact": 1, "api": 3}', *changed)) == 2
    [row] = read_lines(sampled / "out/annotated.jsonl")
    assert row["annotator_scores"] == {"exact": [judge(prompt, text) for text in row["responses"]], "api": [1, None, 0]}
    exact = zscore([row["annotator_scores"]["exact"][k] for k in (0, 2)], ddof=1)
    expected = np.nan_to_num(exact) + 3 * zscore([1, 0], ddof=1)
    assert row["scores"] == [pytest.approx(expected[0]), None, pytest.approx(expected[1])]
    found = read_metrics(sampled / "out")
    assert [found[f"annotate/unscored{name}"].value for name in ("", "/exact", "/api")] == [1, 0, 1]


def test_annotation_runs_in_one_process(sampled, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command(sampled, "exact")) == 2
    error = capsys.readouterr().err
    assert "simpo annotate runs in one process" in error and error.count("\n") == 1
    assert not (sampled / "out").exists()


def test_a_server_that_refuses_loses_nothing(sampled, capsys):
    with ChatServer(lambda body: completion("[[A]]"), faults=[]) as server:
        options = [f"--judge_url={server.url}", "--judge_model=tiny", f"--cache={sampled / 'cache'}", "--yes"]
        server.faults += [Raw(401, b'{"error": {"message": "who are you?"}}')]
        assert main(command(sampled, "api", *options, "--judge_concurrency=1")) == 2
        printed = capsys.readouterr().err
        assert "401" in printed and printed.count("\n") == 1
        assert main(command(sampled, "api", *options)) == 0


def test_a_missing_api_key_is_named(sampled, capsys, monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    options = ["--judge_url=https://judge.invalid/v1", "--judge_model=m", "--judge_key_env=MY_KEY", "--yes"]
    assert main(command(sampled, "api", *options)) == 2
    printed = capsys.readouterr().err
    assert "set the environment variable MY_KEY" in printed and printed.count("\n") == 1
    assert not (sampled / "out").exists()


SCORERS = """
def nan(prompt, response): return float("nan")
def words(prompt, response): return "many"
def length(prompt, response): return len(response)
"""


@pytest.mark.parametrize(
    ("annotator", "options", "message"),
    [
        (
            "function:scorers_of_test:nan",
            ["--trust_remote_code"],
            "prompt i0: expected finite scores, got [nan, nan, nan, nan]",
        ),
        ("function:scorers_of_test:words", ["--trust_remote_code"], "prompt i0: ValueError"),
        ("function:scorers_of_test:length", [], "allow it with --trust_remote_code"),
        ("api", [], "--judge_url and --judge_model"),
        ("exakt", [], "did you mean exact?"),
        ("human:x.jsonl", [], "unknown judge"),
    ],
)
def test_unusable_annotators_give_a_one_line_error(annotator, options, message, sampled, capsys, monkeypatch):
    (sampled / "scorers_of_test.py").write_text(SCORERS)
    monkeypatch.chdir(sampled)
    assert main(command(sampled, annotator, *options)) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "responses.jsonl: cannot be read"),
        ("", "responses.jsonl: no rows"),
        ('{"prompt": "p"}\n', "responses.jsonl:1: id: expected text"),
        (
            '{"id": "1", "prompt": [1], "responses": ["a"]}\n',
            "responses.jsonl:1: prompt contains something other than mess",
        ),
        ('{"id": "1", "prompt": [], "responses": ["a"]}\n', "responses.jsonl:1: prompt has no messages"),
        ('{"id": "1", "prompt": "p", "responses": []}\n', "responses.jsonl:1: responses: expected one or more texts"),
        (
            '{"id": "1", "prompt": "p", "responses": ["a"], "extra": 1}\n',
            "responses.jsonl:1: extra: expected a mapping",
        ),
        ('{"id": "1", "prompt": "p", "responses": ["a"]}\n{"id', "responses.jsonl:2: "),
        ('{"id": "1", "prompt": "Who?", "responses": ["a"]}\n', "exact: prompt 1:"),
    ],
)
def test_unusable_responses_give_a_one_line_error(content, message, tmp_path, capsys):
    (tmp_path / "sampled").mkdir()
    if content is not None:
        (tmp_path / "sampled/responses.jsonl").write_text(content)
    assert main(command(tmp_path, "exact")) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not (tmp_path / "out/annotated.jsonl").exists()
