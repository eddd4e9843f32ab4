"""Requests to servers with an OpenAI-compatible interface."""

from simpo.client.chat import ChatReply, ChatRequest, Endpoint
from simpo.client.chat_client import ChatClient
from simpo.client.cost import Estimate, Prices, Usage, confirm_cost, placeholder_answer

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
