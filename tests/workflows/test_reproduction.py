"""The registered studies, the decision rule, one real trial against closed forms, and the page in a browser."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from tests.browser import Browser, chromium
from tests.forked import run_ranks

from simpo.cli import main
from simpo.errors import InterruptedRun, SimpoError
from simpo.runs.files import JsonLines
from simpo.runs.terminal import interruptible
from simpo.training.configs import PreferenceConfig
from simpo.workflows.recipes import PAPER_SETTINGS
from simpo.workflows.reproduction import run
from simpo.workflows.reproduction.run import Result, Trials, plan, render
from simpo.workflows.reproduction.study import (
    LENGTH_BIASED,
    METRICS,
    OFF_POLICY,
    ON_POLICY,
    TUNING,
    Arm,
    Claim,
    Trial,
    decide,
    read_studies,
    run_trial,
)
from simpo.world.pairs import write_model, write_pairs, write_prompts


def test_registered_studies_can_be_run(tmp_path: Path):
    studies = read_studies()
    assert [study.number for study in studies] == list(range(1, 11))
    for study in studies:
        for claim in study.claims:
            assert claim.metric in METRICS
            assert {side for side in (claim.better, claim.than) if isinstance(side, str)} <= {*study.arms, "others"}
        for arm in study.arms.values():
            for candidate in arm.candidates():
                trial = arm.trial(candidate, study.seeds[0])
                assert trial.pairs in (ON_POLICY, OFF_POLICY, LENGTH_BIASED)
                PreferenceConfig(str(tmp_path), use_cpu=True, **trial.settings)
    table = next(study for study in studies if study.name == "objectives")
    assert len(table.arms) == 9
    assert all(len(arm.tuning_trials()) == 3 for arm in table.arms.values())
    assert len(table.seeds) >= 5


def test_studies_are_found_by_name_and_number():
    assert [study.name for study in read_studies(["3", "objectives"])] == ["objectives", "gamma"]
    with pytest.raises(SimpoError, match="ablation"):
        read_studies(["ablatoin"])


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([0.60, 0.62, 0.61, 0.63, 0.60], [0.50, 0.52, 0.50, 0.53, 0.51], "holds"),
        ([0.50, 0.52, 0.50, 0.53, 0.51], [0.60, 0.62, 0.61, 0.63, 0.60], "does not hold here"),
        ([0.50, 0.60, 0.40, 0.55, 0.45], [0.49, 0.61, 0.41, 0.54, 0.46], "inconclusive"),
        ([1.0] * 3, [0.5] * 3, "holds"),
        ([0.5] * 3, [0.5] * 3, "inconclusive"),
        ([0.9], [0.1], "inconclusive"),
    ],
)
def test_the_rule_is_a_paired_t_interval(a: list[float], b: list[float], verdict: str):
    measured = {"a": {"win_rate": np.array(a)}, "b": {"win_rate": np.array(b)}}
    outcome = decide(Claim("", "win_rate", "a", "b"), measured)
    assert outcome.verdict == verdict
    found = outcome.differences["b"]
    if found.low is not None:
        expected = stats.ttest_rel(a, b).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_a_claim_about_all_others_needs_every_one():
    def measured(**means: float) -> dict:
        noise = np.array([-0.01, 0.0, 0.01])
        return {name: {"win_rate": mean + noise * (1 + mean)} for name, mean in means.items()}

    claim = Claim("", "win_rate", "a", "others")
    assert decide(claim, measured(a=0.9, b=0.5, c=0.6)).verdict == "holds"
    assert decide(claim, measured(a=0.9, b=0.5, c=0.9)).verdict == "inconclusive"
    assert decide(claim, measured(a=0.5, b=0.4, c=0.9)).verdict == "does not hold here"
    assert decide(Claim("", "win_rate", "a", 0.5), measured(a=0.9)).verdict == "holds"
    assert decide(Claim("", "win_rate", 0.5, "a"), measured(a=0.9)).verdict == "does not hold here"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_model(folder / "sft", 0)
    write_pairs(folder / f"{ON_POLICY}.jsonl", 48, 0)
    write_pairs(folder / "held-out-pairs.jsonl", 12, 0, held_out=True)
    write_prompts(folder / "held-out.jsonl", 4, 0, held_out=True)
    return folder


def test_a_model_that_does_not_learn_equals_its_initial_model(base: Path):
    found = run_trial(base, Trial({"objective": "simpo", "learning_rate": 0.0}, ON_POLICY, 1))
    assert set(found) == set(METRICS)
    assert found["win_rate"] == 0.5
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["ranking_agreement"] == 1  # SimPO's reward is beta times the average log-probability


def test_trials_are_exact_and_stored_once(base: Path, tmp_path: Path):
    trial = Trial({"objective": "dpo", "learning_rate": 1e-3}, ON_POLICY, 2)
    found = [{key: value for key, value in run_trial(base, trial).items() if key != "seconds"} for _ in range(2)]
    assert found[0] == found[1]
    assert found[0]["kl"] > 1e-4
    assert (
        len({Trial({}, "p", 1).key, Trial({}, "p", 2).key, Trial({}, "q", 1).key, Trial({}, "p", 1, TUNING).key}) == 4
    )
    arm = Arm("dpo", {"objective": "dpo", "grid": {"learning_rate_times": [1, 2]}}, 1e-3)
    trials = Trials(tmp_path, 1, print)
    lines = [
        {"key": one.key, "metrics": dict.fromkeys(METRICS, 0.25 * number)}
        for number, one in enumerate([*arm.tuning_trials(), trial], 1)
    ]
    trials._lines.append(lines)
    again = Trials(tmp_path, 1, print)
    again.run([*arm.tuning_trials(), trial])  # nothing is left to do
    assert len(again._lines) == 3
    assert again.best(arm)["learning_rate_times"] == 2
    assert again.measured([trial, trial])["kl"].tolist() == [0.75, 0.75]


def endless_after_the_first(base: Path, trial: Trial) -> dict[str, float]:
    """A trial that writes its own and its parent's process id to a scratch file and then never ends."""
    if trial.seed:
        run_trial(base, trial)
        (Path(tempfile.gettempdir()) / f"busy-{os.getppid()}-{os.getpid()}").touch()
        time.sleep(1000)
    return dict.fromkeys(METRICS, 0.5)


def run_four(folder: Path) -> int:
    tempfile.tempdir = str(folder / "scratch")
    run.run_trial = endless_after_the_first
    settings = {"objective": "simpo", "learning_rate": 1e-3}
    try:
        with interruptible():
            Trials(folder, 1, print).run([Trial(settings, ON_POLICY, seed) for seed in range(4)])
    except InterruptedRun as error:
        return error.exit_code
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_does_not_wait_for_trials(base: Path, tmp_path: Path, signum: int):
    """Neither for the running one nor for those queued in its process; finished trials are kept."""
    (tmp_path / "base").symlink_to(base)
    (tmp_path / "scratch").mkdir()
    sent: list[float | int] = []

    def send_when_busy() -> None:
        while not (busy := list(tmp_path.glob("scratch/*/busy-*"))):
            time.sleep(0.1)
        _, parent, trial = busy[0].name.split("-")
        sent.extend([time.monotonic(), int(trial)])
        os.kill(int(parent), signum)

    threading.Thread(target=send_when_busy, daemon=True).start()
    found = run_ranks(1, run_four, tmp_path, folder=tmp_path)
    assert found.codes == [143 if signum == signal.SIGTERM else -signal.SIGKILL], found.stderr
    assert time.monotonic() - sent[0] < 10  # takes about one second unless the machine is busy
    while Path(f"/proc/{sent[1]}/cmdline").exists() and Path(f"/proc/{sent[1]}/cmdline").read_bytes():  # no zombie
        assert time.monotonic() - sent[0] < 30
        time.sleep(0.1)
    if signum == signal.SIGTERM:
        assert not any((tmp_path / "scratch").iterdir())
    assert [line["trial"]["seed"] for line in JsonLines(tmp_path / "trials.jsonl", checked=True)] == [0]


def test_studies_from_earlier_calls_are_recognized_by_their_trials(tmp_path: Path):
    objectives, ablation, *_ = read_studies()
    trials = Trials(tmp_path, 1, print)
    *most, last = [arm.trial(arm.candidates()[0], seed) for arm in ablation.arms.values() for seed in ablation.seeds]
    metrics = dict.fromkeys(METRICS, 0.5)
    trials._lines.append([{"key": trial.key, "metrics": metrics} for trial in most])
    assert not Trials(tmp_path, 1, print).has_finished(ablation)
    trials._lines.append([{"key": last.key, "metrics": metrics}])
    again = Trials(tmp_path, 1, print)
    assert again.has_finished(ablation) and not again.has_finished(objectives)
    assert [trial.key for trial in again.final_trials(ablation)] == [trial.key for trial in [*most, last]]


def test_the_plan_for_real_models_uses_our_commands(capsys: pytest.CaptureFixture):
    lines = list(plan(read_studies(), "llama3-base"))
    commands = [line for line in lines if line.startswith(("simpo", "for"))]
    assert sum(line.startswith("simpo recipe") for line in commands) == 9
    assert any("--learning_rate 6e-05" in line for line in commands)  # a hundred times the published 6e-7
    assert any("--gamma_beta_ratio 2.0" in line for line in commands)
    assert all(PAPER_SETTINGS["llama3-base"].model in line for line in commands if line.startswith("for"))
    assert main(["reproduce", "1", "--setting", "llama-3"]) == 2
    assert "llama3-base" in capsys.readouterr().err
    assert main(["reproduce", "nothing", "--output_dir", "/nowhere"]) == 2


@pytest.mark.parametrize("seeds", [3, 1])
def test_the_page_states_the_number_of_seeds_and_undefined_results(seeds: int):
    (study,) = read_studies(["gamma"])
    metric, first = study.claims[0].metric, next(iter(study.arms))
    measured = {name: {one: np.linspace(0.1, 0.9, seeds) for one in METRICS} for name in study.arms}
    measured[first][metric][-1] = np.nan
    outcomes = [decide(claim, measured) for claim in study.claims]
    page = render([Result(study, {name: {} for name in study.arms}, measured, outcomes)])
    assert f"measured with {seeds} training seed" in page and "five" not in page
    assert not re.search(r"\bnan\b|None", page)
    assert f"undefined for 1 of {seeds} seeds" in page
    figure = page[page.index("<figure>") : page.index("</figure>")]
    assert figure.count('class="dot"') == len(study.arms) - 1


def test_the_page_shows_every_study_and_executes_nothing(tmp_path: Path):
    chromium()
    studies = read_studies()
    hostile = "<script>document.title = 'x'</script>"
    rng = np.random.default_rng(0)
    results = []
    for study in studies:
        measured = {name: {metric: rng.random(5) for metric in METRICS} for name in study.arms}
        outcomes = [decide(claim, measured) for claim in study.claims]
        results.append(Result(study, {name: {"objective": hostile} for name in study.arms}, measured, outcomes))
    (tmp_path / "page.html").write_text(render(results), encoding="utf-8")
    with Browser(tmp_path) as browser:
        for width, dark in ((1400, False), (380, True)):
            page = browser.open((tmp_path / "page.html").as_uri(), width=width, dark=dark)
            page.wait("document.readyState == 'complete' && document.querySelectorAll('section').length == 10")
            assert page.evaluate("document.title") == "simpo reproduce"
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            claims = sum(len(study.claims) for study in studies)
            assert page.evaluate("document.querySelectorAll('.claims li').length") == claims
            assert page.complaints == []
            assert {url.partition(":")[0] for url in page.requests} <= {"file", "data"}
