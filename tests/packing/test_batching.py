"""Properties of the plan, over seeded random cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from simpo.errors import SimpoError
from simpo.packing.batching import StepPlan, check_budget, fill_in_order

WORLDS = [1, 2, 3, 4]


def random_plan(seed: int, world_size: int, **changes) -> StepPlan:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 100, size=int(draw.integers(1, 60)))
    settings = {
        "lengths": lengths,
        "rows_per_step": int(draw.integers(1, 5)) * world_size,
        "max_batch_tokens": int(draw.choice([lengths.max(), lengths.max() + 1, 150, 1000])),
        "world_size": world_size,
        "seed": seed,
    }
    settings["max_batch_tokens"] = max(settings["max_batch_tokens"], int(lengths.max()))
    return StepPlan(**settings | changes)


def shares(plan: StepPlan, epoch: int = 0):
    """For every step, the share of each rank."""
    order = plan.order(epoch)
    return [[plan.step(order, number, rank) for rank in range(plan.world_size)] for number in range(plan.steps)]


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("seed", range(40))
def test_properties(seed, world_size):
    plan = random_plan(seed, world_size)
    trained: list[int] = []
    for number, ranks in enumerate(shares(plan, epoch=seed % 3)):
        here = [
            row
            for rank in ranks
            for micro in rank.micro_batches
            for row, weight in zip(micro.rows, micro.weights, strict=True)
            if weight
        ]
        expected = min(plan.rows_per_step, len(plan.lengths) - number * plan.rows_per_step)
        assert len(here) == expected
        assert {rank.weight for rank in ranks} == {expected}  # the loss's denominator, on every rank
        assert len({len(rank.micro_batches) for rank in ranks}) == 1
        for micro in itertools.chain.from_iterable(rank.micro_batches for rank in ranks):
            assert micro.rows
            assert plan.lengths[list(micro.rows)].sum() <= plan.max_batch_tokens
            assert set(micro.weights) <= {0.0, 1.0}
            assert len(set(micro.weights)) == 1
            assert 1.0 in micro.weights or len(micro.rows) == 1  # a filler is one row, and costs little
            assert 1.0 in micro.weights or plan.lengths[micro.rows[0]] == plan.lengths[here].min()
        trained += here
    assert sorted(trained) == list(range(len(plan.lengths)))


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("seed", range(10))
def test_tokens_are_balanced(seed, world_size):
    """No rank, and no micro-batch of a rank, is above the mean by more than one row."""
    plan = random_plan(seed, world_size)
    for ranks in shares(plan):
        loads = [
            [plan.lengths[list(m.rows)].sum() if any(m.weights) else 0 for m in rank.micro_batches] for rank in ranks
        ]
        rows = [row for rank in ranks for micro in rank.micro_batches for row in micro.rows]
        longest = plan.lengths[rows].max()
        totals = list(map(sum, loads))
        assert max(totals) <= sum(totals) / world_size + longest
        for rank in loads:
            assert max(rank) <= sum(rank) / len(rank) + longest


@pytest.mark.parametrize("world_size", WORLDS)
def test_as_few_micro_batches_as_tokens_allow(world_size):
    """Equal rows: exactly ceil(tokens / budget) forwards, and one where everything fits."""
    lengths = np.full(24, 10)
    order = np.arange(24)
    for budget, rows_each in ((10, 1), (35, 3), (60, 6), (10_000, 24)):
        plan = StepPlan(lengths, 24, budget, world_size)
        expected = -(-24 // (world_size * rows_each))
        assert len(plan.step(order, 0, 0).micro_batches) == expected


@pytest.mark.parametrize("world_size", WORLDS)
def test_every_rank_computes_the_same_plan(world_size):
    """Only the arguments matter: a new plan is the same, and numpy's global state is not changed."""
    first, second = random_plan(3, world_size), random_plan(3, world_size)
    before = shares(first, epoch=2)
    np.random.seed(1)
    state = np.random.get_state()[1].tolist()
    assert shares(second, epoch=2) == before
    assert np.random.get_state()[1].tolist() == state


def test_orders():
    lengths = np.arange(1, 101)
    plan = StepPlan(lengths, 4, 1000, seed=7)
    orders = [plan.order(epoch).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    assert StepPlan(lengths, 4, 1000, seed=8).order(0).tolist() != orders[0]
    assert StepPlan(lengths, 4, 1000, seed=None).order(5).tolist() == list(range(100))


@pytest.mark.parametrize(
    ("rows", "drop", "steps"), [(8, False, 2), (9, False, 3), (9, True, 2), (3, False, 1), (3, True, 0)]
)
def test_steps_of_an_epoch(rows, drop, steps):
    plan = StepPlan(np.ones(rows, dtype=int), 4, 10, drop_last=drop)
    assert plan.steps == steps
    parts = [plan.step(plan.order(0), number).micro_batches for number in range(steps)]
    taken = [row for micro_batches in parts for micro in micro_batches for row in micro.rows]
    assert sorted(taken) == list(range(rows if not drop else steps * 4))


def test_a_row_above_the_budget_is_named():
    with pytest.raises(SimpoError, match=r"max_batch_tokens: 30 .*row 2, 31 tokens"):
        StepPlan(np.array([5, 30, 31, 6]), 2, 30)
    with pytest.raises(SimpoError, match="row 0, 9 tokens"):
        fill_in_order([9, 2], 8)
    check_budget([], 1)
    check_budget([8, 2], 8)


@pytest.mark.parametrize("seed", range(20))
def test_fill_in_order(seed):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 20, size=int(draw.integers(1, 40))).tolist()
    budget = int(draw.integers(20, 60))
    runs = fill_in_order(lengths, budget)
    assert [row for run in runs for row in run] == list(range(len(lengths)))
    sums = [sum(lengths[row] for row in run) for run in runs]
    assert max(sums) <= budget
    for total, following in itertools.pairwise(range(len(runs))):  # and no run could have taken the next row
        assert sums[total] + lengths[runs[following].start] > budget
    assert fill_in_order([], budget) == []
