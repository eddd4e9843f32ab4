"""The command line: find the command, run it, and end a user's mistake in one line."""

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

_LONGEST_LINE = 4000  # characters of an error
_VERIFY = "--verify"  # of every command: hash all files of a finished run, not only those that were modified
_JSON = "--json"  # of every command that leaves results: print these as JSON, and everything else to stderr
_WITHOUT_RESULTS = ("chat", "inspect", "merge", "push", "recipe", "report")
_PRINTS_JSON = "plan"  # which leaves no folder, and has a setting of this name


# The module of each command, which has a function of the command's name.
COMMANDS = {
    **dict.fromkeys(("train", "sft", "reward", "online"), "training"),
    **dict.fromkeys(("sample", "annotate", "pair"), "answers"),
    **dict.fromkeys(("compare", "evaluate", "label"), "evaluation"),
    **dict.fromkeys(("sweep", "loop", "reproduce"), "experiments"),
    **dict.fromkeys(("chat", "merge", "push"), "models"),
    **{name: name for name in ("plan", "recipe", "inspect", "report", "demo")},
}


def command_named(name: str) -> Callable[[list[str]], None]:
    """The function of a command, which takes the arguments after the command's name."""
    return getattr(importlib.import_module(f"simpo.cli.{COMMANDS[name]}"), name)


def _overview() -> str:
    lines = ["usage: simpo COMMAND [ARGUMENT ...]   (simpo COMMAND --help lists them)", "", "commands:"]
    lines += [f"  {name:<10} {summary}" for name, summary in sorted(_summaries())]
    lines += ["", f"{_VERIFY}, with any command, hashes all files of a finished run before it is reported as finished"]
    lines += [f"{_JSON} prints the results of a command as JSON, and everything else to stderr"]
    return "\n".join(lines)


def _summaries() -> Iterator[tuple[str, str]]:
    """The commands with the first lines of their docstrings, read without the import, which takes seconds."""
    for module in set(COMMANDS.values()):
        source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and COMMANDS.get(node.name) == module:
                yield node.name, (ast.get_docstring(node) or "").partition("\n")[0]


class _Notices(logging.StreamHandler):
    """Warnings; what libraries report at a lower level (``log_level``) is only kept in the run's ``log.txt``."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        self.setLevel(logging.WARNING)
        self.setFormatter(logging.Formatter("note: %(message)s"))

    def format(self, record: logging.LogRecord) -> str:
        """A notice without secrets and without characters that control the terminal."""
        return printable(mask_secrets(super().format(record)))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Let a closed pipe end the command instead of printing a traceback for every notice, unless it has a log."""
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            if any(isinstance(handler, LogFile) for handler in logging.getLogger().handlers) and output_is_closed():
                return
            raise  # noqa: PLE0704 - called while the exception is handled
        super().handleError(record)


def _raise_again(self: object) -> None:
    """Let a closed pipe end the command as :func:`main` does, where rich would exit with code 1."""
    raise  # noqa: PLE0704 - called while the exception is handled


def _keep_stderr_for_errors() -> None:
    """Print notices to stdout."""
    from rich.console import Console  # noqa: PLC0415 - slow, and the overview does not need it

    logging.basicConfig(handlers=[_Notices(), EarlyNotices()], level=logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # ten lines of retries; the error is enough
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # damaged files, which the error reports
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import: an optional kernel is missing
    Console.on_broken_pipe = _raise_again  # type: ignore[method-assign, assignment]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log that is read while the run goes on


def _quiet_libraries() -> None:
    """Turn the libraries' messages into notices, and draw progress bars on terminals only."""
    import datasets  # noqa: PLC0415 - slow, and every command but the overview has imported it anyway
    import transformers  # noqa: PLC0415

    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``simpo COMMAND ...`` and return its exit code.

    0 done, 1 a bug of simpo's (with its traceback), 2 a mistake in what was given, 130 or 143 stopped by a signal,
    141 the reader of the output is gone.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None and arguments[:1] in (["train"], ["sft"], ["reward"]) and {"-h", "--help"} & set(arguments):
        # transformers imports peft for an isinstance check, and peft imports all of transformers' models: 2 seconds
        # that the help of TrainingArguments does not need. The process ends after it.
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
        print("simpo: this is a bug in simpo; please report it to the project with the lines above", file=sys.stderr)
        return 1


def _one_line(error: Exception) -> str:
    """A mistake, or what the machine refuses: a name that is too long, a folder without permission, memory."""
    if isinstance(error, OSError) and error.filename is not None:
        name = str(error.filename)
        return f"{name[:60]}...: {error.strerror}" if len(name) > 200 else f"{name}: {error.strerror}"
    return f"out of memory: {one_line(error)}" if isinstance(error, MemoryError) else one_line(error, None)


def _shortened(line: str) -> str:
    """A line that quotes a user's data, without most of the data; the run's log has all of it."""
    left_out = len(line) - _LONGEST_LINE
    return line if left_out <= 0 else f"{line[:_LONGEST_LINE]}... ({left_out:,} more characters)"


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    if arguments[0] in ("-V", "--version"):
        print(f"simpo {__version__}")
        return
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS) or f"; the commands are {', '.join(sorted(COMMANDS))}"
        raise SimpoError(f"unknown command {name!r}{hint}")
    if _JSON not in rest or name == _PRINTS_JSON:
        _run_command(name, rest)
        return
    if name in _WITHOUT_RESULTS or (name == "label" and "--export" not in rest):
        raise SimpoError(f"{_JSON}: simpo {name} leaves no results.json; leave the option out")
    with redirect_stdout(sys.stderr):
        _run_command(name, [argument for argument in rest if argument != _JSON])
    _print_json()


def _run_command(name: str, rest: list[str]) -> None:
    _keep_stderr_for_errors()
    from simpo.runs.folder import RunFolder  # noqa: PLC0415 - the overview does not need it

    RunFolder.hashes_all, RunFolder.latest = _VERIFY in rest, None
    command = command_named(name)
    _quiet_libraries()
    command([argument for argument in rest if argument != _VERIFY])


def _print_json() -> None:
    """Print the folder of the run that has finished and its ``results.json``; its other processes print nothing."""
    from simpo.runs.folder import RunFolder  # noqa: PLC0415
    from simpo.runs.results import FILE_NAME  # noqa: PLC0415

    if RunFolder.latest is not None:
        results = json.loads((RunFolder.latest / FILE_NAME).read_text(encoding="utf-8"))
        print(json.dumps({"folder": str(RunFolder.latest), **results}, indent=2))


if __name__ == "__main__":
    sys.exit(main())
