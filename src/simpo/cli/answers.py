"""The commands that make preference data of a model's own answers: simpo sample, annotate and pair."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Set
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from simpo.cli._shared import LOADING, read_settings, require_single_process
from simpo.client import Endpoint
from simpo.config import parse_settings, required, setting, setting_of
from simpo.errors import SimpoError
from simpo.generation.sample import FILE_NAME as RESPONSES
from simpo.generation.sample import PromptArguments, sample_from_server, sample_responses
from simpo.generation.settings import SamplingSettings, VllmSettings
from simpo.judging import annotate as annotation
from simpo.judging.protocol import as_text
from simpo.judging.settings import Annotator, AnnotatorArguments, JudgeSettings, Normalization
from simpo.models.settings import ModelArguments
from simpo.runs.results import print_results
from simpo.runs.terminal import printable
from simpo.workflows.pair import FILE_NAME as PAIRS
from simpo.workflows.pair import PairSettings, pair_annotated

_SHOWN, _LONGEST = 3, 600  # answers at the end, and characters of each


@dataclass(frozen=True)
class ServerSettings:
    """The engine server: an OpenAI-compatible server, which knows the model by its name."""

    base_url: str | None = setting(None, "The server, e.g. http://127.0.0.1:8000/v1.")
    api_key_env: str = setting(
        "OPENAI_API_KEY", "Environment variable with its key; a server on this machine needs none."
    )
    concurrency: int = setting(8, "Requests at a time.")
    timeout: float = setting(600.0, "Seconds that a reply may take.")


@dataclass(kw_only=True)
class SampleSettings:
    """The run."""

    model: ModelArguments = field(metadata={"only": LOADING})
    prompts: PromptArguments
    output_dir: Path = field(metadata={"help": "Folder of the run; the same one continues it."})
    sampling: SamplingSettings
    engine: Literal["transformers", "vllm", "server"] = setting("transformers", "What generates the answers.")
    vllm: VllmSettings
    server: ServerSettings
    yes: bool = setting(False, "Send the requests to a server without asking.")

    def __post_init__(self) -> None:
        """Reject a setting that the engine would ignore."""
        ignored: list[tuple[Any, Set[str]]] = []
        if self.engine != "transformers":
            ignored.append((self.prompts, {"image_folder"}))
        if self.engine != "vllm":
            ignored.append((self.vllm, set(dataclasses.asdict(self.vllm))))
        if self.engine == "server":
            ignored += [(self.model, LOADING - {"model_name_or_path"}), (self.sampling, {"chunk_size"})]
        else:
            ignored.append((self.server, set(dataclasses.asdict(self.server))))
        for part, names in ignored:
            for declared in dataclasses.fields(part):
                if declared.name in names and getattr(part, declared.name) != declared.default:
                    raise SimpoError(f"{declared.name}: engine {self.engine} does not use it; leave it out")


def sample(argv: list[str]) -> None:
    """Sample answers to prompts from a model.

    examples:
      simpo sample outputs/sft prompts.jsonl --n 5 --output_dir outputs/answers
      simpo sample my-model prompts.jsonl --engine server --base_url http://127.0.0.1:8000/v1 --output_dir outputs/out
    """
    # Not by read_settings, because answers may be sampled in several processes.
    (settings,) = parse_settings(argv, (SampleSettings,), command="sample", about=sample.__doc__)
    results = _sample(settings, argv)
    if results is None:  # one of several processes; the main one prints
        return
    path = settings.output_dir / RESPONSES
    print_results(results)
    _show(path)
    print(f"responses: {path}")
    print(f"next:      python -m json.tool --json-lines --no-ensure-ascii {shlex.quote(str(path))} | less")


def _sample(settings: SampleSettings, argv: list[str]) -> Path | None:
    asked, sampling, folder = settings.prompts, settings.sampling, settings.output_dir
    if settings.engine != "server":
        return sample_responses(
            settings.model,
            asked,
            sampling,
            folder,
            engine=settings.engine,
            engine_args=settings.vllm.vllm_arguments(),
            images=True,
            argv=argv,
        )
    require_single_process("sample --engine server", "start it without torchrun")
    server = settings.server
    if server.base_url is None:
        raise SimpoError("engine server: name the server with --base_url")
    name = settings.model.model_name_or_path
    endpoint = Endpoint(server.base_url, name, server.api_key_env, server.concurrency, server.timeout)
    return sample_from_server(endpoint, asked, sampling, folder, yes=settings.yes, argv=argv)


def _show(path: Path) -> None:
    """The first prompts of the file, each with its first answer."""
    with path.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in islice(lines, _SHOWN)]
    for record in records:
        for title, text in (("prompt", as_text(record["prompt"])), ("answer", record["responses"][0])):
            cut = f" [... {len(text) - _LONGEST:,} more characters]" if len(text) > _LONGEST else ""
            print(f"--- {title} {record['id']}\n{printable(text[:_LONGEST].strip())}{cut}")
    print()


@dataclass(kw_only=True)
class AnnotateSettings:
    """The responses to score and the annotator."""

    responses: Path = required("responses.jsonl of simpo sample, or its folder.", positional="RESPONSES")
    annotator: Annotator = setting_of(AnnotatorArguments, "annotator")
    annotator_normalization: Normalization | None = setting_of(AnnotatorArguments, "annotator_normalization")
    output_dir: Path = required("Folder of the run; the same one continues it.")
    judge: JudgeSettings


def annotate(argv: list[str]) -> None:
    """Score sampled responses.

    examples:
      simpo annotate outputs/answers --annotator reward:org/reward-model --output_dir outputs/scores
      simpo annotate answers.jsonl --annotator api --judge_url https://api.openai.com/v1 --judge_model gpt-4.1 \\
          --prices 2 8 --output_dir outputs/scores
    """
    settings = read_settings(annotate, AnnotateSettings, argv)
    judge, folder = settings.judge, settings.output_dir
    results = annotation.annotate(
        settings.responses,
        settings.annotator,
        judge.options(),
        folder,
        normalization=settings.annotator_normalization,
        prices=judge.token_prices(),
        yes=judge.yes,
        argv=argv,
    )
    print_results(results)
    print(f"annotated: {folder / annotation.FILE_NAME}\nbest of N: {folder / annotation.BEST}")
    print(f"next:      simpo pair {shlex.quote(str(folder))} --output_dir DIR")


@dataclass(kw_only=True)
class PairCommand:
    """The run."""

    annotated: Path = required("annotated.jsonl of simpo annotate, or its folder.", positional="ANNOTATED")
    output_dir: Path = required("Folder of the run.")
    pairs: PairSettings


def pair(argv: list[str]) -> None:
    """Make preference pairs of scored responses.

    examples:
      simpo pair outputs/scores --output_dir outputs/pairs
      simpo pair outputs/scores/annotated.jsonl --pairs all --min_gap 0.5 --output_dir outputs/pairs
    """
    settings = read_settings(pair, PairCommand, argv)
    print_results(pair_annotated(settings.annotated, settings.pairs, settings.output_dir, argv=argv))
    following = "reward" if settings.pairs.pairs == "ranking" else "train"
    path = settings.output_dir / PAIRS
    print(f"pairs: {path}\nnext:  simpo {following} --dataset_name {shlex.quote(str(path))} ...")
