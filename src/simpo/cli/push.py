"""Upload the model of a finished run to the hub.

examples:
  simpo push outputs/qwen3-simpo name/qwen3-simpo --dry_run
  simpo push outputs/qwen3-simpo name/qwen3-simpo --private --include recipe.yaml
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from simpo.cli._shared import require_single_process
from simpo.config import parse_settings, required, setting
from simpo.models.hub import files_to_push, push


@dataclass(kw_only=True)
class PushSettings:
    """The run to upload, and the repository."""

    run: Path = required("Folder of a finished run, or of any model.", positional="RUN")
    repo: str = required("Repository on the hub, name/model.", positional="REPO")
    private: bool = setting(False, "Make a new repository private.")
    include: list[str] = setting([], "Other files of the folder that are uploaded, such as recipe.yaml.")
    dry_run: bool = setting(False, "Only list the files.")


def main(argv: list[str]) -> int:
    """List the files, upload them, and print where they are."""
    (settings,) = parse_settings(argv, (PushSettings,), command="push", about=__doc__)
    require_single_process("push", "start it without torchrun")
    files = files_to_push(settings.run, settings.include)
    for path in files:
        print(f"{path.stat().st_size:>15,}  {path.relative_to(settings.run)}")
    if settings.dry_run:
        print(f"dry run: nothing was uploaded to {settings.repo}")
        return 0
    url = push(settings.run, settings.repo, files, private=settings.private, report=print)
    print(f"saved: {url}")
    return 0
