//! Fuzzing of every decoder on the stable toolchain: valid frames, mutated without end for a bounded time. [`ports`] sends
//! the same kind of bytes to the listeners of a live engine and of the metadata server.
//!
//! `TIDEWIRE_FUZZ_SECONDS` bounds each target (1 by default), `TIDEWIRE_FUZZ_SEED` repeats a run. A failure prints the
//! seed, the round and the input. The same targets run under libFuzzer with `make fuzz`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "tests")]

mod mutate;
mod ports;
mod targets;

use std::{
    panic::{self, AssertUnwindSafe},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use mutate::Mutator;
use tidewire_engine::metadata::uri;

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

/// Feeds one target until its time is over; always the seeds themselves first.
fn fuzz(name: &str, target: fn(&[u8]), seeds: Vec<Vec<u8>>) {
    let seconds = setting("TIDEWIRE_FUZZ_SECONDS").unwrap_or(1);
    let seed = setting("TIDEWIRE_FUZZ_SEED")
        .unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64);
    println!("{name}: seed {seed}, {seconds} s");
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut mutator = Mutator::new(seed, seeds.clone());
    let mut round = 0u64;
    let mut try_one = |input: &[u8]| {
        round += 1;
        if panic::catch_unwind(AssertUnwindSafe(|| target(input))).is_err() {
            let hex: String = input.iter().map(|byte| format!("{byte:02x}")).collect();
            panic!("{name} failed in round {round}; TIDEWIRE_FUZZ_SEED={seed}; input {hex}");
        }
    };
    seeds.iter().for_each(|input| try_one(input));
    try_one(&[]);
    while Instant::now() < until {
        for _ in 0..256 {
            try_one(mutator.next_input());
        }
    }
    println!("{name}: {round} inputs");
}

macro_rules! fuzz_tests {
    ($($name:ident),* $(,)?) => {
        $(
            #[test]
            fn $name() {
                fuzz(stringify!($name), targets::$name, targets::seeds::$name());
            }
        )*
    };
}

fuzz_tests! {
    mooncake_control,
    mooncake_data,
    mooncake_descriptor,
    mooncake_names,
    mooncake_rpc_meta,
    native_hello,
    native_frame,
    local_message,
}

#[test]
fn metadata_uri() {
    fn target(data: &[u8]) {
        let text = String::from_utf8_lossy(data);
        let Ok(parsed) = uri::parse(&text) else { return };
        assert_eq!(uri::parse(&parsed.to_string()).map(|again| again.to_string()).ok(), Some(parsed.to_string()));
    }
    let seeds = [
        "P2PHANDSHAKE",
        "memory://x",
        "http://127.0.0.1:8080/metadata",
        "http://[::1]:8080/m",
        "127.0.0.1:2379",
        "etcd://user:pass@h1:2379,h2:2379;[fe80::1]:2379?ca=/c&cert=/c&key=/k&ttl=5",
        "redis://h:1",
    ];
    fuzz("metadata_uri", target, seeds.iter().map(|seed| seed.as_bytes().to_vec()).collect());
}

#[test]
fn a_broken_target_is_found() {
    fn breaks_on_two_high_bytes(data: &[u8]) {
        assert!(!data.windows(2).any(|pair| pair == [0xff, 0xff]));
    }
    let found = panic::catch_unwind(|| fuzz("broken on purpose", breaks_on_two_high_bytes, vec![vec![0; 16]]));
    assert!(found.is_err(), "the mutator never produced two high bytes in a row");
}
