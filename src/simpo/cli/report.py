"""``simpo report``, in a module of its own because other commands take seconds to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from simpo.analysis.report import write_report
from simpo.config import parse_settings, required, setting


@dataclass(kw_only=True)
class ReportSettings:
    """Report."""

    runs: list[Path] = required("Folders of runs, finished or not.", positional="RUN")
    output: Path | None = setting(None, "HTML file to write (default: report.html in the first run's folder).")


def report(argv: list[str]) -> None:
    """Write an HTML page that explains a run, or several runs next to each other.

    examples:
      simpo report outputs/llama-3-simpo
      simpo report outputs/simpo outputs/dpo --output compared.html
    """
    (settings,) = parse_settings(argv, (ReportSettings,), command="report", about=report.__doc__)
    print(f"report: {write_report(settings.runs, settings.output)}")
