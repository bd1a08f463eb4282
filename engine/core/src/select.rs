//! Choice of a transport per peer: what both sides offer, best first, and why the better ones were passed over.
//!
//! Pure: the engine tells what it started and what discovery said about the peer; connecting is the engine's business.
//!
//! Invariants:
//! * every kind that the engine knows is either a candidate or passed over with a reason;
//! * candidates are in the order in which they are to be tried.

use std::fmt;

use crate::mooncake::descriptor::{NativeExtension, SegmentDescriptor};

/// Which sibling of the transports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TransportKind {
    /// This process's own segment.
    Local,
    /// Memory the peer's engine allocated, mapped here.
    Shm,
    /// Any memory of a process on this host, by `process_vm_readv` and `process_vm_writev`.
    Cma,
    /// TCP, native protocol.
    Tcp,
    /// TCP, Mooncake's protocol.
    MooncakeTcp,
    /// Scripted transport for tests.
    Fake,
}

impl TransportKind {
    /// All kinds, best first.
    pub const ALL: [TransportKind; 6] = [
        TransportKind::Local,
        TransportKind::Shm,
        TransportKind::Cma,
        TransportKind::Tcp,
        TransportKind::MooncakeTcp,
        TransportKind::Fake,
    ];

    /// Name in descriptors, settings, logs and status.
    pub fn name(self) -> &'static str {
        match self {
            TransportKind::Local => "local",
            TransportKind::Shm => "shm",
            TransportKind::Cma => "cma",
            TransportKind::Tcp => "tcp",
            TransportKind::MooncakeTcp => "mooncake-tcp",
            TransportKind::Fake => "fake",
        }
    }

    /// From the name.
    pub fn from_name(name: &str) -> Option<Self> {
        TransportKind::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

impl fmt::Display for TransportKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a transport is not tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PassedOver {
    /// This engine did not start it.
    NotOfferedHere,
    /// Serves only the engine's own segment, and this is another.
    OtherSegment,
    /// The target is the engine's own segment, which needs no connection.
    OwnSegment,
    /// The peer's descriptor has no native extension: it is not a Tidewire engine.
    PeerIsNotNative,
    /// The peer does not list it.
    PeerDoesNotOffer,
    /// The peer is on another host, or in another namespace of it.
    OtherHost,
    /// The peer publishes no port for it.
    NoDataPort,
    /// The peer's segment is of another protocol.
    Protocol(String),
}

impl fmt::Display for PassedOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PassedOver::NotOfferedHere => f.write_str("not started here"),
            PassedOver::OtherSegment => f.write_str("another segment"),
            PassedOver::OwnSegment => f.write_str("own segment"),
            PassedOver::PeerIsNotNative => f.write_str("peer has no native extension"),
            PassedOver::PeerDoesNotOffer => f.write_str("peer does not offer it"),
            PassedOver::OtherHost => f.write_str("peer is on another host"),
            PassedOver::NoDataPort => f.write_str("peer publishes no data port"),
            PassedOver::Protocol(protocol) => write!(f, "peer's segment is of protocol {protocol}"),
        }
    }
}

/// What is to be tried, and what is not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// To be tried in this order; the first that connects wins.
    pub candidates: Vec<TransportKind>,
    /// The others, with the reason.
    pub passed_over: Vec<(TransportKind, PassedOver)>,
}

/// What the choice depends on.
#[derive(Clone, Copy, Debug)]
pub struct Situation<'a> {
    /// Transports this engine started.
    pub offered: &'a [TransportKind],
    /// Identity of this host.
    pub host_id: &'a str,
    /// Whether the target is the engine's own segment.
    pub own_segment: bool,
    /// What discovery said about the target.
    pub descriptor: &'a SegmentDescriptor,
}

/// Orders the transports for one peer.
pub fn choose(situation: Situation<'_>) -> Choice {
    let mut choice = Choice::default();
    for kind in TransportKind::ALL {
        match reject(kind, &situation) {
            None => choice.candidates.push(kind),
            Some(reason) => choice.passed_over.push((kind, reason)),
        }
    }
    choice
}

fn reject(kind: TransportKind, situation: &Situation<'_>) -> Option<PassedOver> {
    if !situation.offered.contains(&kind) {
        return Some(PassedOver::NotOfferedHere);
    }
    match (kind, situation.own_segment) {
        (TransportKind::Fake, _) | (TransportKind::Local, true) => return None,
        (TransportKind::Local, false) => return Some(PassedOver::OtherSegment),
        (_, true) => return Some(PassedOver::OwnSegment),
        _ => {}
    }
    let descriptor = situation.descriptor;
    if kind == TransportKind::MooncakeTcp {
        return reject_mooncake(descriptor);
    }
    let Some(native) = &descriptor.tidewire else { return Some(PassedOver::PeerIsNotNative) };
    if !native.transports.iter().any(|name| name == kind.name()) {
        return Some(PassedOver::PeerDoesNotOffer);
    }
    match kind {
        TransportKind::Tcp => (native.data_port == 0).then_some(PassedOver::NoDataPort),
        _ => (!same_host(situation.host_id, native)).then_some(PassedOver::OtherHost),
    }
}

fn reject_mooncake(descriptor: &SegmentDescriptor) -> Option<PassedOver> {
    if descriptor.protocol != "tcp" {
        return Some(PassedOver::Protocol(descriptor.protocol.clone()));
    }
    (descriptor.tcp_data_port == 0).then_some(PassedOver::NoDataPort)
}

fn same_host(host_id: &str, native: &NativeExtension) -> bool {
    !host_id.is_empty() && host_id == native.host_id
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERYTHING: &[TransportKind] = &TransportKind::ALL;

    fn native(transports: &[&str], host_id: &str) -> SegmentDescriptor {
        SegmentDescriptor {
            protocol: "tcp".to_owned(),
            tcp_data_port: 9,
            tidewire: Some(NativeExtension {
                data_port: 8,
                host_id: host_id.to_owned(),
                transports: transports.iter().map(|t| (*t).to_owned()).collect(),
                ..NativeExtension::default()
            }),
            ..SegmentDescriptor::default()
        }
    }

    fn candidates(offered: &[TransportKind], descriptor: &SegmentDescriptor) -> Vec<TransportKind> {
        choose(Situation { offered, host_id: "h1", own_segment: false, descriptor }).candidates
    }

    const REAL: &[TransportKind] =
        &[TransportKind::Local, TransportKind::Shm, TransportKind::Cma, TransportKind::Tcp, TransportKind::MooncakeTcp];

    #[test]
    fn same_host_peer_gets_memory_before_sockets() {
        let descriptor = native(&["shm", "cma", "tcp"], "h1");
        let expected = [TransportKind::Shm, TransportKind::Cma, TransportKind::Tcp, TransportKind::MooncakeTcp];
        assert_eq!(candidates(REAL, &descriptor), expected);
    }

    #[test]
    fn other_host_gets_sockets_only() {
        let descriptor = native(&["shm", "cma", "tcp"], "h2");
        assert_eq!(candidates(REAL, &descriptor), [TransportKind::Tcp, TransportKind::MooncakeTcp]);
    }

    #[test]
    fn unknown_host_is_never_the_same_host() {
        let descriptor = native(&["shm"], "");
        let choice = choose(Situation { offered: REAL, host_id: "", own_segment: false, descriptor: &descriptor });
        assert!(choice.passed_over.contains(&(TransportKind::Shm, PassedOver::OtherHost)));
    }

    #[test]
    fn mooncake_peer_gets_mooncake_tcp() {
        let descriptor =
            SegmentDescriptor { protocol: "tcp".to_owned(), tcp_data_port: 9, ..SegmentDescriptor::default() };
        assert_eq!(candidates(REAL, &descriptor), [TransportKind::MooncakeTcp]);
    }

    #[test]
    fn rdma_only_peer_is_passed_over_with_its_protocol() {
        let descriptor = SegmentDescriptor { protocol: "rdma".to_owned(), ..SegmentDescriptor::default() };
        let choice = choose(Situation { offered: REAL, host_id: "h1", own_segment: false, descriptor: &descriptor });
        assert!(choice.candidates.is_empty());
        assert!(choice.passed_over.contains(&(TransportKind::MooncakeTcp, PassedOver::Protocol("rdma".to_owned()))));
    }

    #[test]
    fn restriction_on_our_side_is_respected() {
        let descriptor = native(&["shm", "cma", "tcp"], "h1");
        assert_eq!(candidates(&[TransportKind::Tcp], &descriptor), [TransportKind::Tcp]);
    }

    #[test]
    fn own_segment_needs_no_connection() {
        let descriptor = native(&["shm", "cma", "tcp"], "h1");
        let choice = choose(Situation { offered: REAL, host_id: "h1", own_segment: true, descriptor: &descriptor });
        assert_eq!(choice.candidates, [TransportKind::Local]);
    }

    #[test]
    fn every_kind_is_accounted_for() {
        for own_segment in [true, false] {
            let descriptor = native(&["tcp"], "h1");
            let choice = choose(Situation { offered: EVERYTHING, host_id: "h1", own_segment, descriptor: &descriptor });
            assert_eq!(choice.candidates.len() + choice.passed_over.len(), TransportKind::ALL.len());
        }
    }

    #[test]
    fn names_round_trip() {
        for kind in TransportKind::ALL {
            assert_eq!(TransportKind::from_name(kind.name()), Some(kind));
        }
        assert_eq!(TransportKind::from_name("rdma"), None);
    }
}
