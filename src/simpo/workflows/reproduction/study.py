"""Studies as they are registered in ``studies.yaml``, and the rule that decides about their claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from simpo.config.coercion import nearest
from simpo.errors import SimpoError
from simpo.statistics import Interval, mean_interval
from simpo.workflows.reproduction.trial import TUNING, Trial

REGISTERED = Path(__file__).parent / "studies.yaml"
METRICS = (
    *("win_rate", "score", "correct", "tokens", "ended", "accuracy", "ranking_agreement"),
    *("reward_length_rho", "kl", "seconds"),
)
_TUNING_SEED = 0
_OWN_KEYS = ("grid", "pairs", "learning_rate_times")

Verdict = Literal["holds", "does not hold here", "inconclusive"]
# Numbers of an arm by metric, one for each seed.
Measured = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: on the whole, ``better`` has a larger ``metric`` than ``than``."""

    claim: str  # the claim as a sentence
    metric: str  # the metric that is compared
    better: str | float  # an arm, or a number
    than: str | float  # an arm, a number, or `others` for every other arm


@dataclass(frozen=True)
class Arm:
    """One model of a study."""

    name: str  # in the study
    given: Mapping[str, Any]  # keys as registered
    learning_rate: float  # of the tiny world, before `learning_rate_times`

    def candidates(self) -> list[dict[str, Any]]:
        """The settings to choose from: one, or all combinations of the grid."""
        grid = self.given.get("grid", {})
        fixed = {key: value for key, value in self.given.items() if key != "grid"}
        return [fixed | dict(zip(grid, values, strict=True)) for values in product(*grid.values())]

    def trial(self, candidate: Mapping[str, Any], seed: int) -> Trial:
        """A trial of one of the candidates on the held-out prompts."""
        settings = {key: value for key, value in candidate.items() if key not in _OWN_KEYS}
        settings["learning_rate"] = self.learning_rate * candidate.get("learning_rate_times", 1)
        return Trial(settings, candidate.get("pairs", "on-policy"), seed)

    def tuning_trials(self) -> list[Trial]:
        """A trial of each candidate on the tuning prompts; none if there is nothing to choose."""
        found = [self.trial(candidate, _TUNING_SEED) for candidate in self.candidates()]
        return [Trial(one.settings, one.pairs, one.seed, TUNING) for one in found] if len(found) > 1 else []


@dataclass(frozen=True)
class Study:
    """One study."""

    number: int  # its place in the file, from 1
    name: str  # by which it is chosen
    title: str  # the question
    source: str  # where the paper has it
    arms: Mapping[str, Arm]  # the models by name
    claims: Sequence[Claim]  # what is tested
    seeds: Sequence[int]  # of the trials


@dataclass(frozen=True)
class Outcome:
    """The outcome of a claim: the difference with its interval, against each arm or number, and the verdict."""

    claim: Claim
    differences: Mapping[str, Interval]
    verdict: Verdict


def read_studies(chosen: Sequence[str] = ()) -> list[Study]:
    """The registered studies, or those with the chosen names or numbers."""
    document = yaml.safe_load(REGISTERED.read_text(encoding="utf-8"))
    studies = []
    for number, entry in enumerate(document["studies"], 1):
        arms = {name: Arm(name, given, document["learning_rate"]) for name, given in entry["arms"].items()}
        claims = [Claim(**claim) for claim in entry["claims"]]
        name, title, source = (entry[key] for key in ("name", "title", "source"))
        studies.append(Study(number, name, title, source, arms, claims, document["seeds"]))
    known = {str(study.number): study for study in studies} | {study.name: study for study in studies}
    for name in chosen:
        if name not in known:
            names = [study.name for study in studies]
            hint = nearest(name, names) or f"; the studies are 1 to {len(studies)}: {', '.join(names)}"
            raise SimpoError(f"study {name!r} is unknown{hint}")
    wanted = {known[name].number for name in chosen} or {study.number for study in studies}
    return [study for study in studies if study.number in wanted]


def decide(claim: Claim, measured: Mapping[str, Measured]) -> Outcome:
    """Apply the rule at the end of ``studies.yaml``."""

    def values(side: str | float) -> np.ndarray:
        return measured[side][claim.metric] if isinstance(side, str) else np.array(side)

    against = [claim.than]
    if claim.than == "others":
        against = [name for name in measured if name != claim.better]
    differences = {str(other): mean_interval(values(claim.better) - values(other)) for other in against}
    verdicts = [_verdict(found) for found in differences.values()]
    worst: tuple[Verdict, ...] = ("does not hold here", "inconclusive", "holds")
    return Outcome(claim, differences, next(verdict for verdict in worst if verdict in verdicts))


def _verdict(found: Interval) -> Verdict:
    if found.n < 2:
        return "inconclusive"
    # Several values that are all equal have no interval; they speak for themselves.
    low = found.value if found.low is None else found.low
    high = found.value if found.high is None else found.high
    if low > 0:
        return "holds"
    return "does not hold here" if high < 0 else "inconclusive"
