"""Report a comparison as JSON and as a table: medians, ratios and bounds from FLOP counts."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.entrants import Entrant
from benchmarks.measurement import Measurement
from benchmarks.setting import Setting

PACKAGES = ("simpo", "torch", "transformers", "trl", "liger-kernel", "bitsandbytes")
COLUMNS = {
    "name": "",
    "pairs_per_second": "pairs/s",
    "tokens_per_second": "tokens/s",
    "utilisation": "MFU",
    "gflop_per_pair": "GFLOP/pair",
    "peak_mib": "peak MiB",
    "grown_mib": "grown MiB",
    "first_loss": "first loss",
    "speed_ratio": "slower by",
    "bound": "counted",
    "share": "share",
    "memory_ratio": "memory",
    "products_ratio": "step/products",
}
FORMATS = {
    "pairs_per_second": "{:.3g}",
    "tokens_per_second": "{:.0f}",
    "utilisation": "{:.1%}",
    "gflop_per_pair": "{:.1f}",
    "peak_mib": "{:.0f}",
    "grown_mib": "{:.0f}",
    "first_loss": "{:.6f}",
    "speed_ratio": "{:.2f}",
    "bound": "{:.2f}",
    "share": "{:.0%}",
    "memory_ratio": "{:.2f}",
    "products_ratio": "{:.2f}",
}


def summarize(
    entrants: list[Entrant],
    runs: dict[str, list[Measurement]],
    setting: Setting,
    *,
    counts: dict[str, int],
    absent: dict[str, str],
) -> dict[str, Any]:
    """Return all results so far, ready for ``json.dumps``; entrants without a measurement are left out.

    Args:
        entrants: the entrants, in the order of the table.
        runs: measurements by entrant name.
        setting: the setting common to all.
        counts: token and row counts.
        absent: the reason for each entrant or family that was not measured.
    """
    measured = [entrant for entrant in entrants if runs.get(entrant.name)]
    seconds = {name: [run.seconds for run in found] for name, found in runs.items()}
    peak = max((run.peak_flops for found in runs.values() for run in found), default=0.0)
    rows = [_row(entrant.name, runs[entrant.name], seconds[entrant.name], peak) for entrant in measured]
    base = _base(measured, rows)
    for row in rows if base else []:
        row.update(_compared(row, base, seconds))
    return {
        "setting": {key: value for key, value in vars(setting).items() if key != "folder"},
        "data": counts,
        "peak_gflops": peak / 1e9,
        "processor": processor(setting.device),
        "versions": versions(),
        "base": base["name"] if base else None,
        "absent": absent,
        "entrants": rows,
    }


def _row(name: str, runs: list[Measurement], seconds: list[float], peak: float) -> dict[str, Any]:
    first, typical = runs[0], median(seconds)
    alone = [run.products_seconds for run in runs if run.products_seconds is not None]
    return {
        "name": name,
        "pairs_per_second": first.pairs / typical,
        "pairs_per_second_of_rounds": [first.pairs / each for each in seconds],
        "tokens_per_second": first.tokens / typical,
        "utilisation": first.necessary_flops / typical / peak,
        "forwards": first.forwards,
        "gflop_per_pair": first.flops / first.pairs / 1e9,
        "gflop_per_pair_recomputed": first.flops_recomputed / first.pairs / 1e9,
        "peak_mib": median(run.peak_mib for run in runs),
        "grown_mib": median(run.grown_mib for run in runs),
        "first_loss": first.losses[0],
        "losses": first.losses,
        "products_ratio": typical / median(alone) if alone else None,
    }


def _base(entrants: list[Entrant], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return simpo's fastest packed entrant with the SimPO loss, otherwise the first entrant."""
    own = {entrant.name for entrant in entrants if entrant.path == "auto" and entrant.objective == "simpo"}
    best = max((row for row in rows if row["name"] in own), key=lambda row: row["pairs_per_second"], default=None)
    return best or (rows[0] if rows else None)


def _compared(row: dict[str, Any], base: dict[str, Any], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return the time of ``row`` relative to ``base``, measured and by FLOP count, and the relative memory."""
    rounds = zip(seconds[row["name"]], seconds[base["name"]], strict=False)
    ratio, bound = median(mine / theirs for mine, theirs in rounds), row["gflop_per_pair"] / base["gflop_per_pair"]
    return {
        "speed_ratio": ratio,
        "bound": bound,
        "share": ratio / bound,
        "memory_ratio": row["peak_mib"] / base["peak_mib"],
    }


def print_report(report: dict[str, Any]) -> None:
    """Print the table, and below it the setting, hardware and versions."""
    console = Console(width=None if Console().is_terminal else 170)
    setting, data = report["setting"], report["data"]
    console.print(_table(report))
    rows, count = setting["pairs"], data["responses"]
    lines = [
        f"Llama {setting['model']}, {setting['weights']} weights, {setting['dtype']}, {setting['optimizer']}; {rows} "
        f"comparisons with {count / rows:g} responses each, {setting['pairs_per_step']} per step, on average "
        f"{data['prompt_tokens'] / rows:.0f} prompt and {data['response_tokens'] / count:.0f} response tokens, at most "
        f"{data['longest']}.",
        f"{report['processor']}, {setting['device']}, {setting['threads']} threads, {setting['clock']} time; "
        f"matrix products at {report['peak_gflops']:,.0f} GFLOP/s; "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        f"slower by: time per pair relative to {report['base']}, median over rounds; counted: the same from FLOPs; "
        "share: the first divided by the second; memory: relative peak memory. MFU: FLOPs for unique tokens, visible "
        "query-key pairs and response logits, relative to the measured rate of matrix products.",
    ]
    lines += [f"Not measured: {name}: {reason}." for name, reason in report["absent"].items()]
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _table(report: dict[str, Any]) -> Table:
    table = Table()
    shown = [key for key in COLUMNS if any(row.get(key) is not None for row in report["entrants"])]
    for key in shown:
        table.add_column(COLUMNS[key], justify="left" if key == "name" else "right")
    for row in report["entrants"]:
        table.add_row(*(_cell(row, key) for key in shown))
    return table


def _cell(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    return "" if value is None else FORMATS.get(key, "{}").format(value)


def versions() -> dict[str, str]:
    """Return the versions of the relevant packages that are installed."""
    return {name: version for name in PACKAGES if (version := _version(name))}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def processor(device: str) -> str:
    """Return the model name of the GPU or CPU."""
    if device == "cuda":
        import torch  # noqa: PLC0415 - slow import

        return torch.cuda.get_device_name()
    described = Path("/proc/cpuinfo")
    if described.exists():
        for line in described.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
