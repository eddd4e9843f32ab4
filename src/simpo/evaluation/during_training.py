"""Judging answers during training: to held-out prompts (``eval_generations``), and rollouts of ``simpo online``."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import parse_flag_from_env
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer

from simpo.client import confirm_cost, placeholder_answer
from simpo.data.images import text_tokenizer
from simpo.data.prompts import Prompt, columns_identity, prepare_prompts
from simpo.errors import SimpoError
from simpo.generation.engine import Sampled, TransformersEngine
from simpo.generation.responses import read_samples, response_texts, write_responses
from simpo.generation.settings import SamplingSettings
from simpo.judging.protocol import Answers, Judge, Pair, Scorer, Scores
from simpo.judging.registry import check_judges_new_answers, count_unscored, make_annotator, make_judge
from simpo.judging.settings import AnnotatorArguments, GenerationArguments, JudgeOptions, server_client
from simpo.models.checkpoint import Checkpoint
from simpo.models.devices import from_main
from simpo.models.settings import ModelArguments
from simpo.runs.files import read_lines
from simpo.runs.log import Log
from simpo.runs.manifest import is_intact, write_digest
from simpo.training.batches import prompts_from_rows
from simpo.training.callbacks import RunCallback
from simpo.training.configs import OnlineConfig
from simpo.training.guard import warn_or_stop
from simpo.training.packed import PackedTrainer
from simpo.training.rollouts import AnsweredPrompt
from simpo.training.sampling import preserve_rng_state, sample_answers
from simpo.training.settings import TrainingSettings

logger = logging.getLogger(__name__)

FOLDER, START = "generations", "start.jsonl"
_MAX_BATCH_SIZE = 32
_PROBE_PAIRS = 4  # several, so that a server refusing one pair is not mistaken for refusing all


def make_eval_judge(arguments: GenerationArguments, model: ModelArguments, log: Log) -> Judge | None:
    """Create the judge, or return None if none is configured; raises :class:`SimpoError` if it cannot be created."""
    if arguments.eval_judge is None:
        return None
    try:
        check_judges_new_answers(arguments.eval_judge)
        client = server_client(arguments.eval_judge_url, arguments.eval_judge_model)
        return make_judge(arguments.eval_judge, JudgeOptions.during_training(model, client, log))
    except SimpoError as error:
        raise SimpoError(f"eval_judge: {error}") from error


# ---- Detecting collapse: the model in training no longer answers properly.

# Our own thresholds, loose enough for the changes that successful training causes; see docs/metrics.md.
_MIN_RATIO = 0.5  # of end-of-turn rate and distinct-2, relative to the initial model
_MIN_DROP = 0.25  # in end-of-turn rate, so that one answer out of a few is not enough
_MAX_LENGTH_RATIO = 2.0  # relative to the initial model's answers or the held-out responses, whichever are longer


@dataclass(frozen=True)
class AnswerStatistics:
    """Statistics of one answer to each of several prompts."""

    length: float  # mean number of tokens, including the stop token
    end_of_turn_rate: float  # fraction of answers that ended by themselves
    # Fraction of distinct bigrams in an answer (distinct-n with n = 2: Li et al. 2016, arXiv 1510.03055), averaged
    # over answers with at least one bigram; NaN if there are none.
    distinct_2: float

    @classmethod
    def of(cls, answers: Sequence[Sampled]) -> AnswerStatistics:
        """Compute the statistics of one or more answers."""
        bigrams = [list(pairwise(answer.ids)) for answer in answers if len(answer.ids) > 1]
        return cls(
            sum(len(answer.ids) for answer in answers) / len(answers),
            sum(answer.finished for answer in answers) / len(answers),
            sum(len(set(pairs)) / len(pairs) for pairs in bigrams) / len(bigrams) if bigrams else math.nan,
        )


def signs_of_collapse(now: AnswerStatistics, start: AnswerStatistics, expected_length: float) -> list[str]:
    """List the statistics that indicate a collapse, as ``name start -> now``; empty if there is no sign of one.

    ``start`` holds the initial model's statistics on the same prompts. ``expected_length`` is the mean length of the
    held-out responses in tokens, since fine-tuning may legitimately lengthen answers up to it.
    """
    drop = start.end_of_turn_rate - now.end_of_turn_rate
    out_of_bounds = {
        "end_of_turn_rate": now.end_of_turn_rate < _MIN_RATIO * start.end_of_turn_rate and drop > _MIN_DROP,
        "length": now.length > _MAX_LENGTH_RATIO * max(start.length, expected_length),
        "distinct_2": now.distinct_2 < _MIN_RATIO * start.distinct_2,
    }
    return [
        f"{name} {getattr(start, name):.3g} -> {getattr(now, name):.3g}" for name, out in out_of_bounds.items() if out
    ]


# ---- The callback for ``eval_generations``.


@dataclass(frozen=True)
class _Answers:
    """Answers to all prompts at one training step."""

    samples: list[list[Sampled]]  # one answer per prompt
    texts: list[list[str]]

    @property
    def statistics(self) -> AnswerStatistics:
        return AnswerStatistics.of([responses[0] for responses in self.samples])


class Generations(RunCallback):
    """Answers held-out prompts at every evaluation while a language model is trained.

    Adds statistics of one greedy answer per prompt to every evaluation and, with a judge, the win rate against the
    initial model's answers. The answers are stored in the folder ``generations`` in the format of ``simpo sample``:
    ``start.jsonl`` holds the initial model's, ``step-N.jsonl`` the others. If answers collapse, ``guard`` decides
    whether to warn or stop. With several ranks, each answers part of the prompts, and the main process judges.
    """

    _config: TrainingSettings
    _tokenizer: PreTrainedTokenizerBase
    _log: Log
    _judge: Judge | None = None
    _sampling: SamplingSettings
    _prompts: list[Prompt]
    _engine: TransformersEngine
    _expected_length: float
    _start: _Answers

    def __init__(self, arguments: GenerationArguments, model: ModelArguments) -> None:
        self._arguments, self._model = arguments, model

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe's keys, except ``yes``, which does not affect results, and what determines a judge's verdicts."""
        settings = {key: value for key, value in dataclasses.asdict(self._arguments).items() if key != "yes"}
        if self._judge is not None:
            given = self._judge.identity | columns_identity(self._prompts)
            settings |= {f"eval_judge/{key}": value for key, value in given.items()}
        return settings

    def prepare(self, config: TrainingSettings, processing: Any, held_out: Dataset | None, log: Log) -> None:
        """Select the prompts and create the judge; raises :class:`SimpoError` if that is not possible."""
        if held_out is None or config.eval_strategy == "no":
            raise SimpoError(
                "eval_generations: needs evaluations; set eval_dataset_name and eval_strategy, or set "
                "eval_generations to 0"
            )
        if config.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            raise SimpoError(
                "eval_generations: is not supported with DeepSpeed, whose engine owns the weights; set it to 0 and use "
                "simpo compare after training, or use fsdp"
            )
        self._config, self._tokenizer, self._log = config, text_tokenizer(processing), log
        self._judge = make_eval_judge(self._arguments, self._model, log)
        context = min(Checkpoint.read(self._model).context or config.max_length, config.max_length)
        chunk_size = min(_MAX_BATCH_SIZE, math.ceil(self._arguments.eval_generations / config.world_size))
        self._sampling = SamplingSettings(temperature=0.0).resolved(context=context, chunk_size=chunk_size)
        assert self._sampling.max_new_tokens is not None
        self._prompts = self._choose_prompts(held_out, processing, context - self._sampling.max_new_tokens)
        if self._judge is not None and any(prompt.images for prompt in self._prompts):
            raise SimpoError(
                "eval_judge: some held-out prompts have images, but judges read text only; remove eval_judge, or use "
                "held-out rows without images"
            )
        if self._judge is not None:
            self._judge.check([Pair.for_prompt(prompt, ("a", "b")) for prompt in self._prompts])

    def _choose_prompts(self, held_out: Dataset, processing: Any, longest: int) -> list[Prompt]:
        """Draw prompts of at most ``longest`` tokens with the run's seed, and return them in row order."""
        count = self._arguments.eval_generations
        with self._config.main_process_first(desc="reading held-out prompts"):  # other ranks read its cache
            settings = self._config.tokenize_settings
            prompts = prepare_prompts(
                held_out,
                processing,
                label="eval_generations",
                rendering=settings.rendering,
                image_folder=settings.image_folder,
            )
        fitting = [prompt for prompt in prompts if len(prompt.ids) <= longest]
        if not fitting:
            raise SimpoError(
                f"eval_generations: no held-out prompt has at most {longest:,} tokens, which is half of max_length or "
                "of the model's context (the other half is for the answer); raise max_length or set it to 0"
            )
        few = f" (no others have at most {longest:,} tokens)" if len(fitting) < count else ""
        chosen = np.random.default_rng(self._config.seed).permutation(len(fitting))[:count]
        self._log(
            f"eval_generations: {len(chosen):,} held-out prompts{few} will be answered at every evaluation, in at most "
            f"{self._sampling.max_new_tokens:,} tokens"
        )
        return [fitting[index] for index in sorted(chosen)]

    def before_training(self, trainer: PackedTrainer, *, resumed: bool) -> None:
        """Sample or read back the initial model's answers, and make sure that the judge works."""
        if self._is_main and self._judge is not None:
            self._confirm_cost(self._judge, max_evaluations(self._config, len(trainer.train_dataset)))
        self._engine = TransformersEngine(trainer.model, self._tokenizer)
        responses = trainer.eval_dataset["response_ids"]
        self._expected_length = sum(len(response_ids[0]) for response_ids in responses) / len(responses)
        path = self._folder / START
        with preserve_rng_state(self._config.device):
            stored = from_main(self._read_start(path) if resumed and self._is_main else None)
            self._start = self._sample(trainer) if stored is None else self._as_answers(stored)
            if self._is_main:
                if stored is None:
                    write_responses(path, self._prompts, self._start.texts, self._start.samples)
                    write_digest(path)
                statistics = dataclasses.asdict(self._start.statistics)
                shown = ", ".join(f"{name} {value:.4g}" for name, value in statistics.items())
                self._log(f"the initial model's answers: {shown} ({path})")
                if self._judge is not None:  # identical answers would be a tie without a request
                    probes = self._start.texts[:_PROBE_PAIRS]
                    self._judge.compare(self._pairs(probes, [[f"{texts[0]} ."] for texts in probes]))

    def _confirm_cost(self, judge: Judge, times: int) -> None:
        assert self._sampling.max_new_tokens is not None
        longest = [[[placeholder_answer(self._sampling.max_new_tokens, name)]] * len(self._prompts) for name in "ab"]
        confirm_cost(
            judge.estimate(self._pairs(*longest)) * times,
            yes=self._arguments.yes,
            log=lambda line: self._log(f"eval_judge, for {times:,} evaluations: {line}"),
        )

    def _read_start(self, path: Path) -> list[list[Sampled]] | None:
        """Return the initial model's stored answers; None if there are none, or they are to other prompts."""
        rows = read_lines(path) if is_intact(path) else []
        same = [row["id"] for row in rows] == [prompt.id for prompt in self._prompts]
        return read_samples(rows) if same else None

    def evaluate(self, trainer: PackedTrainer) -> dict[str, float]:
        """Sample and store answers, compare them with the initial model's, and warn or stop if they have collapsed."""
        with preserve_rng_state(self._config.device):
            answers, step = self._sample(trainer), trainer.state.global_step
            metrics, signs = from_main(self._compare_with_start(answers, step) if self._is_main else ({}, []))
        if signs and self._config.guard != "off":
            path, rate = self._folder / f"step-{step}.jsonl", self._config.learning_rate
            event = f"the answers to held-out prompts have collapsed (start -> now: {', '.join(signs)}; {path})"
            event += f" with learning_rate {rate:g}"
            warn_or_stop(self._config.guard, step, "answers", event, Path(self._config.output_dir))
        return metrics

    @property
    def metric_names(self) -> list[str]:
        """The statistics of the answers and, with a judge, their win rate."""
        names = [field.name for field in dataclasses.fields(AnswerStatistics)]
        return [f"generations/{name}" for name in (*names, *([] if self._judge is None else ["win_rate"]))]

    def _compare_with_start(self, answers: _Answers, step: int) -> tuple[dict[str, float], list[str]]:
        path = self._folder / f"step-{step}.jsonl"
        write_responses(path, self._prompts, answers.texts, answers.samples)
        now = answers.statistics
        metrics = {f"generations/{name}": value for name, value in dataclasses.asdict(now).items()}
        if self._judge is not None:
            metrics["generations/win_rate"] = self._win_rate(self._judge, answers, step)
        return metrics, signs_of_collapse(now, self._start.statistics, self._expected_length)

    def _win_rate(self, judge: Judge, answers: _Answers, step: int) -> float:
        """Return the mean of the available verdicts; NaN if there are none, or if the judge fails."""
        try:
            verdicts = judge.compare(self._pairs(answers.texts, self._start.texts))
        except SimpoError as error:
            logger.warning("step %d: no win rate: %s", step, error)
            return math.nan
        if judge.usage is not None:
            self._log(judge.usage.line())
        available = [verdict for verdict in verdicts if verdict is not None]
        if missing := len(verdicts) - len(available):
            logger.warning("step %d: eval_judge gave no verdict on %d of %d prompts", step, missing, len(verdicts))
        return sum(available) / len(available) if available else math.nan

    def _pairs(self, a: Sequence[Sequence[str]], b: Sequence[Sequence[str]]) -> list[Pair]:
        """Pair up answers to the prompts, or to the first few."""
        return [Pair.for_prompt(prompt, (x[0], y[0])) for prompt, x, y in zip(self._prompts, a, b, strict=False)]

    def _sample(self, trainer: PackedTrainer) -> _Answers:
        """Sample one answer per prompt and return all of them on every rank. Every rank must call this."""
        prompts, reader = self._prompts, trainer.images
        images = None if reader is None else lambda index: reader.tensors(prompts[index].images, prompts[index].digests)
        ids = [prompt.ids for prompt in prompts]
        return self._as_answers(sample_answers(trainer, self._engine, ids, self._sampling, images))

    def _as_answers(self, samples: list[list[Sampled]]) -> _Answers:
        return _Answers(samples, response_texts(self._tokenizer, self._prompts, samples))

    @property
    def _folder(self) -> Path:
        return Path(self._config.output_dir) / FOLDER

    @property
    def _is_main(self) -> bool:
        return self._config.process_index == 0


def max_evaluations(config: TrainingSettings, rows: int) -> int:
    """Return the maximum number of evaluations when training on that many rows."""
    steps_per_epoch = math.ceil(rows / (config.per_device_train_batch_size * config.world_size))
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * steps_per_epoch)
    every = steps_per_epoch
    if config.eval_strategy == "steps":
        assert config.eval_steps is not None  # filled in by the configuration
        every = math.ceil(config.eval_steps if config.eval_steps >= 1 else config.eval_steps * steps)
    return math.ceil(steps / every) + config.eval_on_start


# ---- The annotator for ``simpo online``, which scores rollouts.

_PROBE_PROMPTS = 2


class Annotation(RunCallback):
    """Scores a trainer's rollouts with any annotator of ``simpo annotate``, on the main process."""

    _scorer: Scorer
    _gold: Scorer | None
    _config: OnlineConfig
    _log: Log

    def __init__(self, arguments: AnnotatorArguments, model: ModelArguments) -> None:
        self._arguments, self._model = arguments, model

    @property
    def settings(self) -> Mapping[str, Any]:
        """The annotators' names and everything that determines their scores."""
        settings = {"annotator": self._arguments.annotator}
        settings |= {f"annotator/{key}": value for key, value in self._scorer.identity.items()}
        if self._gold is not None:
            settings |= {f"gold_annotator/{key}": value for key, value in self._gold.identity.items()}
        return settings

    def prepare(self, config: OnlineConfig, processing: Any, held_out: Dataset | None, log: Log) -> None:
        """Create the annotators and load what they need; raises :class:`~simpo.errors.SimpoError` if that fails."""
        arguments = self._arguments
        client = arguments.client()
        if client is not None:
            client.endpoint.api_key()
        # An annotator's own progress would restart with every rollout.
        options = JudgeOptions.during_training(self._model, client, lambda line: None)
        self._scorer = make_annotator(arguments.annotator, options, arguments.annotator_normalization)
        self._gold = None if arguments.gold_annotator is None else make_annotator(arguments.gold_annotator, options)
        self._config, self._log = config, log
        if config.process_index == 0:
            for scorer in self._scorers:
                scorer.prepare()

    @property
    def _scorers(self) -> list[Scorer]:
        """All individual annotators."""
        return [*self._scorer.scorers, *([] if self._gold is None else [self._gold])]

    def check_trainer(self, trainer: Trainer) -> None:
        """Install the annotators, and test them on dummy answers or, if they use a server, confirm their cost."""
        trainer.annotator = self.score
        if self._gold is not None:
            trainer.gold_annotator = self.score_by_gold
        if self._config.process_index:
            return
        count = self._config.num_generations
        prompts = prompts_from_rows(trainer.train_dataset)
        dummies = [Answers.for_prompt(prompt, ["Answer."] * count) for prompt in prompts]
        for scorer in self._scorers:
            scorer.check(dummies)
            if scorer.usage is None:
                scorer.score(dummies[:_PROBE_PROMPTS])
        if self._scorer.usage is None:
            return
        assert self._config.max_new_tokens is not None
        longest = [placeholder_answer(self._config.max_new_tokens, f"a{k}") for k in range(count)]
        estimate = self._scorer.estimate([Answers.for_prompt(prompt, longest) for prompt in prompts])
        passes = math.ceil(self._config.num_train_epochs)
        if self._config.max_steps > 0:
            per_step = self._config.train_batch_size * self._config.world_size / self._config.rollout_epochs
            passes = math.ceil(self._config.max_steps * per_step / len(prompts))
        confirm_cost(estimate * passes, yes=self._arguments.annotator_yes, log=self._log)

    def score(self, answered: Sequence[AnsweredPrompt]) -> Scores:
        """Score a rollout's answers, logging how many each of several annotators left without a score."""
        rows = _rows(answered)
        scores = self._scorer.score(rows)
        for name, count in count_unscored(self._scorer.parts).items():
            if count:
                self._log(f"{name}: no score for {count:,} of {sum(len(row.responses) for row in rows):,} answers")
        return scores

    def score_by_gold(self, answered: Sequence[AnsweredPrompt]) -> Scores:
        """Score a rollout's answers with the gold annotator, which is not trained on."""
        assert self._gold is not None
        return self._gold.score(_rows(answered))


def _rows(answered: Sequence[AnsweredPrompt]) -> list[Answers]:
    return [Answers.for_prompt(each.prompt, each.texts) for each in answered]
