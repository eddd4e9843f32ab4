"""``simpo inspect``: show data the way a model reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text

from simpo.config import parse_settings, required, setting
from simpo.data.formats import is_comparison
from simpo.data.inspection import PERCENTILES, Example, Inspection, examples, inspect_prepared, shared_rows
from simpo.data.settings import TokenizeSettings
from simpo.data.shapes import first_canonical
from simpo.data.sources import load_rows
from simpo.data.tokenizing import Prepared, is_feedback, prepare, prepare_feedback, prepare_sft
from simpo.errors import SimpoError
from simpo.models.checkpoint import Limits, load_config
from simpo.models.loading import load_tokenizer
from simpo.models.settings import ModelArguments
from simpo.runs.results import Metric, fingerprint, write_results
from simpo.runs.terminal import printable
from simpo.training.batches import check_rows

_MAX_CHARACTERS = 600  # printed per text of an example; the middle of a longer text is left out


@dataclass(kw_only=True)
class InspectSettings:
    """Data to inspect."""

    model: ModelArguments = field(metadata={"only": ("model_name_or_path", "trust_remote_code")})
    data: str = required("File, folder or hub id of the data.", positional="DATA")
    eval_dataset_name: str | None = setting(None, "Test set to inspect as well and to check for overlap with DATA.")
    split: str = setting("train", "Split of DATA; the test set uses the matching test split.")
    column_mapping: dict[str, str] | None = setting(None, "Columns to rename, e.g. {good: chosen, bad: rejected}.")
    chat_template: str | None = setting(
        None, "Chat template, a file with one, or none for raw text (default: the tokenizer's own)."
    )
    tokenization: TokenizeSettings = field(metadata={"without": ("on_bad_row", "num_proc")})
    output_dir: Path | None = setting(None, "Folder for results.json (default: not written).")

    def sources(self) -> Iterator[tuple[str, str, str]]:
        """Yield the label, name and split of each dataset."""
        yield "train", self.data, self.split
        if self.eval_dataset_name:
            yield "eval", self.eval_dataset_name, self.split.replace("train", "test")


def inspect(argv: list[str]) -> None:
    """Show data the way a model reads it: lengths, biases, duplicates, and what gets cut or dropped.

    examples:
      simpo inspect org/model pairs.jsonl --max_length 2048
      simpo inspect org/model org/pairs --eval_dataset_name org/pairs --output_dir outputs/inspected
    """
    (settings,) = parse_settings(argv, (InspectSettings,), command="inspect", about=inspect.__doc__)
    model, tokenization = settings.model, settings.tokenization
    tokenizer = load_tokenizer(model, chat_template=settings.chat_template)
    limits = _limits(model)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    datasets: list[Dataset] = []
    metrics: list[Metric] = []
    sources: list[str] = []
    for label, name, split in settings.sources():
        rows = load_rows(name, split=split, column_mapping=settings.column_mapping, any_split=label == "eval")
        sources.append(rows._fingerprint)
        prepared = _preparer(rows)(rows, tokenizer, tokenization, label=label)
        inspection = inspect_prepared(prepared, tokenizer, tokenization)
        datasets.append(prepared.dataset)
        _print_inspection(console, inspection)
        metrics += inspection.metrics()
        check_rows(limits, prepared.dataset, label)
    if len(datasets) == 2:
        _, shared = shared_rows(*datasets)
        count = len(datasets[1])
        overlap = f"{shared:,} of {count:,} eval {prepared.report.noun} ({shared / count:.1%})"
        console.print(Text(f"{overlap} have a training prompt\n"))
        metrics.append(Metric("data/eval/prompts_in_train", shared, n=count))
    _print_examples(console, examples(datasets[0], tokenizer))
    if folder := settings.output_dir:
        identity = fingerprint(sources, [dataset._fingerprint for dataset in datasets])
        if (folder / "run.json").exists():
            raise SimpoError(f"output_dir: {folder} holds a run; name another folder")
        path = write_results(folder, command="inspect", fingerprint=identity, metrics=metrics)
        console.print(Text(f"\nresults: {path}"))


def _limits(model: ModelArguments) -> Limits:
    """Return the model's limits, or no limits if the folder only has a tokenizer."""
    try:
        return Limits.of(load_config(model))
    except SimpoError as error:
        print(f"not checked against the model's limits: {error}")
        return Limits(None, None)


def _preparer(rows: Dataset) -> Callable[..., Prepared]:
    """Return the function that tokenizes this kind of rows."""
    if is_feedback(rows):
        return prepare_feedback
    if "scored" in rows.column_names:
        return prepare_sft
    row = first_canonical(rows)
    conversation = "messages" in row or {"prompt", "completion"} <= set(row)
    return prepare_sft if conversation and not is_comparison(row) else prepare


def _print_inspection(console: Console, inspection: Inspection) -> None:
    for line in inspection.report.lines():
        console.print(Text(printable(line)))
    table = Table("tokens", box=None, header_style="bold")
    for name in PERCENTILES:
        table.add_column(name, justify="right")
    for part, values in inspection.lengths.items():
        table.add_row(part, *(f"{value:,}" for value in values.values()))
    console.print(table)
    bos = "the tokenizer has none" if inspection.one_bos is None else f"{inspection.one_bos:.1%} of prompts"
    noun = inspection.report.noun
    statistics = {
        "repeated": f"{inspection.repeated:,} {noun}; {inspection.repeated_prompts:,} with a prompt seen before",
        "exactly one BOS, in front": bos,
        "one end of turn, at the end": f"{inspection.ended:.1%} of responses",
    }
    if inspection.longer is not None:
        longer = f"{inspection.longer:.1%} of {noun}; same length in {inspection.ties:.1%}"
        statistics = {"chosen longer": longer, "identical responses": f"{inspection.identical:,} {noun}"} | statistics
        statistics["contradicted"] = f"{inspection.contradicted:,} {noun} that also occur with the sides swapped"
    for name, value in statistics.items():
        console.print(Text(f"{name:<28} {value}"))
    console.print()


def _print_examples(console: Console, shown: list[Example]) -> None:
    # Without colors, markers show which tokens are scored.
    colored = console.color_system is not None and not console.no_color
    opening, closing = ("", "") if colored else (">>>", "<<<")
    marking = "highlighted" if colored else f"between {opening} and {closing}"
    console.print(Text(f"Examples; scored tokens are {marking}."))
    for example in shown:
        console.print(Text(f"\n--- {printable(example.where)}", style="bold"))
        console.print(Text(_shortened(example.prompt), style="dim"))
        titles = ["response"] if len(example.responses) == 1 else ["chosen", *["rejected"] * len(example.responses)]
        for title, pieces in zip(titles, example.responses, strict=False):
            text = Text(f"{title}: ")
            for piece, scored in pieces:
                style = "dim" if not scored else "black on yellow" if title == "rejected" else "black on green"
                text.append(f"{opening}{_shortened(piece)}{closing}" if scored else _shortened(piece), style=style)
            console.print(text)


def _shortened(text: str) -> str:
    if len(text) > _MAX_CHARACTERS:
        half = _MAX_CHARACTERS // 2
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
    return printable(text)
