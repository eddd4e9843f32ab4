"""The command line: find the command, run it, and end a user's mistake in one line."""

from __future__ import annotations

import ast
import importlib
import io
import logging
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

from simpo import __version__, commands
from simpo.errors import InterruptedRun, SimpoError
from simpo.terminal import printable


def command_names() -> list[str]:
    """Names of the commands: the public modules of :mod:`simpo.commands`."""
    names = (module.name for module in pkgutil.iter_modules(commands.__path__))
    return sorted(name for name in names if not name.startswith("_"))


def _overview() -> str:
    lines = ["usage: simpo COMMAND [ARGUMENT ...]   (simpo COMMAND --help says more)", "", "commands:"]
    lines += [f"  {name:<10} {_summary(name)}" for name in command_names()]
    return "\n".join(lines)


def _summary(name: str) -> str:
    """First line of a command's docstring, read without the import, which takes seconds."""
    (source,) = (path for folder in commands.__path__ for path in Path(folder).glob(f"{name}.py"))
    return (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def _keep_stderr_for_errors() -> None:
    """Notices go to stdout; progress bars are drawn on terminals only."""
    logging.basicConfig(stream=sys.stdout, format="note: %(message)s", level=logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # ten lines of retries; the error says enough
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log that is read while the run goes on
    import datasets  # noqa: PLC0415 - slow, and every command but the overview has imported it anyway
    import transformers  # noqa: PLC0415

    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``simpo COMMAND ...`` and return its exit code: 0 done, 2 a user's mistake, 130 or 143 stopped."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"simpo {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    try:
        if name not in command_names():
            raise SimpoError(f"unknown command {name!r}; the commands are {', '.join(command_names())}")
        command = importlib.import_module(f"simpo.commands.{name}")
        _keep_stderr_for_errors()
        return command.main(rest)
    except SimpoError as error:
        print(f"simpo: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except InterruptedRun as stop:
        print(f"simpo: {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("simpo: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
