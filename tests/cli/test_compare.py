"""``simpo compare``: models and answer files, every kind of judge, kills while a server answers, and mistakes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sqlite3
import sys
import time
from contextlib import closing, suppress
from multiprocessing import get_context
from random import Random

import pytest
from tests.servers.chat_server import ChatServer, Raw, completion
from tests.servers.model_answers import ModelAnswers
from tests.servers.transformers_serve import transformers_serve

from simpo.cli import main
from simpo.runs.files import read_lines
from simpo.runs.results import read_results
from simpo.world.pairs import make_prompts
from simpo.world.questions import draw_answer, full_answer, judge, read_question

PROMPTS = [row["prompt"] for row in make_prompts(30, 0)]


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Isolate the test from the user's cache, keys and terminal, and shorten waits."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


@pytest.fixture
def answers(tmp_path):
    """``a.json`` and ``b.json``: answers to the world's questions; those in ``a`` are often better."""
    for name, share in (("a", 0.5), ("b", 0.0)):
        rng = Random(name)
        questions = [read_question(prompt) for prompt in PROMPTS]
        texts = [full_answer(q) if rng.random() < share else draw_answer(q, rng) for q in questions]
        rows = [{"instruction": prompt, "output": text} for prompt, text in zip(PROMPTS, texts, strict=True)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


def command(folder, *options, a="a.json", b="b.json", output="out"):
    return ["compare", str(folder / a), str(folder / b), f"--output_dir={folder / output}", *options]


def read_metrics(folder):
    return {(metric.name, metric.stage): metric for metric in read_results(folder / "results.json").metrics}


def test_the_exact_judges_win_rate(answers, capsys):
    assert main(command(answers, "--judge=exact")) == 0
    a, b = (json.loads((answers / name).read_text()) for name in ("a.json", "b.json"))
    points = []
    for ours, theirs in zip(a, b, strict=True):
        x, y = (judge(row["instruction"], row["output"]) for row in (ours, theirs))
        points.append(1.0 if x > y else 0.5 if x == y else 0.0)
    found = read_metrics(answers / "out")
    rate = found["win_rate/exact", None]
    assert rate.value == pytest.approx(sum(points) / 30) and rate.low < rate.value < rate.high and rate.n == 30
    assert found["ties/exact", None].value == pytest.approx(points.count(0.5) / 30)
    characters = sum(len(row["output"]) for row in b) / 30
    assert found["response_characters", "before"].value == pytest.approx(characters)
    verdicts = read_lines(answers / "out/verdicts.jsonl")
    assert [row["verdicts"]["exact"] for row in verdicts] == points
    assert [row["prompt"] for row in verdicts] == PROMPTS
    printed = capsys.readouterr().out
    assert "win_rate/exact" in printed and str(answers / "out/verdicts.jsonl") in printed
    page = (answers / "out/report.html").read_text()
    assert f"report: {answers / 'out/report.html'}" in printed
    controlled = found["length_controlled_win_rate/exact", None]
    sentence = page.partition('class="sentence">')[2].partition("</p>")[0]
    for one in (rate.value, rate.low, rate.high, points.count(0.5) / 30, controlled.value, controlled.low):
        assert f"{100 * one:.1f}" in sentence
    assert sentence.startswith("A&#39;s answers win") and str(answers / "a.json") in page
    assert main(command(answers, "--judge=exact", output="again")) == 0
    assert (answers / "out/results.json").read_bytes() == (answers / "again/results.json").read_bytes()


def test_a_finished_run_is_left_alone_and_a_different_one_rejected(answers, capsys):
    assert main(command(answers, "--judge=exact")) == 0
    before = (answers / "out/results.json").stat().st_mtime_ns
    assert main(command(answers, "--judge=exact")) == 0
    assert (answers / "out/results.json").stat().st_mtime_ns == before
    assert main(command(answers, "--judge=exact", "--seed=7")) == 2
    assert "seed: was 42, now 7" in capsys.readouterr().err


def test_several_judges_agree_or_do_not(answers):
    verdicts = answers / "human.jsonl"
    assert main(command(answers, "--judge=exact")) == 0
    rows = read_lines(answers / "out/verdicts.jsonl")
    winners = {1.0: "a", 0.0: "b", 0.5: "tie"}
    labels = [{"id": row["id"], "winner": winners[row["verdicts"]["exact"]]} for row in rows[:20]]
    verdicts.write_text("".join(json.dumps(row) + "\n" for row in labels))
    assert main(command(answers, "--judge=exact", f"--judge=human:{verdicts}", output="both")) == 0
    found = read_metrics(answers / "both")
    assert found["kappa/exact+human", None].value == 1 and found["kappa/exact+human", None].n == 20
    assert found["without_verdict/human", None].value == 10 and found["win_rate/human", None].n == 20


@pytest.fixture(scope="module")
def models(tmp_path_factory, write_chat_model):
    """A folder with a tiny chat model and prompts."""
    folder = tmp_path_factory.mktemp("models")
    write_chat_model(folder / "model", [*PROMPTS, "[[A]] [[B]] [[C]]"], 2048)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS[:5]))
    return folder


def test_models_are_sampled_and_scored(models, tmp_path, capsys):
    """A greedy model against itself ties everywhere; then against its own samples at another temperature."""
    model, prompts = str(models / "model"), f"--prompts={models / 'prompts.jsonl'}"
    options = ["--judge=exact", f"--judge=logp:{model}", "--max_new_tokens=8"]
    assert main(["compare", model, model, prompts, *options, f"--output_dir={tmp_path / 'out'}"]) == 0
    found = read_metrics(tmp_path / "out")
    assert found["win_rate/logp", None].value == 0.5 and found["ties/logp", None].value == 1
    assert found["response_tokens", "after"].value == found["response_tokens", "before"].value > 0
    sampled = ["sample", model, str(models / "prompts.jsonl"), f"--output_dir={tmp_path / 'drawn'}", "--n=2"]
    assert main([*sampled, "--max_new_tokens=8", "--temperature=1"]) == 0
    # The prompts are those of the samples; greedy answers are likelier than sampled ones.
    assert main(["compare", model, str(tmp_path / "drawn"), *options, f"--output_dir={tmp_path / 'second'}"]) == 0
    found = read_metrics(tmp_path / "second")
    assert found["win_rate/logp", None].value > 0.7 and found["win_rate/logp", None].n == 5
    assert len(read_lines(tmp_path / "second/verdicts.jsonl")) == 10
    assert "10 pairs of answers to 5 prompts" in capsys.readouterr().out


def prefer_shorter(body):
    """A judge that prefers the shorter answer, but cannot decide some pairs."""
    first, second = re.findall(r"<answer_[AB]>\n(.*?)\n</answer_", body["messages"][0]["content"], re.DOTALL)
    if len(first) + len(second) == 33:
        return completion("I cannot decide.")
    return completion(f"[[{'A' if len(first) < len(second) else 'B'}]]")


def at(server, *options):
    return ["--judge=api", f"--judge_url={server.url}", "--judge_model=tiny", "--yes", *options]


def test_a_warm_cache_sends_nothing_and_gives_the_same_file(answers, capsys):
    with ChatServer(prefer_shorter) as server:
        assert main(command(answers, *at(server, "--prices", "1", "2"))) == 0
        sent = len(server.bodies)
        assert sent == 2 * sum(x != y for x, y in pairs_of(answers))
        assert main(command(answers, *at(server), output="again")) == 0
        assert len(server.bodies) == sent
    assert (answers / "out/results.json").read_bytes() == (answers / "again/results.json").read_bytes()
    found = read_metrics(answers / "out")
    missing = [len(x) + len(y) == 33 for x, y in pairs_of(answers) if x != y]
    assert found["without_verdict/api", None].value == sum(missing)
    even = sum(len(x) == len(y) and x != y for x, y in pairs_of(answers))  # it says B whichever answer that is
    assert found["conflicting_orders/api", None].value == even
    first = found["first_shown_win_rate/api", None]  # for pairs of equal length the second answer wins both times
    judged = sum(x != y for x, y in pairs_of(answers)) - sum(missing)
    assert first.n == judged and first.value == pytest.approx((0.5 * (judged - even)) / judged)
    printed = capsys.readouterr().out
    assert f"{sent} requests to send, 0 in the cache; estimate: about" in printed and "at most $" in printed
    assert f"{sent} requests sent" in printed and f"0 requests to send, {sent} in the cache" in printed


def pairs_of(answers):
    a, b = (json.loads((answers / name).read_text()) for name in ("a.json", "b.json"))
    return [(x["output"], y["output"]) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_continues(answers, kill):
    def slow(body):
        time.sleep(0.02)
        return prefer_shorter(body)

    with ChatServer(slow) as server:
        line = command(answers, *at(server, "--judge_concurrency=2"))
        process = get_context("fork").Process(target=lambda: sys.exit(main(line)))
        process.start()
        while len(server.bodies) < 12:
            time.sleep(0.002)
        os.kill(process.pid, kill)
        process.join()
        assert process.exitcode == (-9 if kill == signal.SIGKILL else 143)
        assert not (answers / "out/results.json").exists()
        assert main(line) == 0
        total = 2 * sum(x != y for x, y in pairs_of(answers))
        assert total <= len(server.bodies) <= total + 2
        assert main(command(answers, *at(server), output="whole")) == 0
    assert (answers / "out/results.json").read_bytes() == (answers / "whole/results.json").read_bytes()


def test_a_server_that_fails_loses_nothing(answers, capsys):
    with ChatServer(prefer_shorter, [Raw(200, b"{"), Raw(503)]) as server:
        server.faults += [Raw(429, b"{}", {"Retry-After": "0"})] * 3
        assert main(command(answers, *at(server))) == 0
    with ChatServer(lambda body: Raw(401, b'{"error": "no"}')) as server:
        (answers / "cache").rename(answers / "old")
        assert main(command(answers, *at(server), output="other")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "status 401" in error and "replies so far are cached" in error


def test_the_user_confirms_the_cost(answers, capsys, monkeypatch):
    with ChatServer(prefer_shorter) as server:
        line = [option for option in command(answers, *at(server)) if option != "--yes"]
        assert main(line) == 2
        assert "pass --yes" in capsys.readouterr().err
        terminal = io.StringIO("n\ny\n")
        terminal.isatty = lambda: True
        monkeypatch.setattr("sys.stdin", terminal)
        assert main(line) == 2
        assert "nothing was sent" in capsys.readouterr().err and server.bodies == []
        assert main(line) == 0
        assert server.bodies
        terminal.truncate(0)  # Ctrl-D
        assert main([*line[:3], f"--output_dir={answers / 'other'}", *line[4:], "--judge_max_tokens=7"]) == 2


def test_a_real_model_can_be_the_judge(models, answers, capsys):
    """Random text has no verdict; it is counted, reported, and not part of any win rate."""
    prompt = answers / "short.md"
    prompt.write_text("{question} {answer_a} {answer_b}")
    with ChatServer(ModelAnswers(models / "model")) as server:
        assert main(command(answers, *at(server, "--judge_max_tokens=2", f"--judge_prompt={prompt}"))) == 0
    found = read_metrics(answers / "out")
    different = sum(x != y for x, y in pairs_of(answers))
    assert found["without_verdict/api", None].value == different
    assert found["win_rate/api", None].value in (None, 0.5)
    assert f"judge api gave no verdict on {different} of 30 pairs" in capsys.readouterr().out


def stored_replies(folder):
    """Return the number of replies in a folder's databases."""
    count = 0
    for path in folder.rglob("*.sqlite3"):
        with (
            suppress(sqlite3.OperationalError),
            closing(sqlite3.connect(path)) as database,
        ):  # the table may not exist yet
            count += database.execute("SELECT count(*) FROM replies").fetchone()[0]
    return count


@pytest.mark.slow
def test_comparing_with_transformers_serve(models, answers):
    """End to end: sample, judge over HTTP, get killed in between, and repeat without sending anything."""
    model = str(models / "model")
    with transformers_serve(models / "model") as url:
        server = ["--judge=api", f"--judge_url={url}", f"--judge_model={model}", "--judge_max_tokens=16", "--yes"]
        options = ["--temperature=1", "--max_new_tokens=8", *server]
        line = ["compare", model, str(answers / "sampled"), *options, f"--output_dir={answers / 'out'}"]
        sample = ["sample", model, str(models / "prompts.jsonl"), f"--output_dir={answers / 'sampled'}"]
        assert main([*sample, "--max_new_tokens=8", "--seed=1"]) == 0
        process = get_context("fork").Process(target=lambda: sys.exit(main(line)))
        process.start()
        while process.is_alive() and not stored_replies(answers / "cache"):
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert main(line) == 0
    # The server is gone, but the cache is enough.
    assert main([*line[:-1], f"--output_dir={answers / 'again'}"]) == 0
    assert (answers / "out/results.json").read_bytes() == (answers / "again/results.json").read_bytes()
    found = read_metrics(answers / "out")
    rows = read_lines(answers / "out/verdicts.jsonl")
    missing = sum(row["verdicts"]["api"] is None for row in rows)
    assert len(rows) == 5 and found["without_verdict/api", None].value == missing


OTHER = [{"instruction": "What is 99 plus 99?", "output": "198."}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], ["--judge"]),
        (["--judge=exakt"], ["unknown judge 'exakt'", "exact"]),
        (["--judge=exact", "--judge=exact"], ["given twice"]),
        (["--judge=api"], ["--judge_url"]),
        (["--judge=api", "--judge_url=http://127.0.0.1:1/v1"], ["judge_url and judge_model"]),
        (["--judge=api", "--judge_url=https://a.invalid/v1", "--judge_model=m"], ["OPENAI_API_KEY"]),
        (["--judge=function:os:getcwd"], ["--trust_remote_code"]),
        (["--judge=human:nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--judge=exact", "--prompts=p.jsonl"], ["prompts", "--prompts"]),
        (["--judge=exact", "--temperature=-1"], ["temperature"]),
        (["--judge=reward:./nowhere"], ["./nowhere"]),
    ],
)
def test_mistakes_give_a_one_line_error(answers, capsys, options, message):
    assert main(command(answers, *options)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in message), error
    assert not (answers / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1:], "1 prompts were answered by only one side"),
        (lambda rows: rows[1:] + OTHER, "2 prompts were answered by only one side"),
        (lambda rows: rows + rows[:1], "b.json[30]: prompt"),
        (lambda rows: [row | {"output": 7} for row in rows], "b.json[0]: output: expected text"),
        (lambda rows: [{"text": "x"}], "b.json[0]: id: expected text"),
        (lambda rows: [], "no rows"),
    ],
)
def test_answers_that_cannot_be_compared_give_a_one_line_error(answers, capsys, change, message):
    path = answers / "b.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert main(command(answers, "--judge=exact")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error, error


@pytest.mark.parametrize(("a", "message"), [("nowhere", "nowhere"), ("nowhere.json", "file not found")])
def test_missing_models_and_files_give_a_one_line_error(answers, capsys, a, message):
    assert main(command(answers, "--judge=exact", a=a)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not (answers / "out").exists()


def test_the_cost_is_confirmed_before_models_are_sampled(models, tmp_path, capsys):
    """Two requests per pair of answers of maximum length; existing answers count with their real length."""
    model, prompts = str(models / "model"), f"--prompts={models / 'prompts.jsonl'}"
    sampled = ["--n=2", "--temperature=1", "--max_new_tokens=8"]
    assert main(["sample", model, str(models / "prompts.jsonl"), *sampled, f"--output_dir={tmp_path / 'there'}"]) == 0
    with ChatServer(prefer_shorter) as server:
        judge = [option for option in at(server) if option != "--yes"]
        both = ["compare", model, model, prompts, *judge, "--n=2", "--temperature=1"]
        one = ["compare", str(tmp_path / "there"), model, *judge]
        estimates = []
        for name, line in (("both", both), ("one", one)):
            for longest in (100, 200):
                folder = tmp_path / f"{name}-{longest}"
                assert main([*line, f"--max_new_tokens={longest}", f"--output_dir={folder}"]) == 2
                printed = capsys.readouterr()
                assert "pass --yes" in printed.err and not list(folder.glob("[ab]"))
                found = re.search(r"(\d+) requests to send, 0 .* about ([\d,]+) prompt tokens", printed.out)
                estimates.append((int(found[1]), int(found[2].replace(",", ""))))
        (pairs, less), (_, more), (fewer, little), (_, little_more) = estimates
        assert (pairs, fewer) == (2 * 5 * 2 * 2, 2 * 5 * 2)
        assert more - less == 100 * 2 * pairs and little_more - little == 100 * fewer
        assert server.bodies == []
        assert main([*one, "--max_new_tokens=8", f"--output_dir={tmp_path / 'out'}", "--yes"]) == 0
        assert server.bodies


def test_prompts_too_long_for_one_model_are_reported_before_sampling(models, tmp_path, capsys, write_chat_model):
    long = {"prompt": "Sort " + " ".join(map(str, range(60))) + "."}
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text((models / "prompts.jsonl").read_text() + json.dumps(long) + "\n")
    write_chat_model(tmp_path / "narrow", [*PROMPTS, "[[A]] [[B]] [[C]]"], 64)
    options = [f"--prompts={prompts}", "--judge=exact", "--max_new_tokens=8", f"--output_dir={tmp_path / 'out'}"]
    assert main(["compare", str(models / "model"), str(tmp_path / "narrow"), *options]) == 2
    error = capsys.readouterr().err
    assert "1 prompts were answered by only one side" in error and "its context" in error and error.count("\n") == 1
    assert not list((tmp_path / "out").glob("[ab]"))


def test_different_prompts_are_a_different_run(models, tmp_path, capsys):
    """Even if the run has finished and nothing would be sampled."""
    model, prompts = str(models / "model"), tmp_path / "prompts.jsonl"
    lines = (models / "prompts.jsonl").read_text().splitlines(keepends=True)
    prompts.write_text("".join(lines))
    options = [f"--prompts={prompts}", "--judge=exact", "--max_new_tokens=4", f"--output_dir={tmp_path / 'out'}"]
    assert main(["compare", model, model, *options]) == 0
    assert main(["compare", model, model, *options]) == 0
    assert "already holds the finished run" in capsys.readouterr().out
    prompts.write_text("".join(lines[1:]))
    assert main(["compare", model, model, *options]) == 2
    assert "a/prompts: contents changed" in capsys.readouterr().err


def test_a_refused_request_is_not_a_verdict(answers, capsys):
    """The other order of the pair is enough, and all other pairs are judged as usual."""
    x, y = next(pair for pair in pairs_of(answers) if pair[0] != pair[1])
    fault = Raw(400, b'{"error": {"message": "filtered"}}')

    def filtered(body):
        shown = re.findall(r"<answer_[AB]>\n(.*?)\n</answer_", body["messages"][0]["content"], re.DOTALL)
        return fault if shown == [x, y] else prefer_shorter(body)

    with ChatServer(filtered) as server:
        assert main(command(answers, *at(server))) == 0
    refused = pairs_of(answers).count((x, y))
    printed = capsys.readouterr().out
    assert f"{refused} of {len(server.bodies)} requests refused, the first with status 400: filtered" in printed
    verdicts = [row["verdicts"]["api"] for row in read_lines(answers / "out/verdicts.jsonl")]
    for pair, verdict in zip(pairs_of(answers), verdicts, strict=True):
        undecided = pair == (x, y) or (len("".join(pair)) == 33 and pair[0] != pair[1])
        assert (verdict is None) == undecided


def test_a_comparison_runs_in_one_process(answers, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command(answers, "--judge=exact")) == 2
    error = capsys.readouterr().err
    assert "simpo compare runs in one process" in error and error.count("\n") == 1
    assert not (answers / "out").exists()


def test_comparing_models_requires_prompts(models, tmp_path, capsys):
    model = str(models / "model")
    assert main(["compare", model, model, "--judge=exact", f"--output_dir={tmp_path / 'out'}"]) == 2
    assert "--prompts" in capsys.readouterr().err
