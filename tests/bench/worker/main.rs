//! Our side of the benchmark pairs, and the costs per item; driven by the scripts in `tests/bench`.
//!
//! ```text
//! bench_worker target REGION TRANSPORT engine|plain      prints {"segment", "address"}, serves until its input ends
//! bench_worker initiator REGION TRANSPORT engine|plain   reads the target's line, then one JSON request per line
//! bench_worker cost register|segments|peers COUNT...     prints one JSON line per count
//! ```
//!
//! `engine` memory is allocated by the engine, `plain` memory is registered with it. The loop is the one of the peers'
//! worker: batches of equal blocks that walk the region over sixteen places at most, submitted and awaited by one thread.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "benchmark program")]

mod cost;
mod pair;

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["target", region, transport, memory] => pair::serve(region.parse()?, transport, memory),
        ["initiator", region, transport, memory] => pair::initiate(region.parse()?, transport, memory),
        ["cost", what, counts @ ..] if !counts.is_empty() => cost::run(what, counts),
        _ => Err("usage: bench_worker target|initiator REGION TRANSPORT engine|plain | cost WHAT COUNT...".into()),
    }
}
