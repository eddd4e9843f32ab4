"""The pairwise judge behind a server: both orders, verdicts and prompts."""

from __future__ import annotations

import re

import pytest
from tests.servers.chat_server import ChatServer, completion
from tests.servers.model_answers import ModelAnswers

from simpo import SimpoError
from simpo.client import ChatClient, ChatReply, Endpoint
from simpo.judging.pairwise import PairwiseApiJudge, read_verdict
from simpo.judging.protocol import Pair
from simpo.judging.registry import make_judge
from simpo.judging.settings import JudgeOptions

PAIRS = [
    Pair("1", "q", ("good", "bad")),
    Pair("2", "r", ("bad", "good")),
    Pair("3", "q", ("even", "also even")),
    Pair("4", "q", ("same", "same")),
]


def shown(body):
    """Return the two answers in the order of the request."""
    text = body["messages"][0]["content"]
    return [re.search(f"<answer_{name}>\n(.*)\n</answer_{name}>", text, re.DOTALL)[1] for name in "AB"]


def fair(body):
    first, second = shown(body)
    winner = "A" if first == "good" else "B" if second == "good" else "C"
    return completion(f"[[A]] would be wrong if ... so my verdict is:\n\n[[{winner}]]")


def judge_at(server, cache=None, **options):
    return PairwiseApiJudge(ChatClient(Endpoint(server.url, "tiny"), cache), **options)


def test_every_pair_is_sent_in_both_orders():
    with ChatServer(fair) as server:
        judge = judge_at(server)
        assert judge.estimate(PAIRS).requests == 6
        assert judge.compare(PAIRS) == [1.0, 0.0, 0.5, 0.5]
    orders = [["good", "bad"], ["bad", "good"]] * 2 + [["even", "also even"], ["also even", "even"]]
    assert sorted(map(shown, server.bodies)) == sorted(orders)
    assert judge.conflicting == 0
    assert judge.first_shown_wins == [0.5 if pair.a != pair.b else None for pair in PAIRS]


@pytest.mark.parametrize("preferred", ["A", "B"])
def test_a_judge_that_prefers_a_position_produces_ties(preferred):
    with ChatServer(lambda body: completion(f"[[{preferred}]]")) as server:
        judge = judge_at(server)
        assert judge.compare(PAIRS) == [0.5] * 4
    assert judge.conflicting == 3
    assert judge.first_shown_wins == [float(preferred == "A") if pair.a != pair.b else None for pair in PAIRS]


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        (("[[A]]", "[[B]]"), 1.0),
        (("[[B]]", "[[A]]"), 0.0),
        (("[[C]]", "[[C]]"), 0.5),
        (("[[A]]", "[[C]]"), 0.75),
        (("[[C]]", "[[A]]"), 0.25),
        (("[[A]]", "I cannot say."), None),
        (("", "[[B]]"), None),
    ],
)
def test_the_verdict_is_the_mean_of_both_orders(replies, expected):
    with ChatServer(lambda body: completion(replies[shown(body)[0] != "x"])) as server:
        assert judge_at(server).compare([Pair("1", "q", ("x", "y"))]) == [expected]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("[[A]]", 1.0),
        ("Both are fine.\n\n[[C]]\n", 0.5),
        ("At first [[A]], but then **[[B]]**.", 0.0),
        ("[[ B ]]", 0.0),
        ("A", None),
        ("[A]", None),
        ("[[D]]", None),
        ("[[A>B]]", None),
        ("", None),
    ],
)
def test_verdicts_are_read_from_text(text, verdict):
    assert read_verdict(ChatReply(text, finish_reason="stop")) == verdict
    assert read_verdict(ChatReply(text, finish_reason="length")) is None


def test_answers_are_shown_unchanged():
    """Placeholders inside a text are not replaced, and a conversation is shown in full."""
    prompt = [{"role": "user", "content": "one {answer_a}"}, {"role": "assistant", "content": "two"}]
    prompt.append({"role": "user", "content": "three"})
    with ChatServer(fair) as server:
        judge_at(server).compare([Pair("1", prompt, ("{answer_b} \\1", "{question}"))])
    texts = [body["messages"][0]["content"] for body in server.bodies]
    assert sorted(map(shown, server.bodies)) == [["{answer_b} \\1", "{question}"], ["{question}", "{answer_b} \\1"]]
    assert all("user: one {answer_a}\n\nassistant: two\n\nuser: three" in text for text in texts)


def test_a_judge_prompt_can_come_from_a_file(tmp_path):
    path = tmp_path / "prompt.md"
    path.write_text("{question}? A: {answer_a} B: {answer_b} {other}")
    with ChatServer(fair) as server:
        own, ours = judge_at(server, prompt=path), judge_at(server)
        assert own.identity["prompt"] != ours.identity["prompt"]
        assert own.requests([Pair("1", "q", ("1", "2"))])[0].messages[0]["content"] == "q? A: 1 B: 2 {other}"
        path.write_text("{question} {answer_a}")
        with pytest.raises(SimpoError, match=r"prompt\.md: .*\{answer_b\}"):
            judge_at(server, prompt=path)
        with pytest.raises(SimpoError, match="nowhere: cannot read the judge prompt"):
            judge_at(server, prompt=tmp_path / "nowhere")


def test_a_missing_key_is_reported_before_any_work(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    client = ChatClient(Endpoint("https://judge.invalid/v1", "m"), None)
    with pytest.raises(SimpoError, match="OPENAI_API_KEY"):
        make_judge("api", JudgeOptions(client))
    with pytest.raises(SimpoError, match="--judge_url"):
        make_judge("api", JudgeOptions())


def test_a_random_model_as_judge_gives_no_verdicts(chat_world, tmp_path):
    """Missing verdicts are not scores, and the second run sends nothing."""
    prompt = tmp_path / "short.md"
    prompt.write_text("{question} {answer_a} {answer_b}")
    with ChatServer(ModelAnswers(chat_world / "model")) as server:
        judge = judge_at(server, tmp_path, prompt=prompt, max_tokens=4)
        assert judge.compare(PAIRS) == [None, None, None, 0.5]
        again = judge_at(server, tmp_path, prompt=prompt, max_tokens=4)
        assert again.compare(PAIRS) == [None, None, None, 0.5]
    assert len(server.bodies) == 6 and again.client.usage.sent == 0
    assert judge.client.usage.completion_tokens == 24
