#!/usr/bin/env bash
# Runs this crate and PyTorch's scaled_dot_product_attention on the same inputs, in turn, and prints the machine's peaks and a table of ratios.
#
#   scripts/compare-pytorch.sh [--threads N] [--quick] [--pairs N] [--only TEXT]
#
# VENV=folder keeps and reuses PyTorch (scripts/with-pytorch.sh).
set -euo pipefail
cd "$(dirname "$0")/.."

cargo build --release --example timed_attention >&2
scripts/with-pytorch.sh scripts/compare_pytorch.py "$@"
