"""Which of Liger's kernels are used; running them needs a GPU."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

from simpo.errors import SimpoError
from simpo.models import devices

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def installed(monkeypatch):
    """Return a function that pretends Liger and Triton are installed, or not."""
    found = importlib.util.find_spec
    fakes = ("liger_kernel", "triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name in fakes or found(name, *rest))

    def apply_to_llama(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, swiglu=True, model=None):
        pass

    patches = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": apply_to_llama})
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patches)


def test_losses_are_off_and_layers_as_configured(installed):
    off = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert devices.liger_config(None, GPU) == off
    assert devices.liger_config({"rope": False, "cross_entropy": False}, GPU) == {"rope": False} | off


@pytest.mark.parametrize("loss", ["cross_entropy", "fused_linear_cross_entropy"])
def test_liger_losses_are_rejected(installed, loss):
    with pytest.raises(SimpoError, match=f"liger_kernel_config: {loss}"):
        devices.liger_config({loss: True}, GPU)


def test_a_cpu_is_rejected(installed):
    with pytest.raises(SimpoError, match=r"use_liger_kernel: .*cpu"):
        devices.liger_config(None, CPU)


def test_settings_liger_would_ignore_are_rejected(installed, make_model):
    config = devices.liger_config({"rope": False, "swiglu": True}, GPU)
    devices.check_liger(make_model("llama"), config)
    with pytest.raises(SimpoError, match=r"use_liger_kernel: .*'gpt2'"):
        devices.check_liger(make_model("gpt2"), config)
    with pytest.raises(SimpoError, match=r"liger_kernel_config: 'geglu' is not one of rope, swiglu"):
        devices.check_liger(make_model("llama"), config | {"geglu": True})
