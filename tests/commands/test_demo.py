"""``simpo demo`` is ``simpo train`` on the built-in world, and learns."""

import pytest

from simpo.cli import main
from simpo.results import read_results


def test_the_demo_improves_on_unseen_questions(tmp_path, capsys):
    folder = tmp_path / "demo"
    assert main(["demo", "--output_dir", str(folder)]) == 0
    figures = {(m.name, m.stage): m for m in read_results(folder / "simpo" / "results.json").metrics}
    before, after = (figures["eval_rewards/accuracies", stage] for stage in ("before", "after"))
    assert after.low > before.high
    assert figures["eval_rewards/accuracies/p_value", None].value < 1e-3
    assert "simpo train --model_name_or_path=" in capsys.readouterr().out


def test_a_used_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "precious").write_text("x")
    assert main(["demo", "--output_dir", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_wrong_option_is_one_line(capsys):
    assert main(["demo", "--sed", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("option", ["--help"])
def test_help_ends_well(option):
    with pytest.raises(SystemExit) as caught:
        main(["demo", option])
    assert caught.value.code == 0
