#!/usr/bin/env bash
# Everything worth doing with a few minutes on a GPU machine, the most important first:
#
#   OUT=folder PYTHON=python3 bench/gpu_window.sh
#
# builds the library unless it loads with its CUDA kernels, compares every op that has a CUDA kernel with the
# reference, times them, runs the op tests on the GPU, and looks for memory errors with compute-sanitizer. Each step
# has a time limit and a log in $OUT, JSON lines of figures go there too, and all ends within 9 minutes. A step that
# fails does not stop the next; the exit code is the number of failed steps.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=$(mkdir -p "${OUT:-out/gpu}" && cd "${OUT:-out/gpu}" && pwd)
export OUT PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
end=$((SECONDS + 520))
failed=0

# step NAME LIMIT COMMAND...: run it with what is left of the limit, note the exit code and the time.
step() {
  local name=$1 limit=$2 start=$SECONDS rc=0
  shift 2
  ((limit > end - SECONDS)) && limit=$((end - SECONDS))
  if ((limit < 5)); then
    rc=124
    echo "no time left" >"$OUT/$name.log"
  else
    timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1 || rc=$?
  fi
  ((rc == 0)) || failed=$((failed + 1))
  printf '{"step": "%s", "rc": %d, "seconds": %d}\n' "$name" "$rc" $((SECONDS - start)) | tee -a "$OUT/steps.jsonl"
  ((rc == 0)) || tail -n 15 "$OUT/$name.log"
  return $rc
}

native() {
  "$PYTHON" -c 'import sys, flatquant_cuda as f; sys.exit(f.backend("quantize_activation", "cuda") != "native")' \
    >/dev/null 2>&1
}

: >"$OUT/steps.jsonl"
native || step build 300 "$PYTHON" setup.py build_ext --inplace
step info 30 "$PYTHON" -m flatquant_cuda --json
step ops 150 "$PYTHON" bench/gpu_ops.py
step tests 200 "$PYTHON" -m pytest -q tests/ops -k cuda -p no:cacheprovider
sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2>/dev/null)
if [ -n "$sanitizer" ]; then
  step memcheck 100 "$sanitizer" --tool memcheck --error-exitcode 9 "$PYTHON" -c '
import sys
sys.path.insert(0, "bench")
from gpu_ops import quantize_mismatches
sys.exit(bool(list(quantize_mismatches())))'
else
  echo "compute-sanitizer is not here: memory errors were not looked for"
fi
exit $failed
