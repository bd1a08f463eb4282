# Tidewire. `make demo` and `make test` are all a fresh Debian or Ubuntu machine with a Rust toolchain needs.
#
# Every target installs what it lacks (apt, as root or with passwordless sudo), or prints the one line that does.
# CARGO_TARGET_DIR is respected. TIDEWIRE_PEERS_DIR names a folder with the peers' environments (default .cache/peers).

SHELL := /bin/bash
export PATH := $(PATH):$(HOME)/.cargo/bin
TARGET := $(or $(CARGO_TARGET_DIR),target)
RELEASE := cargo build --release --locked --features etcd

.PHONY: help build demo test test-quick bench bench-short fuzz clean-cache

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## release binaries: tidewire and transfer_engine_bench, with the etcd store
	@tests/install.sh build
	$(RELEASE)

demo: build ## move a KV cache from a prefill process to a decode process; ARGS="--help" for more
	$(TARGET)/release/tidewire demo $(ARGS)

test: ## everything CI runs
	@tests/install.sh test
	@tests/run.sh

test-quick: ## the same without the documentation build and the long steps
	@tests/install.sh build
	@tests/run.sh quick

bench: ## peers and ours side by side, to docs/measurements; ARGS="--only mooncake"
	@tests/install.sh bench
	$(RELEASE) --bins --example bench_worker
	python3 tests/bench/run.py $(ARGS)

bench-short: ## the same with few, short runs, to target/bench: a look, no evidence
	@tests/install.sh bench
	$(RELEASE) --bins --example bench_worker
	python3 tests/bench/run.py --short $(ARGS)

fuzz: ## coverage-guided fuzzing with cargo-fuzz; TARGETS="..." SECONDS_EACH=60
	@tests/fuzz/run.sh $(TARGETS)

clean-cache: ## remove the peers' environments
	rm -rf .cache
