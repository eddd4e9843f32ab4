"""A packed batch and its layout against a token-by-token derivation."""

from __future__ import annotations

import random

import pytest
import torch

from simpo.packing.layout import AttentionLayout, PackedBatch, PaddedRows, Span, TokenizedComparison


def random_batch(seed: int) -> list[TokenizedComparison]:
    draw = random.Random(seed)

    def ids() -> list[int]:
        return [draw.randint(3, 99) for _ in range(draw.choice([1, 1, 2, 3, 8]))]

    return [TokenizedComparison(ids(), [ids() for _ in range(draw.randint(1, 4))]) for _ in range(draw.randint(1, 4))]


def random_masks(comparisons: list[TokenizedComparison], seed: int) -> list[TokenizedComparison]:
    """Return the comparisons with about half of each response's tokens scored."""
    draw = random.Random(seed)

    def mask(length: int) -> list[bool]:
        chosen = [draw.random() < 0.5 for _ in range(length)]
        chosen[draw.randrange(length)] = True
        return chosen

    return [
        TokenizedComparison(c.prompt_ids, c.response_ids, [mask(len(response)) for response in c.response_ids])
        for c in comparisons
    ]


def tokens_of(comparisons):
    """Return ``(id, comparison, part, position)`` for every token, in flat order."""
    for c, comparison in enumerate(comparisons):
        for position, token in enumerate(comparison.prompt_ids):
            yield token, c, 0, position
        for k, response in enumerate(comparison.response_ids):
            for place, token in enumerate(response):
                yield token, c, k + 1, len(comparison.prompt_ids) + place


SEEDS = pytest.mark.parametrize("seed", range(20))


@SEEDS
def test_tokens_positions_and_parts_match_the_derivation(seed):
    comparisons = random_batch(seed)
    batch = PackedBatch.build(comparisons)
    layout = batch.layout
    found = zip(
        batch.input_ids.tolist(),
        layout.index.comparison_of.tolist(),
        layout.index.part_of.tolist(),
        layout.index.positions.tolist(),
        strict=True,
    )
    assert list(found) == list(tokens_of(comparisons))
    assert batch.tokens == layout.total == sum(comparison.packed_length for comparison in comparisons)
    assert batch.comparisons == comparisons


@SEEDS
def test_every_response_token_is_scored_once_from_the_token_before_it(seed):
    comparisons = random_batch(seed)
    batch = PackedBatch.build(comparisons)
    flat = list(tokens_of(comparisons))
    expected = []  # (position it is scored from, target, response)
    response = -1
    for index, (token, c, part, position) in enumerate(flat):
        if part == 0:
            continue
        response += flat[index - 1][1:3] != (c, part)
        # the previous token in its own sequence: in the same part, or the prompt's last token
        (before,) = [
            i
            for i, (_, other, kind, place) in enumerate(flat)
            if other == c and place == position - 1 and kind in (0, part)
        ]
        expected.append((before, token, response))
    found = zip(batch.scored.tolist(), batch.targets.tolist(), batch.response_of.tolist(), strict=True)
    assert list(found) == expected
    assert batch.lengths.tolist() == [len(r) for c in comparisons for r in c.response_ids]


@SEEDS
def test_masks_select_scored_tokens_and_change_nothing_else(seed):
    comparisons = random_masks(random_batch(seed), seed)
    batch, whole = PackedBatch.build(comparisons), PackedBatch.build(random_batch(seed))
    kept = [kept for c in comparisons for mask in c.scored for kept in mask]
    for name in ("scored", "targets", "response_of"):
        assert getattr(batch, name).tolist() == getattr(whole, name)[torch.tensor(kept)].tolist()
    assert batch.lengths.tolist() == [sum(mask) for c in comparisons for mask in c.scored]
    assert batch.layout == whole.layout
    assert torch.equal(batch.input_ids, whole.input_ids)
    assert batch.comparisons == random_batch(seed)
    padded = PaddedRows.unpack(batch)
    assert torch.equal(padded.input_ids, PaddedRows.unpack(whole).input_ids)
    assert padded.scored.tolist() == PaddedRows.unpack(whole).scored[torch.tensor(kept)].tolist()


@SEEDS
def test_segments_match_the_derivation(seed):
    comparisons = random_batch(seed)
    layout = PackedBatch.build(comparisons).layout
    flat = list(tokens_of(comparisons))
    queries, keys = [], []
    for c, comparison in enumerate(comparisons):
        for part in range(1, len(comparison.response_ids) + 1):
            own = [i for i, (_, other, kind, _) in enumerate(flat) if other == c and kind == part]
            prompt = [i for i, (_, other, kind, _) in enumerate(flat) if other == c and kind == 0]
            queries.append(prompt + own if part == 1 else own)
            keys.append(prompt + own)
    assert [i for segment in queries for i in segment] == list(range(layout.total))
    assert layout.index.key_index.tolist() == [i for segment in keys for i in segment]
    assert layout.query_sizes == [len(segment) for segment in queries]
    assert layout.key_sizes == [len(segment) for segment in keys]
    for cumulative, sizes in (
        (layout.index.cu_seqlens_q, layout.query_sizes),
        (layout.index.cu_seqlens_k, layout.key_sizes),
    ):
        assert cumulative.dtype == torch.int32
        assert cumulative.tolist() == [sum(sizes[:n]) for n in range(len(sizes) + 1)]


@SEEDS
def test_padded_rows_match_the_packed_batch(seed):
    comparisons = random_batch(seed)
    batch = PackedBatch.build(comparisons)
    rows = PaddedRows.unpack(batch)
    whole = [c.prompt_ids + response for c in comparisons for response in c.response_ids]
    width = max(map(len, whole))
    assert rows.input_ids.tolist() == [row + [0] * (width - len(row)) for row in whole]
    assert rows.attention_mask.tolist() == [[1] * len(row) + [0] * (width - len(row)) for row in whole]
    # the token after each scored position is the target, in packed order
    assert rows.input_ids.flatten()[rows.scored + 1].tolist() == batch.targets.tolist()
    starts = [(r, len(c.prompt_ids)) for r, c in enumerate(c for c in comparisons for _ in c.response_ids)]
    assert rows.scored.tolist() == [
        r * width + place for r, start in starts for place in range(start - 1, len(whole[r]) - 1)
    ]


def test_moving_or_probing_a_batch_keeps_its_contents(comparisons):
    batch = PackedBatch.build(comparisons, [1.0, 0.0, 1.0, 1.0])
    moved = batch.to("meta")
    assert {moved.input_ids.device.type, moved.weights.device.type, moved.layout.index.key_index.device.type} == {
        "meta"
    }
    assert batch.to("cpu").comparisons == comparisons
    kept = batch.to("cpu").weights
    assert kept.tolist() == [1.0, 0.0, 1.0, 1.0] and kept.dtype == torch.float64
    probing = batch.probing()
    assert (probing.layout.windows, batch.layout.windows) == ([], None)
    assert probing.layout.spans == batch.layout.spans


def test_the_layout_matches_one_written_by_hand():
    layout = AttentionLayout((Span(2, (1, 3)), Span(1, (2,))))
    assert layout.index.positions.tolist() == [0, 1, 2, 2, 3, 4, 0, 1, 2]
    assert layout.index.key_index.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 8]
    assert layout.index.cu_seqlens_q.tolist() == [0, 3, 6, 9]
    assert layout.index.cu_seqlens_k.tolist() == [0, 3, 8, 11]


@pytest.mark.parametrize(
    ("prompt", "responses", "named"),
    [([], [[1]], "prompt_ids"), ([1], [], "response_ids"), ([1], [[2], []], r"response_ids\[1\]")],
)
def test_empty_parts_are_rejected_by_name(prompt, responses, named):
    with pytest.raises(ValueError, match=named):
        TokenizedComparison(prompt, responses)


@pytest.mark.parametrize(
    ("scored", "named"),
    [
        ([[True]], "1 masks for 2 responses"),
        ([[True], [True]], r"scored\[1\] has 1 entries for 2 tokens"),
        ([[True], [False, False]], r"scored\[1\] selects no token"),
    ],
)
def test_masks_of_the_wrong_shape_are_rejected_by_name(scored, named):
    with pytest.raises(ValueError, match=named):
        TokenizedComparison([1], [[2], [3, 4]], scored)


def test_lengths_of_a_comparison_are_counted():
    comparison = TokenizedComparison([1, 2, 3], [[4], [5, 6], [7, 8, 9, 10]])
    assert comparison.packed_length == 3 + 1 + 2 + 4
    padded = PaddedRows.unpack(PackedBatch.build([comparison])).input_ids
    assert comparison.padded_length == 3 * (3 + 4) == padded.numel()


def test_impossible_batches_are_rejected(comparisons):
    with pytest.raises(ValueError, match="at least one"):
        PackedBatch.build([])
    with pytest.raises(ValueError, match="4 comparisons, but 3 weights"):
        PackedBatch.build(comparisons, [1.0] * 3)
