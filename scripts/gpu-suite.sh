#!/usr/bin/env bash
# Packs the tests and benches that need a GPU for a machine that has one, and a driver, and nothing else:
#
#   scripts/gpu-suite.sh                  here, with nvcc: makes target/gpu-suite.tar.gz
#   tar xf gpu-suite.tar.gz && gpu-suite/run.sh     there: tests, sanitizer where it is installed, benches, PyTorch beside them where it is
#
# run.sh prints a table and writes results.json, which belongs in benches/results/ under the chip's name.
set -euo pipefail
cd "$(dirname "$0")/.."

most_megabytes=40
folder=target/gpu-suite
rm -rf $folder && mkdir -p $folder

executables() {
    "$@" --message-format=json | sed -n 's/.*"target":{"kind":\["\(test\|bench\|example\)"\].*"name":"\([^"]*\)".*"executable":"\([^"]*\)".*/\2 \3/p'
}
{
    executables cargo test --no-run --features nccl --test kernels --test cuda --test nccl
    executables cargo bench --no-run --features nccl --bench gpu
    executables cargo build --release --features nccl --example single_gpu --example multi_gpu_merge
} | while read -r name path; do
    # The bench is `gpu`; the others are called what they are.
    strip -o "$folder/$name" "$path"
done
for name in kernels cuda nccl gpu single_gpu multi_gpu_merge; do
    [ -x $folder/$name ] || { echo "gpu-suite.sh: $name was not built" >&2; exit 1; }
done
cp scripts/gpu-suite/run.sh scripts/gpu-suite/torch_beside.py $folder/
git describe --always --dirty > $folder/commit 2>/dev/null || echo unknown > $folder/commit
tar czf target/gpu-suite.tar.gz -C target gpu-suite

bytes=$(stat -c %s target/gpu-suite.tar.gz)
echo "target/gpu-suite.tar.gz: $((bytes / 1000)) kB, at $(cat $folder/commit)"
if [ "$bytes" -gt $((most_megabytes * 1000000)) ]; then
    echo "gpu-suite.sh: more than $most_megabytes MB" >&2
    exit 1
fi
