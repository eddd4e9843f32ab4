"""Log lines: all metrics, the step, and a decreasing time estimate."""

from __future__ import annotations

import pytest
from transformers import TrainerState
from transformers.trainer_callback import PrinterCallback

from simpo.runs.files import JsonLines
from simpo.training.callbacks import LogLines, MetricsFile, log_as_lines


def test_every_log_is_one_line_with_the_remaining_time(make_trainer, make_model, pairs):
    lines = []
    trainer = make_trainer(
        pairs(12),
        eval_dataset=pairs(3),
        callbacks=[LogLines(lines.append)],
        per_device_train_batch_size=2,
        logging_steps=2,
        eval_strategy="epoch",
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    starts = [line.partition(":")[0] for line in lines]
    assert [start.split(", about")[0] for start in starts] == [
        "step 2 of 6", "step 4 of 6", "step 6 of 6", "step 6 of 6", "step 6 of 6",
    ]  # fmt: skip
    assert [" left" in start for start in starts] == [True, True, False, False, False]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for line, entry in zip(lines, logs, strict=False):
        assert f"loss {entry['loss']:.4g}, grad_norm {entry['grad_norm']:.4g}" in line
        assert f"rewards/margins {entry['rewards/margins']:.4g}" in line
    assert "eval_loss" in lines[3]
    assert "train_loss" in lines[4]
    assert not any("per_second" in line or "runtime" in line for line in lines)


def test_on_a_terminal_lines_replace_dictionaries(make_trainer, pairs, capsys):
    trainer = make_trainer(pairs(6), per_device_train_batch_size=2, logging_steps=1, disable_tqdm=False)
    log_as_lines(trainer, print)
    trainer.train()
    output, bar = capsys.readouterr()
    assert [line.partition(",")[0] for line in output.splitlines() if "learning_rate" in line] == [
        "step 1 of 3", "step 2 of 3", "step 3 of 3: loss " + output.split("step 3 of 3: loss ")[1].split(",")[0],
    ]  # fmt: skip
    assert "{" not in output + bar
    assert "3/3" in bar


@pytest.mark.parametrize("damage", [None, b"", b"{}\n", b'{"step": 1, "loss": 0.4}\n{"st'])
def test_metrics_from_a_checkpoint_are_restored(tmp_path, caplog, damage):
    logs = [{"loss": 0.5, "epoch": 0.5, "step": 1}, {"loss": float("nan"), "epoch": 1.0, "step": 2}]
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.append([*logs, {"loss": 0.3, "epoch": 1.5, "step": 3}])
    whole = [*logs[:1], logs[1] | {"loss": None}]
    if damage is not None:
        path.write_bytes(damage)
    MetricsFile(JsonLines(path), from_this_run=True).on_train_begin(
        None, TrainerState(global_step=2, log_history=logs), None
    )
    assert list(JsonLines(path)) == whole
    assert ("restored from the checkpoint" in caplog.text) == (damage is not None)
