"""Human judgments: a local page on which people compare answers.

examples:
  simpo label outputs/simpo-answers --against outputs/sft-answers --overlap 0.3 --output_dir outputs/labels
  simpo label --export outputs/labels
"""

from __future__ import annotations

import shlex

from simpo.cli._shared import require_single_process
from simpo.config import parse_settings
from simpo.labeling.export import JUDGMENTS, PREFERENCE_COUNT, PREFERENCES, VERDICTS
from simpo.labeling.run import LabelSettings, export_run, label
from simpo.runs.results import print_results, read_results


def main(argv: list[str]) -> int:
    """Open the page until Ctrl-C, or export what was judged, and print what to do next."""
    (settings,) = parse_settings(argv, (LabelSettings,), command="label", about=__doc__)
    require_single_process("label", "start it without torchrun")
    if settings.export is None:
        judged = label(settings, argv=argv)
        print(f"\njudged: {judged:,} items so far; the same command opens the page again")
        print(f"next:   simpo label --export {shlex.quote(str(settings.output_dir))}")
        return 0
    folder = settings.export
    results = export_run(folder)
    print_results(results)
    print(f"preferences: {folder / PREFERENCES}\nverdicts:    {folder / VERDICTS}\njudgments:   {folder / JUDGMENTS}")
    if any(metric.value for metric in read_results(results).metrics if metric.name == PREFERENCE_COUNT):
        print(f"next:        simpo reward --dataset_name {shlex.quote(str(folder / PREFERENCES))} ...")
    else:
        print("next:        judge more items: there is no preference yet that a model could be trained on")
    return 0
