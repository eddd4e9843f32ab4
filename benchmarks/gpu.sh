#!/usr/bin/env bash
# Verify and measure simpo on one CUDA GPU in under nine minutes: benchmarks/gpu.sh
# Without a GPU, a dry run at toy size: DEVICE=cpu benchmarks/gpu.sh
# Environment: PYTHON (the interpreter with simpo; TRL, liger-kernel and bitsandbytes where they are to be compared),
# OUTPUT (a folder for logs and JSON; a new temporary one otherwise).
# Each section has a time of its own; what it has measured by then is kept, and what is missing is named.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
DEVICE=${DEVICE:-cuda}
OUTPUT=${OUTPUT:-$(mktemp -d)}
mkdir -p "$OUTPUT"

has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(any(importlib.util.find_spec(n) is None for n in sys.argv[1:]))" "$@"; }
if ! has torch simpo; then
  echo "gpu.sh: '$PYTHON' has no torch or no simpo: pip install -e . and name the interpreter with PYTHON" >&2
  exit 2
fi
if [ "$DEVICE" = cuda ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: PyTorch sees no CUDA GPU here; nothing was verified. Dry run: DEVICE=cpu benchmarks/gpu.sh" >&2
  exit 2
fi

failed=0
sections=()
# section NAME SECONDS COMMAND ...: its output into a file, and an end to it
section() {
  local name=$1 limit=$2
  shift 2
  sections+=("$name")
  echo "gpu.sh: $name (at most $limit s)" >&2
  timeout --kill-after=5 "$limit" "$PYTHON" -m "$@" >"$OUTPUT/$name.txt" || {
    failed=1
    echo "gpu.sh: $name FAILED or ran out of time" | tee -a "$OUTPUT/$name.txt" >&2
  }
}
# measured NAME SECONDS OPTION ...: a comparison that stops by itself before its section's end
measured() {
  local name=$1 limit=$2
  shift 2
  section "$name" "$limit" benchmarks.compare --device "$DEVICE" --repeats 1 --time-limit $((limit - 15)) \
    --output "$OUTPUT/$name.json" "$@"
}

if [ "$DEVICE" = cuda ]; then
  export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
  optimizer=adamw_torch_fused # with bf16 weights its states are bf16: 64 GB in all
  has torchao && optimizer=adamw_torch_8bit
  has bitsandbytes && optimizer=adamw_8bit
  section verification 110 benchmarks.verify_cuda
  large=(--model 8b --weights bf16 --dtype bf16 --optimizer "$optimizer" --profile ultrafeedback --pairs 64
    --pairs-per-step 32 --families simpo)
  measured 8b-checkpointed 65 "${large[@]}" --checkpointing --only simpo
  measured 8b 80 "${large[@]}" --max-batch-tokens 8192 4096 --only "simpo 8192" "simpo 4096"
  measured peers 185 --model 1b --dtype bf16 --profile ultrafeedback --pairs 64 --pairs-per-step 16 \
    --families simpo compiled trl-cpo trl-dpo-liger liger dpo padded trl-dpo --micro-batches 16 8 4
  measured sharing-hh 40 --model 1b --dtype bf16 --profile hh --pairs 128 --pairs-per-step 64 --families sharing
  measured sharing-documents 40 --model 1b --dtype bf16 --profile documents --responses 4 --pairs 8 --pairs-per-step 4 \
    --families sharing
else
  export OMP_NUM_THREADS=1
  toy=(--threads 1 --model toy --scale 0.1 --pairs 2 --pairs-per-step 2)
  section verification 600 benchmarks.verify_cuda --device cpu
  measured 8b 600 "${toy[@]}" --profile documents --families simpo sharing --only simpo "loop alone"
fi

for name in "${sections[@]}"; do
  printf '\n== %s ==\n' "$name"
  cat "$OUTPUT/$name.txt"
done
echo "Tables and JSON: $OUTPUT"
[ "$DEVICE" = cuda ] || echo "Dry run on the CPU at toy size: these are no measurements, and nothing of CUDA was verified."
[ "$failed" = 0 ] && echo "gpu.sh: done" || echo "gpu.sh: FAILED in part, see above"
exit "$failed"
