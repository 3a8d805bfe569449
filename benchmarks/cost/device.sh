#!/bin/sh
# The figures of docs/device.md: a table on the screen and a JSON, `device.json` or the first argument, in at most
# LIMIT_SECONDS (240) on one H100. Compiled kernels, which may spoil what a process holds on the GPU, have their own.
set -u
cd "$(dirname "$0")/../.."
out=${1:-device.json} limit=${LIMIT_SECONDS:-240} python=${PYTHON:-python3}
begun=$(date +%s)
left() { echo $((limit - $(date +%s) + begun)); }
part() { # seconds, then the parts: ended where a compiler hangs; what was measured is in the JSON
    seconds=$1 && shift
    timeout -k 5 $((seconds + 20)) "$python" -m benchmarks.cost.device --parts "$@" --limit-seconds "$seconds" \
        --out "$out" >/dev/null || echo "$*: ended with $?" >&2
}
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
rm -f "$out"
trap '"$python" -m benchmarks.cost.device --show "$out"' EXIT
trap 'exit 1' INT TERM
part $((limit * 55 / 100)) selection llava
part $(($(left) - 10)) attention flex
