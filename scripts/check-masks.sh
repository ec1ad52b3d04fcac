#!/usr/bin/env bash
# Compares examples/attend with PyTorch under random masks, windows, block lists, sinks, value dims and fp8 keys, and prints a table.
#
#   scripts/check-masks.sh [--cases N] [--seed N] [--backends cpu,simt]
#
# VENV=folder keeps and reuses PyTorch (scripts/with-pytorch.sh).
set -euo pipefail
cd "$(dirname "$0")/.."

cargo build --release --example attend >&2
scripts/with-pytorch.sh scripts/check_masks.py "$@"
