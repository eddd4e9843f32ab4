"""Commands that build preference data from a model's own answers: simpo sample, annotate and pair."""

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

_NUM_SHOWN, _MAX_CHARACTERS = 3, 600  # answers printed at the end, and characters of each


@dataclass(frozen=True)
class ServerSettings:
    """Options for --engine server (an OpenAI-compatible server that serves MODEL under that name)."""

    base_url: str | None = setting(None, "URL of the server, e.g. http://127.0.0.1:8000/v1.")
    api_key_env: str = setting(
        "OPENAI_API_KEY", "Environment variable that holds the API key; not needed for a server on this machine."
    )
    concurrency: int = setting(8, "Number of concurrent requests.")
    timeout: float = setting(600.0, "Timeout of a request in seconds.")


@dataclass(kw_only=True)
class SampleSettings:
    """Output and engine."""

    model: ModelArguments = field(metadata={"only": LOADING})
    prompts: PromptArguments
    output_dir: Path = field(metadata={"help": "Folder of the run; reuse it to resume."})
    sampling: SamplingSettings
    engine: Literal["transformers", "vllm", "server"] = setting("transformers", "Engine that generates the answers.")
    vllm: VllmSettings
    server: ServerSettings
    yes: bool = setting(False, "Send requests to a server without asking for confirmation.")

    def __post_init__(self) -> None:
        """Reject settings that the engine would ignore."""
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
    # Not read_settings, because several processes may sample together.
    (settings,) = parse_settings(argv, (SampleSettings,), command="sample", about=sample.__doc__)
    results = _sample(settings, argv)
    if results is None:  # not the main process
        return
    path = settings.output_dir / RESPONSES
    print_results(results)
    _print_examples(path)
    print(f"responses: {path}")
    print(f"next:      python -m json.tool --json-lines --no-ensure-ascii {shlex.quote(str(path))} | less")


def _sample(settings: SampleSettings, argv: list[str]) -> Path | None:
    prompts, sampling, folder = settings.prompts, settings.sampling, settings.output_dir
    if settings.engine != "server":
        return sample_responses(
            settings.model,
            prompts,
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
        raise SimpoError("base_url: missing for engine server; give its URL with --base_url")
    name = settings.model.model_name_or_path
    endpoint = Endpoint(server.base_url, name, server.api_key_env, server.concurrency, server.timeout)
    return sample_from_server(endpoint, prompts, sampling, folder, yes=settings.yes, argv=argv)


def _print_examples(path: Path) -> None:
    """Print the first few prompts, each with its first answer."""
    with path.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in islice(lines, _NUM_SHOWN)]
    for record in records:
        for title, text in (("prompt", as_text(record["prompt"])), ("answer", record["responses"][0])):
            excess = len(text) - _MAX_CHARACTERS
            suffix = f" [... {excess:,} more characters]" if excess > 0 else ""
            print(f"--- {title} {record['id']}\n{printable(text[:_MAX_CHARACTERS].strip())}{suffix}")
    print()


@dataclass(kw_only=True)
class AnnotateSettings:
    """Responses, annotator and output."""

    responses: Path = required("responses.jsonl from simpo sample, or its folder.", positional="RESPONSES")
    annotator: Annotator = setting_of(AnnotatorArguments, "annotator")
    annotator_normalization: Normalization | None = setting_of(AnnotatorArguments, "annotator_normalization")
    output_dir: Path = required("Folder of the run; reuse it to resume.")
    judge: JudgeSettings


def annotate(argv: list[str]) -> None:
    """Score sampled responses with a reward model, a judge or a function.

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
    """Input and output."""

    annotated: Path = required("annotated.jsonl from simpo annotate, or its folder.", positional="ANNOTATED")
    output_dir: Path = required("Folder of the run.")
    pairs: PairSettings


def pair(argv: list[str]) -> None:
    """Build preference pairs from scored responses.

    examples:
      simpo pair outputs/scores --output_dir outputs/pairs
      simpo pair outputs/scores/annotated.jsonl --pairs all --min_gap 0.5 --output_dir outputs/pairs
    """
    settings = read_settings(pair, PairCommand, argv)
    print_results(pair_annotated(settings.annotated, settings.pairs, settings.output_dir, argv=argv))
    next_command = "reward" if settings.pairs.pairs == "ranking" else "train"
    path = settings.output_dir / PAIRS
    print(f"pairs: {path}\nnext:  simpo {next_command} --dataset_name {shlex.quote(str(path))} ...")
