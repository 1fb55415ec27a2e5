#!/usr/bin/env bash
# Where there is a package index: what Isthmus imports and a host with PyTorch and vLLM lacks, in one archive.
#   wheels.sh OUT.tar        then on the host: mkdir site && tar -xf OUT.tar -C site, and SITE=site for run.sh
# For Python 3.12 on x86-64 with glibc 2.34 or newer; the versions of requirements/cuda.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

names='cffi|cryptography|deprecated|limits|lz4|pycparser|structlog|tomli-w|zstandard'
grep -E "^($names)==" requirements/cuda.txt >"$work/wanted.txt"
platforms=()
for glibc in 17 27 28 34; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
"${PYTHON:-python3}" -m pip --disable-pip-version-check install --quiet --no-deps --no-compile --target "$work/site" \
    --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 \
    -r "$work/wanted.txt"
tar -cf "$1" -C "$work/site" .
