"""One entrant of a comparison, measured in a process of its own."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.arithmetic import Forward, Shape, packed_forward, padded_forward
from benchmarks.setting import Setting, build_model, load_comparisons, load_text, training_arguments
from simpo.packing.comparison import TokenizedComparison

MEBIBYTE = 2**20
BETA, GAMMA = 2.0, 1.0


@dataclass(frozen=True)
class Entrant:
    """Who trains, and in which micro-batches.

    Attributes:
        name: in tables.
        toolkit: ``"trl"`` or ``"simpo"``.
        per_device: TRL's per-device batch; accumulation makes up the rest of the step.
        path: simpo's ``forward_path``.
        max_batch_tokens: simpo's, None for its default.
    """

    name: str
    toolkit: str
    per_device: int | None = None
    path: str | None = None
    max_batch_tokens: int | None = None


@dataclass(frozen=True)
class Measurement:
    """What a worker reports.

    Attributes:
        name: the entrant's.
        seconds: of the measured steps together.
        pairs: in them.
        tokens: in those, every prompt counted once and no padding, so that all entrants have the same number.
        losses: of every step, the warm-up's first.
        forwards: how many micro-batches they made.
        flops: counted arithmetic of the measured steps, logits made once.
        flops_recomputed: the same with the logits made again in backward, as simpo does where they are many.
        peak_mib: most memory of the process (of PyTorch on the GPU, with CUDA).
        grown_mib: the same less what was in use when the model had been made.
        cpu_seconds: processor time of the measured steps, all threads together.
        products_seconds: time of the same matrix products alone, if asked for.
    """

    name: str
    seconds: float
    pairs: int
    tokens: int
    losses: list[float]
    forwards: int
    flops: int
    flops_recomputed: int
    peak_mib: float
    grown_mib: float
    cpu_seconds: float
    products_seconds: float | None = None


def work(entrant: Entrant, setting: Setting, output: Path, *, products: bool = False) -> None:
    """Train, measure, and write the :class:`Measurement` to ``output`` as JSON.

    Args:
        entrant: who trains.
        setting: what and where; :func:`benchmarks.setting.prepare` must have filled its folder.
        output: the file to write.
        products: also time the matrix products alone.
    """
    import torch  # noqa: PLC0415 - a slow import that the parent process does without

    torch.set_num_threads(setting.threads)
    measured = load_comparisons(setting)[setting.pairs_per_step :]
    model = build_model(setting).to(setting.device)
    before = _in_use_mib(setting.device)
    with tempfile.TemporaryDirectory() as folder:
        make = _trl_trainer if entrant.toolkit == "trl" else simpo_trainer
        trainer = make(model, entrant, setting, folder)
        clock = _clock(setting)
        trainer.add_callback(clock)
        trainer.train()
    peak = _peak_mib(setting.device)
    shape = Shape.of(model.config)
    forwards = _trl_forwards(measured, entrant) if entrant.toolkit == "trl" else _simpo_forwards(trainer)
    found = Measurement(
        name=entrant.name,
        seconds=clock.wall[-1] - clock.wall[0],
        pairs=len(measured),
        tokens=sum(c.packed_length for c in measured),
        losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        forwards=len(forwards),
        flops=sum(forward.flops(shape) for forward in forwards),
        flops_recomputed=sum(replace(forward, recomputed=True).flops(shape) for forward in forwards),
        peak_mib=peak,
        grown_mib=peak - before,
        cpu_seconds=clock.cpu[-1] - clock.cpu[0],
        products_seconds=_products_alone(forwards, shape, setting) if products else None,
    )
    output.write_text(json.dumps(asdict(found)))


def _products_alone(forwards: list[Forward], shape: Shape, setting: Setting) -> float:
    import torch  # noqa: PLC0415

    from benchmarks.products import seconds_of  # noqa: PLC0415

    dtype = torch.bfloat16 if setting.dtype == "bf16" else torch.float32
    return seconds_of((p for forward in forwards for p in forward.products(shape)), dtype, setting.device)


def _trl_forwards(measured: list[TokenizedComparison], entrant: Entrant) -> list[Forward]:
    size = entrant.per_device
    assert size is not None
    batches = [measured[start : start + size] for start in range(0, len(measured), size)]
    return [padded_forward(batch, all_logits=True) for batch in batches]


def _simpo_forwards(trainer: Any) -> list[Forward]:
    """Of the micro-batches that the trainer's own plan gives the measured steps."""
    batches = [m.packed.comparisons for step in list(trainer.get_train_dataloader())[1:] for m in step["micro_batches"]]
    if trainer.path == "packed":
        return [packed_forward(batch) for batch in batches]
    return [padded_forward(batch, all_logits=False) for batch in batches]


def _clock(setting: Setting) -> Any:
    import torch  # noqa: PLC0415
    from transformers import TrainerCallback  # noqa: PLC0415

    class Clock(TrainerCallback):
        """When every optimizer step ended; the first is the warm-up."""

        def __init__(self) -> None:
            self.wall: list[float] = []
            self.cpu: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            """Called by the trainer, once an optimizer step."""
            if setting.device == "cuda":
                torch.cuda.synchronize()
            self.wall.append(time.perf_counter())
            self.cpu.append(time.process_time())

    return Clock()


def simpo_trainer(model: Any, entrant: Entrant, setting: Setting, folder: str) -> Any:
    """simpo's trainer for ``setting``, which writes into ``folder``."""
    from datasets import Dataset  # noqa: PLC0415

    from simpo.training.config import PreferenceConfig  # noqa: PLC0415
    from simpo.training.trainer import PreferenceTrainer  # noqa: PLC0415

    rows = Dataset.from_list([asdict(comparison) for comparison in load_comparisons(setting)])
    args = PreferenceConfig(
        per_device_train_batch_size=setting.pairs_per_step,
        objective="simpo",
        beta=BETA,
        gamma_beta_ratio=GAMMA / BETA,
        forward_path=entrant.path,
        max_batch_tokens=entrant.max_batch_tokens,
        **training_arguments(setting, folder),
    )
    trainer = PreferenceTrainer(model, args=args, train_dataset=rows)
    if entrant.path == "auto" and trainer.path != "packed":
        raise RuntimeError("simpo did not take its packed path; the log says why")
    return trainer


def _trl_trainer(model: Any, entrant: Entrant, setting: Setting, folder: str) -> Any:
    from datasets import Dataset  # noqa: PLC0415
    from transformers import AutoTokenizer  # noqa: PLC0415
    from trl.experimental.cpo import CPOConfig, CPOTrainer  # noqa: PLC0415

    assert entrant.per_device is not None
    args = CPOConfig(
        per_device_train_batch_size=entrant.per_device,
        gradient_accumulation_steps=setting.pairs_per_step // entrant.per_device,
        loss_type="simpo",
        cpo_alpha=0.0,
        beta=BETA,
        simpo_gamma=GAMMA,
        **training_arguments(setting, folder),
    )
    rows = Dataset.from_list(load_text(setting))
    tokenizer = AutoTokenizer.from_pretrained(setting.folder)
    trainer = CPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    _check_same_ids(trainer.train_dataset, setting)
    return trainer


def _check_same_ids(rows: Any, setting: Setting) -> None:
    """Raise if TRL's own tokenization of the text is not, token for token, what simpo is given."""
    for number, (row, comparison) in enumerate(zip(rows, load_comparisons(setting), strict=True)):
        for key, response in zip(("chosen", "rejected"), comparison.response_ids, strict=True):
            labels = [-100] * len(comparison.prompt_ids) + response
            if row[f"{key}_input_ids"] != comparison.prompt_ids + response or row[f"{key}_labels"] != labels:
                raise RuntimeError(f"TRL tokenizes the {key} response of pair {number} differently")


def _in_use_mib(device: str) -> float:
    if device == "cuda":
        import torch  # noqa: PLC0415

        return torch.cuda.memory_allocated() / MEBIBYTE
    import psutil  # noqa: PLC0415 - a dependency of accelerate

    return psutil.Process().memory_info().rss / MEBIBYTE


def _peak_mib(device: str) -> float:
    if device == "cuda":
        import torch  # noqa: PLC0415

        return torch.cuda.max_memory_allocated() / MEBIBYTE
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss there starts from the peak of the process that launched this one
        kibibytes = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return float(kibibytes) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (MEBIBYTE if sys.platform == "darwin" else 1024)
