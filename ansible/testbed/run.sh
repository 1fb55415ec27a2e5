#!/usr/bin/env bash
# The whole life of a cluster on two hosts of this machine, from nothing to nothing. Prints a line for each step.
#   run.sh [--results DIR]   exits 77 with a reason where this machine cannot; leaves nothing behind, however it ends
#   run.sh --keep            leaves the hosts up where a step fails
#   run.sh --from STEP       goes on with hosts that were kept, from the step of that number
set -euo pipefail
cd "$(dirname "$0")"

root=$(git rev-parse --show-toplevel)
cache=${ISTHMUS_TESTBED_CACHE:-$HOME/.cache/isthmus/testbed}
results=$PWD/results keep='' from=1
while [[ $# -gt 0 ]]; do
    case $1 in
    --results) results=$2 && shift 2 ;;
    --keep) keep=yes && shift ;;
    --from) from=$2 keep=yes && shift 2 ;;
    *) sed -n '2,5s/^# //p' run.sh >&2 && exit 2 ;;
    esac
done
export ISTHMUS_TESTBED_DIR=/var/tmp/isthmus-testbed ISTHMUS_TESTBED_CACHE=$cache
lab=$ISTHMUS_TESTBED_DIR work=$ISTHMUS_TESTBED_DIR/work source=$ISTHMUS_TESTBED_DIR/work/source
export ANSIBLE_CONFIG=$source/ansible/ansible.cfg ANSIBLE_HOME=$work/ansible ANSIBLE_SSH_CONTROL_PATH_DIR=$work/cp ANSIBLE_NOCOLOR=1 ANSIBLE_SSH_ARGS="-F $lab/ssh_config -o ControlMaster=auto -o ControlPersist=30s"
log=$results/testbed.log step=0 running=''

finish() {
    local rc=$?
    trap - EXIT
    trap '' INT TERM
    if [[ -n $running ]]; then
        kill -TERM -- "-$running" 2>/dev/null || true
        for _ in $(seq 50); do
            kill -0 -- "-$running" 2>/dev/null || break
            sleep 0.2
        done
        kill -KILL -- "-$running" 2>/dev/null || true
    fi
    if [[ $rc == 1 && -n $keep ]]; then
        echo "The hosts are up: $PWD/hosts.sh ssh HOST COMMAND; go on with --from $step, or end with hosts.sh down."
    else
        ./hosts.sh down || true
    fi
    exit $rc
}

# Paths of this machine are nobody else's business.
say() { printf '%s\n' "$*" | sed "s#$work#WORK#g; s#$root#CHECKOUT#g; s#$HOME#~#g" | tee -a "$log"; }

step() { # step NAME COMMAND...: how long it took, or the end of what it printed
    local name=$1 began=$SECONDS rc=0
    shift
    step=$((step + 1))
    [[ $step -ge $from ]] || return 0
    # In a process group of its own that a signal ends, and not in a condition, where a function would outlive its
    # own failures.
    set -m
    (set -e; "$@") >"$work/out" 2>&1 </dev/null 9<&- &
    running=$!
    set +m
    wait "$running" || rc=$?
    running=''
    if [[ $rc == 0 ]]; then
        say "$(printf '%2d %-66s %4d s' $step "$name" $((SECONDS - began)))"
    else
        say "$(printf '%2d %-66s FAILED' $step "$name")"
        cp "$work/out" "$results/failed.log"
        say "$(grep -vE '^(ok|skipping|included):' "$work/out" | tail -n 60)"
        exit 1
    fi
}

# The controller has no way out, as the hosts have none: what it builds with comes from the wheelhouse, too.
controller() { ./hosts.sh ctl env PYTHONPATH="$source" PIP_NO_INDEX=1 PIP_FIND_LINKS="$cache/wheelhouse" "$@"; }

play() { # play PLAYBOOK OPTION...
    controller "$root/.venv-ansible/bin/ansible-playbook" -i "$source/ansible/testbed/inventory" -e "@$work/vars.json" \
        "${@:2}" "$source/ansible/$1"
}

timed() { play "$@" 2>&1 | python3 role_times.py "$work/times"; }

unchanged() { # unchanged PLAYBOOK...: a converged host has nothing left to change
    play "$@"
    # Quietly: grep does not read the file that it prints to.
    if grep -qE 'changed=[1-9]' "$work/out"; then return 1; fi
}

wheelhouse() { # every locked wheel, once; and what building needs
    local stamp
    stamp=$cache/wheelhouse/$(cat "$source"/requirements/*.txt | sha256sum | cut -c1-16).complete
    [[ -e $stamp ]] && return
    mkdir -p "$cache/wheelhouse"
    local wheel=("$root/.venv/bin/pip" wheel --quiet --wheel-dir "$cache/wheelhouse" --find-links "$cache/wheelhouse")
    "${wheel[@]}" --no-deps -r "$source/requirements/torch-cpu.txt"
    # The hosts' Python may be an older 3.11 than ours, which then needs a package more.
    sed -E "s/ ; python_full_version < '3\.11\.[0-9]+'$//" "$source/requirements/cpu.txt" >"$work/cpu.txt"
    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" "${wheel[@]}" --no-deps -r "$work/cpu.txt"
    "${wheel[@]}" --no-deps -r "$source/requirements/default-pair.txt"
    "${wheel[@]}" hatchling
    touch "$stamp"
}

snapshot() { # what is committed, so that a file that changes meanwhile changes nothing here
    mkdir "$source" "$work/results"
    git -C "$root" archive HEAD | tar -x -C "$source"
    local key
    key=$(PYTHONPATH=$source "$root/.venv/bin/isthmus" api-key make "$work/api-keys" testbed)
    PYTHONPATH=$source "$root/.venv/bin/python" - "$work" "$root" "$key" >"$work/vars.json" <<'VARS'
import json, sys
from isthmus.pair import default_pair
work, root, key = sys.argv[1:]
pair = default_pair()
print(json.dumps({
    "isthmus_pair_hf_dir": pair.hf_dir,
    "isthmus_pair_gguf": pair.gguf,
    "isthmus_source": f"{work}/source",
    "isthmus_command": f"{root}/.venv/bin/isthmus",
    "isthmus_build_dir": f"{work}/wheels",
    "isthmus_keys_dir": f"{work}/keys",
    "isthmus_api_keys_file": f"{work}/api-keys",
    "isthmus_verify_api_key": key,
    "monitoring_api_key": key,
    "measure_results": f"{work}/results",
}))
VARS
    chmod 600 "$work/vars.json"
}

units=(gpu1:isthmus-prefill.service xeon1:isthmus-decode@0.service xeon1:isthmus-proxy.service xeon1:isthmus-prometheus.service)

first_token() { # from outside, by the route split, with its clock and the ledger's
    local key
    key=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["isthmus_verify_api_key"])' "$work/vars.json")
    printf 'Authorization: Bearer %s\n' "$key" >"$work/header"
    ./hosts.sh ctl curl -sS --fail-with-body -w '\n%{time_starttransfer} s to the first byte, %{time_total} s in all\n' \
        -H "@$work/header" -H 'Content-Type: application/json' -H 'X-Isthmus-Route: split' \
        -d '{"model": "SmolLM2-135M-Instruct", "messages": [{"role": "user", "content": "Name the three primary colours."}], "max_tokens": 16, "temperature": 0, "stream": true}' \
        http://10.77.0.12:8100/v1/chat/completions | tee "$results/first-answer.txt"
    grep -q '^data: \[DONE\]' "$results/first-answer.txt"
}

came_back() { # came_back UNIT-ON-HOST PID: as another process, by itself
    local host=${1%%:*} unit=${1#*:} after=0
    for _ in $(seq 300); do
        after=$(./hosts.sh ssh "$host" systemctl show -P MainPID "$unit" || echo 0)
        [[ $after != 0 && $after != "$2" ]] && ./hosts.sh ssh "$host" systemctl is-active --quiet "$unit" && return
        sleep 2
    done
    echo "$unit on $host is not back" && return 1
}

killed() { # each service is back after a kill -9
    local each before
    for each in "${units[@]}"; do
        before=$(./hosts.sh ssh "${each%%:*}" systemctl show -P MainPID "${each#*:}")
        ./hosts.sh ssh "${each%%:*}" kill -9 "$before"
        came_back "$each" "$before"
    done
}

traces() { # what is left on the hosts; nothing, after reset.yml
    local host
    for host in gpu1 xeon1; do
        ./hosts.sh ssh "$host" '
            getent passwd isthmus; getent group isthmus
            systemctl list-units --all --plain --no-legend --full "isthmus-*"
            systemctl list-unit-files --no-legend "isthmus-*"
            find / -xdev -iname "*isthmus*" -not -path "/proc/*" -not -path "/sys/*" -not -path "/tmp/ansible*"
            nft list tables | grep isthmus
            pgrep -u isthmus -a
            sysctl -n net.ipv4.tcp_rmem net.ipv4.tcp_wmem; cat /sys/class/net/eth10g/mtu
            true'
    done
}

before() { traces >"$work/before"; }

nothing_left() { diff "$work/before" <(traces); }

secrets() { # one a line: CURVE's secret keys and the API key
    sed -n 's/.*secret-key = "\(.*\)"/\1/p' "$work"/keys/*.key_secret
    sed -n 's/.*Bearer //p' "$work/header"
}

secrets_hidden() { # none in a process list, the journal, a unit's environment or a file that others may read
    [[ $(secrets | wc -l) == 4 ]] || { echo "four secrets were to be looked for"; return 1; }
    local host
    for host in gpu1 xeon1; do
        ./hosts.sh ssh "$host" '
            ps axwwe -o args; journalctl --no-pager -o export; systemctl show "isthmus-*"
            find / -xdev -type f -perm /o+r -newer /etc/hostname -not -path "/opt/isthmus/releases/*" -exec cat {} +
            true' >"$work/public" 2>/dev/null
        [[ $(stat -c %s "$work/public") -gt 100000 ]] || { echo "there was nothing to search on $host"; return 1; }
        if grep -aqF -f <(secrets) "$work/public"; then
            echo "a secret lies open on $host:"
            grep -aF -f <(secrets) "$work/public" | cut -c1-200 | sed 's/[0-9A-Za-z+/_.-]\{30,\}/SECRET/g' | head
            return 1
        fi
    done
    if grep -raqF -f <(secrets) "$results"; then
        echo "a secret lies in the results"
        return 1
    fi
}

closed() { # ports of the KV and control planes do not open for a stranger, here the controller
    local port
    for port in 8102 8103 8104 8105; do
        if ./hosts.sh ctl timeout 3 bash -c "</dev/tcp/10.77.0.12/$port" 2>/dev/null; then
            echo "port $port is open"
            return 1
        fi
    done
    ./hosts.sh ctl timeout 3 bash -c '</dev/tcp/10.77.0.12/8100'
}

said() { # said SENTENCE: by what ran in this step, however it was wrapped
    tr -s ' \n' ' ' <"$work/out" >"$work/said"
    grep -qF -- "$1" "$work/said"
}

refused() { # refused SENTENCE OPTION...: site.yml ends with it, having changed nothing
    local sentence=$1
    shift
    if play site.yml "$@"; then
        echo "it was not refused"
        return 1
    fi
    said "$sentence"
}

narrow_path() { # an MTU that a switch on the way does not carry is refused, and put back
    ./hosts.sh path gpu1 1500
    local rc=0
    refused "does not carry packets of 8000 bytes" --tags network_tuning -e network_tuning_mtu=8000 || rc=1
    ./hosts.sh path gpu1 9000
    [[ $rc == 0 && $(./hosts.sh ssh gpu1 cat /sys/class/net/eth10g/mtu) == 9000 ]]
}

release() { # release NAME SED-SCRIPT: the same code with a change in the command
    cp -r "$source" "$work/$1"
    sed -i "$2" "$work/$1/isthmus/cli.py"
    play upgrade.yml -e "isthmus_source=$work/$1"
}

good() { # and from now on it is what the checkout has
    release next '$a # The next release.'
    sed -i "s#\"$source\"#\"$work/next\"#" "$work/vars.json"
}

broken() { # a release whose decode worker cannot start
    if release broken 's/^def main() -> None:/def main() -> None:\n    raise SystemExit(1)/'; then
        echo "a broken release was taken"
        return 1
    fi
    said "did not start on xeon1"
    ./hosts.sh ssh xeon1 systemctl is-active isthmus-decode@0 isthmus-proxy
    ./hosts.sh ssh gpu1 systemctl is-active isthmus-prefill
}

scraped() { # Prometheus has every target and our metrics
    for _ in $(seq 30); do
        if [[ $(asked 'count(up == 1)') == "$(asked 'count(up)')" && $(asked isthmus_decode_up) == 1 ]]; then return; fi
        sleep 2
    done
    ./hosts.sh ssh xeon1 curl -sS "http://127.0.0.1:9095/api/v1/targets?state=active"
    return 1
}

asked() { # asked EXPRESSION: its value
    ./hosts.sh ssh xeon1 curl -sS --get "http://127.0.0.1:9095/api/v1/query" --data-urlencode "'query=$1'" |
        python3 -c 'import json, sys; print(*(each["value"][1] for each in json.load(sys.stdin)["data"]["result"]))'
}

https() { # site.yml goes over to TLS and back; clients and Prometheus follow
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -days 2 -subj /CN=xeon1 \
        -keyout "$work/tls-key.pem" -out "$work/tls-cert.pem" 2>/dev/null
    local tls=(-e "isthmus_tls_cert=$work/tls-cert.pem" -e "isthmus_tls_key=$work/tls-key.pem" -e '{"isthmus_verify_tls": false}')
    play site.yml --tags proxy,monitoring "${tls[@]}"
    play verify.yml "${tls[@]}"
    scraped
    play site.yml --tags proxy,monitoring
}

exposure() { # systemd's score of each service, from 0 (safe) to 10
    local each
    for each in "${units[@]}"; do
        ./hosts.sh ssh "${each%%:*}" systemd-analyze security --no-pager "${each#*:}" | tail -n 1
    done | tee "$results/security.txt"
    [[ $(grep -c 'OK\|SAFE' "$results/security.txt") == "${#units[@]}" ]]
}

measured() {
    play measure.yml
    rm -rf "$results/measure"
    mkdir "$results/measure"
    cp -r "$work"/results/* "$results/measure"
    find "$results/measure" -name '*.json' -o -name '*.html' -o -name '*.md' |
        xargs sed -i "s#$work#WORK#g; s#$root#CHECKOUT#g; s#$HOME#~#g"
}

./hosts.sh check
exec 9<run.sh
flock --nonblock 9 || { echo "The testbed runs already." && exit 1; }
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
rm -f "$results/failed.log"
if [[ $from == 1 ]]; then
    ./hosts.sh down # what a run left that nothing could end
    mkdir -p "$results"
    install -d -m700 "$work"
    : >"$log"
fi
say "testbed of $(git -C "$root" rev-parse --short HEAD), $(date -u +%F), $(nproc) cores with a load of $(cut -d' ' -f1 /proc/loadavg), two hosts, link of 10 Gbit/s"
step "what is committed" snapshot
step "wheels for hosts without PyPI (cached)" wheelhouse
step "image of the hosts (cached)" ./hosts.sh base
step "two hosts up" ./hosts.sh up
step "what there is before" before
step "site.yml --check --diff on fresh hosts" play site.yml --check --diff
step "a codec that nobody knows is refused" refused "isthmus_codec must be one of" -e isthmus_codec=gzip
step "a GPU role on a host without one is refused" refused "finds no GPU there; install NVIDIA's driver" -e isthmus_prefill_device=cuda
step "a context that does not fit into memory is refused" refused "lower isthmus_num_cells" -e isthmus_num_cells=100000000
began=$SECONDS
step "site.yml" timed site.yml
step "a first answer from outside, by the route split" first_token
if [[ $from -le 10 ]]; then
    say "fresh hosts to first answer: $((SECONDS - began)) s"
    say "$(cat "$work/times")"
fi
step "verify.yml" play verify.yml
step "site.yml again: changed=0" unchanged site.yml
step "site.yml --check --diff when converged: changed=0" unchanged site.yml --check --diff
step "an MTU that the path does not carry is refused and put back" narrow_path
step "secrets are in no process list, journal or open file" secrets_hidden
step "KV and control ports are closed to strangers" closed
step "Prometheus scrapes everything" scraped
step "HTTPS and back" https
step "systemd-analyze security: all OK" exposure
[[ $from -gt 20 ]] || say "$(cat "$results/security.txt")"
step "upgrade.yml with a broken release: taken back" broken
step "verify.yml: the old release still answers" play verify.yml
step "upgrade.yml with a good release" good
step "verify.yml" play verify.yml
step "kill -9 of every service: each comes back" killed
step "verify.yml" play verify.yml
step "xeon1 reboots" ./hosts.sh reboot xeon1
step "verify.yml: everything came back by itself" play verify.yml
step "gpu1 loses power" ./hosts.sh cut gpu1
step "verify.yml: everything came back by itself" play verify.yml
step "site.yml: changed=0 after both" unchanged site.yml
step "measure.yml" measured
step "secrets are still hidden" secrets_hidden
step "reset.yml" play reset.yml
step "nothing is left" nothing_left
step "reset.yml again: changed=0" unchanged reset.yml
say "all steps passed"
