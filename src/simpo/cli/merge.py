"""Merge an adapter into its base model.

examples:
  simpo merge outputs/lora --output_dir outputs/merged
  simpo merge org/adapter --model_revision v2 --save_dtype bfloat16 --output_dir outputs/merged
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from simpo.cli._shared import require_single_process
from simpo.config import parse_settings, required
from simpo.models.merging import write_merged
from simpo.models.settings import ModelArguments


@dataclass(kw_only=True)
class MergeSettings:
    """The merged model."""

    adapter: ModelArguments = field(
        metadata={"only": ("model_name_or_path", "model_revision", "trust_remote_code", "allow_pickle", "save_dtype")}
    )
    output_dir: Path = required("New folder of the merged model.")


def main(argv: list[str]) -> int:
    """Merge, and print what to do next."""
    (settings,) = parse_settings(argv, (MergeSettings,), command="merge", about=__doc__)
    require_single_process("merge", "start it without torchrun")
    write_merged(settings.adapter, settings.output_dir)
    print(f"saved: {settings.output_dir}\nnext:  simpo chat {shlex.quote(str(settings.output_dir))}")
    return 0
