"""The reference model: the policy as training starts, as stored log-probabilities or as a copy of its weights."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, List, Value
from huggingface_hub import constants
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from simpo.data.images import DIGESTS, IMAGES
from simpo.data.tokenizing import TOKENS
from simpo.errors import SimpoError, third_party
from simpo.models.adapters import unchanged_base_weights
from simpo.models.devices import from_main
from simpo.models.zero import exchange_partitions, gathered, is_partitioned
from simpo.packing.layout import PackedBatch
from simpo.packing.scoring import ReferenceStates, reference_states
from simpo.runs.files import write_text
from simpo.runs.results import fingerprint
from simpo.runs.terminal import progress
from simpo.training.batches import (
    MISMATCHED_IDS,
    MISMATCHED_REF_LOGP,
    REF_LOGPS,
    describe_rows,
    response_counts,
    rows_digest,
)
from simpo.training.packed import PackedTrainer
from simpo.training.sharding import reshard

logger = logging.getLogger(__name__)

_FORMAT = 2  # version of the cache; increase it when the same weights and tokens get other log-probabilities
_ROWS = 512  # per file of the cache, which is written at once
_POLICY = "policy.json"
# Keys of a model's or adapter's configuration that describe its origin or its use, and do not affect what it computes.
_NO_INFLUENCE = {
    "_name_or_path", "architectures", "dtype", "transformers_version", "use_cache",
    "base_model_name_or_path", "inference_mode", "revision",
}  # fmt: skip


class ReferenceModel:
    """The policy that training starts from: the trainer's model as it is when this is made, its adapter included.

    Its log-probabilities are computed before training and cached, or at every step with a copy of the trained weights.
    The cache has a folder for every policy and in it one for every set of token ids, so that other objectives and data
    sets share it and a killed run continues where it stopped. All ranks make the same calls; the main one reads and
    writes files. ``cache`` is a folder for the log-probabilities (None: in the Hugging Face cache, by the policy's
    fingerprint). :meth:`logps`, :meth:`states` and :meth:`response_logps` need ``copy_weights``.
    """

    def __init__(self, trainer: PackedTrainer, cache: str | None, *, copy_weights: bool) -> None:
        self._trainer, self._cache = trainer, cache
        self._completed: dict[str, Dataset] = {}
        self._frozen = False
        self._weights: list[Tensor] = []
        if copy_weights:
            self.keep_copy()
        if cache is not None:
            self._cache_folder  # noqa: B018 - an error now if it is of another model or precision

    def keep_copy(self) -> None:
        """Keep a copy of the weights, unless there is one."""
        if not self.has_copy:
            self._weights = trained_weights(self._trainer.model)

    @property
    def has_copy(self) -> bool:
        """Whether there is a copy of the weights."""
        return bool(self._weights)

    def freeze(self) -> None:
        """Mark the start of training, after which log-probabilities that are not stored cannot be computed."""
        self._frozen = True

    # ---- Log-probabilities that are computed before training.

    def completed(self, rows: Dataset) -> Dataset:
        """``rows`` with log-probabilities of their responses, and of their mismatched responses if they have them."""
        key = rows._fingerprint
        if key not in self._completed:
            if REF_LOGPS not in rows.column_names:
                rows = rows.add_column(REF_LOGPS, self._cached_logps(rows), feature=List(Value("float64")))
            if MISMATCHED_IDS in rows.column_names and MISMATCHED_REF_LOGP not in rows.column_names:
                logps = [logp for (logp,) in self._cached_logps(mismatched_rows(rows))]
                rows = rows.add_column(MISMATCHED_REF_LOGP, logps, feature=Value("float64"))
            self._completed[key] = rows
        return self._completed[key]

    @cached_property
    def _policy(self) -> str:
        return policy_fingerprint(self._trainer.model, self._trainer.accelerator.mixed_precision)

    @cached_property
    def _cache_folder(self) -> Path:
        folder = Path(constants.HF_HOME) / "simpo" / "reference" / self._policy[:16]
        if self._cache is not None:
            folder = Path(self._cache).expanduser()
        path, main, policy = folder / _POLICY, self._trainer.is_world_process_zero(), None
        if main and path.exists():
            with third_party(f"reference_cache: {path} cannot be read; remove the folder or name another"):
                policy = json.loads(path.read_text())["policy"]
        policy = from_main(policy)
        if policy not in (None, self._policy):
            raise SimpoError(
                f"reference_cache: {folder} holds log-probabilities of another model, or in another precision; "
                "name another folder"
            )
        if main and policy is None:
            write_text(path, json.dumps({"policy": self._policy}))
        return folder

    def _cached_logps(self, rows: Dataset) -> list[list[float]]:
        """The log-probabilities of the responses of every row; those missing from the cache are computed."""
        key, ld_alpha = f"{self._policy} {rows_digest(rows)}", self._trainer.args.ld_alpha
        key += "" if ld_alpha is None else f" ld_alpha {ld_alpha}"
        folder = self._cache_folder / hashlib.sha256(key.encode()).hexdigest()
        counts, main = response_counts(rows), self._trainer.is_world_process_zero()
        parts = [rows.select(range(start, min(start + _ROWS, len(rows)))) for start in range(0, len(rows), _ROWS)]
        paths = [folder / f"{number:05}.json" for number in range(len(parts))]
        sizes = np.add.reduceat(counts, np.arange(0, len(rows), _ROWS))
        chunks: list[Any] = [_read_chunk(*known) for known in zip(paths, sizes, strict=True)] if main else []
        chunks = from_main(chunks)
        missing = [number for number, chunk in enumerate(chunks) if chunk is None]
        done = len(rows) - sum(len(parts[number]) for number in missing)
        bar: Any = nullcontext(lambda count: None)
        if main and missing:
            bar = progress("rows scored by the reference", len(rows), done, logger.warning)
        with bar as advance:
            for number in missing:
                chunks[number] = self._computed_logps(parts[number])
                if main:
                    stored = {"logps": chunks[number], "sha256": fingerprint(chunks[number])}
                    write_text(paths[number], json.dumps(stored))
                advance(len(parts[number]))
        return [part.tolist() for part in np.split(np.concatenate(chunks), np.cumsum(counts)[:-1])]

    def _computed_logps(self, rows: Dataset) -> list[float]:
        if self._frozen:
            raise SimpoError(
                "eval_dataset: rows that the trainer did not have before training, when the reference was there; give "
                "them from the start, or set precompute_ref_log_probs: false"
            )
        logps = self._trainer.response_logps(rows)
        finite = logps.isfinite().cpu().numpy()
        if not finite.all():
            owners = np.repeat(np.arange(len(rows)), response_counts(rows))
            bad = np.unique(owners[~finite]).tolist()
            raise SimpoError(
                f"the reference's log-probability is not finite; rows: {describe_rows(rows, bad)}; fix or remove them"
            )
        return logps.tolist()

    # ---- Log-probabilities that are computed while training.

    def logps(self, packed: PackedBatch) -> Tensor:
        """``[R]`` log-probabilities of the responses of ``packed``."""
        with self.in_place():
            return self._trainer.responses(self._trainer.model, packed).logp

    def states(self, packed: PackedBatch) -> ReferenceStates:
        """The hidden states from which the reference predicts the scored tokens of ``packed``."""
        with self.in_place():
            return reference_states(self._trainer.model, packed, path=self._trainer.path)

    def response_logps(self, rows: Dataset) -> Tensor:
        """``[R]`` log-probabilities of all responses of ``rows``."""
        with self.in_place():
            return self._trainer.response_logps(rows)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the trainer's model the weights of the reference inside the ``with`` block."""
        with swapped_weights(self._trainer.model, self._weights), self._trainer.accelerator.autocast():
            yield


def _read_chunk(path: Path, size: int) -> list[float] | None:
    """A file of the cache; None if it is absent or damaged."""
    if not path.exists():
        return None
    with suppress(SimpoError), third_party(str(path)):
        stored = json.loads(path.read_text())
        logps: list[float] = stored["logps"]
        if stored["sha256"] == fingerprint(logps) and len(logps) == size:
            return logps
    logger.warning("%s is damaged and is computed again", path)
    return None


def policy_fingerprint(model: nn.Module, precision: str) -> str:
    """SHA-256 of what a policy computes: its weights, adapters included, its configuration, and the precision.

    A new adapter, which adds nothing yet, does not change it. All ranks have to call: shards are gathered, one weight
    at a time.
    """
    adapters: Any = getattr(model, "peft_config", None) or {}
    weights = model.state_dict(keep_vars=True)
    if isinstance(model, PeftModel) and (below := unchanged_base_weights(model)) is not None:
        weights, adapters = below, {}
    configs = [config for config in (getattr(model, "config", None),) if config is not None]
    settings = [
        {key: value for key, value in config.to_dict().items() if key not in _NO_INFLUENCE}
        for config in [*configs, *(adapters[name] for name in sorted(adapters))]
    ]

    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, set) else str(value)

    digest = hashlib.sha256(json.dumps([_FORMAT, precision, settings], sort_keys=True, default=plain).encode())
    for name, tensor in sorted(weights.items()):
        if isinstance(tensor, Tensor):
            with gathered(tensor):
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
                digest.update(whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---- A copy of the trained weights, which changes places with them for a while. There is no second adapter that would
# have to be switched to, frozen, and left out of what is saved.


def _trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    reshard(model)  # a forward without a backward leaves some weights gathered
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def trained_weights(model: nn.Module) -> list[Tensor]:
    """A copy of what is trained of ``model``; with an adapter, of the adapter alone. Every rank copies its shards.

    The model must be on its device, and sharded if it is going to be.
    """
    own = [parameter.ds_tensor if is_partitioned(parameter) else parameter for parameter in _trained_parameters(model)]
    return [tensor.detach().clone() for tensor in own]


@contextmanager
def swapped_weights(model: nn.Module, weights: list[Tensor]) -> Iterator[None]:
    """Replace the trained weights of ``model`` inside the ``with`` block, without dropout and gradients."""
    trained, training = _trained_parameters(model), model.training
    own = _exchange_weights(trained, weights)
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        reshard(model)  # what has been gathered belongs to the other weights
        _exchange_weights(trained, own)


@torch.no_grad()
def _exchange_weights(parameters: list[nn.Parameter], weights: list[Tensor]) -> list[Tensor]:
    """Give every parameter its weights; returns what restores the earlier ones."""
    if parameters and is_partitioned(parameters[0]):
        exchange_partitions(parameters, weights)
        return weights
    before = []
    for parameter, tensor in zip(parameters, weights, strict=True):
        if isinstance(parameter, DTensor):  # FSDP gathers from its own memory: numbers are exchanged, not tensors
            own, other = parameter.to_local(), tensor.to_local()  # type: ignore[attr-defined]
            numbers = own.clone()
            own.copy_(other)
            other.copy_(numbers)
            before.append(tensor)
        else:
            before.append(parameter.data)
            parameter.data = tensor
    torch.clear_autocast_cache()  # its half-precision copies are found by the parameter, not by its data
    return before


# ---- KTO's reference point is estimated from every prompt with a response to another prompt.


def with_mismatched(rows: Dataset, max_length: int, label: str) -> Dataset:
    """Tokenized ``rows`` with the column ``mismatched_ids``: for each a response of a row with another prompt.

    The choice depends on the data alone. The rows form a circle, those of one prompt together, and each takes the
    response of the row that is as far ahead as the most frequent prompt has rows: every response is taken once, and
    none is paired with its own prompt. Where that one does not fit, or half of the rows share a prompt, the next one
    that fits is taken.
    """
    if MISMATCHED_IDS in rows.column_names:
        return rows
    numbers: dict[bytes, int] = {}
    batches = rows.select_columns([name for name in ("prompt_ids", DIGESTS) if name in rows.column_names]).iter(1000)
    prompts = (
        np.array(ids, np.int32).tobytes() + "".join(images or ()).encode()
        for batch in batches
        for ids, images in zip(batch["prompt_ids"], batch.get(DIGESTS) or [()] * len(batch["prompt_ids"]), strict=True)
    )
    prompt_of = np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts])
    if not prompt_of.any():
        raise SimpoError(
            f"{label}: all prompts are the same, and KTO's reference point needs responses to other prompts"
        )
    table = rows.with_format("arrow")
    room = max_length - pc.list_value_length(table["prompt_ids"]).to_numpy()
    counts = response_counts(rows)
    response_of = np.cumsum(counts) - counts + np.arange(len(rows)) % counts  # for pairs, chosen and rejected in turn
    responses = pc.list_flatten(table["response_ids"]).take(response_of)
    partner = _partners(prompt_of, room, pc.list_value_length(responses).to_numpy())
    if (partner < 0).any():
        alone = describe_rows(rows, np.flatnonzero(partner < 0).tolist())
        raise SimpoError(
            f"{label}: max_length {max_length} leaves no room for a response to another prompt in {alone}; raise it"
        )
    return rows.add_column(MISMATCHED_IDS, responses.take(partner), feature=TOKENS)


def _partners(prompt_of: np.ndarray, room: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """``[rows]`` the row whose response, of ``sizes[row]`` tokens, each row takes; -1 where none fits."""
    circle = np.argsort(prompt_of, kind="stable")
    ahead = int(np.bincount(prompt_of).max())
    partner = np.full(len(circle), -1)
    for place, row in enumerate(circle):
        for step in range(len(circle)):
            other = circle[(place + ahead + step) % len(circle)]
            if prompt_of[other] != prompt_of[row] and sizes[other] <= room[row]:
                partner[row] = other
                break
    return partner


def mismatched_rows(rows: Dataset) -> Dataset:
    """Every prompt of ``rows`` with its mismatched response only, as tokenized rows."""
    kept = [name for name in ("prompt_ids", IMAGES, DIGESTS) if name in rows.column_names]
    table = rows.select_columns([*kept, MISMATCHED_IDS]).with_format("arrow")[:]
    responses = table[MISMATCHED_IDS].combine_chunks()
    alone = pa.ListArray.from_arrays(np.arange(len(rows) + 1, dtype=np.int32), responses)
    return Dataset(pa.table({**{name: table[name] for name in kept}, "response_ids": alone}))
