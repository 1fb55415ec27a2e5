#!/usr/bin/env bash
# The whole life of a cluster on two hosts of this machine, from nothing to nothing. Prints a line for each step.
#   run.sh [--results DIR]   exits 77 with a reason where this machine cannot; leaves nothing behind, however it ends
set -euo pipefail
cd "$(dirname "$0")"

root=$(git rev-parse --show-toplevel)
cache=${ISTHMUS_TESTBED_CACHE:-$HOME/.cache/isthmus/testbed}
results=$PWD/results
[[ ${1:-} != --results ]] || results=$2
mkdir -p "$results"
lab=$(mktemp -d /var/tmp/isthmus-testbed.XXXXXX)
work=$(mktemp -d -t isthmus-testbed.XXXXXX)
export ISTHMUS_TESTBED_DIR=$lab ISTHMUS_TESTBED_CACHE=$cache
export ANSIBLE_CONFIG=$root/ansible/ansible.cfg ANSIBLE_HOME=$work/ansible ANSIBLE_NOCOLOR=1 ANSIBLE_SSH_ARGS="-F $lab/ssh_config -o ControlMaster=auto -o ControlPersist=30s"
log=$results/testbed.log

finish() {
    local rc=$?
    trap - EXIT
    ./hosts.sh down || true
    rm -rf "$work" "$lab"
    exit $rc
}
trap finish EXIT
trap 'exit 130' INT TERM

say() { printf '%s\n' "$*" | tee -a "$log"; }

step() { # step NAME COMMAND...: how long it took, or the end of what it printed
    local name=$1 began=$SECONDS
    shift
    if "$@" >"$work/out" 2>&1; then
        say "$(printf '%-58s %4d s' "$name" $((SECONDS - began)))"
    else
        say "$(printf '%-58s FAILED' "$name")"
        grep -vE '^(ok|skipping|included):' "$work/out" | tail -n 60 | tee -a "$log"
        exit 1
    fi
}

play() { ./hosts.sh ctl "$root/.venv-ansible/bin/ansible-playbook" -i inventory -e "@$work/vars.json" "${@:2}" "../$1"; }

unchanged() { # unchanged PLAYBOOK...: a converged host has nothing left to change
    play "$@" || { cat "$work/out"; return 1; }
    ! grep -E 'changed=[1-9]' "$work/out"
}

wheelhouse() { # every locked wheel, once
    local stamp
    stamp=$cache/wheelhouse/$(cat "$root"/requirements/*.txt | sha256sum | cut -c1-16).complete
    [[ -e $stamp ]] && return
    mkdir -p "$cache/wheelhouse"
    local wheel=("$root/.venv/bin/pip" wheel --quiet --no-deps --wheel-dir "$cache/wheelhouse")
    "${wheel[@]}" -r "$root/requirements/torch-cpu.txt"
    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" "${wheel[@]}" -r "$root/requirements/cpu.txt"
    touch "$stamp"
}

snapshot() { # what is committed, so that a file that changes meanwhile changes nothing here
    mkdir "$work/source"
    git -C "$root" archive HEAD | tar -x -C "$work/source"
    "$root/.venv/bin/python" - "$work" "$root" >"$work/vars.json" <<'VARS'
import json, sys
from isthmus.pair import default_pair
work, root = sys.argv[1:]
pair = default_pair()
print(json.dumps({
    "isthmus_pair_hf_dir": pair.hf_dir,
    "isthmus_pair_gguf": pair.gguf,
    "isthmus_source": f"{work}/source",
    "isthmus_command": f"{root}/.venv/bin/isthmus",
    "isthmus_keys_dir": f"{work}/keys",
    "measure_results": f"{work}/results",
}))
VARS
    mkdir "$work/results"
}

units=(gpu1:isthmus-prefill.service xeon1:isthmus-decode@0.service xeon1:isthmus-proxy.service)

killed() { # each service is back after a kill -9, by itself and as another process
    local each host unit before after
    for each in "${units[@]}"; do
        host=${each%%:*} unit=${each#*:}
        before=$(./hosts.sh ssh "$host" systemctl show -P MainPID "$unit")
        ./hosts.sh ssh "$host" kill -9 "$before"
        for _ in $(seq 90); do
            after=$(./hosts.sh ssh "$host" systemctl show -P MainPID "$unit")
            [[ $after != 0 && $after != "$before" ]] && ./hosts.sh ssh "$host" systemctl is-active --quiet "$unit" && break
            sleep 1
        done
        ./hosts.sh ssh "$host" systemctl is-active --quiet "$unit" || { echo "$unit is not back"; return 1; }
        [[ $after != "$before" ]] || { echo "$unit was not killed"; return 1; }
    done
}

traces() { # what is left on the hosts; nothing, after reset.yml
    local host
    for host in gpu1 xeon1; do
        ./hosts.sh ssh "$host" '
            getent passwd isthmus; getent group isthmus
            systemctl list-units --all --plain --no-legend --full "isthmus-*"
            systemctl list-unit-files --no-legend "isthmus-*"
            ls -d /opt/isthmus /etc/isthmus* /var/lib/isthmus* /var/cache/isthmus /etc/sysctl.d/60-isthmus.conf /etc/systemd/system/*isthmus* /etc/systemd/system/*/*isthmus* 2>/dev/null
            nft list tables | grep isthmus
            pgrep -u isthmus -a
            sysctl -n net.ipv4.tcp_rmem net.ipv4.tcp_wmem; cat /sys/class/net/eth10g/mtu
            true'
    done
}

nothing_left() { diff "$work/before" <(traces); }

secrets_hidden() { # no key in a process list, the journal, or a file that others may read
    local secret
    secret=$(sed -n 's/.*secret-key = "\(.*\)"/\1/p' "$work/keys/decode.key_secret")
    [[ -n $secret ]] || { echo "no secret to look for"; return 1; }
    ./hosts.sh ssh xeon1 "ps axww -o args; journalctl --no-pager; find / -xdev -type f -perm -o+r -size -64k -path '*isthmus*' -exec cat {} +" 2>/dev/null >"$work/public"
    ! grep -qF -- "$secret" "$work/public"
}

closed() { # a port of the KV plane does not open for a stranger, here the controller
    ! ./hosts.sh ctl timeout 3 bash -c '</dev/tcp/10.77.0.12/8103' 2>/dev/null
}

broken() { # a release whose decode worker cannot start
    sed -i 's/^def main() -> None:/def main() -> None:\n    raise SystemExit(1)/' "$work/source/isthmus/cli.py"
    if play upgrade.yml; then
        echo "a broken release was taken"
        return 1
    fi
    grep -q 'did not start on xeon1' "$work/out" && ./hosts.sh ssh xeon1 systemctl is-active isthmus-decode@0 isthmus-proxy
}

working() { # another release: the same code, one line longer
    git -C "$root" archive HEAD isthmus | tar -x -C "$work/source"
    echo "# The next release." >>"$work/source/isthmus/cli.py"
    play upgrade.yml
}

: >"$log"
./hosts.sh check
say "testbed of $(git -C "$root" rev-parse --short HEAD), $(date -u +%F), $(nproc) cores, two hosts, link of 10 Gbit/s"
step "wheels on the controller" wheelhouse
step "two hosts up" ./hosts.sh up
snapshot
traces >"$work/before"
step "site.yml --check --diff on fresh hosts" play site.yml --check --diff
began=$SECONDS
step "site.yml" play site.yml
cp "$work/out" "$results/site.log"
step "verify.yml: a completion through the proxy" play verify.yml
say "fresh hosts to first answer: $((SECONDS - began)) s"
step "site.yml again: changed=0" unchanged site.yml
step "site.yml --check --diff when converged: changed=0" unchanged site.yml --check --diff
step "secrets are in no process list, journal or open file" secrets_hidden
step "KV port is closed to strangers" closed
step "upgrade.yml with a broken release: taken back" broken
step "verify.yml: the old release still answers" play verify.yml
step "upgrade.yml with a good release" working
step "verify.yml" play verify.yml
step "kill -9 of every service: each comes back" killed
step "verify.yml" play verify.yml
step "xeon1 reboots" ./hosts.sh reboot xeon1
step "verify.yml: everything came back by itself" play verify.yml
step "measure.yml: doctor, iperf3, KV" play measure.yml
cp "$work"/results/*.json "$results"/
step "systemd-analyze security" bash -c "for u in ${units[*]}; do ./hosts.sh ssh \${u%%:*} systemd-analyze security --no-pager \${u#*:} | tail -n 1; done >$results/security.txt"
step "reset.yml" play reset.yml
step "nothing is left" nothing_left
step "reset.yml again: changed=0" unchanged reset.yml
say "all steps passed"
