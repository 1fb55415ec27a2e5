#!/usr/bin/env bash
# A Debian with two NUMA nodes in QEMU:
# numa_guest.sh check | accelerator | base | open WHEELHOUSE | up | down | ssh COMMAND... | ctl COMMAND...
# `open` lets one install into the guest's disk over SSH, before `up` boots from it. The controller is a namespace of
# this machine. Exits 77 with the reason where this machine cannot do that.
set -euo pipefail

cache=${ISTHMUS_TESTBED_CACHE:-$HOME/.cache/isthmus/testbed}
lab=${ISTHMUS_NUMA_DIR:-/var/tmp/isthmus-numa}
namespace=isthmus-numa-ctl
guest=10.78.0.2
controller=10.78.0.1
node_mib=1536
packages=systemd,systemd-sysv,dbus,openssh-server,python3-minimal,python3-apt,python3-venv,python3-packaging,netbase,nftables,chrony,iproute2,iputils-ping,ethtool,kmod,procps,numactl,curl,libgomp1,libnuma1,ca-certificates,linux-image-cloud-amd64,initramfs-tools

skip() { echo "SKIP: $*" && exit 77; }

check() {
    [[ $(id -u) == 0 ]] || skip "the guest's disk and network need root"
    local tool
    for tool in qemu-system-x86_64 mmdebstrap mke2fs ip ssh; do
        command -v "$tool" >/dev/null || skip "$tool is missing (Debian: apt install qemu-system-x86 mmdebstrap e2fsprogs iproute2 openssh-client)"
    done
    [[ -c /dev/net/tun ]] || skip "this kernel has no /dev/net/tun"
    unshare -n true 2>/dev/null || skip "this machine gives no network namespaces (CAP_SYS_ADMIN)"
    local free_mib
    free_mib=$(awk '/^MemAvailable/ {print int($2 / 1024)}' /proc/meminfo)
    ((free_mib > 2 * node_mib + 1024)) || skip "the guest needs $((2 * node_mib + 1024)) MiB, $free_mib are free"
}

accelerator() { # with the processor's help only: other kinds of /dev/kvm interpret a kernel that is not made for them
    if [[ -w /dev/kvm && (-d /sys/module/kvm_intel || -d /sys/module/kvm_amd) ]]; then echo kvm; else echo tcg; fi
}

base() { # a Debian with its own kernel and what the roles ask for: the guest reaches no package mirror
    [[ -e $cache/numa.tar ]] && return
    mkdir -p "$cache"
    # An initrd with the two modules that the root needs: unpacking those of every machine takes a minute when emulated.
    mmdebstrap --quiet --variant=minbase --include="$packages" \
        --customize-hook='echo MODULES=list >"$1/etc/initramfs-tools/conf.d/guest"' \
        --customize-hook='printf "virtio_pci\nvirtio_blk\n" >>"$1/etc/initramfs-tools/modules"' \
        --customize-hook='chroot "$1" update-initramfs -u' \
        --customize-hook='chroot "$1" systemctl enable systemd-networkd' \
        bookworm "$cache/numa.partial.tar"
    mv "$cache/numa.partial.tar" "$cache/numa.tar"
}

open() { # open WHEELHOUSE: the disk as a folder, with a key for us and the wheels, and sshd in it, at full speed
    check
    mkdir -p "$lab/root"
    ssh-keygen -q -t ed25519 -N '' -f "$lab/id"
    cat >"$lab/ssh_config" <<SSH
IdentityFile $lab/id
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
ConnectTimeout 30
ServerAliveInterval 10
ServerAliveCountMax 30
SSH
    tar -C "$lab/root" -xf "$cache/numa.tar"
    install -d -m700 "$lab/root/root/.ssh"
    install -m600 "$lab/id.pub" "$lab/root/root/.ssh/authorized_keys"
    echo numa1 >"$lab/root/etc/hostname"
    echo "127.0.0.1 localhost numa1" >"$lab/root/etc/hosts"
    echo "/dev/vda / ext4 noatime 0 0" >"$lab/root/etc/fstab"
    printf '[Match]\nName=eth0\n[Network]\nAddress=%s/24\nLinkLocalAddressing=no\n' $guest >"$lab/root/etc/systemd/network/eth0.network"
    if [[ $(accelerator) == tcg ]]; then
        # LLVM takes the better part of an hour there to compile codecs that this test has no use for.
        mkdir -p "$lab/root/etc/systemd/system.conf.d"
        printf '[Manager]\nDefaultEnvironment=NUMBA_DISABLE_JIT=1\n' >"$lab/root/etc/systemd/system.conf.d/emulated.conf"
        echo NUMBA_DISABLE_JIT=1 >>"$lab/root/etc/environment"
    fi
    mkdir "$lab/root/opt/wheels"
    cp "$1"/*.whl "$lab/root/opt/wheels"
    ip netns add $namespace
    ip -n $namespace link set lo up
    ip -n $namespace addr add $guest/32 dev lo
    # Its mounts and processes end with it.
    ip netns exec $namespace unshare --mount --pid --fork --kill-child --mount-proc="$lab/root/proc" \
        sh -c 'mount --rbind /dev "$1/dev" && mkdir -p "$1/run/sshd" && exec chroot "$1" /usr/sbin/sshd -D' sh "$lab/root" \
        >"$lab/sshd.log" 2>&1 &
    echo $! >"$lab/pid"
    answers 60
}

close() { # the folder becomes a file system of its own
    to sync || true
    kill -KILL "$(<"$lab/pid")"
    rm "$lab/pid"
    ip -n $namespace addr del $guest/32 dev lo
    cp "$lab"/root/boot/vmlinuz-* "$lab/kernel"
    cp "$lab"/root/boot/initrd.img-* "$lab/initrd"
    mke2fs -q -t ext4 -O ^has_journal -d "$lab/root" "$lab/disk" 4G
    rm -rf "$lab/root"
}

answers() { # answers SECONDS: the host does within that time
    local began=$SECONDS
    until to true 2>/dev/null; do
        if ((SECONDS - began > $1)) || ! kill -0 "$(<"$lab/pid")" 2>/dev/null; then
            tail -n 20 "$lab"/*.log >&2
            echo "the guest does not answer" >&2
            return 1
        fi
        sleep 1
    done
}

ctl() { ip netns exec $namespace "$@"; }

to() { ctl ssh -F "$lab/ssh_config" "root@$guest" "$@"; }

boot() {
    local accel=tcg,thread=multi,tb-size=1024 model=max
    # Some hypervisors' hosts refuse the one register that arch-capabilities is kept in; nothing here reads it.
    [[ $(accelerator) == tcg ]] || accel=kvm model=host,-arch-capabilities
    ctl qemu-system-x86_64 -nodefaults -display none -no-reboot -machine q35 -accel "$accel" -cpu "$model" \
        -smp 4,sockets=2,cores=2,threads=1 -m $((2 * node_mib)) \
        -object memory-backend-ram,id=m0,size=${node_mib}M -object memory-backend-ram,id=m1,size=${node_mib}M \
        -numa node,nodeid=0,cpus=0-1,memdev=m0 -numa node,nodeid=1,cpus=2-3,memdev=m1 -numa dist,src=0,dst=1,val=21 \
        -kernel "$lab/kernel" -initrd "$lab/initrd" \
        -append "root=/dev/vda rw console=ttyS0 quiet mitigations=off net.ifnames=0 systemd.show_status=0" \
        -drive "file=$lab/disk,if=virtio,format=raw,cache=unsafe" \
        -netdev tap,id=n,ifname=tap0,script=no,downscript=no -device virtio-net-pci,netdev=n -device virtio-rng-pci \
        -serial "file:$lab/console.log" -pidfile "$lab/pid" -daemonize
}

up() {
    close
    ip -n $namespace tuntap add tap0 mode tap
    ip -n $namespace addr add $controller/24 dev tap0
    ip -n $namespace link set tap0 up
    boot
    answers 900
}

down() {
    if [[ -e $lab/pid ]]; then kill -KILL "$(<"$lab/pid")" 2>/dev/null || true; fi
    ip netns del $namespace 2>/dev/null || true
    rm -rf "${lab:?}"
}

case ${1:-} in
check | accelerator | base | up | down) "$1" ;;
open) open "$2" ;;
ssh) shift && to "$@" ;;
ctl) shift && exec ip netns exec $namespace "$@" ;;
*) sed -n '2,5s/^# //p' "$0" >&2 && exit 2 ;;
esac
