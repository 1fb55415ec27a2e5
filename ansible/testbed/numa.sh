#!/usr/bin/env bash
# Converges cpu_decode in a guest with two NUMA nodes, and shows that each worker's threads and pages lie on its node.
#   numa.sh [--results DIR]   exits 77 with a reason where this machine cannot; leaves nothing behind, however it ends
set -euo pipefail
cd "$(dirname "$0")"

root=$(git rev-parse --show-toplevel)
cache=${ISTHMUS_TESTBED_CACHE:-$HOME/.cache/isthmus/testbed}
results=$PWD/results
[[ ${1:-} != --results ]] || results=$2
export ISTHMUS_TESTBED_CACHE=$cache
./numa_guest.sh check
# There is one namespace for the guest.
exec 9<numa.sh
flock -n 9 || { echo "SKIP: another run of it is under way" && exit 77; }
mkdir -p "$results"
log=$results/numa.log
lab=$(mktemp -d /var/tmp/isthmus-numa.XXXXXX)
work=$(mktemp -d -t isthmus-numa.XXXXXX)
source=$work/source
wheels=$cache/wheelhouse-haswell
export ISTHMUS_NUMA_DIR=$lab
export ANSIBLE_CONFIG=$source/ansible/ansible.cfg ANSIBLE_HOME=$work/ansible ANSIBLE_NOCOLOR=1 ANSIBLE_GATHERING=smart ANSIBLE_TIMEOUT=60
export ANSIBLE_SSH_ARGS="-F $lab/ssh_config -o ControlMaster=auto -o ControlPersist=300s"
proxy='' job=''

finish() {
    local rc=$?
    trap - EXIT
    trap '' INT TERM
    [[ -z $job ]] || kill -- -"$job" 2>/dev/null || true
    [[ -z $proxy ]] || kill "$proxy" 2>/dev/null || true
    ./numa_guest.sh down || true
    rm -rf "$work"
    exit $rc
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Paths of this machine are nobody else's business.
say() { printf '%s\n' "$*" | sed "s#$work#WORK#g; s#$lab#LAB#g; s#$root#CHECKOUT#g; s#$HOME#~#g" | tee -a "$log"; }

step() { # step NAME COMMAND...: how long it took, or the end of what it printed
    local name=$1 began=$SECONDS
    shift
    # In the background, where `set -e` holds and a signal is heard at once; as a group, to be ended as one.
    set -m
    "$@" >"$work/out" 2>&1 </dev/null 9<&- &
    job=$!
    set +m
    if wait $job; then
        job=
        say "$(printf '%-66s %4d s' "$name" $((SECONDS - began)))"
    else
        say "$(printf '%-66s FAILED' "$name")"
        say "$(grep -vE '^(ok|skipping|included):' "$work/out" | tail -n 60)"
        exit 1
    fi
}

controller() { ./numa_guest.sh ctl env PYTHONPATH="$source" PIP_NO_INDEX=1 PIP_FIND_LINKS="$wheels" "$@"; }

play() { # play PLAYBOOK OPTION...: on the guest alone
    controller "$root/.venv-ansible/bin/ansible-playbook" -i "$source/ansible/testbed/numa_inventory" -e "@$work/vars.json" \
        --limit numa1 "${@:2}" "$source/ansible/$1"
}

timed() { play "$@" 2>&1 | python3 role_times.py "$work/times"; }

unchanged() { # a converged host has nothing left to change
    play "$@" && ! grep -qE 'changed=[1-9]' "$work/out"
}

wheelhouse() { # every wheel of a decode node, once, and llama.cpp for processors since Haswell: AVX2, FMA, F16C, BMI2
    local stamp pip llama
    stamp=$wheels/$(cat "$source/requirements/cpu.txt" "$source/pyproject.toml" | sha256sum | cut -c1-16).complete
    [[ -e $stamp ]] && return
    mkdir -p "$wheels"
    pip=("$root/.venv/bin/pip" --disable-pip-version-check wheel --quiet --wheel-dir "$wheels" --find-links "$wheels")
    llama=$(grep -o '^llama-cpp-python==[^ ;]*' "$source/requirements/cpu.txt")
    if ! compgen -G "$wheels/llama_cpp_python-${llama##*=}-*.whl" >/dev/null; then
        # No cache: it does not tell wheels apart by the options of their compiler.
        CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" "${pip[@]}" --no-cache-dir --no-deps --no-binary llama-cpp-python "$llama"
    fi
    # The guest's Python may be an older 3.11 than ours, which then needs a package more.
    "${pip[@]}" --constraint "$source/requirements/cpu.txt" "$source[decode,measure]" hatchling \
        $(sed -nE "s/ ; python_full_version < '3\.11\.[0-9]+'$//p" "$source/requirements/cpu.txt")
    # The role brings its own.
    rm "$wheels"/isthmus-*.whl
    touch "$stamp"
}

snapshot() { # what is committed, so that a file that changes meanwhile changes nothing here
    mkdir "$source"
    git -C "$root" archive HEAD | tar -x -C "$source"
    PYTHONPATH=$source "$root/.venv/bin/python" - "$work" "$root" <<'VARS'
import json, sys
from pathlib import Path
from gguf import GGUFReader
from isthmus.pair import default_pair
work, root = sys.argv[1:]
pair = default_pair()
weights_bytes = sum(int(tensor.n_bytes) for tensor in GGUFReader(pair.gguf).tensors)
Path(work, "weights_bytes").write_text(str(weights_bytes))
Path(work, "vars.json").write_text(json.dumps({
    "isthmus_pair_hf_dir": pair.hf_dir,
    "isthmus_pair_gguf": pair.gguf,
    "isthmus_source": f"{work}/source",
    "isthmus_command": f"{root}/.venv/bin/isthmus",
    "isthmus_build_dir": f"{work}/wheels",
    "isthmus_keys_dir": f"{work}/keys",
}))
Path(work, "proxy.toml").write_text(f"""
[pair]
name = "{pair.name}"
hf_dir = "{pair.hf_dir}"
gguf = "{pair.gguf}"
[prefill]
host = "10.78.0.3"
max_model_len = 1024
[decode]
host = "10.78.0.2"
advertise_host = "10.78.0.2"
[proxy]
host = "10.78.0.1"
advertise_host = "10.78.0.1"
[keys]
dir = "{work}/keys"
""")
VARS
}

two_nodes() { # as the guest's kernel sees them
    ./numa_guest.sh ssh numactl --hardware | tee "$work/nodes"
    grep -q '^available: 2 nodes' "$work/nodes"
}

placed() {
    ./numa_guest.sh ssh python3 - "$(<"$work/weights_bytes")" 0 1 <numa_placement.py | tee "$work/placement"
}

doctor() { # what it fails stops; what it warns of is said
    ./numa_guest.sh ssh /opt/isthmus/decode/bin/isthmus doctor --alone --config /etc/isthmus/decode-1.toml
}

answers() { # by each worker, through a proxy on this side; which of them a prompt prefers is a hash of it
    controller "$root/.venv/bin/python" - <<'ASK' | tee "$work/answers"
import time
import httpx
client = httpx.Client(base_url="http://10.78.0.1:8100", headers={"X-Isthmus-Route": "cpu"}, timeout=300)
def up():
    try:
        return list(client.get("/health").json()["workers"].values()).count("up")
    except httpx.TransportError:
        return 0
until = time.monotonic() + 240
while up() < 2:
    assert time.monotonic() < until, "the workers have not announced themselves"
    time.sleep(2)
answered = {}
for asked in range(1, 25):
    prompt = f"{asked}, {asked + 1},"
    body = {"model": "SmolLM2-135M-Instruct", "prompt": prompt, "max_tokens": 4, "temperature": 0, "isthmus": True}
    answer = client.post("/v1/completions", json=body).raise_for_status().json()
    answered.setdefault(answer["isthmus"]["worker"], (prompt, answer["choices"][0]["text"]))
    if len(answered) == 2:
        break
for worker, (prompt, text) in sorted(answered.items()):
    print(f"{worker} goes on after {prompt!r} with {text!r}")
assert len(answered) == 2, "one worker gave all answers"
ASK
}

converge=(--tags keys,network_tuning,firewall,cpu_decode)

: >"$log"
say "two NUMA nodes, $(git -C "$root" rev-parse --short HEAD), $(date -u +%F), accelerator $(./numa_guest.sh accelerator), $(nproc) cores with a load of $(cut -d' ' -f1 /proc/loadavg)"
step "what is committed" snapshot
step "wheels for a host without PyPI (cached)" wheelhouse
step "image of the guest (cached)" ./numa_guest.sh base
step "its disk, opened before it boots" ./numa_guest.sh open "$wheels"
step "what takes processor time, installed there by the role base" play testbed/numa_disk.yml
step "the guest boots and answers" ./numa_guest.sh up
step "its kernel sees two nodes" two_nodes
say "$(<"$work/nodes")"
step "site.yml for cpu_decode" timed site.yml "${converge[@]}"
say "$(<"$work/times")"
step "each worker's threads and pages are on its node" placed
say "$(<"$work/placement")"
step "isthmus doctor" doctor
say "$(<"$work/out")"
(exec ./numa_guest.sh ctl env PYTHONPATH="$source" "$root/.venv/bin/python" -P -m isthmus proxy --config "$work/proxy.toml" >"$work/proxy.log" 2>&1 9<&-) &
proxy=$!
step "each worker answers" answers
say "$(<"$work/answers")"
step "still in place after that" placed
say "$(<"$work/placement")"
step "site.yml again: changed=0" unchanged site.yml "${converge[@]}"
say "all steps passed"
