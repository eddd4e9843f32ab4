"""``simpo compare``: judges the answers of two models, and measures how far the judges agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from simpo.client import Prices, confirm_cost
from simpo.config import setting
from simpo.data.messages import context_of
from simpo.data.prompts import columns_identity, read_prompts
from simpo.data.settings import RenderSettings
from simpo.errors import SimpoError
from simpo.evaluation.answers import Answerer, Record, answers_path, is_answer_file, read_answer_file
from simpo.evaluation.preferences import Judged, preference_metrics, win_rate_over_prompts
from simpo.generation.sample import FILE_NAME, EngineName, PromptArguments, sample_responses
from simpo.generation.settings import SamplingSettings
from simpo.judging.protocol import Judge, Pair, ThinkingFilter, verdict_of
from simpo.judging.registry import make_judge
from simpo.judging.settings import JUDGES, JudgeOptions, JudgeSettings
from simpo.models.checkpoint import Checkpoint
from simpo.models.devices import free_memory
from simpo.models.settings import ModelArguments
from simpo.runs.files import write_lines
from simpo.runs.folder import RunFolder
from simpo.runs.log import Log
from simpo.runs.manifest import file_digest
from simpo.runs.results import Metric, Stage, fingerprint
from simpo.runs.terminal import interruptible
from simpo.statistics import Interval, mean_interval, proportion_interval, share_interval

VERDICTS = "verdicts.jsonl"

Scoring = Callable[[Any, str], float]  # maps a prompt and an answer to a score
SIDES: dict[Stage, str] = {"before": "b", "after": "a"}  # model a is compared with the baseline b

_SIDE = "Model, file of answers, or simpo sample folder"


@dataclass(kw_only=True)
class CompareSettings:
    """The two sides and the judges."""

    a: str = field(metadata={"help": f"{_SIDE}; its win rate is reported.", "positional": "A"})
    b: str = field(metadata={"help": f"{_SIDE} to compare with.", "positional": "B"})
    output_dir: Path = field(metadata={"help": "Run folder; reuse it to continue an interrupted run."})
    judge: list[str] = field(metadata={"help": f"One or more of {JUDGES}.", "repeat": True})
    prompts: str | None = setting(None, "Prompts for the models to answer: a file, folder or hub dataset id.")
    split: str = setting("train", "Dataset split to read prompts from.")
    sampling: SamplingSettings = field(default=SamplingSettings(temperature=0.0))
    engine: EngineName = setting("transformers", "Engine that generates the answers.")
    rendering: RenderSettings = field(default_factory=RenderSettings)
    judging: JudgeSettings = field(default=JudgeSettings())

    def flat(self) -> dict[str, Any]:
        """Return all settings as one flat mapping."""
        settings = asdict(self)
        for group in ("sampling", "rendering", "judging"):
            settings |= settings.pop(group)
        return settings


def compare(settings: CompareSettings, *, options: JudgeOptions | None = None, argv: Sequence[str] = ()) -> Path:
    """Sample answers if needed, and judge every answer by ``a`` against every answer by ``b``.

    The cost of an API judge is confirmed before anything is sampled. Repeating the call resumes a killed run: sampled
    answers are in the folder and API replies in the cache; only other judges start over.

    Writes ``verdicts.jsonl`` and ``results.json`` to the run folder and returns the path of the latter. ``options``
    override the judge options in the settings.

    Raises:
        SimpoError: the settings or files are invalid, or the user declines the cost of a judge.
        InterruptedRun: the user stopped the run.
    """
    folder, options = settings.output_dir, options or settings.judging.options()
    with interruptible(), RunFolder(folder, command="compare") as run:
        sides = read_sides(settings)
        judges = make_judges(settings.judge, replace(options, log=run.log))
        identity: dict[str, Any] = {"seed": settings.sampling.seed}
        for side in sides:
            identity |= {f"{side.name}/{key}": value for key, value in side.identity().items()}
        identity |= {"strip_thinking": True} if options.strip_thinking else {}
        for name, judge in judges.items():
            identity |= {f"judge {name}/{key}": value for key, value in judge.identity.items()}
        prices = settings.judging.token_prices()
        if not run.finished:
            a, b = (side.expected_answers() for side in sides)
            pairs, _ = all_pairs(match_answers(a, b, f"{settings.a} and {settings.b}"))
            for judge in judges.values():
                judge.check(pairs)
                confirm_cost(judge.estimate(pairs), yes=settings.judging.yes, log=run.log, prices=prices)
        run.begin(identity, argv=argv, resolved=settings.flat())

        def measure() -> list[Metric]:
            answers = read_matched(*(side.answers(run.log) for side in sides))
            thinking_filter = ThinkingFilter(options.strip_thinking)
            answers = [each.for_judge(thinking_filter) for each in answers]
            pairs, prompts = all_pairs(answers)
            run.log(f"{len(pairs):,} pairs of answers to {len(answers):,} prompts")
            judged = judge_pairs(judges, pairs, prompts, prices=prices, log=run.log)
            write_verdicts(folder / VERDICTS, judged)
            seed = settings.sampling.seed
            metrics = preference_metrics(judged, seed) + judge_metrics(judges, prompts, seed)
            return metrics + text_metrics(answers) + thinking_filter.metrics("", run.log)

        return run.complete(measure)


# ---- The two sides: a model to sample from, or a file of answers.


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a file of answers, or a model whose answers to ``prompts`` are written to it."""

    name: str  # "a" or "b"
    file: Path
    model: Answerer | None  # None if the user gave a file
    prompts: PromptArguments

    def identity(self) -> dict[str, Any]:
        """Return what determines the answers, as JSON values."""
        if self.model is None:
            return {"answers": file_digest(self.file)}
        prompts, _ = read_prompts(self.prompts.rows())
        ids = fingerprint([prompt.id for prompt in prompts])
        return self.model.identity() | {"prompts": ids} | columns_identity(prompts)

    def answers(self, log: Log) -> Path:
        """Return the file of answers, sampling them first if needed."""
        if self.model is not None:
            model, settings = self.model.model, self.model.settings
            log(f"answers from {self.name.upper()}, {model.model_name_or_path}:")
            sample_responses(model, self.prompts, settings, self.file.parent, engine=self.model.engine)
            free_memory()
        return self.file

    def expected_answers(self) -> dict[str, Record]:
        """Return answers by prompt id, or dummies of maximum length if they have not been sampled yet."""
        if self.model is None or self.file.exists():
            return read_answer_file(self.file)
        responses = [self.model.placeholder_answer(f"{self.name}{i}") for i in range(self.model.settings.n)]
        return {
            prompt.id: {
                "id": prompt.id,
                "prompt": prompt.content,
                **prompt.context.columns,
                "responses": responses,
                "extra": prompt.extra,
            }
            for prompt in self.model.prompts_that_fit(self.prompts)
        }


def read_sides(settings: CompareSettings) -> tuple[Side, Side]:
    """Resolve both sides to a file of answers, a ``simpo sample`` run folder, or else a model."""
    names, prompts = (settings.a, settings.b), settings.prompts
    files: list[Path | None] = []
    for name in names:
        path = answers_path(name)
        files.append(path if path.is_file() or is_answer_file(name) else None)
    given = next((path for path in files if path is not None), None)
    if None not in files and prompts is not None:
        raise SimpoError("prompts: both sides already have answers, with their prompts; remove --prompts")
    if prompts is None and given is None:
        raise SimpoError("prompts: the models need prompts to answer; set --prompts")
    source, split = (str(given), "train") if prompts is None else (prompts, settings.split)
    arguments = PromptArguments(source, split, rendering=settings.rendering)
    sides = []
    for side, name, file in zip("ab", names, files, strict=True):
        if file is not None:
            read_answer_file(file)  # fail on an invalid file before anything is sampled
            sides.append(Side(side, file, None, arguments))
            continue
        judging = settings.judging
        model = ModelArguments(
            name,
            dtype=judging.dtype,
            trust_remote_code=judging.trust_remote_code,
            allow_pickle=judging.allow_pickle,
        )
        model = Checkpoint.read(model).arguments
        answerer = Answerer(model, settings.sampling, engine=settings.engine, rendering=settings.rendering)
        sides.append(Side(side, settings.output_dir / side / FILE_NAME, answerer, arguments))
    first, second = sides
    return first, second


@dataclass(frozen=True)
class PromptAnswers:
    """Answers by both models to one prompt; model ``a`` is compared with the baseline ``b``."""

    prompt: Any  # text or messages
    a: Mapping[str, Any]  # one or more answers, in the format of ``simpo sample``
    b: Mapping[str, Any]

    def for_judge(self, thinking_filter: ThinkingFilter) -> PromptAnswers:
        """Return the answers as judges see them."""
        a, b = ({**side, "responses": list(map(thinking_filter, side["responses"]))} for side in (self.a, self.b))
        return replace(self, a=a, b=b)


def read_matched(a: Path, b: Path) -> list[PromptAnswers]:
    """Read two files of answers and match them by prompt; see :func:`match_answers`."""
    return match_answers(read_answer_file(a), read_answer_file(b), f"{a} and {b}")


def match_answers(a: Mapping[str, Record], b: Mapping[str, Record], names: str) -> list[PromptAnswers]:
    """Match answers by prompt id, in the order of ``a``; ``names`` describes both sides in error messages."""
    if a.keys() != b.keys():
        raise SimpoError(
            f"{names}: {len(a.keys() ^ b.keys())} prompts were answered by only one side; both sides need the same "
            "prompts (a model skips prompts that do not fit its context)"
        )
    conflict = next((key for key, record in a.items() if record["prompt"] != b[key]["prompt"]), None)
    if conflict is not None:
        raise SimpoError(f"{names}: id {conflict!r} belongs to different prompts; both sides need the same prompts")
    return [PromptAnswers(record["prompt"], record, b[key]) for key, record in a.items()]


def all_pairs(answers: Sequence[PromptAnswers]) -> tuple[list[Pair], np.ndarray]:
    """Pair every answer by ``a`` with every answer by ``b`` to the same prompt; also returns prompt indices ``[P]``."""
    pairs, prompts = [], []
    for index, each in enumerate(answers):
        single = len(each.a["responses"]) == len(each.b["responses"]) == 1
        for i, a in enumerate(each.a["responses"]):
            for j, b in enumerate(each.b["responses"]):
                key = each.a["id"] if single else f"{each.a['id']}/{i}-{j}"
                pairs.append(Pair(key, each.prompt, (a, b), context_of(each.a), each.a.get("extra", {})))
                prompts.append(index)
    return pairs, np.array(prompts)


# ---- Judges.


def make_judges(names: Sequence[str], options: JudgeOptions) -> dict[str, Judge]:
    """Create judges, keyed by their names in results: the kind, with a number if a kind occurs more than once."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise SimpoError(f"judge: {repeated[0]!r} is given twice")
    judges: dict[str, Judge] = {}
    for name in names:
        kind = name.partition(":")[0]
        count = sum(other.partition("-")[0] == kind for other in judges)
        judges[f"{kind}-{count + 1}" if count else kind] = make_judge(name, options)
    return judges


def judge_pairs(
    judges: Mapping[str, Judge], pairs: Sequence[Pair], prompts: np.ndarray, *, prices: Prices | None, log: Log
) -> Judged:
    """Collect every judge's verdicts and, for judges that score, score differences; see :class:`Judged`."""
    judged = Judged(pairs, prompts)
    for name, judge in judges.items():
        log(f"judge {name}")
        margins = judge.margins(pairs)
        if margins is None:
            verdicts = judge.compare(pairs)
        else:
            judged.margins[name] = np.array(margins)
            verdicts = [verdict_of(margin) for margin in margins]
        judged.verdicts[name] = np.array(verdicts, dtype=np.float64)  # None becomes NaN
        if judge.usage is not None:
            log(judge.usage.line(prices))
        if missing := int(np.isnan(judged.verdicts[name]).sum()):
            log(f"note: judge {name} gave no verdict on {missing:,} of {len(pairs):,} pairs, which do not count")
    return judged


def judge_metrics(judges: Mapping[str, Judge], prompts: np.ndarray, seed: int) -> list[Metric]:
    """Compute metrics of API judges after judging: conflicting orders, position bias and default temperatures.

    ``prompts`` is the index of each pair's prompt, ``[P]``.
    """
    metrics = []
    for name, judge in judges.items():
        if judge.usage is None:
            continue
        shares = np.array(judge.first_shown_wins, dtype=np.float64)  # None becomes NaN
        metrics += [
            Metric(f"conflicting_orders/{name}", judge.conflicting, n=len(prompts)),
            Metric.of(f"first_shown_win_rate/{name}", win_rate_over_prompts(shares, prompts, seed)),
        ]
        if judge.usage.default_temperature:
            count, replies = judge.usage.default_temperature, judge.usage.replies
            metrics.append(Metric(f"judged_at_default_temperature/{name}", count, n=replies))
    return metrics


# ---- Metrics of the answers.


def compare_answers(answers: Sequence[PromptAnswers], score: Scoring, others: Mapping[str, Scoring]) -> list[Metric]:
    """Compute metrics of the baseline ``b`` ("before") and the model ``a`` ("after"), and the model's win rate.

    ``score`` decides which answer wins; ``others`` are additional metrics by name. Intervals are over prompts.
    """

    def values(side: str, scoring: Scoring) -> list[list[float]]:
        return [[float(scoring(each.prompt, text)) for text in getattr(each, side)["responses"]] for each in answers]

    metrics = [Metric.of("win_rate", win_rate(values("a", score), values("b", score)), "after")]
    for name, scoring in {"score": score, **others}.items():
        for stage, side in SIDES.items():
            scores = values(side, scoring)
            interval = share_interval if {x for of_prompt in scores for x in of_prompt} <= {0.0, 1.0} else mean_interval
            metrics.append(Metric.of(name, interval([float(np.mean(of_prompt)) for of_prompt in scores]), stage))
    return metrics + sampled_metrics(answers)


def win_rate(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> Interval:
    """Compute the fraction of comparisons that ``a`` wins, ties counting half, with an interval over prompts.

    ``a`` and ``b`` hold the scores of each prompt's answers. Every answer by ``a`` is compared with every answer by
    ``b`` to the same prompt. As answers to the same prompt are not independent, each prompt is one observation.
    """
    shares = []
    for ours, theirs in zip(a, b, strict=True):
        difference = np.subtract.outer(np.asarray(ours), np.asarray(theirs))
        shares.append(float(((difference > 0) + 0.5 * (difference == 0)).mean()))
    return share_interval(shares)


def sampled_metrics(answers: Sequence[PromptAnswers]) -> list[Metric]:
    """Compute the length of sampled answers in tokens, over prompts, and the fraction that ended, over answers."""
    metrics = []
    for stage, side in SIDES.items():
        records = [getattr(each, side) for each in answers]
        lengths = [float(np.mean([len(ids) for ids in record["response_ids"]])) for record in records]
        ended = [finished for record in records for finished in record["finished"]]
        metrics.append(Metric.of("response_tokens", mean_interval(lengths), stage))
        metrics.append(Metric.of("end_of_turn_rate", proportion_interval(sum(ended), len(ended)), stage))
    return metrics


def text_metrics(answers: Sequence[PromptAnswers]) -> list[Metric]:
    """Compute answer lengths in characters, over prompts, and empty answers; also :func:`sampled_metrics` if known."""
    metrics = []
    for stage, side in SIDES.items():
        texts = [getattr(each, side)["responses"] for each in answers]
        lengths = [float(np.mean([len(text) for text in responses])) for responses in texts]
        empty = [not text.strip() for responses in texts for text in responses]
        metrics.append(Metric.of("response_characters", mean_interval(lengths), stage))
        metrics.append(Metric("empty_responses", sum(empty), stage, len(empty)))
    sampled = all({"response_ids", "finished"} <= record.keys() for each in answers for record in (each.a, each.b))
    return metrics + sampled_metrics(answers) if sampled else metrics


def write_verdicts(path: Path, judged: Judged) -> None:
    """Write every pair with its answers, verdicts (null if there is none) and margins as JSON lines."""
    rows = (
        {
            "id": pair.id, "prompt": pair.prompt, **pair.context.columns, "a": pair.a, "b": pair.b,
            "verdicts": {name: float(values[index]) for name, values in judged.verdicts.items()},
            "margins": {name: float(values[index]) for name, values in judged.margins.items()},
        }
        for index, pair in enumerate(judged.pairs)
    )  # fmt: skip
    write_lines(path, rows)
