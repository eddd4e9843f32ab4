"""Compare log-probabilities from vLLM with naive ones: python -m benchmarks.verify_vllm MODEL FOLDER

FOLDER is a ``simpo sample --engine vllm`` run. The reference computes one answer at a time in float32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TOLERANCE = 3e-5  # nats per token


def main(model_name: str, folder: str) -> int:
    """Print the largest difference; return 1 if it is too large."""
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).eval()
    worst = 0.0
    tokens = 0
    for line in (Path(folder) / "responses.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        messages = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for ids, stored in zip(row["response_ids"], row["logps"], strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
            naive = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].sum().item()
            worst = max(worst, abs(naive - stored) / len(ids))
            tokens += len(ids)
    print(f"{tokens} tokens; largest difference in an answer's mean log-probability: {worst:.1e} nats")
    return int(not tokens or worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
