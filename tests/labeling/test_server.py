"""Requests the server rejects, who is asked what, and the command around it."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from threading import Thread

import httpx
import pytest
from tests.labeling.conftest import TOKEN, Served, make_items

from simpo.cli import main
from simpo.errors import SimpoError
from simpo.labeling.run import export_run
from simpo.labeling.server import listen
from simpo.labeling.session import Item, Judgment, Session, Store, pair_items, read_items
from simpo.runs.files import read_lines, write_lines

_HEADERS = {"x-simpo-token": TOKEN}


def _vote(item: str, key: str = "key-12345", **fields: object) -> dict:
    return {"key": key, "labeler": "ann", "item": item, "kind": "ranked", "ranks": [1, 2], "seconds": 1.5} | fields


@pytest.fixture
def served(page_of) -> Served:
    found = page_of(make_items(3))
    found.start()
    return found


def test_access_requires_the_token_and_this_machine(served: Served):
    base = served.url.partition("?")[0]
    with httpx.Client(base_url=base, trust_env=False) as client:
        assert client.get("/?token=wrong").status_code == client.get("/").status_code == 403
        page = client.get(f"/?token={TOKEN}")
        assert page.status_code == 200
        assert "default-src 'none'" in page.headers["content-security-policy"]
        # A page on another site cannot add the header without a preflight, and its host name is not this machine's.
        assert client.post("/api/next", json={"labeler": "ann"}).status_code == 403
        preflight = client.options(
            "/api/next", headers={"origin": "http://evil", "access-control-request-method": "POST"}
        )
        assert "access-control-allow-origin" not in preflight.headers
        for host, status in {"evil.example": 400, f"evil.example:{served.port}": 400, "localhost:9": 200}.items():
            answer = client.post("/api/next", json={"labeler": "ann"}, headers=_HEADERS | {"host": host})
            assert answer.status_code == status


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (_vote("p9"), "p9"),
        (_vote("p0", ranks=[1]), "ranks"),
        (_vote("p0", ranks=[1, 3]), "ranks"),
        (_vote("p0", ranks=[1, 1]), "ranked"),
        (_vote("p0", kind="maybe"), "kind"),
        (_vote("p0", seconds="1"), "seconds"),
        (_vote("p0", labeler=" "), "labeler"),
        (_vote("p0", note="x" * 10_001), "note"),
        (_vote("p0", key="k"), "key"),
        (_vote("p0", note="a \ud83d"), "note"),  # half an emoji, which no database can store
        (_vote("p0", key="key-1234\ud83d"), "key"),
        ([], "object"),
        (_vote("p0", note="x" * 200_000), "bytes"),
    ],
)
def test_invalid_votes_are_rejected(served: Served, body: object, named: str):
    address, content = served.url.partition("?")[0] + "api/judge", json.dumps(body)
    answer = httpx.post(address, content=content, headers=_HEADERS, trust_env=False)
    assert answer.status_code == 400
    assert named in answer.json()["error"]
    assert served.judgments() == []


def test_a_repeated_request_counts_once(served: Served):
    with httpx.Client(base_url=served.url.partition("?")[0], headers=_HEADERS, trust_env=False) as client:
        for key in ("first-key", "first-key", "other-key"):  # sent twice, then judged again as in a second window
            client.post("/api/judge", json=_vote("p0", key))
        assert len(served.judgments()) == 1
        client.post("/api/judge", json=_vote("p1", "third-key"))
        for _ in range(2):
            undone = client.post("/api/undo", json={"key": "undo-key-1", "labeler": "ann"}).json()
            assert undone["item"]["id"] == "p1"
        assert [one.item for one in served.judgments()] == ["p0"]
        assert client.post("/api/undo", json={"key": "undo-key-2", "labeler": "ben"}).json()["progress"]["done"] == 0


def test_a_lone_surrogate_in_an_answer_is_shown(page_of):
    served = page_of([Item("p0", "Why?", ("so \ud83d", "because"))])
    served.start()
    with httpx.Client(base_url=served.url.partition("?")[0], headers=_HEADERS, trust_env=False) as client:
        found = client.post("/api/next", json={"labeler": "ann"})
        assert sorted(json.loads(found.text)["item"]["answers"]) == ["because", "so \ud83d"]


def test_names_are_normalized(served: Served):
    """Composed or decomposed, with any spaces. Case matters, because it may be a different person."""
    names = ["Jos\u00e9 A", " Jose\u0301  A", "Jos\u00e9\u00a0A", "jos\u00e9 A"]
    with httpx.Client(base_url=served.url.partition("?")[0], headers=_HEADERS, trust_env=False) as client:
        for number, name in enumerate(names):
            client.post("/api/judge", json=_vote("p0", f"key-number-{number}", labeler=name))
    assert [one.labeler for one in served.judgments()] == ["Jos\u00e9 A", "jos\u00e9 A"]


def test_shared_items_go_to_everyone_and_others_to_one_labeler(tmp_path: Path):
    with closing(Store(tmp_path / "judgments.sqlite")) as store:
        session = Session(make_items(40), store, seed=0, overlap=0.25)
        seen: dict[str, list[str]] = {"ann": [], "ben": [], "eve": []}
        while open_items := {name: item for name in seen if (item := session.next(name)["item"])}:
            assert len({item["id"] for item in open_items.values()}) >= len(open_items) - 1  # at the same time
            for name, item in open_items.items():
                seen[name].append(item["id"])
                kind = "skip" if name == "ann" and len(seen[name]) % 2 else "tie"
                session.judge(Judgment(name, item["id"], kind, (1, 1), (), "", 1.0), f"{name} {item['id']}")
        judged = [one.item for one in store.judgments() if one.kind != "skip"]
    times = Counter(item for several in seen.values() for item in several)
    everybody = {item for item, count in times.items() if count == 3}
    assert len(everybody) == 10
    assert len(times) == len(set(judged)) == 40  # what ann skipped was judged by somebody else
    assert {judged.count(item) for item in times.keys() - everybody} == {1}
    assert seen["ann"] != seen["ben"]


def _rows(path: Path, responses: list[list[str]]) -> Path:
    write_lines(path, [{"id": f"p{n}", "prompt": f"Q{n}", "responses": found} for n, found in enumerate(responses)])
    return path


def test_an_item_on_a_screen_goes_to_nobody_else_even_after_a_restart(tmp_path: Path, monkeypatch):
    items, path = make_items(2), tmp_path / "judgments.sqlite"
    shown = []
    for name in ("ann", "ben"):  # the server is restarted in between
        with closing(Store(path)) as store:
            shown.append(Session(items, store, seed=0, overlap=0).next(name)["item"]["id"])
    assert sorted(shown) == [item.id for item in items]
    with closing(Store(path)) as store:
        session = Session(items, store, seed=0, overlap=0)
        assert session.next("cid")["item"] is None
        later = time.time() + 3600  # ann and ben have closed their pages
        monkeypatch.setattr(time, "time", lambda: later)
        assert session.next("cid")["item"] is not None


def test_items_are_made_from_answer_files(tmp_path: Path):
    one = _rows(tmp_path / "one.jsonl", [["x", "y", "x", "z"], ["x", "x"], ["x", "y"]])
    items, dropped = read_items(one, pairs=False)
    assert [(item.id, item.responses) for item in items] == [("p0", ("x", "y", "z")), ("p2", ("x", "y"))]
    assert dropped == {"answers_the_same_as_another_one": 2, "prompts_fewer_than_two_different_answers": 1}
    items, _ = read_items(one, pairs=True)
    assert [item.id for item in items] == ["p0/0-1", "p0/0-2", "p0/1-2", "p2/0-1"]
    a, b = (_rows(tmp_path / f"{name}.jsonl", [[name], ["same"]]) for name in "ab")
    items, dropped = pair_items(a, b)
    assert [(item.id, item.responses, item.is_tie) for item in items] == [
        ("p0", ("a", "b"), False),
        ("p1", ("same", "same"), True),
    ]
    assert dropped == {"pairs_of_identical_answers": 1}
    with pytest.raises(SimpoError, match="p0: 10 answers"):
        read_items(_rows(tmp_path / "many.jsonl", [[str(n) for n in range(10)]]), pairs=False)


def _error(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert main(["label", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_mistakes_give_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture):
    single = _rows(tmp_path / "single.jsonl", [["x"], ["y"]])
    good = _rows(tmp_path / "good.jsonl", [["x", "y"]])
    out = ("--output_dir", tmp_path / "out")
    assert "only one answer per prompt" in _error(capsys, single, *out)
    assert "all answers are identical" in _error(capsys, single, "--against", single, *out)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"{port} is in use" in _error(capsys, good, *out, "--port", port)
    assert "--port" in _error(capsys, good, *out, "--port", 70_000)
    assert "guidelines" in _error(capsys, good, *out, "--guidelines", tmp_path / "none.txt")
    assert "overlap" in _error(capsys, good, *out, "--overlap", 1.5)
    assert "output_dir" in _error(capsys, good)
    assert "answers" in _error(capsys, *out)
    assert "not a run of simpo label" in _error(capsys, "--export", tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_command_goes_from_page_to_preferences(tmp_path: Path, capsys: pytest.CaptureFixture):
    a, b = (_rows(tmp_path / f"{name}.jsonl", [[f"{name}{n}"] for n in range(3)]) for name in "ab")
    with closing(listen(0)) as free:
        port = free.getsockname()[1]
    out = tmp_path / "out"
    arguments = [a, "--against", b, "--output_dir", out, "--port", port]
    preferred: list[str] = []

    def label_one_and_interrupt() -> None:
        try:
            while not (out / ".token").exists() or not (out / ".token").read_text():
                time.sleep(0.02)
            headers = {"x-simpo-token": (out / ".token").read_text()}
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, trust_env=False) as client:
                item = client.post("/api/next", json={"labeler": "ann"}).json()["item"]
                preferred.append(item["answers"][0])
                client.post("/api/judge", json=_vote(item["id"], note="clearer"))
            export_run(out)  # while the page is open
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    person = Thread(target=label_one_and_interrupt)
    person.start()
    assert main(["label", *map(str, arguments)]) == 0
    person.join()
    printed = capsys.readouterr().out
    token = (out / ".token").read_text()
    assert f"http://127.0.0.1:{port}/?token={token}" in printed
    assert "judged: 1 items" in printed
    (row,) = read_lines(out / "preferences.jsonl")
    assert (row["chosen"], row["labeler"], row["judgments"][0]["note"]) == (preferred[0], "ann", "clearer")
    assert token not in (out / "log.txt").read_text()
    assert (out / ".token").stat().st_mode & 0o077 == 0
    assert json.loads((out / "results.json").read_text())["command"] == "label"
    assert main(["label", "--export", str(out)]) == 0
    assert "krippendorff_alpha" in capsys.readouterr().out
    assert "seed: " in _error(capsys, *arguments, "--seed", 1)  # a different order would not continue this run
