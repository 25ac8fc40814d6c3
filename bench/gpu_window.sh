#!/usr/bin/env bash
# Everything worth doing with a few minutes on a GPU machine, the most valuable first:
#
#   OUT=folder PYTHON=python3 bench/gpu_window.sh [ops | models]
#
# ops, the default:
#   1. the library: loaded if it was built elsewhere for this torch (stable ABI), else built here
#   2. every op that has a CUDA kernel against the reference, then the op tests on the GPU: streams, CUDA graphs,
#      another device, opcheck, torch.compile, real sizes, batch invariance
#   3. compute-sanitizer: memcheck, racecheck, synccheck on a few rows of every op
#   4. benchmarks: ceilings of the card, attention, GEMM, transform, splits
#   5. the INT4 products of sm_8x, built for this card as a slow emulation, against the reference, if the folder
#      $S4 holds such a build (FLATQUANT_TEST_S4=1 python setup.py build_ext --inplace in a copy of the tree)
# models, for another window:
#   1. the library, as above; the stack of layers and its CUDA graphs against the same ops one by one
#   2. a whole model of 7B, then of 8B, and a layer of each: steps, memory, prompts, texts, against bfloat16
#   3. the same steps against torch.compile, which takes minutes before its first
#
# Each step has a time limit, all ends within 9 minutes, and a step that fails does not stop the next. $OUT gets at
# most 8 files: log.txt, steps.jsonl and the figures as JSON lines, each flushed as soon as it is known. The exit code
# is the number of failed steps. Needs nothing outside the checkout but python3 with torch and pytest.
set -uo pipefail
what=${1:-ops}
case $what in ops | models) ;; *) echo "gpu_window.sh: $what: it must be ops or models" >&2 && exit 2 ;; esac
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=$(mkdir -p "${OUT:-out/gpu}" && cd "${OUT:-out/gpu}" && pwd)
export OUT PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
S4=${S4:-out/s4}
end=$((SECONDS + ${SECONDS_LIMIT:-525}))
failed=0
: >"$OUT/log.txt"
: >"$OUT/steps.jsonl"

# step NAME LIMIT COMMAND...: run it with what is left of the limit, note the exit code and the time.
step() {
  local name=$1 limit=$2 start=$SECONDS rc=0
  shift 2
  ((limit > end - SECONDS)) && limit=$((end - SECONDS))
  printf '\n=== %s\n' "$name" >>"$OUT/log.txt"
  if ((limit < 5)); then
    rc=124
    echo "no time left" >>"$OUT/log.txt"
  else
    timeout -k 5 "$limit" "$@" >>"$OUT/log.txt" 2>&1 || rc=$?
  fi
  ((rc == 0)) || failed=$((failed + 1))
  printf '{"step": "%s", "rc": %d, "seconds": %d}\n' "$name" "$rc" $((SECONDS - start)) | tee -a "$OUT/steps.jsonl"
  ((rc == 0)) || tail -n 25 "$OUT/log.txt"
  return $rc
}

native() {
  "$PYTHON" -c 'import sys, flatquant_cuda as f; sys.exit(f.backend("kronecker_quantize", "cuda") != "native")' \
    >/dev/null 2>&1
}

native || step build 280 "$PYTHON" setup.py build_ext --inplace
step info 30 "$PYTHON" -m flatquant_cuda --json

if [ "$what" = models ]; then
  step stack 60 "$PYTHON" bench/gpu_cases.py --op decoder_stack
  step graphs 60 "$PYTHON" -m pytest -q tests/flatquant/runtime/test_graphs.py tests/ops/test_decoder_cuda.py -m cuda \
    -p no:cacheprovider --maxfail=10 --tb=line
  for model in 7B 8B; do
    step "$model" 170 "$PYTHON" bench/gpu_models.py decode memory prefill text --model "$model" --seconds-left 155
  done
  step layer 60 "$PYTHON" bench/gpu_models.py layer --model 7B --scheme W4A8KV4 W4A4KV4 --seconds-left 50
  left=$((end - SECONDS - 5))
  step compiled "$left" "$PYTHON" bench/gpu_models.py decode --model 7B --compiled --seconds-left $((left - 10))
  exit $failed
fi

step cases 110 "$PYTHON" bench/gpu_cases.py
step tests 130 "$PYTHON" -m pytest -q tests/ops -k "cuda" -p no:cacheprovider --maxfail=40 --tb=line

sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2>/dev/null)
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck synccheck; do
    step "$tool" 50 "$sanitizer" --tool "$tool" --error-exitcode 9 "$PYTHON" bench/gpu_cases.py --small
  done
else
  echo "compute-sanitizer is not here: memory errors and races were not looked for" | tee -a "$OUT/log.txt"
fi

if [ -d "$S4" ]; then
  (cd "$S4" && PYTHONPATH="$PWD:$PWD/python" step s4 60 "$PYTHON" bench/gpu_cases.py --op gemm_w4a4 gemm_w4a8)
fi
left=$((end - SECONDS - 5))
step bench "$left" "$PYTHON" bench/gpu_ops.py ceilings decode attention gemm transform splits --seconds-left $((left - 10))
exit $failed
