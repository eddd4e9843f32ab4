"""What both sides of the comparison get: the model, the pairs, the tokenizer and the common training arguments."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simpo.packing.comparison import TokenizedComparison

CUE = "\n\nAssistant:"
END = "<|endoftext|>"
MODEL_VOCABULARY = 49152
DEFAULT_DATA = Path(__file__).parents[2] / "shared" / "data" / "preferences" / "hh_harmless_train.jsonl.gz"


@dataclass(frozen=True)
class Pair:
    """A preference pair as text; ``prompt + response`` is the transcript."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Setting:
    """Everything but who trains and in which micro-batches.

    Attributes:
        folder: where :func:`prepare` put the tokenizer and the pairs.
        pairs: how many are measured; a step's worth more come first, as a warm-up.
        pairs_per_step: pairs of an optimizer step.
        dtype: ``"fp32"``, or ``"bf16"`` for autocast.
        threads: of PyTorch's pool, where the device is a CPU.
        device: ``"cpu"`` or ``"cuda"``.
        hidden: width of the model; its heads are 64 wide, two query heads to a key-value head.
        layers: depth of the model.
        tied: whether the output layer is the embedding.
        learning_rate: constant.
        max_length: longer prompts with responses are an error: truncation would not be the same on both sides.
    """

    folder: str
    pairs: int = 32
    pairs_per_step: int = 8
    dtype: str = "fp32"
    threads: int = 2
    device: str = "cpu"
    hidden: int = 384
    layers: int = 8
    tied: bool = False
    learning_rate: float = 1e-6
    max_length: int = 2048

    @property
    def steps(self) -> int:
        """Optimizer steps, the warm-up's included."""
        return 1 + self.pairs // self.pairs_per_step

    def to_json(self) -> str:
        """The setting as a command-line argument."""
        return json.dumps(asdict(self))


def read_pairs(path: Path) -> list[Pair]:
    """The HH-style transcripts of ``path`` (``.jsonl`` or ``.jsonl.gz``), each cut at the last cue that both share."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = map(json.loads, text.decode().splitlines())
    return [_cut(row["chosen"], row["rejected"]) for row in rows]


def _cut(chosen: str, rejected: str) -> Pair:
    shared = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    end = chosen.rindex(CUE, 0, shared) + len(CUE)
    return Pair(chosen[:end], chosen[end:], rejected[end:])


def make_up_pairs(count: int = 1000) -> list[Pair]:
    """Transcripts of random words, as long as real ones, for machines without the data."""
    source = random.Random(0)  # noqa: S311 - words, not secrets
    words = ["".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(2, 9))) for _ in range(5000)]

    def text(typical: int) -> str:
        size = 2 + int(typical * source.lognormvariate(0.0, 0.8))
        return " " + " ".join(source.choices(words, k=min(size, 4 * typical)))

    return [Pair(f"\n\nHuman:{text(90)}{CUE}", text(30), text(30)) for _ in range(count)]


def train_tokenizer(pairs: list[Pair]) -> Any:
    """A byte-level BPE of the pairs' own text, with as many merges as occur twice, at most the model's vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415 - slow import
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - slow import

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL_VOCABULARY,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for p in pairs for text in (p.prompt, p.chosen, p.rejected)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def prepare(setting: Setting, rows: list[Pair]) -> dict[str, int]:
    """Train the tokenizer and write it, the pairs and their ids into ``setting.folder``; returns a few counts.

    Raises:
        ValueError: fewer rows than asked for, or one that would have to be truncated.
    """
    wanted = setting.steps * setting.pairs_per_step
    if len(rows) < wanted:
        raise ValueError(f"there are {len(rows)} pairs; {wanted} are needed (warm-up step included)")
    tokenizer = train_tokenizer(rows)
    comparisons = [tokenize(pair, tokenizer) for pair in rows[:wanted]]
    longest = max(len(c.prompt_ids) + max(map(len, c.response_ids)) for c in comparisons)
    if longest > setting.max_length:
        raise ValueError(f"a pair has {longest} tokens, more than max_length {setting.max_length}")
    folder = Path(setting.folder)
    tokenizer.save_pretrained(folder)
    rows_of_text = [asdict(pair) for pair in rows[:wanted]]
    (folder / "pairs.json").write_text(json.dumps({"text": rows_of_text, "ids": [asdict(c) for c in comparisons]}))
    measured = comparisons[setting.pairs_per_step :]
    return {
        "tokenizer_vocabulary": len(tokenizer),
        "longest": longest,
        "prompt_tokens": sum(len(c.prompt_ids) for c in measured),
        "response_tokens": sum(len(ids) for c in measured for ids in c.response_ids),
    }


def tokenize(pair: Pair, tokenizer: Any) -> TokenizedComparison:
    """``pair`` as ids; every response ends in the end-of-text token."""
    ids = tokenizer([pair.prompt, pair.chosen, pair.rejected], add_special_tokens=False)["input_ids"]
    return TokenizedComparison(ids[0], [[*response, tokenizer.eos_token_id] for response in ids[1:]])


def load_comparisons(setting: Setting) -> list[TokenizedComparison]:
    """The warm-up's and the measured pairs, in the order of training."""
    rows = json.loads((Path(setting.folder) / "pairs.json").read_text())["ids"]
    return [TokenizedComparison(**row) for row in rows]


def load_text(setting: Setting) -> list[dict[str, str]]:
    """The same pairs as text: rows of ``prompt``, ``chosen``, ``rejected``."""
    return json.loads((Path(setting.folder) / "pairs.json").read_text())["text"]


def model_config(setting: Setting) -> Any:
    """The model's configuration."""
    from transformers import LlamaConfig  # noqa: PLC0415 - slow import

    heads = setting.hidden // 64
    return LlamaConfig(
        vocab_size=MODEL_VOCABULARY,
        hidden_size=setting.hidden,
        num_hidden_layers=setting.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        intermediate_size=setting.hidden * 8 // 3,
        max_position_embeddings=setting.max_length,
        tie_word_embeddings=setting.tied,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def build_model(setting: Setting) -> Any:
    """The model with random fp32 weights, the same ones every time."""
    import torch  # noqa: PLC0415 - slow import
    from transformers import LlamaForCausalLM  # noqa: PLC0415 - slow import

    torch.manual_seed(0)
    return LlamaForCausalLM(model_config(setting))


def training_arguments(setting: Setting, output: str) -> dict[str, Any]:
    """Keyword arguments that both trainers get; what is not named here is ``TrainingArguments``' default."""
    return {
        "output_dir": output,
        "max_steps": setting.steps,
        "learning_rate": setting.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "train_sampling_strategy": "sequential",
        "max_length": setting.max_length,
        "use_cpu": setting.device == "cpu",
        "bf16": setting.dtype == "bf16",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
    }
