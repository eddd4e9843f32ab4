"""How the rows of a dataset are stored, and the report on what happened to each of them.

JSON sources are stored as two string columns, the row's JSON text and its source, because rows of one file may differ
in columns and types, which Arrow does not allow. Columnar sources (parquet, csv, arrow, hub) keep their columns and
gain one that names the source. :func:`rows_of` turns a batch of either into dictionaries.
"""

from __future__ import annotations

import base64
import datetime
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    LargeList,
    List,
    Value,
    concatenate_datasets,
)

from simpo.data.verification import check_times
from simpo.errors import SimpoError

# Underscored to avoid clashes with column names in the data.
ROW = "_row"
WHERE = "_where"
JSON_FEATURES = Features({ROW: Value("string"), WHERE: Value("string")})

Row = dict[str, Any]


class BadRow(Exception):  # noqa: N818 - it is counted, not shown as an error
    """A row that cannot be used. Rows with the same fault have the same ``reason``, so that they can be counted."""

    kind = "bad"

    def __init__(self, reason: str) -> None:
        # The reason may quote the row, and Arrow, which stores it, rejects lone surrogates.
        self.reason = reason.encode(errors="backslashreplace").decode()
        super().__init__(self.reason)

    @property
    def entry(self) -> str:
        """The status entry for the report."""
        return f"{self.kind}: {self.reason}"


class Tie(BadRow):
    """A row without a preference between its two responses: valid but useless for training, so it is dropped."""

    kind = "dropped"


class UnknownShape(BadRow):
    """A row whose columns match no known shape."""


def rows_of(batch: Mapping[str, Sequence[Any]], indices: Sequence[int], label: str) -> list[tuple[Row, str]]:
    """Turn a batch of a dataset into ``(row, where)`` pairs.

    ``indices`` holds the positions of the rows in the dataset; ``label`` names it if the rows do not name their source.
    """
    wheres = batch.get(WHERE) or [f"{label} row {index}" for index in indices]
    if ROW in batch and WHERE in batch:
        return [(json.loads(text), where) for text, where in zip(batch[ROW], wheres, strict=True)]
    columns = [column for column in batch if column != WHERE]
    return [
        ({column: _to_json_types(batch[column][position]) for column in columns}, where)
        for position, where in enumerate(wheres)
    ]


def _to_json_types(value: Any) -> Any:
    """Convert a cell to JSON types (or bytes), without the nulls that Arrow adds for keys of other rows' objects."""
    if isinstance(value, dict):
        return {key: _to_json_types(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_to_json_types(item) for item in value]
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta):
        return str(value)
    return float(value) if isinstance(value, Decimal) else value


def as_dataset(rows: object, name: str) -> Dataset:
    """Convert rows passed from Python to one dataset.

    Anything but a dataset or a list of rows raises an error that explains what to pass.
    """
    if isinstance(rows, Dataset):
        check_times(rows, name)
        return _with_class_names(rows)
    if isinstance(rows, DatasetDict | IterableDatasetDict):
        splits = ", ".join(map(repr, rows))
        raise SimpoError(f"{name}: a {type(rows).__name__} with the splits {splits}; pass one of them, dataset[split]")
    if isinstance(rows, IterableDataset):
        raise SimpoError(
            f"{name}: a streaming dataset; load it completely, or pass Dataset.from_list(list(dataset.take(n)))"
        )
    if not isinstance(rows, list | tuple) or not all(isinstance(row, dict) for row in rows):
        raise SimpoError(f"{name}: a {type(rows).__name__}; pass a datasets.Dataset or a list of dictionaries")
    if rows and all("prompt_ids" in row for row in rows):
        return Dataset.from_list(list(rows))
    # JSON rows, because Dataset.from_list drops every column that the first row lacks.
    wheres = [f"{name}[{index}]" for index in range(len(rows))]
    return Dataset.from_dict({ROW: [as_json(row) for row in rows], WHERE: wheres}, features=JSON_FEATURES)


def check_dataset(dataset: object, label: str) -> None:
    """Raise an error for anything but a single dataset with at least one row."""
    if not isinstance(dataset, Dataset):
        raise SimpoError(f"{label}: a {type(dataset).__name__} instead of a datasets.Dataset; pass one split")
    if not len(dataset):
        raise SimpoError(f"{label}: no rows")


def with_where(dataset: Dataset, label: str, digest: str) -> Dataset:
    """Add the column that names the source of each row of a columnar dataset, ``label row index``; decode no images."""
    if taken := {ROW, WHERE} & set(dataset.column_names):
        raise SimpoError(f"{label}: the column name {taken.pop()!r} is reserved; rename the column")
    check_times(dataset, label)
    where = [f"{label} row {index}" for index in range(len(dataset))]
    # datasets decodes images with every program that Pillow knows; those that are used are decoded in images.py.
    return _with_class_names(undecoded(dataset)).add_column(WHERE, where, new_fingerprint=digest)


def _with_class_names(dataset: Dataset) -> Dataset:
    """Replace class numbers with class names: class 0 may be called "good".

    Negative numbers mean an unknown class. Only these columns are rewritten, because datasets may be large.
    """
    for name, feature in list(dataset.features.items()):
        if isinstance(feature, ClassLabel):
            numbers = dataset.with_format("arrow")[name]
            class_numbers = pc.if_else(pc.less(numbers, 0), pa.scalar(None, numbers.type), numbers)
            texts = pc.take(pa.array(feature.names, pa.string()), class_numbers)
            numbers_name = f"{name} (number)"  # removed last, because a dataset without columns has no rows
            dataset = dataset.rename_column(name, numbers_name).add_column(name, texts).remove_columns(numbers_name)
    return dataset


def check_unicode(text: str) -> None:
    """Raise BadRow for text that neither files nor tokenizers can represent."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow("text is not valid Unicode (it contains a lone surrogate)") from error


def other_columns(row: Mapping[str, Any], *used: str) -> Row:
    """Return the columns that are not used; they are carried through."""
    return {column: value for column, value in row.items() if column not in used}


def columns_of(row: Mapping[str, Any]) -> str:
    """Return the names of a row's columns, for messages."""
    return ", ".join(sorted(row)) or "none"


def as_json(value: object) -> str:
    """Return any cell as JSON; values without a JSON type (dates, decimals) become text, bytes a ``data:`` URL.

    ASCII only, because Arrow rejects the lone surrogates that JSON may contain.
    """

    def convert(value: Any) -> Any:
        if isinstance(value, np.ndarray | np.generic):
            return value.tolist()
        if hasattr(value, "_repr_png_"):  # a Pillow image; returns None for color modes that PNG lacks, such as CMYK
            value = value._repr_png_() or value.convert("RGB")._repr_png_()
        return f"data:;base64,{base64.b64encode(value).decode('ascii')}" if isinstance(value, bytes) else str(value)

    return json.dumps(value, default=convert)


def concatenate(datasets: Sequence[Dataset]) -> Dataset:
    """Concatenate datasets of either representation; if their columns differ, all become JSON rows."""
    if len(datasets) == 1:
        return datasets[0]
    if any(dataset.features != datasets[0].features for dataset in datasets):
        datasets = [_as_json_rows(dataset) for dataset in datasets]
    return concatenate_datasets(list(datasets))


def undecoded(dataset: Dataset) -> Dataset:
    """Return ``dataset`` with images and other media as encoded bytes or paths instead of decoded objects."""
    for name, feature in dataset.features.items():
        if (encoded := _encoded(feature)) != feature:
            dataset = dataset.cast_column(name, encoded)
    return dataset


def _encoded(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _encoded(inner) for name, inner in feature.items()}
    if isinstance(feature, List | LargeList):
        return replace(feature, feature=_encoded(feature.feature))
    return replace(feature, decode=False) if getattr(feature, "decode", False) is True else feature


def _as_json_rows(dataset: Dataset) -> Dataset:
    if ROW in dataset.column_names:
        return dataset
    dataset = undecoded(dataset)

    def batch_as_json(batch: Mapping[str, Sequence[Any]]) -> dict[str, list[str]]:
        pairs = rows_of(batch, range(len(batch[WHERE])), label="")
        return {ROW: [as_json(row) for row, _ in pairs], WHERE: [where for _, where in pairs]}

    return dataset.map(
        batch_as_json,
        batched=True,
        remove_columns=[column for column in dataset.column_names if column != WHERE],
        features=JSON_FEATURES,
        desc="Converting rows to JSON",
    )


def select_columns(dataset: Dataset, columns: Sequence[str], label: str) -> Dataset:
    """Keep only these columns (``columns`` in a ``dataset_mixture``)."""
    if ROW in dataset.column_names:
        return dataset.map(_select_keys, fn_kwargs={"columns": list(columns)}, desc=f"Selecting columns of {label}")
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        columns_present = ", ".join(column for column in dataset.column_names if column != WHERE)
        raise SimpoError(f"dataset_mixture: {label} has no column {missing[0]!r}; it has {columns_present}")
    return dataset.select_columns([*columns, WHERE])


def _select_keys(row: Row, columns: list[str]) -> Row:
    values = json.loads(row[ROW])
    if missing := [column for column in columns if column not in values]:
        raise SimpoError(f"dataset_mixture: {row[WHERE]} has no column {missing[0]!r}")
    return {ROW: as_json({column: values[column] for column in columns})}


def rename_columns(dataset: Dataset, mapping: Mapping[str, str], name: str) -> Dataset:
    """Rename columns (``column_mapping``: old name -> new name) all at once, so that names can be swapped."""
    if not isinstance(mapping, Mapping) or not all(isinstance(item, str) for pair in mapping.items() for item in pair):
        raise SimpoError(f"column_mapping: {mapping!r} does not map columns of the data to columns of this toolkit")
    if ROW in dataset.column_names:
        present = set().union(*(json.loads(text) for text in dataset[ROW]))
    else:
        present = set(dataset.column_names) - {WHERE}
    if missing := [column for column in mapping if column not in present]:
        raise SimpoError(f"column_mapping: {name} has no column {missing[0]!r}; it has {', '.join(sorted(present))}")
    kept = Counter([*mapping.values(), *(present - set(mapping))])
    if taken := [column for column in mapping.values() if kept[column] > 1]:
        raise SimpoError(f"column_mapping: {name} would have two columns {taken[0]!r}; rename the other one too")
    if ROW in dataset.column_names:
        return dataset.map(_rename_keys, fn_kwargs={"mapping": dict(mapping)}, desc=f"Renaming columns of {name}")
    return dataset.rename_columns(dict(mapping))


def _rename_keys(row: Row, mapping: dict[str, str]) -> Row:
    return {ROW: as_json({mapping.get(column, column): value for column, value in json.loads(row[ROW]).items()})}


# ---- The report.

# How many rows are named per reason.
_MAX_EXAMPLES = 3
_MAX_REASONS = 5
# Marks all but the first sequence of a row that became several, so that the row is counted once.
PART = "part: "


@dataclass
class DataReport:
    """Counts of what happened to the rows of one dataset."""

    label: str  # what the dataset is for, e.g. `"train"`
    rows: int  # rows read
    used: int  # rows that are used (or sequences, if rows became several)
    bad: dict[str, int] = field(default_factory=dict)  # reason -> rows that could not be used
    # Reason -> valid rows that are not used, e.g. because they are too long.
    dropped: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)  # what was cut -> rows that are used in shortened form
    split: dict[str, int] = field(default_factory=dict)  # reason -> rows that became several sequences
    ignored: dict[str, int] = field(default_factory=dict)  # what was ignored -> rows that are used without it
    suspect: dict[str, int] = field(default_factory=dict)  # reason -> rows that are used but are probably faulty
    read: dict[str, int] = field(default_factory=dict)  # columns of a foreign shape -> rows that were converted
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason -> where its first few rows come from
    notices: list[str] = field(default_factory=list)  # remarks about the whole dataset
    noun: str = "comparisons"  # what rows become, in the plural

    @classmethod
    def of(cls, label: str, statuses: Iterable[tuple[str, list[str]]], noun: str = "comparisons") -> Self:
        """Build a report from the statuses of all rows.

        Args:
            label: what the dataset is for.
            statuses: for each row, its source and what happened to it: any of ``"bad: reason"``, ``"dropped: reason"``,
                ``"cut: what"``, ``"split: reason"``, ``"ignored: what"``, ``"suspect: reason"``, ``"read: columns"``;
                an empty list for a row that is used unchanged. If a row became several sequences, each has a status,
                all but the first with :data:`PART`.
            noun: what rows become, in the plural.
        """
        report = cls(label, rows=0, used=0, noun=noun)
        for where, entries in statuses:
            report.rows += PART not in entries
            report.used += is_used(entries)
            for entry in entries:
                report._count(entry, where)
        return report

    @property
    def _counts(self) -> dict[str, dict[str, int]]:
        return {kind: getattr(self, kind) for kind in ("bad", "dropped", "cut", "split", "ignored", "suspect", "read")}

    @property
    def remarkable(self) -> bool:
        """Whether any row was not simply used unchanged, so that the report is worth showing."""
        return any(self._counts.values())

    def drop(self, reason: str, where: str) -> None:
        """Move a row from the used rows to the dropped ones."""
        self.used -= 1
        self._count(f"dropped: {reason}", where)

    def _count(self, entry: str, where: str) -> None:
        if entry == PART:
            return
        kind, _, reason = entry.partition(": ")
        counts = self._counts[kind]
        counts[reason] = counts.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _MAX_EXAMPLES:
            examples.append(where)

    def check(self, on_bad_row: str) -> None:
        """Raise an error for any bad row if ``on_bad_row`` is ``error``, otherwise if more than 1% of rows are bad."""
        bad = sum(self.bad.values())
        reasons = [f"{self.examples[reason][0]}: {reason}" for reason in self.bad]
        if bad and on_bad_row == "error":
            raise SimpoError(f"{reasons[0]}; fix the row, or set on_bad_row: skip")
        if bad * 100 > self.rows:
            more = [f" (and {count - 1:,} more)" if count > 1 else "" for count in self.bad.values()]
            named = "; ".join(map("".join, zip(reasons[:_MAX_REASONS], more, strict=False)))
            named += "; ..." if len(reasons) > _MAX_REASONS else ""
            raise SimpoError(f"{self.label}: {bad} of {self.rows} rows are bad, more than 1%; fix them ({named})")

    def lines(self) -> list[str]:
        """Return the report as text, one line per entry."""
        lines = [f"{self.label}: {self.used:,} {self.noun} of {self.rows:,} rows"]
        for kind, counts in self._counts.items():
            shown = {"bad": "skipped", "read": "recognized"}.get(kind, kind)
            for reason, count in counts.items():
                examples = self.examples[reason]
                more = ", ..." if count > len(examples) else ""
                lines.append(f"  {shown} {count:,}: {reason} ({', '.join(examples)}{more})")
        return lines + [f"  note: {notice}" for notice in self.notices]

    def metrics(self) -> list[tuple[str, float]]:
        """Return the names and values of metrics: totals, and one for each reason."""
        metrics = Counter({"rows": self.rows, "used": self.used})
        for kind, counts in self._counts.items():
            metrics[kind] = sum(counts.values())
            for reason, count in counts.items():
                slug = re.sub(r"[^a-z0-9]+", "_", reason.lower()).strip("_")
                metrics[f"{kind}/{slug}"] += count
        return [(f"data/{self.label}/{name}", value) for name, value in metrics.items()]


def is_used(entries: list[str]) -> bool:
    """Whether a row with these status entries is used."""
    return not any(entry.startswith(("bad: ", "dropped: ")) for entry in entries)
