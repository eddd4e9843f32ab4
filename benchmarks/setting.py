"""What all entrants in a comparison share: the model, the rows and the training arguments."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, tokenize
from simpo.packing.layout import TokenizedComparison

BETA, GAMMA = 2.0, 1.0  # for SimPO; DPO's beta does not affect speed
# Llama sizes: hidden, layers, heads, key-value heads, intermediate, vocabulary, tied embeddings.
MODELS = {
    "toy": (64, 1, 1, 1, 128, 512, False),
    "wide": (768, 2, 12, 6, 2048, 8192, False),  # on a CPU, nearly all time goes into large matrix products
    "small": (384, 8, 6, 3, 1024, 49152, False),
    "1b": (2048, 16, 32, 8, 8192, 128256, True),
    "8b": (4096, 32, 32, 8, 14336, 128256, False),
}


@dataclass(frozen=True)
class Setting:
    """Everything except the trainer and its micro-batches.

    Attributes:
        folder: folder with the tokenizer and rows written by :func:`prepare`.
        pairs: comparisons measured, after one warm-up step.
        pairs_per_step: comparisons per optimizer step.
        dtype: ``"fp32"``, or ``"bf16"`` for autocast.
        weights: dtype of the weights, ``"fp32"`` or ``"bf16"``.
        threads: PyTorch CPU threads.
        device: ``"cpu"`` or ``"cuda"``.
        clock: ``"wall"``, or ``"cpu"`` for CPU time, which other programs on the machine disturb less.
        model: a key in :data:`MODELS`.
        optimizer: transformers' ``optim``.
        checkpointing: whether activations are recomputed in backward.
        learning_rate: the constant learning rate.
        max_length: longer rows are an error, because entrants would truncate them differently.
    """

    folder: str
    pairs: int = 32
    pairs_per_step: int = 8
    dtype: str = "fp32"
    weights: str = "fp32"
    threads: int = 2
    device: str = "cpu"
    clock: str = "wall"
    model: str = "small"
    optimizer: str = "adamw_torch_fused"
    checkpointing: bool = False
    learning_rate: float = 1e-6
    max_length: int = 8192

    @property
    def steps(self) -> int:
        """Optimizer steps, including the warm-up step."""
        return 1 + self.pairs // self.pairs_per_step

    @property
    def vocabulary(self) -> int:
        """Vocabulary size of the model."""
        return MODELS[self.model][5]


def prepare(setting: Setting, rows: Sequence[Row], tokenizer: Any) -> dict[str, int]:
    """Write the tokenizer, the rows and their ids to ``setting.folder`` and return token and row counts.

    Raises:
        ValueError: if there are too few rows or a row is too long.
    """
    wanted = setting.steps * setting.pairs_per_step
    if len(rows) < wanted:
        raise ValueError(f"{len(rows)} pairs are too few; {wanted} are needed, including the warm-up step")
    comparisons = [tokenize(row, tokenizer) for row in rows[:wanted]]
    longest = max(len(c.prompt_ids) + max(map(len, c.response_ids)) for c in comparisons)
    if longest > setting.max_length:
        raise ValueError(f"a pair has {longest} tokens, more than max_length {setting.max_length}")
    folder = Path(setting.folder)
    tokenizer.save_pretrained(folder)
    text = [asdict(row) for row in rows[:wanted]]
    (folder / "rows.json").write_text(json.dumps({"text": text, "ids": [asdict(c) for c in comparisons]}))
    measured = comparisons[setting.pairs_per_step :]
    return {
        "tokenizer_vocabulary": len(tokenizer),
        "longest": longest,
        "prompt_tokens": sum(len(c.prompt_ids) for c in measured),
        "response_tokens": sum(len(ids) for c in measured for ids in c.response_ids),
        "responses": sum(len(c.response_ids) for c in measured),
    }


def load_comparisons(setting: Setting) -> list[TokenizedComparison]:
    """Return the warm-up and measured rows in training order."""
    return [TokenizedComparison(**row) for row in _stored(setting)["ids"]]


def load_text(setting: Setting) -> list[dict[str, str]]:
    """Return the same rows, which must be pairs, as text: ``prompt``, ``chosen``, ``rejected``."""
    rows = _stored(setting)["text"]
    return [
        {"prompt": row["prompt"], **dict(zip(("chosen", "rejected"), row["responses"], strict=True))} for row in rows
    ]


def _stored(setting: Setting) -> dict[str, list[Any]]:
    return json.loads((Path(setting.folder) / "rows.json").read_text())


def model_config(setting: Setting) -> Any:
    """Return the model's configuration."""
    from transformers import LlamaConfig  # noqa: PLC0415 - slow import

    hidden, layers, heads, kv_heads, intermediate, vocabulary, tied = MODELS[setting.model]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        max_position_embeddings=setting.max_length,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def build_model(setting: Setting) -> Any:
    """Build the model on its device with the same random weights every time."""
    import torch  # noqa: PLC0415 - slow import
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow import

    torch.manual_seed(0)
    dtype = torch.bfloat16 if setting.weights == "bf16" else torch.float32
    with torch.device(setting.device):
        return AutoModelForCausalLM.from_config(model_config(setting), dtype=dtype)


def training_arguments(setting: Setting, output: str) -> dict[str, Any]:
    """Return the keyword arguments common to all trainers; everything else keeps its ``TrainingArguments`` default."""
    return {
        "output_dir": output,
        "max_steps": setting.steps,
        "optim": setting.optimizer,
        "learning_rate": setting.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "train_sampling_strategy": "sequential",
        "use_cpu": setting.device == "cpu",
        "bf16": setting.dtype == "bf16",
        "gradient_checkpointing": setting.checkpointing,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
    }
