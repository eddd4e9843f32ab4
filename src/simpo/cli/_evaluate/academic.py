"""Academic benchmarks by lm-eval (pip install 'simpo[academic]'), before and after alignment."""

from __future__ import annotations

from simpo.cli._evaluate._options import add_run_options, run
from simpo.config.arguments import ArgumentParser
from simpo.evaluation.academic import TASKS


def main(argv: list[str]) -> int:
    """Run the tasks on one model, or on two and compare."""
    return run("academic", _parser(), argv)


def _parser() -> ArgumentParser:
    parser = ArgumentParser("evaluate academic", __doc__)
    parser.add_argument("model", metavar="MODEL", help="hub name or folder of the model")
    add_run_options(parser)
    add = parser.add_argument
    add("--against", metavar="START", help="the model that it was made from, for the differences")
    add("--tasks", default=",".join(TASKS), metavar="NAMES", help=f"lm-eval's names (default {','.join(TASKS)})")
    add("--task_folder", metavar="DIR", help="folder with task files of one's own")
    add("--num_fewshot", type=int, metavar="N", help="examples before each item (default: the task's)")
    add("--limit", type=int, metavar="N", help="items of each task, for a trial")
    add("--batch_size", default="auto", metavar="N", help="as lm-eval has it (default auto)")
    add("--no_chat_template", action="store_true", help="show items as plain text")
    add("--dtype", metavar="TYPE", help="type of the weights")
    parser.add_remote_code()
    return parser
