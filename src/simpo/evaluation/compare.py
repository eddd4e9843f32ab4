"""``simpo compare``: two models or their answers, judged by any judges, and where the judges differ."""

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
from simpo.judging.protocol import Judge, Pair, ShownAnswers, verdict_of
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

# Gives a number for an answer to a prompt.
Scoring = Callable[[Any, str], float]
# Model a is compared with the baseline b.
SIDES: dict[Stage, str] = {"before": "b", "after": "a"}


_SIDE = "Model, file of answers, or folder of simpo sample"


@dataclass(kw_only=True)
class CompareSettings:
    """The two sides and the judges."""

    a: str = field(metadata={"help": f"{_SIDE}, whose win rate is measured.", "positional": "A"})
    b: str = field(metadata={"help": f"{_SIDE}, which it is compared with.", "positional": "B"})
    output_dir: Path = field(metadata={"help": "Folder of the run; the same one continues it."})
    judge: list[str] = field(metadata={"help": f"One or several of {JUDGES}.", "repeat": True})
    prompts: str | None = setting(None, "File, folder or hub id of the prompts that models answer.")
    split: str = setting("train", "Split of the prompts.")
    sampling: SamplingSettings = field(default=SamplingSettings(temperature=0.0))
    engine: EngineName = setting("transformers", "What generates the answers.")
    rendering: RenderSettings = field(default_factory=RenderSettings)
    judging: JudgeSettings = field(default=JudgeSettings())

    def flat(self) -> dict[str, Any]:
        """Every key with its value, those of the parts next to the others."""
        found = asdict(self)
        for part in ("sampling", "rendering", "judging"):
            found |= found.pop(part)
        return found


def compare(settings: CompareSettings, *, options: JudgeOptions | None = None, argv: Sequence[str] = ()) -> Path:
    """Sample answers where needed, and judge every answer of ``a`` against every answer of ``b``.

    The cost of an API judge is confirmed before anything is sampled. A run that was killed is continued by the same
    call: samples are in the folder, replies of an API in its cache; other judges judge again.

    The folder gets ``verdicts.jsonl`` and ``results.json``, whose path is returned. Without
    ``options``, the judges' are those of the settings.

    Raises:
        SimpoError: something that the user gave cannot be used, or the user does not confirm the cost of a judge.
        InterruptedRun: the user stopped it.
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
            show = ShownAnswers(options.strip_thinking)
            answers = [replace(one, a=_shown(one.a, show), b=_shown(one.b, show)) for one in answers]
            pairs, prompts = all_pairs(answers)
            run.log(f"{len(pairs):,} pairs of answers to {len(answers):,} prompts")
            judged = judge_pairs(judges, pairs, prompts, prices=prices, log=run.log)
            write_verdicts(folder / VERDICTS, judged)
            seed = settings.sampling.seed
            metrics = preference_metrics(judged, seed) + judge_metrics(judges, prompts, seed)
            return metrics + text_metrics(answers) + show.metrics("", run.log)

        return run.complete(measure)


def _shown(record: Mapping[str, Any], show: ShownAnswers) -> dict[str, Any]:
    return {**record, "responses": [show(text) for text in record["responses"]]}


# ---- What is compared: a model that is sampled, or a file of answers.


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a file of answers, or a model whose answers to ``prompts`` become one."""

    name: str  # "a" or "b"
    file: Path
    model: Answerer | None  # None where the file was given
    prompts: PromptArguments

    def identity(self) -> dict[str, Any]:
        """The settings that determine the answers, as JSON values."""
        if self.model is None:
            return {"answers": file_digest(self.file)}
        prompts, _ = read_prompts(self.prompts.rows())
        ids = fingerprint([prompt.id for prompt in prompts])
        return self.model.identity() | {"prompts": ids} | columns_identity(prompts)

    def answers(self, log: Log) -> Path:
        """The file of the answers, which are sampled first if necessary."""
        if self.model is not None:
            model, settings = self.model.model, self.model.settings
            log(f"answers of {self.name.upper()}, {model.model_name_or_path}:")
            sample_responses(model, self.prompts, settings, self.file.parent, engine=self.model.engine)
            free_memory()
        return self.file

    def expected_answers(self) -> dict[str, Record]:
        """The answers by the prompts' ids; texts of the greatest possible length if they have not been sampled."""
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
            for prompt in self.model.fitting(self.prompts)
        }


def read_sides(settings: CompareSettings) -> tuple[Side, Side]:
    """Both sides: a file of answers, the folder of a run of ``simpo sample``, or else a model."""
    names, prompts = (settings.a, settings.b), settings.prompts
    files: list[Path | None] = []
    for name in names:
        path = answers_path(name)
        files.append(path if path.is_file() or is_answer_file(name) else None)
    given = next((path for path in files if path is not None), None)
    if None not in files and prompts is not None:
        raise SimpoError("prompts: both sides are answers, which have prompts of their own; leave --prompts out")
    if prompts is None and given is None:
        raise SimpoError("prompts: name the prompts that the models answer with --prompts")
    source, split = (str(given), "train") if prompts is None else (prompts, settings.split)
    arguments = PromptArguments(source, split, rendering=settings.rendering)
    sides = []
    for side, name, file in zip("ab", names, files, strict=True):
        if file is not None:
            read_answer_file(file)  # so that a mistake in it shows before anything is sampled
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
    """Both models' answers to one prompt; model ``a`` is compared with the baseline ``b``."""

    prompt: Any  # text or messages
    a: Mapping[str, Any]  # one or more answers, as ``simpo sample`` stores them
    b: Mapping[str, Any]


def read_matched(a: Path, b: Path) -> list[PromptAnswers]:
    """Match two files of answers by prompt, as :func:`match_answers`."""
    return match_answers(read_answer_file(a), read_answer_file(b), f"{a} and {b}")


def match_answers(a: Mapping[str, Record], b: Mapping[str, Record], names: str) -> list[PromptAnswers]:
    """Match answers by the prompts' ids, in the order of the first; ``names`` are those of both sides, for messages."""
    if a.keys() != b.keys():
        raise SimpoError(
            f"{names}: {len(a.keys() ^ b.keys())} prompts are in only one of them; let both answer the same prompts (a "
            "model leaves out those for which its context has no room)"
        )
    other = next((key for key, record in a.items() if record["prompt"] != b[key]["prompt"]), None)
    if other is not None:
        raise SimpoError(f"{names}: id {other!r} belongs to different prompts; let both answer the same prompts")
    return [PromptAnswers(record["prompt"], record, b[key]) for key, record in a.items()]


def all_pairs(answers: Sequence[PromptAnswers]) -> tuple[list[Pair], np.ndarray]:
    """Every answer of ``a`` with every answer of ``b`` to the same prompt, and the number of the prompt, ``[P]``."""
    pairs, prompts = [], []
    for number, one in enumerate(answers):
        single = len(one.a["responses"]) == len(one.b["responses"]) == 1
        for i, a in enumerate(one.a["responses"]):
            for j, b in enumerate(one.b["responses"]):
                key = one.a["id"] if single else f"{one.a['id']}/{i}-{j}"
                pairs.append(Pair(key, one.prompt, (a, b), context_of(one.a), one.a.get("extra", {})))
                prompts.append(number)
    return pairs, np.array(prompts)


# ---- Judges.


def make_judges(names: Sequence[str], options: JudgeOptions) -> dict[str, Judge]:
    """Judges by the names that results use: their kinds, with a number where a kind is repeated."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise SimpoError(f"judge {repeated[0]!r} is named twice")
    found: dict[str, Judge] = {}
    for name in names:
        kind = name.partition(":")[0]
        count = sum(other.partition("-")[0] == kind for other in found)
        found[f"{kind}-{count + 1}" if count else kind] = make_judge(name, options)
    return found


def judge_pairs(
    judges: Mapping[str, Judge], pairs: Sequence[Pair], prompts: np.ndarray, *, prices: Prices | None, log: Log
) -> Judged:
    """Every judge's verdicts, and the differences in scores for judges that score; see :class:`Judged`."""
    judged = Judged(pairs, prompts)
    for name, judge in judges.items():
        log(f"judge {name}")
        margins = judge.margins(pairs)
        if margins is None:
            found = judge.compare(pairs)
        else:
            judged.margins[name] = np.array(margins)
            found = [verdict_of(margin) for margin in margins]
        judged.verdicts[name] = np.array(found, dtype=np.float64)  # None becomes NaN
        if judge.usage is not None:
            log(judge.usage.line(prices))
        if missing := int(np.isnan(judged.verdicts[name]).sum()):
            log(f"note: judge {name} gave no verdict on {missing:,} of {len(pairs):,} pairs; they do not count")
    return judged


def judge_metrics(judges: Mapping[str, Judge], prompts: np.ndarray, seed: int) -> list[Metric]:
    """Metrics of API judges: contradictions on swapped answers, position bias, and temperatures of their own choice.

    The judges have judged; ``prompts`` is the number of each pair's prompt, ``[P]``.
    """
    metrics = []
    for name, judge in judges.items():
        if judge.usage is None:
            continue
        shares = np.array(judge.first_shown, dtype=np.float64)  # None becomes NaN
        metrics += [
            Metric(f"conflicting_orders/{name}", judge.conflicting, n=len(prompts)),
            Metric.of(f"first_shown_win_rate/{name}", win_rate_over_prompts(shares, prompts, seed)),
        ]
        if judge.usage.default_temperature:
            count, replies = judge.usage.default_temperature, judge.usage.replies
            metrics.append(Metric(f"judged_at_default_temperature/{name}", count, n=replies))
    return metrics


# ---- Metrics of both models' answers.


def compare_answers(answers: Sequence[PromptAnswers], score: Scoring, others: Mapping[str, Scoring]) -> list[Metric]:
    """Metrics of the baseline ("before") and of the model ("after"), and the model's win rate, over prompts.

    ``a`` is the model, ``b`` the baseline; ``score`` decides who wins, and ``others`` are further metrics by name.
    """

    def values(side: str, scoring: Scoring) -> list[list[float]]:
        return [[float(scoring(one.prompt, text)) for text in getattr(one, side)["responses"]] for one in answers]

    metrics = [Metric.of("win_rate", win_rate(values("a", score), values("b", score)), "after")]
    for name, scoring in {"score": score, **others}.items():
        for stage, side in SIDES.items():
            found = values(side, scoring)
            interval = share_interval if {x for several in found for x in several} <= {0.0, 1.0} else mean_interval
            metrics.append(Metric.of(name, interval([float(np.mean(several)) for several in found]), stage))
    return metrics + sampled_metrics(answers)


def win_rate(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> Interval:
    """Share of comparisons that ``a`` wins, ties counting half, with an interval over prompts.

    ``a`` and ``b`` have the scores of each prompt's answers. Every answer of ``a`` is compared with every answer of
    ``b`` to the same prompt. A prompt's share is one observation, because answers to one prompt are not independent.
    """
    shares = []
    for ours, theirs in zip(a, b, strict=True):
        difference = np.subtract.outer(np.asarray(ours), np.asarray(theirs))
        shares.append(float(((difference > 0) + 0.5 * (difference == 0)).mean()))
    return share_interval(shares)


def sampled_metrics(answers: Sequence[PromptAnswers]) -> list[Metric]:
    """Length of sampled answers in tokens, over prompts, and the share that ended, over answers."""
    metrics = []
    for stage, side in SIDES.items():
        records = [getattr(one, side) for one in answers]
        lengths = [float(np.mean([len(ids) for ids in record["response_ids"]])) for record in records]
        ended = [finished for record in records for finished in record["finished"]]
        metrics.append(Metric.of("response_tokens", mean_interval(lengths), stage))
        metrics.append(Metric.of("end_of_turn_rate", proportion_interval(sum(ended), len(ended)), stage))
    return metrics


def text_metrics(answers: Sequence[PromptAnswers]) -> list[Metric]:
    """Length of answers in characters, over prompts, the number of empty ones, and those of sampled answers."""
    metrics = []
    for stage, side in SIDES.items():
        texts = [getattr(one, side)["responses"] for one in answers]
        lengths = [float(np.mean([len(text) for text in several])) for several in texts]
        empty = [not text.strip() for several in texts for text in several]
        metrics.append(Metric.of("response_characters", mean_interval(lengths), stage))
        metrics.append(Metric("empty_responses", sum(empty), stage, len(empty)))
    sampled = all({"response_ids", "finished"} <= record.keys() for one in answers for record in (one.a, one.b))
    return metrics + sampled_metrics(answers) if sampled else metrics


def write_verdicts(path: Path, judged: Judged) -> None:
    """Write every pair with its answers, verdicts (null where there is none) and margins as JSON lines."""
    rows = (
        {
            "id": pair.id, "prompt": pair.prompt, **pair.context.columns, "a": pair.a, "b": pair.b,
            "verdicts": {name: float(values[index]) for name, values in judged.verdicts.items()},
            "margins": {name: float(values[index]) for name, values in judged.margins.items()},
        }
        for index, pair in enumerate(judged.pairs)
    )  # fmt: skip
    write_lines(path, rows)
