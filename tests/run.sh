#!/usr/bin/env bash
# Everything CI runs. Called by `make test` after tests/install.sh; `tests/run.sh quick` leaves the documentation out.
#
# Each step's whole output goes to <target folder>/test-logs/<step>.log; the console shows what a reader needs: failures,
# SKIP lines with their reasons, counts. Steps go on after a failure. The last line is `N passed, N failed`, where each
# test and each step without tests (format, lints, documentation) counts as one; the exit status is 0 if none failed.
set -uo pipefail
# Some tests hold thousands of connections; the soft limit is often 1024.
ulimit -S -n hard
cd "$(dirname "$0")/.."
source tests/peers/lib.sh
quick=${1:-}

logs=${CARGO_TARGET_DIR:-target}/test-logs
mkdir -p "$logs"
rm -f "$logs"/*.log
export TIDEWIRE_FUZZ_SECONDS=${TIDEWIRE_FUZZ_SECONDS:-2}
export PROPTEST_CASES=${PROPTEST_CASES:-256}
peers=$(peers_dir)
PATH="$PATH:$peers/etcd/usr/bin:/usr/sbin:/sbin"
if [ -z "${TIDEWIRE_TEST_MOONCAKE_VENV:-}" ] && [ -x "$peers/mooncake/venv/bin/python" ]; then
    export TIDEWIRE_TEST_MOONCAKE_VENV=$peers/mooncake/venv
fi
if [ "${CI:-}" = true ]; then
    # tests/install.sh has seen to both; a run that lost them on the way here must not pass.
    command -v etcd >/dev/null || { echo "etcd is required under CI" >&2; exit 1; }
    [ -n "${TIDEWIRE_TEST_MOONCAKE_VENV:-}" ] || { echo "the Mooncake wheel is required under CI" >&2; exit 1; }
fi

passed=0 failed=0 skipped=0 failures=()
begin() { step=$1; log=$logs/$1.log; started=$SECONDS; printf '\n== %s\n' "$step"; }
took() { echo "   $step: $1 ($((SECONDS - started)) s)"; }

check() { # check NAME COMMAND... : a step that is one check
    begin "$1"; shift
    if timeout 1200 "$@" >"$log" 2>&1; then
        passed=$((passed + 1)); took "1 passed, 0 failed"
    else
        failed=$((failed + 1)); failures+=("$step"); tail -n 60 "$log"; took "0 passed, 1 failed"
    fi
}

count() { # count PASSED FAILED STATUS : adds a step's tests; a step that broke before any test ran is one failure
    local good=${1:-0} bad=${2:-0} status=$3 skips
    if [ "$status" != 0 ] && [ "$bad" = 0 ]; then bad=1; fi
    if [ "$status" = 0 ] && [ "$good" = 0 ]; then echo "   no test ran"; bad=1; fi
    skips=$(grep -cE '^ *SKIP ' "$log")
    grep -hE '^ *SKIP ' "$log" | sed 's/^ */   /' | sort -u
    passed=$((passed + good)) failed=$((failed + bad)) skipped=$((skipped + skips))
    [ "$bad" = 0 ] || failures+=("$step")
    took "$good passed, $bad failed, $skips skipped"
}

libtest() { # libtest NAME COMMAND... : counts from the lines that Rust's own test harness prints
    begin "$1"; shift
    timeout 1500 "$@" >"$log" 2>&1
    local status=$?
    [ $status = 0 ] || { grep -E '^test .*FAILED$|panicked at|^error' "$log" | head -n 60; tail -n 40 "$log"; }
    count "$(awk '/^test result:/ { n += $4 } END { print n + 0 }' "$log")" \
        "$(awk '/^test result:/ { n += $6 } END { print n + 0 }' "$log")" $status
}

nextest() { # nextest NAME ARGUMENT... : counts from nextest's summary; failures are shown again after it
    begin "$1"; shift
    timeout 1500 cargo nextest run --no-fail-fast --success-output immediate --failure-output immediate-final "$@" >"$log" 2>&1
    local status=$? line run good
    line=$(grep -E '^ *Summary \[' "$log" | tail -n 1)
    run=$(sed -nE 's/.*\] *([0-9]+)(\/[0-9]+)? tests? run:.*/\1/p' <<<"$line")
    good=$(sed -nE 's/.*run: ([0-9]+) passed.*/\1/p' <<<"$line")
    if [ $status != 0 ]; then
        if [ -n "$line" ]; then sed -nE '/^ *Summary \[/,$p' "$log" | tail -n 200; else tail -n 60 "$log"; fi
    fi
    count "${good:-0}" $((${run:-0} - ${good:-0})) $status
}

python_tests() {
    begin "$1"
    timeout 300 python3 -m unittest discover -v -s tests/bench -p 'test_*.py' >"$log" 2>&1
    local status=$? run bad
    [ $status = 0 ] || tail -n 40 "$log"
    run=$(sed -nE 's/^Ran ([0-9]+) tests?.*/\1/p' "$log")
    bad=$(grep -cE '^(FAIL|ERROR): ' "$log")
    count $((${run:-0} - bad)) "$bad" $status
}

workspace=(--locked --workspace --features etcd)
check format cargo fmt --all --check
check lints cargo clippy "${workspace[@]}" --all-targets -- -D warnings
[ -n "$quick" ] || check plain-build env PROTOC=/nonexistent cargo check --locked --workspace
[ -n "$quick" ] || check documentation env RUSTDOCFLAGS="-D warnings" cargo doc "${workspace[@]}" --no-deps
if cargo nextest --version >/dev/null 2>&1; then
    nextest tests "${workspace[@]}"
    [ -n "$quick" ] || libtest doctests cargo test "${workspace[@]}" --doc
else
    libtest tests cargo test "${workspace[@]}" --no-fail-fast -- --show-output
fi
python_tests bench-scripts

printf '\n'
[ ${#failures[@]} = 0 ] || printf 'failed step: %s\n' "${failures[@]}"
echo "skipped: $skipped; $SECONDS s; logs in $logs"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
