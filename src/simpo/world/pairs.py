"""Seeded datasets of the tiny world, and a small randomly initialized model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from simpo.errors import SimpoError
from simpo.runs.files import staged_folder, write_lines
from simpo.world.questions import draw_answer, draw_question, judge

Row = dict[str, str]

_ATTEMPTS = 50  # duplicate draws in a row after which the world's questions count as exhausted


def _rng(purpose: str, seed: int) -> Random:
    """Create a generator whose draws depend on the purpose as well as the seed."""
    return Random(f"{purpose} {seed}")  # noqa: S311 - sampling, not secrets


def make_sft(count: int, seed: int) -> list[Row]:
    """Draw ``count`` demonstrations ``{prompt, completion}`` on training questions; as in real data, some are bad."""
    rng = _rng("sft", seed)
    questions = (draw_question(rng, held_out=False) for _ in range(count))
    return [{"prompt": question.prompt, "completion": draw_answer(question, rng)} for question in questions]


def make_prompts(count: int, seed: int, *, held_out: bool = False) -> list[Row]:
    """Draw ``count`` distinct rows ``{prompt}``."""
    rng = _rng("prompts", seed)
    prompts: dict[str, None] = {}
    repeated = 0
    while len(prompts) < count and repeated < _ATTEMPTS:
        before = len(prompts)
        prompts[draw_question(rng, held_out=held_out).prompt] = None
        repeated = 0 if len(prompts) > before else repeated + 1
    if len(prompts) < count:
        raise SimpoError(f"count: {count:,} distinct prompts requested, but the tiny world has about {len(prompts):,}")
    return [{"prompt": prompt} for prompt in prompts]


def make_pairs(count: int, seed: int, *, held_out: bool = False, length_bias: float = 0.0) -> list[Row]:
    """Draw ``count`` off-policy pairs ``{prompt, chosen, rejected}`` of answers that differ in score and length.

    Questions may repeat. In a share ``length_bias`` of the pairs, the longer answer is chosen regardless of its
    quality; in the others, the judge chooses.
    """
    if not 0 <= length_bias <= 1:
        raise SimpoError(f"length_bias: {length_bias} is out of range; give a number from 0 to 1")
    rng = _rng("pairs", seed)
    rows = []
    for _ in range(count):
        question = draw_question(rng, held_out=held_out)
        scores: dict[str, float] = {}
        while len({len(answer) for answer in scores}) < 2 or len(set(scores.values())) < 2:
            answers = (draw_answer(question, rng) for _ in range(2))
            scores = {answer: judge(question.prompt, answer) for answer in answers}
        by_length = rng.random() < length_bias
        rejected, chosen = sorted(scores, key=len if by_length else scores.__getitem__)
        rows.append({"prompt": question.prompt, "chosen": chosen, "rejected": rejected})
    return rows


def write_sft(path: Path, count: int, seed: int) -> None:
    """Write the rows of :func:`make_sft` as JSON Lines."""
    write_lines(path, make_sft(count, seed))


def write_prompts(path: Path, count: int, seed: int, *, held_out: bool = False) -> None:
    """Write the rows of :func:`make_prompts` as JSON Lines."""
    write_lines(path, make_prompts(count, seed, held_out=held_out))


def write_pairs(path: Path, count: int, seed: int, *, held_out: bool = False, length_bias: float = 0.0) -> None:
    """Write the rows of :func:`make_pairs` as JSON Lines."""
    write_lines(path, make_pairs(count, seed, held_out=held_out, length_bias=length_bias))


# ---- A tiny chat model with its own tokenizer and chat template.

_SPECIAL = ("<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>")
_TEXTS, _VOCABULARY = 4000, 640  # large enough that every word of the world is one token
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on ``texts`` and give it a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(_SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_SPECIAL[0],
        eos_token=_SPECIAL[1],
        pad_token=_SPECIAL[2],
        extra_special_tokens=list(_SPECIAL[3:]),
    )
    fast.chat_template = _TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Create a randomly initialized Llama with about 400,000 parameters for ``tokenizer``'s vocabulary."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        initializer_range=0.06,  # a model this narrow learns to attend several times faster than with 0.02
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def world_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tiny world's tokenizer on its own text; the result is always the same."""
    return make_tokenizer((text for row in make_sft(_TEXTS, seed=0) for text in row.values()), _VOCABULARY)


def write_model(folder: Path, seed: int) -> None:
    """Save the world's tokenizer, chat template and a random model in a new ``folder``, like any model on disk."""
    tokenizer = world_tokenizer()
    with staged_folder(folder) as staging:
        tokenizer.save_pretrained(staging)
        make_model(tokenizer, seed).save_pretrained(staging)
