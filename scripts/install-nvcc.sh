#!/usr/bin/env bash
# Puts nvcc 13.0, without the rest of a CUDA toolkit, into .nvcc/ of this repository, where the build finds it. Nothing outside is changed.
# Takes 100 MB of downloads and 300 MB of disk. `scripts/install-nvcc.sh --tools` adds cuobjdump and nvdisasm, which read machine code.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v python3 >/dev/null || ! python3 -m pip --version >/dev/null 2>&1; then
    echo "install-nvcc.sh: needs python3 with pip" >&2
    exit 1
fi
if [ ! -x .nvcc/bin/nvcc ]; then
    rm -rf .nvcc .nvcc-packages
    packages=()
    for package in nvcc crt runtime cccl; do packages+=("nvidia-cuda-$package==13.0.*"); done
    python3 -m pip install --quiet --no-deps --disable-pip-version-check --root-user-action=ignore \
        --target .nvcc-packages "${packages[@]}" "nvidia-nvvm==13.0.*"
    mv .nvcc-packages/nvidia/cu13 .nvcc
    rm -rf .nvcc-packages
fi
if [ "${1-}" = --tools ] && [ ! -x .nvcc/bin/cuobjdump ]; then
    rm -rf .nvcc-packages
    python3 -m pip install --quiet --no-deps --disable-pip-version-check --root-user-action=ignore \
        --target .nvcc-packages "nvidia-cuda-cuobjdump==13.*" "nvidia-cuda-nvdisasm==13.*"
    cp .nvcc-packages/nvidia/cu13/bin/* .nvcc/bin/
    rm -rf .nvcc-packages
fi
.nvcc/bin/nvcc --version | tail -2
