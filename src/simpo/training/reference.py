"""Log-probabilities under the policy that training starts from, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub import constants
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from simpo.atomic import write_text
from simpo.errors import SimpoError
from simpo.progress import Advance, progress
from simpo.training.adapters import weights_below
from simpo.training.batches import response_counts
from simpo.training.finite import describe_rows
from simpo.training.identity import rows_digest
from simpo.training.zero import gathered

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
