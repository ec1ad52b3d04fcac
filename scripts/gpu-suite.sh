#!/usr/bin/env bash
# Packs the tests and benches that need a GPU for a machine that has one, a driver and python3:
#
#   scripts/gpu-suite.sh                          with nvcc: makes target/gpu-suite/ and a .tar.gz of it
#   tar xf gpu-suite.tar.gz                       on the machine with the GPU
#   gpu-suite/run.sh measure                      there; then `run.sh peers` and `run.sh variants`
#
# run.sh says what each call does. Its results.json belongs in benches/results/.
#
#   scripts/gpu-suite.sh --rehearse [OPTIONS]     makes target/gpu-suite-rehearsal/, without nvcc, for
#                                                 `run.sh --rehearse`; the options go to cargo
set -euo pipefail
cd "$(dirname "$0")/.."

most_megabytes=40
# The package's programs use CUDA 13.0, whichever toolkit is installed here.
export CUDARC_CUDA_VERSION=${CUDARC_CUDA_VERSION:-13000}

executables() {
    "$@" --message-format=json |
        sed -n 's/.*"target":{"kind":\["\(test\|bench\|example\)"\].*"name":"\([^"]*\)".*"executable":"\([^"]*\)".*/\2 \3/p'
}

if [ "${1-}" = --rehearse ]; then
    shift
    folder=target/gpu-suite-rehearsal
    place() { ln -f "$1" "$2"; }
    build() {
        executables cargo test --no-run "$@" --test kernels --test cuda --test nccl --bench gpu
        # As `cargo test` builds examples.
        executables cargo build --profile test "$@" --example single_gpu --example multi_gpu_merge
    }
else
    folder=target/gpu-suite
    place() { strip -o "$2" "$1"; }
    build() {
        executables cargo test --no-run --features nccl --test kernels --test cuda --test nccl
        executables cargo bench --no-run --features nccl --bench gpu
        executables cargo build --release --features nccl --example single_gpu --example multi_gpu_merge
    }
fi

rm -rf $folder && mkdir -p $folder
# The bench is `gpu`; the others are called what they are.
build "$@" | while read -r name path; do
    place "$path" "$folder/$name"
done
for name in kernels cuda nccl gpu single_gpu multi_gpu_merge; do
    [ -x $folder/$name ] || { echo "gpu-suite.sh: $name was not built" >&2; exit 1; }
done
cp scripts/gpu-suite/{run.sh,results.py,peers.py,kernel_profile.py} $folder/
git describe --always --dirty > $folder/commit 2>/dev/null || echo unknown > $folder/commit
[ $folder = target/gpu-suite ] || exit 0

tar czf target/gpu-suite.tar.gz -C target gpu-suite
bytes=$(stat -c %s target/gpu-suite.tar.gz)
echo "target/gpu-suite.tar.gz: $((bytes / 1000)) kB, at $(cat $folder/commit)"
if [ "$bytes" -gt $((most_megabytes * 1000000)) ]; then
    echo "gpu-suite.sh: more than $most_megabytes MB" >&2
    exit 1
fi
