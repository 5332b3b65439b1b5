#!/bin/sh
# compute-sanitizer over the GPU tests of the ops: out-of-bounds and misaligned accesses, then races in shared memory.
#
#   bench/gpu/sanitize.sh                  tests that have "triton" or "cuda" in their name
#   bench/gpu/sanitize.sh -k moments       others, chosen as in pytest
#
# A sanitized kernel takes 10 to 100 times as long, so choose few tests. Exit code: 1 if either tool found something.

cd "$(dirname "$0")/../.." || exit 1
python=${PYTHON:-python3}
if ! command -v compute-sanitizer > /dev/null; then
    echo "sanitize.sh: expected compute-sanitizer, a part of the CUDA toolkit, on PATH; found none" >&2
    exit 1
fi
[ $# -gt 0 ] || set -- -k "triton or cuda"

# Without this, torch's allocator hands out parts of large blocks, and an access beyond one part hits the next unseen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
status=0
for tool in memcheck racecheck; do
    echo "=== $tool"
    compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 1 \
        "$python" -m pytest tests/ops -m gpu -q -x -p no:cacheprovider -o filterwarnings=default "$@" || status=1
done
exit $status
