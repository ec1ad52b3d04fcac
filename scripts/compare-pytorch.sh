#!/usr/bin/env bash
# Runs this crate and PyTorch's scaled_dot_product_attention on the same inputs, in turn, and prints a table of ratios.
#
#   scripts/compare-pytorch.sh [--threads N] [--quick] [--pairs N] [--only TEXT]
#
# PyTorch is installed from its package into a temporary folder, which is removed at the end (on x86-64 Linux it brings CUDA along:
# 2 GB to download, 5 GB on disk). VENV=folder keeps and reuses an environment instead.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo build --release --example timed_attention >&2

if [ -n "${VENV:-}" ]; then
    environment=$VENV
else
    environment=$(mktemp -d)
    trap 'rm -rf "$environment"' EXIT
fi
if [ ! -x "$environment/bin/python" ]; then
    python3 -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet torch==2.11.0 numpy >&2
fi
"$environment/bin/python" scripts/compare_pytorch.py "$@"
