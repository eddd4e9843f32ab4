"""The reference: the policy that training starts from, asked before its weights move, or kept beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from datasets import Dataset, List, Value
from torch import Tensor

from simpo.errors import SimpoError
from simpo.packing.layout import PackedBatch
from simpo.packing.policy import policy_forward
from simpo.packing.reference import ReferenceStates, reference_states
from simpo.training.batches import MISMATCHED_IDS, MISMATCHED_REF_LOGP, REF_LOGPS
from simpo.training.packed import PackedTrainer
from simpo.training.reference import ReferenceCache, policy_fingerprint
from simpo.training.reference_point import mismatched_rows
from simpo.training.start_weights import add_reference, reference_of


class StartPolicy:
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
            share=self._share,
        )

    def _compute(self, rows: Dataset) -> Tensor:
        if self._left:
            raise SimpoError(
                "eval_dataset: rows that the trainer has not had before training, when the reference was there; give "
                "them from the start, or set precompute_ref_log_probs: false"
            )
        return self._trainer.response_logps(rows)

    def _share(self, value: Any) -> Any:
        return broadcast_object_list([value])[0] if self._trainer.args.world_size > 1 else value

    # ---- beside the model ----

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
