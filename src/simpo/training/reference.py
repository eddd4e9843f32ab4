"""The reference model: the start policy, as precomputed log-probabilities or as a copy of its weights."""

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

_FORMAT = 2  # version of the cache; increase it whenever the same weights and tokens give other log-probabilities
_ROWS_PER_FILE = 512  # each cache file is written atomically
_POLICY = "policy.json"
# Keys of a model or adapter configuration that do not affect what the model computes.
_METADATA_KEYS = {
    "_name_or_path", "architectures", "dtype", "transformers_version", "use_cache",
    "base_model_name_or_path", "inference_mode", "revision",
}  # fmt: skip


class ReferenceModel:
    """The policy at the start of training: the trainer's model at construction time, including its adapter.

    Its log-probabilities are computed before training and cached, or computed at every step with a copy of the trained
    weights. The cache has one folder per policy and in it one per set of token ids, so objectives and datasets can
    share it, and a killed run continues where it stopped. Every rank must make the same calls; the main one reads and
    writes files. ``cache`` is a folder for the log-probabilities (None: inside the Hugging Face cache, named after the
    policy's fingerprint). :meth:`logps`, :meth:`states` and :meth:`response_logps` need ``copy_weights``.
    """

    def __init__(self, trainer: PackedTrainer, cache: str | None, *, copy_weights: bool) -> None:
        self._trainer, self._cache = trainer, cache
        self._with_logps: dict[str, Dataset] = {}
        self._frozen = False
        self._weights: list[Tensor] = []
        if copy_weights:
            self.keep_copy()
        if cache is not None:
            self._cache_folder  # noqa: B018 - fail now if it belongs to another model or precision

    def keep_copy(self) -> None:
        """Copy the trained weights unless there already is a copy."""
        if not self.has_copy:
            self._weights = trained_weights(self._trainer.model)

    @property
    def has_copy(self) -> bool:
        """Whether a copy of the weights exists."""
        return bool(self._weights)

    def freeze(self) -> None:
        """Mark the start of training; from then on, only cached log-probabilities are available."""
        self._frozen = True

    # ---- Log-probabilities computed before training.

    def add_logps(self, rows: Dataset) -> Dataset:
        """Add the log-probabilities of the rows' responses and of any mismatched responses."""
        key = rows._fingerprint
        if key not in self._with_logps:
            if REF_LOGPS not in rows.column_names:
                rows = rows.add_column(REF_LOGPS, self._cached_logps(rows), feature=List(Value("float64")))
            if MISMATCHED_IDS in rows.column_names and MISMATCHED_REF_LOGP not in rows.column_names:
                logps = [logp for (logp,) in self._cached_logps(mismatched_rows(rows))]
                rows = rows.add_column(MISMATCHED_REF_LOGP, logps, feature=Value("float64"))
            self._with_logps[key] = rows
        return self._with_logps[key]

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
            with third_party(f"reference_cache: {path} cannot be read; delete the folder or use another one"):
                policy = json.loads(path.read_text())["policy"]
        policy = from_main(policy)
        if policy not in (None, self._policy):
            raise SimpoError(
                f"reference_cache: {folder} holds log-probabilities of another model or precision; use another folder"
            )
        if main and policy is None:
            write_text(path, json.dumps({"policy": self._policy}))
        return folder

    def _cached_logps(self, rows: Dataset) -> list[list[float]]:
        """Return the log-probabilities of every row's responses, computing those missing from the cache."""
        key, ld_alpha = f"{self._policy} {rows_digest(rows)}", self._trainer.args.ld_alpha
        key += "" if ld_alpha is None else f" ld_alpha {ld_alpha}"
        folder = self._cache_folder / hashlib.sha256(key.encode()).hexdigest()
        counts, main = response_counts(rows), self._trainer.is_world_process_zero()
        starts = range(0, len(rows), _ROWS_PER_FILE)
        parts = [rows.select(range(start, min(start + _ROWS_PER_FILE, len(rows)))) for start in starts]
        paths = [folder / f"{number:05}.json" for number in range(len(parts))]
        sizes = np.add.reduceat(counts, starts)
        chunks: list[Any] = list(map(_read_chunk, paths, sizes)) if main else []
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
                "eval_dataset: new rows cannot be scored by the reference once training has changed the weights; pass "
                "them from the start, or set precompute_ref_log_probs: false"
            )
        logps = self._trainer.response_logps(rows)
        finite = logps.isfinite().cpu().numpy()
        if not finite.all():
            owners = np.repeat(np.arange(len(rows)), response_counts(rows))
            places = describe_rows(rows, np.unique(owners[~finite]).tolist())
            raise SimpoError(f"the reference's log-probability is not finite; rows: {places}; fix or remove them")
        return logps.tolist()

    # ---- Log-probabilities computed during training.

    def logps(self, packed: PackedBatch) -> Tensor:
        """Return the log-probabilities of the responses in ``packed``, ``[R]``."""
        with self.in_place():
            return self._trainer.responses(self._trainer.model, packed).logp

    def states(self, packed: PackedBatch) -> ReferenceStates:
        """Return the hidden states from which the reference predicts the scored tokens of ``packed``."""
        with self.in_place():
            return reference_states(self._trainer.model, packed, path=self._trainer.path)

    def response_logps(self, rows: Dataset) -> Tensor:
        """Return the log-probabilities of all responses in ``rows``, ``[R]``."""
        with self.in_place():
            return self._trainer.response_logps(rows)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the trainer's model the reference weights inside the ``with`` block."""
        with swapped_weights(self._trainer.model, self._weights), self._trainer.accelerator.autocast():
            yield


def _read_chunk(path: Path, size: int) -> list[float] | None:
    """Read a cache file; return None if it is missing or damaged."""
    if not path.exists():
        return None
    with suppress(SimpoError), third_party(str(path)):
        stored = json.loads(path.read_text())
        logps: list[float] = stored["logps"]
        if stored["sha256"] == fingerprint(logps) and len(logps) == size:
            return logps
    logger.warning("%s is damaged; computing it again", path)
    return None


def policy_fingerprint(model: nn.Module, precision: str) -> str:
    """Return the SHA-256 of everything a policy's outputs depend on: weights, adapters, configuration and precision.

    A new adapter that adds nothing yet does not change it. Every rank must call this, because shards are gathered, one
    weight at a time.
    """
    adapters: Any = getattr(model, "peft_config", None) or {}
    weights = model.state_dict(keep_vars=True)
    if isinstance(model, PeftModel) and (base := unchanged_base_weights(model)) is not None:
        weights, adapters = base, {}
    configs = [config for config in (getattr(model, "config", None),) if config is not None]
    settings = [
        {key: value for key, value in config.to_dict().items() if key not in _METADATA_KEYS}
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


# ---- A copy of the trained weights that is temporarily swapped in. Unlike a second adapter, it does not have to be
# switched to, frozen, or left out when saving.


def _trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    reshard(model)  # a forward pass without backward leaves some weights gathered
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def trained_weights(model: nn.Module) -> list[Tensor]:
    """Copy the trained weights of ``model`` (with an adapter, only the adapter's). Every rank copies its own shards.

    The model must already be on its device and, if it is going to be sharded, already sharded.
    """
    parameters = _trained_parameters(model)
    return [(one.ds_tensor if is_partitioned(one) else one).detach().clone() for one in parameters]


@contextmanager
def swapped_weights(model: nn.Module, weights: list[Tensor]) -> Iterator[None]:
    """Replace the trained weights of ``model`` inside the ``with`` block, with dropout and gradients disabled."""
    trained, training = _trained_parameters(model), model.training
    original = _exchange_weights(trained, weights)
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        reshard(model)  # gathered parameters still hold the replacement weights
        _exchange_weights(trained, original)


@torch.no_grad()
def _exchange_weights(parameters: list[nn.Parameter], weights: list[Tensor]) -> list[Tensor]:
    """Load ``weights`` into the parameters and return what restores the previous ones."""
    if parameters and is_partitioned(parameters[0]):
        exchange_partitions(parameters, weights)
        return weights
    before = []
    for parameter, tensor in zip(parameters, weights, strict=True):
        if isinstance(parameter, DTensor):  # FSDP gathers from its own memory, so swap values instead of tensors
            current, other = parameter.to_local(), tensor.to_local()  # type: ignore[attr-defined]
            values = current.clone()
            current.copy_(other)
            other.copy_(values)
            before.append(tensor)
        else:
            before.append(parameter.data)
            parameter.data = tensor
    torch.clear_autocast_cache()  # its half-precision copies are keyed by parameter, not by its data
    return before


# ---- KTO's reference point, estimated by pairing every prompt with a response to another prompt.


def with_mismatched(rows: Dataset, max_length: int, label: str) -> Dataset:
    """Add the column ``mismatched_ids`` to tokenized rows: for each row, a response to another prompt.

    The choice depends only on the data. Rows are arranged in a circle, grouped by prompt, and each takes the response
    as many rows ahead as the most frequent prompt has rows: every response is used once, and never with its own
    prompt. If that response does not fit, or more than half of the rows share a prompt, the next suitable one is used.
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
            f"{label}: all prompts are the same, but KTO's reference point needs responses to other prompts"
        )
    table = rows.with_format("arrow")
    room = max_length - pc.list_value_length(table["prompt_ids"]).to_numpy()
    counts = response_counts(rows)
    response_of = np.cumsum(counts) - counts + np.arange(len(rows)) % counts  # for pairs, alternately chosen, rejected
    responses = pc.list_flatten(table["response_ids"]).take(response_of)
    partner = _partners(prompt_of, room, pc.list_value_length(responses).to_numpy())
    if (partner < 0).any():
        places = describe_rows(rows, np.flatnonzero(partner < 0).tolist())
        raise SimpoError(
            f"{label}: max_length {max_length} leaves no room for a response to another prompt in {places}; raise it"
        )
    return rows.add_column(MISMATCHED_IDS, responses.take(partner), feature=TOKENS)


def _partners(prompt_of: np.ndarray, room: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return for each row the row whose response (of ``sizes[row]`` tokens) it takes, ``[rows]``; -1 if none fits."""
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
    """Return tokenized rows that pair every prompt with only its mismatched response."""
    names = [name for name in ("prompt_ids", IMAGES, DIGESTS) if name in rows.column_names]
    table = rows.select_columns([*names, MISMATCHED_IDS]).with_format("arrow")[:]
    responses = table[MISMATCHED_IDS].combine_chunks()
    single = pa.ListArray.from_arrays(np.arange(len(rows) + 1, dtype=np.int32), responses)
    return Dataset(pa.table({**{name: table[name] for name in names}, "response_ids": single}))
