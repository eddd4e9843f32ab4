"""``simpo sample --engine server``: a real model behind a server, failures, and one-line errors."""

from __future__ import annotations

import json

import pytest
from tests.servers.chat_server import ChatServer, Raw, completion
from tests.servers.model_answers import ModelAnswers

from simpo.cli import main
from simpo.runs.files import read_lines
from simpo.runs.results import read_results

PROMPTS = ["What is 1 and 2?", "What is 2 and 2?", "What is 1 and 2?", "What is 3 and 2?"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": text, "source": number} for number, text in enumerate(PROMPTS)]
    rows.append({"messages": [{"role": "system", "content": "Short."}, {"role": "user", "content": "Well?"}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(server, prompts, *options, output="out"):
    folder = prompts.parent / output
    here = ["sample", "tiny", str(prompts), "--engine=server", f"--base_url={server.url}", f"--output_dir={folder}"]
    return [*here, "--max_new_tokens=12", *options]


def test_greedy_answers_match_the_model(prompts, chat_world):
    """The server and the transformers engine give the same texts under the same ids."""
    with ChatServer(ModelAnswers(chat_world / "model")) as server:
        assert main(command(server, prompts, "--temperature=0", "--yes")) == 0
    local = ["sample", str(chat_world / "model"), str(prompts), "--temperature=0", "--max_new_tokens=12"]
    assert main([*local, f"--output_dir={prompts.parent / 'local'}"]) == 0
    here, there = (read_lines(prompts.parent / name / "responses.jsonl") for name in ("local", "out"))
    assert len(there) == 4  # each prompt once
    for ours, theirs in zip(here, there, strict=True):
        keys = ("id", "prompt", "where", "extra")
        assert {key: ours[key] for key in keys} == {key: theirs[key] for key in keys}
        assert [text.strip() for text in theirs["responses"]] == [text.strip() for text in ours["responses"]]
        assert "response_ids" not in theirs and "logps" not in theirs


def test_every_answer_has_its_own_seed_and_is_requested_once(prompts):
    with ChatServer(lambda body: completion(f"answer {body['seed']}")) as server:
        server.faults += [Raw(500), Raw(429, headers={"Retry-After": "0"})]
        assert main(command(server, prompts, "--n=3", "--top_p=0.9", "--yes")) == 0
        assert len({body["seed"] for body in server.bodies[2:]}) == 12
        assert {body["top_p"] for body in server.bodies} == {0.9}
        asked = len(server.bodies)
        assert main(command(server, prompts, "--n=3", "--top_p=0.9")) == 0  # already finished: no cost to confirm
        assert len(server.bodies) == asked
        assert main(command(server, prompts, "--n=3", "--top_p=1", "--yes", output="again")) == 0
        assert "top_p" not in server.bodies[-1]
    rows = read_lines(prompts.parent / "out/responses.jsonl")
    assert all(len(set(row["responses"])) == 3 for row in rows)
    found = {metric.name: metric.value for metric in read_results(prompts.parent / "out/results.json").metrics}
    assert (found["sample/prompts"], found["sample/answers"], found["sample/distinct_answers"]) == (4, 12, 1)
    assert found["data/prompts/dropped/repeated_prompt"] == 1
    # Seeds depend on the prompts, so in a different order each prompt gets the same answers.
    again = {row["id"]: row["responses"] for row in read_lines(prompts.parent / "again/responses.jsonl")}
    assert again == {row["id"]: row["responses"] for row in rows}


def test_received_answers_are_kept(prompts, capsys):
    """After a server starts to refuse, the next run only requests the rest, and the file is the same."""
    with ChatServer(lambda body: completion(f"answer {body['seed']}")) as server:
        assert main(command(server, prompts, "--n=2", "--yes", output="alone")) == 0
        first = len(server.bodies)
        left = iter(range(5))

        def refuse_eventually(body):
            return completion(f"answer {body['seed']}") if next(left, None) is not None else Raw(403)

        server._answer = refuse_eventually
        assert main(command(server, prompts, "--n=2", "--yes", "--concurrency=1")) == 2
        printed = capsys.readouterr().err
        assert "403" in printed and printed.count("\n") == 1
        assert not (prompts.parent / "out/responses.jsonl").exists()
        server._answer = lambda body: completion(f"answer {body['seed']}")
        assert main(command(server, prompts, "--n=2", "--yes")) == 0
    assert len(server.bodies) == 2 * first + 1
    alone, out = prompts.parent / "alone", prompts.parent / "out"
    assert (alone / "responses.jsonl").read_bytes() == (out / "responses.jsonl").read_bytes()
    assert not list(out.glob(".replies*"))
    (out / ".replies").mkdir()  # left by a kill at the very end
    assert main(command(server, prompts, "--n=2", "--yes")) == 0
    assert not list(out.glob(".replies*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top_k=5"], "top_k: is not supported by OpenAI-compatible servers"),
        (["--chat_template=none"], "chat_template: the server applies its own"),
        (["--base_url=http://user:secret@127.0.0.1/v1"], "put the key in the environment"),
        (["--base_url=https://model.invalid/v1", "--api_key_env=NO_SUCH_KEY"], "environment variable NO_SUCH_KEY"),
        (["--concurrency=0"], "concurrency: must be at least 1"),
        (["--dtype=bfloat16"], "dtype: engine server does not use it"),
        (["--chunk_size=8"], "chunk_size: engine server does not use it"),
        (["--engine=transformers"], "base_url: engine transformers does not use it"),
    ],
)
def test_mistakes_give_a_one_line_error_and_leave_nothing_behind(options, message, prompts, capsys):
    with ChatServer(lambda body: completion("never")) as server:
        assert main(command(server, prompts, *options, "--yes")) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1 and "secret" not in printed
    assert not (prompts.parent / "out").exists() and not server.bodies


def test_a_server_is_sampled_from_a_single_process(prompts, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with ChatServer(lambda body: completion("never")) as server:
        assert main(command(server, prompts, "--yes")) == 2
    assert "simpo sample --engine server runs in one process" in capsys.readouterr().err
    assert not server.bodies


def test_a_missing_server_and_missing_prompts_are_reported(prompts, capsys):
    here = ["sample", "tiny", str(prompts), "--engine=server", f"--output_dir={prompts.parent / 'out'}"]
    assert main(here) == 2
    assert "--base_url" in capsys.readouterr().err
    prompts.write_text('{"text": "no prompt"}\n')
    assert main([*here, "--base_url=http://127.0.0.1:9/v1", "--yes"]) == 2
    printed = capsys.readouterr().err
    assert "prompts.jsonl:1" in printed and printed.count("\n") == 1
