"""The reference model: its weights, its cached log-probabilities, and KTO's reference point."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

from simpo.data.tokenizing import TOKENS
from simpo.errors import SimpoError
from simpo.models.adapters import weights_below
from simpo.models.devices import from_main
from simpo.models.zero import exchange_partitions, gathered, is_partitioned
from simpo.packing.layout import PackedBatch
from simpo.packing.model import policy_forward
from simpo.packing.scoring import ReferenceStates, reference_states
from simpo.runs.atomic import write_text
from simpo.runs.terminal import Advance, progress
from simpo.training.batches import MISMATCHED_IDS, MISMATCHED_REF_LOGP, REF_LOGPS, response_counts
from simpo.training.finite import describe_rows
from simpo.training.identity import rows_digest
from simpo.training.packed import PackedTrainer
from simpo.training.sharding import reshard

logger = logging.getLogger(__name__)


# Raise it when the same weights and tokens get other log-probabilities.
_FORMAT = 2


_ROWS = 512  # of a chunk, which is written whole or computed again


_POLICY = "policy.json"


# Of a model's and an adapter's configuration: where it comes from and how it is used, but not what it computes.
_NO_INFLUENCE = {
    *("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"),
    *("base_model_name_or_path", "inference_mode", "revision"),
}


class ReferenceCache:
    """Log-probabilities of responses under one policy; what a killed run had computed is found again.

    A folder belongs to one policy and has, for every set of token ids, a folder of chunks, so that other objectives and
    data sets share it. All ranks call alike; the main one reads and writes.

    Args:
        folder: where they are kept; None: in the Hugging Face cache, by the policy's fingerprint.
        policy: the policy's :func:`policy_fingerprint`.
        compute: log-probabilities, ``[R]``, of all responses of the rows given, by all ranks together.
        main: whether this rank reads and writes.
        share: gives all ranks what the main one has.

    Raises:
        SimpoError: the folder is of another policy.
    """

    def __init__(
        self,
        folder: Path | None,
        policy: str,
        *,
        compute: Callable[[Dataset], Tensor],
        main: bool,
        share: Callable[[Any], Any],
    ) -> None:
        self.folder = Path(constants.HF_HOME) / "simpo" / "reference" / policy[:16] if folder is None else folder
        self._policy, self._compute, self._main, self._share = policy, compute, main, share
        found = share(self._owner() if main else None)
        if found not in (None, policy):
            raise SimpoError(
                f"reference_cache: {self.folder} holds log-probabilities of another model, or in another precision; "
                "name another folder"
            )
        if main and found is None:
            write_text(self.folder / _POLICY, json.dumps({"policy": policy}))

    def logps(self, rows: Dataset) -> list[list[float]]:
        """For every row the log-probabilities of its responses.

        Raises:
            SimpoError: one is not finite, or the disk is full.
        """
        place = self.folder / hashlib.sha256(f"{self._policy} {rows_digest(rows)}".encode()).hexdigest()
        counts = response_counts(rows)
        starts = range(0, len(rows), _ROWS)
        sizes = [int(counts[start : start + _ROWS].sum()) for start in starts]
        chunks = self._share(_read(place, sizes) if self._main else None)
        missing = [number for number, chunk in enumerate(chunks) if chunk is None]
        parts = [rows.select(range(starts[n], min(starts[n] + _ROWS, len(rows)))) for n in missing]
        with self._progress(len(rows), len(rows) - sum(map(len, parts))) as advance:
            for number, part in zip(missing, parts, strict=True):
                chunks[number] = self._computed(part)
                if self._main:
                    write_text(_path(place, number), json.dumps(chunks[number]))
                advance(len(part))
        return [part.tolist() for part in np.split(np.concatenate(chunks), np.cumsum(counts)[:-1])]

    def _progress(self, total: int, done: int) -> AbstractContextManager[Advance]:
        if done == total or not self._main:
            return nullcontext(lambda count: None)
        return progress("rows scored by the reference", total, done, logger.warning)

    def _computed(self, rows: Dataset) -> list[float]:
        logps = self._compute(rows).tolist()
        if not all(map(math.isfinite, logps)):
            owners = np.repeat(np.arange(len(rows)), response_counts(rows))
            bad = sorted({int(row) for row, logp in zip(owners, logps, strict=True) if not math.isfinite(logp)})
            raise SimpoError(
                f"the reference's log-probability is not finite; rows: {describe_rows(rows, bad)}; fix or remove them"
            )
        return logps

    def _owner(self) -> str | None:
        path = self.folder / _POLICY
        try:
            return json.loads(path.read_text())["policy"] if path.exists() else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SimpoError(f"reference_cache: {path} cannot be read; remove the folder or name another") from error


def policy_fingerprint(model: nn.Module, precision: str) -> str:
    """SHA-256 of what a policy computes: its weights, adapters included, its configuration, and the precision.

    A new adapter, which adds nothing yet, leaves it as it was. All ranks have to call: shards are gathered, one weight
    at a time.
    """
    config = getattr(model, "config", None)
    adapters: Any = getattr(model, "peft_config", None) or {}
    weights = model.state_dict(keep_vars=True)
    if isinstance(model, PeftModel) and (below := weights_below(model)) is not None:
        weights, adapters = below, {}
    parts = [config] if config is not None else []
    settings = [_settings(part) for part in [*parts, *(adapters[name] for name in sorted(adapters))]]
    digest = hashlib.sha256(json.dumps([_FORMAT, precision, settings], sort_keys=True, default=_plain).encode())
    for name, tensor in sorted(weights.items()):
        if isinstance(tensor, Tensor):
            with gathered(tensor):
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
                digest.update(whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _settings(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in _NO_INFLUENCE}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _path(place: Path, number: int) -> Path:
    return place / f"{number:05}.json"


def _read(place: Path, sizes: list[int]) -> list[list[float] | None]:
    """The chunks of a folder; None for one that is absent or damaged."""
    return [_chunk(_path(place, number), size) for number, size in enumerate(sizes)]


def _chunk(path: Path, size: int) -> list[float] | None:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        found = None
    if not isinstance(found, list) or len(found) != size or not all(map(_is_logp, found)):
        logger.warning("%s is damaged and is computed again", path)
        return None
    return found


def _is_logp(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


# ---- What KTO's reference point is estimated from: every prompt with a response to another prompt.


def with_mismatched(rows: Dataset, max_length: int, label: str) -> Dataset:
    """``rows`` with the column ``mismatched_ids``: for each a response of a row with another prompt.

    Which one depends on the data alone. The rows stand in a circle, those of one prompt together, and each takes the
    response of the row that stands as far ahead as the most frequent prompt has rows: all are taken once, and none
    meets its own prompt. Where that one does not fit, or half of the rows share a prompt, the next one that does is
    taken.

    Args:
        rows: tokenized.
        max_length: most tokens of a prompt with its mismatched response.
        label: names the data set in messages.

    Raises:
        SimpoError: all prompts are the same, or no response to another prompt fits after one.
    """
    if MISMATCHED_IDS in rows.column_names:
        return rows
    prompt_of = _numbered_prompts(rows)
    if not prompt_of.any():
        raise SimpoError(
            f"{label}: all prompts are the same, and KTO's reference point needs responses to other prompts"
        )
    table = rows.with_format("arrow")
    room = max_length - pc.list_value_length(table["prompt_ids"]).to_numpy()
    counts = response_counts(rows)
    response_of = np.cumsum(counts) - counts + np.arange(len(rows)) % counts  # of pairs chosen and rejected in turn
    responses = pc.list_flatten(table["response_ids"]).take(response_of)
    partner = _partners(prompt_of, room, pc.list_value_length(responses).to_numpy())
    if (partner < 0).any():
        alone = describe_rows(rows, np.flatnonzero(partner < 0).tolist())
        raise SimpoError(
            f"{label}: max_length {max_length} leaves no room for a response to another prompt in {alone}; raise it"
        )
    return rows.add_column(MISMATCHED_IDS, responses.take(partner), feature=TOKENS)


def _numbered_prompts(rows: Dataset) -> np.ndarray:
    """``[rows]`` the number of each row's prompt, in the order in which they first occur."""
    numbers: dict[bytes, int] = {}
    prompts = (ids for batch in rows.select_columns("prompt_ids").iter(1000) for ids in batch["prompt_ids"])
    return np.array([numbers.setdefault(np.array(ids, np.int32).tobytes(), len(numbers)) for ids in prompts])


def _partners(prompt_of: np.ndarray, room: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """``[rows]`` whose response each row takes; -1 where none fits. ``sizes`` ``[rows]`` are the responses' lengths."""
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
    table = rows.select_columns(["prompt_ids", MISMATCHED_IDS]).with_format("arrow")[:]
    responses = table[MISMATCHED_IDS].combine_chunks()
    alone = pa.ListArray.from_arrays(np.arange(len(rows) + 1, dtype=np.int32), responses)
    return Dataset(pa.table({"prompt_ids": table["prompt_ids"], "response_ids": alone}))


# ---- The weights that training started from, next to those that are trained: the two are swapped for a while.


_START = "_simpo_start"


def add_reference(model: nn.Module) -> None:
    """Keep a copy of what ``model`` trains as it is now, for :func:`reference_of`: with an adapter, of that alone.

    Call it before anything has been trained or read from a checkpoint, when the model is on its device, and sharded if
    it is going to be: then every rank keeps its shards.
    """
    own = [parameter.ds_tensor if is_partitioned(parameter) else parameter for parameter in _trained(model)]
    setattr(model, _START, [tensor.detach().clone() for tensor in own])


@contextmanager
def reference_of(model: nn.Module) -> Iterator[None]:
    """``model`` is the policy that training started from, without dropout and gradients, while this lasts.

    Of a new adapter that is the base model, of a continued one the adapter as it was. The weights that are trained
    change places with their copy: there is no second adapter to be switched to, frozen, or left out of what is saved.
    """
    trained, training = _trained(model), model.training
    now = _exchange(trained, getattr(model, _START))
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        reshard(model)  # what has been gathered is the start's
        _exchange(trained, now)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    reshard(model)  # a forward without a backward leaves weights gathered in part
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _exchange(parameters: list[nn.Parameter], data: list[Tensor]) -> list[Tensor]:
    """Give every parameter its ``data``; returns what gives them back what they had."""
    if parameters and is_partitioned(parameters[0]):
        exchange_partitions(parameters, data)
        return data
    before = [_give(parameter, tensor) for parameter, tensor in zip(parameters, data, strict=True)]
    torch.clear_autocast_cache()  # it knows a weight's half-precision copy by the parameter, not by its data
    return before


@torch.no_grad()
def _give(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):  # FSDP gathers from memory of its own: the numbers change places in it
        own, other = parameter.to_local(), tensor.to_local()  # type: ignore[attr-defined]
        numbers = own.clone()
        own.copy_(other)
        other.copy_(numbers)
        return tensor
    before, parameter.data = parameter.data, tensor
    return before


# ---- The reference: the policy that training starts from, asked before its weights change, or kept next to them.


class ReferenceModel:
    """A trainer's model as it is when this is made, its adapter included.

    Args:
        trainer: one whose model has not been trained yet.
        folder: where its log-probabilities are kept; None: in the Hugging Face cache.
        beside: the key that asks for a copy of the weights that are trained; None if none does, and :meth:`logps` and
            :meth:`states` will not be called.
    """

    def __init__(self, trainer: PackedTrainer, folder: str | None, beside: str | None) -> None:
        self._trainer, self._folder = trainer, folder
        self._completed: dict[str, Dataset] = {}
        self._left = False
        if beside is not None:
            add_reference(trainer.model)

    # ---- asked before training ----

    def completed(self, rows: Dataset) -> Dataset:
        """``rows`` with its log-probabilities of their responses, the mismatched ones included; all ranks call.

        Raises:
            SimpoError: rows that are neither known nor in the cache, after :meth:`leave`.
        """
        key = rows._fingerprint
        if key not in self._completed:
            self._completed[key] = self._with_logps(rows)
        return self._completed[key]

    def open_cache(self) -> None:
        """Find out now whether the cache can be used; all ranks call.

        Raises:
            SimpoError: it is of another model or precision.
        """
        self._cache  # noqa: B018 - opening is the check

    def leave(self) -> None:
        """From now on the weights move."""
        self._left = True

    def _with_logps(self, rows: Dataset) -> Dataset:
        if REF_LOGPS not in rows.column_names:
            rows = rows.add_column(REF_LOGPS, self._cache.logps(rows), feature=List(Value("float64")))
        if MISMATCHED_IDS in rows.column_names and MISMATCHED_REF_LOGP not in rows.column_names:
            logps = [logp for (logp,) in self._cache.logps(mismatched_rows(rows))]
            rows = rows.add_column(MISMATCHED_REF_LOGP, logps, feature=Value("float64"))
        return rows

    @cached_property
    def _cache(self) -> ReferenceCache:
        return ReferenceCache(
            None if self._folder is None else Path(self._folder).expanduser(),
            policy_fingerprint(self._trainer.model, self._trainer.accelerator.mixed_precision),
            compute=self._compute,
            main=self._trainer.is_world_process_zero(),
            share=from_main,
        )

    def _compute(self, rows: Dataset) -> Tensor:
        if self._left:
            raise SimpoError(
                "eval_dataset: rows that the trainer has not had before training, when the reference was there; give "
                "them from the start, or set precompute_ref_log_probs: false"
            )
        return self._trainer.response_logps(rows)

    # ---- a copy of the weights next to the model ----

    def logps(self, packed: PackedBatch) -> Tensor:
        """``[R]`` its log-probabilities of the responses of ``packed``."""
        with self._in_place():
            return policy_forward(self._trainer.model, packed, path=self._trainer.path).logp

    def states(self, packed: PackedBatch) -> ReferenceStates:
        """What it predicts the scored tokens of ``packed`` from."""
        with self._in_place():
            return reference_states(self._trainer.model, packed, path=self._trainer.path)

    def response_logps(self, rows: Dataset) -> Tensor:
        """``[R]`` its log-probabilities of all responses of ``rows``; all ranks call."""
        with self._in_place():
            return self._trainer.response_logps(rows)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        with reference_of(self._trainer.model), self._trainer.accelerator.autocast():
            yield
