"""GPUs by name, and speeds fitted to measured operations."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from simpo.errors import SimpoError
from simpo.planning.cards import (
    CARDS,
    Rates,
    find_card,
    fit_rates,
    local_card,
    machine_name,
    store_rates,
    stored_rates,
)
from simpo.planning.memory import Cost
from simpo.planning.settings import PlanSettings


def test_rates_are_recovered_from_times() -> None:
    rates, draw = Rates(2e11, 5e10, 6e9, 2e-5), np.random.default_rng(0)
    samples = []
    for _ in range(6):
        product, attention, moved, operations = (draw.integers(1, 1600, 4) * [200_000, 30_000, 7_000, 1]).tolist()
        cost = Cost(product, attention, moved, operations)
        seconds = product / rates.product + attention / rates.attention + moved / rates.moved + operations * 2e-5
        assert rates.seconds(cost) == pytest.approx(seconds)
        samples.append((cost, seconds))
    found = fit_rates(samples)
    for name in ("product", "attention", "moved", "overhead"):
        assert getattr(found, name) == pytest.approx(getattr(rates, name), rel=1e-6)


def test_rates_that_were_not_measured_are_an_error() -> None:
    """No attention in any sample, and a step that took no time on a coarse clock."""
    with pytest.raises(SimpoError, match=r"calibrate: .*attention"):
        fit_rates([(Cost(200_000, 0, 7_000, 2), 1.0), (Cost(400_000, 0, 14_000, 4), 2.5)])
    with pytest.raises(SimpoError, match=r"calibrate: .*clock"):
        fit_rates([(Cost(200_000, 30_000, 7_000, 3), 1.0), (Cost(400_000, 30_000, 14_000, 5), 0.0)])


def test_rates_are_stored_by_machine(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    assert stored_rates() == {}
    rates = Rates(1e12, 1e11, 1e10, 1e-5)
    here = machine_name(half=False)
    store_rates({here: rates})
    assert stored_rates() == {here: rates}
    another = {machine_name(half=True): replace(rates, overhead=1e-6)}
    store_rates(another)
    assert stored_rates() == {here: rates, **another}


@pytest.mark.parametrize(
    "content",
    ["", "[", "[1]", "[" * 100_000, "{NAME: 1}", '{NAME: {"product": 1}}', "{NAME: [1, 2, 3, 4]}", '"text"']
    + [f'{{NAME: {{"product": 1, "attention": 1, "moved": {value}, "overhead": 1}}}}' for value in ("0", "NaN", '"1"')],
)
def test_damaged_rates_are_reported_and_not_used(tmp_path, monkeypatch, caplog, content) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    path = tmp_path / "simpo" / "plan.json"
    path.parent.mkdir()
    path.write_text(content.replace("NAME", json.dumps(machine_name(half=False))))
    assert stored_rates() == {}
    assert f"{path} is damaged" in caplog.text
    rates = {machine_name(half=False): Rates(1e12, 1e11, 1e10, 1e-5)}
    store_rates(rates)
    assert stored_rates() == rates


@pytest.mark.parametrize("name", ["H100", "h100-80gb", "H100 80GB"])
def test_a_card_has_several_spellings(name) -> None:
    assert find_card(name) == CARDS["H100-80GB"]


@pytest.mark.parametrize(("name", "found"), [("L4", "L4-24GB"), ("A10", "A10-24GB"), ("rtx 4090", "RTX-4090-24GB")])
def test_a_name_without_memory_does_not_match_a_longer_name(name, found) -> None:
    assert find_card(name) == CARDS[found]


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA L40", None),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA RTX A6000", 155e12),
        ("AMD Instinct MI300X", 1307e12),
    ],
)
def test_the_data_sheet_of_the_installed_card_is_used(name, flops, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(name=name, total_memory=4e10))
    card = local_card()
    assert card is not None and card.memory_gb * 2**30 == 4e10
    if flops is None:
        assert card.rates is None
    else:
        assert card.rates.product == pytest.approx(0.54 * flops)


def test_a_card_can_be_described_by_hand() -> None:
    card = find_card("mine", 30, 200, 1.5)
    assert (card.memory_gb, card.tflops, card.terabytes) == (30, 200, 1.5)
    assert find_card("mine", 30, 300).terabytes == 1
    assert find_card("A100-80GB", 70).memory_gb == 70
    with pytest.raises(SimpoError, match="gpu_tflops"):
        find_card("mine", 30)
    with pytest.raises(SimpoError, match="gpu_memory_gb"):
        PlanSettings(gpu="A100-80GB", gpu_memory_gb=-1)
