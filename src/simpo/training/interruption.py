"""SIGTERM and SIGINT during training: finish the step, save, stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState

from simpo.errors import InterruptedRun
from simpo.training.checkpoints import ends_epoch

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(TrainerCallback):
    """Ends training with a checkpoint after the step in which a signal came; a second signal ends it at once.

    Used as a context manager around ``trainer.train()``; on leaving it raises :class:`InterruptedRun` if a signal came.
    """

    def __init__(self) -> None:
        self.signum = 0
        self.step: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            heard = [signum for signum in _SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]  # nohup ignores some
            self._before = {signum: signal.signal(signum, self._note) for signum in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put_back()
        if error is None and self.step is not None:
            name = signal.Signals(self.signum).name if self.signum else "a signal to another process"
            raise InterruptedRun(
                f"stopped by {name}; saved at step {self.step}: the same command continues",
                self.signum or signal.SIGTERM,
            )

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end if any rank was signalled."""
        if self._any_rank():
            self.step = state.global_step
            control.should_training_stop = True
            control.should_save = not ends_epoch(state)  # else after what is due at the epoch's end

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save after an epoch that has ended; keep one that was broken off from being evaluated as if it had."""
        if self.step is None:
            return
        if ends_epoch(state):
            control.should_save = True
        else:
            control.should_log = control.should_evaluate = control.should_save = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._put_back()

    def _put_back(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def _any_rank(self) -> bool:
        if not (dist.is_available() and dist.is_initialized()):
            return bool(self.signum)
        device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        flag = torch.tensor(self.signum, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
