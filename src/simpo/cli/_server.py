"""Options of commands that ask a model behind an OpenAI-compatible server."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from simpo.client import ChatClient, Endpoint, Prices
from simpo.client.cache import default_cache
from simpo.config.arguments import ArgumentParser
from simpo.errors import SimpoError
from simpo.judging.registry import JudgeOptions


def add_server_options(parser: ArgumentParser, *, timeout: float = 60.0, max_tokens: int | None = None) -> None:
    """Where the judge is, what it costs, and whether the user agrees.

    Args:
        parser: gets the options.
        timeout: seconds that a reply may take unless told otherwise.
        max_tokens: the longest reply unless told otherwise; None for the benchmark's own limit.
    """
    parser.add_argument("--judge_url", metavar="URL", help="server of the judge, e.g. https://api.openai.com/v1")
    parser.add_argument("--judge_model", metavar="NAME", help="the judge's name on that server")
    parser.add_argument(
        "--judge_key_env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable with the key (default OPENAI_API_KEY); a server on this machine needs none",
    )
    parser.add_argument("--judge_concurrency", type=int, default=8, metavar="N", help="requests at a time (default 8)")
    parser.add_argument(
        "--judge_timeout", type=float, default=timeout, metavar="S", help=f"seconds a reply (default {timeout:g})"
    )
    usual = max_tokens or "the benchmark's; a judge that thinks needs more"
    parser.add_argument(
        "--judge_max_tokens", type=int, default=max_tokens, metavar="N", help=f"longest reply (default {usual})"
    )
    cache = str(default_cache()).replace("%", "%%")
    parser.add_argument(
        "--cache", metavar="DIR", help=f"folder of replies that are not asked for again (default {cache})"
    )
    parser.add_argument(
        "--prices",
        type=float,
        nargs=2,
        metavar=("READ", "WRITTEN"),
        help="dollars a million tokens, to say what the judge costs",
    )
    parser.add_argument("--yes", action="store_true", help="send the requests without asking")
    parser.add_argument(
        "--strip_thinking",
        action="store_true",
        help="show judges the answers without the thinking that they begin with",
    )


def add_judge_options(parser: ArgumentParser) -> None:
    """What any judge may need, a server's included."""
    parser.add_argument(
        "--dtype", metavar="TYPE", help="type of weights (default bfloat16 on an accelerator, float32 on a CPU)"
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run a judge's function, and code that comes with models"
    )
    add_server_options(parser, max_tokens=1024)
    parser.add_argument("--judge_prompt", metavar="FILE", help="a judge prompt instead of the one that comes along")


def judge_options(arguments: Namespace) -> JudgeOptions:
    """What was given of :func:`add_judge_options`.

    Raises:
        SimpoError: as :func:`client_of`.
    """
    return JudgeOptions(
        client_of(arguments),
        None if arguments.judge_prompt is None else Path(arguments.judge_prompt).expanduser(),
        arguments.judge_max_tokens,
        arguments.dtype,
        arguments.trust_remote_code,
        arguments.strip_thinking,
    )


def client_of(arguments: Namespace) -> ChatClient | None:
    """The client for the server that was named; None if none was.

    Raises:
        SimpoError: the server or the model alone was named, or cannot be used.
    """
    if arguments.judge_url is None and arguments.judge_model is None:
        return None
    if arguments.judge_url is None or arguments.judge_model is None:
        raise SimpoError("judge_url and judge_model: name both or none")
    endpoint = Endpoint(
        arguments.judge_url,
        arguments.judge_model,
        arguments.judge_key_env,
        arguments.judge_concurrency,
        arguments.judge_timeout,
    )
    cache = default_cache() if arguments.cache is None else Path(arguments.cache).expanduser()
    return ChatClient(endpoint, cache)


def prices_of(arguments: Namespace) -> Prices | None:
    """What tokens cost, if that was said.

    Raises:
        SimpoError: no price.
    """
    return None if arguments.prices is None else Prices(*arguments.prices)
