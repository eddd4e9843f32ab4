"""Judges that reason, reject parameters or give no verdict, with every command that uses a judge."""

from __future__ import annotations

import json
import math

import pytest
from tests.servers.chat_server import ChatServer, Raw, completion

from simpo.cli import main
from simpo.runs.results import read_results

QUESTIONS = [f"What is {a} plus 1?" for a in range(4)]
THINKING = "<think>Perhaps [[B]], [[A<B]]; m or M? Rating: [[3]]</think>\n"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def commands(tmp_path):
    """Every command that uses a judge, with answers of which every second one begins with reasoning."""
    ours = [f"<think>Hm.</think>It is {n}." if n % 2 else f"It is {n}." for n in range(4)]
    write(
        tmp_path / "a.jsonl", [{"id": q, "prompt": q, "responses": [x]} for q, x in zip(QUESTIONS, ours, strict=True)]
    )
    write(tmp_path / "b.jsonl", [{"id": q, "prompt": q, "responses": ["B."]} for q in QUESTIONS])
    write(
        tmp_path / "n.jsonl",
        [{"id": q, "prompt": q, "responses": [x, "B."]} for q, x in zip(QUESTIONS, ours, strict=True)],
    )
    write(tmp_path / "out.jsonl", [{"instruction": q, "output": x} for q, x in zip(QUESTIONS, ours, strict=True)])
    write(tmp_path / "ref.jsonl", [{"instruction": q, "output": "B."} for q in QUESTIONS])
    gamed = ["index,std_delta_len,instruction_difficulty,preference"]
    gamed += [f"{n},{(-1) ** n * 0.7},{n / 5 - 1},{0.3 + n / 30}" for n in range(4)]
    (tmp_path / "gamed.csv").write_text("\n".join(gamed) + "\n")
    write(tmp_path / "arena.jsonl", [{"uid": q, "category": "math", "prompt": q} for q in QUESTIONS])
    for name, texts in (("mine", ours), ("base", ["B."] * 4)):
        rows = [{"uid": q, "model": name, "messages": [{"content": x}]} for q, x in zip(QUESTIONS, texts, strict=True)]
        write(tmp_path / f"{name}.jsonl", rows)
    turns = [{"question_id": n, "category": "writing", "turns": [q, "And then?"]} for n, q in enumerate(QUESTIONS)]
    write(tmp_path / "mt.jsonl", turns)
    choices = [{"question_id": n, "model_id": "m", "choices": [{"turns": [x, "B."]}]} for n, x in enumerate(ours)]
    write(tmp_path / "mta.jsonl", choices)
    alpaca = "evaluate alpaca_eval {}/out.jsonl --reference_outputs={}/ref.jsonl --gamed={}/gamed.csv"
    found = {
        "annotate": "annotate {}/n.jsonl --annotator=api",
        "compare": "compare {}/a.jsonl {}/b.jsonl --judge=api",
        "weighted": alpaca,
        "plain": f"{alpaca} --plain",
        "arena": "evaluate arena_hard {}/mine.jsonl --questions={}/arena.jsonl --baseline={}/base.jsonl --version=v2",
        "mt": "evaluate mt_bench {}/mta.jsonl --questions={}/mt.jsonl",
    }
    return {name: text.replace("{}", str(tmp_path)).split() for name, text in found.items()}


def run(command, answer, tmp_path, *options):
    """Run a command; return the exit code, the metrics and what the judge was shown."""
    with ChatServer(answer) as server:
        judge = [f"--judge_url={server.url}", "--judge_model=j", f"--cache={tmp_path / 'cache'}", "--yes"]
        code = main([*command, f"--output_dir={tmp_path / 'run'}", *judge, *options])
        shown = [body["messages"][-1]["content"] for body in server.bodies]
    path = tmp_path / "run/results.json"
    return code, {one.name: one for one in read_results(path).metrics} if path.exists() else {}, shown


# What the judge says to each command, and the resulting metric (None if it depends on the order shown).
SAID = {
    "annotate": ("[[B]]", "annotate/score", 0.5),  # the second position wins in both orders
    "compare": ("[[B]]", "win_rate/api", 0.5),
    "plain": ("M", "alpaca_eval/win_rate", None),
    "arena": ("[[A=B]]", "arena_hard/math/score", 50.0),
    "mt": ("Rating: [[8]]", "mt_bench/average", 8.0),
}


@pytest.mark.parametrize("name", SAID)
def test_reasoning_is_not_read_as_a_verdict(name, commands, tmp_path):
    reply, figure, expected = SAID[name]
    code, found, _ = run(commands[name], lambda body: completion(THINKING + reply), tmp_path)
    assert code == 0
    if expected is not None:
        assert found[figure].value == expected
    count = {
        "annotate": "annotate/unscored",
        "compare": "without_verdict/api",
        "plain": "alpaca_eval/without_preference",
    }
    count |= {"arena": "arena_hard/math/games_without_verdict", "mt": "mt_bench/without_rating"}
    assert found[count[name]].value == 0


@pytest.mark.parametrize("name", [*SAID, "weighted"])
@pytest.mark.parametrize("text", ["<think>[[A]] m [[8]] [[A>B]]", "", None])
def test_replies_without_a_verdict_are_counted_and_never_scored(name, text, commands, tmp_path):
    top = {"<think>": -0.001, "m": -20.0}

    def answer(body):
        found = completion(text or "", top if body.get("logprobs") else None)
        if text is None:
            found["choices"][0] |= {
                "finish_reason": "length",
                "message": {"content": None, "reasoning_content": "[[A]] m"},
            }
        return found

    code, found, _ = run(commands[name], answer, tmp_path)
    assert code == 0
    counts = {
        "annotate": ("annotate/unscored", 8),
        "compare": ("without_verdict/api", 4),
        "plain": ("alpaca_eval/without_preference", 4),
        "weighted": ("alpaca_eval/without_preference", 4),
        "arena": ("arena_hard/math/games_without_verdict", 8),
        "mt": ("mt_bench/without_rating", 8),
    }
    figure, count = counts[name]
    assert found[figure].value == count
    values = [found[key].value for key in ("win_rate/api", "alpaca_eval/win_rate", "mt_bench/average") if key in found]
    assert all(value is None for value in values)


@pytest.mark.parametrize("name", SAID)
def test_a_judge_at_its_servers_temperature_is_recorded(name, commands, tmp_path, capsys):
    def reject_parameters(body):
        refused = next((key for key in ("max_tokens", "temperature") if key in body), None)
        error = {"error": {"message": f"Unsupported parameter: '{refused}'", "param": refused}}
        return Raw(400, json.dumps(error).encode()) if refused else completion(SAID[name][0])

    code, found, shown = run(commands[name], reject_parameters, tmp_path)
    assert code == 0 and "at the server's default temperature" in capsys.readouterr().out
    [count] = [one.value for key, one in found.items() if "judged_at_default_temperature" in key]
    assert count == len(set(shown))  # requests refused at first were sent again


def test_a_judge_without_log_probabilities_is_rejected(commands, tmp_path, capsys):
    code, found, _ = run(commands["weighted"], lambda body: completion("m"), tmp_path)
    error = capsys.readouterr().err
    assert (code, found) == (2, {}) and "reports no log-probabilities" in error and error.count("\n") == 1


@pytest.mark.parametrize("name", [*SAID, "weighted"])
def test_reasoning_in_answers_is_stripped_on_request_and_recorded(name, commands, tmp_path, capsys):
    def answer(body):
        return completion(
            SAID.get(name, "m")[0], {"m": math.log(0.8), "M": math.log(0.1)} if "logprobs" in body else None
        )

    code, found, shown = run(commands[name], answer, tmp_path)
    assert code == 0 and any("<think>" in text for text in shown)
    assert "--strip_thinking hides it" in capsys.readouterr().out
    key = {"annotate": "annotate/", "compare": "", "arena": "arena_hard/", "mt": "mt_bench/"}.get(name, "alpaca_eval/")
    assert found[f"{key}answers_with_thinking"].value == 2 and found[f"{key}answers_stripped_of_thinking"].value == 0
    assert "strip_thinking" not in json.loads((tmp_path / "run/run.json").read_text())["identity"]
    (tmp_path / "again").mkdir()
    code, found, shown = run(commands[name], answer, tmp_path / "again", "--strip_thinking")
    assert code == 0 and shown and not any("<think>" in text or "Hm." in text for text in shown)
    assert found[f"{key}answers_stripped_of_thinking"].value == 2
    assert json.loads((tmp_path / "again/run/run.json").read_text())["identity"]["strip_thinking"] is True


@pytest.mark.parametrize("name", ["plain", "mt", "arena"])
def test_a_judge_cut_off_while_reasoning_gives_verdicts_with_a_higher_limit(name, commands, tmp_path, capsys):
    reply = THINKING + {"plain": "M", "mt": "Rating: [[8]]", "arena": "[[A=B]]"}[name]

    def limited(body):  # as in real servers, reasoning counts towards the limit
        if body["max_tokens"] >= 20000:
            return completion(reply)
        found = completion(reply[:20])
        found["choices"][0]["finish_reason"] = "length"
        return found

    count = {"plain": "alpaca_eval/without_preference", "mt": "mt_bench/without_rating"}
    count |= {"arena": "arena_hard/math/games_without_verdict"}
    code, found, _ = run(commands[name], limited, tmp_path)
    assert code == 0 and found[count[name]].value == found[count[name]].n
    assert name != "plain" or "--judge_max_tokens" in capsys.readouterr().out
    (tmp_path / "again").mkdir()
    code, found, _ = run(commands[name], limited, tmp_path / "again", "--judge_max_tokens=20000")
    assert code == 0 and found[count[name]].value == 0
    assert json.loads((tmp_path / "again/run/run.json").read_text())["identity"]["judge_max_tokens"] == 20000


@pytest.mark.parametrize("logprob", ["-0.1", None, 5.0])
def test_invalid_log_probabilities_are_never_weighted(logprob, commands, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.0)
    code, found, _ = run(commands["weighted"], lambda body: completion("m", {"m": logprob, "M": -3.0}), tmp_path)
    assert (code, found) == (2, {})
    assert f"invalid log-probability {logprob!r}" in capsys.readouterr().err
