"""``simpo evaluate`` on the command line, with a real server around a real tiny model."""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import signal
import threading
import time
from multiprocessing import get_context

import pytest
import torch
from tests.servers.chat_server import ChatServer, Raw, completion
from tests.servers.model_answers import ModelAnswers

from simpo.cli import main
from simpo.runs.results import read_results

QUESTIONS = [f"What is {a} plus {b}?" for a in range(4) for b in range(3)]
MATH = [{"question": text, "answer": f"So it is #### {number}"} for number, text in enumerate(QUESTIONS)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory, write_chat_model):
    """A tiny chat model, small files for every benchmark, and another model's answers."""
    folder = tmp_path_factory.mktemp("world")
    write_chat_model(folder / "model", [*QUESTIONS, "mM It is 1 or 2."], 2048)
    reference = [{"instruction": q, "output": f"It is {n}.", "generator": "base"} for n, q in enumerate(QUESTIONS)]
    write(folder / "reference.jsonl", reference)
    answers = [{"instruction": q, "output": f"I say {n % 5}." if n else "It is 0."} for n, q in enumerate(QUESTIONS)]
    write(folder / "outputs.jsonl", answers)
    gamed = ["index,std_delta_len,instruction_difficulty,preference"]
    gamed += [f"{n},{(-1) ** n * 0.7},{n / 5 - 1},{0.3 + n / 30}" for n in range(12)]
    (folder / "gamed.csv").write_text("\n".join(gamed) + "\n")
    write(folder / "arena.jsonl", [{"uid": f"u{n}", "category": "math", "prompt": q} for n, q in enumerate(QUESTIONS)])
    for name in ("base", "mine"):
        rows = [
            {"uid": f"u{n}", "model": name, "messages": [{"role": "assistant", "content": {"answer": f"{name} {n}"}}]}
            for n in range(len(QUESTIONS))
        ]
        write(folder / f"{name}.jsonl", rows)
    turns = [
        {"question_id": n, "category": ("writing", "math")[n % 2], "turns": [q, "And then?"], "reference": ["0", "1"]}
        for n, q in enumerate(QUESTIONS[:4])
    ]
    write(folder / "mt.jsonl", turns)
    write(folder / "gsm8k.jsonl", MATH)
    return folder


@pytest.fixture(scope="module")
def judge(world):
    """The model's own odds of m against M as the first token, scaled to sum to 0.9, and a text that follows them."""
    model = ModelAnswers(world / "model")
    names = {name: model.tokenizer(name, add_special_tokens=False).input_ids for name in "mM"}
    assert all(len(ids) == 1 for ids in names.values())

    def answer(body):
        found = model.first_token_logprobs(body["messages"])
        both = torch.stack([found[ids[0]] for ids in names.values()])
        logprobs = dict(zip(names, (both.log_softmax(-1) + math.log(0.9)).tolist(), strict=True))
        return completion(max(logprobs, key=logprobs.get), logprobs if body.get("logprobs") else None)

    return answer


def alpaca(world, url, output, *more, model="outputs.jsonl", cache="cache"):
    return [
        "evaluate",
        "alpaca_eval",
        str(world / model),
        f"--output_dir={output}",
        f"--reference_outputs={world / 'reference.jsonl'}",
        f"--gamed={world / 'gamed.csv'}",
        f"--judge_url={url}",
        "--judge_model=tiny",
        f"--cache={output.parent / cache}",
        "--yes",
        *more,
    ]


def read_metrics(folder):
    return {metric.name: metric for metric in read_results(folder / "results.json").metrics}


def test_preferences_come_from_the_judges_probabilities(world, judge, tmp_path, capsys):
    """One request per pair of different answers, in the drawn order, weighted and swapped back."""
    with ChatServer(judge) as server:
        assert main(alpaca(world, server.url, tmp_path / "out")) == 0
        assert len(server.bodies) == len(QUESTIONS) - 1  # the first two answers are identical
    rows = json.loads((tmp_path / "out/annotations.json").read_text())
    assert [row["instruction"] for row in rows] == QUESTIONS and rows[0]["preference"] == 1.5
    sent = {body["messages"][1]["content"]: judge(body) for body in server.bodies}
    for row in rows[1:]:
        text, reply = next((text, reply) for text, reply in sent.items() if row["instruction"] in text)
        top = {t["token"]: t["logprob"] for t in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
        first = math.exp(top["m"]) / (math.exp(top["m"]) + math.exp(top["M"]))
        switched = random.Random("is_switched_outputs" + row["instruction"] + "0").choices([False, True])[0]
        assert (text.index(row["output_2"]) < text.index(row["output_1"])) is switched
        assert row["preference"] == pytest.approx(1 + first if switched else 2 - first)
    found = read_metrics(tmp_path / "out")
    mean = sum(row["preference"] - 1 for row in rows) / len(rows)
    assert found["alpaca_eval/win_rate"].value == pytest.approx(100 * mean)
    assert found["alpaca_eval/win_rate"].n == len(rows)
    assert 0 < found["alpaca_eval/length_controlled_winrate"].value < 100
    assert "44.7" in capsys.readouterr().out


def test_a_warm_cache_sends_nothing_and_gives_the_same_file(world, judge, tmp_path, capsys):
    with ChatServer(judge) as server:
        assert main(alpaca(world, server.url, tmp_path / "a")) == 0
        sent = len(server.bodies)
        assert main(alpaca(world, server.url, tmp_path / "b")) == 0
        before = (tmp_path / "a/results.json").stat().st_mtime_ns
        capsys.readouterr()
        assert main(alpaca(world, server.url, tmp_path / "a")) == 0
        printed = capsys.readouterr().out
        assert f"{tmp_path / 'a'} already holds the finished run" in printed
        assert "alpaca_eval/win_rate" in printed and "requests" not in printed
        assert (tmp_path / "a/results.json").stat().st_mtime_ns == before
        assert len(server.bodies) == sent
    assert (tmp_path / "a/results.json").read_bytes() == (tmp_path / "b/results.json").read_bytes()


def test_annotations_give_the_same_metrics_without_a_judge(world, judge, tmp_path, capsys):
    with ChatServer(judge) as server:
        assert main(alpaca(world, server.url, tmp_path / "a")) == 0
    command = ["evaluate", "alpaca_eval", f"--annotations={tmp_path / 'a/annotations.json'}"]
    assert main([*command, f"--output_dir={tmp_path / 'b'}", f"--gamed={world / 'gamed.csv'}"]) == 0
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b")
    assert json.loads((tmp_path / "b/run.json").read_text())["identity"]["judge"] == "weighted_tiny"
    assert main([*command, f"--output_dir={tmp_path / 'c'}"]) == 0  # the hub is not reachable in tests
    assert "no length-controlled win rate" in capsys.readouterr().out
    assert "alpaca_eval/length_controlled_winrate" not in read_metrics(tmp_path / "c")


def test_a_model_is_sampled_and_its_outputs_written(world, judge, tmp_path):
    with ChatServer(judge) as server:
        options = ["--max_new_tokens=8", "--plain"]
        assert main(alpaca(world, server.url, tmp_path / "out", *options, model="model")) == 0
        assert not any("logprobs" in body for body in server.bodies)
    outputs = json.loads((tmp_path / "out/model_outputs.json").read_text())
    assert [row["instruction"] for row in outputs] == QUESTIONS
    sampled = [json.loads(line) for line in (tmp_path / "out/answers/responses.jsonl").read_text().splitlines()]
    assert [row["output"] for row in outputs] == [row["responses"][0] for row in sampled]
    assert {row["generator"] for row in outputs} == {"model"}
    identity = json.loads((tmp_path / "out/run.json").read_text())["identity"]
    assert {"model", "chat_template", "temperature", "judge", "judge_prompt"} <= identity.keys()
    assert (identity["dtype"], identity["max_new_tokens"]) == ("float32", 8)


def test_a_reply_without_a_verdict_is_counted_and_not_scored(world, judge, tmp_path, capsys):
    def forgetful(body):
        return completion("?", {"?": -0.1}) if QUESTIONS[5] in body["messages"][1]["content"] else judge(body)

    with ChatServer(forgetful) as server:
        assert main(alpaca(world, server.url, tmp_path / "out")) == 0
    found = read_metrics(tmp_path / "out")
    assert found["alpaca_eval/without_preference"].value == 1
    assert found["alpaca_eval/win_rate"].n == len(QUESTIONS) - 1
    assert "1 of 12 answers have no preference" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/annotations.json").read_text())[5]["preference"] is None


@pytest.mark.parametrize("options", [[], ["--plain"]])
def test_a_refused_request_is_counted_and_not_scored(world, judge, tmp_path, capsys, options):
    def refusing(body):
        too_long = Raw(400, b'{"error": {"message": "maximum context length is 8 tokens"}}')
        return too_long if QUESTIONS[1] in body["messages"][1]["content"] else judge(body)

    with ChatServer(refusing) as server:
        assert main(alpaca(world, server.url, tmp_path / "out", "--judge_concurrency=1", *options)) == 0
    found = read_metrics(tmp_path / "out")
    assert found["alpaca_eval/without_preference"].value == 1
    assert found["alpaca_eval/win_rate"].n == len(QUESTIONS) - 1
    notice = "1 of 11 requests refused, the first with status 400: maximum context length is 8 tokens"
    assert notice in capsys.readouterr().out and notice in (tmp_path / "out/log.txt").read_text()


def test_a_judge_that_refuses_everything_is_an_error(world, tmp_path, capsys):
    with ChatServer(lambda body: Raw(400, b'{"error": {"message": "no such model"}}')) as server:
        assert main(alpaca(world, server.url, tmp_path / "out", "--judge_concurrency=1")) == 2
        assert len(server.bodies) == 8
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the server refuses every request: status 400: no such model" in error


COSTS = {
    # requests; questions, baselines and references at their real length, and this many answers of 16 tokens
    "alpaca_eval": ([], 12, 12),
    "arena_hard": (["--questions={}/arena.jsonl", "--baseline={}/base.jsonl", "--version=v2"], 24, 24),
    "mt_bench": (["--questions={}/mt.jsonl"], 8, 4 + 2 * 4),
}


@pytest.mark.parametrize("benchmark", COSTS)
def test_the_cost_is_confirmed_before_answers_are_sampled(world, judge, tmp_path, capsys, monkeypatch, benchmark):
    """Answers count with their maximum length; after confirming once, nobody is asked again."""
    options, requests, answers = COSTS[benchmark]
    with ChatServer(lambda body: judge(body) if benchmark == "alpaca_eval" else completion("[[A>B]] [[7]]")) as server:
        line = [part for part in alpaca(world, server.url, tmp_path / "out", model="model") if part != "--yes"]
        if benchmark != "alpaca_eval":
            line = [part for part in line if not part.startswith(("--reference", "--gamed"))]
        line[1] = benchmark
        line += [option.replace("{}", str(world)) for option in options]
        monkeypatch.setattr("sys.stdin", io.StringIO())
        estimates = []
        for longest in (16, 32):
            assert main([*line, f"--max_new_tokens={longest}", f"--output_dir={tmp_path / str(longest)}"]) == 2
            printed = capsys.readouterr()
            assert "pass --yes" in printed.err and not (tmp_path / str(longest) / "answers").exists()
            found = re.search(r"maximum length: (\d+) requests to send, 0 .* about ([\d,]+) prompt tokens", printed.out)
            assert int(found[1]) == requests
            estimates.append(int(found[2].replace(",", "")))
        assert estimates[1] - estimates[0] == 16 * answers
        assert server.bodies == []
        terminal = io.StringIO("y\n")
        terminal.isatty = lambda: True
        monkeypatch.setattr("sys.stdin", terminal)
        assert main([*line, "--max_new_tokens=16", f"--output_dir={tmp_path / '16'}"]) == 0
        assert len(server.bodies) in (requests, requests - 1)  # an answer may equal the baseline's
    assert terminal.read() == ""


def test_a_run_with_existing_answers_only_asks_for_the_rest(world, judge, tmp_path, capsys, monkeypatch):
    """The estimate uses the answers' real lengths."""
    with ChatServer(judge, [Raw(401, b"no")]) as server:
        line = alpaca(world, server.url, tmp_path / "out", "--max_new_tokens=8", model="model")
        assert main(line) == 2
        sent = len(server.bodies)
        terminal = io.StringIO("n\n")
        terminal.isatty = lambda: True
        monkeypatch.setattr("sys.stdin", terminal)
        capsys.readouterr()
        assert main([part for part in line if part != "--yes"]) == 2
        printed = capsys.readouterr()
        assert len(server.bodies) == sent and printed.err == "simpo: error: nothing was sent\n"
        assert "maximum length" not in printed.out and "requests to send" in printed.out


def test_questions_that_do_not_fit_are_reported_before_sampling(world, judge, tmp_path, capsys):
    rows = [{"instruction": text, "output": "1"} for text in [*QUESTIONS[1:], " plus ".join("1" * 60)]]
    options = [f"--reference_outputs={write(tmp_path / 'reference.jsonl', rows)}", "--max_new_tokens=2000"]
    with ChatServer(judge) as server:
        assert main(alpaca(world, server.url, tmp_path / "out", *options, model="model")) == 2
    error = capsys.readouterr().err
    assert "1 of 12 questions leave no room" in error and "2,000 tokens" in error and error.count("\n") == 1
    assert not (tmp_path / "out/answers").exists()


def test_an_evaluation_runs_in_one_process(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = ["evaluate", "gsm8k", str(world / "model"), f"--data={world / 'gsm8k.jsonl'}"]
    assert main([*command, f"--output_dir={tmp_path / 'out'}"]) == 2
    assert capsys.readouterr().err == ("simpo: error: simpo evaluate runs in one process; start it without torchrun\n")
    assert not (tmp_path / "out").exists()


def test_a_killed_run_only_requests_what_is_missing(world, judge, tmp_path):
    """A separate process is killed while its fourth request is waiting for an answer."""
    killed = threading.Event()

    def held_up(body):
        assert len(server.bodies) < 4 or killed.wait(60)
        with torch.inference_mode():
            return judge(body)

    with ChatServer(held_up) as server:
        command = alpaca(world, server.url, tmp_path / "killed", "--judge_concurrency=1")
        process = get_context("fork").Process(target=main, args=(command,))
        process.start()
        while len(server.bodies) < 4:
            time.sleep(0.01)
            assert process.is_alive()
        process.kill()
        process.join()
        killed.set()
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / "killed/results.json").exists()
        assert main(command) == 0
        assert len(server.bodies) == len(QUESTIONS)  # one was sent twice, and one pair was identical
        assert main(alpaca(world, server.url, tmp_path / "whole", cache="other")) == 0
    assert (tmp_path / "killed/results.json").read_bytes() == (tmp_path / "whole/results.json").read_bytes()


def common(server, output):
    return [
        f"--output_dir={output}",
        f"--judge_url={server.url}",
        "--judge_model=j",
        f"--cache={output}-cache",
        "--yes",
    ]


def test_arena_hard_plays_both_games(world, tmp_path):
    """The judge prefers the longer name, so the model wins every game; its eighth game has no verdict."""
    games = []

    def judged(body):
        text = body["messages"][1]["content"]
        first = text.index("mine") < text.index("base")
        games.append(first)
        return completion("hm" if QUESTIONS[8] in text and first else "[[A>>B]]" if first else "Well. [[B>A]]")

    with ChatServer(judged) as server:
        files = [f"--questions={world / 'arena.jsonl'}", f"--baseline={world / 'base.jsonl'}", "--version=v2"]
        command = ["evaluate", "arena_hard", str(world / "mine.jsonl"), *files, *common(server, tmp_path / "out")]
        assert main(command) == 0
        assert sorted(games) == [False] * 12 + [True] * 12
    found = read_metrics(tmp_path / "out")
    assert found["arena_hard/math/score"].value == 100 and found["arena_hard/math/score"].n == 11
    assert found["arena_hard/math/games_without_verdict"].value == 1
    rows = [json.loads(line) for line in (tmp_path / "out/model_judgment.jsonl").read_text().splitlines()]
    assert [game["score"] for game in rows[0]["games"]] == ["B>A", "A>>B"]
    assert [game["score"] for game in rows[8]["games"]] == ["B>A", None]


def test_mt_bench_asks_the_second_turn_after_the_first(world, tmp_path):
    def rated(body):
        second = "And then?" in body["messages"][1]["content"]
        return completion("Rating: [[4]]" if second else "Rating: [[9]]")

    with ChatServer(rated) as server:
        files = [f"--questions={world / 'mt.jsonl'}", "--max_new_tokens=6"]
        assert main(["evaluate", "mt_bench", str(world / "model"), *files, *common(server, tmp_path / "out")]) == 0
        assert len(server.bodies) == 8
    found = read_metrics(tmp_path / "out")
    values = [found[f"mt_bench/{name}"].value for name in ("turn_1", "turn_2", "average", "math", "writing")]
    assert values == [9, 4, 6.5, 6.5, 6.5]
    answers = [json.loads(line) for line in (tmp_path / "out/model_answer.jsonl").read_text().splitlines()]
    asked = [
        json.loads(line)["prompt"]
        for path in (tmp_path / "out/answers").glob("turn-2-at-*-questions.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert len(asked) == 4
    for messages in asked:
        place = QUESTIONS.index(messages[0]["content"])
        assert [message["role"] for message in messages] == ["user", "assistant", "user"]
        assert messages[1]["content"] == answers[place]["choices"][0]["turns"][0]


def test_gsm8k_is_scored_before_and_after(world, tmp_path):
    command = ["evaluate", "gsm8k", str(world / "model"), f"--against={world / 'model'}", "--max_new_tokens=12"]
    assert main([*command, f"--data={world / 'gsm8k.jsonl'}", f"--output_dir={tmp_path / 'out'}", "--limit=5"]) == 0
    metrics = read_results(tmp_path / "out/results.json").metrics
    identity = json.loads((tmp_path / "out/run.json").read_text())["identity"]
    assert identity["dtype"] == identity["against/dtype"] == "float32"
    accuracies = [metric for metric in metrics if metric.name == "gsm8k/accuracy"]
    assert [metric.stage for metric in accuracies] == ["before", "after"] and accuracies[0].n == 5
    difference = next(metric for metric in metrics if metric.name == "gsm8k/difference")
    assert (difference.value, difference.low, difference.high) == (0, None, None)  # no change at all


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["chess"],
            "unknown benchmark 'chess'; "
            "the benchmarks are academic, alpaca_eval, arena_hard, gsm8k, mt_bench, rewardbench",
        ),
        (["alpaca_eval", "{}/outputs.jsonl"], "needs a judge; set --judge_url and --judge_model"),
        (["alpaca_eval"], "give either a model (or a file with its outputs) or --annotations"),
        (
            ["alpaca_eval", "{}/none.json", "--judge_url=http://127.0.0.1:1", "--judge_model=j"],
            "no such file of answers",
        ),
        (["alpaca_eval", "m", "--gamed={}/none.csv"], "gamed: {}/none.csv: there is no such file"),
        (["arena_hard", "m", "--questions={}/none", "--baseline=x"], "questions: {}/none: there is no such file"),
        (
            ["gsm8k", "{}/model", "--data={}/outputs.jsonl"],
            "outputs.jsonl:1: no 'question'; the row has instruction, output",
        ),
    ],
)
def test_mistakes_give_a_one_line_error(world, tmp_path, capsys, arguments, message):
    given = [argument.replace("{}", str(world)) for argument in arguments]
    reference = [f"--reference_outputs={world / 'reference.jsonl'}"] if "alpaca_eval" in given else []
    options = [*reference, f"--output_dir={tmp_path / 'out'}"] if given != ["chess"] else []
    assert main(["evaluate", *given, *options]) == 2
    error = capsys.readouterr().err
    assert message.replace("{}", str(world)) in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_judge_without_log_probabilities_is_detected(world, tmp_path, capsys):
    with ChatServer(lambda body: completion("m")) as server:
        assert main(alpaca(world, server.url, tmp_path / "out", "--judge_concurrency=3")) == 2
        assert len(server.bodies) == 8 < len(QUESTIONS) - 1  # no further requests are paid for
    error = capsys.readouterr().err
    assert "reports no log-probabilities" in error and "--plain" in error


def test_an_unusable_baseline_file_is_reported_before_anything_is_sent(world, judge, tmp_path, capsys):
    (tmp_path / "short.csv").write_text("index,std_delta_len,instruction_difficulty,preference\n0,1.0,0.5,0.8\n")
    with ChatServer(judge) as server:
        assert main(alpaca(world, server.url, tmp_path / "out", f"--gamed={tmp_path / 'short.csv'}")) == 2
        assert server.bodies == [] and not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert "12 instructions, but difficulties for 1 only" in error and error.count("\n") == 1


def test_a_stopped_run_ends_with_one_line(world, judge, tmp_path, capfd):
    def terminate(body):
        os.kill(os.getpid(), signal.SIGTERM)
        return judge(body)

    with ChatServer(terminate) as server:
        assert main(alpaca(world, server.url, tmp_path / "out", "--judge_concurrency=1")) == 143
    assert capfd.readouterr().err == "simpo: interrupted; run the same command again to continue\n"


def test_the_key_is_sent_but_not_in_any_file(world, judge, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-for-the-judge-alone")
    with ChatServer(judge) as server:
        assert main(alpaca(world, server.url, tmp_path / "out")) == 0
    assert set(server.keys) == {"Bearer a-key-for-the-judge-alone"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5 and not any(b"a-key-for" in path.read_bytes() for path in files)
    assert "a-key-for" not in "".join(capfd.readouterr())


def test_help_lists_the_benchmarks(capsys):
    assert main(["evaluate"]) == 0
    assert "alpaca_eval" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "mt_bench", "--help"])
    printed = " ".join(capsys.readouterr().out.split())  # output wraps at the terminal width
    assert ended.value.code == 0 and "--references" in printed and "by category" in printed and "default 60" in printed
    with pytest.raises(SystemExit):
        main(["evaluate", "arena_hard", "--help"])
    assert "default 600" in " ".join(capsys.readouterr().out.split())
