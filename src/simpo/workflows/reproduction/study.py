"""Studies as registered in ``studies.yaml``, their trials on the tiny world, and the rule that decides claims."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel

from simpo.config.fields import nearest
from simpo.data.prompts import prepare_prompts
from simpo.data.settings import TokenizeSettings
from simpo.data.sources import load_rows
from simpo.data.tokenizing import prepare
from simpo.errors import SimpoError
from simpo.evaluation.compare import PromptAnswers, compare_answers
from simpo.generation.engine import TransformersEngine
from simpo.generation.responses import ResponseText
from simpo.generation.sample import FILE_NAME, PromptArguments, sample_responses
from simpo.generation.settings import SamplingSettings
from simpo.models.loading import load_tokenizer
from simpo.models.settings import ModelArguments
from simpo.objectives import Responses
from simpo.packing.layout import PackedBatch, TokenizedComparison
from simpo.packing.scoring import reference_states, score_responses, token_outputs
from simpo.runs.files import staged_folder
from simpo.runs.log import Log
from simpo.runs.results import fingerprint
from simpo.statistics import Interval, mean_interval, spearman
from simpo.training.configs import PreferenceConfig, SFTConfig
from simpo.training.preference import PreferenceTrainer
from simpo.training.sft import SFTTrainer
from simpo.workflows.pair import PairSettings, pair_responses
from simpo.world.pairs import write_model, write_pairs, write_prompts, write_sft
from simpo.world.questions import correct, judge

START = "sft"  # folder of the model from which all trials start
HELD_OUT, TUNING = "held-out", "tuning"  # prompt files
HELD_OUT_PAIRS = "held-out-pairs.jsonl"
SAMPLING = SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=48, chunk_size=128)
_KL_ROWS = 64  # held-out pairs on which the KL divergence is measured
_TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 16, "num_train_epochs": 1, "max_length": 128,
    "save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True,
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One training run and its evaluation: settings, pairs, seed, and the prompts on which it is judged."""

    settings: Mapping[str, Any]  # keys of a preference recipe
    pairs: str  # file of pairs, without extension
    seed: int  # for training and for sampling answers
    prompts: str = HELD_OUT  # file of prompts, without extension

    @property
    def key(self) -> str:
        """Identifier of the trial; studies share trials."""
        return fingerprint(dict(self.settings), self.pairs, self.seed, self.prompts)[:16]


def run_trial(base: Path, trial: Trial) -> dict[str, float]:
    """Train and evaluate one trial; deterministic except for ``seconds``.

    ``base`` is the folder with the initial model, pairs and prompts.

    Returns metrics of sampled answers (``win_rate`` against the initial model, ``score``, ``correct``, ``tokens``,
    ``ended``); of the implicit reward on held-out pairs (``accuracy``; ``ranking_agreement`` with the average
    log-probability; ``reward_length_rho``, Spearman's correlation with length); ``kl`` from the initial model in nats
    per token; and ``seconds``, the CPU time of training.
    """
    torch.set_num_threads(1)  # the model is tiny
    tokenizer = load_tokenizer(str(base / START))
    start, model = (AutoModelForCausalLM.from_pretrained(base / START, dtype=torch.float32) for _ in range(2))
    with TemporaryDirectory() as scratch:
        args = PreferenceConfig(
            output_dir=scratch,
            reference_cache=str(Path(scratch) / "reference"),
            seed=trial.seed,
            **_TRAINING,
            **trial.settings,
        )
        rows = load_rows(str(base / f"{trial.pairs}.jsonl"), split="train")
        began = time.process_time()  # CPU time, so that other programs do not affect it
        trainer = PreferenceTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        seconds = time.process_time() - began
    model.eval()
    metrics = _answer_metrics(model, start, tokenizer, base / f"{trial.prompts}.jsonl", trial.seed)
    metrics |= _pair_metrics(model, start, tokenizer, base / HELD_OUT_PAIRS, trainer.objective)
    del trainer, model, start
    gc.collect()
    return metrics | {"seconds": seconds}


# ---- Evaluation of sampled answers.


def _answer_metrics(
    model: PreTrainedModel, start: PreTrainedModel, tokenizer: Any, prompts: Path, seed: int
) -> dict[str, float]:
    """Sample one answer per prompt from each model, and judge them with the world's exact judge."""
    prepared = prepare_prompts(load_rows(str(prompts), split="train"), tokenizer)
    texts, records = ResponseText(tokenizer), []
    for generator in (model, start):
        sampled = TransformersEngine(generator, tokenizer).generate([prompt.ids for prompt in prepared], SAMPLING, seed)
        records.append(
            [
                {
                    "responses": [texts.decode(prompt.ids, one.ids)],
                    "response_ids": [one.ids],
                    "finished": [one.finished],
                }
                for prompt, one in zip(prepared, sampled, strict=True)
            ]
        )
    answers = [PromptAnswers(prompt.content, *both) for prompt, *both in zip(prepared, *records, strict=True)]
    metrics = compare_answers(answers, judge, {"correct": correct})
    values = {metric.name: float(metric.interval.value) for metric in metrics if metric.stage == "after"}
    return {"tokens": values.pop("response_tokens"), "ended": values.pop("end_of_turn_rate"), **values}


# ---- Evaluation on held-out pairs.


def _pair_metrics(
    model: PreTrainedModel, start: PreTrainedModel, tokenizer: Any, pairs: Path, objective: Any
) -> dict[str, float]:
    """Compare the rankings of held-out pairs by reward and by likelihood, and measure KL from the initial model."""
    settings = TokenizeSettings(max_length=128, max_prompt_length=None)
    rows = prepare(load_rows(str(pairs), split="train"), tokenizer, settings).dataset
    comparisons = [TokenizedComparison(row["prompt_ids"], row["response_ids"]) for row in rows]
    with torch.no_grad():
        after, before = (score_responses(one, comparisons) for one in (model, start))
        scored = Responses(after.logp, after.length, before.logp)
        reward, average = objective.implicit_reward(scored), scored.avg
        batch = PackedBatch.build(comparisons[:_KL_ROWS])
        divergence = token_outputs(model, batch, reference=reference_states(start, batch)).divergence
    assert divergence is not None
    reward_gaps, logp_gaps = (values.view(-1, 2).diff(dim=1).neg().squeeze(1) for values in (reward, average))
    return {
        "accuracy": float((reward_gaps > 0).float().mean()),
        "ranking_agreement": float((reward_gaps.sign() == logp_gaps.sign()).float().mean()),
        "reward_length_rho": spearman(reward.numpy(), scored.length.numpy()).value,
        "kl": float(divergence.mean()),
    }


# ---- Shared inputs of all trials: the initial model, and pairs and prompts from the tiny world.

DEMONSTRATIONS, PROMPTS, JUDGED, PAIRS = 24_000, 640, 240, 640
ON_POLICY, OFF_POLICY, LENGTH_BIASED = "on-policy", "off-policy", "length-biased"  # files of pairs
LENGTH_BIAS = 0.5
_SEED = 0  # for the world, the initial model and the pairs; a trial's seed only varies training and sampling
_ANSWERS = 6  # answers per prompt, of which the best and the worst are paired


def prepare_base(folder: Path, log: Log) -> None:
    """Create the inputs that do not exist yet: fine-tune the initial model, pair its answers, and draw other pairs.

    Each file and folder is written atomically, so that an interrupted call can be repeated.
    """
    if not (folder / "random").exists():
        write_model(folder / "random", _SEED)
    write_sft(folder / "demonstrations.jsonl", DEMONSTRATIONS, _SEED)  # deterministic, so rewriting is harmless
    write_prompts(folder / "prompts.jsonl", PROMPTS, _SEED)
    write_prompts(folder / f"{TUNING}.jsonl", JUDGED, _SEED + 1)
    write_prompts(folder / f"{HELD_OUT}.jsonl", JUDGED, _SEED, held_out=True)
    write_pairs(folder / f"{OFF_POLICY}.jsonl", PAIRS, _SEED)
    write_pairs(folder / f"{LENGTH_BIASED}.jsonl", PAIRS, _SEED, length_bias=LENGTH_BIAS)
    if not (folder / START).exists():
        log(f"initial model: supervised fine-tuning on {DEMONSTRATIONS:,} demonstrations (about two minutes)")
        _fine_tune(folder)
    for name, prompts in ((ON_POLICY, "prompts"), (HELD_OUT_PAIRS.removesuffix(".jsonl"), HELD_OUT)):
        if not (folder / f"{name}.jsonl").exists():
            log(f"pairs: sampling {_ANSWERS} answers from the initial model to each prompt in {prompts}.jsonl")
            _pair(folder, name, prompts)


def _fine_tune(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "random", dtype=torch.float32)
    tokenizer = load_tokenizer(str(folder / "random"))
    with TemporaryDirectory() as scratch:
        args = SFTConfig(output_dir=scratch, seed=_SEED, learning_rate=2e-3, **_TRAINING)
        rows = load_rows(str(folder / "demonstrations.jsonl"), split="train")
        SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer).train()
    with staged_folder(folder / START) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def _pair(folder: Path, name: str, prompts: str) -> None:
    settings = replace(SAMPLING, n=_ANSWERS, seed=_SEED)
    answers = folder / f"{name}-answers"
    source = PromptArguments(str(folder / f"{prompts}.jsonl"))
    sample_responses(ModelArguments(str(folder / START), dtype="float32"), source, settings, answers)
    pairing = PairSettings(keep_unfinished=True)  # the exact judge also scores cut-off answers correctly
    pair_responses(answers / FILE_NAME, judge, folder / f"{name}.jsonl", pairing)


# ---- Registered studies, and the rule that decides their claims.

REGISTERED = Path(__file__).parent / "studies.yaml"
METRICS = (
    "win_rate", "score", "correct", "tokens", "ended",  # of sampled answers
    "accuracy", "ranking_agreement", "reward_length_rho", "kl", "seconds",
)  # fmt: skip
_TUNING_SEED = 0
OWN_KEYS = ("grid", "pairs", "learning_rate_times")  # keys of arms that are not recipe keys

Verdict = Literal["holds", "does not hold here", "inconclusive"]
Measured = Mapping[str, np.ndarray]  # an arm's values by metric, `[seeds]` each


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: on average over seeds, ``better`` has a larger ``metric`` than ``than``."""

    claim: str  # the claim as a sentence
    metric: str  # the metric to compare
    better: str | float  # an arm or a number
    than: str | float  # an arm, a number, or `others` for every other arm


@dataclass(frozen=True)
class Arm:
    """One model of a study."""

    name: str  # unique within the study
    given: Mapping[str, Any]  # keys as registered
    learning_rate: float  # the tiny world's, before `learning_rate_times`

    def candidates(self) -> list[dict[str, Any]]:
        """Return the settings to choose from: all combinations of the grid, or a single one."""
        grid = self.given.get("grid", {})
        fixed = {key: value for key, value in self.given.items() if key != "grid"}
        return [fixed | dict(zip(grid, values, strict=True)) for values in product(*grid.values())]

    def trial(self, candidate: Mapping[str, Any], seed: int) -> Trial:
        """Return the trial of a candidate on the held-out prompts."""
        settings = {key: value for key, value in candidate.items() if key not in OWN_KEYS}
        settings["learning_rate"] = self.learning_rate * candidate.get("learning_rate_times", 1)
        return Trial(settings, candidate.get("pairs", "on-policy"), seed)

    def tuning_trials(self) -> list[Trial]:
        """Return a trial per candidate on the tuning prompts, or none if there is only one candidate."""
        trials = [replace(self.trial(candidate, _TUNING_SEED), prompts=TUNING) for candidate in self.candidates()]
        return trials if len(trials) > 1 else []


@dataclass(frozen=True)
class Study:
    """One study."""

    number: int  # position in the file, from 1
    name: str  # name on the command line
    title: str  # the question it answers
    source: str  # where it is in the paper
    arms: Mapping[str, Arm]  # the models, by name
    claims: Sequence[Claim]  # the claims it tests
    seeds: Sequence[int]  # seeds of its trials


@dataclass(frozen=True)
class Outcome:
    """Outcome of a claim: the difference from each arm or number with its interval, and the verdict."""

    claim: Claim
    differences: Mapping[str, Interval]
    verdict: Verdict


def read_studies(chosen: Sequence[str] = ()) -> list[Study]:
    """Return the registered studies, or only the ``chosen`` ones, by name or number."""
    document = yaml.safe_load(REGISTERED.read_text(encoding="utf-8"))
    studies = []
    for number, entry in enumerate(document["studies"], 1):
        arms = {name: Arm(name, given, document["learning_rate"]) for name, given in entry["arms"].items()}
        claims = [Claim(**claim) for claim in entry["claims"]]
        studies.append(Study(number=number, seeds=document["seeds"], **entry | {"arms": arms, "claims": claims}))
    known = {str(study.number): study for study in studies} | {study.name: study for study in studies}
    for name in chosen:
        if name not in known:
            names = [study.name for study in studies]
            hint = nearest(name, names) or f"; the studies are 1 to {len(studies)}: {', '.join(names)}"
            raise SimpoError(f"study {name!r} is unknown{hint}")
    numbers = {known[name].number for name in chosen}
    return [study for study in studies if not numbers or study.number in numbers]


def decide(claim: Claim, measured: Mapping[str, Measured]) -> Outcome:
    """Decide a claim by the rule at the end of ``studies.yaml``."""

    def values(side: str | float) -> np.ndarray:
        return measured[side][claim.metric] if isinstance(side, str) else np.array(side)

    others = [name for name in measured if name != claim.better]
    against = others if claim.than == "others" else [claim.than]
    differences = {str(other): mean_interval(values(claim.better) - values(other)) for other in against}
    verdicts = [_verdict(difference) for difference in differences.values()]
    worst_first: tuple[Verdict, ...] = ("does not hold here", "inconclusive", "holds")
    return Outcome(claim, differences, next(verdict for verdict in worst_first if verdict in verdicts))


def _verdict(difference: Interval) -> Verdict:
    # If all seeds agree exactly, there is no interval and the common value decides.
    low, high = (difference.value if bound is None else bound for bound in (difference.low, difference.high))
    if difference.n > 1 and low > 0:
        return "holds"
    return "does not hold here" if difference.n > 1 and high < 0 else "inconclusive"
