#!/usr/bin/env bash
# Verify and measure simpo on one CUDA GPU: benchmarks/gpu.sh
# Without a GPU, a dry run at toy size: DEVICE=cpu benchmarks/gpu.sh
# Environment: PYTHON (the interpreter with simpo), DATA (HH-style .jsonl[.gz]; made-up pairs otherwise),
# OUTPUT (a folder for logs and results.json; a new temporary one otherwise).
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
DEVICE=${DEVICE:-cuda}
OUTPUT=${OUTPUT:-$(mktemp -d)}
mkdir -p "$OUTPUT"

has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }
if ! has torch || ! has simpo; then
  echo "gpu.sh: '$PYTHON' has no torch or no simpo: pip install -e . and name the interpreter with PYTHON" >&2
  exit 2
fi
if [ "$DEVICE" = cuda ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: PyTorch sees no CUDA GPU here; nothing was verified. Dry run: DEVICE=cpu benchmarks/gpu.sh" >&2
  exit 2
fi

if [ "$DEVICE" = cuda ]; then
  setting=(--device cuda --dtype bf16 --hidden 1024 --layers 16 --pairs 128 --pairs-per-step 16 --repeats 3
    --max-batch-tokens 4096 32768)
else
  export OMP_NUM_THREADS=1
  setting=(--device cpu --threads 1 --hidden 64 --layers 1 --pairs 2 --pairs-per-step 2 --repeats 1 --without-trl)
fi
if [ -n "${DATA:-}" ]; then setting+=(--data "$DATA"); else setting+=(--made-up); fi
has trl || setting+=(--without-trl)

failed=0
echo "gpu.sh: 1/2 verification" >&2
"$PYTHON" -m benchmarks.verify_cuda --device "$DEVICE" >"$OUTPUT/verification.txt" || failed=1
echo "gpu.sh: 2/2 speed and memory" >&2
"$PYTHON" -m benchmarks.compare_trl "${setting[@]}" --output "$OUTPUT/results.json" >"$OUTPUT/speed.txt" || failed=1

echo
cat "$OUTPUT/verification.txt" "$OUTPUT/speed.txt"
echo "Logs and results.json: $OUTPUT"
[ "$DEVICE" = cuda ] || echo "Dry run on the CPU at toy size: these are no measurements, and nothing of CUDA was verified."
[ "$failed" = 0 ] && echo "gpu.sh: done" || echo "gpu.sh: FAILED, see above"
exit "$failed"
