#!/usr/bin/env bash
# What is too long for every commit, and must hold before a release.
#
#   scripts/release-check.sh [PART...]     all parts by default:
#     cases      random properties: 512 cases of those on the CPU (CASES), 256 of those of the kernels (KERNEL_CASES)
#     targets    the library compiles for other systems
#     aarch64    the CPU's tests on an emulated ARM CPU
#     counts     the instructions of NEON's inner loops, as a table
#
# Debian's packages and rustup's targets are installed as needed. A table of the parts ends the output. A target that rustup cannot install is named in it, and
# fails nothing. On two cores that other builds shared, targets took 3 minutes, aarch64 50 and counts 12; alone they take less. Cases take up to
# twice as long as the same tests in .ci/run.
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_INCREMENTAL=0

targets=(aarch64-unknown-linux-gnu aarch64-apple-darwin x86_64-pc-windows-msvc x86_64-pc-windows-gnu)

# The packages of Debian for a program that is missing.
need() {
    local program=$1
    shift
    command -v "$program" >/dev/null && return
    local sudo=()
    [ "$(id -u)" = 0 ] || sudo=(sudo)
    "${sudo[@]}" apt-get update -qq
    DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# Whether there is a target of rustc, after an attempt to install it.
has_target() {
    [ -d "$(rustc --print target-libdir --target "$1")" ] || timeout 600 rustup target add "$1"
}

part_cases() {
    PROPTEST_CASES=${CASES:-512} cargo test --test flash
    PROPTEST_CASES=${KERNEL_CASES:-256} cargo test --test kernels
}

part_targets() {
    local target
    for target in "${targets[@]}"; do
        if has_target "$target"; then
            cargo check --lib --target "$target"
        else
            echo "$target" >>"$missing"
        fi
    done
}

part_aarch64() {
    has_target aarch64-unknown-linux-gnu
    need aarch64-linux-gnu-g++ g++-aarch64-linux-gnu libc6-dev-arm64-cross
    need qemu-aarch64 qemu-user
    # The first ARMv8, without any extension.
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -cpu cortex-a72 -L /usr/aarch64-linux-gnu"
    PROPTEST_CASES=4 PROPTEST_DISABLE_FAILURE_PERSISTENCE=1 cargo test --target aarch64-unknown-linux-gnu \
        --config profile.test.package.star-attention.opt-level=1 --lib --test flash
}

part_counts() {
    has_target aarch64-unknown-linux-gnu
    need aarch64-linux-gnu-objdump binutils-aarch64-linux-gnu
    need llvm-mca-19 llvm-19 || echo "release-check.sh: cycles are not estimated without llvm-mca" >&2
    python3 scripts/neon-report.py
}

parts=("$@")
[ $# -gt 0 ] || parts=(cases targets aarch64 counts)
for part in "${parts[@]}"; do
    declare -F "part_$part" >/dev/null || { echo "release-check.sh: no part $part" >&2; exit 2; }
done

missing=$(mktemp)
trap 'rm -f "$missing"' EXIT
table=()
failed=0
for part in "${parts[@]}"; do
    echo "== $part"
    start=$SECONDS
    # In a condition, a command that fails would not end the part.
    set +e
    (
        set -e
        "part_$part"
    )
    status=$?
    set -e
    result=right
    [ $status = 0 ] || { result=failed failed=1; }
    table+=("$(printf '| %-8s | %5d s | %s |' "$part" $((SECONDS - start)) $result)")
done

printf '\n| part     |    time | result |\n|---|---:|---|\n'
printf '%s\n' "${table[@]}"
[ ! -s "$missing" ] || echo "Not checked, since rustup could not install it: $(paste -sd ' ' "$missing")"
exit $failed
