"""Properties of batch plans, over seeded random cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from simpo.errors import SimpoError
from simpo.packing.batching import RowSizes, StepPlan, check_budget, fill

WORLDS = [1, 2, 3, 4]


def packed(lengths) -> RowSizes:
    """Return sizes of rows with these lengths and no padding."""
    return RowSizes.unpadded(np.asarray(lengths, dtype=int))


def random_plan(seed: int, world_size: int, **changes) -> StepPlan:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 100, size=int(draw.integers(1, 60)))
    settings = {
        "sizes": packed(lengths),
        "rows_per_step": int(draw.integers(1, 5)) * world_size,
        "max_batch_tokens": int(draw.choice([lengths.max(), lengths.max() + 1, 150, 1000])),
        "world_size": world_size,
        "seed": seed,
    }
    settings["max_batch_tokens"] = max(settings["max_batch_tokens"], int(lengths.max()))
    return StepPlan(**settings | changes)


def shares(plan: StepPlan, epoch: int = 0):
    """Return each rank's share of every step."""
    order = plan.order(epoch)
    return [[plan.step(order, number, rank) for rank in range(plan.world_size)] for number in range(plan.steps)]


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("seed", range(40))
def test_every_plan_covers_its_rows_within_the_budget(seed, world_size):
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
        assert {rank.weight for rank in ranks} == {expected}  # every rank divides the loss by the same number
        assert len({len(rank.micro_batches) for rank in ranks}) == 1
        for micro in itertools.chain.from_iterable(rank.micro_batches for rank in ranks):
            assert micro.rows
            assert plan.lengths[list(micro.rows)].sum() <= plan.max_batch_tokens
            assert set(micro.weights) <= {0.0, 1.0}
            assert len(set(micro.weights)) == 1
            assert 1.0 in micro.weights or len(micro.rows) == 1  # a filler is a single, cheap row
            assert 1.0 in micro.weights or plan.lengths[micro.rows[0]] == plan.lengths[here].min()
        trained += here
    assert sorted(trained) == list(range(len(plan.lengths)))


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("seed", range(10))
def test_tokens_are_balanced(seed, world_size):
    """No rank, and no micro-batch on a rank, exceeds the mean by more than one row."""
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
def test_the_number_of_micro_batches_is_minimal(world_size):
    """For rows of equal length: exactly ceil(tokens / budget) forwards, and one if everything fits."""
    lengths = np.full(24, 10)
    order = np.arange(24)
    for budget, rows_each in ((10, 1), (35, 3), (60, 6), (10_000, 24)):
        plan = StepPlan(packed(lengths), 24, budget, world_size)
        expected = -(-24 // (world_size * rows_each))
        assert len(plan.step(order, 0, 0).micro_batches) == expected


@pytest.mark.parametrize("world_size", WORLDS)
def test_every_rank_computes_the_same_plan(world_size):
    """Rebuilding a plan from the same arguments gives the same plan and leaves numpy's global state alone."""
    first, second = random_plan(3, world_size), random_plan(3, world_size)
    before = shares(first, epoch=2)
    np.random.seed(1)
    state = np.random.get_state()[1].tolist()
    assert shares(second, epoch=2) == before
    assert np.random.get_state()[1].tolist() == state


def test_row_orders_follow_the_seed_and_the_epoch():
    lengths = np.arange(1, 101)
    plan = StepPlan(packed(lengths), 4, 1000, seed=7)
    orders = [plan.order(epoch).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    assert StepPlan(packed(lengths), 4, 1000, seed=8).order(0).tolist() != orders[0]
    assert StepPlan(packed(lengths), 4, 1000, seed=None).order(5).tolist() == list(range(100))


@pytest.mark.parametrize(
    ("rows", "drop", "steps"), [(8, False, 2), (9, False, 3), (9, True, 2), (3, False, 1), (3, True, 0)]
)
def test_an_epoch_has_the_expected_number_of_steps(rows, drop, steps):
    plan = StepPlan(packed(np.ones(rows)), 4, 10, drop_last=drop)
    assert plan.steps == steps
    parts = [plan.step(plan.order(0), number).micro_batches for number in range(steps)]
    taken = [row for micro_batches in parts for micro in micro_batches for row in micro.rows]
    assert sorted(taken) == list(range(rows if not drop else steps * 4))


def test_a_row_above_the_budget_is_reported():
    with pytest.raises(SimpoError, match=r"max_batch_tokens: 30 .*row 2, 31 tokens"):
        StepPlan(packed([5, 30, 31, 6]), 2, 30)
    with pytest.raises(SimpoError, match="row 0, 9 tokens"):
        fill(packed([9, 2]), range(2), 8)
    check_budget([], 1)
    check_budget([8, 2], 8)


@pytest.mark.parametrize("seed", range(20))
def test_fill_opens_a_new_group_only_when_a_row_does_not_fit(seed):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 20, size=int(draw.integers(1, 40))).tolist()
    budget = int(draw.integers(20, 60))
    groups = fill(packed(lengths), range(len(lengths)), budget)
    assert [row for group in groups for row in group] == list(range(len(lengths)))
    sums = [sum(lengths[row] for row in group) for group in groups]
    assert max(sums) <= budget
    for number, following in itertools.pairwise(range(len(groups))):  # no group had room for the next row
        assert sums[number] + lengths[groups[following][0]] > budget
    assert fill(packed([]), [], budget) == []


def tokens(path: str, rows: list[tuple[int, list[int]]]) -> int:
    """Return the number of tokens a forward of these rows computes, by the definition of the path."""
    if path == "padded":
        lines = [prompt + response for prompt, responses in rows for response in responses]
        return len(lines) * max(prompt + max(responses) for prompt, responses in rows)
    responses = [response for _, responses in rows for response in responses]
    return len(rows) * max(prompt for prompt, _ in rows) + len(responses) * max(responses)


@pytest.mark.parametrize("path", ["padded", "cached"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("seed", range(10))
def test_plans_of_padded_batches_count_padding(seed, world_size, path):
    """Padding counts towards the budget, every row is trained once, and all ranks make the same number of forwards."""
    draw = np.random.default_rng(seed)
    rows = [
        (int(draw.integers(1, 60)), draw.integers(1, 40, size=int(draw.integers(1, 5))).tolist()) for _ in range(50)
    ]
    columns = [
        [p for p, _ in rows],
        [len(r) for _, r in rows],
        [max(r) for _, r in rows],
        [p + sum(r) for p, r in rows],
    ]
    sizes = RowSizes.of(path, *map(np.array, columns))
    assert sizes.lengths.tolist() == [tokens(path, [row]) for row in rows]
    plan = StepPlan(sizes, 12, int(sizes.lengths.max()) + 100, world_size, seed)
    trained: list[int] = []
    for ranks in shares(plan):
        assert len({len(rank.micro_batches) for rank in ranks}) == 1
        for micro in itertools.chain.from_iterable(rank.micro_batches for rank in ranks):
            batch = [rows[row] for row in micro.rows]
            assert tokens(path, batch) == sizes.batch_tokens(micro.rows) <= plan.max_batch_tokens
            trained += [row for row, weight in zip(micro.rows, micro.weights, strict=True) if weight]
    assert sorted(trained) == list(range(50))


def test_rows_of_similar_length_share_a_padded_batch():
    """Four long and four short rows take two forwards, one for each kind, without padding."""
    prompts = np.array([100, 10] * 4)
    ones = np.ones(8, dtype=int)
    plan = StepPlan(RowSizes.of("cached", prompts, 2 * ones, 5 * ones, prompts + 10), 8, 450)
    groups = [sorted(micro.rows) for micro in plan.step(np.arange(8), 0).micro_batches]
    assert groups == [[0, 2, 4, 6], [1, 3, 5, 7]]
