#!/usr/bin/env bash
# Two network namespaces joined by a cable that can be cut, slowed and made lossy: real partitions for the fault tests.
#
#   netns.sh probe                    exit 0 if this machine allows it; else prints `SKIP reason` and exits 77
#   netns.sh up NAME                  namespaces NAME-a (10.213.x.1) and NAME-b (10.213.x.2); prints both addresses
#   netns.sh exec NAME a|b COMMAND    runs a command inside one end
#   netns.sh cut NAME | heal NAME     drops every packet of the cable both ways / lets them pass again
#   netns.sh slow NAME DELAY_MS       delays every packet (needs the kernel's netem)
#   netns.sh down NAME                removes both namespaces and what runs inside them
#
# NAME is at most 8 letters or digits, one per test. Needs root, iproute2 and a kernel with namespaces and veth. A cut
# keeps the link up: nobody gets an error or a reset from the kernel, packets just vanish.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
verb=${1:?verb} name=${2:-probe}

subnet() { # a subnet per name, so that tests in parallel do not meet
    local sum; sum=$(cksum <<<"$name" | cut -d' ' -f1)
    echo "10.213.$((sum % 250 + 1))"
}

down() {
    local end pid
    for end in a b; do
        ip netns list 2>/dev/null | grep "^$name-$end\b" >/dev/null || continue
        for pid in $(ip netns pids "$name-$end" 2>/dev/null); do kill -KILL "$pid" 2>/dev/null || true; done
        ip netns delete "$name-$end" || true
    done
}

up() {
    local net; net=$(subnet)
    ip netns add "$name-a"
    ip netns add "$name-b"
    ip link add "$name-a" netns "$name-a" type veth peer name "$name-b" netns "$name-b"
    ip -n "$name-a" address add "$net.1/24" dev "$name-a"
    ip -n "$name-b" address add "$net.2/24" dev "$name-b"
    local end
    for end in a b; do
        ip -n "$name-$end" link set lo up
        ip -n "$name-$end" link set "$name-$end" up
    done
}

each_end() { # each_end COMMAND... : runs it once per end, with $end and $device set
    for end in a b; do device=$name-$end; "$@"; done
}
# The neighbour's hardware address is made to be nobody's: packets leave, and vanish, without an error to anybody. A packet
# filter would do the same but may be missing, and a blackhole route would give the sender an error.
blind() {
    local net other; net=$(subnet); other=$([ "$end" = a ] && echo 2 || echo 1)
    ip -n "$device" neighbour replace "$net.$other" lladdr 02:00:00:00:00:fe nud permanent dev "$device"
}
see() {
    local net other; net=$(subnet); other=$([ "$end" = a ] && echo 2 || echo 1)
    ip -n "$device" neighbour delete "$net.$other" dev "$device"
}
delay() { ip netns exec "$device" tc qdisc replace dev "$device" root netem delay "$1ms"; }

case $verb in
probe)
    [ "$(id -u)" = 0 ] || { echo "SKIP network namespaces need root"; exit 77; }
    command -v ip >/dev/null || { echo "SKIP ip (iproute2) is missing"; exit 77; }
    name=twp$$
    trap down EXIT
    if ! reason=$( (up && ip netns exec "$name-a" true) 2>&1); then
        echo "SKIP network namespaces cannot be made here: ${reason//$'\n'/; }"
        exit 77
    fi
    ;;
up)
    down
    if ! up; then down; exit 1; fi
    echo "$(subnet).1 $(subnet).2"
    ;;
exec)
    end=${3:?a or b}
    shift 3
    exec ip netns exec "$name-$end" "$@"
    ;;
cut) each_end blind ;;
heal) each_end see ;;
slow) each_end delay "${3:?milliseconds}" ;;
down) down ;;
*) echo "unknown verb $verb" >&2; exit 2 ;;
esac
