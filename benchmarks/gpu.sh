#!/usr/bin/env bash
# Verify and measure simpo on one CUDA GPU in about ten minutes: benchmarks/gpu.sh [SECTION ...]
# Without a GPU, do a dry run at toy size: DEVICE=cpu benchmarks/gpu.sh
# Sections, most important first: verification, 8b, peers, peers-hh, peers-8b, plan, cached, sharing, architectures. All
# of them run by default. One more has to be named: tests, the whole test suite on the GPU.
# Environment: PYTHON (an interpreter with simpo, and with TRL, liger-kernel and bitsandbytes to compare with them),
# OUTPUT (a folder for logs and JSON, by default a new temporary one).
# Each section has a time limit. Results measured by then are kept, and whatever is missing is reported.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
DEVICE=${DEVICE:-cuda}
OUTPUT=${OUTPUT:-$(mktemp -d)}
mkdir -p "$OUTPUT"
rm -f "$OUTPUT/.failed"

has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(any(importlib.util.find_spec(n) is None for n in sys.argv[1:]))" "$@"; }
if ! has torch simpo; then
  echo "gpu.sh: torch or simpo is not installed in '$PYTHON': pip install -e . and set PYTHON to the interpreter" >&2
  exit 2
fi
if [ "$DEVICE" = cuda ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: PyTorch finds no CUDA GPU; nothing was verified. For a dry run: DEVICE=cpu benchmarks/gpu.sh" >&2
  exit 2
fi

parts=()
# part NAME SECONDS MODULE ...: run a module in the background with a time limit and its output in $OUTPUT/NAME.txt
part() {
  local name=$1 limit=$2
  shift 2
  parts+=("$name")
  echo "gpu.sh: $name (at most $limit s)" >&2
  {
    timeout --kill-after=5 "$limit" "$PYTHON" -m "$@" >"$OUTPUT/$name.txt" 2>"$OUTPUT/$name.log" || {
      touch "$OUTPUT/.failed"
      echo "gpu.sh: $name FAILED or ran out of time" | tee -a "$OUTPUT/$name.txt" >&2
    }
  } &
}
# compare NAME SECONDS OPTION ...: run a comparison that stops on its own before the time limit
compare() {
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" benchmarks.compare --device "$DEVICE" --repeats 1 --time-limit $((limit - 10)) \
    --entrant-limit 45 --output "$OUTPUT/$name.json" "$@"
  wait
}

verification() { # nothing is timed here, so all parts can run at the same time
  for check in kernels models compiled large; do
    part "verify-$check" "$1" benchmarks.verify_cuda --device "$DEVICE" --only "$check"
  done
  wait
}
optimizer=adamw_torch_fused # bf16 states for bf16 weights: 64 GB in total for 8B
has torchao && optimizer=adamw_torch_8bit
has bitsandbytes && optimizer=adamw_8bit
small=(--model 1b --dtype bf16 --families simpo trl-dpo-liger dpo trl-cpo liger trl-dpo padded)

if [ "$DEVICE" = cuda ]; then
  export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
  for section in "${@:-verification 8b peers peers-hh peers-8b plan cached sharing architectures}"; do
    for name in $section; do
      case $name in
      verification) verification 150 ;;
      8b) part 8b 130 benchmarks.profile_step --device cuda --model 8b --weights bf16 --dtype bf16 \
        --optimizer "$optimizer" --profile ultrafeedback --pairs-per-step 16 --output "$OUTPUT/8b.json" --variants \
        4096 16384,checkpointed 8192,checkpointed=0.5 4096,compiled 16384,checkpointed,compiled && wait ;;
      peers) compare peers 140 "${small[@]}" --profile ultrafeedback --pairs 64 --pairs-per-step 16 \
        --variants default default,compiled default,liger --micro-batches 16 8 ;;
      peers-hh) compare peers-hh 90 "${small[@]}" --profile hh --pairs 256 --pairs-per-step 64 \
        --variants default default,compiled default,liger --micro-batches 64 32 ;;
      peers-8b) compare peers-8b 110 --model 8b --weights bf16 --dtype bf16 --optimizer "$optimizer" --checkpointing \
        --profile ultrafeedback --pairs 32 --pairs-per-step 16 --families simpo trl-cpo trl-dpo-liger \
        --variants 16384,checkpointed 4096,compiled --micro-batches 4 8 ;;
      plan) part plan 90 benchmarks.plan_accuracy --output "$OUTPUT/plan.json" && wait ;;
      cached)
        for type in qwen3_5_text lfm2; do
          part "cached-$type" 30 benchmarks.cached_path --type "$type" --device cuda --dtype bfloat16 --width 4 \
            --pairs 64 --max-batch-tokens 16384
          wait
        done
        ;;
      tests) # -vv prints each result as it comes, so that the output shows how far it got if time runs out
        part tests 400 pytest -n auto -o addopts= --import-mode=importlib -m "not exhaustive" -vv -rf --tb=short \
          -p no:benchmark -p no:cacheprovider && wait ;;
      sharing)
        compare sharing-hh 25 --model 1b --dtype bf16 --profile hh --pairs 128 --pairs-per-step 64 --families sharing
        compare sharing-documents 25 --model 1b --dtype bf16 --profile documents --responses 4 --pairs 8 \
          --pairs-per-step 4 --families sharing
        ;;
      architectures) part architectures 40 benchmarks.architectures --device cuda && wait ;;
      *) echo "gpu.sh: unknown section: $name" >&2 && exit 2 ;;
      esac
    done
  done
else
  export OMP_NUM_THREADS=1
  toy=(--threads 1 --model toy --pairs-per-step 2)
  part verify 600 benchmarks.verify_cuda --device cpu && wait
  part 8b 600 benchmarks.profile_step "${toy[@]}" --output "$OUTPUT/8b.json" --variants 512,checkpointed=0.5 default
  wait
  compare peers 600 "${toy[@]}" --pairs 2 --scale 0.1 --profile documents --families sharing --only "loop alone"
fi

for name in "${parts[@]}"; do
  printf '\n== %s ==\n' "$name"
  cat "$OUTPUT/$name.txt"
  grep -sE "^[^ ].*: (.*Error|stopped|no time)" "$OUTPUT/$name.log" | tail -3
done
echo "Tables and JSON: $OUTPUT"
[ "$DEVICE" = cuda ] || echo "Dry run on the CPU at toy size: the numbers mean nothing, and nothing was verified on CUDA."
if [ -e "$OUTPUT/.failed" ]; then
  echo "gpu.sh: some parts FAILED, see above"
  exit 1
fi
echo "gpu.sh: done"
