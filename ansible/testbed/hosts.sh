#!/usr/bin/env bash
# Real systemd hosts on this machine:
# hosts.sh up | down | ssh HOST COMMAND... | reboot HOST | cut HOST (its power) | path HOST MTU | ctl COMMAND...
# Each has a root directory, a network namespace and a shaped port of its own; the controller is a third namespace.
# Exits 77 with the reason where this machine cannot do that.
set -euo pipefail

cache=${ISTHMUS_TESTBED_CACHE:-$HOME/.cache/isthmus/testbed}
lab=${ISTHMUS_TESTBED_DIR:-/var/tmp/isthmus-testbed}
prefix=isthmus-tb
rate_gbit=${RATE_GBIT:-10}
mtu=9000
hosts=(gpu1:10.77.0.11 xeon1:10.77.0.12)
controller=10.77.0.1
packages=systemd,systemd-sysv,dbus,openssh-server,python3-minimal,python3-apt,python3-venv,python3-pip,python3-packaging,netbase,nftables,chrony,iproute2,iputils-ping,ethtool,kmod,sudo,procps,numactl,iperf3,curl,libgomp1,libnuma1,ca-certificates,gcc,libc6-dev,g++,prometheus,prometheus-node-exporter

skip() { echo "SKIP: $*" && exit 77; }

check() {
    [[ $(id -u) == 0 ]] || skip "the testbed needs root"
    local tool
    for tool in systemd-nspawn mmdebstrap ip tc nft ssh; do
        command -v "$tool" >/dev/null || skip "$tool is missing (Debian: apt install systemd-container mmdebstrap iproute2 nftables openssh-client)"
    done
    unshare -m -n true 2>/dev/null || skip "this machine gives no namespaces (CAP_SYS_ADMIN)"
}

base() { # a Debian with what the roles ask for: the hosts reach no package mirror
    [[ -e $cache/base.tar ]] && return
    mkdir -p "$cache"
    mmdebstrap --quiet --variant=minbase --include="$packages" bookworm "$cache/base.partial.tar"
    mv "$cache/base.partial.tar" "$cache/base.tar"
}

address() {
    local each
    for each in "${hosts[@]}"; do [[ ${each%%:*} != "$1" ]] || echo "${each##*:}"; done
}

ctl() { ip netns exec "$prefix-ctl" "$@"; }

to() { # to HOST COMMAND...
    local host=$1
    shift
    ctl ssh -F "$lab/ssh_config" "root@$(address "$host")" "$@"
}

shape() { # on both ends of a cable, each for what it sends
    tc -n "$1" qdisc add dev "$2" root tbf rate "${rate_gbit}gbit" burst $((rate_gbit * 125000)) latency 20ms
}

cable() { # cable HOST: a port in the host's namespace, the other end on the switch
    local host=$1
    ip netns add "$prefix-$host"
    # The end on the switch goes a moment after its namespace has gone.
    for _ in $(seq 50); do
        ip -n "$prefix-ctl" link show "v-$host" >/dev/null 2>&1 || break
        sleep 0.1
    done
    ip -n "$prefix-$host" link add eth10g type veth peer name "v-$host" netns "$prefix-ctl"
    ip -n "$prefix-$host" link set lo up
    ip -n "$prefix-$host" link set eth10g up
    ip -n "$prefix-$host" addr add "$(address "$host")/24" dev eth10g
    ip -n "$prefix-ctl" link set "v-$host" master br0 mtu $mtu up
    shape "$prefix-$host" eth10g
    shape "$prefix-ctl" "v-$host"
}

disk() { # disk HOST: the base below, what the host writes above
    local host=$1 root=$lab/$1/root
    mkdir -p "$lab/$host"/{upper,work,root}
    mount -t overlay overlay -o "lowerdir=$lab/base,upperdir=$lab/$host/upper,workdir=$lab/$host/work" "$root"
    install -d -m700 "$root/root/.ssh"
    install -m600 "$lab/id.pub" "$root/root/.ssh/authorized_keys"
    echo "$host" >"$root/etc/hostname"
    : >"$root/etc/machine-id"
    rm -f "$root"/etc/systemd/system/multi-user.target.wants/prometheus*.service
    cat >"$root/sbin/testbed-init" <<'INIT'
#!/bin/sh
# nspawn mounts these read-only; without them systemd sets no limits and does not say so.
for c in memory pids cpu cpuacct; do mount -o remount,bind,rw /sys/fs/cgroup/$c 2>/dev/null; done
exec /lib/systemd/systemd
INIT
    chmod +x "$root/sbin/testbed-init"
}

boot() {
    local host=$1
    (
        # A cgroup of its own in every hierarchy, or services fail now and then with 219/CGROUP.
        for tree in systemd unified memory pids cpu cpuacct blkio; do
            [[ -d /sys/fs/cgroup/$tree ]] || continue
            mkdir -p "/sys/fs/cgroup/$tree/$prefix-$host"
            echo $BASHPID >"/sys/fs/cgroup/$tree/$prefix-$host/cgroup.procs"
        done
        export SYSTEMD_NSPAWN_API_VFS_WRITABLE=network
        exec setsid systemd-nspawn --quiet --directory="$lab/$host/root" --machine="$prefix-$host" --hostname="$host" \
            --register=no --keep-unit --network-namespace-path="/run/netns/$prefix-$host" --capability=all \
            --resolv-conf=off --link-journal=no --bind-ro="$cache/wheelhouse:/opt/wheels" --console=pipe \
            /sbin/testbed-init >>"$lab/$host/console.log" 2>&1 </dev/null
    ) &
}

await() {
    local host=$1
    for _ in $(seq 900); do
        to "$host" test -e /run/systemd/system 2>/dev/null && return
        sleep 0.2
    done
    tail -n 20 "$lab/$host/console.log" >&2
    echo "$host does not answer" >&2
    return 1
}

machine() { # machine HOST: its process, as long as it runs
    pgrep -f "^[^ ]*systemd-nspawn .*--machine=$prefix-$1 "
}

ended() { # ended HOST SECONDS: whether it does within that time
    for _ in $(seq $(($2 * 5))); do
        machine "$1" >/dev/null || return 0
        sleep 0.2
    done
    return 1
}

cut() { # as when the power goes: nothing is asked, nothing is written back
    machine "$1" | xargs -r kill -TERM || true
    ended "$1" 30 || machine "$1" | xargs -r kill -KILL || true
}

halt() { # as `systemctl reboot` does: services get the time that they are promised
    to "$1" systemctl reboot 2>/dev/null || true
    ended "$1" 120 || true
    cut "$1"
}

start() { # a new namespace: MTU, sysctls and firewall are as after any start
    for _ in $(seq 20); do
        ip netns del "$prefix-$1" 2>/dev/null || break
        sleep 0.2
    done
    cable "$1"
    boot "$1"
    await "$1"
}

up() {
    check
    base
    mkdir -p "$lab/base"
    [[ -e $lab/base/etc ]] || tar -C "$lab/base" -xf "$cache/base.tar"
    [[ -e $lab/id ]] || ssh-keygen -q -t ed25519 -N '' -f "$lab/id"
    cat >"$lab/ssh_config" <<SSH
IdentityFile $lab/id
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
ConnectTimeout 2
ServerAliveInterval 2
ServerAliveCountMax 30
SSH
    ip netns add "$prefix-ctl"
    ip -n "$prefix-ctl" link set lo up
    ip -n "$prefix-ctl" link add br0 type bridge
    ip -n "$prefix-ctl" link set br0 mtu $mtu up
    ip -n "$prefix-ctl" addr add $controller/24 dev br0
    local each host
    for each in "${hosts[@]}"; do
        host=${each%%:*}
        cable "$host"
        disk "$host"
        boot "$host"
    done
    for each in "${hosts[@]}"; do await "${each%%:*}"; done
}

down() {
    local each host
    # What the controller still runs, ssh's shared connections among it.
    ip netns pids "$prefix-ctl" 2>/dev/null | xargs -r kill -KILL 2>/dev/null || true
    for each in "${hosts[@]}"; do
        host=${each%%:*}
        cut "$host"
        for _ in $(seq 100); do
            mountpoint -q "$lab/$host/root" || break
            umount "$lab/$host/root" 2>/dev/null || sleep 0.3
        done
        ip netns del "$prefix-$host" 2>/dev/null || true
        find /sys/fs/cgroup/*/"$prefix-$host" -depth -type d -exec rmdir {} \; 2>/dev/null || true
        mountpoint -q "$lab/$host/root" || rm -rf "${lab:?}/$host"
    done
    ip netns del "$prefix-ctl" 2>/dev/null || true
    rm -rf "${lab:?}"
}

case ${1:-} in
up | down | check | base) "$1" ;;
ssh) shift && to "$@" ;;
ctl) shift && ctl "$@" ;;
reboot) halt "$2" && start "$2" ;;
cut) cut "$2" && start "$2" ;;
path) ip -n "$prefix-ctl" link set "v-$2" mtu "$3" ;;
*) sed -n '2,5s/^# //p' "$0" >&2 && exit 2 ;;
esac
