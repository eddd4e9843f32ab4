"""``simpo loop``: complete loops with a tiny model, their output, when they stop, and one-line errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from tests.servers.chat_server import ChatServer, completion
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpo.cli import main
from simpo.cli.experiments import LOOP_TYPES
from simpo.config import parse_settings
from simpo.generation.sample import PromptArguments
from simpo.models.settings import ModelArguments
from simpo.runs.files import read_lines
from simpo.runs.manifest import find_damage
from simpo.runs.results import read_results
from simpo.workflows.loop import LoopRecipe, kl_from_start

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RECIPE = {
    "rounds": 2, "n": 3, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 10, "eval_n": 2,
    "learning_rate": 2e-2, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none",
    "keep_unfinished": True,  # a random model rarely ends an answer
}  # fmt: skip
SCORER = "def length(prompt, response): return -len(response)\n"


@pytest.fixture(scope="module")
def world(chat_world, tmp_path_factory):
    """A folder with a recipe and a finished loop in ``out``; shorter answers are better."""
    folder = tmp_path_factory.mktemp("loop")
    (folder / "scorer_of_test.py").write_text(SCORER)
    here = {"prompts": chat_world / "train.jsonl", "eval_prompts": chat_world / "test.jsonl"}
    here |= {"model_name_or_path": chat_world / "model", "annotator": "function:scorer_of_test:length"}
    recipe = RECIPE | {key: str(value) for key, value in here.items()}
    recipe |= {"judges": ["function:scorer_of_test:length", f"logp:{chat_world / 'model'}"], "trust_remote_code": True}
    (folder / "loop.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["loop", "loop.yaml", "--output_dir", "out"]) == 0
    return folder


def metrics(folder):
    return {(metric.name, metric.stage): metric for metric in read_results(folder / "results.json").metrics}


def test_each_round_starts_from_the_previous_one(world):
    out = world / "out"
    for number in (1, 2):
        folder = out / f"round-{number}"
        stages = ("responses", "annotated", "pairs", "model", "answers", "comparison")
        assert [json.loads((folder / stage / "run.json").read_text())["command"] for stage in stages] == [
            "sample", "annotate", "pair", "train", "sample", "compare",
        ]  # fmt: skip
        assert all(find_damage(folder / stage) is None for stage in stages)
        assert metrics(folder / "responses")["sample/responses", None].value == 72
        started = yaml.safe_load((world / "loop.yaml").read_text())["model_name_or_path"]
        resolved = yaml.safe_load((folder / "model/recipe.resolved.yaml").read_text())
        assert resolved["model_name_or_path"] == (started if number == 1 else "out/round-1/model")
        assert resolved["dataset_name"] == f"out/round-{number}/pairs/pairs.jsonl"
    prompts = [read_lines(out / f"round-{number}/responses/responses.jsonl") for number in (1, 2)]
    assert [row["id"] for row in prompts[0]] == [row["id"] for row in prompts[1]]
    assert prompts[0][0]["responses"] != prompts[1][0]["responses"]


def test_every_round_is_reported(world, capsys, monkeypatch):
    """Short answers were rewarded, and they win. The same command leaves the loop alone and prints the same report."""
    out = world / "out"
    found = metrics(out)
    for number in (1, 2):
        rate = found[f"round-{number}/win_rate/function", None]
        judged = metrics(out / f"round-{number}/comparison")["win_rate/function", None]
        assert (rate.value, rate.low, rate.n) == (judged.value, judged.low, 8)
        assert found[f"round-{number}/kl", None].value > 0
        assert found[f"round-{number}/win_rate/logp", None].value is not None
    assert found["round-2/win_rate/function", None].value > 0.5
    assert (found["rounds", None].value, found["last_good_round", None].value) == (2, 2)
    monkeypatch.chdir(world)
    before = (out / "results.json").stat().st_mtime_ns
    assert main(["loop", "loop.yaml", "--output_dir", "out"]) == 0
    assert (out / "results.json").stat().st_mtime_ns == before
    printed = capsys.readouterr().out
    assert "finished" in printed and "win_rate/function" in printed and "simpo chat out/round-2/model" in printed


def products(folder):
    """Return the contents of the files a loop exists to produce, without logs, times and machine details."""
    patterns = ("results.json", "*.jsonl", "model.safetensors", "recipe.resolved.yaml")
    found = {path for pattern in patterns for path in folder.rglob(pattern)}
    return {path.relative_to(folder): path.read_bytes() for path in found if path.name != "metrics.jsonl"}


def test_more_rounds_continue_from_the_last_one(world, tmp_path, monkeypatch, capsys):
    """The result is identical to a loop with all rounds from the start; fewer rounds than exist are an error."""
    (tmp_path / "scorer_of_test.py").write_text(SCORER)
    monkeypatch.chdir(tmp_path)
    command = ["loop", str(world / "loop.yaml"), "--output_dir", "out", "--rounds"]
    assert main([*command, "1"]) == 0
    first = Path("out/round-1/model/model.safetensors")
    kept = first.stat().st_mtime_ns
    assert main([*command, "2"]) == 0
    assert first.stat().st_mtime_ns == kept
    assert "simpo chat out/round-2/model" in capsys.readouterr().out
    extended, straight = products(tmp_path / "out"), products(world / "out")
    assert len(straight) > 25 and extended.keys() == straight.keys()
    assert [name for name, content in straight.items() if extended[name] != content] == []
    record = json.loads(Path("out/run.json").read_text())
    assert record["status"] == "finished" and len(record["starts"]) == 2
    assert find_damage(Path("out")) is None

    assert main([*command, "2", "--save_dtype", "bfloat16"]) == 2
    assert "save_dtype" in capsys.readouterr().err
    assert main([*command, "1"]) == 2
    printed = capsys.readouterr().err
    assert "rounds: out already has 2, more than the 1" in printed and printed.count("\n") == 1


def test_a_stage_equals_its_command(world, chat_world, monkeypatch, tmp_path):
    """The same inputs give the same bytes."""
    monkeypatch.chdir(world)
    round_1 = Path("out/round-1")
    seed = json.loads((round_1 / "responses/run.json").read_text())["identity"]["seed"]
    sampled = ["sample", str(chat_world / "model"), str(chat_world / "train.jsonl"), f"--seed={seed}", "--n=3"]
    sampled += ["--temperature=1", "--top_p=1", "--max_new_tokens=10", f"--output_dir={tmp_path / 'responses'}"]
    assert main(sampled) == 0
    scored = ["annotate", str(tmp_path / "responses"), "--annotator=function:scorer_of_test:length"]
    assert main([*scored, "--trust_remote_code", f"--output_dir={tmp_path / 'annotated'}"]) == 0
    assert main(["pair", str(tmp_path / "annotated"), "--keep_unfinished", f"--output_dir={tmp_path / 'pairs'}"]) == 0
    training = {key: RECIPE[key] for key in ("learning_rate", "per_device_train_batch_size", "save_strategy")}
    training |= {"model_name_or_path": chat_world / "model", "dataset_name": tmp_path / "pairs/pairs.jsonl"}
    options = [f"--{key}={value}" for key, value in training.items()]
    assert main(["train", *options, "--report_to=none", f"--output_dir={tmp_path / 'model'}"]) == 0
    for name in ("responses/responses.jsonl", "annotated/annotated.jsonl", "pairs/pairs.jsonl"):
        assert (tmp_path / name).read_bytes() == (round_1 / name).read_bytes()
    assert (tmp_path / "model/model.safetensors").read_bytes() == (round_1 / "model/model.safetensors").read_bytes()


@torch.no_grad()
def test_the_drift_is_the_mean_log_ratio(world, chat_world):
    """Compared with plain transformers, one answer at a time."""
    answers = world / "out/round-2/answers/responses.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(chat_world / "model")
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (world / "out/round-2/model", chat_world / "model")
    ]
    means = []
    for row in read_lines(answers):
        asked = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True).input_ids
        ratios = []
        for ids in row["response_ids"]:
            whole = torch.tensor([[*prompt, *ids]])
            logps = [model(whole).logits[0, :-1].double().log_softmax(-1) for model in models]
            places = range(len(prompt) - 1, whole.shape[1] - 1)
            here, there = (float(logp[places, ids].sum()) for logp in logps)
            ratios.append(here - there)
        means.append(sum(ratios) / len(ratios))
    asked = PromptArguments(str(chat_world / "test.jsonl"))
    found = kl_from_start(answers, ModelArguments(str(chat_world / "model")), asked)
    assert found.value == pytest.approx(sum(means) / len(means), abs=1e-4)
    assert found.n == 8 and found.low < found.value < found.high


def test_the_loop_stops_when_a_round_goes_wrong(world, monkeypatch, capsys):
    """Also reports that one held-out prompt is a training prompt."""
    monkeypatch.chdir(world)
    recipe = yaml.safe_load(Path("loop.yaml").read_text())
    held_out = Path(recipe["eval_prompts"]).read_text()
    Path("shared.jsonl").write_text(held_out + Path(recipe["prompts"]).read_text().splitlines()[0] + "\n")
    options = ["--eval_prompts", "shared.jsonl", "--stop_kl", "1e-6"]
    assert main(["loop", "loop.yaml", "--output_dir", "stopped", *options]) == 0
    printed = capsys.readouterr().out
    assert "note: 1 of 9 eval_prompts are" in printed
    assert "stopped after round 1: KL" in printed
    assert "simpo chat /" in printed  # the initial model, because no round was good
    found = metrics(world / "stopped")
    assert (found["rounds", None].value, found["last_good_round", None].value) == (1, 0)
    assert not (world / "stopped/round-2").exists()
    assert main(["loop", "loop.yaml", "--output_dir", "stopped", *options, "--rounds", "5"]) == 0
    assert "a stop criterion ended this loop after round 1" in capsys.readouterr().out
    assert not (world / "stopped/round-2").exists()


def test_a_servers_cost_is_confirmed_once(world, chat_world, tmp_path, monkeypatch, capsys):
    """The estimate covers all rounds and exceeds what is sent, because it cannot know which answers will be equal."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def answer(body):
        a, b = re.findall(r"<answer_[AB]>\n(.*?)\n</answer_", body["messages"][0]["content"], re.DOTALL)
        return completion(f"[[{'A' if len(a) < len(b) else 'B'}]]")

    with ChatServer(answer) as server:
        options = [f"--prompts={chat_world / 'test.jsonl'}", "--annotator=api", "--judges=api", "--yes", "--rounds=1"]
        options += [f"--judge_url={server.url}", "--judge_model=m", "--output_dir", str(tmp_path / "out")]
        assert main(["loop", "loop.yaml", *options]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"(\d+) requests to send, 0 in the cache", printed)[0] == str(48 + 64)
    assert 60 < len(server.bodies) <= 48 + 64
    assert metrics(tmp_path / "out")["round-1/win_rate/api", None].n == 8


def test_several_annotators_make_pairs_and_judge_rounds(world, chat_world, monkeypatch, capsys):
    """Their weighted scores make the pairs, and each of them judges the round."""
    monkeypatch.chdir(world)
    recipe = yaml.safe_load(Path("loop.yaml").read_text())
    names = recipe.pop("judges")
    recipe |= {"annotator": {names[0]: 1.5, names[1]: 2}, "annotator_normalization": "none", "rounds": 1}
    Path("several.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["loop", "several.yaml", "--output_dir", "several"]) == 0
    for row in read_lines(Path("several/round-1/annotated/annotated.jsonl")):
        length, logp = (row["annotator_scores"][name] for name in names)
        assert length == [-len(text) for text in row["responses"]] and max(logp) < 0
        assert row["scores"] == [pytest.approx(1.5 * x + 2 * y) for x, y in zip(length, logp, strict=True)]
    for row in read_lines(Path("several/round-1/pairs/pairs.jsonl")):
        assert row["chosen_score"] > row["rejected_score"]
    found = metrics(Path("several"))
    assert all(found[f"round-1/win_rate/{name}", None].n == 8 for name in ("function", "logp"))
    capsys.readouterr()
    assert main(["loop", "several.yaml", "--output_dir", "several", "--annotator_normalization=rank"]) == 2
    assert "annotator_normalization" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--round=3"], "unknown key; did you mean rounds?"),
        (["--rounds=0"], "rounds: "),
        (["--annotator=exakt"], "did you mean exact?"),
        (['--annotator={{"exact": 0}}'], "annotator: the weight of exact"),
        (['--annotator={{"exact": 1, "api": 1}}'], "judge_url and judge_model: "),
        (["--annotator_normalization=rank"], "annotator_normalization: "),
        (["--judges=human:verdicts.jsonl"], "human:verdicts.jsonl: "),
        (["--engine=vllm", "--use_peft=true"], "engine: vllm"),
        (["--annotator=api", "--judge_model=m"], "judge_url and judge_model: "),
        (["--judge_url=http://127.0.0.1:9/v1"], "judge_url and judge_model: "),
        (["--prompts=nothing.jsonl"], "nothing.jsonl: file not found"),
        (["--eval_prompts=empty.jsonl"], "no rows"),
        (["--trust_remote_code=false"], "trust_remote_code"),
        (["--temperature=0"], "greedy answers"),
        (["--n=1"], "n: 1 "),
        (["--pairs=worst"], "pairs: "),
        (["--max_length_ratio=0.5"], "max_length_ratio: "),
        (["--objective=simple"], "objective: 'simple' is unknown"),
        (["--stop_win_rate=50"], "stop_win_rate: "),
        (["--dataset_name=x.jsonl"], "dataset_name: unknown key"),
        (["--resume_from_checkpoint=checkpoint-5"], "resume_from_checkpoint: "),
        # errors found when the stages are checked
        (["--model_name_or_path=nowhere/at/all"], "there is no folder 'nowhere/at/all'"),
        (["--engine=vllm"], "vLLM is not installed"),
        (["--chat_template=nothing.jinja"], "chat_template: 'nothing.jinja'"),
        (["--max_new_tokens=64"], "max_new_tokens: 64 "),
        (["--max_new_tokens=60"], "no prompt fits"),
        (["--annotator=exact"], "not a question of the tiny world"),
        (["--judges=reward:{model}"], "is not a reward model"),
        (["--lora_r=8"], "lora_r: "),
        (["--use_peft=true", "--lora_target_modules=nothing"], "cannot add an adapter to this model"),
        (["--max_length=12"], "fits max_length 12"),
        (["--max_batch_tokens=9"], "max_batch_tokens: 9 "),
        (["--torch_compile=true", "--torch_compile_backend=x"], "training is impossible with these settings"),
        (
            ["--annotator=api", "--judge_url=https://nowhere.invalid/v1", "--judge_model=m", "--judge_key_env=NO_KEY"],
            "NO_KEY",
        ),
        (["--annotator=api", "--judge_url=http://127.0.0.1:9/v1", "--judge_model=m"], "--yes"),
        (["--judges=api", "--judge_url=http://127.0.0.1:9/v1", "--judge_model=m"], "--yes"),
    ],
)
def test_mistakes_give_a_one_line_error_and_leave_nothing_behind(
    options, message, world, chat_world, monkeypatch, capsys
):
    """Nothing has been computed, either."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("XDG_CACHE_HOME", str(world))
    options = [option.format(model=chat_world / "model") for option in options]
    Path("empty.jsonl").touch()
    assert main(["loop", "loop.yaml", "--output_dir", "never", *options]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not Path("never").exists()


def test_a_loop_runs_in_one_process(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["loop", "loop.yaml", "--output_dir", "never"]) == 2
    printed = capsys.readouterr().err
    assert "simpo loop runs in one process" in printed and printed.count("\n") == 1
    assert not Path("never").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/loop").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_parse(path):
    recipe = LoopRecipe(*parse_settings([str(path), "--use_cpu"], LOOP_TYPES))
    assert recipe.settings.rounds == 3 and recipe.sampling.n > 1
