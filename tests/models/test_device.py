"""The default dtype of weights."""

from __future__ import annotations

import torch

from simpo.models.checkpoint import with_dtype
from simpo.models.devices import device
from simpo.models.settings import ModelArguments


def test_the_dtype_follows_the_device_unless_it_is_given(monkeypatch):
    assert with_dtype(ModelArguments("m", dtype="float16")).dtype == "float16"
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert (device(), with_dtype(ModelArguments("m")).dtype) == (torch.device("cpu"), "float32")
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: gpu)
    assert (device(), with_dtype(ModelArguments("m")).dtype) == (gpu, "bfloat16")
