import hashlib

import pytest

from simpo.errors import SimpoError
from simpo.generation.settings import SamplingSettings, derived_seed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "n: must be at least 1 and at most 10000, not 0"),
        ({"top_k": -1}, "top_k: must be at least 0, not -1"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1, not 0"),
        ({"seed": -1}, "seed: must be at least 0, not -1"),
        ({"chunk_size": 0}, "chunk_size: must be at least 1, not 0"),
        ({"temperature": -0.1}, "temperature: must be at least 0, not -0.1"),
        ({"temperature": float("nan")}, "temperature: must be finite, not nan"),
        ({"temperature": float("inf")}, "temperature: must be finite, not inf"),
        ({"top_p": 0.0}, "top_p: must be above 0 and at most 1, not 0.0"),
        ({"top_p": 1.1}, "top_p: must be above 0 and at most 1, not 1.1"),
        ({"temperature": 0.0, "n": 2}, "n: 2 greedy answers (temperature 0) would all be identical; set n to 1"),
    ],
)
def test_values_out_of_bounds_are_reported(changes, message):
    with pytest.raises(SimpoError) as error:
        SamplingSettings(**changes)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("given", "context", "expected"),
    [(None, None, 2048), (None, 8192, 2048), (None, 512, 256), (None, 1, 1), (100, 512, 100), (511, 512, 511)],
)
def test_the_longest_answer_leaves_room_for_a_prompt(given, context, expected):
    resolved = SamplingSettings(max_new_tokens=given).resolved(context=context, chunk_size=32)
    assert resolved.max_new_tokens == expected
    assert resolved.chunk_size == 32


def test_an_answer_as_long_as_the_context_is_rejected():
    with pytest.raises(SimpoError, match=r"max_new_tokens: 512 leaves no room .* context of 512 tokens"):
        SamplingSettings(max_new_tokens=512).resolved(context=512, chunk_size=32)


def test_derived_seeds_are_distinct_and_stable():
    seeds = [derived_seed(seed, number) for seed in range(50) for number in range(50)] + [derived_seed(1, 2, 3)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # a later version may continue a run
    assert derived_seed(42, 0) == int(hashlib.sha256(b"42:0").hexdigest()[:16], 16) // 2 == 3042642129590909369
