"""``simpo online``: complete runs, killed runs that continue, and one-line errors."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from scipy.stats import rankdata
from tests.forked import run_ranks
from tests.servers.chat_server import ChatServer, completion
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from simpo.cli import main
from simpo.runs.files import read_lines
from simpo.runs.results import read_results
from simpo.training.online import OnlineTrainer

RECIPE = {
    "objective": "rloo", "num_generations": 4, "max_length": 40, "max_new_tokens": 8, "sync_every": 2,
    "learning_rate": 1e-2, "per_device_train_batch_size": 4, "max_steps": 6, "report_to": "none", "use_cpu": True,
    "save_strategy": "steps", "save_steps": 3, "logging_steps": 2, "trust_remote_code": True,
}  # fmt: skip
SCORERS = """
import os, signal
from pathlib import Path

def short(prompt, response):
    return -len(response)

def unless_odd(prompt, response):
    return float("nan") if len(response) % 2 else len(response)

def nothing(prompt, response):
    return float("nan") if response != "Answer." else 0.0

def killed(prompt, response):  # at a moment that a file names, once
    if response != "Answer.":
        calls = Path("calls.txt")
        calls.write_text(calls.read_text() + "." if calls.exists() else ".")
        if calls.stat().st_size == int(os.environ.get("KILL_AT", "0")):
            os.kill(os.getpid(), signal.SIGKILL)
    return -len(response)
"""


@pytest.fixture
def recipe(chat_world, tmp_path, monkeypatch):
    """``recipe(**changes)``: arguments for a small run in a folder with scorers."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scorers.py").write_text(SCORERS)

    def write(**changes):
        here = {"model_name_or_path": chat_world / "model", "dataset_name": chat_world / "train.jsonl"}
        here |= {"annotator": "function:scorers:short", "output_dir": "out"}
        merged = {key: value for key, value in (RECIPE | here | changes).items() if value is not None}
        merged = {key: str(value) if isinstance(value, Path) else value for key, value in merged.items()}
        Path("recipe.yaml").write_text(yaml.safe_dump(merged))
        return ["online", "recipe.yaml"]

    return write


def test_a_run_leaves_a_model_answers_and_results(recipe, chat_world, capsys):
    evaluated = {"eval_dataset_name": chat_world / "test.jsonl", "eval_strategy": "steps", "eval_steps": 3}
    generations = {"eval_generations": 4, "eval_judge": "function:scorers:short"}
    assert main(recipe(**evaluated, **generations)) == 0
    found = {(metric.name, metric.stage): metric for metric in read_results(Path("out/results.json")).metrics}
    assert found["train/steps", None].value == 6
    assert found["rollout/reward", "before"].n == found["rollout/reward", "after"].n == 8
    assert {path.name for path in Path("out/rollouts").glob("0*")} == {f"{n:06}.jsonl" for n in range(3)}
    (record, *_) = read_lines(Path("out/rollouts/000000.jsonl"))
    assert record["scores"] == [-len(text) for text in record["responses"]] and "train.jsonl:" in record["where"]
    lines = read_lines(Path("out/metrics.jsonl"))
    assert any("eval_generations/win_rate" in line for line in lines)
    assert any("rollout/reward" in line for line in lines)
    assert Path("out/model.safetensors").exists() and "rloo" in Path("out/README.md").read_text()
    capsys.readouterr()
    assert main(recipe(**evaluated, **generations)) == 0  # already finished
    assert "finished" in capsys.readouterr().out


def test_a_killed_run_continues_to_identical_bytes(recipe, chat_world, tmp_path):
    ppo = {"annotator": "function:scorers:killed", "objective": "ppo", "kl_target": 0.01, "normalize_scores": True}
    ppo |= {"ptx_weight": 0.5, "ptx_dataset_name": chat_world / "sft.jsonl"}
    assert main(recipe(**ppo, output_dir="whole")) == 0
    Path("calls.txt").unlink()
    arguments = recipe(**ppo)
    for moment in (2, 50, 100):  # during the annotation of each rollout
        found = run_ranks(1, main, arguments, folder=tmp_path, environment={"KILL_AT": str(moment)})
        assert found.codes == [-signal.SIGKILL], found.stderr
    assert main(arguments) == 0
    for path in [*Path("whole/rollouts").glob("0*"), Path("whole/model.safetensors")]:
        assert (Path("out") / path.relative_to("whole")).read_bytes() == path.read_bytes()


def test_several_annotators_in_a_killed_run(recipe, tmp_path, capsys):
    """The weighted sum of ranks; an answer that one of them does not score has no score, which is logged."""
    several = {"function:scorers:killed": 0.25, "function:scorers:unless_odd": 3.0}
    settings = {"annotator": several, "annotator_normalization": "rank", "max_missing_scores": 1.0}
    settings |= {"gold_annotator": "function:scorers:short"}
    assert main(recipe(**settings, output_dir="whole")) == 0
    records = read_lines(Path("whole/rollouts/000000.jsonl"))
    lost = sum(len(text) % 2 for row in records for text in row["responses"])
    assert 0 < lost < 32
    assert f"function:scorers:unless_odd: no score for {lost} of 32 answers" in capsys.readouterr().out
    for row in records:
        even = [k for k, text in enumerate(row["responses"]) if len(text) % 2 == 0]
        sizes = [len(row["responses"][k]) for k in even]
        rank = (rankdata(sizes) - 1) / (len(even) - 1) if len(even) > 1 else np.full(1, 0.5)
        expected = dict(zip(even, 0.25 * (1 - rank) + 3 * rank, strict=True))
        assert row["scores"] == [pytest.approx(expected[k]) if k in expected else None for k in range(4)]
    Path("calls.txt").unlink()
    arguments = recipe(**settings)
    found = run_ranks(1, main, arguments, folder=tmp_path, environment={"KILL_AT": "50"})
    assert found.codes == [-signal.SIGKILL], found.stderr
    assert main(arguments) == 0
    for path in [*Path("whole/rollouts").glob("0*"), Path("whole/model.safetensors")]:
        assert (Path("out") / path.relative_to("whole")).read_bytes() == path.read_bytes()


def test_a_judge_behind_a_server_scores_the_answers(recipe, tmp_path, monkeypatch):
    """Every answer is compared with the others; in this test the shorter one wins."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def answer(body):
        a, b = re.findall(r"<answer_[AB]>\n(.*?)\n</answer_", body["messages"][0]["content"], re.DOTALL)
        return completion(f"[[{'A' if len(a) < len(b) else 'B'}]]")

    with ChatServer(answer) as server:
        judge = {"annotator": "api", "judge_url": server.url, "judge_model": "m", "annotator_yes": True}
        assert main(recipe(**judge, max_steps=2)) == 0
    assert server.bodies
    for row in read_lines(Path("out/rollouts/000000.jsonl")):
        sizes = [len(text) for text in row["responses"]]
        best, worst = np.argmax(row["scores"]), np.argmin(row["scores"])
        assert sizes[best] <= sizes[worst] and (len(set(sizes)) == 1 or row["scores"][best] > row["scores"][worst])


def test_a_gold_annotator_does_not_affect_training(recipe):
    """It scores the same answers without affecting the weights; answers it does not score are not counted."""
    assert main(recipe(output_dir="alone")) == 0
    assert main(recipe(gold_annotator="function:scorers:unless_odd", logging_steps=1)) == 0
    one, two = (load_file(Path(folder, "model.safetensors")) for folder in ("alone", "out"))
    assert all(bool((one[name] == two[name]).all()) for name in one)
    means = []
    for path in sorted(Path("out/rollouts").glob("0*")):
        records = read_lines(path)
        alone = read_lines(Path("alone/rollouts", path.name))
        assert all("gold_scores" not in row for row in alone)
        assert [{key: row[key] for key in alone[0]} for row in records] == alone
        for row in records:
            assert row["gold_scores"] == [None if len(text) % 2 else len(text) for text in row["responses"]]
        known = [[score for score in row["gold_scores"] if score is not None] for row in records]
        means.append([sum(scores) / len(scores) if scores else None for scores in known])
    logged = [line["rollout/gold"] for line in read_lines(Path("out/metrics.jsonl")) if "rollout/gold" in line]
    for step, value in enumerate(logged):  # a rollout has two steps of four prompts
        of_step = [mean for mean in means[step // 2][step % 2 * 4 :][:4] if mean is not None]
        assert value == pytest.approx(sum(of_step) / len(of_step))
    assert len(logged) == 6
    found = {(metric.name, metric.stage): metric for metric in read_results(Path("out/results.json")).metrics}
    for stage, of_rollout in (("before", means[0]), ("after", means[-1])):
        known = [mean for mean in of_rollout if mean is not None]
        assert found["rollout/gold", stage].value == pytest.approx(sum(known) / len(known))
    data = json.loads(re.search(r'id="data">(.*?)</script>', Path("out/report.html").read_text(), re.DOTALL)[1])
    titles = [chart["title"] for chart in data["charts"].values()]
    assert "Annotator score, by distance from the initial model" in titles
    assert "Gold annotator score, by distance from the initial model" in titles


@pytest.mark.parametrize("objective", ["ppo", "simpo"])
def test_two_processes_train_like_one(recipe, objective, chat_world, tmp_path):
    shared = {"objective": objective, "dtype": "float64", "optim": "sgd", "learning_rate": 0.1, "sync_every": 1}
    shared |= {"save_strategy": "no"}
    if objective == "ppo":  # with gradients from three losses
        shared |= {"entropy_coef": 0.1, "ptx_weight": 0.5, "ptx_dataset_name": chat_world / "sft.jsonl"}
    assert main(recipe(**shared, output_dir="one")) == 0
    arguments = recipe(**shared, output_dir="two", per_device_train_batch_size=2)
    found = run_ranks(2, main, arguments, folder=tmp_path)
    assert found.codes == [0, 0], found.stderr
    one, two = (load_file(Path(folder, "model.safetensors")) for folder in ("one", "two"))
    assert all((one[name] - two[name]).abs().max() < 1e-9 for name in one)
    for path in Path("one/rollouts").glob("0*"):
        first, second = (read_lines(Path(folder, "rollouts", path.name)) for folder in ("one", "two"))
        assert [row["response_ids"] for row in first] == [row["response_ids"] for row in second]


def sharded(arguments):
    """Run ``main`` with FSDP2. On a CPU, accelerate turns it into DDP, unless the device looks like an accelerator."""
    begin = OnlineTrainer.__init__

    def begin_sharded(self, *args, **kwargs):
        PartialState().distributed_type = DistributedType.MULTI_XPU
        begin(self, *args, **kwargs)
        assert all(isinstance(parameter, DTensor) for parameter in self.model.parameters())

    OnlineTrainer.__init__ = begin_sharded  # only affects this forked process
    return main(arguments)


@pytest.mark.parametrize("objective", ["grpo", "dpo"])
def test_sharded_weights_train_like_whole_ones(recipe, objective, chat_world, tmp_path):
    """Even if one rank generates more often than the other (3 batches of 4 answers) or alone (a single batch)."""
    shared = {"objective": objective, "dtype": "float64", "optim": "sgd", "learning_rate": 0.1, "sync_every": 1}
    shared |= {"save_strategy": "no", "num_generations": 3, "generation_batch_size": 4 if objective == "grpo" else 12}
    if objective == "grpo":
        shared |= {"kl_estimator": "exact", "ptx_weight": 0.5, "ptx_dataset_name": chat_world / "sft.jsonl"}
    assert main(recipe(**shared, output_dir="one")) == 0
    layers = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": "GPT2Block"}, "ddp_backend": "gloo"}
    arguments = recipe(**shared | layers, output_dir="two", per_device_train_batch_size=2)
    found = run_ranks(2, sharded, arguments, folder=tmp_path)
    assert found.codes == [0, 0], found.stderr
    one, two = (load_file(Path(folder, "model.safetensors")) for folder in ("one", "two"))
    assert all((one[name] - two[name]).abs().max() < 1e-9 for name in one)
    for path in Path("one/rollouts").glob("0*"):
        first, second = (read_lines(Path(folder, "rollouts", path.name)) for folder in ("one", "two"))
        assert [row["response_ids"] for row in first] == [row["response_ids"] for row in second]


@pytest.mark.parametrize("network", [False, True])
def test_a_value_function_alongside_sharded_weights(recipe, network, chat_world, tmp_path):
    """The head or network is whole on every rank; checkpoints continue on a single process without sharding."""
    shared = {"objective": "ppo", "dtype": "float64", "optim": "adamw_torch", "sync_every": 1, "save_steps": 3}
    if network:
        torch.manual_seed(1)
        AutoModelForSequenceClassification.from_pretrained(chat_world / "model", num_labels=1).save_pretrained("judge")
        AutoTokenizer.from_pretrained(chat_world / "model").save_pretrained("judge")
        shared |= {"value_model": "judge", "value_learning_rate": 0.01}
    assert main(recipe(**shared, output_dir="one")) == 0
    layers = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": "GPT2Block"}, "ddp_backend": "gloo"}
    arguments = recipe(**shared | layers, output_dir="two", per_device_train_batch_size=2)
    found = run_ranks(2, sharded, arguments, folder=tmp_path)
    assert found.codes == [0, 0], found.stderr
    assert main(recipe(**shared, output_dir="three", resume_from_checkpoint="two/checkpoint-3")) == 0
    for name in ("model.safetensors", "checkpoint-6/model.safetensors", "checkpoint-6/value.safetensors"):
        one, *others = (load_file(Path(folder, name)) for folder in ("one", "two", "three"))
        assert all((one[key] - other[key]).abs().max() < 1e-9 for other in others for key in one), name
    start = load_file(Path("one/checkpoint-3/value.safetensors"))
    assert any((start[key] - one[key]).abs().max() > 1e-4 for key in one)  # it learns


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sync_every": 0}, ["sync_every", "0"]),
        ({"num_generations": 1}, ["num_generations", "rloo"]),
        ({"objective": "rlooo"}, ["objective", "rlooo", "grpo"]),
        ({"annotator": None}, ["annotator"]),
        ({"annotator": "exactt"}, ["exactt"]),
        ({"annotator": "exact"}, ["not a question of the tiny world"]),
        ({"annotator": "human:x.jsonl"}, ["human:x.jsonl"]),
        ({"annotator": "api"}, ["judge_url", "judge_model"]),
        ({"annotator": {"exact": 1.0, "api": 1.0}}, ["judge_url", "judge_model"]),
        (  # everything that needs no server is checked before anything is sent
            {"annotator": {"api": 1.0, "exact": 1.0}, "judge_url": "http://localhost:9", "judge_model": "m"},
            ["not a question of the tiny world"],
        ),
        ({"annotator": {"function:scorers:short": -1.0}}, ["annotator", "function:scorers:short", "-1"]),
        ({"annotator": {"function:scorers:short": "much"}}, ["annotator", "much"]),
        ({"gold_annotator": "function:scorers:short"}, ["gold_annotator", "function:scorers:short"]),
        ({"gold_annotator": "exact"}, ["not a question of the tiny world"]),
        ({"gold_annotator": "api", "judge_url": "http://localhost:9", "judge_model": "m"}, ["gold_annotator", "api"]),
        ({"annotator_normalization": "rank"}, ["annotator_normalization"]),
        ({"annotator_normalization": "ranks"}, ["annotator_normalization", "rank"]),
        ({"annotator": "function:scorers:nothing"}, ["annotator", "32 of 32", "max_missing_scores", "train.jsonl:"]),
        ({"max_length": 500, "max_new_tokens": 60}, ["max_new_tokens 60", "64 positions", "train.jsonl:"]),
        ({"max_new_tokens": 38}, ["max_prompt_length 2"]),
        ({"beta": 2.0}, ["beta", "rloo"]),
        ({"objective": "ppo", "value_model": "absent"}, ["value_model", "absent"]),
        ({"ptx_weight": 1.0}, ["ptx_weight", "ptx_dataset_name"]),
        ({"ptx_weight": 1.0, "ptx_dataset_name": "absent.jsonl"}, ["absent.jsonl"]),
    ],
)
def test_mistakes_give_a_one_line_error(recipe, changes, words, capsys):
    assert main(recipe(**changes)) == 2
    error = capsys.readouterr().err
    assert error.strip().count("\n") == 0 and all(word in error for word in words), error
