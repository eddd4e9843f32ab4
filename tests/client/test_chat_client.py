"""The chat client, with a server that fails in many ways, and its cache."""

from __future__ import annotations

import asyncio
import gc
import gzip
import io
import itertools
import json
import multiprocessing
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time

import pytest
from openai import _base_client
from tests.servers.chat_server import ChatServer, Raw, completion

from simpo import SimpoError
from simpo.client import ChatClient, ChatReply, ChatRequest, Endpoint, Prices, confirm_cost, placeholder_answer, sending

KEY = "a-secret-that-nobody-may-see"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Shorten waits and remove keys from the environment."""
    monkeypatch.setattr(_base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def echo(body):
    return completion(body["messages"][-1]["content"].upper())


def slow_after(last, answer):
    """Delay answers to requests after number ``last``, so that their replies arrive after those of ``answer``."""

    def answered(body):
        if int(body["messages"][0]["content"].removeprefix("say ")) > last:
            time.sleep(0.5)
        return answer(body)

    return answered


def requests(count, **options):
    return [ChatRequest([{"role": "user", "content": f"say {i}"}], 5, **options) for i in range(count)]


def client(server, cache=None, **options):
    return ChatClient(Endpoint(server.url, "tiny", **options), cache)


def texts(replies):
    return [reply.text for reply in replies]


SAID = [f"SAY {i}" for i in range(40)]


def test_replies_are_in_request_order():
    delays = itertools.cycle([0.02, 0.0, 0.01])

    def answer(body):
        time.sleep(next(delays))
        return echo(body)

    with ChatServer(answer) as server:
        ours = client(server, concurrency=5)
        assert texts(ours.complete(requests(40))) == SAID
    assert 2 <= server.most_at_once <= 5
    assert (ours.usage.sent, ours.usage.prompt_tokens, ours.usage.completion_tokens) == (40, 280, 120)


def test_the_request_body_follows_the_api():
    """Keys and types match the interface; optional ones that are not set are absent."""
    with ChatServer(echo) as server:
        client(server).complete([ChatRequest([{"role": "user", "content": "é"}], 5, 0.5, 3, 7)])
        client(server).complete(requests(1))
    message = {"role": "user", "content": "é"}
    full = {"model": "tiny", "messages": [message], "max_tokens": 5, "temperature": 0.5}
    assert server.bodies[0] == full | {"logprobs": True, "top_logprobs": 3, "seed": 7}
    assert set(server.bodies[1]) == {"model", "messages", "max_tokens", "temperature"}
    assert server.keys == [None, None]


def test_log_probabilities_of_the_first_token():
    with ChatServer(lambda body: completion("m", {"m": -0.1, "M": -2.5, "x": -7.0})) as server:
        [reply] = client(server).complete(requests(1, top_logprobs=5))
    assert reply == ChatReply("m", {"m": -0.1, "M": -2.5, "x": -7.0}, "stop", 7, 3)
    with ChatServer(echo) as server:  # a server that does not return them
        [reply] = client(server).complete(requests(1, top_logprobs=5))
    assert reply.first_token_logprobs is None


HALF = json.dumps(completion("cut")).encode()[:20]
FAULTS = {
    "500": Raw(500, b"oops"),
    "503 in JSON": Raw(503, b'{"error": {"message": "overloaded"}}'),
    "429": Raw(429, b"{}"),
    "408": Raw(408),
    "truncated JSON": Raw(200, HALF),
    "torn connection": Raw(200, HALF, torn=True),
    "not JSON": Raw(200, b"<html>"),
    "NaN": Raw(200, b'{"choices": NaN}'),
    "no choices": Raw(200, b'{"choices": []}'),
    "a list": Raw(200, b"[]"),
    "content that is not text": Raw(200, b'{"choices": [{"message": {"content": 7}}]}'),
    "error with status 200": Raw(200, b'{"error": {"message": "provider down"}}'),
    "stalled": Raw(200, HALF, stall=1.0),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_failed_attempt_is_repeated(fault, tmp_path):
    with ChatServer(echo, [fault, fault]) as server:
        ours = client(server, tmp_path, timeout=0.5 if fault.stall else 60.0, concurrency=1)
        assert texts(ours.complete(requests(3))) == SAID[:3]
    assert len(server.bodies) == 5 and ours.usage.repeated == 2 and ours.usage.sent == 3


def test_a_server_that_sends_byte_by_byte_times_out(tmp_path):
    """The timeout covers the whole reply, not the time between two bytes."""
    listener = socket.create_server(("127.0.0.1", 0))

    async def drip(reader, writer):
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        for _ in range(20):
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.05)

    async def measure():
        server = await asyncio.start_server(drip, sock=listener)
        async with server:
            endpoint = Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", "tiny", timeout=0.2, attempts=1)
            with pytest.raises(SimpoError, match=r"no reply within 0\.2 s"):
                await asyncio.to_thread(ChatClient(endpoint, None).complete, requests(1))

    asyncio.run(measure())


@pytest.mark.parametrize("name", ["seconds", "date"])
def test_retry_after_is_respected(name, tmp_path):
    until = int(time.time()) + 2
    value = "1" if name == "seconds" else time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(until))
    with ChatServer(echo, [Raw(429, b"{}", {"Retry-After": value})]) as server:
        assert texts(client(server, concurrency=1).complete(requests(3))) == SAID[:3]
    first, second = server.times[:2]
    assert second - first > 0.9 if name == "seconds" else time.time() - time.monotonic() + second > until - 0.1
    assert len(server.times) == 4


def test_a_pause_holds_back_all_requests():
    """Including requests from other workers, to which the server did not send it."""
    with ChatServer(lambda body: time.sleep(0.02) or echo(body), [Raw(429, b"{}", {"Retry-After": "1"})]) as server:
        assert texts(client(server, concurrency=4).complete(requests(20))) == SAID[:20]
    pauses = [later - earlier for earlier, later in itertools.pairwise(server.times)]
    before = pauses.index(max(pauses)) + 1
    assert max(pauses) > 0.8 and before <= 8  # at most the requests already in progress


def test_a_retry_after_of_a_day_is_an_error():
    with (
        ChatServer(echo, [Raw(429, b"{}", {"Retry-After": "86400"})]) as server,
        pytest.raises(SimpoError, match="asks for a wait of 86,400 s"),
    ):
        client(server).complete(requests(1))


def test_attempts_are_limited_and_waits_grow(tmp_path, monkeypatch):
    monkeypatch.setattr(_base_client, "INITIAL_RETRY_DELAY", 0.08)
    with ChatServer(lambda body: Raw(500, b'{"error": {"message": "broken"}}')) as server:
        ours = client(server, tmp_path, attempts=3)
        with pytest.raises(SimpoError) as raised:
            ours.complete(requests(1))
    assert len(server.bodies) == 3
    first, second = server.times[1] - server.times[0], server.times[2] - server.times[1]
    assert first >= 0.06 and second >= 0.12
    message = str(raised.value)
    assert server.url in message and "'tiny'" in message and "status 500: broken" in message and "3 attempts" in message


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refusal_is_not_repeated(status):
    with ChatServer(lambda body: Raw(status, b'{"error": {"message": "no"}}')) as server:
        with pytest.raises(SimpoError, match=f"status {status}: no"):
            client(server).complete(requests(1))
        assert len(server.bodies) == 1


def test_an_exhausted_quota_is_not_retried():
    body = json.dumps({"error": {"message": "You ran out", "code": "insufficient_quota"}}).encode()
    with ChatServer(lambda _: Raw(429, body)) as server:
        with pytest.raises(SimpoError, match="status 429: You ran out"):
            client(server).complete(requests(1))
        assert len(server.bodies) == 1


def test_no_server_at_the_address_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", "tiny", attempts=2)
    with pytest.raises(SimpoError, match=rf"127\.0\.0\.1:{port}.*\(2 attempts\)"):
        ChatClient(endpoint, None).complete(requests(1))


def test_replies_before_a_failure_are_kept(tmp_path):
    with ChatServer(slow_after(7, refuse(7))) as server:
        with pytest.raises(SimpoError, match="too long; replies so far are cached"):
            client(server, tmp_path, concurrency=2).complete(requests(40))
        assert 8 <= len(server.bodies) <= 9  # requests in progress are finished, but no others are sent
        received = len(server.bodies) - 1
    with ChatServer(echo) as server:
        ours = client(server, tmp_path)
        assert texts(ours.complete(requests(40))) == SAID
    assert (ours.usage.cached, ours.usage.sent) == (received, 40 - received) and len(server.bodies) == 40 - received


def refuse(*numbers, status=400):
    """Refuse some requests because of their content and answer the others."""
    refused = [f"say {number}" for number in numbers]
    fault = Raw(status, b'{"error": {"message": "too long"}}')
    return lambda body: fault if body["messages"][0]["content"] in refused else echo(body)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_is_counted_and_the_others_are_answered(status, tmp_path):
    with ChatServer(refuse(3, 7, status=status)) as server:
        ours = client(server, tmp_path)
        replies = ours.complete(requests(40), despite_refusals=True)
        assert [reply.refused for reply in replies if reply.refused] == [f"status {status}: too long"] * 2
        assert replies[3] == replies[7] == ChatReply("", refused=f"status {status}: too long")
        assert texts(replies[:3] + replies[4:7] + replies[8:]) == SAID[:3] + SAID[4:7] + SAID[8:]
        assert (ours.usage.sent, ours.usage.refused, ours.usage.repeated) == (38, 2, 0)
        assert ours.usage.line().endswith(f"; 2 of 40 requests refused, the first with status {status}: too long")
        assert ours.complete(requests(40), despite_refusals=True) == replies
        assert len(server.bodies) == 42  # refusals are not cached
    with ChatServer(echo) as server:
        ours = client(server, tmp_path)
        assert texts(ours.complete(requests(40), despite_refusals=True)) == SAID
        assert "refused" not in ours.usage.line() and len(server.bodies) == 2


SPENT = [
    pytest.param(401, b"no", id="key"),
    pytest.param(402, b"no", id="payment"),
    pytest.param(403, b"no", id="permission"),
    pytest.param(404, b"no", id="model"),
    pytest.param(400, b'{"error": {"message": "no", "code": "billing_hard_limit_reached"}}', id="limit"),
    pytest.param(400, b'{"error": {"message": "Your credit balance is too low"}}', id="credit"),
]


@pytest.mark.parametrize(("status", "message"), SPENT)
def test_errors_that_concern_all_requests_end_the_command(status, message):
    """Even halfway through, after others were answered."""

    def answer(body):
        return Raw(status, message) if body["messages"][0]["content"] == "say 20" else echo(body)

    with ChatServer(slow_after(20, answer)) as server, pytest.raises(SimpoError, match=f"status {status}: "):
        client(server, concurrency=2).complete(requests(40), despite_refusals=True)
    assert len(server.bodies) <= 22


@pytest.mark.parametrize("count", [40, 8, 3, 1])
def test_refusals_of_all_first_requests_end_the_command(count, tmp_path):
    with ChatServer(slow_after(7, refuse(*range(8)))) as server:
        with pytest.raises(SimpoError, match="'tiny': the server refuses every request: status 400: too long"):
            client(server, tmp_path, concurrency=2).complete(requests(count), despite_refusals=True)
        assert len(server.bodies) <= 9


def test_fast_refusals_do_not_hide_a_slow_answer():
    """The first requests are those sent first, not those answered first."""

    def slow_at_zero(body):
        time.sleep(0.1 if body["messages"][0]["content"] == "say 0" else 0)
        return refuse(*range(1, 12))(body)

    with ChatServer(slow_at_zero) as server:
        ours = client(server, concurrency=4)
        assert sum(reply.refused is None for reply in ours.complete(requests(14), despite_refusals=True)) == 3


def test_a_run_continues_if_only_refused_requests_are_left(tmp_path):
    """This happens after a kill: a server that has answered before does not refuse everything."""
    with ChatServer(refuse(*range(10))) as server:
        client(server, tmp_path).complete(requests(20)[10:])
        for known in (client(server, tmp_path), client(server, tmp_path)):
            assert known.estimate(requests(20)).cached == 10
            replies = known.complete(requests(10), despite_refusals=True)  # some of them, as annotators do
            assert all(reply.refused for reply in replies)


def test_a_warm_cache_sends_nothing(tmp_path):
    with ChatServer(lambda body: completion("m", {"m": -0.1})) as server:
        first = client(server, tmp_path).complete(requests(10, top_logprobs=5))
        ours = client(server, tmp_path)
        estimate = ours.estimate(requests(10, top_logprobs=5))
        assert (estimate.requests, estimate.cached) == (0, 10)
        assert ours.complete(requests(10, top_logprobs=5)) == first
        assert len(server.bodies) == 10 and ours.usage.sent == 0 and ours.usage.cached == 10
        for other in ({"temperature": 0.5}, {"seed": 1}, {"top_logprobs": 4}):
            assert ours.estimate(requests(1, **other)).requests == 1
        assert ChatClient(Endpoint(server.url, "other"), tmp_path).estimate(requests(1, top_logprobs=5)).requests == 1


def test_identical_requests_are_sent_once():
    with ChatServer(echo) as server:
        ours = client(server)
        assert ours.estimate(requests(3) * 2).requests == 3
        assert texts(ours.complete(requests(3) * 2)) == SAID[:3] * 2
    assert len(server.bodies) == 3


def database(folder):
    [path] = folder.glob("*.sqlite3")
    return path


def test_a_damaged_reply_is_requested_again(tmp_path, caplog):
    with ChatServer(echo) as server:
        client(server, tmp_path, concurrency=1).complete(requests(5))
        with sqlite3.connect(database(tmp_path)) as connection:
            connection.execute("UPDATE replies SET reply = substr(reply, 1, 9) WHERE rowid = 2")
        connection.close()
        ours = client(server, tmp_path)
        assert texts(ours.complete(requests(5))) == SAID[:5]
        assert caplog.text.count("damaged reply") == 1 and database(tmp_path).name in caplog.text
        assert ours.usage.cached == 4 and len(server.bodies) == 6
        assert client(server, tmp_path).estimate(requests(5)).cached == 5


@pytest.mark.parametrize("start", [0, 20_000])
@pytest.mark.parametrize("opened", [False, True])
def test_a_damaged_database_gives_a_one_line_error(start, opened, tmp_path):
    """Nothing read from it is trusted, and nothing is sent until the user has moved it away."""
    long = "x" * 1000
    with ChatServer(lambda body: completion(body["messages"][0]["content"] + long)) as server:
        client(server, tmp_path, concurrency=1).complete(requests(40))
        gc.collect()  # closes the connection, which writes all changes to the database file
        path = database(tmp_path)
        ours = client(server, tmp_path) if opened else None
        with path.open("r+b") as file:
            file.seek(start)
            file.write(b"\xff" * 8192)
        with pytest.raises(SimpoError, match=path.name):
            (ours or client(server, tmp_path)).complete(requests(40))
        assert len(server.bodies) == 40
        path.rename(tmp_path / "away")
        assert texts(client(server, tmp_path).complete(requests(40))) == [f"say {i}{long}" for i in range(40)]


def test_a_cache_that_cannot_be_written_gives_a_one_line_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SimpoError, match="file"):
        ChatClient(Endpoint("http://127.0.0.1:9/v1", "tiny"), tmp_path / "file")
    ChatClient(Endpoint("http://127.0.0.1:9/v1", "tiny"), tmp_path)
    path = database(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(SimpoError, match=path.name):
        ChatClient(Endpoint("http://127.0.0.1:9/v1", "tiny"), tmp_path)


def _complete(url, cache, count):
    _base_client.INITIAL_RETRY_DELAY = 0.01
    ChatClient(Endpoint(url, "tiny", concurrency=4), cache).complete(requests(count))


def test_two_processes_share_a_cache(tmp_path):
    numbers = itertools.count()

    def answer(body):  # every answer is different, so that answering the same request twice would be noticed
        time.sleep(0.005)
        return completion(f"{body['messages'][0]['content']}: {next(numbers)}")

    fork = multiprocessing.get_context("fork")
    with ChatServer(answer) as server:
        both = [fork.Process(target=_complete, args=(server.url, tmp_path, 60)) for _ in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join()
            assert process.exitcode == 0
        sent = len(server.bodies)
        replies = client(server, tmp_path).complete(requests(60))
        assert len(server.bodies) == sent <= 120
    with sqlite3.connect(database(tmp_path)) as connection:
        rows = connection.execute("SELECT key, reply FROM replies").fetchall()
    assert len({key for key, _ in rows}) == len(rows) == 60
    assert {json.loads(reply)["text"] for _, reply in rows} == set(texts(replies))


def test_a_kill_loses_at_most_the_requests_in_progress(tmp_path):
    fork = multiprocessing.get_context("fork")
    with ChatServer(lambda body: time.sleep(0.01) or echo(body)) as server:
        for stop in (10, 25):
            process = fork.Process(target=_complete, args=(server.url, tmp_path, 40))
            process.start()
            while len(server.bodies) < stop:
                time.sleep(0.001)
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        assert texts(client(server, tmp_path).complete(requests(40))) == SAID
    assert 40 <= len(server.bodies) <= 40 + 2 * 5


def test_keys_come_from_the_environment_and_are_never_shown(monkeypatch, tmp_path):
    away = Endpoint("https://judge.invalid/v1", "m", api_key_env="JUDGE_KEY")
    with pytest.raises(SimpoError, match="set the environment variable JUDGE_KEY"):
        ChatClient(away, None).complete(requests(1))
    monkeypatch.setenv("JUDGE_KEY", KEY)
    refused = ChatServer(lambda body: Raw(401, f"Incorrect key {KEY}".encode()))
    with refused as server, pytest.raises(SimpoError) as raised:
        client(server, tmp_path, api_key_env="JUDGE_KEY").complete(requests(1))
    assert server.keys == [f"Bearer {KEY}"]
    assert KEY not in str(raised.value) and KEY not in repr(away) and "<redacted>" in str(raised.value)
    with ChatServer(echo) as server:
        client(server, tmp_path, api_key_env="JUDGE_KEY").complete(requests(1))
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.iterdir())
    monkeypatch.setenv("JUDGE_KEY", "two\nlines")
    with pytest.raises(SimpoError, match="characters not allowed in a key"):
        away.api_key()


def test_openais_own_variables_are_not_sent_to_other_servers(monkeypatch):
    """Neither to a server without a key nor to one with another key."""
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("OTHER_KEY", "another")
    with ChatServer(echo) as server:
        client(server, api_key_env="NO_KEY").complete(requests(1))
        client(server, api_key_env="OTHER_KEY").complete(requests(1))
    assert server.keys == [None, "Bearer another"]
    assert all(KEY not in value for headers in server.headers for value in headers.values())


def test_openai_is_only_imported_when_something_is_sent():
    """The import takes most of a second."""
    code = "import sys, simpo.client; sys.exit('openai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_url": "localhost:8000"}, "base_url"),
        ({"base_url": "ftp://host/v1"}, "base_url"),
        ({"base_url": "http://user:password@host/v1"}, "put the key in the environment"),
        ({"base_url": "http://host:port/v1"}, "base_url"),
        ({"base_url": "http://[::1/v1"}, "base_url"),
        ({"base_url": "http://host/v1?key=gsk_password"}, "put the key in the environment"),
        ({"base_url": "http://host/v1?api-version=1&subscription-key=gsk_password"}, "put the key in the environment"),
        ({"model": ""}, "model"),
        ({"base_url": "http://\u2603.\u2603/v1"}, "base_url"),
        ({"base_url": "http://xn--/v1"}, "base_url"),
        ({"api_key_env": "sk-password"}, "not the key"),
        ({"api_key_env": "gsk_password"}, "not the key"),
        ({"concurrency": 0}, "concurrency: must be at least 1, not 0"),
        ({"attempts": 0}, "attempts"),
        ({"timeout": 0}, "timeout"),
    ],
)
def test_invalid_endpoints_are_rejected(change, message):
    with pytest.raises(SimpoError, match=message) as raised:
        Endpoint(**{"base_url": "http://host/v1", "model": "m"} | change)
    assert all(secret not in str(raised.value) for secret in ("gsk_password", "sk-password", "user:password"))


HOSTS = {"127.0.0.1": True, "localhost": True, "[::1]": True, "127.9.9.9": True, "10.0.0.1": False, "a.b": False}


@pytest.mark.parametrize(("host", "local"), HOSTS.items())
def test_which_servers_are_local(host, local):
    assert Endpoint(f"http://{host}:8000/v1", "m").is_local == local


@pytest.mark.parametrize(
    ("variable", "value"), [("ALL_PROXY", "gopher://127.0.0.1:9"), ("SSL_CERT_FILE", "/nowhere.pem")]
)
def test_an_unusable_proxy_or_certificate_gives_a_one_line_error(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with pytest.raises(SimpoError, match="proxy or certificates") as raised:
        ChatClient(Endpoint("https://judge.invalid/v1", "m", api_key_env="JUDGE_KEY"), None).complete(requests(1))
    assert KEY not in str(raised.value)
    with ChatServer(echo) as server:  # they do not affect a server on this machine
        assert texts(client(server).complete(requests(1))) == SAID[:1]


def test_a_key_at_the_end_of_a_long_error_is_fully_redacted(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    text = "x" * (sending._MAX_REASON - len("status 401: ") - 9) + KEY
    with (
        ChatServer(lambda body: Raw(401, text.encode())) as server,
        pytest.raises(SimpoError, match="status 401") as raised,
    ):
        client(server, api_key_env="JUDGE_KEY").complete(requests(1))
    assert KEY[:5] not in str(raised.value) and len(str(raised.value)) < 400


def unsupported(name, status=400, shape="openai"):
    """Return the different ways in which servers reject a parameter."""
    bodies = {
        "openai": {
            "error": {"message": f"Unsupported parameter: '{name}'", "param": name, "code": "unsupported_value"}
        },
        "litellm": {
            "error": {"message": f"litellm.UnsupportedParamsError: x don't support {name}=0.0.", "param": None}
        },
        "only": {"error": {"message": f"invalid {name}: only 1 is allowed for this model"}},
        "pydantic": {"detail": [{"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs"}]},
    }[shape]
    return Raw(status, json.dumps(bodies).encode())


@pytest.mark.parametrize(("shape", "status"), [("openai", 400), ("litellm", 400), ("pydantic", 422)])
def test_a_model_that_accepts_neither_max_tokens_nor_a_temperature(shape, status, tmp_path):
    """Each is refused once; later requests, including those of other calls, have the form the server accepts."""

    def reject_parameters(body):
        refused = next((name for name in ("max_tokens", "temperature") if name in body), None)
        return unsupported(refused, status, shape) if refused else echo(body)

    with ChatServer(reject_parameters) as server:
        ours = client(server, tmp_path, concurrency=1)
        found = ours.complete(requests(3), despite_refusals=True)
        assert texts(found) == SAID[:3] and all(reply.default_temperature for reply in found)
        ours.complete(requests(5), despite_refusals=True)
        assert len(server.bodies) == 5 + 2 and ours.usage.repeated == 2
        assert server.bodies[-1].keys() == {"model", "messages", "max_completion_tokens"}
        assert server.bodies[-1]["max_completion_tokens"] == 5
        assert ours.usage.default_temperature == 8
        assert "8 replies at the server's default temperature" in ours.usage.line()
        again = client(server, tmp_path)  # from the cache, under the same keys
        assert again.complete(requests(5))[0].default_temperature and again.usage.default_temperature == 5
        assert len(server.bodies) == 5 + 2


def test_an_exact_temperature_is_not_dropped():
    def reject_parameters(body):
        return unsupported("temperature", shape="only") if body.get("temperature", 1) != 1 else echo(body)

    with ChatServer(reject_parameters) as server:
        ours = ChatClient(Endpoint(server.url, "tiny"), None, exact_temperature=True)
        with pytest.raises(SimpoError, match=r"only 1 is allowed.*use --temperature 1"):
            ours.complete(requests(1))
        [reply] = ours.complete(requests(1, temperature=1.0))
        assert reply.text == "SAY 0" and not reply.default_temperature


@pytest.mark.parametrize("message", ["max_tokens is too large: 5", "temperature must be in [0, 2]", "no such model"])
def test_other_refusals_change_nothing(message):
    refused = Raw(400, json.dumps({"error": {"message": message, "param": "max_tokens"}}).encode())
    with ChatServer(lambda body: refused) as server:
        with pytest.raises(SimpoError, match="status 400"):
            client(server).complete(requests(1))
        assert len(server.bodies) == 1


PARTS = {
    "text": ([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}], "one two"),
    "plain": (["one ", "two"], "one two"),
    "reasoning": ([{"type": "thinking", "thinking": [{"text": "[[B]]"}]}, {"type": "text", "text": "[[A]]"}], "[[A]]"),
    "refusal": ([{"type": "refusal", "refusal": "I cannot."}], "I cannot."),
    "none": (None, ""),
    "empty": ([], ""),
}


@pytest.mark.parametrize(("content", "text"), PARTS.values(), ids=PARTS)
def test_content_in_parts_is_joined(content, text):
    fields = {"reasoning_content": "[[B]]", "reasoning": "[[B]]"}

    def answer(body):
        found = completion("")
        found["choices"][0]["message"] |= {"content": content, **fields}
        return found

    with ChatServer(answer) as server:
        assert texts(client(server).complete(requests(1))) == [text]


@pytest.mark.parametrize(
    "content", [[{"type": "image_url", "image_url": "x"}], [{"type": "text"}], [7], 7, {"text": "x"}]
)
def test_content_other_than_text_gives_a_one_line_error(content):
    def answer(body):
        found = completion("")
        found["choices"][0]["message"]["content"] = content
        return found

    with ChatServer(answer) as server, pytest.raises(SimpoError, match="not a chat completion"):
        client(server, attempts=1).complete(requests(1))


def test_a_reply_without_usage_has_an_unknown_cost():
    with ChatServer(lambda body: {**echo(body), "usage": None}) as server:
        ours = client(server)
        ours.complete(requests(2))
    line = ours.usage.line(Prices(1.0, 1.0))
    assert "at least $0.00" in line and "2 replies reported no token counts" in line


def test_truncated_replies_are_counted():
    def answer(body):
        found = echo(body)
        found["choices"][0]["finish_reason"] = "length"
        return found

    with ChatServer(answer) as server:
        ours = client(server)
        assert ours.complete(requests(2))[0].complete_text == ""
        ours.complete([ChatRequest([{"role": "user", "content": "x"}], 1)])  # only one token was requested
    assert ours.usage.cut_off == 2 and "2 replies were cut off" in ours.usage.line()


URLS = {
    "http://h/v1": "http://h/v1/chat/completions",
    "http://h/v1/": "http://h/v1/chat/completions",
    "http://h/v1/chat/completions": "http://h/v1/chat/completions",
    "https://x.openai.azure.com/openai/deployments/d?api-version=2024-10-21": (
        "https://x.openai.azure.com/openai/deployments/d/chat/completions?api-version=2024-10-21"
    ),
    "https://x.openai.azure.com/openai/v1/": "https://x.openai.azure.com/openai/v1/chat/completions",
}


@pytest.mark.parametrize(("given", "sent"), URLS.items())
def test_the_query_of_a_url_is_kept(given, sent):
    endpoint = Endpoint(given, "m")
    assert endpoint.url == sent
    azure = "azure" in given
    assert endpoint.authorization("k") == ({"api-key": "k"} if azure else {"Authorization": "Bearer k"})


def test_an_api_version_in_the_url_is_kept(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with ChatServer(echo) as server:
        endpoint = Endpoint(f"{server.url}?api-version=1", "m", api_key_env="JUDGE_KEY")
        assert texts(ChatClient(endpoint, None).complete(requests(1))) == SAID[:1]
        assert server.paths == ["/v1/chat/completions?api-version=1"]
        assert server.keys == [None] and server.headers[0]["api-key"] == KEY


def test_the_client_works_in_a_running_event_loop(tmp_path):
    """As in a notebook."""

    async def cell():
        with ChatServer(echo) as server:
            return client(server, tmp_path).complete(requests(3))

    assert texts(asyncio.run(cell())) == SAID[:3]


def test_cost_is_estimated_before_and_counted_after(monkeypatch):
    prices = Prices(prompt=2.0, completion=10.0)
    with ChatServer(echo) as server:
        ours = client(server)
        estimate = ours.estimate([ChatRequest([{"role": "user", "content": "x" * 4_000_000}], 100_000)])
        assert (estimate.prompt_tokens, estimate.completion_tokens) == (1_000_000, 100_000)
        assert "at most $3.00" in estimate.line(prices) and "$" not in estimate.line()
        assert (estimate * 2).line(prices).startswith("2 requests") and (estimate * 2).line(prices).endswith("$6.00")
        longest = ours.estimate([ChatRequest([{"role": "user", "content": placeholder_answer(300, "a")}], 7)])
        assert (longest.prompt_tokens, longest.completion_tokens) == (300, 7)
        ours.complete(requests(10))
    assert "70 prompt tokens, 30 completion tokens, $0.00" in ours.usage.line(prices)
    notes = []
    confirm_cost(estimate, yes=True, log=notes.append)
    monkeypatch.setattr("sys.stdin", io.StringIO("y"))
    with pytest.raises(SimpoError, match="--yes"):  # not a terminal
        confirm_cost(estimate, yes=False, log=notes.append)
    assert len(notes) == 2
    with pytest.raises(SimpoError, match="prices"):
        Prices(-1, 0)


@pytest.mark.parametrize(
    "raw",
    [
        Raw(400, b"[" * 100_000),
        Raw(400, b'{"a": 1}', {"content-type": "application/json; charset=idna"}),
        Raw(400, b'{"a": 1}', {"content-type": "application/json; charset=hex"}),
        Raw(401, b'{"error": {"message": "\\ud800"}}'),
    ],
)
def test_unusual_errors_give_one_line(raw):
    with ChatServer(lambda body: raw) as server, pytest.raises(SimpoError, match=str(raw.status)):
        client(server).complete(requests(1))


@pytest.mark.parametrize("status", [200, 400, 500])
def test_a_huge_reply_is_partly_read_and_not_retried(monkeypatch, status):
    monkeypatch.setattr(sending, "_MAX_REPLY_BYTES", 1 << 20)
    with ChatServer(lambda body: Raw(status, b"x" * (3 << 20))) as server, pytest.raises(SimpoError, match="MiB"):
        client(server).complete(requests(1))
    assert len(server.bodies) == 1


def test_a_compressed_reply_is_not_expanded():
    """A few kilobytes could expand to gigabytes."""
    reply = Raw(200, gzip.compress(json.dumps(completion("yes")).encode()), {"content-encoding": "gzip"})
    with ChatServer(lambda body: reply) as server, pytest.raises(SimpoError, match="compressed"):
        client(server).complete(requests(1))
    assert len(server.bodies) == 1


def test_log_probabilities_with_thousands_of_digits_are_rejected(monkeypatch):
    text = json.dumps(completion("m", {"m": -1.0})).replace("-1.0", "-" + "1" * 400).encode()
    with ChatServer(lambda body: Raw(200, text)) as server, pytest.raises(SimpoError, match="log-probability"):
        client(server, attempts=1).complete(requests(1, top_logprobs=5))


@pytest.mark.parametrize("key", [KEY, 'with "quotes" and \\', "it's a key"])
def test_a_key_repeated_by_a_server_is_masked(monkeypatch, tmp_path, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with ChatServer(lambda body: completion(f"you sent {key}")) as server:
        [reply] = client(server, tmp_path / "cache").complete(requests(1))
    assert reply.text == "you sent <redacted>"
    body = json.dumps({"error": {"code": {"key": key}}}).encode()
    with ChatServer(lambda body_: Raw(401, body)) as server, pytest.raises(SimpoError) as caught:
        client(server).complete(requests(1))
    assert key not in str(caught.value) and "<redacted>" in str(caught.value)
