#!/usr/bin/env bash
# simpo online with the real vLLM, on a CPU: benchmarks/vllm_online.sh ENVIRONMENT DEMO
# ENVIRONMENT is the one that benchmarks/vllm_cpu.sh makes, DEMO the folder of `simpo demo`.
# Checked, for all weights and for an adapter: after every step the greedy answers are those of the current weights. Then
# a run that is killed continues to the same files, no process of vLLM outlives the one that was killed, two processes
# train together, and the time of rollouts is compared with that of the default engine.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${1:?folder of the environment} demo=${2:?folder of simpo demo}
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-ERROR} PYTHONPATH=$PWD/src
python=$environment/bin/python
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
run() { "$python" -m simpo.cli "$@" >"$out/log" 2>&1 || { tail -5 "$out/log"; exit 1; }; }

echo "== a model of the tiny world whose heads are as wide as vLLM needs them on a CPU"
"$python" - "$demo/start" "$out/new" <<'END_PYTHON'
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
run sft "$out/new" --dataset_name "$demo/sft.jsonl" --learning_rate 3e-3 --per_device_train_batch_size 16 --max_length 128 \
  --num_train_epochs "${EPOCHS:-2}" --report_to none --output_dir "$out/model"

online=(online "$out/model" --dataset_name "$demo/prompts.jsonl" --annotator exact --max_length 128 --max_new_tokens 48
  --per_device_train_batch_size 16 --logging_steps 1 --report_to none --save_strategy steps --save_steps 1)
greedy=(--objective ppo --num_generations 1 --temperature 0 --max_steps 4)
for arguments in "" "--engine_args enforce_eager=true"; do
  echo "== all weights, greedy ${arguments:-(compiled)}"
  run "${online[@]}" "${greedy[@]}" --learning_rate 1e-3 --engine vllm $arguments --output_dir "$out/full"
  "$python" -m benchmarks.verify_online "$out/model" "$out/full"
  rm -r "$out/full"
done
eager=(--engine vllm --engine_args enforce_eager=true)
echo "== an adapter, greedy"
run "${online[@]}" "${greedy[@]}" --learning_rate 1e-2 --use_peft --lora_r 8 "${eager[@]}" --output_dir "$out/lora"
"$python" -m benchmarks.verify_online "$out/model" "$out/lora"

sampled=(--objective rloo --num_generations 8 --sync_every 2 --learning_rate 1e-3 --max_steps 8)
echo "== killed in its third rollout, and continued"
run "${online[@]}" "${sampled[@]}" "${eager[@]}" --output_dir "$out/whole"
"$python" -m simpo.cli "${online[@]}" "${sampled[@]}" "${eager[@]}" --output_dir "$out/killed" >"$out/log" 2>&1 &
killed=$!
until [ -e "$out/killed/rollouts/000001.jsonl" ] && [ -e "$out/killed/checkpoint-4" ]; do kill -0 $killed && sleep 0.2; done
children=$(pgrep -P $killed || true)
kill -9 $killed
wait $killed || true
sleep 10
for child in $children; do
  if kill -0 "$child" 2>/dev/null; then echo "process $child outlives it: $(tr '\0' ' ' <"/proc/$child/cmdline")"; fi
done
run "${online[@]}" "${sampled[@]}" "${eager[@]}" --output_dir "$out/killed"
for file in "$out"/whole/rollouts/0*.jsonl "$out/whole/model.safetensors"; do
  cmp "$file" "${file/whole/killed}" && echo "the same bytes: ${file#"$out"/whole/}"
done

echo "== two processes"
"$python" -m torch.distributed.run --nproc_per_node 2 -m simpo.cli "${online[@]}" "${sampled[@]}" "${eager[@]}" \
  --per_device_train_batch_size 8 --output_dir "$out/two" >"$out/log" 2>&1 || { tail -5 "$out/log"; exit 1; }

echo "== times"
run "${online[@]}" "${sampled[@]}" --output_dir "$out/memory"
"$python" - "$out" <<'END_PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

print(", ".join(f"{name} {version(name)}" for name in ("vllm-cpu", "torch", "transformers")))
for name in ("whole", "two", "memory"):
    lines = [json.loads(line) for line in Path(sys.argv[1], name, "metrics.jsonl").open()]
    first, *others = [line["seconds/rollouts"] for line in lines if line.get("seconds/rollouts")]
    gaps = [line["rollout/engine_gap"] for line in lines if "rollout/engine_gap" in line]
    print(f"{name}: first rollout {first:.1f} s, others {sum(others) / len(others):.1f} s, largest gap {max(gaps, default=0):.1e}")
END_PYTHON
