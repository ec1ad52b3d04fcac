#!/usr/bin/env bash
# All tests on the first GPU of this machine, compute-sanitizer over the short ones where it is installed, the benches, and PyTorch's attention on
# the same shapes where python3 has torch. Prints tables and writes results.json beside itself, or into the folder given.
#
#   run.sh [FOLDER]     tests, benches
#   PROPTEST_CASES=N    cases of each property (64)
#   ONLY=tests|benches  one part alone
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here}
mkdir -p "$out"
export PROPTEST_CASES=${PROPTEST_CASES:-64} PROPTEST_FAILURE_PERSISTENCE=off
failed=()

step() {
    local name=$1
    shift
    echo "== $name"
    local start=$SECONDS
    if "$@"; then
        echo "== $name: good ($((SECONDS - start)) s)"
    else
        echo "== $name: FAILED ($((SECONDS - start)) s)"
        failed+=("$name")
    fi
}

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv,noheader 2>/dev/null | head -1
echo "at $(cat "$here/commit")"

if [ "${ONLY:-tests}" = tests ]; then
    step "tests of the driver" "$here/cuda" --include-ignored
    step "kernels against the oracle" "$here/kernels" --ignored
    step "both phases, checked" "$here/single_gpu" --context-len 16384 --repeats 3

    # NCCL as PyTorch brings it, under the name that it is looked for.
    nccl=$(python3 -c 'import nvidia.nccl; print(list(nvidia.nccl.__path__)[0])' 2>/dev/null)/lib/libnccl.so.2
    if [ -e "$nccl" ]; then
        mkdir -p "$out/lib" && ln -sf "$nccl" "$out/lib/libnccl.so"
        export LD_LIBRARY_PATH=$out/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    fi
    if "$here/nccl" nccl_is_there >/dev/null && "$here/multi_gpu_merge" --engine nccl --device cuda --layers 1 2>&1 | grep -q 'NCCL is not available'; then
        echo "== NCCL: not installed"
    else
        step "NCCL" "$here/nccl" --include-ignored --test-threads 1
        step "merge over NCCL" "$here/multi_gpu_merge" --engine nccl --device cuda --query-len 16
    fi
    step "merge over threads, on the GPU" "$here/multi_gpu_merge" --device cuda --ranks 4 --shards 16384,1000,0 --query-len 3

    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer /opt/cuda/bin/compute-sanitizer 2>/dev/null | head -1)
    if [ -n "$sanitizer" ]; then
        for tool in memcheck racecheck initcheck; do
            PROPTEST_CASES=4 step "$tool" timeout 240 "$sanitizer" --tool $tool --error-exitcode 9 --launch-timeout 60 \
                "$here/kernels" --ignored --test-threads 1 edges::gpu::every_kernel edges::gpu::extents edges::gpu::few_rows append::gpu merge::gpu paged::gpu
        done
    else
        echo "== compute-sanitizer: not installed"
    fi
fi

if [ "${ONLY:-benches}" = benches ]; then
    step "benches" "$here/gpu" --bench --commit "$(cat "$here/commit")" --json "$out/results.json"
    if python3 -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
        step "PyTorch beside them" python3 "$here/torch_beside.py" "$out/results.json"
    else
        echo "== PyTorch: python3 has none that sees the GPU"
    fi
fi

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "all good"
