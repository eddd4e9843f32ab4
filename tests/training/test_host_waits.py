"""Host-device synchronization inside a step, detected on a CPU by counting operators that read tensor values."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that return a number, or a data-dependent shape, to the host.
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::unique2"}


class SynchronizationCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().split(".")[0] in WAITING:
            self.found[function.name()] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", ["simpo", "orpo"])
def test_there_is_no_synchronization_inside_a_step(objective, make_trainer, make_model, pairs):
    trainer = make_trainer(pairs(8), model=make_model("llama", torch.float32), objective=objective, max_batch_tokens=40)
    trainer.create_optimizer()
    (step,) = trainer.get_train_dataloader()
    assert len(step["micro_batches"]) == 4
    with SynchronizationCounter() as waits:
        trainer.training_step(trainer.model, step)
    assert not waits.found
    with SynchronizationCounter() as waits:
        assert trainer.model(input_ids=torch.tensor([[3, 4]])).logits.sum().item()
    assert waits.found == {"aten::_local_scalar_dense": 1}  # proves that the counter works
