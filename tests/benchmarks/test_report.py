"""The report's numbers in closed form, and which entrants can take part."""

from __future__ import annotations

import json
import re

import pytest
from benchmarks.compare import entrants_with_different_losses
from benchmarks.entrants import Entrant, entrants, parse_variant, unavailable_reason
from benchmarks.gpu_page import PAGE, update_tables
from benchmarks.measurement import Measurement
from benchmarks.report import print_report, summarize
from benchmarks.setting import Setting
from benchmarks.workers import seconds_at_median_pace

SETTING = Setting("", pairs=4, pairs_per_step=4)
OURS, PEER = Entrant("simpo", "simpo", path="auto"), Entrant("TRL CPO 2x2", "trl cpo", 2)


def measurement(name: str, seconds: float, flops: int, peak_mib: float, loss: float = 1.5) -> Measurement:
    """Return a measurement of 4 pairs with 600 unique tokens."""
    return Measurement(
        name=name,
        seconds=seconds,
        step_seconds=[seconds],
        pairs=4,
        tokens=600,
        losses=[loss, 1.4],
        forwards=2,
        flops=flops,
        flops_recomputed=flops,
        necessary_flops=8_000_000_000,
        peak_flops=10e9,
        peak_mib=peak_mib,
        grown_mib=peak_mib - 100,
        products_seconds=0.5,
    )


RUNS = {
    "simpo": [measurement("simpo", seconds, 10_000_000_000, 500) for seconds in (1.0, 2.0, 1.2)],
    "TRL CPO 2x2": [measurement("TRL CPO 2x2", seconds, 30_000_000_000, 1500) for seconds in (4.0, 6.0, 4.2)],
}
COUNTS = {"prompt_tokens": 400, "response_tokens": 200, "responses": 8, "longest": 90}


def test_ratios_are_medians_over_rounds_next_to_flop_ratios(capsys) -> None:
    report = summarize([OURS, PEER], RUNS, SETTING, counts=COUNTS, absent={"liger": "not installed"})
    ours, peer = report["entrants"]
    assert report["base"] == "simpo"
    assert ours["pairs_per_second"] == pytest.approx(4 / 1.2)
    assert ours["tokens_per_second"] == pytest.approx(600 / 1.2)
    assert ours["utilisation"] == pytest.approx(8 / 1.2 / 10)
    assert ours["products_ratio"] == pytest.approx(1.2 / 0.5)
    assert peer["speed_ratio"] == pytest.approx(3.5)  # the median of 4, 3 and 3.5
    assert (peer["bound"], peer["share"], peer["memory_ratio"]) == (3.0, pytest.approx(3.5 / 3), 3.0)
    json.dumps(report)
    print_report(report)
    printed = capsys.readouterr().out
    assert "Not measured: liger: not installed" in printed
    assert "3.50" in printed and "117%" in printed


def test_a_report_without_measurements() -> None:
    report = summarize([OURS], {}, SETTING, counts=COUNTS, absent={"simpo": "no time was left"})
    assert report["entrants"] == [] and report["base"] is None


@pytest.mark.parametrize("loss", [1.52, float("nan")])
def test_a_different_first_loss_is_detected(loss) -> None:
    runs = RUNS | {"TRL CPO 2x2": [measurement("TRL CPO 2x2", 4.0, 1, 1, loss=loss)]}
    assert entrants_with_different_losses([OURS, PEER], RUNS, tolerance=1e-4) == []
    assert entrants_with_different_losses([OURS, PEER], runs, tolerance=1e-2) == ["simpo", "TRL CPO 2x2"]


def test_different_objectives_may_have_different_losses() -> None:
    runs = RUNS | {"TRL CPO 2x2": [measurement("TRL CPO 2x2", 4.0, 1, 1, loss=0.7)]}
    dpo = Entrant("TRL CPO 2x2", "trl dpo", 2, objective="dpo")
    assert entrants_with_different_losses([OURS, dpo], runs, tolerance=1e-2) == []


def test_peers_are_tuned_over_every_batch_size_that_divides_the_step() -> None:
    setting = Setting("", pairs=6, pairs_per_step=6)
    assert [e.per_device for e in entrants("trl-cpo", setting, [], [])] == [6, 3, 2, 1]
    assert [e.name for e in entrants("trl-cpo", setting, [], [4, 2])] == ["TRL CPO 2x3"]
    dpo = list(entrants("trl-dpo-liger", setting, [], [3]))
    assert [(e.name, e.precomputed, e.liger) for e in dpo] == [
        ("TRL DPO Liger precomputed 3x2", True, True),
        ("TRL DPO Liger 3x2", False, True),
    ]


def test_variants_are_parsed_from_text() -> None:
    ours = parse_variant("512,checkpointed=0.5,compiled")
    assert (ours.max_batch_tokens, ours.checkpointed, ours.compiled, ours.liger) == (512, 0.5, True, False)
    assert list(entrants("simpo", SETTING, [parse_variant("default"), ours], [])) == [OURS, ours]
    assert parse_variant("liger,checkpointed").checkpointed == 1
    for wrong in ("quick", "compiled=2", "4096=1"):
        with pytest.raises(ValueError, match=wrong):
            parse_variant(wrong)


def test_unavailable_entrants_have_a_reason() -> None:
    assert unavailable_reason("sharing", SETTING, 8) is None
    assert unavailable_reason("simpo", SETTING, 8) == "it needs pairs, not 8 responses"
    reason = unavailable_reason("trl-dpo-liger", SETTING, 2)
    assert "CUDA" in reason or "not installed" in reason


def test_a_step_that_compiles_does_not_count() -> None:
    assert seconds_at_median_pace([9.0, 2.0, 1.0, 1.5], [10, 20, 10, 10]) == pytest.approx(50 * 0.125)


def test_the_page_shows_the_measured_results() -> None:
    text = PAGE.read_text()
    assert update_tables(text) == text
    blocks = re.findall(r"<!-- gpu: .*? -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert len(blocks) > 3
    for block in blocks:
        assert update_tables(text.replace(block, re.sub(r"\d", "0", block))) == text
