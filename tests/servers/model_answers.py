"""A real model's greedy answers, with the log-probabilities of the first token."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from tests.servers.chat_server import completion
from transformers import AutoModelForCausalLM, AutoTokenizer


class ModelAnswers:
    """``answer(body)`` for :class:`~tests.servers.chat_server.ChatServer`, using a model in a folder.

    ``logprobs=False`` imitates servers that do not return log-probabilities.
    """

    def __init__(self, folder: Path, *, logprobs: bool = True) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._logprobs = logprobs
        self._lock = threading.Lock()

    def first_token_logprobs(self, messages: list[dict[str, str]]) -> torch.Tensor:
        """Return log-probabilities ``[V]`` of the first token over the whole vocabulary."""
        with torch.no_grad():
            return self.model(**self._prompt(messages)).logits[0, -1].log_softmax(-1)

    def __call__(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the completion for a request."""
        prompt = self._prompt(body["messages"])
        with self._lock:
            ids = self.model.generate(**prompt, do_sample=False, max_new_tokens=body["max_tokens"])
        answer = ids[0, prompt["input_ids"].shape[1] :].tolist()
        top = None
        if body.get("logprobs") and self._logprobs:
            values, tokens = self.first_token_logprobs(body["messages"]).topk(body["top_logprobs"])
            names = [self.tokenizer.decode([token]) for token in tokens.tolist()]
            top = dict(zip(names, values.tolist(), strict=True))
        found = completion(self.tokenizer.decode(answer, skip_special_tokens=True), top)
        counts = {"prompt_tokens": prompt["input_ids"].shape[1], "completion_tokens": len(answer)}
        return found | {"usage": counts}

    def _prompt(self, messages: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
