"""The label page in a real browser: keyboard, two labelers, a killed server, hostile text, sizes and color schemes."""

from __future__ import annotations

from collections import Counter
from urllib.parse import urlsplit

import pytest
from tests.browser import Browser, Page, chromium
from tests.labeling.conftest import make_items

from simpo.labeling.session import Item, Session

_DONE = "!document.getElementById('done').hidden"
_SHOWN = "!document.getElementById('task').hidden && document.querySelectorAll('.answer').length"
_PROGRESS = "document.getElementById('progress').textContent"
_HOSTILE = [
    '<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">',
    '"><img src=x onerror=window.hacked=1>',
    "</style></textarea></div></body>{{7*7}}${7*7}",
    "\u202eright to left\u202c שלום עולם",
    "x" * 200_000,
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    chromium()
    with Browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


def _is_clean(page: Page) -> bool:
    """Return whether there were no complaints, only requests to its own server, and no horizontal overflow."""
    assert not page.complaints
    assert {urlsplit(url).hostname for url in page.requests if not url.startswith("data:")} == {"127.0.0.1"}
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth && !window.hacked")


def test_fifty_pairs_can_be_judged_by_keyboard_alone(browser: Browser, page_of):
    served = page_of(make_items(50))
    served.start()
    page = browser.open(served.url)
    page.wait("document.activeElement.id == 'labeler'")
    page.type("ann")
    page.press("Enter")
    shown: dict[str, list[str]] = {}
    keys = ["ArrowLeft", "2", "t", "b", "s"]
    for number in range(50):
        page.wait(f"{_SHOWN} && {_PROGRESS}.includes('ann · {number} done')")
        prompt = page.evaluate("document.querySelector('#prompt .text').textContent")
        shown[prompt] = page.evaluate("[...document.querySelectorAll('.answer .text')].map(one => one.textContent)")
        if number == 3:
            page.press("n")
            page.type("both answers are in the wrong language")
            page.press("Escape")
        page.press(keys[number % 5])
        if number == 20:  # undo the last one and judge it again
            page.wait(f"{_PROGRESS}.includes('21 done')")
            page.press("u")
            page.wait(f"{_PROGRESS}.includes('20 done')")
            page.press(keys[number % 5])
    page.wait(_DONE)
    assert _is_clean(page)
    page.send("Page.close")

    found = served.judgments()
    assert len({one.item for one in found}) == len(found) == 50
    assert Counter(one.kind for one in found) == {"ranked": 20, "tie": 10, "both_bad": 10, "skip": 10}
    assert [one.note for one in found if one.note] == ["both answers are in the wrong language"]
    for number, one in enumerate(found):  # what is stored is what was on the screen
        texts = [f"answer {one.item[1:]}.{place}" for place in one.shown]
        assert shown[f"Question {one.item[1:]}?"] == texts
        if one.kind == "ranked":
            assert one.ranks[one.shown[0]] == (1 if keys[number % 5] == "ArrowLeft" else 2)
    assert {one.shown for one in found} == {(0, 1), (1, 0)}


def test_two_labelers_and_a_server_killed_during_a_vote(browser: Browser, page_of):
    served = page_of(make_items(10), overlap=0.4)
    served.start_process()
    pages = {name: browser.open(f"{served.url}&labeler={name}") for name in ("ann", "ben")}
    done = dict.fromkeys(pages, 0)
    for name in ("ann", "ben", "ben", "ann"):
        pages[name].wait(f"{_SHOWN} && {_PROGRESS}.includes('{name} · {done[name]} done')")
        pages[name].press("1")
        done[name] += 1
    for name, page in pages.items():
        page.wait(f"{_PROGRESS}.includes('{name} · 2 done')")
    served.kill()
    for page in pages.values():
        page.press("2")  # the server is down
        page.wait("document.getElementById('status').textContent.includes('Nothing is lost')")
    pages["ann"].send("Page.navigate", url="about:blank")  # her vote is kept in the page's storage
    served.start_process()
    pages["ann"].send("Page.navigate", url=f"{served.url}&labeler=ann")
    for name, page in pages.items():
        page.wait(f"{_SHOWN} && {_PROGRESS}.includes('{name} · 3 done')")
    for page in pages.values():
        while page.wait(f"{_SHOWN} ? 1 : {_DONE} ? 2 : 0") == 1:
            before = page.evaluate(_PROGRESS)
            page.press("1")
            page.wait(f"{_DONE} || {_PROGRESS} != {before!r}")
        page.send("Page.close")
    found = served.judgments()
    assert len({(one.labeler, one.item) for one in found}) == len(found)
    times = Counter(one.item for one in found)
    assert sorted(times.values()) == [1] * 6 + [2] * 4  # four items shared; nothing lost or counted twice


def test_a_server_error_is_reported_and_the_item_can_be_judged_again(browser: Browser, page_of, monkeypatch):
    """Starlette answers an internal error with status 500 and plain text."""
    served = page_of(make_items(2))
    served.start()
    judge, failed = Session.judge, []

    def fails_once(self, vote, key):
        if not failed:
            failed.append(vote)
            raise RuntimeError("planted")
        return judge(self, vote, key)

    monkeypatch.setattr(Session, "judge", fails_once)
    page = browser.open(f"{served.url}&labeler=ann")
    page.wait(f"{_SHOWN} && {_PROGRESS}.includes('0 done')")
    page.press("1")
    page.wait("document.getElementById('status').textContent.includes('500')")
    page.press("1")
    page.wait(f"{_SHOWN} && {_PROGRESS}.includes('1 done') && document.getElementById('status').hidden")
    assert [one.item for one in served.judgments()] == [failed[0].item]
    page.send("Page.close")


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (380, True)])
def test_hostile_text_is_only_text(browser: Browser, page_of, width: int, dark: bool):
    served = page_of([Item("p", _HOSTILE[0], tuple(_HOSTILE))])
    served.start()
    page = browser.open(f"{served.url}&labeler=ann", width=width, dark=dark)
    page.wait(_SHOWN)
    texts = page.evaluate("[...document.querySelectorAll('.answer .text')].map(one => one.textContent)")
    assert sorted(texts) == sorted(_HOSTILE)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor").removeprefix("rgb(").rstrip(")")
    assert (sum(map(int, ground.split(","))) < 200) == dark
    for key in "31=2":  # a ranking with a tie; the remaining two share last place
        page.press(key)
    page.press("Enter")
    page.wait("document.getElementById('status').textContent.includes('Rank 1 more')")
    page.press("5")
    page.press("Enter")
    page.wait(_DONE)
    (one,) = served.judgments()
    assert [one.ranks[place] for place in one.shown] == [2, 2, 1, 4, 3]
    assert _is_clean(page)
    page.send("Page.close")
