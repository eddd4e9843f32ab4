import pytest

from simpo.generation.engine import Sampled
from simpo.generation.responses import response_metrics

SAMPLES = [[Sampled([5] * 4, True, -1.0), Sampled([5] * 6, False, -2.0)], [Sampled([7] * 1, True, -1.0)] * 2]


def test_metrics_match_closed_forms():
    found = {metric.name: metric for metric in response_metrics([["ab", "abcd"], ["é", "é"]], SAMPLES)}
    assert {name: metric.value for name, metric in found.items()} == {
        "sample/prompts": 2,
        "sample/responses": 4,
        "sample/tokens": 3.0,
        "sample/characters": 2.0,
        "sample/ended": 0.75,
        "sample/hit_max_new_tokens": 1,
        "sample/distinct": 0.75,
    }
    # two prompts with means 5 and 1: a standard error of 2, and t with one degree of freedom
    assert found["sample/tokens"].n == 2
    assert found["sample/tokens"].high - 3 == pytest.approx(2 * 12.7062, rel=1e-4)
    assert found["sample/ended"].n == 4 and found["sample/ended"].low < 0.75 < found["sample/ended"].high


def test_one_answer_per_prompt_has_no_share_of_distinct_answers():
    names = [metric.name for metric in response_metrics([["a"], ["a"]], [answers[:1] for answers in SAMPLES])]
    assert "sample/distinct" not in names and "sample/tokens" in names
