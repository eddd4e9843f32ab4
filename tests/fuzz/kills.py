"""Small runs of every kind in processes killed just before a chosen change to their folder, and their results."""

from __future__ import annotations

import faulthandler
import importlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import torch
from tests.forked import use_own_locks

from simpo import cli

# A forked process has already imported everything, so that a kill hits the run rather than imports.
for module in (
    *(f"cli.{module}" for module in set(cli.COMMANDS.values())),
    "training.run",
    "training.preference",
    "analysis.plots",
):
    importlib.import_module(f"simpo.{module}")
_PATIENCE = 900  # seconds after which a hanging run ends with a traceback
FORK = multiprocessing.get_context("fork")

TRAIN = {
    "per_device_train_batch_size": 4,
    "max_steps": 5,  # an epoch has six
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 1,
    "disable_dropout": "false",
}
LORA = {"use_peft": "true", "lora_r": 2, "lora_target_modules": "c_attn"}
ONLINE = {"objective": "ppo", "num_generations": 4, "max_length": 40, "max_new_tokens": 8, "kl_target": 1}
ONLINE |= {"sync_every": 2, "rollout_epochs": 2}


def command_of(world: Path, kind: str, output: Path) -> list[str]:
    scorer = f"logp:{world / 'model'}"
    if kind == "sample":
        return [
            "sample", str(world / "model"), str(world / "train.jsonl"), "--output_dir", str(output),
            "--n", "2", "--max_new_tokens", "24", "--chunk_size", "4",
        ]  # fmt: skip
    if kind == "annotate":
        return ["annotate", str(_answers(world)), "--annotator", scorer, "--output_dir", str(output)]
    options = {"model_name_or_path": world / "model", "output_dir": output, **TRAIN}
    if kind == "loop":
        options |= {"prompts": world / "train.jsonl", "eval_prompts": world / "test.jsonl", "rounds": 2, "n": 3}
        options |= {"annotator": scorer, "max_new_tokens": 12, "chunk_size": 24, "temperature": 1}
        options |= {"keep_unfinished": "true"}
        return ["loop", *(f"--{key}={value}" for key, value in options.items())]
    if kind == "sft":
        return ["sft", f"--dataset_name={world / 'sft.jsonl'}", *(f"--{key}={value}" for key, value in options.items())]
    options |= {"dataset_name": world / "train.jsonl", "eval_dataset_name": world / "test.jsonl"}
    options |= {
        "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_batch_tokens": 96},
        "lora": LORA | {"eval_strategy": "steps", "eval_steps": 2},
        "dpo": LORA | {"objective": "dpo", "beta": 0.1, "reference_cache": output.with_name(f"{output.name}-cache")},
        "sweep": {"max_steps": 3, "learning_rate": "1e-3,1e-4"},
        "online": ONLINE | {"annotator": scorer},
    }.get(kind, {})
    command = kind if kind in ("reward", "sweep", "online") else "train"
    return [command, *(f"--{key}={value}" for key, value in options.items())]


def _answers(world: Path) -> Path:
    """Write ``responses.jsonl`` with enough prompts for several parts."""
    path = world / "responses.jsonl"
    if not path.exists():
        rows = [
            {
                "id": str(number),
                "prompt": f"What is {number} and 2?",
                "responses": [f"It is {number + k}." for k in (1, 2)],
            }
            for number in range(600)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _changes(folder: Path, event: str, arguments: tuple) -> bool:
    """Return whether a Python audit event changes something in ``folder``, or next to it with the same name prefix."""
    if event == "open":
        if not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return False
    elif event not in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
        return False
    with suppress(TypeError):  # a file descriptor
        return os.fspath(arguments[0]).startswith(str(folder))
    return False


def errors_of(folder: Path) -> Path:
    """Return the file with the last process's standard error."""
    return folder.with_name("errors.txt")


def _child(argv: list[str], folder: Path, on_change: Callable[[], None]) -> None:
    use_own_locks()
    torch.set_num_threads(1)
    process = os.getpid()

    def hook(event: str, arguments: tuple) -> None:
        if os.getpid() == process and _changes(folder, event, arguments):
            on_change()

    sys.addaudithook(hook)
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        errors = stack.enter_context(errors_of(folder).open("w"))
        stack.enter_context(redirect_stderr(errors))
        faulthandler.dump_traceback_later(_PATIENCE, file=errors, exit=True)
        code = cli.main(argv)
    sys.exit(code)


def run(
    argv: list[str], folder: Path, *, kill_at: int | None = None, kill_after: float | None = None
) -> tuple[int, int]:
    """Run a command, killed at a given change or time; return its exit code (-9 if killed) and number of changes."""
    made = FORK.Value("i", 0, lock=False)  # without a lock, because a killed process would never release it
    folder.parent.mkdir(parents=True, exist_ok=True)

    def on_change() -> None:
        made.value += 1
        if made.value == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=_child, args=(argv, folder, on_change))
    process.start()
    if kill_after is not None:
        process.join(kill_after)
        process.kill()
    process.join()
    return process.exitcode, made.value


def _is_timing(key: str) -> bool:
    return key.startswith("seconds/") or key.endswith(("runtime", "per_second", "total_flos"))


def result_of(folder: Path) -> dict[str, object]:
    """Return what a run produced: for training also checkpoints, logs and rollouts; for a loop, all stages' output."""
    patterns = ["model.safetensors", "adapter_model.safetensors", "results.json", "best.yaml", "examples_*.jsonl"]
    patterns += [f"{name}.jsonl" for name in ("responses", "annotated", "best", "pairs", "verdicts", "rollouts/0*")]
    found: dict[str, object] = {}
    for path in sorted(path for pattern in patterns for path in folder.rglob(pattern)):
        found[path.relative_to(folder).as_posix()] = path.read_bytes().replace(str(folder).encode(), b"")
    for path in sorted(folder.rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.relative_to(folder).as_posix()] = [
            {key: value for key, value in line.items() if not _is_timing(key)} for line in lines
        ]
    found["folders"] = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_dir())
    assert "results.json" in found
    return found
