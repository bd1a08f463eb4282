//! A thousand connections that say nothing, on one port: others are served as before.

use std::{
    net::TcpStream,
    time::{Duration, Instant},
};

use tidewire_engine::{TransferEngine, runtime::descriptors::raise_limit};

use super::{
    strangers::{connect, exercise, ports},
    target::engine,
};

const CONNECTIONS: usize = 1000;

/// Middle of several transfers and probes.
fn median(near: &TransferEngine, far: &TransferEngine) -> Duration {
    let mut times: Vec<_> = (0..9).map(|_| exercise(near, far)).collect();
    times.sort();
    times[times.len() / 2]
}

fn crowd(name: &str, port: impl Fn(&TransferEngine) -> u16) {
    // Both ends of each connection are in this process.
    if raise_limit().is_some_and(|limit| limit < 5_000) {
        println!("SKIP a thousand connections: the hard limit on open descriptors is below 5000");
        return;
    }
    let (near, far) = (engine("tcp"), engine("tcp"));
    exercise(&near, &far);
    let alone = median(&near, &far);
    let held: Vec<TcpStream> = (0..CONNECTIONS).map(|_| connect(port(&far))).collect();
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut crowded = median(&near, &far);
    // This machine may be busy with something else for a while; a crowd that is in the way stays in the way.
    while crowded > alone * 3 + Duration::from_millis(20) && Instant::now() < deadline {
        crowded = crowded.min(median(&near, &far));
    }
    println!("{name}: alone {alone:?}, among {} idle connections {crowded:?}", held.len());
    assert!(crowded <= alone * 3 + Duration::from_millis(20), "{name}: alone {alone:?}, crowded {crowded:?}");
}

#[test]
fn a_thousand_idle_connections_on_the_native_port_delay_nobody() {
    crowd("native port", |far| ports(far).native);
}

#[test]
fn a_thousand_idle_connections_on_the_control_port_delay_nobody() {
    crowd("control port", |far| ports(far).control);
}
