#!/usr/bin/env bash
# Tests, times and profiles the kernels on the first GPU of this machine. Three calls do all of it,
# and each ends by a deadline of its own:
#
#   run.sh measure     tests of driver and kernels, the benches, both phases, NCCL     300 s
#   run.sh peers       FlashAttention-2, cuDNN, FlexAttention, ncu, compute-sanitizer  300 s
#   run.sh variants    variants of the kernels side by side                            120 s
#
#   --out FOLDER       for results.json and what the steps print [results, beside this script]
#   --seconds N        another deadline
#   --rehearse         tiny, on the emulator instead of a GPU: proves this script, measures nothing
#
# Needs python3. Where a step lacks anything else, the step fails. `measure` begins a new results.json
# and keeps an earlier one as results.json.old; the others add to it. Every row is in the file as soon as it is known. A step that
# fails, or runs out of time, is a row with an error, and the next step runs. The exit status tells
# whether any failed.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)

usage() {
    echo "usage: run.sh measure|peers|variants [--out FOLDER] [--seconds N] [--rehearse]" >&2
    exit 2
}

what=${1-}
case $what in
    measure | peers) seconds=300 ;;
    variants) seconds=120 ;;
    *) usage ;;
esac
shift
out=$here/results rehearse=
while [ $# -gt 0 ]; do
    case $1 in
        --rehearse) rehearse=yes && shift ;;
        --out) out=${2:?$(usage)} && shift 2 ;;
        --seconds) seconds=${2:?$(usage)} && shift 2 ;;
        *) usage ;;
    esac
done
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
[ -w "$out" ] || { echo "run.sh: $out cannot be written" >&2 && exit 2; }
command -v python3 >/dev/null || { echo "run.sh: needs python3" >&2 && exit 2; }
results=$out/results.json
# What is kept back for a command that must be killed, and for its row.
deadline=$((SECONDS + seconds - 6))
failed=0

record() {
    python3 "$here/results.py" "$results" "$@"
}

# left LIMIT: the seconds that a step of at most LIMIT has.
left() {
    local left=$((deadline - SECONDS))
    echo $((left < $1 ? left : $1))
}

# inner LIMIT: the same, for a program that is to stop by itself.
inner() {
    local left
    left=$(left "$1")
    echo $((left > 8 ? left - 8 : 0))
}

# log_of LABEL: the file for what a step prints.
log_of() {
    echo "$out/${1//[^A-Za-z0-9]/-}.txt"
}

# faulted LABEL: whether a kernel of a step faulted. The GPU then refuses all later work of that process,
# so that what came after the fault says nothing, and is worth another process.
faulted() {
    grep -Eqs 'CUDA_ERROR_(ILLEGAL|MISALIGNED|LAUNCH_FAILED|INVALID_(PC|ADDRESS_SPACE))' "$(log_of "$1")"
}

# step LIMIT LABEL COMMAND...: runs the command for at most LIMIT seconds. What it prints goes to a
# file of the folder.
step() {
    local label=$2 limit start=$SECONDS status log
    limit=$(left "$1")
    log=$(log_of "$2")
    shift 2
    if [ "$limit" -lt 1 ]; then
        echo "== $label: not run: deadline"
        record error step "$label" "not run: deadline"
        failed=1
        return
    fi
    echo "== $label"
    # To a file and not through a pipe, which a child that outlives its parent would keep open.
    timeout -k 5 "$limit" "$@" >"$log" 2>&1
    status=$?
    tail -n 80 "$log"
    record step "$label" $((SECONDS - start)) "$status" "$log"
    if [ "$status" = 0 ]; then
        echo "== $label: good ($((SECONDS - start)) s)"
    else
        echo "== $label: FAILED, status $status ($((SECONDS - start)) s)"
        failed=1
    fi
}

commit=$(cat "$here/commit")
if [ "$what" = measure ] || [ ! -e "$results" ]; then
    record begin "$commit" ${rehearse:+"a rehearsal on the emulator"} || exit 2
fi

# What differs in a rehearsal.
if [ -n "$rehearse" ]; then
    device=simt cases=1
    kernel_tests=(edges::emulated::every_kernel) sanitized_tests=(edges::emulated::every_kernel)
    phases=(--context-len 128) shards=(16 32) merged=(--shards "32,16,0")
    encode="causal, 1 x 32 x 32, d 128" query="query, 1 x 1 x 256, d 128"
    flex="star a 32 b 32, 1 x 128" merge="merge of 8"
else
    device=cuda cases=16
    kernel_tests=(--ignored)
    sanitized_tests=(--ignored edges::gpu::{every_kernel,extents,few_rows} {append,merge,paged}::gpu)
    phases=(--context-len 16384 --repeats 3) shards=(1024 16384)
    merged=(--ranks 4 --shards "16384,1000,0")
    encode="causal, 1 x 16384 x 16384, d 128" query="query, 1 x 1 x 131072, d 128"
    flex="star a 16384 b 16384, 1 x 65536" merge="merge of 8"
fi
# Where ncu and compute-sanitizer are, if not on the PATH.
export PATH=$PATH:/usr/local/cuda/bin:/opt/cuda/bin
bench=("$here/gpu" --bench --device "$device")
export PROPTEST_CASES=$cases PROPTEST_DISABLE_FAILURE_PERSISTENCE=1

measure() {
    step 40 "tests of the driver" "$here/cuda" --include-ignored
    local kind
    step 100 "kernels against the oracle" "$here/kernels" "${kernel_tests[@]}"
    if faulted "kernels against the oracle"; then
        for kind in edges oracle phases nonfinite batches paged offsets merge append ranks errors; do
            step 10 "kernels against the oracle: $kind" "$here/kernels" --ignored "$kind::"
        done
    fi
    step 40 "matmul rate" python3 "$here/peers.py" "$results" matmul
    step 150 "benches" "${bench[@]}" --json "$results" --seconds "$(inner 150)"
    if faulted "benches"; then
        for kind in "query" "merge" "append" "packed" "full" "star"; do
            step 30 "benches: $kind" \
                "${bench[@]}" --json "$results" --filter "$kind" --seconds "$(inner 30)"
        done
    fi
    step 40 "both phases, checked" "$here/single_gpu" --device "$device" "${phases[@]}"
    step 40 "merge over threads" \
        "$here/multi_gpu_merge" --device "$device" --query-len 3 "${merged[@]}"

    # NCCL as PyTorch brings it, under the name that it is looked for.
    local nccl
    nccl=$(timeout 20 python3 -c 'import nvidia.nccl; print(list(nvidia.nccl.__path__)[0])' 2>/dev/null)
    nccl=$nccl/lib/libnccl.so.2
    if [ -e "$nccl" ]; then
        mkdir -p "$out/lib" && ln -sf "$nccl" "$out/lib/libnccl.so"
        export LD_LIBRARY_PATH=$out/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    fi
    step 40 "NCCL" "$here/nccl" --include-ignored --test-threads 1
    for keys in "${shards[@]}"; do
        step 40 "merge over NCCL, $keys keys" \
            "$here/multi_gpu_merge" --engine nccl --device "$device" --query-len 16 --shards "$keys"
    done
}

peers() {
    local cases=$out/cases.jsonl
    "${bench[@]}" --list >"$cases"
    step 110 "FlashAttention-2 and cuDNN" \
        python3 "$here/peers.py" "$results" sdpa --cases "$cases" --seconds "$(inner 110)"
    step 70 "FlexAttention" python3 "$here/peers.py" "$results" flex --cases "$cases" --label "$flex"
    profile encode_bf16_d128 "$encode"
    profile query_bf16_d128 "$query"
    profile merge_f32_f32 "$merge"
    export PROPTEST_CASES=4
    step 90 "memcheck" \
        compute-sanitizer --tool memcheck --error-exitcode 9 --launch-timeout 60 \
        "$here/kernels" --test-threads 1 "${sanitized_tests[@]}"
    # nvcc leaves out one __syncwarp of each step, where it has proven that the warp has converged.
    echo "== racecheck: a hazard within one warp may be a false alarm, one between warps is none"
    step 200 "racecheck (hazards within one warp may be false alarms)" \
        compute-sanitizer --tool racecheck --error-exitcode 9 --launch-timeout 60 \
        "$here/kernels" --test-threads 1 "${sanitized_tests[@]}"
}

# profile KERNEL LABEL: one launch of a kernel under ncu, in the bench's row of this label.
profile() {
    step 40 "ncu $1" \
        python3 "$here/kernel_profile.py" "$results" "$1" "${bench[@]}" --once --filter "$2"
}

variants() {
    step 110 "variants" "${bench[@]}" --variants --json "$results" --seconds "$(inner 110)"
}

echo "at $commit, into $results"
case $what in
    measure) measure ;;
    peers) peers ;;
    variants) variants ;;
esac
if [ $failed = 0 ]; then echo "all good"; else echo "some failed: see the rows of $results with an error"; fi
exit $failed
