"""Chunks with a fake engine: plan, seeds and order."""

import random
from collections import Counter

import pytest

from simpo.generation.chunks import gather, missing_chunks, plan_chunks, sample_chunks
from simpo.generation.engine import Sampled
from simpo.generation.settings import SamplingSettings

PROMPTS = [[number] * (1 + number * 7 % 5) for number in range(11)]


class SeededEngine:
    """Draws its answers from the given seed."""

    def generate(self, prompts, settings, seed):
        draws = random.Random(seed)
        return [Sampled([prompt[0], draws.randrange(2**20)], True, draws.random()) for prompt in prompts]


def settings(**changes):
    return SamplingSettings(**{"n": 3, "chunk_size": 7, "max_new_tokens": 2} | changes)


def sample(chosen, done=(), share=slice(None)):
    return list(sample_chunks(SeededEngine(), PROMPTS, chosen, missing_chunks(PROMPTS, chosen, done)[share]))


@pytest.mark.parametrize(("n", "size"), [(1, 4), (3, 7), (3, 3), (4, 100), (1, 1)])
def test_every_prompt_is_in_one_chunk_n_times(n, size):
    chunks = plan_chunks([len(ids) for ids in PROMPTS], n, size)
    assert max(map(len, chunks)) <= size
    assert sum((Counter(chunk) for chunk in chunks), Counter()) == dict.fromkeys(range(11), n)
    assert all(set(Counter(chunk).values()) == {n} for chunk in chunks)
    lengths = [len(PROMPTS[prompt]) for chunk in chunks for prompt in chunk]
    assert lengths == sorted(lengths, reverse=True)


def test_more_answers_than_fit_into_a_chunk():
    chunks = plan_chunks([1, 2], n=5, chunk_size=2)
    assert chunks == [(1, 1), (1, 1), (1,), (0, 0), (0, 0), (0,)]


def test_all_answers_differ_and_belong_to_their_prompt():
    answers = gather(sample(settings()), 11)
    assert [[sampled.ids[0] for sampled in found] for found in answers] == [[number] * 3 for number in range(11)]
    assert len({sampled.ids[1] for found in answers for sampled in found}) == 33


@pytest.mark.parametrize("changes", [{}, {"n": 5, "chunk_size": 2}])
def test_order_and_interruptions_make_no_difference(changes):
    chosen = settings(**changes)
    whole = sample(chosen)
    done = random.Random(0).sample(range(len(whole)), len(whole) // 2)
    rest = sample(chosen, done)
    assert len(rest) == len(whole) - len(done)
    mixed = [*rest, *(whole[number] for number in done)]
    random.Random(1).shuffle(mixed)
    assert gather(mixed, 11) == gather(whole, 11)


def test_a_different_seed_gives_different_answers():
    first, second = (gather(sample(settings(seed=seed)), 11) for seed in (1, 2))
    assert first != second


def test_shares_add_up_to_the_whole():
    shares = [sample(settings(), done={1}, share=slice(rank, None, 3)) for rank in range(3)]
    assert gather([record for share in shares for record in share], 11) == gather(sample(settings(), done={1}), 11)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
