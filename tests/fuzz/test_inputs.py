"""Arbitrarily broken data, recipes, templates, replies, result files, models and command lines."""

from __future__ import annotations

import io
import json
import re
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from hypothesis import strategies as st
from tests.fuzz.properties import accepted, end, fuzz
from tests.fuzz.strategies import (
    changed_json,
    damages,
    files,
    plain_rows,
    recipes,
    replies,
    rows,
    templates,
    texts,
    verdicts,
)
from tests.servers.chat_server import ChatServer, Raw, completion

from simpo import SimpoError
from simpo.cli import command_named
from simpo.client import ChatClient, ChatReply, ChatRequest, Endpoint
from simpo.data.settings import TokenizeSettings
from simpo.data.sources import load_rows
from simpo.data.tokenizing import prepare
from simpo.models.loading import load_tokenizer


def write(path, table):
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return path


@fuzz(5, 3000, table=st.lists(rows, min_size=1, max_size=20))
def test_arbitrary_rows_never_crash_inspect(workshop, scratch, table):
    with scratch() as folder:
        end("inspect", "model", write(folder / "rows.jsonl", table))


@fuzz(5, 4000, row=plain_rows)
def test_text_rows_become_their_own_tokens(workshop, scratch, row):
    """Whatever the text, the ids decode to it or the row is rejected; every row is counted."""
    tokenizer = load_tokenizer("model")
    with scratch() as folder:
        found = accepted(
            lambda: prepare(
                load_rows(str(write(folder / "rows.jsonl", [row] * 2)), split="train"), tokenizer, TokenizeSettings()
            )
        )
    if isinstance(found, SimpoError):
        return
    report = found.report
    assert report.rows == 2 == report.used + sum(report.bad.values()) + sum(report.dropped.values())
    for prepared in found.dataset:
        for name, ids in zip(("chosen", "rejected"), prepared["response_ids"], strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            assert text == row[name] + tokenizer.eos_token
            assert ids.count(tokenizer.eos_token_id) == 1


@fuzz(6, 2000, file=files)
def test_arbitrary_files_never_crash_inspect(workshop, scratch, file):
    suffix, content = file
    with scratch() as folder:
        path = folder / f"data.{suffix}"
        path.write_bytes(content)
        end("inspect", "model", path)


@fuzz(
    3,
    1500,
    command=st.sampled_from(["sample", "annotate", "pair", "compare"]),
    table=st.lists(rows, min_size=1, max_size=4),
)
def test_arbitrary_rows_never_crash_other_commands(workshop, scratch, command, table):
    with scratch() as folder:
        path, out = write(folder / "rows.jsonl", table), folder / "out"
        if command == "sample":
            end("sample", "model", path, "--max_new_tokens", 2, "--output_dir", out)
        elif command == "annotate":
            end("annotate", path, "--annotator", "logp:model", "--output_dir", out)
        elif command == "pair":
            end("pair", path, "--output_dir", out)
        else:
            end("compare", path, "responses.jsonl", "--judge", "logp:model", "--output_dir", out)


RESPONSES = {"id": "1", "prompt": "What?", "responses": ["a", "b"], "finished": [True, True], "logps": [-1.0, -2.0]}
SCORED = RESPONSES | {"scores": [1.0, 0.0], "tools": None, "chat_template_kwargs": {}}
ANSWERS = [{"instruction": "What is 1 and 2?", "output": "It is 3.", "generator": "a", "dataset": "sums"}]
VERDICT = {"instruction": "What is 1 and 2?", "output_1": "It is 4.", "output_2": "It is 3.", "annotator": "tiny"}
ANNOTATIONS = [VERDICT | {"generator_1": "a", "generator_2": "b", "preference": value} for value in (1.25, 2)]


@fuzz(
    4,
    5000,
    changed=st.one_of(
        st.tuples(st.just("annotate"), changed_json([RESPONSES, RESPONSES | {"id": "2"}])),
        st.tuples(st.just("pair"), changed_json([SCORED, SCORED | {"id": "2"}])),
        st.tuples(st.just("compare"), changed_json([RESPONSES, RESPONSES | {"id": "2"}])),
        st.tuples(st.just("--reference_outputs"), changed_json(ANSWERS)),
        st.tuples(st.just("--annotations"), changed_json(ANNOTATIONS)),
    ),
    damage=damages,
)
def test_damaged_result_files_never_crash_a_command(workshop, scratch, changed, damage):
    command, table = changed
    with scratch() as folder:
        out = folder / "out"
        if command.startswith("--"):
            path = folder / "answers.json"
            path.write_bytes(damage(json.dumps(table).encode()))
            judge = ["--judge_url", "http://127.0.0.1:9/v1", "--judge_model", "tiny", "--plain", "--yes"]
            more = [] if command == "--annotations" else [path, *judge, "--cache", folder / "cache"]
            end("evaluate", "alpaca_eval", command, path, *more, "--output_dir", out)
            return
        path = folder / "rows.jsonl"
        lines = table if isinstance(table, list) else [table]
        path.write_bytes(damage("".join(json.dumps(row) + "\n" for row in lines).encode()))
        if command == "annotate":
            end("annotate", path, "--annotator", "logp:model", "--output_dir", out)
        elif command == "pair":
            end("pair", path, "--output_dir", out)
        else:
            end("compare", path, path, "--judge", "logp:model", "--output_dir", out)


def keys_of(command):
    """Return the keys of a command, read from its help."""
    name, *rest = command.split()
    text = io.StringIO()
    with redirect_stdout(text), pytest.raises(SystemExit):
        command_named(name)([*rest, "--help"])
    return sorted(set(re.findall(r"--([a-z]\w+)", text.getvalue())) - {"help"})


BENCHMARKS = [
    f"evaluate {name}" for name in ("alpaca_eval", "arena_hard", "mt_bench", "gsm8k", "academic", "rewardbench")
]
COMMANDS = ["train", "sft", "reward", "sample", "annotate", "pair", "compare", "loop", "online", "inspect", "merge"]
KEYS = {command: keys_of(command) for command in [*COMMANDS, "chat", *BENCHMARKS]}
recipe_of_command = st.sampled_from(list(KEYS)).flatmap(
    lambda command: st.tuples(st.just(command), recipes(KEYS[command]))
)


@fuzz(8, 2500, drawn=recipe_of_command)
def test_arbitrary_recipes_never_crash_a_command(workshop, scratch, drawn):
    command, text = drawn
    with scratch() as folder:
        path = folder / "recipe.yaml"
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        missing = {"train", "sft", "reward", "sample", "loop", "online", "inspect", "merge", "chat"}
        model = ["--model_name_or_path", "missing"] if command in missing else ["--output_dir", "pairs.jsonl"]
        end(*command.split(), path, *model)


SHIPPED = sorted(Path(__file__).parents[2].glob("recipes/**/*.yaml"))


@fuzz(2, 500, path=st.sampled_from(SHIPPED), damage=damages)
def test_damaged_recipes_never_crash_a_command(workshop, scratch, path, damage):
    with scratch() as folder:
        recipe = folder / "recipe.yaml"
        recipe.write_bytes(damage(path.read_bytes()))
        end("train", recipe, "--model_name_or_path", "missing")


WORDS = [
    "",
    "model",
    "missing",
    "pairs.jsonl",
    "test.jsonl",
    "prompts.jsonl",
    "responses.jsonl",
    "annotated.jsonl",
    ".",
]
WORDS += [
    "x" * 300,
    "--",
    "-",
    "--x",
    "{}",
    "[1]",
    "a=b",
    "1",
    "0",
    "-1",
    "1e9",
    "nan",
    "true",
    "no",
    "auto",
    "a,b",
    "~",
    "*",
]
WORDS += [
    "exact",
    "logp:model",
    "reward:model",
    "function:os:system",
    "human:test.jsonl",
    "api",
    "http://127.0.0.1:9/v1",
]
words = st.sampled_from(WORDS) | texts.filter(lambda text: not set(text) & {"/", "\0"} and len(text) < 1000)
SLOW = {
    "num_train_epochs",
    "max_steps",
    "rounds",
    "n",
    "trials",
    "max_new_tokens",
    "dataloader_num_workers",
    "concurrency",
}
SLOW |= {"dataset_num_proc", "timeout", "judge_timeout", "judge_concurrency", "eval_n", "num_generations"}


@st.composite
def command_lines(draw):
    command = draw(st.sampled_from([*KEYS, "recipe", "demo", "sweep", "--help", "nope"]))
    keys = [key for key in KEYS.get(command, KEYS["train"]) if key not in SLOW]
    line = command.split() + draw(st.lists(words, max_size=2))
    for key in draw(st.lists(st.sampled_from(keys), max_size=4)):
        value = draw(words)
        line += draw(
            st.sampled_from([[f"--{key}", value], [f"--{key}={value}"], [f"--{key}"], [f"--{key[:-1]}", value]])
        )
    return [*line, "--nope"] if command == "demo" else line


@fuzz(8, 1500, line=command_lines())
def test_arbitrary_command_lines_never_crash(workshop, line):
    end(*line)


TRAIN = [
    "--dataset_name",
    "pairs.jsonl",
    "--per_device_train_batch_size",
    "4",
    "--max_steps",
    "2",
    "--learning_rate",
    "1e-3",
]
plausible = st.sampled_from(
    ["0", "1", "2", "-1", "0.5", "1e-3", "true", "false", "none", "steps", "epoch", "no", "auto", "cosine"]
)
options = st.lists(
    st.tuples(st.sampled_from([key for key in KEYS["train"] if key not in SLOW]), plausible), min_size=1, max_size=3
)


@fuzz(1, 500, chosen=options, held_out=st.booleans())
def test_arbitrary_training_settings_never_crash(workshop, scratch, chosen, held_out):
    paths = {"output_dir", "logging_dir", "reference_cache", "hub_model_id", "push_to_hub"}
    words = [f"--{key}={value}" for key, value in chosen if key not in paths]
    eval_words = ["--eval_dataset_name", "test.jsonl"] if held_out else []
    with scratch() as folder:
        end("train", "--model_name_or_path", "model", *TRAIN, *eval_words, *words, "--output_dir", folder / "out")


@fuzz(4, 100, template=templates)
def test_arbitrary_templates_never_crash(workshop, template):
    end("inspect", "model", "pairs.jsonl", "--chat_template", template or " ")


@fuzz(8, 7000, reply=replies)
def test_arbitrary_server_replies_never_crash_the_client(workshop, reply):
    status, headers, body = reply
    with ChatServer(lambda request: Raw(status, body, headers)) as server:
        client = ChatClient(Endpoint(server.url, "tiny", attempts=2, timeout=5), None)
        found = accepted(lambda: client.complete([ChatRequest([{"role": "user", "content": "hi"}], 5, top_logprobs=2)]))
    if not isinstance(found, SimpoError):
        (answer,) = found
        assert isinstance(answer, ChatReply) and isinstance(answer.text, str)


@fuzz(2, 500, reply=verdicts, command=st.sampled_from(["annotate", "compare"]))
def test_arbitrary_verdicts_never_crash_a_command(workshop, scratch, reply, command):
    judge = ["--judge_model", "tiny", "--yes", "--output_dir"]
    with scratch() as folder, ChatServer(lambda request: completion(reply)) as server:
        common = ["--judge_url", server.url, "--cache", folder / "cache", *judge, folder / "out"]
        if command == "annotate":
            end("annotate", "responses.jsonl", "--annotator", "api", *common)
        else:
            end("compare", "responses.jsonl", "annotated.jsonl", "--judge", "api", *common)


MODEL_FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]


@fuzz(3, 60, name=st.sampled_from(MODEL_FILES), damage=damages, data=st.data())
def test_damaged_models_never_crash_a_command(workshop, scratch, name, damage, data):
    with scratch() as folder:
        model = folder / "model"
        shutil.copytree(workshop / "model", model)
        content = (model / name).read_bytes()
        if name.endswith(".json") and data.draw(st.booleans()):
            content = json.dumps(data.draw(changed_json(json.loads(content)))).encode()
        else:
            content = damage(content)
        (model / name).write_bytes(content)
        end("sample", model, "prompts.jsonl", "--max_new_tokens", 2, "--output_dir", folder / "out")
