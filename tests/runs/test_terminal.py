import pytest

from simpo.runs import terminal as module
from simpo.runs.terminal import duration, progress


def test_a_progress_line_is_printed_every_tenth_with_the_time_left(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    lines = []
    with progress("responses", 1000, 400, lines.append) as advance:
        for _ in range(60):
            clock[0] += 0.5  # 20 per second
            advance(10)
    assert lines == [
        "500 of 1,000 responses, about 25 s left",
        "600 of 1,000 responses, about 20 s left",
        "700 of 1,000 responses, about 15 s left",
        "800 of 1,000 responses, about 10 s left",
        "900 of 1,000 responses, about 5 s left",
        "1,000 of 1,000 responses",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (3600, "1 h 0 min"), (90_061, "25 h 1 min")],
)
def test_durations_are_formatted(seconds, text):
    assert duration(seconds) == text
