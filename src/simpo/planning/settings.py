"""The settings of `simpo plan`; apart from what is slow to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from simpo.config import check_values, setting
from simpo.errors import SimpoError

Command = Literal["train", "sft", "reward", "online"]
Sharing = Literal["ddp", "fsdp", "zero2", "zero3"]


@dataclass
class PlanSettings:
    """The command to plan, the machine, and the rows if the data is not read."""

    command: Command = setting("train", "The command that the recipe is for.")
    gpu: str | None = setting(None, "Card, such as H100-80GB (default: this machine's, or else its CPU).")
    gpus: int = setting(1, "Number of GPUs.", least=1)
    gpu_memory_gb: float | None = setting(None, "Memory of each, in GiB (default: the card's).", above=0)
    gpu_tflops: float | None = setting(
        None, "TFLOP/s of its dense half-precision products (default: the card's).", above=0
    )
    gpu_terabytes: float | None = setting(
        None, "Terabytes per second of its memory (default: the card's, or one for 300 TFLOP/s).", above=0
    )
    price: float | None = setting(None, "Price of an hour of one GPU, in any currency.", least=0)
    sharding: Sharing | None = setting(
        None, "How several processes share a model (default: fsdp for the recipe; ddp and fsdp are compared)."
    )
    rows: int | None = setting(None, "Number of rows, where the data is not read.", least=1)
    prompt_tokens: int | None = setting(None, "Tokens of a prompt; with it the data is not read.", least=1)
    response_tokens: int | None = setting(None, "Tokens of a response, where the data is not read.", least=1)
    responses: int = setting(2, "Responses of a row, where the data is not read.", least=1)
    json: bool = setting(False, "Print JSON.")

    def __post_init__(self) -> None:
        check_values(self)
        if self.sharding is not None and self.gpus == 1:
            raise SimpoError(f"sharding: {self.sharding} is for several GPUs; give gpus")
