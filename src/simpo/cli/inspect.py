"""simpo inspect: data as a model would read it."""

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

# Characters of an example's text that are shown; the middle of a longer one is left out.
_SHOWN = 600


@dataclass(kw_only=True)
class InspectSettings:
    """The data to inspect."""

    model: ModelArguments = field(metadata={"only": ("model_name_or_path", "trust_remote_code")})
    data: str = required("File, folder or hub id of the data.", positional="DATA")
    eval_dataset_name: str | None = setting(None, "A test set, which is compared with DATA.")
    split: str = setting("train", "Split of DATA; a test set has the test split instead.")
    column_mapping: dict[str, str] | None = setting(None, "Columns to rename, e.g. {good: chosen, bad: rejected}.")
    chat_template: str | None = setting(
        None, "A chat template, a file with one, or none for raw text (default: the tokenizer's own)."
    )
    tokenization: TokenizeSettings = field(metadata={"without": ("on_bad_row", "num_proc")})
    output_dir: Path | None = setting(None, "Folder for results.json.")

    def sources(self) -> Iterator[tuple[str, str, str]]:
        """Label, name and split of the data sets."""
        yield "train", self.data, self.split
        if self.eval_dataset_name:
            yield "eval", self.eval_dataset_name, self.split.replace("train", "test")


def inspect(argv: list[str]) -> None:
    """Look at data as a model would read it: lengths, biases, duplicates, what is cut or dropped.

    examples:
      simpo inspect org/model pairs.jsonl --max_length 2048
      simpo inspect org/model org/pairs --eval_dataset_name org/pairs --output_dir outputs/inspected
    """
    (asked,) = parse_settings(argv, (InspectSettings,), command="inspect", about=inspect.__doc__)
    model, settings = asked.model, asked.tokenization
    tokenizer = load_tokenizer(model, chat_template=asked.chat_template)
    limits = _limits(model)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    datasets: list[Dataset] = []
    metrics: list[Metric] = []
    sources: list[str] = []
    for label, name, split in asked.sources():
        rows = load_rows(name, split=split, column_mapping=asked.column_mapping, any_split=label == "eval")
        sources.append(rows._fingerprint)
        prepared = _preparer(rows)(rows, tokenizer, settings, label=label)
        inspection = inspect_prepared(prepared, tokenizer, settings)
        datasets.append(prepared.dataset)
        _print_inspection(console, inspection)
        metrics += inspection.metrics()
        check_rows(limits, prepared.dataset, label)
    if len(datasets) == 2:
        _, shared = shared_rows(*datasets)
        count = len(datasets[1])
        of = f"{shared:,} of {count:,} eval {prepared.report.noun} ({shared / count:.1%})"
        console.print(Text(f"{of} have a training prompt\n"))
        metrics.append(Metric("data/eval/prompts_in_train", shared, n=count))
    _print_examples(console, examples(datasets[0], tokenizer))
    if asked.output_dir:
        identity = fingerprint(sources, [dataset._fingerprint for dataset in datasets])
        folder = asked.output_dir
        if (folder / "run.json").exists():
            raise SimpoError(f"output_dir: {folder} holds a run; name another folder")
        path = write_results(folder, command="inspect", fingerprint=identity, metrics=metrics)
        console.print(Text(f"\nresults: {path}"))


def _limits(model: ModelArguments) -> Limits:
    """The model's; none where there is only a tokenizer."""
    try:
        return Limits.of(load_config(model))
    except SimpoError as error:
        print(f"what the model can read is not checked: {error}")
        return Limits(None, None)


def _preparer(rows: Dataset) -> Callable[..., Prepared]:
    """The tokenization of rows of this kind."""
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
    figures = {
        "repeated": f"{inspection.repeated:,} {noun}; {inspection.repeated_prompts:,} have a prompt seen before",
        "exactly one BOS, in front": bos,
        "one end of turn, at the end": f"{inspection.ended:.1%} of responses",
    }
    if inspection.longer is not None:
        longer = f"{inspection.longer:.1%} of {noun}; as long as rejected in {inspection.ties:.1%}"
        figures = {"chosen longer": longer, "identical responses": f"{inspection.identical:,} {noun}"} | figures
        figures["contradicted"] = f"{inspection.contradicted:,} {noun}, whose reverse is there, too"
    for name, figure in figures.items():
        console.print(Text(f"{name:<28} {figure}"))
    console.print()


def _print_examples(console: Console, shown: list[Example]) -> None:
    # Without colors, only the marks show what is scored.
    colored = console.color_system is not None and not console.no_color
    opening, closing = ("", "") if colored else (">>>", "<<<")
    how = "highlighted" if colored else f"between {opening} and {closing}"
    console.print(Text(f"Examples; the scored tokens are {how}."))
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
    if len(text) > _SHOWN:
        half = _SHOWN // 2
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
    return printable(text)
