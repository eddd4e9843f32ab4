"""What transformers, accelerate or an optimizer has to say of settings that are theirs, before anything is begun."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from simpo.errors import SimpoError


@contextmanager
def settings_refused() -> Iterator[None]:
    """Make one line of an error while settings are put to use; keep it to calls in which nothing else can be wrong."""
    try:
        yield
    except SimpoError:
        raise
    except (ImportError, ValueError, TypeError) as error:
        raise SimpoError(f"training is impossible with these settings: {' '.join(str(error).split())[:300]}") from error


def try_optimizer(trainer: Any) -> None:
    """Make optimizer and schedule, which training will make again, and throw them away.

    Args:
        trainer: a ``Trainer`` that has not trained; one that has an optimizer already is left alone.

    Raises:
        SimpoError: they cannot be made with the settings.
    """
    if trainer.optimizer is not None or trainer.is_deepspeed_enabled:
        return
    with settings_refused():
        trainer.create_optimizer_and_scheduler(num_training_steps=2)
    trainer.optimizer = trainer.lr_scheduler = None
