#!/usr/bin/env bash
# Everything that needs a GPU, in under 9 minutes: tests marked gpu, every operator, parity, full-size latency in bf16, int8
# and without our kernels, and peak memory.
#   OUT=/tmp/results bash bench/gpu_check.sh        PYTHON=/path/to/python OUT=... bash bench/gpu_check.sh
# Installs nothing: the checkout is imported as it lies there. Every part has its own time limit and a failing one does
# not stop the others. Writes a log a part and one <card>-<date>.json into OUT (default bench/results).
# PARTS="ops int8" runs these alone, each with three times the time: kernels that were never compiled on the machine may
# need it. DRY_RUN=1 runs every part on the CPU with the tiny model, which checks this script and nothing else.
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
model=(--model unipic --res 1024 --iters 32 --dtype bf16)
if [[ -n ${DRY_RUN:-} ]]; then
  device=cpu
  export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
  model=(--model tests/data/unipic-tiny --res 64 --iters 2 --dtype fp32)
fi
latency=("$PYTHON" bench/latency.py --random-weights --device "$device" "${model[@]}")

failed=0
# part NAME SECONDS COMMAND...: runs a command under a time limit, its output in OUT/NAME.log
part() {
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  if [[ -n ${PARTS:-} ]]; then
    [[ " $PARTS " == *" $name "* ]] || return 0
    limit=$((3 * limit))
  fi
  timeout -k 10 "$limit" "$@" >"$OUT/$name.log" 2>&1 || status=$?
  printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - start))" >>"$work/parts.tsv"
  echo "$name: exit $status after $((SECONDS - start)) s"
  ((status == 0)) || failed=1
}

part environment 20 "$PYTHON" -c 'import sys; from unipic_run.cli import main; sys.exit(main())' doctor --json
if command -v nvidia-smi >/dev/null; then part nvidia-smi 10 nvidia-smi -q; fi
part gpu-tests 70 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests
part ops 90 "$PYTHON" bench/ops.py
part parity 40 "$PYTHON" bench/parity.py tests/data/goldens/unipic1 --checkpoint tests/data/unipic-tiny --device "$device"
part latency 75 "${latency[@]}" --vram-cap 15
part bf16 55 "${latency[@]}" --tasks gen --repeat 2 --plan
part int8 85 "${latency[@]}" --tasks gen --repeat 2 --plan --quant int8 --attn int8-qk
part torch-only 45 env UNIPIC_RUN_TRITON=0 "${latency[@]}" --tasks gen --repeat 2
part batch-of-4 40 "${latency[@]}" --tasks gen --batch 4

"$PYTHON" bench/gpu_summary.py "$work/parts.tsv" "$OUT" || failed=1
exit "$failed"
