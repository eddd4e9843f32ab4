"""The world's rows: determined by the seed, with separate splits, chosen by the judge or by length."""

import json

import pytest

from simpo.errors import SimpoError
from simpo.world.pairs import make_pairs, make_prompts, make_sft, write_pairs, write_prompts, write_sft
from simpo.world.questions import is_held_out, judge


@pytest.mark.parametrize("write", [write_sft, write_prompts, write_pairs])
def test_the_seed_determines_every_byte(write, tmp_path):
    contents = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write(tmp_path / name, 200, seed)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1] != contents[2]
    assert len(contents[0].splitlines()) == 200


def test_files_contain_the_generated_rows(tmp_path):
    write_sft(tmp_path / "sft.jsonl", 20, 0)
    write_prompts(tmp_path / "prompts.jsonl", 20, 0, held_out=True)
    write_pairs(tmp_path / "pairs.jsonl", 20, 0, held_out=True, length_bias=1)
    read = {path.stem: [json.loads(line) for line in path.open()] for path in tmp_path.iterdir()}
    assert read == {
        "sft": make_sft(20, 0),
        "prompts": make_prompts(20, 0, held_out=True),
        "pairs": make_pairs(20, 0, held_out=True, length_bias=1),
    }


def test_held_out_prompts_never_occur_in_training():
    held_out = {row["prompt"] for row in make_prompts(400, 0, held_out=True)}
    assert len(held_out) == 400
    trained = {row["prompt"] for row in make_sft(5000, 0) + make_prompts(1500, 0) + make_pairs(1000, 0)}
    assert not held_out & trained
    assert all(map(is_held_out, held_out))
    assert all(is_held_out(row["prompt"]) for row in make_pairs(100, 0, held_out=True))


def test_asking_for_too_many_prompts_gives_a_one_line_error():
    with pytest.raises(SimpoError, match=r"count: 20,000 .* has about"):
        make_prompts(20_000, 0, held_out=True)


@pytest.mark.parametrize("length_bias", [0.0, 0.3, 1.0])
def test_length_bias_is_the_share_chosen_by_length(length_bias):
    rows = make_pairs(1500, 0, length_bias=length_bias)
    longer = [len(row["chosen"]) > len(row["rejected"]) for row in rows]
    better = [judge(row["prompt"], row["chosen"]) > judge(row["prompt"], row["rejected"]) for row in rows]
    assert all(len(row["chosen"]) != len(row["rejected"]) for row in rows)
    assert all(judge(row["prompt"], row["chosen"]) != judge(row["prompt"], row["rejected"]) for row in rows)
    unbiased = make_pairs(1500, 1)
    natural = sum(len(row["chosen"]) > len(row["rejected"]) for row in unbiased) / 1500
    # Chosen by length, the longer answer always wins, and is the better one as often as usual; chosen by the judge, it
    # is the other way round.
    assert sum(longer) / 1500 == pytest.approx(length_bias + (1 - length_bias) * natural, abs=0.05)
    assert sum(better) / 1500 == pytest.approx(length_bias * natural + 1 - length_bias, abs=0.05)
    assert 0.1 < natural < 0.5  # the better answer is usually the shorter one


@pytest.mark.parametrize("length_bias", [-0.1, 1.1, float("nan")])
def test_a_length_bias_out_of_bounds_gives_a_one_line_error(length_bias):
    with pytest.raises(SimpoError, match="length_bias"):
        make_pairs(1, 0, length_bias=length_bias)
