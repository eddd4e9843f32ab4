"""``simpo sample``: complete and killed runs of a tiny model, and one-line errors."""

import json
import os
import random
import signal
import sys
import time
from multiprocessing import get_context

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpo.cli import main
from simpo.runs.folder import RunFolder
from simpo.runs.results import read_results
from simpo.runs.terminal import printable

QUESTIONS = [f"What is {a} plus {b}?" + " Please." * (a % 4) for a in range(5) for b in range(4)]
ROWS = [{"prompt": text, "source": number} for number, text in enumerate(QUESTIONS)]


@pytest.fixture(scope="module")
def world(tmp_path_factory, write_chat_model):
    """A folder with a tiny chat model and prompts."""
    folder = tmp_path_factory.mktemp("world")
    write_chat_model(folder / "model", QUESTIONS, 512)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def command(world, output, **changes):
    given = {"n": 2, "max_new_tokens": 8, "chunk_size": 6, "seed": 1} | changes
    options = [f"--{key}={value}" for key, value in given.items() if value is not None]
    return ["sample", str(world / "model"), str(world / "prompts.jsonl"), f"--output_dir={output}", *options]


def test_a_recipe_gives_the_same_answers_as_the_command_line(world, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: {world / 'model'}\nprompts: {world / 'prompts.jsonl'}\noutput_dir: {tmp_path / 'b'}\n"
        "n: 1\nmax_new_tokens: 8\nchunk_size: 6\nseed: 1\n"
    )
    assert main(command(world, tmp_path / "a")) == main(["sample", str(recipe), "--n", "2"]) == 0
    first, second = ((tmp_path / name / "responses.jsonl").read_bytes() for name in "ab")
    assert first == second


def rows_in(folder):
    return [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]


def test_answers_are_in_prompt_order_with_their_statistics(world, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(command(world, output)) == 0
    rows = rows_in(output)
    assert [row["prompt"] for row in rows] == QUESTIONS
    assert [row["where"] for row in rows] == [f"prompts.jsonl:{number}" for number in range(1, 21)]
    assert [row["extra"]["source"] for row in rows] == list(range(20))
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    for row in rows:
        for text, ids, finished in zip(row["responses"], row["response_ids"], row["finished"], strict=True):
            assert finished == (ids[-1] == tokenizer.eos_token_id) and (finished or len(ids) == 8)
            assert text == tokenizer.decode(ids, skip_special_tokens=True)
    metrics = {metric.name: metric for metric in read_results(output / "results.json").metrics}
    lengths = [len(ids) for row in rows for ids in row["response_ids"]]
    assert metrics["sample/prompts"].value == 20 and metrics["sample/responses"].value == 40
    assert metrics["sample/tokens"].value == pytest.approx(sum(lengths) / 40)
    assert metrics["sample/tokens"].low < metrics["sample/tokens"].value < metrics["sample/tokens"].high
    ended = sum(sum(row["finished"]) for row in rows)
    assert metrics["sample/ended"].value == ended / 40 and metrics["sample/hit_max_new_tokens"].value == 40 - ended
    assert metrics["sample/distinct"].value == sum(len(set(row["responses"])) for row in rows) / 40
    printed = capsys.readouterr().out
    assert f"{40 - ended} responses reached max_new_tokens 8" in printed
    for row in rows[:3]:
        assert f"--- prompt {row['id']}\n{row['prompt']}\n--- answer {row['id']}\n" in printed
        assert printable(row["responses"][0].strip()) in printed
    assert rows[3]["prompt"] not in printed
    assert "40 of 40 responses" in printed and str(output / "responses.jsonl") in printed and "next:" in printed
    assert [path.name for path in output.iterdir() if path.name.startswith(".chunks")] == []


def test_greedy_answers_match_transformers(world, tmp_path):
    """Prompt by prompt, unpadded, with transformers' own chat template rendering."""
    assert main(command(world, tmp_path / "out", n=1, temperature=0, max_new_tokens=16)) == 0
    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    rows = rows_in(tmp_path / "out")
    for row in rows:
        message = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        found = model.generate(**prompt, do_sample=False, max_new_tokens=16)
        assert row["response_ids"] == [found[0, prompt["input_ids"].shape[1] :].tolist()]
    assert len({row["responses"][0] for row in rows}) > 10


def test_the_same_seed_gives_the_same_bytes(world, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert main(command(world, tmp_path / name, seed=seed)) == 0
    first, again, other = ((tmp_path / name / "responses.jsonl").read_bytes() for name in "abc")
    assert first == again != other


def test_the_output_can_be_used_as_data(world, tmp_path):
    """The prompts of a finished run give the same answers."""
    assert main(command(world, tmp_path / "a")) == 0
    again = command(world, tmp_path / "b")
    again[2] = str(tmp_path / "a" / "responses.jsonl")
    assert main(again) == 0
    first, second = rows_in(tmp_path / "a"), rows_in(tmp_path / "b")
    assert [row["id"] for row in first] == [row["id"] for row in second]
    assert [row["response_ids"] for row in first] == [row["response_ids"] for row in second]


def test_a_finished_run_is_left_alone(world, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(command(world, output)) == 0
    before = (output / "responses.jsonl").stat().st_mtime_ns
    assert main(command(world, output)) == 0
    assert (output / "responses.jsonl").stat().st_mtime_ns == before
    assert "finished" in capsys.readouterr().out
    assert main(command(world, output, seed=2)) == 2
    assert "seed: was 1, now 2" in capsys.readouterr().err


SLOW = {"n": 4, "max_new_tokens": 48, "chunk_size": 8}


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main(command(world, folder, **SLOW)) == 0
    return folder


@pytest.mark.parametrize(("kill", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_killed_run_ends_with_the_same_bytes(world, whole, tmp_path, capfd, kill, code):
    """A separate process is stopped twice in the middle of chunks and restarted until it finishes."""
    output, chunks = tmp_path / "killed", tmp_path / "killed" / ".chunks-0.jsonl"
    draws = random.Random(kill)

    def start():
        # Forked, because importing torch again would take longer than everything else.
        process = get_context("fork").Process(target=lambda: sys.exit(main(command(world, output, **SLOW))))
        process.start()
        return process

    for _ in range(2):
        there = chunks.stat().st_size if chunks.exists() else 0
        process = start()
        while process.is_alive() and (not chunks.exists() or chunks.stat().st_size == there):
            time.sleep(0.002)
        time.sleep(draws.random() * 0.05)
        os.kill(process.pid, kill)
        process.join()
        assert process.exitcode == code
        assert not (output / "responses.jsonl").exists()
    assert capfd.readouterr().err == (
        "simpo: interrupted; run the same command again to continue\n" * 2 if code > 0 else ""
    )
    last = start()
    last.join()
    assert last.exitcode == 0
    assert "continuing: " in capfd.readouterr().out
    for name in ("responses.jsonl", "results.json"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()


def test_a_long_prompt_is_dropped_and_reported(world, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "x" * 600}) + "\n" + json.dumps(ROWS[0]) + "\n")
    line = command(world, tmp_path / "out", max_new_tokens=None)
    line[2] = str(path)
    assert main(line) == 0
    printed = capsys.readouterr().out
    assert "dropped 1" in printed and "max_new_tokens 256" in printed  # half of the model's 512 positions
    assert len(rows_in(tmp_path / "out")) == 1


TEMPLATED = [{"prompt": [{"role": "user", "content": "Hi"}]}]


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        pytest.param([], {}, ["prompts.jsonl"], id="no rows"),
        pytest.param([{"text": "x"}], {}, ["text"], id="no prompts"),
        pytest.param(TEMPLATED, {"chat_template": "none"}, ["prompts.jsonl:1", "chat_template"], id="no template"),
        pytest.param(ROWS, {"n": 0}, ["n:", "at least 1"], id="n 0"),
        pytest.param(ROWS, {"temperature": 0}, ["n:", "greedy"], id="greedy twice"),
        pytest.param(ROWS, {"max_new_tokens": 512}, ["max_new_tokens", "context of 512"], id="no room"),
        pytest.param(ROWS, {"dtype": "float3"}, ["dtype", "float3"], id="dtype"),
        pytest.param(ROWS, {"engine": "vllm"}, ["vLLM", "pip install 'simpo[vllm]'"], id="no vLLM"),
        pytest.param(ROWS, {"top_q": 1}, ["--top_q"], id="unknown option"),
    ],
)
def test_mistakes_give_a_one_line_error(world, tmp_path, capsys, rows, changes, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = command(world, tmp_path / "out", **changes)
    line[2] = str(path)
    assert main(line) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in message), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("place", "name"), [(1, "./nowhere"), (2, "nowhere.jsonl")])
def test_missing_models_and_prompts_are_reported(world, tmp_path, capsys, place, name):
    line = command(world, tmp_path / "out")
    line[place] = name
    assert main(line) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and name in error


def test_a_model_without_an_end_of_turn_is_reported(world, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(world / "model").save_pretrained(tmp_path / "model")
    line = command(world, tmp_path / "out")
    line[1] = str(tmp_path / "model")
    assert main(line) == 2
    assert "set an eos_token" in capsys.readouterr().err


def test_an_adapters_folder_is_a_model(world, tmp_path, capsys):
    """Its context length and settings come from the base model; its answers are its own."""
    base = AutoModelForCausalLM.from_pretrained(world / "model")
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(world / "model").save_pretrained(tmp_path / "adapter")
    line = command(world, tmp_path / "out", n=1, temperature=0)
    line[1] = str(tmp_path / "adapter")
    assert main(line) == 0
    assert "the model's context of 512 tokens leaves 504 for the prompt" in capsys.readouterr().out
    assert main(command(world, tmp_path / "base", n=1, temperature=0)) == 0
    first, second = ([row["response_ids"] for row in rows_in(tmp_path / name)] for name in ("out", "base"))
    assert first != second


def test_running_out_of_memory_is_reported(world, tmp_path, capsys, monkeypatch):
    def exhaust(self, prompts, settings, seed):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("simpo.generation.engine.TransformersEngine.generate", exhaust)
    assert main(command(world, tmp_path / "out")) == 2
    assert "chunk_size: 6 answers" in capsys.readouterr().err


def test_another_commands_folder_is_rejected(world, tmp_path, capsys):
    with RunFolder(tmp_path / "out", command="train") as run:
        run.begin({})
    assert main(command(world, tmp_path / "out")) == 2
    assert "'train'" in capsys.readouterr().err
