"""Child processes forked from the tests' own process, so that no import is repeated."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
from torch.distributed import TCPStore
from tqdm import tqdm

_FORK = multiprocessing.get_context("fork")


class Ended(NamedTuple):
    """The exit codes of all ranks, and their output, rank by rank."""

    codes: list[int]
    stdout: str
    stderr: str


def run_ranks(
    world: int,
    function: Callable[..., int],
    *arguments: object,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> Ended:
    """Call ``function(*arguments)`` on every rank, with the environment variables that ``torchrun`` sets.

    The function's return value is the rank's exit code. If one rank fails, the others are soon terminated, as with
    ``torchrun``; ranks that wait for each other forever raise ``TimeoutError``.
    ``folder`` receives the ranks' output and their dataset cache.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    output = Path(tempfile.mkdtemp(prefix="output-", dir=folder))
    ranks = []
    for rank in range(world):
        given = shared | {"RANK": rank, "LOCAL_RANK": rank} if world > 1 else {}
        variables = {key: str(value) for key, value in given.items()} | dict(environment or {})
        files = [output / f"{name}-{rank}" for name in ("stdout", "stderr")]
        ranks.append(_FORK.Process(target=_run, args=(variables, folder / "cache", files, function, arguments)))
        ranks[-1].start()
    in_time = _wait(ranks, timeout)
    texts = ["".join((output / f"{name}-{rank}").read_text() for rank in range(world)) for name in ("stdout", "stderr")]
    if not in_time:
        raise TimeoutError(f"{world} ranks took more than {timeout} s:\n" + "\n".join(texts))
    return Ended([process.exitcode for process in ranks], *texts)


def use_own_locks() -> None:
    """Give this fork its own progress bar locks, of every kind.

    tqdm's locks are shared by all forks, and a killed fork may hold them forever.
    """
    kinds: list[type[tqdm]] = [tqdm]
    for kind in kinds:
        kind.set_lock(threading.RLock())
        kinds += kind.__subclasses__()


def _run(variables: dict[str, str], cache: Path, files: list[Path], function: Callable, arguments: tuple) -> None:
    """Run one rank, skipping interpreter shutdown, in which some versions of torch abort."""
    use_own_locks()
    os.environ |= variables
    datasets.config.HF_DATASETS_CACHE = cache
    torch.set_num_threads(1)
    sys.stdout, sys.stderr = (path.open("w", buffering=1) for path in files)
    for number, file in enumerate((sys.stdout, sys.stderr), start=1):
        os.dup2(file.fileno(), number)
    code = 1
    try:
        code = function(*arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(ranks: list[BaseProcess], timeout: float) -> bool:
    """Wait until all have ended, or for a while after one has failed; return False if some are still running."""
    deadline, failed = time.monotonic() + timeout, False
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if not failed and any(process.exitcode for process in ranks):
            failed, deadline = True, time.monotonic() + 5
        time.sleep(0.02)
    in_time = failed or not any(process.is_alive() for process in ranks)
    for process in ranks:
        process.terminate()
    for process in ranks:
        process.join(30)
        process.kill()
        process.join()
    return in_time
