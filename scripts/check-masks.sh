#!/usr/bin/env bash
# Compares examples/attend with PyTorch under random masks, windows, block lists and sinks, and prints a table.
#
#   scripts/check-masks.sh [--cases N] [--seed N] [--backends cpu,simt]
#
# PyTorch is installed from its package into a temporary folder, which is removed at the end (on x86-64 Linux it brings CUDA along:
# 2 GB to download, 5 GB on disk). VENV=folder keeps and reuses an environment instead.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo build --release --example attend >&2

if [ -n "${VENV:-}" ]; then
    environment=$VENV
else
    environment=$(mktemp -d)
    trap 'rm -rf "$environment"' EXIT
fi
if [ ! -x "$environment/bin/python" ]; then
    python3 -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet torch==2.11.0 numpy safetensors >&2
fi
"$environment/bin/python" scripts/check_masks.py "$@"
