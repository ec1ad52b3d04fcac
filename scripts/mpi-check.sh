#!/usr/bin/env bash
# The examples as processes, on this machine and over network namespaces, against the same as threads of one process: the answers, and every bit of
# the merged outputs, must be the same. Then one machine is cut off, and all ranks must end with an error.
#
#     scripts/mpi-check.sh FOLDER     of examples that were built with the features `candle` and `mpi`
#
# Needs Open MPI; root and iproute2 for the namespaces, which are left out, and named, where they cannot be made.
set -euo pipefail
cd "$(dirname "$0")/.."
examples=${1:?folder of examples}
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

machines=
if [ "$(id -u)" = 0 ] && ip netns add star-try 2>/dev/null; then
    ip netns delete star-try
    machines="2 3"
else
    echo "mpi-check.sh: no network namespaces can be made here (root and iproute2 are needed): left out"
fi

# What must be the same: answers and checksums, but no times.
facts() { grep -oE '^<query>.*|answers right +[0-9/]+|merged outputs, on all ranks +[0-9a-f]+|^[0-9]+ .* [0-9a-f]{16}$|same bits.*|as many sent|within the bound' | sed -E 's/^([0-9]+) .* /\1 /'; }
same() { # expected, command...
    local expected=$1 got
    shift
    if ! got=$("$@" 2>"$log" | facts) || [ "$got" != "$expected" ]; then
        printf 'mpi-check.sh: %s\nexpected:\n%s\ngot:\n%s\n' "$*" "$expected" "$got" >&2
        cat "$log" >&2
        exit 1
    fi
    echo "same: $*"
}
log=$(mktemp)
trap 'rm -f "$log"' EXIT

check() { # ranks, example, arguments of both, arguments for threads
    local ranks=$1 program=$examples/$2 arguments=$3
    local expected
    # shellcheck disable=SC2086 # several arguments
    expected=$("$program" $arguments $4 | facts)
    [ -n "$expected" ]
    # shellcheck disable=SC2086
    same "$expected" mpirun --oversubscribe -n "$ranks" "$program" --engine mpi $arguments
    for count in $machines; do
        # shellcheck disable=SC2086
        same "$expected" scripts/mpi-namespaces.sh "$count" "$ranks" "$program" --engine mpi $arguments
    done
}
for scheme in "" "--anchor received --generated round-robin"; do
    check 4 star_attention "--context-len 2048 --mode star $scheme" "--ranks 4"
done
check 4 multi_gpu_merge "--shards 500,31,0 --layers 2 --way all-gather" "--ranks 4"
check 4 multi_gpu_merge "--shards 200 --query-len 33 --layers 2 --way by-rows" "--ranks 4"

if [ -n "$machines" ]; then
    # The first rank to end with an error must not take the others with it.
    OMPI_MCA_orte_abort_on_non_zero_status=0 CUT=3 timeout 60 scripts/mpi-namespaces.sh 2 4 \
        "$examples/star_attention" --engine mpi --mode star --context-len 2048 --queries 60000 --timeout 3 >"$log" 2>&1 </dev/null || true
    errors=$( (grep -oE 'collective: rank [0-3] (did not arrive within 3 s|left the group)' "$log" || true) | wc -l)
    if [ "$errors" != 4 ]; then
        echo "mpi-check.sh: a machine was cut off, and $errors of 4 ranks ended with an error:" >&2
        cat "$log" >&2
        exit 1
    fi
    echo "a machine was cut off: 4 of 4 ranks ended with an error"
fi
