"""``simpo recipe``: every objective in every setting parses, with published values where they exist."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from simpo.cli import main
from simpo.cli.training import parse
from simpo.objectives import OBJECTIVES
from simpo.runs.results import read_results
from simpo.training.preference import PreferenceConfig
from simpo.workflows.recipes import PAPER_SETTINGS, SEARCHED, SETTINGS, compose_recipe
from simpo.world.pairs import write_model, write_pairs, write_prompts

RECIPES = Path(__file__).parents[2] / "recipes"
ONLINE = ("ppo", "rloo", "grpo", "online-simpo", "online-dpo")

# From the README of github.com/princeton-nlp/SimPO, "For DPO, the best hyperparameters": beta and learning rate.
DPO = {
    "mistral-base": (0.01, 5e-7),
    "mistral-instruct": (0.01, 5e-7),
    "llama3-base": (0.01, 5e-7),
    "llama3-instruct": (0.01, 7e-7),
    "llama3-instruct-v0.2": (0.01, 3e-7),
    "gemma2": (0.01, 5e-7),
}
# SimPO's recipes; tests/config/test_recipe.py has their values.
SHIPPED = {
    "mistral-base": "mistral-7b-base-simpo",
    "mistral-instruct": "mistral-7b-instruct-simpo",
    "llama3-base": "llama-3-8b-base-simpo",
    "llama3-instruct": "llama-3-8b-instruct-simpo",
    "llama3-instruct-v0.2": "llama-3-8b-instruct-simpo-v2",
    "gemma2": "gemma-2-9b-it-simpo",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_objective_parses(setting, tmp_path, caplog):
    for objective, row in OBJECTIVES.items():
        path = tmp_path / f"{objective}.yaml"
        path.write_text(compose_recipe(objective, setting))
        model, data, config = parse([str(path), "--use_cpu", "--output_dir", str(tmp_path)], PreferenceConfig)
        assert (config.objective, model.model_name_or_path) == (objective, SETTINGS[setting].model)
        assert data.dataset_mixer or data.eval_dataset_name  # every setting has held-out pairs
        knobs = set(row.hyperparameters) - {"label_smoothing", "link", "length_normalized"}
        assert knobs <= yaml.safe_load(path.read_text()).keys()
        assert config.hyperparameters.keys() == row.hyperparameters.keys()
        if setting in PAPER_SETTINGS:
            assert config.per_device_train_batch_size * 4 == 128
            assert 3e-7 <= config.learning_rate <= 1e-6
        for name, searched in SEARCHED.get(objective, {}).items():
            assert config.hyperparameters[name] in searched.values
    assert [message for message in caplog.messages if "checkpointing" not in message] == []


@pytest.mark.parametrize("setting", SHIPPED)
def test_simpos_recipes_are_the_shipped_ones(setting):
    shipped = yaml.safe_load((RECIPES / f"{SHIPPED[setting]}.yaml").read_text())
    assert yaml.safe_load(compose_recipe("simpo", setting)) == shipped


@pytest.mark.parametrize("setting", DPO)
def test_dpo_has_the_published_values(setting):
    text = compose_recipe("dpo", setting)
    recipe = yaml.safe_load(text)
    assert (recipe["beta"], recipe["learning_rate"]) == DPO[setting]
    assert text.count("# published") == 2


def test_unpublished_values_are_marked():
    assert "# published" not in compose_recipe("kto", "llama3-base")
    assert "lam: 0.5  # searched over {0.1, 0.5, 1.0, 2.0} in the paper" in compose_recipe("orpo", "llama3-base")
    assert "beta: 5.0  # the objective's default" in compose_recipe("dpo_norm", "llama3-base")
    rate = "learning_rate: 5.0e-7  # from {3.0e-7, 5.0e-7, 8.0e-7, 1.0e-6}, the grid recommended in the README of"
    assert rate in compose_recipe("dpop", "llama3-base")
    assert "in the paper" not in compose_recipe("dpop", "llama3-base")


@pytest.mark.parametrize(
    "path", [p for p in RECIPES.rglob("*.yaml") if "Written by: simpo recipe" in p.read_text()], ids=lambda p: p.stem
)
def test_written_recipes_are_up_to_date(path, capsys):
    command = next(line for line in path.read_text().splitlines() if "Written by" in line).partition("simpo ")[2]
    assert main(command.split()) == 0
    assert capsys.readouterr().out == path.read_text(), f"run: simpo {command}"


def test_every_objective_has_a_tiny_recipe():
    assert {path.stem for path in (RECIPES / "tiny").iterdir()} == OBJECTIVES.keys() | set(ONLINE)


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    """A folder with everything the tiny recipes expect in ``runs/demo-1``, at a small scale."""
    folder = tmp_path_factory.mktemp("demo")
    write_model(folder / "runs/demo-1/sft", seed=0)
    write_prompts(folder / "runs/demo-1/prompts.jsonl", 32, seed=0)
    write_pairs(folder / "runs/demo-1/pairs.jsonl", 32, seed=0, length_bias=1)
    write_pairs(folder / "runs/demo-1/held-out-pairs.jsonl", 16, seed=0, held_out=True, length_bias=1)
    return folder


@pytest.mark.parametrize("name", ONLINE)
def test_tiny_online_recipes_run(name, demo_folder, monkeypatch):
    monkeypatch.chdir(demo_folder)
    options = ["--max_steps=2", "--eval_steps=1"]
    options += ["--normalize_scores=false"] if name == "ppo" else []  # a random model's answers all score 0
    assert main(["online", str(RECIPES / f"tiny/{name}.yaml"), *options]) == 0
    found = {(m.name, m.stage): m for m in read_results(Path(f"runs/tiny-{name}/results.json")).metrics}
    assert found["train/steps", None].value == 2
    assert found["rollout/reward", "after"].n == (32 if name in ("online-simpo", "ppo") else 16)  # prompts per rollout


@pytest.mark.parametrize("objective", ["simpo", "dpo"])
def test_tiny_recipes_run(objective, demo_folder, monkeypatch):
    monkeypatch.chdir(demo_folder)
    assert main(["train", str(RECIPES / f"tiny/{objective}.yaml")]) == 0
    found = {(m.name, m.stage): m for m in read_results(Path(f"runs/tiny-{objective}/results.json")).metrics}
    assert found["train/steps", None].value == 4
    margins = [found["eval_rewards/margins", stage].value for stage in ("before", "after")]
    assert margins[1] > margins[0]


def test_the_command_writes_a_new_file(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    given = ["recipe", "--objective", "dpo", "--setting", "gemma2", "--output", str(path)]
    assert main(given) == 0
    assert path.read_text() == compose_recipe("dpo", "gemma2")
    assert f"simpo train {path}" in capsys.readouterr().out
    assert main(given) == 2
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--objective", "simpoo", "--setting", "gemma2"], "did you mean simpo?"),
        (["--objective", "dpo", "--setting", "lama3-base"], "did you mean llama3-base?"),
        (["--objective", "dpo", "--setting", "x"], "choose from mistral-base, "),
        (["--objective", "dpo"], "--setting"),
    ],
)
def test_mistakes_give_a_one_line_error(given, message, capsys):
    assert main(["recipe", *given]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
