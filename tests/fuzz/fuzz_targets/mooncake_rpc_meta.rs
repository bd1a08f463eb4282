//! libFuzzer entry of `mooncake_rpc_meta`.
#![no_main]
#![allow(missing_docs, reason = "the macro defines the entry")]

#[path = "../targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::mooncake_rpc_meta(data));
