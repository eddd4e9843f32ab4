"""Entry point of the command line: finds and runs a command, and reports a user's mistake in one line."""

from __future__ import annotations

import ast
import importlib
import io
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path

from simpo import __version__
from simpo.config.fields import nearest
from simpo.errors import InterruptedRun, SimpoError, one_line
from simpo.runs.log import EarlyNotices, LogFile, mask_secrets
from simpo.runs.terminal import output_is_closed, printable

_MAX_ERROR_LENGTH = 4000  # characters
_VERIFY = "--verify"  # any command: hash all files of a finished run, not just the modified ones
_JSON = "--json"  # any command that writes results.json: print it to stdout, and everything else to stderr
PLAN_FIRST = "--plan"  # training commands: check that the run fits this machine before training
_WITHOUT_RESULTS = ("chat", "inspect", "merge", "push", "recipe", "report")
_PRINTS_JSON = "plan"  # writes no results.json, but has a --json setting of its own

# Each command's module in simpo.cli; the function has the command's name.
COMMANDS = {
    **dict.fromkeys(("train", "sft", "reward", "online"), "training"),
    **dict.fromkeys(("sample", "annotate", "pair"), "answers"),
    **dict.fromkeys(("compare", "evaluate", "label"), "evaluation"),
    **dict.fromkeys(("sweep", "loop", "reproduce"), "experiments"),
    **dict.fromkeys(("chat", "merge", "push"), "models"),
    **{name: name for name in ("plan", "recipe", "inspect", "report", "demo")},
}


def command_named(name: str) -> Callable[[list[str]], None]:
    """Return a command's function, which takes the arguments that follow the command's name."""
    return getattr(importlib.import_module(f"simpo.cli.{COMMANDS[name]}"), name)


def _overview() -> str:
    lines = ["usage: simpo COMMAND [ARGUMENT ...]   (run simpo COMMAND --help for details)", "", "commands:"]
    lines += [f"  {name:<10} {summary}" for name, summary in sorted(_summaries())]
    lines += ["", "common options:"]
    lines += [f"  {_VERIFY:<10} Hash all files of a finished run before reporting it as finished."]
    lines += [f"  {_JSON:<10} Print the command's results to stdout as JSON, and everything else to stderr."]
    lines += [f"  {PLAN_FIRST:<10} With train, sft, reward or online: check first that the run fits this machine."]
    return "\n".join(lines)


def _summaries() -> Iterator[tuple[str, str]]:
    """Yield each command and the first line of its docstring, without importing it, which would take seconds."""
    for module in set(COMMANDS.values()):
        source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and COMMANDS.get(node.name) == module:
                yield node.name, (ast.get_docstring(node) or "").partition("\n")[0]


class _Notices(logging.StreamHandler):
    """Prints warnings; messages below that level (see ``log_level``) only go to the run's ``log.txt``."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        self.setLevel(logging.WARNING)
        self.setFormatter(logging.Formatter("note: %(message)s"))

    def format(self, record: logging.LogRecord) -> str:
        """Format a notice without secrets and terminal control characters."""
        return printable(mask_secrets(super().format(record)))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """End the command on a closed pipe instead of printing a traceback per notice, unless there is a log file."""
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            if any(isinstance(handler, LogFile) for handler in logging.getLogger().handlers) and output_is_closed():
                return
            raise  # noqa: PLE0704 - called while the exception is handled
        super().handleError(record)


def _reraise(self: object) -> None:
    """Let :func:`main` handle a closed pipe; rich would exit with code 1."""
    raise  # noqa: PLE0704 - called while the exception is handled


def _keep_stderr_for_errors() -> None:
    """Print notices to stdout, so that stderr only has errors."""
    from rich.console import Console  # noqa: PLC0415 - slow, and the overview does not need it

    logging.basicConfig(handlers=[_Notices(), EarlyNotices()], level=logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # logs ten lines of retries; the error suffices
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # the error reports damaged files
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of missing optional kernels
    Console.on_broken_pipe = _reraise  # type: ignore[method-assign, assignment]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # so that redirected output can be followed live


def _quiet_libraries() -> None:
    """Turn library messages into notices, and show progress bars only on terminals."""
    import datasets  # noqa: PLC0415 - slow, and only the overview does without it
    import transformers  # noqa: PLC0415

    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``simpo COMMAND ...`` and return its exit code.

    0: success. 1: a bug in simpo, printed with its traceback. 2: invalid input. 130 or 143: stopped by a signal.
    141: the output pipe was closed.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None and arguments[:1] in (["train"], ["sft"], ["reward"]) and {"-h", "--help"} & set(arguments):
        # transformers imports peft for an isinstance check, and peft imports all of transformers' models. That takes
        # 2 seconds, which --help does not need to spend; the process exits right after it.
        sys.modules["peft"] = None  # type: ignore[assignment]
    try:
        _run(arguments)
        sys.stdout.flush()
        return 0
    except InterruptedRun as stop:
        print(f"simpo: {printable(str(stop))}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("simpo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not output_is_closed():
            raise
        return 141
    except (SimpoError, OSError, MemoryError) as error:
        print(f"simpo: error: {_shortened(printable(mask_secrets(_one_line(error))))}", file=sys.stderr)
        return 2
    except Exception:
        sys.stderr.write(printable(mask_secrets(traceback.format_exc())))
        print("simpo: this is a bug in simpo; please report it, including the lines above", file=sys.stderr)
        return 1


def _one_line(error: Exception) -> str:
    """Describe an invalid input or an operating-system error (name too long, permission denied, out of memory)."""
    if isinstance(error, OSError) and error.filename is not None:
        name = str(error.filename)
        return f"{name[:60]}...: {error.strerror}" if len(name) > 200 else f"{name}: {error.strerror}"
    return f"out of memory: {one_line(error)}" if isinstance(error, MemoryError) else one_line(error, None)


def _shortened(line: str) -> str:
    """Cut an error that quotes a lot of the user's data; the run's log has the whole text."""
    excess = len(line) - _MAX_ERROR_LENGTH
    return line if excess <= 0 else f"{line[:_MAX_ERROR_LENGTH]}... ({excess:,} more characters)"


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    if arguments[0] in ("-V", "--version"):
        print(f"simpo {__version__}")
        return
    # Options of all commands may also precede the command.
    position = next((index for index, given in enumerate(arguments) if given not in (_JSON, _VERIFY)), 0)
    name, rest = arguments[position], [*arguments[:position], *arguments[position + 1 :]]
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS) or f"; the commands are {', '.join(sorted(COMMANDS))}"
        raise SimpoError(f"unknown command {name!r}{hint}")
    if _JSON not in rest or name == _PRINTS_JSON:
        _run_command(name, rest)
        return
    if name in _WITHOUT_RESULTS or (name == "label" and "--export" not in rest):
        raise SimpoError(f"{_JSON}: simpo {name} writes no results.json; leave the option out")
    with redirect_stdout(sys.stderr):
        _run_command(name, [argument for argument in rest if argument != _JSON])
    _print_json()


def _run_command(name: str, rest: list[str]) -> None:
    _keep_stderr_for_errors()
    from simpo.runs.folder import RunFolder  # noqa: PLC0415 - the overview does not need it

    RunFolder.verify_hashes, RunFolder.latest = _VERIFY in rest, None
    command = command_named(name)
    _quiet_libraries()
    command([argument for argument in rest if argument != _VERIFY])


def _print_json() -> None:
    """Print the finished run's folder and its ``results.json``, on the main process only."""
    from simpo.runs.folder import RunFolder  # noqa: PLC0415
    from simpo.runs.results import FILE_NAME  # noqa: PLC0415

    if RunFolder.latest is not None:
        results = json.loads((RunFolder.latest / FILE_NAME).read_text(encoding="utf-8"))
        print(json.dumps({"folder": str(RunFolder.latest), **results}, indent=2))


if __name__ == "__main__":
    sys.exit(main())
