#!/usr/bin/env bash
# Coverage-guided fuzzing of the decoders with cargo-fuzz, on the stable toolchain.
#
# usage: tests/fuzz/run.sh [TARGET...]      all targets by default; SECONDS_EACH=60 bounds each
#
# Needs cargo-fuzz (`cargo install cargo-fuzz --locked`). RUSTC_BOOTSTRAP=1 lets the stable compiler take the sanitizer
# flags. What it finds lies in tests/fuzz/artifacts, what it learned in tests/fuzz/corpus; git ignores both.
set -euo pipefail
cd "$(dirname "$0")/../.."
cargo fuzz --version >/dev/null 2>&1 || { echo "cargo-fuzz is missing: cargo install cargo-fuzz --locked" >&2; exit 1; }
export RUSTC_BOOTSTRAP=1
targets=("$@")
[ ${#targets[@]} -gt 0 ] || mapfile -t targets < <(sed -n 's/^name = "\(.*_.*\)"/\1/p' tests/fuzz/Cargo.toml)
for target in "${targets[@]}"; do
    echo "== $target"
    cargo fuzz run --fuzz-dir tests/fuzz "$target" -- -max_total_time="${SECONDS_EACH:-60}" -max_len=4096
done
