#!/usr/bin/env bash
# Smoke test for DeepSpeed: train a tiny model for a few steps with ZeRO 2 and 3. Usage: benchmarks/deepspeed_smoke.sh
# Environment: PYTHON (an interpreter with simpo installed), PROCESSES (one per GPU, default 1).
# Prints the losses, which should be similar for both stages. It does not measure speed or memory.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
PROCESSES=${PROCESSES:-1}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

if ! "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("deepspeed") is None)'; then
  echo "deepspeed_smoke.sh: deepspeed is not installed in '$PYTHON'; nothing was verified (pip install deepspeed)" >&2
  exit 2
fi
if ! "$PYTHON" -c 'import sys, torch; sys.exit(torch.cuda.device_count() < int(sys.argv[1]))' "$PROCESSES"; then
  echo "deepspeed_smoke.sh: fewer than $PROCESSES CUDA GPUs are available; nothing was verified" >&2
  exit 2
fi

"$PYTHON" - "$folder" <<'END' || exit 1
import sys
from pathlib import Path

from simpo.world.pairs import write_model, write_pairs

folder = Path(sys.argv[1])
write_model(folder / "model", seed=0)
write_pairs(folder / "pairs.jsonl", 64, seed=0)
END

failed=0
for stage in 2 3; do
  if "$PYTHON" -m accelerate.commands.launch --config_file "recipes/launch/deepspeed-zero$stage.yaml" \
    --num_processes "$PROCESSES" -m simpo.cli train --model_name_or_path "$folder/model" \
    --dataset_name "$folder/pairs.jsonl" --output_dir "$folder/zero$stage" --per_device_train_batch_size 16 \
    --max_steps 3 --logging_steps 1 --learning_rate 1e-4 --bf16 true >"$folder/zero$stage.log" 2>&1; then
    echo "ZeRO $stage: $(grep -c '"loss"' "$folder/zero$stage/metrics.jsonl") logged steps"
    grep '"loss"' "$folder/zero$stage/metrics.jsonl"
  else
    failed=1
    echo "ZeRO $stage: FAILED"
    tail -n 20 "$folder/zero$stage.log"
  fi
done
exit "$failed"
