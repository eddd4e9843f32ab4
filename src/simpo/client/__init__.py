"""Client for servers with an OpenAI-compatible chat API."""

from simpo.client.chat import (
    ChatReply,
    ChatRequest,
    Endpoint,
    Estimate,
    Prices,
    Usage,
    confirm_cost,
    placeholder_answer,
)
from simpo.client.chat_client import ChatClient

__all__ = [
    "ChatClient",
    "ChatReply",
    "ChatRequest",
    "Endpoint",
    "Estimate",
    "Prices",
    "Usage",
    "confirm_cost",
    "placeholder_answer",
]
