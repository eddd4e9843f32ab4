"""``simpo train``: the complete run of a tiny model, and one-line errors."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpo.cli import main
from simpo.runs.results import read_results
from simpo.world.pairs import write_model, write_pairs


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a tiny chat model and pairs."""
    folder = tmp_path_factory.mktemp("world")
    write_pairs(folder / "train.jsonl", 96, seed=0, length_bias=1)
    write_pairs(folder / "test.jsonl", 48, seed=0, held_out=True, length_bias=1)
    write_model(folder / "model", seed=0)
    return folder


def options(world, output, **changes):
    given = {
        "model_name_or_path": world / "model",
        "dataset_name": world / "train.jsonl",
        "eval_dataset_name": world / "test.jsonl",
        "output_dir": output,
        "per_device_train_batch_size": 16,
        "learning_rate": 2e-3,
        "max_length": 128,
        "save_strategy": "no",
    } | changes
    return ["train", *(f"--{key}={value}" for key, value in given.items() if value is not None)]


def test_results_are_printed_as_json_even_for_a_finished_run(world, tmp_path, capfd):
    given = options(world, tmp_path / "out", max_steps=1)
    for argv in ([*given, "--json"], ["--json", "--verify", *given]):
        assert main(argv) == 0
        printed = capfd.readouterr()
        found = json.loads(printed.out)
        assert found.pop("folder") == str(tmp_path / "out")
        assert found == json.loads((tmp_path / "out/results.json").read_text())
        assert "saved: " in printed.err
    for argv in (["chat", str(world / "model"), "--json"], ["label", "answers.jsonl", "--json"]):
        assert main(argv) == 2
        assert f"--json: simpo {argv[0]}" in capfd.readouterr().err
    assert main(["--json"]) == 2
    assert "--json" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("key", "given"),
    [
        (
            "load_best_model_at_end",
            {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
        ),
        ("save_strategy", {"save_strategy": "best"}),
    ],
)
def test_the_best_checkpoint_needs_evaluations(world, tmp_path, capsys, key, given):
    changes = {"eval_dataset_name": None, "max_steps": 1, "load_best_model_at_end": key == "load_best_model_at_end"}
    assert main(options(world, tmp_path / "out", **changes | given)) == 2
    assert f"{key}: needs evaluations" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_leaves_a_better_model_that_plain_transformers_loads(world, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(options(world, output, num_train_epochs=4)) == 0
    metrics = {(m.name, m.stage): m for m in read_results(output / "results.json").metrics}
    before, after = (metrics["eval_rewards/margins", stage] for stage in ("before", "after"))
    assert after.low > before.high  # the margin rose beyond both intervals
    assert after.n == 48
    assert metrics["eval_rewards/accuracies", "after"].method == "Wilson 95%"
    assert metrics["train/steps", None].value == 4 * 96 / 16
    printed = capsys.readouterr().out
    assert f"{after.value:.4g}" in printed
    assert "next:" in printed
    card = (output / "README.md").read_text()
    assert "gamma_beta_ratio" in card
    assert str(tmp_path) not in card  # model cards are published, so they contain no local paths

    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    start = AutoModelForCausalLM.from_pretrained(world / "model")
    assert (output / "model.safetensors").exists()
    assert model.config.use_cache == start.config.use_cache  # generation is as fast as before
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(world / "model").chat_template
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)


def test_recipe_and_command_line_make_one_configuration(world, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: {world / 'model'}\n"
        "torch_dtype: float32\n"  # an older spelling
        "dataset_mixer: {nowhere/nothing: 1.0}\n"
        "dataset_splits: [train, test]\n"
        "loss_type: hinge\nbeta: 2.5\ngamma_beta_ratio: 0.1\nlearning_rate: 1e-4\n"
        "max_steps: 1\nsave_strategy: no\nmax_length: 128\nwarmup_ratio: 0.1\n"
    )
    output = tmp_path / "out"
    assert main(["train", str(recipe), "--dataset_name", str(world / "train.jsonl"), "--output_dir", str(output)]) == 0
    card = (output / "README.md").read_text()
    assert "| `link` | hinge |" in card
    assert "| `beta` | 2.5 |" in card


def test_the_same_seed_gives_the_same_bits(world, tmp_path):
    weights = []
    for run in ("a", "b"):
        assert main(options(world, tmp_path / run, max_steps=3)) == 0
        weights.append((tmp_path / run / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


TURNS = [{"role": "user", "content": "Hi"}]
ANSWER = [*TURNS, {"role": "assistant", "content": "Yes."}]
OTHER = [*TURNS, {"role": "assistant", "content": "No."}]
GOOD = {"prompt": "Hi", "chosen": "Yes.", "rejected": "No."}


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        pytest.param(None, {"dataset_name": "missing.jsonl"}, ["missing.jsonl", "not found"], id="missing file"),
        pytest.param(lines(GOOD, '{"prompt": '), {}, ["data.jsonl:2", "JSON"], id="not JSON"),
        pytest.param(lines({"text": "x"}), {}, ["text"], id="no recognized shape"),
        pytest.param(
            lines({"chosen": ANSWER, "rejected": [*OTHER, TURNS[0]]}), {}, ["data.jsonl:1", "assistant"], id="last turn"
        ),
        pytest.param(
            lines(*[GOOD] * 50, {**GOOD, "rejected": "Yes."}), {}, ["data.jsonl:51", "identical"], id="1% bad rows"
        ),
        pytest.param(lines(GOOD), {"max_length": 4}, ["max_length"], id="nothing fits"),
        pytest.param(lines(GOOD), {"learning_rat": 1}, ["learning_rat", "learning_rate"], id="unknown key"),
        pytest.param(lines(GOOD), {"beta": "abc"}, ["beta", "abc"], id="beta abc"),
        pytest.param(lines(GOOD), {"beta": 0}, ["beta", "> 0"], id="beta 0"),
        pytest.param(lines(GOOD), {"beta": "nan"}, ["beta"], id="beta nan"),
        pytest.param(lines(GOOD), {"gamma_beta_ratio": -0.1}, ["gamma_beta_ratio", ">= 0"], id="negative ratio"),
        pytest.param(lines(GOOD), {"gamma": 1, "gamma_beta_ratio": 1}, ["gamma", "gamma_beta_ratio"], id="both gammas"),
        pytest.param(lines(GOOD), {"objective": "simop"}, ["simop", "simpo"], id="unknown objective"),
        pytest.param(
            lines({"chosen": ANSWER, "rejected": OTHER}), {"chat_template": "none"}, ["chat_template"], id="no template"
        ),
        pytest.param(
            lines({"chosen": ANSWER, "rejected": OTHER}),
            {"chat_template": "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"},
            ["data.jsonl:1", "not a prefix"],
            id="prompt not a prefix",
        ),
        pytest.param(lines(GOOD), {"max_batch_tokens": 3}, ["max_batch_tokens", "row 0"], id="budget too small"),
        pytest.param(lines(GOOD), {"model_name_or_path": "./nowhere"}, ["model_name_or_path"], id="no model"),
        pytest.param(lines(GOOD), {"max_steps": -5}, ["max_steps", "at least 1"], id="steps below 0"),
        pytest.param(
            lines(GOOD), {"max_steps": -1, "num_train_epochs": 0}, ["num_train_epochs", "above 0"], id="no epochs"
        ),
        pytest.param(lines(GOOD), {"weight_decay": -1}, ["weight_decay", "at least 0"], id="growing weights"),
        pytest.param(lines(GOOD), {"adam_beta1": 2}, ["impossible", "Invalid beta"], id="rejected by the optimizer"),
        pytest.param(lines(GOOD), {"optim": "galore_adamw"}, ["impossible", "galore_torch"], id="no such package"),
        pytest.param(
            lines(GOOD), {"lr_scheduler_kwargs": '{"x": 1}'}, ["impossible", "'x'"], id="rejected by the schedule"
        ),
        pytest.param(
            lines(GOOD),
            {"torch_compile": True, "torch_compile_backend": "nonsense"},
            ["impossible", "NONSENSE"],
            id="rejected by accelerate",
        ),
        pytest.param(
            lines(GOOD),
            {"gradient_checkpointing_kwargs": '{"x": 1}'},
            ["gradient_checkpointing_kwargs", "'x'", "use_reentrant"],
            id="rejected by torch's checkpoint",
        ),
        pytest.param(
            lines(GOOD),
            {"use_liger_kernel": True},
            ["use_liger_kernel", "not installed"],
            id="no liger-kernel",
            marks=pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="liger-kernel is installed"),
        ),
        pytest.param(
            lines(GOOD),
            {"use_liger_kernel": True},
            ["use_liger_kernel", "cpu", "triton"],
            id="no GPU for liger-kernel",
            marks=pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed"),
        ),
        pytest.param(
            lines(GOOD),
            {"liger_kernel_config": '{"rope": true}'},
            ["liger_kernel_config", "use_liger_kernel"],
            id="liger_kernel_config alone",
        ),
        pytest.param(lines(GOOD), {"neftune_noise_alpha": 5}, ["neftune_noise_alpha", "noise"], id="NEFTune"),
    ],
)
def test_mistakes_give_a_one_line_error(world, tmp_path, monkeypatch, capsys, content, changes, message):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data.jsonl"
    if content is not None:
        data.write_text(content)
    output = tmp_path / "out"
    given = {"dataset_name": data, "eval_dataset_name": None} | changes
    assert main(options(world, output, **given)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    for part in message:
        assert part in error
    assert not output.exists()


def test_another_runs_folder_is_left_alone(world, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "model.safetensors").write_text("precious")
    assert main(options(world, output)) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["model.safetensors"]


def test_several_gpus_without_a_launcher_are_rejected(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", property(lambda self: 2))
    assert main(options(world, tmp_path / "out")) == 2
    assert "torchrun" in capsys.readouterr().err


def test_the_installed_command_has_the_same_exit_code():
    script = Path(sys.executable).with_name("simpo")
    done = subprocess.run([script, "train", "--bta", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert "did you mean" in done.stderr


def test_held_out_rows_that_are_training_rows_are_counted(world, tmp_path, capsys):
    lines = (world / "train.jsonl").read_text().splitlines()[:8]
    changed = json.loads(lines[0]) | {"chosen": "Something else."}
    (tmp_path / "test.jsonl").write_text("\n".join([*lines[:3], json.dumps(changed), *_held_out(world, 2)]))
    given = {"dataset_train_split": "train[:8]", "eval_dataset_name": tmp_path / "test.jsonl", "max_steps": 1}
    assert main(options(world, tmp_path / "out", **given)) == 0
    assert "eval: 3 of 6 held-out pairs are also training pairs, and 4 share a prompt" in capsys.readouterr().out
    metrics = {metric.name: metric for metric in read_results(tmp_path / "out" / "results.json").metrics}
    assert (metrics["data/eval/rows_in_train"].value, metrics["data/eval/prompts_in_train"].value) == (3, 4)
    assert metrics["data/eval/rows_in_train"].n == 6 and metrics["data/train/rows"].value == 8


def _held_out(world, count):
    return (world / "test.jsonl").read_text().splitlines()[:count]


@pytest.mark.parametrize("command", ["train", "reward", "sft"])
def test_training_rows_are_rejected_as_held_out_rows(command, world, tmp_path, capsys):
    """Whether through the same file, the same split or the same slice; different slices are accepted."""
    data = world / "train.jsonl"
    if command == "sft":
        rows = [json.loads(line) for line in data.read_text().splitlines()]
        data = tmp_path / "train.jsonl"
        data.write_text("\n".join(json.dumps({"prompt": row["prompt"], "completion": row["chosen"]}) for row in rows))
    same = {"dataset_name": data, "eval_dataset_name": None, "max_steps": 1}
    for given in (
        same | {"eval_dataset_name": data},
        same | {"dataset_test_split": "train"},
        same | {"dataset_test_split": "train[:10]"},
    ):
        assert main([command, *options(world, tmp_path / "out", **given)[1:]]) == 2
        assert "are also training" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([command, *options(world, tmp_path / "out", **same, dataset_test_split="test")[1:]]) == 2
    assert "no split 'test'" in capsys.readouterr().err


def test_columns_are_renamed_for_training(world, tmp_path):
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    renamed = [{"ask": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, renamed)))
    given = {"dataset_name": tmp_path / "a.jsonl", "max_steps": 1, "eval_dataset_name": None, "save_strategy": "no"}
    mapping = json.dumps({"ask": "prompt", "good": "chosen", "bad": "rejected"})
    losses = []
    for number, changes in enumerate(
        (given | {"column_mapping": mapping}, given | {"dataset_name": world / "train.jsonl"})
    ):
        assert main(options(world, tmp_path / str(number), **changes)) == 0
        losses.append({m.name: m.value for m in read_results(tmp_path / str(number) / "results.json").metrics})
    assert losses[0] == losses[1]
