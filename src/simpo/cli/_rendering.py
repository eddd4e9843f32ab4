"""Options of how conversations are rendered, for all commands that do."""

from __future__ import annotations

import argparse

from simpo.config.arguments import mapping
from simpo.data.settings import RenderSettings


def add_rendering_options(parser: argparse.ArgumentParser) -> None:
    """Add the options; give them the values that the model was trained with."""
    parser.add_argument(
        "--chat_template_kwargs",
        type=mapping,
        default={},
        metavar="JSON",
        help="variables for the chat template, e.g. '{\"enable_thinking\": false}'",
    )
    parser.add_argument(
        "--system_message",
        choices=("template", "fold"),
        default="template",
        help="fold writes system messages into the first user message, for templates without a system role",
    )


def rendering(arguments: argparse.Namespace) -> RenderSettings:
    """What the options say.

    Raises:
        SimpoError: a variable that a chat template cannot get.
    """
    return RenderSettings(arguments.chat_template_kwargs, arguments.system_message)
