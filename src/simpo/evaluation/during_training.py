"""Answers judged while a model is trained: held-out ones (``eval_generations``), and those that it is trained on."""

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
from simpo.data.prompts import Prompt, prepare_prompts
from simpo.errors import SimpoError
from simpo.generation.engine import Sampled, TransformersEngine
from simpo.generation.responses import read_samples, response_texts, write_responses
from simpo.generation.settings import SamplingSettings
from simpo.judging.protocol import Answers, Judge, Pair, Scorer, Scores
from simpo.judging.registry import check_judges_anew, count_missing, make_annotator, make_judge
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
_GENERATED_TOGETHER = 32
_TRIED_PAIRS = 4  # more than one, so that a server's refusal of a single pair does not count as a refusal of all


def make_eval_judge(arguments: GenerationArguments, model: ModelArguments, log: Log) -> Judge | None:
    """The judge, if one is named; raises :class:`SimpoError` if it cannot be made."""
    if arguments.eval_judge is None:
        return None
    try:
        check_judges_anew(arguments.eval_judge)
        client = server_client(arguments.eval_judge_url, arguments.eval_judge_model)
        return make_judge(arguments.eval_judge, JudgeOptions.during_training(model, client, log))
    except SimpoError as error:
        raise SimpoError(f"eval_judge: {error}") from error


# ---- Signs that a model in training no longer answers properly.

# Our own bounds, wide enough for what good training does to answers; see docs/metrics.md.
_LEAST_SHARE = 0.5  # of the start model's end-of-turn rate and distinct-2
_LEAST_FALL = 0.25  # of the end-of-turn rate, so that one answer among a few is not enough
_LONGEST = 2.0  # times the longer of the start model's answers and the held-out responses


@dataclass(frozen=True)
class AnswerStatistics:
    """Statistics of one answer to each of several prompts."""

    length: float  # mean number of tokens, including the one that ended the answer
    end_of_turn_rate: float  # share of answers that ended by themselves
    # Share of distinct pairs of neighboring tokens within an answer (distinct-n with n = 2: Li et al. 2016, arXiv
    # 1510.03055), mean over the answers that have such a pair; NaN if none has.
    distinct_2: float

    @classmethod
    def of(cls, answers: Sequence[Sampled]) -> AnswerStatistics:
        """The statistics of at least one answer."""
        bigrams = [list(pairwise(answer.ids)) for answer in answers if len(answer.ids) > 1]
        return cls(
            sum(len(answer.ids) for answer in answers) / len(answers),
            sum(answer.finished for answer in answers) / len(answers),
            sum(len(set(found)) / len(found) for found in bigrams) / len(bigrams) if bigrams else math.nan,
        )


def signs_of_collapse(now: AnswerStatistics, start: AnswerStatistics, expected_length: float) -> list[str]:
    """Each statistic that is out of bounds, as ``name start -> now``; empty for a model that answers as well as before.

    ``start`` are those of the start model on the same prompts; ``expected_length`` is the mean tokens of the held-out
    responses, to which fine-tuning may lengthen the answers.
    """
    fall = start.end_of_turn_rate - now.end_of_turn_rate
    out_of_bounds = {
        "end_of_turn_rate": now.end_of_turn_rate < _LEAST_SHARE * start.end_of_turn_rate and fall > _LEAST_FALL,
        "length": now.length > _LONGEST * max(start.length, expected_length),
        "distinct_2": now.distinct_2 < _LEAST_SHARE * start.distinct_2,
    }
    return [
        f"{name} {getattr(start, name):.3g} -> {getattr(now, name):.3g}" for name, out in out_of_bounds.items() if out
    ]


# ---- The callback of ``eval_generations``.


@dataclass(frozen=True)
class _Answers:
    """The model's answers to all prompts at one step."""

    samples: list[list[Sampled]]  # one answer per prompt
    texts: list[list[str]]

    @property
    def statistics(self) -> AnswerStatistics:
        return AnswerStatistics.of([several[0] for several in self.samples])


class Generations(RunCallback):
    """Answers held-out prompts at every evaluation while a language model is trained.

    An evaluation gains the statistics of one greedy answer to each of the same held-out prompts and, with a judge, the
    win rate against the start model's answers. The answers are stored in ``generations`` in the format of ``simpo
    sample``: the start model's in ``start.jsonl``, the others in ``step-N.jsonl``. Where answers collapse, a line warns
    of it, and training continues. Several ranks share the prompts; the main one judges.
    """

    _config: TrainingSettings
    _tokenizer: PreTrainedTokenizerBase
    _log: Log
    _judge: Judge | None
    _sampling: SamplingSettings
    _prompts: list[Prompt]
    _engine: TransformersEngine
    _expected_length: float
    _start: _Answers

    def __init__(self, arguments: GenerationArguments, model: ModelArguments) -> None:
        self._arguments, self._model = arguments, model

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe's keys except ``yes``, which does not change any result."""
        return {key: value for key, value in dataclasses.asdict(self._arguments).items() if key != "yes"}

    def prepare(self, config: TrainingSettings, processing: Any, held_out: Dataset | None, log: Log) -> None:
        """Choose the prompts and the judge."""
        if held_out is None or config.eval_strategy == "no":
            raise SimpoError(
                "eval_generations: there are no evaluations; name held-out rows (eval_dataset_name) and set "
                "eval_strategy, or set it to 0"
            )
        if config.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            raise SimpoError(
                "eval_generations: not possible with DeepSpeed, whose engine owns the weights; set it to 0 and use "
                "simpo compare after training, or use fsdp"
            )
        self._config, self._tokenizer, self._log = config, text_tokenizer(processing), log
        self._judge = make_eval_judge(self._arguments, self._model, log)
        context = min(Checkpoint.read(self._model).context or config.max_length, config.max_length)
        chunk_size = min(_GENERATED_TOGETHER, math.ceil(self._arguments.eval_generations / config.world_size))
        self._sampling = SamplingSettings(temperature=0.0).resolved(context=context, chunk_size=chunk_size)
        assert self._sampling.max_new_tokens is not None
        self._prompts = self._choose_prompts(held_out, processing, context - self._sampling.max_new_tokens)
        if self._judge is not None and any(prompt.images for prompt in self._prompts):
            raise SimpoError(
                "eval_judge: held-out prompts have images, and judges read text only; leave it out, or name held-out "
                "rows without images"
            )
        if self._judge is not None:
            self._judge.check([Pair.to(prompt, ("a", "b")) for prompt in self._prompts])

    def _choose_prompts(self, held_out: Dataset, processing: Any, room: int) -> list[Prompt]:
        """Draw prompts with at most ``room`` tokens by the run's seed, in the order of the rows."""
        count = self._arguments.eval_generations
        with self._config.main_process_first(desc="reading held-out prompts"):  # the others find them in the cache
            settings = self._config.tokenize_settings
            known = prepare_prompts(
                held_out,
                processing,
                label="eval_generations",
                rendering=settings.rendering,
                image_folder=settings.image_folder,
            )
        found = [prompt for prompt in known if len(prompt.ids) <= room]
        if not found:
            raise SimpoError(
                f"eval_generations: no held-out prompt has at most {room:,} tokens, half of max_length or of the "
                "model's context, which leaves the same to an answer; raise max_length or set it to 0"
            )
        few = f" (no others have at most {room:,} tokens)" if len(found) < count else ""
        chosen = np.random.default_rng(self._config.seed).permutation(len(found))[:count]
        self._log(
            f"eval_generations: {len(chosen):,} held-out prompts{few} are answered at every evaluation, in at most "
            f"{self._sampling.max_new_tokens:,} tokens"
        )
        return [found[number] for number in sorted(chosen)]

    def before_training(self, trainer: PackedTrainer, *, resumed: bool) -> None:
        """Let the start model answer, or read what it answered at an earlier start of this run, and try the judge."""
        if self._is_main and self._judge is not None:
            self._confirm_cost(self._judge, evaluations(self._config, len(trainer.train_dataset)))
        self._engine = TransformersEngine(trainer.model, self._tokenizer)
        responses = trainer.eval_dataset["response_ids"]
        self._expected_length = sum(len(several[0]) for several in responses) / len(responses)
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
                self._log(f"the start model's answers: {shown} ({path})")
                if self._judge is not None:  # identical answers would be a tie without asking a server
                    few = self._start.texts[:_TRIED_PAIRS]
                    self._judge.compare(self._pairs(few, [[f"{texts[0]} ."] for texts in few]))

    def _confirm_cost(self, judge: Judge, times: int) -> None:
        assert self._sampling.max_new_tokens is not None
        longest = [[[placeholder_answer(self._sampling.max_new_tokens, name)]] * len(self._prompts) for name in "ab"]
        confirm_cost(
            judge.estimate(self._pairs(*longest)) * times,
            yes=self._arguments.yes,
            log=lambda line: self._log(f"eval_judge, at {times:,} evaluations: {line}"),
        )

    def _read_start(self, path: Path) -> list[list[Sampled]] | None:
        """The start model's stored answers; None if there are none, or they are to other prompts."""
        rows = read_lines(path) if is_intact(path) else []
        same = [row["id"] for row in rows] == [prompt.id for prompt in self._prompts]
        return read_samples(rows) if same else None

    def evaluate(self, trainer: PackedTrainer) -> dict[str, float]:
        """Sample answers, store them, compare them with the start model's, and warn of a collapse."""
        with preserve_rng_state(self._config.device):
            answers, step = self._sample(trainer), trainer.state.global_step
            metrics, signs = from_main(self._compare_with_start(answers, step) if self._is_main else ({}, []))
        if signs and self._config.guard != "off":
            path, rate = self._folder / f"step-{step}.jsonl", self._config.learning_rate
            what = f"the answers to held-out prompts have collapsed (start -> now: {', '.join(signs)}; {path})"
            what += f" with learning_rate {rate:g}"
            warn_or_stop(self._config.guard, step, "answers", what, Path(self._config.output_dir))
        return metrics

    def _compare_with_start(self, answers: _Answers, step: int) -> tuple[dict[str, float], list[str]]:
        path = self._folder / f"step-{step}.jsonl"
        write_responses(path, self._prompts, answers.texts, answers.samples)
        now = answers.statistics
        metrics = {f"generations/{name}": value for name, value in dataclasses.asdict(now).items()}
        if self._judge is not None:
            metrics["generations/win_rate"] = self._win_rate(self._judge, answers, step)
        return metrics, signs_of_collapse(now, self._start.statistics, self._expected_length)

    def _win_rate(self, judge: Judge, answers: _Answers, step: int) -> float:
        """Mean verdict over the prompts that have one; NaN if none has. A judge that fails does not end training."""
        try:
            verdicts = judge.compare(self._pairs(answers.texts, self._start.texts))
        except SimpoError as error:
            logger.warning("step %d: no win rate: %s", step, error)
            return math.nan
        if judge.usage is not None:
            self._log(judge.usage.line())
        given = [verdict for verdict in verdicts if verdict is not None]
        if len(given) < len(verdicts):
            missing = len(verdicts) - len(given)
            logger.warning("step %d: eval_judge gave no verdict on %d of %d prompts", step, missing, len(verdicts))
        return sum(given) / len(given) if given else math.nan

    def _pairs(self, a: Sequence[Sequence[str]], b: Sequence[Sequence[str]]) -> list[Pair]:
        """Pairs of answers to the first prompts."""
        return [
            Pair.to(prompt, (ours[0], theirs[0])) for prompt, ours, theirs in zip(self._prompts, a, b, strict=False)
        ]

    def _sample(self, trainer: PackedTrainer) -> _Answers:
        """One answer to every prompt, on every rank; all ranks must call it."""
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


def evaluations(config: TrainingSettings, rows: int) -> int:
    """The greatest number of evaluations in a training on this many rows."""
    steps_per_epoch = math.ceil(rows / (config.per_device_train_batch_size * config.world_size))
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * steps_per_epoch)
    every = steps_per_epoch
    if config.eval_strategy == "steps":
        assert config.eval_steps is not None  # the configuration has filled it in
        every = math.ceil(config.eval_steps if config.eval_steps >= 1 else config.eval_steps * steps)
    return math.ceil(steps / every) + config.eval_on_start


# ---- The annotator of ``simpo online``: a part of the run that scores its rollouts.

_TRIED_PROMPTS = 2


class Annotation(RunCallback):
    """Scores a trainer's rollouts with any annotator of ``simpo annotate``; the main process does it for all."""

    _scorer: Scorer
    _gold: Scorer | None
    _config: OnlineConfig
    _log: Log

    def __init__(self, arguments: AnnotatorArguments, model: ModelArguments) -> None:
        self._arguments, self._model = arguments, model

    @property
    def settings(self) -> Mapping[str, Any]:
        """The annotators' names, and what determines their scores."""
        found = {"annotator": self._arguments.annotator}
        found |= {f"annotator/{key}": value for key, value in self._scorer.identity.items()}
        if self._gold is not None:
            found |= {f"gold_annotator/{key}": value for key, value in self._gold.identity.items()}
        return found

    def prepare(self, config: OnlineConfig, processing: Any, held_out: Dataset | None, log: Log) -> None:
        """Make the annotators and load what they need; raises :class:`~simpo.errors.SimpoError` if that fails."""
        arguments = self._arguments
        client = arguments.client()
        if client is not None:
            client.endpoint.api_key()
        # an annotator's own progress would start again with every rollout
        options = JudgeOptions.during_training(self._model, client, lambda line: None)
        self._scorer = make_annotator(arguments.annotator, options, arguments.annotator_normalization)
        self._gold = None if arguments.gold_annotator is None else make_annotator(arguments.gold_annotator, options)
        self._config, self._log = config, log
        if config.process_index == 0:
            for scorer in self._scorers:
                scorer.prepare()

    @property
    def _scorers(self) -> list[Scorer]:
        """Every annotator on its own."""
        return [*self._scorer.scorers, *([] if self._gold is None else [self._gold])]

    def check_trainer(self, trainer: Trainer) -> None:
        """Try the annotators on invented answers, except behind a server, whose cost is confirmed instead."""
        trainer.annotator = self.score
        if self._gold is not None:
            trainer.gold_annotator = self.score_by_gold
        if self._config.process_index:
            return
        number = self._config.num_generations
        prompts = prompts_from_rows(trainer.train_dataset)
        invented = [Answers.to(one, ["Answer."] * number) for one in prompts]
        for scorer in self._scorers:
            scorer.check(invented)
            if scorer.usage is None:
                scorer.score(invented[:_TRIED_PROMPTS])
        if self._scorer.usage is None:
            return
        assert self._config.max_new_tokens is not None
        longest = [placeholder_answer(self._config.max_new_tokens, f"a{k}") for k in range(number)]
        estimate = self._scorer.estimate([Answers.to(one, longest) for one in prompts])
        passes = math.ceil(self._config.num_train_epochs)
        if self._config.max_steps > 0:
            per_step = self._config.train_batch_size * self._config.world_size / self._config.rollout_epochs
            passes = math.ceil(self._config.max_steps * per_step / len(prompts))
        confirm_cost(estimate * passes, yes=self._arguments.annotator_yes, log=self._log)

    def score(self, answered: Sequence[AnsweredPrompt]) -> Scores:
        """The scores of a rollout's answers; what one of several annotators leaves without a score is logged."""
        rows = _rows(answered)
        scores = self._scorer.score(rows)
        for name, count in count_missing(self._scorer.parts).items():
            if count:
                self._log(f"{name}: no score for {count:,} of {sum(len(row.responses) for row in rows):,} answers")
        return scores

    def score_by_gold(self, answered: Sequence[AnsweredPrompt]) -> Scores:
        """The scores of a rollout's answers by the annotator that is not trained on."""
        assert self._gold is not None
        return self._gold.score(_rows(answered))


def _rows(answered: Sequence[AnsweredPrompt]) -> list[Answers]:
    return [Answers.to(one.prompt, one.texts) for one in answered]
