#!/usr/bin/env bash
# Check and time KV export on this machine's GPU; needs no network. See README.md beside this file.
#   run.sh --json FILE --hf-dir DIR --gguf FILE       everything
#   run.sh --json FILE --part equal --part churn      what needs torch alone
#   run.sh --device cpu ...                           the same without a GPU
# PYTHON names the interpreter (python3); SITE a folder with the packages that it lacks (wheels.sh).
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# The nodes of `serve` are processes of their own and find all of this in the environment.
export PYTHONPATH="$repository${SITE:+:$SITE}${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m measurements.gpu "$@"
