"""Requests to servers with an OpenAI-compatible interface."""
