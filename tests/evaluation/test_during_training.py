"""``eval_generations`` in ``simpo train`` and ``simpo sft``: metrics, files, reproducibility, resume, collapse."""

from __future__ import annotations

import io
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from tests.forked import run_ranks
from tests.servers.chat_server import ChatServer, Raw, completion
from tests.training_runs import killed_after_step
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpo import cli
from simpo.evaluation.during_training import max_evaluations
from simpo.generation.engine import TransformersEngine
from simpo.training.preference import PreferenceConfig, PreferenceTrainer
from simpo.world.pairs import make_prompts, write_model, write_pairs
from simpo.world.questions import judge

STEPS, EVERY, PROMPTS, LONGEST = 6, 2, 5, 48
NAMES = ("length", "end_of_turn_rate", "distinct_2", "win_rate")
SHORT = {"eval_steps": STEPS, "eval_judge": None}
TIMES = ("runtime", "per_second", "preparation_time", "total_flos")

# The judges draw random numbers from every generator; the failing one fails after its trial pairs.
JUDGES = """
import random
import numpy as np
import torch

def noisy(prompt, response):
    torch.manual_seed(3)
    return random.random() + np.random.rand() + torch.rand(()).item()

seen = []

def failing(prompt, response):
    seen.append(response)
    if len(seen) > 8:
        raise ValueError("cannot say")
    return 1.0
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny chat model, pairs, demonstrations and a module of judges."""
    folder = tmp_path_factory.mktemp("world")
    write_pairs(folder / "train.jsonl", 4 * STEPS, seed=0)
    write_pairs(folder / "test.jsonl", 12, seed=0, held_out=True)
    demonstrations = [row | {"completion": "Yes."} for row in make_prompts(4 * STEPS, seed=0)]
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in demonstrations))
    write_model(folder / "model", seed=0)
    config = json.loads((folder / "model/config.json").read_text())
    (folder / "model/config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    (folder / "judges_of_a_test.py").write_text(JUDGES)
    return folder


def options(world: Path, output: Path, command: str = "train", **changes) -> list[str]:
    given = {
        "model_name_or_path": world / "model",
        "dataset_name": world / "train.jsonl",
        "eval_dataset_name": world / "test.jsonl",
        "output_dir": output,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "max_length": 2 * LONGEST,
        "logging_steps": EVERY,
        "eval_strategy": "steps",
        "eval_steps": EVERY,
        "save_strategy": "steps",
        "save_steps": EVERY,
        "disable_dropout": "false",
        "eval_generations": PROMPTS,
        "eval_judge": "exact",
    } | changes
    return [command, *(f"--{key}={value}" for key, value in given.items() if value is not None)]


def logged(folder: Path) -> list[dict]:
    """Return what was logged, without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in lines]


def without_generations(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if "generations" not in k} for line in lines]


def generations(lines: list[dict]) -> list[dict]:
    found = [{k: v for k, v in line.items() if "generations" in k} for line in lines]
    return [line for line in found if line]


def answers(folder: Path) -> dict[str, list[dict]]:
    return {path.stem: list(map(json.loads, path.open())) for path in (folder / "generations").glob("*.jsonl")}


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert cli.main(options(world, output)) == 0
    return output


@pytest.mark.parametrize(("name", "weights"), [("start", "model"), (f"step-{STEPS}", None)])
def test_answers_are_the_models_own_greedy_answers(uninterrupted, world, name, weights):
    """Compared with transformers' own generate, one prompt at a time, for the initial model and the trained one."""
    folder = uninterrupted if weights is None else world / weights
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    stops = TransformersEngine(model, tokenizer).stop_ids
    rows = answers(uninterrupted)[name]
    held_out = [json.loads(line)["prompt"] for line in (world / "test.jsonl").open()]
    asked = [row["prompt"] for row in rows]
    assert len(set(asked)) == PROMPTS
    assert [prompt for prompt in held_out if prompt in asked] == asked
    for row in rows:
        turn = [{"role": "user", "content": row["prompt"]}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        whole = model.generate(**ids, do_sample=False, max_new_tokens=LONGEST, eos_token_id=stops, pad_token_id=0)
        assert row["response_ids"] == [whole[0, ids["input_ids"].shape[1] :].tolist()]


def test_the_best_model_can_be_the_one_with_the_best_answers(world, tmp_path, capsys):
    best = {"metric_for_best_model": "eval_generations/win_rate", "load_best_model_at_end": "true"}
    output = tmp_path / "run"
    assert cli.main(options(world, output, **best)) == 0
    lines = {line["step"]: line for line in logged(output) if "eval_loss" in line}
    assert {name for name in lines[EVERY] if "generations" in name} == {f"eval_generations/{name}" for name in NAMES}
    rates = {step: line["eval_generations/win_rate"] for step, line in lines.items()}
    assert same_weights(output, output / f"checkpoint-{max(rates, key=rates.get)}")
    capsys.readouterr()
    assert cli.main(options(world, tmp_path / "unjudged", **best, eval_judge=None)) == 2  # found out before training
    assert "metric_for_best_model" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "unjudged/run.json").exists()


def test_metrics_match_their_definitions(uninterrupted):
    found, start = answers(uninterrupted), answers(uninterrupted)["start"]
    assert set(found) == {"start", *(f"step-{step}" for step in range(EVERY, STEPS + 1, EVERY))}
    lines = [line for line in logged(uninterrupted) if "eval_loss" in line]
    for line in lines:
        rows = found[f"step-{line['step']}"]
        ids = [row["response_ids"][0] for row in rows]
        bigrams = [list(pairwise(one)) for one in ids if len(one) > 1]
        wins = []
        for now, before in zip(rows, start, strict=True):
            ours, theirs = (judge(now["prompt"], row["responses"][0]) for row in (now, before))
            wins.append(0.5 if ours == theirs else float(ours > theirs))
        expected = {
            "length": sum(map(len, ids)) / PROMPTS,
            "end_of_turn_rate": sum(row["finished"][0] for row in rows) / PROMPTS,
            "distinct_2": sum(len(set(pairs)) / len(pairs) for pairs in bigrams) / len(bigrams),
            "win_rate": sum(wins) / PROMPTS,
        }
        assert {name: line[f"eval_generations/{name}"] for name in NAMES} == pytest.approx(expected)


def test_generations_do_not_change_training(uninterrupted, world, tmp_path, monkeypatch):
    """Even with a judge that draws from every random generator in the main process."""
    monkeypatch.chdir(world)
    noisy = {"eval_judge": "function:judges_of_a_test:noisy", "trust_remote_code": "true"}
    assert cli.main(options(world, tmp_path / "without", eval_generations=0, eval_judge=None)) == 0
    assert cli.main(options(world, tmp_path / "noisy", **noisy)) == 0
    for folder in (uninterrupted, tmp_path / "noisy"):
        assert same_weights(folder, tmp_path / "without")
        assert without_generations(logged(folder)) == logged(tmp_path / "without")
    assert not (tmp_path / "without/generations").exists()
    assert not generations(logged(tmp_path / "without"))


def test_a_killed_run_reuses_the_initial_models_answers(uninterrupted, world, tmp_path, capsys):
    output = tmp_path / "run"
    with killed_after_step(EVERY + 1):
        cli.main(options(world, output))
    start = output / "generations/start.jsonl"
    written = start.stat().st_mtime_ns
    assert cli.main(options(world, output)) == 0
    assert "continues from" in capsys.readouterr().out
    assert start.stat().st_mtime_ns == written
    assert answers(output) == answers(uninterrupted)
    assert generations(logged(output)) == generations(logged(uninterrupted))
    assert same_weights(output, uninterrupted)


def test_a_run_cannot_continue_with_another_judge(world, tmp_path, monkeypatch, capsys):
    """The judge's code and the columns it reads decide which checkpoint is the best."""
    code, rows = tmp_path / "judges_to_change.py", tmp_path / "test.jsonl"
    code.write_text(JUDGES)
    rows.write_bytes((world / "test.jsonl").read_bytes())
    monkeypatch.syspath_prepend(str(tmp_path))
    judged = {"eval_judge": "function:judges_to_change:noisy", "trust_remote_code": "true", "eval_dataset_name": rows}
    command = options(world, tmp_path / "run", **judged)
    with killed_after_step(EVERY + 1):
        cli.main(command)
    code.write_text(JUDGES + "\n# changed\n")
    assert cli.main(command) == 2
    assert "eval_judge/code" in capsys.readouterr().err
    code.write_text(JUDGES)
    rows.write_text("".join(json.dumps(json.loads(line) | {"more": 1}) + "\n" for line in rows.open()))
    assert cli.main(command) == 2
    assert "eval_judge/columns" in capsys.readouterr().err
    rows.write_bytes((world / "test.jsonl").read_bytes())
    assert cli.main(command) == 0


def test_a_judge_that_fails_later_does_not_end_training(uninterrupted, world, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(world)
    output = tmp_path / "run"
    failing = {"eval_judge": "function:judges_of_a_test:failing", "trust_remote_code": "true"}
    assert cli.main(options(world, output, **failing)) == 0
    assert [line["eval_generations/win_rate"] for line in generations(logged(output))] == [None] * (STEPS // EVERY)
    assert sum("no win rate" in record.message and "cannot say" in record.message for record in caplog.records) == 3
    assert same_weights(output, uninterrupted)


def prefer_later(body):
    """Prefer the answer that comes later in the alphabet."""
    text = body["messages"][0]["content"]
    a, b = (re.search(f"<answer_{name}>\n(.*)\n</answer_{name}>", text, re.DOTALL)[1] for name in "AB")
    return completion(f"[[{'A' if a > b else 'B'}]]")


@pytest.mark.parametrize(("answer", "verdicts"), [(prefer_later, True), (lambda body: completion("?"), False)])
def test_a_judge_behind_a_server_gives_win_rates(uninterrupted, world, tmp_path, monkeypatch, caplog, answer, verdicts):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ChatServer(answer) as server:
        judged = {"eval_judge": "api", "eval_judge_url": server.url, "eval_judge_model": "tiny", "max_steps": EVERY}
        assert cli.main(options(world, tmp_path / "run", **judged, yes="true")) == 0
    found = answers(tmp_path / "run")
    pairs = [
        (now["responses"][0], before["responses"][0])
        for now, before in zip(found[f"step-{EVERY}"], found["start"], strict=True)
    ]
    different = sum(ours != theirs for ours, theirs in pairs)
    assert len(server.bodies) - 8 == 2 * different > 0  # plus the trial pairs
    wins = [0.5 if ours == theirs else float(ours > theirs) for ours, theirs in pairs if verdicts or ours == theirs]
    (line,) = generations(logged(tmp_path / "run"))
    assert line["eval_generations/win_rate"] == (pytest.approx(sum(wins) / len(wins)) if wins else None)
    assert any(f"no verdict on {different} of {PROMPTS}" in record.message for record in caplog.records) != verdicts


@pytest.mark.parametrize("status", [400, 401])
def test_a_server_that_refuses_stops_the_run_before_training(world, tmp_path, monkeypatch, capsys, status):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ChatServer(lambda body: Raw(status=status)) as server:
        judged = {"eval_judge": "api", "eval_judge_url": server.url, "eval_judge_model": "tiny", "yes": "true"}
        assert cli.main(options(world, tmp_path / "run", **judged)) == 2
    assert f"status {status}" in capsys.readouterr().err
    assert not (tmp_path / "run/metrics.jsonl").read_text()


def test_a_judges_cost_is_confirmed_before_any_answers_are_generated(world, tmp_path, monkeypatch, capsys):
    """Asked once for all evaluations; running again with --yes is the same run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with ChatServer(prefer_later) as server:
        judged = {"eval_judge": "api", "eval_judge_url": server.url, "eval_judge_model": "tiny"}
        given = options(world, tmp_path / "run", **judged)
        assert cli.main(given) == 2
        printed = capsys.readouterr()
        asked = STEPS // EVERY * 2 * PROMPTS
        assert f"eval_judge, for {STEPS // EVERY} evaluations: {asked} requests to send, 0 in the cache" in printed.out
        assert "pass --yes" in printed.err and not server.bodies
        assert not (tmp_path / "run/generations").exists()
        assert cli.main([*given, "--yes"]) == 0
    assert 0 < len(server.bodies) - 8 <= asked
    assert len(generations(logged(tmp_path / "run"))) == STEPS // EVERY


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"eval_steps": 10}, 3),
        ({"eval_steps": 0.5}, 2),
        ({"eval_steps": 10, "max_steps": 31, "eval_on_start": True}, 5),
        ({"eval_strategy": "epoch", "num_train_epochs": 2}, 2),
        ({"eval_strategy": "epoch", "max_steps": 27}, 2),
    ],
)
def test_number_of_evaluations_in_a_run(changes, expected, tmp_path):
    given = {"eval_strategy": "steps", "per_device_train_batch_size": 4} | changes
    config = PreferenceConfig(output_dir=str(tmp_path), use_cpu=True, **given)
    assert max_evaluations(config, 101) == expected


@pytest.fixture(scope="module")
def terse_model(world, tmp_path_factory):
    """The model after ``simpo sft``: it answers "Yes." to everything and stops."""
    output = tmp_path_factory.mktemp("terse_model") / "run"
    held_out = output.parent / "held_out.jsonl"  # training rows with the last one changed: not all may be training rows
    held_out.write_text((world / "sft.jsonl").read_text().rstrip()[::-1].replace(".seY", "!seY", 1)[::-1])
    changes = {"dataset_name": world / "sft.jsonl", "num_train_epochs": 4, "save_strategy": "no"}
    assert cli.main(options(world, output, "sft", eval_dataset_name=held_out, **(changes | SHORT))) == 0
    return output


def test_fine_tuning_is_evaluated_too(terse_model):
    *_, last = generations(logged(terse_model))
    length = len(AutoTokenizer.from_pretrained(terse_model)("Yes.").input_ids) + 1
    assert (last["eval_generations/end_of_turn_rate"], last["eval_generations/length"]) == (1, length)
    assert {row["responses"][0] for row in answers(terse_model)[f"step-{4 * STEPS}"]} == {"Yes."}
    assert "have collapsed" not in (terse_model / "log.txt").read_text()


def test_a_collapse_is_reported(terse_model, world, tmp_path, caplog):
    ruinous = {"model_name_or_path": terse_model, "learning_rate": 0.5, "warmup_steps": 0, "save_strategy": "no"}
    assert cli.main(options(world, tmp_path / "run", **(ruinous | SHORT))) == 0
    warnings = [record.message for record in caplog.records if "have collapsed" in record.message]
    assert warnings
    assert all("end_of_turn_rate 1 -> 0" in line and "learning rate" in line and "0.5" in line for line in warnings)
    assert all("\n" not in line for line in warnings)
    assert warnings[-1] in (tmp_path / "run/log.txt").read_text()


MISTAKES = [
    pytest.param({"eval_generations": -1}, ["eval_generations", "-1"], id="negative"),
    pytest.param({"eval_generations": 0}, ["eval_judge", "eval_generations"], id="nothing to judge"),
    pytest.param({"eval_dataset_name": None}, ["eval_generations", "eval_dataset_name"], id="nothing held out"),
    pytest.param({"eval_strategy": "no"}, ["eval_generations", "eval_strategy"], id="no evaluations"),
    pytest.param({"eval_judge": "exakt"}, ["eval_judge", "exakt", "exact"], id="unknown judge"),
    pytest.param({"eval_judge": "human:v.jsonl"}, ["eval_judge", "human:v.jsonl"], id="verdicts on other answers"),
    pytest.param({"eval_judge": "api"}, ["eval_judge_url", "eval_judge_model"], id="no server"),
    pytest.param({"eval_judge_model": "gpt"}, ["eval_judge_model"], id="a server for another judge"),
    pytest.param({"yes": "true"}, ["yes", "eval_judge api"], id="nothing to agree to"),
    pytest.param({"eval_judge": "function:json:loads"}, ["eval_judge", "trust_remote_code"], id="code not allowed"),
]


def test_deepspeed_models_are_rejected(world, tmp_path, capsys, monkeypatch):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert cli.main(options(world, tmp_path / "run")) == 2
    assert "error: eval_generations: is not supported with DeepSpeed" in capsys.readouterr().err


def sharded(arguments):
    """Run ``main`` with FSDP2. On a CPU, accelerate turns it into DDP, unless the device looks like an accelerator."""
    begin = PreferenceTrainer.__init__

    def begin_sharded(self, *args, **kwargs):
        PartialState().distributed_type = DistributedType.MULTI_XPU
        begin(self, *args, **kwargs)
        assert isinstance(self.model, FSDPModule)

    PreferenceTrainer.__init__ = begin_sharded  # only affects this forked process
    return cli.main(arguments)


def test_sharded_models_give_the_same_answers(world, tmp_path):
    """Before and during training, without affecting it; 3 prompts on 2 ranks."""
    shared = SHORT | {"dtype": "float64", "optim": "sgd", "learning_rate": 0.1, "eval_generations": 3}
    shared |= {"disable_dropout": "true", "save_strategy": "no", "use_cpu": "true"}
    assert cli.main(options(world, tmp_path / "one", **shared)) == 0
    wrapped = json.dumps({"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"})
    layers = {"fsdp": "true", "fsdp_config": wrapped, "ddp_backend": "gloo", "per_device_train_batch_size": 2}
    found = run_ranks(2, sharded, options(world, tmp_path / "two", **shared | layers), folder=tmp_path)
    assert found.codes == [0, 0], found.stderr
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two"))
    assert all((one[name] - two[name]).abs().max() < 1e-9 for name in one)
    first, second = (answers(tmp_path / folder) for folder in ("one", "two"))
    assert first.keys() == second.keys() and len(first) > 1
    for name in first:
        assert [row["response_ids"] for row in first[name]] == [row["response_ids"] for row in second[name]]


@pytest.mark.parametrize(("changes", "expected"), MISTAKES)
def test_mistakes_give_a_one_line_error_and_write_nothing(world, tmp_path, capsys, changes, expected):
    assert cli.main(options(world, tmp_path / "run", **changes)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("simpo: error: ")
    assert all(word in message for word in expected), message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("Who are you?", "exact: prompt"), ("?" * LONGEST, f"no held-out prompt has at most {LONGEST} tokens")],
)
def test_unusable_prompts_stop_the_run_before_training(world, tmp_path, capsys, prompt, message):
    row = {"prompt": prompt, "chosen": "No.", "rejected": "?"}
    (tmp_path / "other.jsonl").write_text(json.dumps(row) + "\n")
    given = options(world, tmp_path / "run", eval_dataset_name=tmp_path / "other.jsonl")
    assert cli.main(given) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_reward_model_has_no_answers(world, tmp_path, capsys):
    assert cli.main(options(world, tmp_path / "run", "reward", eval_judge=None)) == 2
    assert "eval_generations" in capsys.readouterr().err
