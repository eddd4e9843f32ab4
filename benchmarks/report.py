"""What the comparison found: medians, ratios and counted bounds, as JSON and as a table."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.setting import Setting, build_model
from benchmarks.workers import Entrant, Measurement

PACKAGES = ("simpo", "torch", "transformers", "trl")


def summarise(
    entrants: list[Entrant], runs: dict[str, list[Measurement]], setting: Setting, counts: dict[str, int]
) -> dict[str, Any]:
    """Everything that is known, ready for ``json.dumps``; entrants without a finished run are left out."""
    rows = [_row(entrant, runs[entrant.name]) for entrant in entrants if runs[entrant.name]]
    base = best_of_trl(rows)
    if base:
        for row in rows:
            row.update(_beside(row, base))
    return {
        "setting": {key: value for key, value in vars(setting).items() if key != "folder"},
        "parameters": build_model(setting).num_parameters(),
        "data": counts,
        "machine": {"processor": _processor(), "python": platform.python_version()},
        "versions": {name: _version(name) for name in PACKAGES},
        "trl_best": base["name"] if base else None,
        "failed": [entrant.name for entrant in entrants if not runs[entrant.name]],
        "entrants": rows,
    }


def best_of_trl(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """TRL's quickest point of the grid."""
    return max((row for row in rows if row["toolkit"] == "trl"), key=lambda row: row["pairs_per_second"], default=None)


def _row(entrant: Entrant, runs: list[Measurement]) -> dict[str, Any]:
    first = runs[0]
    rates = [run.pairs / run.seconds for run in runs]
    speed = median(rates)
    alone = [run.products_seconds for run in runs if run.products_seconds is not None]
    return {
        "name": entrant.name,
        "toolkit": entrant.toolkit,
        "pairs_per_second": speed,
        "pairs_per_second_of_rounds": rates,
        "tokens_per_second": speed * first.tokens / first.pairs,
        "cpu_seconds_per_pair": median(run.cpu_seconds / run.pairs for run in runs),
        "forwards": first.forwards,
        "gflop_per_pair": first.flops / first.pairs / 1e9,
        "gflop_per_pair_recomputed": first.flops_recomputed / first.pairs / 1e9,
        "products_seconds_per_pair": median(alone) / first.pairs if alone else None,
        "peak_mib": median(run.peak_mib for run in runs),
        "grown_mib": median(run.grown_mib for run in runs),
        "losses": first.losses,
    }


def _beside(row: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """``row`` relative to TRL's best."""
    rounds = zip(row["pairs_per_second_of_rounds"], base["pairs_per_second_of_rounds"], strict=False)
    found = {
        "speed_ratio": median(mine / theirs for mine, theirs in rounds),
        "arithmetic_bound": base["gflop_per_pair"] / row["gflop_per_pair"],
        "arithmetic_bound_recomputed": base["gflop_per_pair"] / row["gflop_per_pair_recomputed"],
        "first_loss_difference": row["losses"][0] - base["losses"][0],
        "largest_loss_difference": max(
            abs(mine - theirs) for mine, theirs in zip(row["losses"], base["losses"], strict=True)
        ),
    }
    if row["products_seconds_per_pair"]:
        found["products_bound"] = base["products_seconds_per_pair"] / row["products_seconds_per_pair"]
    return found


def print_report(report: dict[str, Any]) -> None:
    """The table, and below it what it was measured on."""
    console = Console(width=None if Console().is_terminal else 160)
    console.print(_table(report))
    setting, data, versions = report["setting"], report["data"], report["versions"]
    pairs = setting["pairs"]
    console.print(
        f"Llama, {report['parameters']:,} parameters ({setting['layers']} layers, hidden {setting['hidden']}, "
        f"{'tied' if setting['tied'] else 'untied'}); {setting['dtype']}; {pairs} pairs, "
        f"{setting['pairs_per_step']} a step, mean {data['prompt_tokens'] / pairs:.0f} prompt and "
        f"{data['response_tokens'] / pairs / 2:.0f} response tokens (longest row {data['longest']}) under a BPE of "
        f"{data['tokenizer_vocabulary']:,}.",
        highlight=False,
    )
    console.print(
        f"{report['machine']['processor']}, {setting['device']}, {setting['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        highlight=False,
    )
    if report["failed"]:
        console.print(f"Did not finish: {', '.join(report['failed'])}.", highlight=False)
    if report["trl_best"]:
        console.print(
            f"Ratios are medians over rounds, against {report['trl_best']}, TRL's best. Bound: the ratio that counted "
            "arithmetic allows (in brackets: if simpo makes the logits again in backward). Loss difference: of the "
            f"first step, {report['entrants'][0]['losses'][0]:.6f} in the first row.",
            highlight=False,
        )


def _table(report: dict[str, Any]) -> Table:
    rows = report["entrants"]
    table = Table(title="SimPO training: simpo beside TRL" if report["trl_best"] else "SimPO training: simpo's paths")
    table.add_column("")
    alone = any(row["products_seconds_per_pair"] for row in rows)
    columns = ["pairs/s", "range", "tokens/s", "CPU s/pair", "ratio", "bound", "GFLOP/pair", "peak MiB", "grown MiB"]
    for column in [*columns, "loss difference", *(["products s/pair", "their ratio"] if alone else [])]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row["name"], *_cells(row, alone=alone))
    return table


def _cells(row: dict[str, Any], *, alone: bool) -> list[str]:
    rounds, beside = row["pairs_per_second_of_rounds"], "speed_ratio" in row
    bound = f"{row['arithmetic_bound']:.2f}" if beside else ""
    if beside and row["toolkit"] == "simpo":
        bound += f" ({row['arithmetic_bound_recomputed']:.2f})"
    cells = [
        f"{row['pairs_per_second']:.2f}",
        f"{min(rounds):.2f}-{max(rounds):.2f}",
        f"{row['tokens_per_second']:.0f}",
        f"{row['cpu_seconds_per_pair']:.2f}",
        f"{row['speed_ratio']:.2f}" if beside else "",
        bound,
        f"{row['gflop_per_pair']:.1f}",
        f"{row['peak_mib']:.0f}",
        f"{row['grown_mib']:.0f}",
        f"{row['first_loss_difference']:+.1e}" if beside else "",
    ]
    if alone:
        cells += [f"{row['products_seconds_per_pair']:.3f}", f"{row['products_bound']:.2f}" if beside else ""]
    return cells


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    if described.exists():
        for line in described.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
