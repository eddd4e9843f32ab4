"""``eval_generations``: a model in training answers held-out prompts, which are judged and checked for collapse."""

from __future__ import annotations

import dataclasses
import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, parse_flag_from_env
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from simpo.client import ChatClient, Endpoint, confirm_cost, stand_in
from simpo.client.cache import default_cache
from simpo.data.prompts import Prompt, prepare_prompts
from simpo.errors import SimpoError
from simpo.generation.chunks import gather, missing_chunks, read_samples, response_texts, sample_chunks, write_responses
from simpo.generation.engine import Sampled, TransformersEngine
from simpo.generation.settings import SamplingSettings
from simpo.judging.protocol import Judge, Pair
from simpo.judging.registry import ANNOTATORS, JudgeOptions, check_judges_anew, make_judge
from simpo.models.checkpoint import Checkpoint
from simpo.models.devices import from_main
from simpo.models.settings import ModelArguments
from simpo.runs.lines import read_lines
from simpo.runs.log import Log
from simpo.training.callbacks import RunCallback
from simpo.training.packed import PackedTrainer
from simpo.training.settings import TrainingSettings

# ---- Whether a model that is being trained still answers: figures of its answers, and bounds against the
# start model's.


# Bounds of ours, wide enough for what good training does to answers; see docs/metrics.md.
_SHARE = 0.5  # of the start's end-of-turn rate and distinct-2


_LEAST_FALL = 0.25  # of the end-of-turn rate, so that one answer of a few is not enough


_TIMES = 2.0  # the longer of the start's answers and the held-out responses


@dataclass(frozen=True)
class AnswerFigures:
    """Figures of one answer to each of several prompts.

    Attributes:
        length: mean number of tokens, the one that ended the answer included.
        end_of_turn_rate: share of answers that ended by themselves.
        distinct_2: share of an answer's pairs of neighbouring tokens that are different ones (distinct-n with n = 2:
            Li et al. 2016, arXiv 1510.03055), each answer by itself, mean over the answers that have such a pair; NaN
            if none has.
    """

    length: float
    end_of_turn_rate: float
    distinct_2: float

    @classmethod
    def of(cls, answers: Sequence[Sampled]) -> AnswerFigures:
        """The figures of at least one answer."""
        bigrams = [list(pairwise(answer.ids)) for answer in answers if len(answer.ids) > 1]
        return cls(
            sum(len(answer.ids) for answer in answers) / len(answers),
            sum(answer.finished for answer in answers) / len(answers),
            sum(len(set(found)) / len(found) for found in bigrams) / len(bigrams) if bigrams else math.nan,
        )

    def line(self) -> str:
        """Format the settings as one line."""
        return ", ".join(f"{name} {value:.4g}" for name, value in dataclasses.asdict(self).items())


def signs_of_collapse(now: AnswerFigures, start: AnswerFigures, expected_length: float) -> list[str]:
    """Figures that are out of bounds, each in words; none for a model that answers as before, or better.

    Args:
        now: of the model in training.
        start: of the model that training started from, on the same prompts.
        expected_length: mean tokens of the held-out responses, which fine-tuning may well lengthen answers to.
    """
    fall = start.end_of_turn_rate - now.end_of_turn_rate
    out_of_bounds = {
        "end_of_turn_rate": now.end_of_turn_rate < _SHARE * start.end_of_turn_rate and fall > _LEAST_FALL,
        "length": now.length > _TIMES * max(start.length, expected_length),
        "distinct_2": now.distinct_2 < _SHARE * start.distinct_2,
    }
    return [
        f"{name} {getattr(start, name):.3g} -> {getattr(now, name):.3g}" for name, out in out_of_bounds.items() if out
    ]


# ---- Keys of a training recipe about answers to held-out prompts.


@dataclass
class GenerationArguments:
    """Answers to held-out prompts at every evaluation, and who compares them with the start model's."""

    eval_generations: int = field(
        default=0, metadata={"help": "Held-out prompts that are answered at every evaluation; 0 is off."}
    )
    eval_judge: str | None = field(
        default=None, metadata={"help": f"Judge of those answers against the start model's: {ANNOTATORS}."}
    )
    eval_judge_url: str | None = field(
        default=None, metadata={"help": "Server of eval_judge api; its key is in OPENAI_API_KEY."}
    )
    eval_judge_model: str | None = field(default=None, metadata={"help": "That judge's name on the server."})
    yes: bool = field(default=False, metadata={"help": "Send requests of eval_judge api without asking."})

    def __post_init__(self) -> None:
        server = (self.eval_judge_url, self.eval_judge_model)
        if self.eval_generations < 0:
            raise SimpoError(f"eval_generations: must be at least 0, not {self.eval_generations}")
        if self.eval_judge is not None and not self.eval_generations:
            raise SimpoError("eval_judge: there is nothing to judge; set eval_generations")
        if self.eval_judge == "api" and None in server:
            raise SimpoError("eval_judge: api needs eval_judge_url and eval_judge_model")
        if self.eval_judge != "api" and server != (None, None):
            raise SimpoError("eval_judge_url and eval_judge_model: of eval_judge api alone")
        if self.yes and self.eval_judge != "api":
            raise SimpoError("yes: there is nothing to agree to without eval_judge api; leave it out")

    def judge(self, *, trust_remote_code: bool, log: Log) -> Judge | None:
        """The judge, if one is named.

        Args:
            trust_remote_code: run a function, or code that comes with a model.
            log: called with lines of progress.

        Raises:
            SimpoError: there is none of that name, or something that it needs is missing.
        """
        if self.eval_judge is None:
            return None
        try:
            check_judges_anew(self.eval_judge)
            client = None
            if self.eval_judge_url is not None and self.eval_judge_model is not None:
                client = ChatClient(Endpoint(self.eval_judge_url, self.eval_judge_model), default_cache())
            options = JudgeOptions(client, trust_remote_code=trust_remote_code, log=log)
            return make_judge(self.eval_judge, options)
        except SimpoError as error:
            raise SimpoError(f"eval_judge: {error}") from error


# ---- ``eval_judge``: how a model in training compares with the start model, by a judge.


logger = logging.getLogger(__name__)


_TRIED = 4  # pairs, so that one that a server refuses is not taken for all


class EvalJudge:
    """A judge of one answer to each of the same prompts, at every evaluation."""

    def __init__(self, judge: Judge, prompts: Sequence[Prompt], log: Log) -> None:
        self._judge, self._prompts, self._log = judge, prompts, log

    def confirm_cost(self, evaluations: int, longest: int, *, yes: bool) -> None:
        """Let the user agree to what a judge behind a server may cost.

        Args:
            evaluations: how often it will judge, at most.
            longest: tokens that an answer may have.
            yes: the user has agreed beforehand.

        Raises:
            SimpoError: the user does not agree, or cannot be asked.
        """
        answers = [[stand_in(longest, name)] * len(self._prompts) for name in "ab"]
        confirm_cost(
            self._judge.estimate(self._pairs(*answers)) * evaluations,
            yes=yes,
            log=lambda line: self._log(f"eval_judge, at {evaluations:,} evaluations: {line}"),
        )

    def try_on(self, answers: Sequence[str]) -> None:
        """Judge a few answers against themselves with something added: like ones no server would be asked about.

        Raises:
            SimpoError: they cannot be judged.
        """
        few = answers[:_TRIED]
        self._judge.compare(self._pairs(few, [f"{answer} ." for answer in few]))

    def win_rate(self, answers: Sequence[str], start: Sequence[str], step: int) -> float:
        """Mean verdict over the prompts that have one; NaN if none has, or the judge fails, which ends no training."""
        try:
            verdicts = self._judge.compare(self._pairs(answers, start))
        except SimpoError as error:
            logger.warning("step %d: no win rate: %s", step, error)
            return math.nan
        if self._judge.usage is not None:
            self._log(self._judge.usage.line())
        given = [verdict for verdict in verdicts if verdict is not None]
        if len(given) < len(verdicts):
            missing = len(verdicts) - len(given)
            logger.warning("step %d: eval_judge gave no verdict on %d of %d prompts", step, missing, len(verdicts))
        return sum(given) / len(given) if given else math.nan

    def _pairs(self, a: Sequence[str], b: Sequence[str]) -> list[Pair]:
        """Pairs of answers to the first prompts, as many as there are answers."""
        return [
            Pair(prompt.id, prompt.content, ours, theirs, prompt.context)
            for prompt, ours, theirs in zip(self._prompts, a, b, strict=False)
        ]


def evaluations(config: TrainingSettings, rows: int) -> int:
    """How often a training of so many rows evaluates, at most."""
    an_epoch = math.ceil(rows / (config.per_device_train_batch_size * config.world_size))
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * an_epoch)
    every = an_epoch
    if config.eval_strategy == "steps":
        assert config.eval_steps is not None  # the configuration has filled it in
        every = math.ceil(config.eval_steps if config.eval_steps >= 1 else config.eval_steps * steps)
    return math.ceil(steps / every) + config.eval_on_start


FOLDER, START = "generations", "start.jsonl"


_AT_ONCE = 32  # answers that are generated together


class Generations(RunCallback):
    """Answers held-out prompts at every evaluation while a language model is trained.

    Every evaluation also has the figures of one greedy answer to each of the same held-out prompts, and with a judge
    the win rate against the start model's answers. The answers are files in ``generations``, as ``simpo sample`` writes
    them: the start model's ``start.jsonl``, and ``step-N.jsonl``. Weights, training mode, generation settings and
    random numbers are left as they were, so that a run has the same bits without it. Where answers collapse, a line
    says so, and training goes on.

    Several processes share the prompts; the main one judges.
    """

    _config: TrainingSettings
    _tokenizer: PreTrainedTokenizerBase
    _log: Log
    _judge: EvalJudge | None
    _sampling: SamplingSettings
    _prompts: list[Prompt]
    _trainer: PackedTrainer
    _engine: TransformersEngine
    _expected_length: float
    _start: list[list[Sampled]]

    def __init__(self, arguments: GenerationArguments, model: ModelArguments) -> None:
        """Nothing is read yet.

        Args:
            arguments: the recipe's.
            model: the model in training.
        """
        self._arguments = arguments
        self._model = model

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe's keys, without the user's agreement, which changes nothing that is computed."""
        return {key: value for key, value in dataclasses.asdict(self._arguments).items() if key != "yes"}

    def prepare(
        self, config: TrainingSettings, tokenizer: PreTrainedTokenizerBase, rows: Dataset | None, log: Log
    ) -> None:
        """Choose the prompts and the judge.

        Raises:
            SimpoError: nothing is evaluated, weights are spread over processes, no prompt leaves room for an answer, or
                there is no such judge.
        """
        if rows is None or config.eval_strategy == "no":
            raise SimpoError(
                "eval_generations: there are no evaluations; name held-out rows (eval_dataset_name) and set "
                "eval_strategy, or set it to 0"
            )
        if _spread(config):
            raise SimpoError(
                "eval_generations: not possible with FSDP or DeepSpeed, which spread the weights over the processes; "
                "set it to 0 and use simpo compare after training"
            )
        self._config, self._tokenizer, self._log = config, tokenizer, log
        judge = self._arguments.judge(trust_remote_code=self._model.trust_remote_code, log=log)
        context = min(Checkpoint.read(self._model).context or config.max_length, config.max_length)
        chunk_size = min(_AT_ONCE, math.ceil(self._arguments.eval_generations / config.world_size))
        self._sampling = SamplingSettings(temperature=0.0).resolved(context=context, chunk_size=chunk_size)
        assert self._sampling.max_new_tokens is not None
        self._prompts = self._chosen(rows, context - self._sampling.max_new_tokens)
        self._judge = None if judge is None else EvalJudge(judge, self._prompts, log)

    def _chosen(self, rows: Dataset, room: int) -> list[Prompt]:
        """Some of the prompts of ``rows`` that have at most ``room`` tokens, by the run's seed, in their order."""
        count = self._arguments.eval_generations
        with self._config.main_process_first(desc="reading held-out prompts"):  # the others find them in the cache
            rendering = self._config.tokenize_settings.rendering
            known = prepare_prompts(rows, self._tokenizer, label="eval_generations", rendering=rendering)
        found = [prompt for prompt in known if len(prompt.ids) <= room]
        if not found:
            raise SimpoError(
                f"eval_generations: no held-out prompt has at most {room:,} tokens, half of max_length or of the "
                "model's context, which leaves as many to an answer; raise max_length or set it to 0"
            )
        few = f" (there are no more of at most {room:,} tokens)" if len(found) < count else ""
        chosen = np.random.default_rng(self._config.seed).permutation(len(found))[:count]
        self._log(
            f"eval_generations: {len(chosen):,} held-out prompts{few} are answered at every evaluation, in at most "
            f"{self._sampling.max_new_tokens:,} tokens"
        )
        return [found[number] for number in sorted(chosen)]

    def before_training(self, trainer: PackedTrainer, *, resumed: bool) -> None:
        """Let the start model answer, or read what it answered at an earlier start of this run, and try the judge.

        Raises:
            SimpoError: the user does not agree to what judging may cost, or the answers cannot be had or judged.
        """
        self._trainer = trainer
        if self._main and self._judge is not None:
            assert self._sampling.max_new_tokens is not None
            count = evaluations(self._config, len(trainer.train_dataset))
            self._judge.confirm_cost(count, self._sampling.max_new_tokens, yes=self._arguments.yes)
        self._engine = TransformersEngine(trainer.model, self._tokenizer)
        responses = trainer.eval_dataset["response_ids"]
        self._expected_length = sum(len(several[0]) for several in responses) / len(responses)
        path = self._folder / START
        with self._untouched_randomness():
            stored = from_main(self._stored(path) if resumed and self._main else None)
            self._start = self._samples() if stored is None else stored
            if self._main:
                if stored is None:
                    write_responses(path, self._prompts, self._texts(self._start), self._start)
                self._log(f"the start model's answers: {self._figures_of(self._start).line()} ({path})")
                if self._judge is not None:
                    self._judge.try_on(self._answers(self._start))

    def _stored(self, path: Path) -> list[list[Sampled]] | None:
        """The start model's answers, if they are there, to these prompts."""
        rows = read_lines(path) if path.exists() else []
        ours = [row["id"] for row in rows] == [prompt.id for prompt in self._prompts]
        return read_samples(rows) if ours else None

    def evaluate(self, trainer: PackedTrainer) -> dict[str, float]:
        """Metrics of the current answers, on every process."""
        with self._untouched_randomness():
            samples = self._samples()
            return from_main(self._seen(samples) if self._main else None)

    def _seen(self, samples: list[list[Sampled]]) -> dict[str, float]:
        """Write the answers down, compare them with the start model's, and warn of a collapse."""
        step = self._trainer.state.global_step
        write_responses(self._folder / f"step-{step}.jsonl", self._prompts, self._texts(samples), samples)
        now, start = self._figures_of(samples), self._figures_of(self._start)
        if signs := signs_of_collapse(now, start, self._expected_length):
            logger.warning(
                "step %d: the answers to held-out prompts have collapsed (start -> now: %s); the likely cause is a "
                "learning rate that is too high (%g): look at %s and start again with a lower one",
                *(step, ", ".join(signs), self._config.learning_rate, self._folder / f"step-{step}.jsonl"),
            )
        found = {f"generations/{name}": value for name, value in dataclasses.asdict(now).items()}
        if self._judge is not None:
            found["generations/win_rate"] = self._judge.win_rate(
                self._answers(samples), self._answers(self._start), step
            )
        return found

    def _samples(self) -> list[list[Sampled]]:
        """One answer to every prompt, on every process; all call."""
        config = self._config
        ids = [prompt.ids for prompt in self._prompts]
        share = missing_chunks(ids, self._sampling)[config.process_index :: config.world_size]
        with self._trainer.accelerator.autocast(), _not_compiled(config.torch_compile):
            records = list(sample_chunks(self._engine, ids, self._sampling, share))
        return gather(records if config.world_size == 1 else gather_object(records), len(ids))

    def _texts(self, samples: Sequence[Sequence[Sampled]]) -> list[list[str]]:
        return response_texts(self._tokenizer, self._prompts, samples)

    def _answers(self, samples: Sequence[Sequence[Sampled]]) -> list[str]:
        """The one answer to every prompt."""
        return [texts[0] for texts in self._texts(samples)]

    @staticmethod
    def _figures_of(samples: Sequence[Sequence[Sampled]]) -> AnswerFigures:
        return AnswerFigures.of([answers[0] for answers in samples])

    @property
    def _folder(self) -> Path:
        return Path(self._config.output_dir) / FOLDER

    @property
    def _main(self) -> bool:
        return self._config.process_index == 0

    @contextmanager
    def _untouched_randomness(self) -> Iterator[None]:
        """What judges and models draw, or seed, is drawn apart from the training."""
        device = self._config.device
        python, arrays = random.getstate(), np.random.get_state()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
        random.setstate(python)
        np.random.set_state(arrays)


def _spread(config: TrainingSettings) -> bool:
    """Whether a process has a part of the weights only, by the recipe or by what the launcher says."""
    launched = any(parse_flag_from_env(f"ACCELERATE_USE_{kind}") for kind in ("FSDP", "DEEPSPEED"))
    return bool(config.fsdp or config.deepspeed) or launched


def _not_compiled(compiled: bool) -> AbstractContextManager[Any]:
    """Compiled layers as they were: a cache that grows with every token is not what they were compiled for."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
