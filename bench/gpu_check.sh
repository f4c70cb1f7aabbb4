#!/usr/bin/env bash
# Everything that needs a GPU, in under 9 minutes: parity, tests marked gpu, full-size latency of both families in bf16 and
# int8, at the cheaper speeds, and of UniPic without our kernels, every operator, time by class of operation beside its
# roof, and peak memory.
#   OUT=/tmp/results bash bench/gpu_check.sh        PYTHON=/path/to/python OUT=... bash bench/gpu_check.sh
# Installs nothing: the checkout is imported as it lies there. Kernels that were never compiled on the machine are compiled
# first, on all cores. The most important parts come next; each has its own time limit, gets no more than what is left of
# the whole (SECONDS_IN_ALL, default 505), tells what it knows when its time is up, and does not stop the others by
# failing. Writes a log a part and one <card>-<date>.json into OUT (default bench/results).
# PARTS="ops int8" runs these alone, each with three times the time. DRY_RUN=1 runs every part on the CPU with tiny
# models, which checks this script and nothing else.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
OUT=${OUT:-$root/bench/results}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd -P)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
ln -s "$root" "$work/unipic_run" # the root is the package
export PYTHONPATH="$work${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
export UNIPIC_RUN_CACHE="$work/cache" HF_HUB_OFFLINE=1
cd "$root"

device=cuda
unipic=(--model unipic --res 1024 --dtype bf16)
deepgen=(--random-weights --model deepgen --res 1024 --dtype bf16)
steps=(--iters 50) # of DeepGen, as released
rounds=(--iters 32)
memory=(--scenarios gen-int8-tight gen-bf16 --repeats 1)
if [[ -n ${DRY_RUN:-} ]]; then
  device=cpu
  export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
  unipic=(--model tests/data/unipic-tiny --res 64 --dtype fp32)
  "$PYTHON" tests/deepgen_release.py "$work/deepgen"
  deepgen=(--model "$work/deepgen" --res 64 --dtype fp32)
  steps=(--iters 2)
  rounds=(--iters 2)
  memory=(--scenarios gen-int8-tight --repeats 1 --device cpu "${unipic[@]}" "${rounds[@]}")
fi
at_speed=("$PYTHON" bench/latency.py --random-weights --device "$device" "${unipic[@]}")
latency=("${at_speed[@]}" "${rounds[@]}")
classes=("$PYTHON" bench/classes.py --random-weights --device "$device" "${unipic[@]}" "${rounds[@]}")
deepgen_at_speed=("$PYTHON" bench/latency.py --device "$device" "${deepgen[@]}" --vram-cap 15)
deepgen_latency=("${deepgen_at_speed[@]}" "${steps[@]}")
deepgen_classes=("$PYTHON" bench/classes.py --device "$device" "${deepgen[@]}" "${steps[@]}")
parity=("$PYTHON" bench/parity.py tests/data/goldens/unipic1 --checkpoint tests/data/unipic-tiny --device "$device")

seconds=${SECONDS_IN_ALL:-505}
failed=0
# part NAME SECONDS COMMAND...: runs a command under a time limit, its output in OUT/NAME.log. SIGNAL ends it when time is
# up (default TERM), and ten seconds later KILL.
part() {
  local name=$1 limit=$2 start=$SECONDS status=0
  local left=$((seconds - start))
  shift 2
  if [[ -n ${PARTS:-} ]]; then
    [[ " $PARTS " == *" $name "* ]] || return 0
    limit=$((3 * limit))
  fi
  ((limit < left)) || limit=$left
  if ((limit > 0)); then
    timeout -s "${SIGNAL:-TERM}" -k 10 "$limit" "$@" >"$OUT/$name.log" 2>&1 || status=$?
  else
    echo "no time was left for it" >"$OUT/$name.log"
    status=124
  fi
  printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - start))" >>"$work/parts.tsv"
  echo "$name: exit $status after $((SECONDS - start)) s"
  ((status == 0)) || failed=1
}

part environment 20 "$PYTHON" -c 'import sys; from unipic_run.cli import main; sys.exit(main())' doctor --json
if command -v nvidia-smi >/dev/null; then part nvidia-smi 10 nvidia-smi -q; fi
part compile 100 "$PYTHON" bench/compile_ahead.py
part parity 60 "${parity[@]}"
# What runs the engine on the card comes first (tests/conftest.py), and a Ctrl-C ends it with its results told.
SIGNAL=INT part gpu-tests 120 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests
part bf16 75 "${latency[@]}" --tasks gen --repeat 2 --plan
part int8 85 "${latency[@]}" --tasks gen --repeat 2 --plan --quant int8 --attn int8-qk
part targets 15 "$PYTHON" bench/targets.py "$OUT/bf16.log" "$OUT/int8.log"
part deepgen-int8 70 "${deepgen_latency[@]}" --tasks gen --repeat 2 --plan --quant int8 --attn int8-qk
part ops 90 "$PYTHON" bench/ops.py --strict
part classes-int8 60 "${classes[@]}" --quant int8 --attn int8-qk
part deepgen-bf16 80 "${deepgen_latency[@]}" --tasks gen --repeat 2 --plan
part deepgen-classes 60 "${deepgen_classes[@]}" --quant int8 --attn int8-qk
part classes 60 "${classes[@]}"
part parity-int8 40 "${parity[@]}" --quant int8 --attn int8-qk
part vram 100 "$PYTHON" bench/vram.py "${memory[@]}"
part latency 75 "${latency[@]}" --vram-cap 15
part torch-only 45 env UNIPIC_RUN_TRITON=0 "${latency[@]}" --tasks gen --warm-up 1 --repeat 1
part int8-balanced 40 "${at_speed[@]}" --tasks gen --repeat 2 --quant int8 --attn int8-qk --speed balanced
part int8-fast 40 "${at_speed[@]}" --tasks gen --repeat 2 --quant int8 --attn int8-qk --speed fast
part deepgen-fast 50 "${deepgen_at_speed[@]}" --tasks gen --repeat 2 --quant int8 --attn int8-qk --speed fast
part batch-of-4 60 "${latency[@]}" --tasks gen --batch 4
part deepgen 80 "${deepgen_latency[@]}" --tasks edit,ask --quant int8 --attn int8-qk

"$PYTHON" bench/gpu_summary.py "$work/parts.tsv" "$OUT" || failed=1
exit "$failed"
