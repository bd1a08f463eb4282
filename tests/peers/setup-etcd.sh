#!/usr/bin/env bash
# An etcd server for the tests: the system's if there is one, else Debian's or Ubuntu's package unpacked beside the peers.
#
# usage: tests/peers/setup-etcd.sh
#
# Unpacked and not installed, because installing the package starts a service on the machine. The tests find it through
# PATH; tests/run.sh adds $TIDEWIRE_PEERS_DIR/etcd/usr/bin.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
folder=$(peers_dir)/etcd
# The tests need the JSON gateway under /v3. One on PATH comes first for them, so an unpacked one would not help.
check() {
    local found; found=$("$1" --version | sed -nE 's/^etcd Version: ([0-9.]+).*/\1/p')
    [ "$(printf '%s\n' 3.4 "${found:-0}" | sort -V | head -n 1)" = 3.4 ] && return
    echo "$1 is ${found:-of an unknown version}; the tests need 3.4 or later" >&2
    exit 1
}
if command -v etcd >/dev/null 2>&1; then check etcd; exit 0; fi
if [ -x "$folder/usr/bin/etcd" ]; then check "$folder/usr/bin/etcd"; exit 0; fi
command -v apt-get >/dev/null 2>&1 || { echo "no etcd on PATH and no apt to fetch etcd-server with" >&2; exit 1; }
echo "unpacking etcd-server"
mkdir -p "$folder"
cd "$folder"
fetch() { apt-get -q download etcd-server >/dev/null 2>&1; }
if ! fetch; then
    if [ "$(id -u)" = 0 ]; then apt-get -q update >/dev/null; else sudo -n apt-get -q update >/dev/null; fi || true
    fetch || { echo "etcd-server cannot be downloaded: sudo apt-get update && sudo apt-get install -y etcd-server" >&2; exit 1; }
fi
for package in ./*.deb; do dpkg-deb -x "$package" .; done
rm -f ./*.deb
./usr/bin/etcd --version >/dev/null || { echo "the unpacked etcd does not run" >&2; exit 1; }
check ./usr/bin/etcd
