//! libFuzzer entry of `local_message`.
#![no_main]
#![allow(missing_docs, reason = "the macro defines the entry")]

#[path = "../targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::local_message(data));
