//! Makes links: tries the transports that both sides offer, best first, and keeps the reason of every refusal.
//!
//! A refusal that a restart of the peer explains (generation, token, nobody there) has the descriptor read again, once
//! per attempt. Runs on the thread of the caller that needs the link.

use std::{sync::Arc, time::Duration};

use tidewire_core::{
    TransferError, TransportKind,
    error::RefuseReason,
    select::{Choice, Situation, choose},
};

use super::{
    discovery::{Discovery, Resolved},
    remote::{Links, Path},
};
use crate::{
    observe::Counters,
    runtime::ctl::Ctl,
    transport::{Identity, Link, Peer, Transport},
};

/// What an attempt gave.
#[derive(Debug)]
pub struct Outcome {
    /// The links, or why there are none.
    pub links: Result<Links, TransferError>,
    /// The descriptor that was read on the way, if any.
    pub fresh: Option<Resolved>,
}

/// Makes links for one engine.
#[derive(Debug)]
pub struct Connector {
    /// Who this engine is.
    pub identity: Arc<Identity>,
    /// Transports that were started.
    pub transports: Vec<Arc<dyn Transport>>,
    /// Kinds that links may be made over.
    pub offered: Vec<TransportKind>,
    /// For reading a descriptor again.
    pub discovery: Arc<Discovery>,
    /// Where discovery runs.
    pub ctl: Arc<Ctl>,
    /// Sums.
    pub counters: Arc<Counters>,
}

impl Connector {
    /// Looks a segment up on the control thread. Blocks within the limits of the store.
    ///
    /// # Errors
    /// As [`Discovery::resolve`].
    pub fn resolve(&self, name: &str) -> Result<Resolved, TransferError> {
        let (discovery, segment) = (Arc::clone(&self.discovery), name.to_owned());
        let limit = 2 * self.discovery.timeout + Duration::from_secs(1);
        let found = self.ctl.run(limit, async move { discovery.resolve(&segment).await });
        found.unwrap_or_else(|error| {
            Err(TransferError::Metadata { store: self.discovery.store.describe(), reason: error.to_string() })
        })
    }

    /// Makes the first link that can be made. `stale` has the descriptor read again first; if the store cannot say, what
    /// is known is tried.
    pub fn connect(&self, mut resolved: Resolved, stale: bool) -> Outcome {
        let mut outcome = Outcome { links: Err(TransferError::Cancelled), fresh: None };
        let asked = stale;
        if stale {
            match self.resolve(&resolved.name) {
                Ok(fresh) => {
                    let changed = fresh.generation != resolved.generation;
                    outcome.fresh = Some(fresh.clone());
                    if changed && resolved.generation.is_some() {
                        // The segment refuses submits until it is opened again; there is nothing to connect for.
                        return outcome;
                    }
                    resolved = fresh;
                }
                Err(error @ TransferError::SegmentNotFound { .. }) if !self.discovery.p2p => {
                    outcome.links = Err(error);
                    return outcome;
                }
                Err(error) => tracing::debug!(segment = %resolved.name, %error, "descriptor was not read again"),
            }
        }
        outcome.links = self.try_all(&resolved);
        let explained = outcome.links.as_ref().err().is_some_and(is_explained_by_restart);
        if explained && !asked {
            return self.connect_fresh(resolved, outcome);
        }
        outcome
    }

    fn connect_fresh(&self, resolved: Resolved, mut outcome: Outcome) -> Outcome {
        let Ok(fresh) = self.resolve(&resolved.name) else { return outcome };
        let same_life = fresh.generation == resolved.generation || resolved.generation.is_none();
        if same_life && (fresh.address != resolved.address || *fresh.descriptor != *resolved.descriptor) {
            outcome.links = self.try_all(&fresh);
        }
        outcome.fresh = Some(fresh);
        outcome
    }

    fn try_all(&self, resolved: &Resolved) -> Result<Links, TransferError> {
        let choice = self.choice(resolved);
        let mut refusals: Vec<(TransportKind, TransferError)> = Vec::new();
        let mut rest = choice.candidates.iter().copied();
        while let Some(kind) = rest.next() {
            match self.try_one(kind, resolved) {
                Ok(path) => {
                    let reason = describe(kind, &choice, &refusals);
                    tracing::info!(segment = %resolved.name, peer = %resolved.address, transport = %kind, reason, "connected");
                    Counters::add(&self.counters.links, 1);
                    return Ok(Links { paths: vec![path], rest: rest.collect(), reason });
                }
                Err(error) => refusals.push((kind, error)),
            }
        }
        Counters::add(&self.counters.link_errors, 1);
        Err(self.no_transport(resolved, &choice, refusals))
    }

    /// The same links with one more path, for ranges that the present ones do not take. If no other transport connects,
    /// nothing is left to try.
    pub fn extend(&self, resolved: &Resolved, links: &Links) -> Links {
        let (mut paths, mut reason) = (links.paths.clone(), links.reason.clone());
        let mut rest = links.rest.iter().copied();
        for kind in rest.by_ref() {
            match self.try_one(kind, resolved) {
                Ok(path) => {
                    tracing::info!(segment = %resolved.name, transport = %kind, "second link, for ranges the first does not take");
                    paths.push(path);
                    reason = format!("{reason}; {kind} for ranges that it does not take");
                    break;
                }
                Err(error) => reason = format!("{reason}; not {kind}: {error}"),
            }
        }
        Links { paths, rest: rest.collect(), reason }
    }

    fn try_one(&self, kind: TransportKind, resolved: &Resolved) -> Result<Path, TransferError> {
        let missing = TransferError::Internal { reason: "chosen transport was not started" };
        let transport = self.transports.iter().find(|t| t.kind() == kind).ok_or(missing)?;
        let peer = Peer {
            segment: resolved.name.clone(),
            address: resolved.address.to_string(),
            descriptor: Arc::clone(&resolved.descriptor),
        };
        let link: Arc<dyn Link> = transport.connect(Arc::new(peer))?;
        Ok(Path { link, capabilities: transport.capabilities() })
    }

    fn choice(&self, resolved: &Resolved) -> Choice {
        choose(Situation {
            offered: &self.offered,
            host_id: &self.identity.host_id,
            own_segment: resolved.generation == Some(self.identity.generation),
            descriptor: &resolved.descriptor,
        })
    }

    fn no_transport(
        &self,
        resolved: &Resolved,
        choice: &Choice,
        refusals: Vec<(TransportKind, TransferError)>,
    ) -> TransferError {
        let expected = |error: &TransferError| !matches!(error, TransferError::Unavailable { .. });
        if let Some((_, error)) = refusals.iter().rev().find(|(_, error)| expected(error)) {
            return error.clone();
        }
        let refused = refusals.iter().map(|(kind, error)| format!("{kind}: {error}"));
        let passed = choice.passed_over.iter().map(|(kind, reason)| format!("{kind}: {reason}"));
        let reasons = refused.chain(passed).collect::<Vec<_>>().join("; ");
        TransferError::NoTransport { segment: resolved.name.clone(), reasons }
    }
}

fn is_explained_by_restart(error: &TransferError) -> bool {
    matches!(
        error,
        TransferError::HandshakeRefused { reason: RefuseReason::Generation | RefuseReason::Token, .. }
            | TransferError::Unreachable { .. }
            | TransferError::PeerDown { .. }
    )
}

/// Why `kind` was chosen: what is better and why it was not.
fn describe(kind: TransportKind, choice: &Choice, refusals: &[(TransportKind, TransferError)]) -> String {
    let better = |other: &TransportKind| *other < kind && *other != TransportKind::Local;
    let refused = refusals.iter().map(|(other, error)| format!("not {other}: {error}"));
    let passed = choice.passed_over.iter().filter(|(other, _)| better(other));
    let passed = passed.map(|(other, reason)| format!("not {other}: {reason}"));
    let reasons: Vec<String> = refused.chain(passed).collect();
    match (reasons.is_empty(), kind) {
        (true, TransportKind::Local) => "own segment".to_owned(),
        (true, _) => "best that both sides offer".to_owned(),
        (false, _) => reasons.join("; "),
    }
}
