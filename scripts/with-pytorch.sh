#!/usr/bin/env bash
# Runs a Python program with PyTorch: scripts/with-pytorch.sh PROGRAM [OPTIONS].
#
# PyTorch is installed from its package into a temporary folder, which is removed at the end (on x86-64 Linux it brings CUDA along:
# 2 GB to download, 5 GB on disk). VENV=folder keeps and reuses an environment instead.
set -euo pipefail

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
"$environment/bin/python" "$@"
