#!/usr/bin/env bash
# What the feature `mpi` needs on a Debian or Ubuntu: Open MPI, and libclang for the bindings to it.
set -euo pipefail

packages=(libopenmpi-dev openmpi-bin)
# Any libclang will do; LIBCLANG_PATH may name one that there is.
[ -n "${LIBCLANG_PATH:-}" ] || packages+=(libclang-dev)
if command -v mpicc >/dev/null && command -v mpirun >/dev/null && dpkg -s "${packages[@]}" >/dev/null 2>&1; then
    exit 0
fi
sudo=()
[ "$(id -u)" = 0 ] || sudo=(sudo)
"${sudo[@]}" apt-get update -qq
DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
