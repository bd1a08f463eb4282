#!/usr/bin/env bash
# Installs what a build, a test run or a benchmark needs and this machine lacks.
#
# usage: tests/install.sh build|test|bench
#
# Everything is probed by use, never by package name. Missing packages come through apt when this is root or sudo needs
# no password; otherwise the one line that installs them is printed and the exit status is 1. With `test`, what cannot
# be had only costs the tests that need it (they print SKIP), except under CI=true, where it is an error.
set -euo pipefail
cd "$(dirname "$0")/.."
purpose=${1:-build}
packages=()

want() { # want PACKAGE... : what a failed probe needs
    packages+=("$@")
}
has() { type -P "$1" >/dev/null || [ -x "/usr/sbin/$1" ] || [ -x "/sbin/$1" ]; }
# Never `grep -q` behind a pipe: it ends at the first match, and under pipefail the writer's SIGPIPE is then the status.
has_library() { { ldconfig -p 2>/dev/null || /sbin/ldconfig -p; } | grep -F "$1 " >/dev/null; }

protoc_works() {
    has protoc || return 1
    local folder; folder=$(mktemp -d)
    printf 'syntax = "proto3";\nimport "google/protobuf/descriptor.proto";\n' >"$folder/probe.proto"
    protoc -I "$folder" --descriptor_set_out=/dev/null "$folder/probe.proto" >/dev/null 2>&1
    local status=$?
    rm -rf "$folder"
    return $status
}

if ! has cargo; then
    echo "cargo is missing. Install Rust with this line, then run make again:" >&2
    echo "  curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y" >&2
    exit 1
fi
oldest=$(sed -nE 's/^rust-version = "([0-9.]+)"/\1/p' Cargo.toml)
for tool in cargo rustc; do
    found=$("$tool" --version 2>/dev/null | awk '{ print $2 }') || found=
    if [ "$(printf '%s\n' "$oldest" "${found:-0}" | sort -V | head -n 1)" != "$oldest" ]; then
        echo "$tool ${found:-(it does not run)} is older than Rust $oldest, which Tidewire needs: rustup update stable" >&2
        echo "  (a distribution's package of that age: install Rust from https://rustup.rs instead)" >&2
        exit 1
    fi
done
if ! has cc; then want gcc libc6-dev; fi
if ! protoc_works; then want protobuf-compiler libprotobuf-dev; fi
if [ "$purpose" = test ] || [ "$purpose" = bench ]; then
    python3 -c 'import ensurepip, venv' >/dev/null 2>&1 || want python3 python3-venv
    has_library libibverbs.so.1 || want libibverbs1
    has_library librdmacm.so.1 || want librdmacm1
    has_library libnuma.so.1 || want libnuma1
    has_library libcurl.so.4 || want libcurl4
fi
if [ "$purpose" = test ]; then
    has ip || want iproute2
    has openssl || want openssl
fi

as_root=()
may_install=yes
if [ "$(id -u)" != 0 ]; then
    if has sudo && sudo -n true 2>/dev/null; then as_root=(sudo -n); else may_install=no; fi
fi
has apt-get || may_install=no
apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Dpkg::Use-Pty=0 "$@"; }

if [ ${#packages[@]} -gt 0 ]; then
    if [ $may_install = no ]; then
        echo "missing on this machine; install with this line, then run make again:" >&2
        if has apt-get; then
            echo "  sudo apt-get update && sudo apt-get install -y --no-install-recommends ${packages[*]}" >&2
        else
            echo "  (not a Debian or Ubuntu; the packages are called there) ${packages[*]}" >&2
        fi
        exit 1
    fi
    echo "installing: ${packages[*]}"
    apt install --no-install-recommends "${packages[@]}" >/dev/null 2>&1 || {
        apt update >/dev/null
        apt install --no-install-recommends "${packages[@]}" >/dev/null
    }
fi

# clippy and rustfmt are missing from rustup's minimal profile.
if [ "$purpose" = test ]; then
    for component in clippy rustfmt; do
        cargo "${component/rustfmt/fmt}" --version >/dev/null 2>&1 && continue
        has rustup && rustup component add "$component" >/dev/null 2>&1 && continue
        echo "cargo ${component/rustfmt/fmt} is missing: rustup component add $component" >&2
        exit 1
    done
fi

optional() { # optional NAME COMMAND... : a failure costs tests, or the run under CI
    local name=$1; shift
    "$@" && return
    if [ "${CI:-}" = true ]; then echo "install: $name is required under CI" >&2; exit 1; fi
    echo "install: $name is not available; its tests print SKIP" >&2
}
case $purpose in
test)
    optional "the Mooncake wheel" tests/peers/setup-mooncake.sh
    optional "an etcd server" tests/peers/setup-etcd.sh
    ;;
bench)
    tests/peers/setup-mooncake.sh || exit 1
    tests/peers/setup-nixl.sh || exit 1
    ;;
esac
