"""Sample answers to prompts from a model.

examples:
  simpo sample outputs/sft prompts.jsonl --n 5 --output_dir outputs/answers
  simpo sample my-model prompts.jsonl --engine server --base_url http://127.0.0.1:8000/v1 --output_dir outputs/answers
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Set
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from simpo.cli._shared import LOADING, require_single_process
from simpo.client import Endpoint
from simpo.config import parse_settings, setting
from simpo.errors import SimpoError
from simpo.generation.sample import FILE_NAME, PromptArguments, sample_responses
from simpo.generation.server import sample_from_server
from simpo.generation.settings import SamplingSettings, VllmSettings
from simpo.judging.presentation import as_text
from simpo.models.settings import ModelArguments
from simpo.runs.results import print_results
from simpo.runs.terminal import printable

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


def main(argv: list[str]) -> int:
    """Sample, print the table of results and what to do next."""
    (settings,) = parse_settings(argv, (SampleSettings,), command="sample", about=__doc__)
    path = settings.output_dir / FILE_NAME
    results = _sample(settings, argv)
    if results is None:  # one of several processes; the main one prints
        return 0
    print_results(results)
    _show(path)
    print(f"responses: {path}")
    print(f"next:      python -m json.tool --json-lines --no-ensure-ascii {shlex.quote(str(path))} | less")
    return 0


def _sample(settings: SampleSettings, argv: list[str]) -> Path | None:
    asked, sampling, folder = settings.prompts, settings.sampling, settings.output_dir
    if settings.engine != "server":
        arguments = settings.vllm.arguments()
        return sample_responses(
            settings.model,
            asked,
            sampling,
            folder,
            engine=settings.engine,
            engine_args=arguments,
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
