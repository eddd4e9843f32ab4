"""Built-in pairs: reproducible, and held out by question."""

from simpo.world.pairs import make_pairs


def test_the_seed_decides():
    assert make_pairs(40, 10, seed=3) == make_pairs(40, 10, seed=3)
    assert make_pairs(40, 10, seed=3) != make_pairs(40, 10, seed=4)


def test_held_out_questions_are_not_trained_on():
    train, held_out = make_pairs(768, 256, seed=0)
    assert len(train) == 768
    assert len(held_out) == 256
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert all(row["chosen"] != row["rejected"] for row in train + held_out)
