"""Settings of `simpo plan`, in a module of their own because the planner is slow to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from simpo.config import check_values, setting
from simpo.errors import SimpoError

Command = Literal["train", "sft", "reward", "online"]
Sharing = Literal["ddp", "fsdp", "zero2", "zero3"]


@dataclass
class PlanSettings:
    """The command to plan, the machine, and the shape of the rows if the data is not read."""

    command: Command = setting("train", "Command that the recipe is for.")
    gpu: str | None = setting(None, "GPU model, such as H100-80GB (default: this machine's GPU, or its CPU).")
    gpus: int = setting(1, "Number of GPUs.", least=1)
    gpu_memory_gb: float | None = setting(None, "Memory of one GPU in GiB (default: from its data sheet).", above=0)
    gpu_tflops: float | None = setting(
        None, "Dense half-precision TFLOP/s of one GPU (default: from its data sheet).", above=0
    )
    gpu_terabytes: float | None = setting(
        None, "Memory bandwidth in TB/s (default: from its data sheet, or 1 TB/s per 300 TFLOP/s).", above=0
    )
    price: float | None = setting(None, "Price per GPU hour, in any currency.", least=0)
    sharding: Sharing | None = setting(
        None, "How GPUs share the model (default: fsdp for the recipe; the search compares ddp and fsdp)."
    )
    rows: int | None = setting(None, "Number of rows, if the data is not read.", least=1)
    prompt_tokens: int | None = setting(None, "Tokens per prompt; if given, the data is not read.", least=1)
    response_tokens: int | None = setting(None, "Tokens per response, if the data is not read.", least=1)
    responses: int = setting(2, "Responses per row, if the data is not read.", least=1)
    json: bool = setting(False, "Print JSON.")

    def __post_init__(self) -> None:
        check_values(self)
        if self.sharding is not None and self.gpus == 1:
            raise SimpoError(f"sharding: {self.sharding} needs several GPUs; set gpus to their number")
