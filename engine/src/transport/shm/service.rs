//! Owner side: peers attached to this engine's memory, what each was granted, and how a grant is taken back.
//!
//! Invariants:
//! * a grant exists only for a region that was not revoked when it was made (it is made under the lock that
//!   [`Service::revoke`] takes afterwards);
//! * a slot is used again only when its peer left it or is dead;
//! * a peer is dead when its pidfd says so, never because its socket closed: a closed socket may have live threads behind
//!   it.

use std::{
    collections::HashMap,
    io,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::io::fcntl_dupfd_cloexec;
use tidewire_core::{
    ByteRange, TransferError,
    error::RefuseReason,
    local::{DenyReason, Message, VERSION},
};

use super::socket::{Channel, Packet};
use crate::{
    memory::{ForeignAccess, LocalRegion, RegionTable, lock},
    shm::{ControlPage, SLOTS},
    transport::Identity,
};

/// A peer that attached, or is about to.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) channel: Channel,
    pub(super) pid: i32,
    /// Readable when the process is dead.
    pub(super) pidfd: OwnedFd,
    /// By when it must have said hello.
    pub(super) hello_deadline: Instant,
    /// Hung up on, and listed only until it left the regions it is inside of.
    closing: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Set once the hello was good.
    control: Option<Arc<ControlPage>>,
    /// By address of the region.
    grants: HashMap<u64, Granted>,
    /// Revoked, but perhaps still in use.
    leaving: Vec<Granted>,
    free: Vec<(u32, u64)>,
    next_slot: u32,
    dead: bool,
}

#[derive(Clone, Debug)]
struct Granted {
    region: Weak<LocalRegion>,
    slot: u32,
    sequence: u64,
    /// The peer reaches the region through its file only.
    by_file: bool,
    /// The file under the region was replaced: what the peer still does is of no effect.
    fenced: bool,
}

impl Granted {
    fn is_of(&self, region: &Arc<LocalRegion>) -> bool {
        std::ptr::eq(self.region.as_ptr(), Arc::as_ptr(region))
    }
}

impl Attached {
    pub(super) fn new(channel: Channel, pid: i32, pidfd: OwnedFd, hello_deadline: Instant) -> Self {
        Attached { channel, pid, pidfd, hello_deadline, closing: AtomicBool::new(false), state: Mutex::default() }
    }

    /// Whether the hello is still to come.
    pub(super) fn is_strange(&self) -> bool {
        lock(&self.state).control.is_none()
    }

    /// Whether it was hung up on.
    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Hangs up. No second time is of any effect.
    pub(super) fn close(&self) {
        if !self.closing.swap(true, Ordering::AcqRel) {
            self.channel.close();
        }
    }

    /// Takes every grant back; whether the peer left all of them.
    pub(super) fn revoke_all(&self) -> bool {
        let mut state = lock(&self.state);
        let state = &mut *state;
        let Some(control) = &state.control else { return true };
        for (_, granted) in state.grants.drain() {
            control.revoke(granted.slot, granted.sequence);
            state.leaving.push(granted);
        }
        state.leaving.iter().all(|g| control.is_idle(g.slot))
    }

    /// The process is dead: nobody is inside any more.
    pub(super) fn mark_dead(&self) {
        self.revoke_all();
        let mut state = lock(&self.state);
        state.dead = true;
        if let Some(control) = &state.control {
            state.leaving.iter().for_each(|g| control.clear(g.slot));
        }
    }

    /// Whether the peer still holds the region, and if so whether only through the file.
    fn holds(&self, region: &Arc<LocalRegion>) -> Option<bool> {
        let state = lock(&self.state);
        let control = state.control.as_ref().filter(|_| !state.dead)?;
        let mut held = state.leaving.iter().filter(|g| g.is_of(region) && !g.fenced && !control.is_idle(g.slot));
        let first = held.next()?;
        Some(first.by_file && held.all(|g| g.by_file))
    }
}

/// The owner side of one engine.
#[derive(Debug)]
pub(super) struct Service {
    pub(super) identity: Arc<Identity>,
    pub(super) regions: Arc<RegionTable>,
    pub(super) attached: Mutex<HashMap<u64, Arc<Attached>>>,
    /// Evictions that had to replace a file.
    pub(super) fences: AtomicU64,
    /// Nothing is granted any more.
    pub(super) gated: AtomicBool,
}

impl Service {
    fn peers(&self) -> Vec<Arc<Attached>> {
        lock(&self.attached).values().cloned().collect()
    }

    /// Handles one message of a peer.
    ///
    /// # Errors
    /// Why the connection is to be closed.
    pub(super) fn handle(&self, peer: &Attached, message: Message) -> io::Result<()> {
        match message {
            Message::Hello { version, generation, token, name } => {
                if !peer.is_strange() {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "second hello"));
                }
                let refused = if version != VERSION {
                    Some(RefuseReason::Version)
                } else if token != self.identity.token {
                    Some(RefuseReason::Token)
                } else {
                    (generation != self.identity.generation).then_some(RefuseReason::Generation)
                };
                if let Some(reason) = refused {
                    peer.channel.send(Packet::new(&Message::Refuse { reason }))?;
                    return Err(io::Error::new(io::ErrorKind::PermissionDenied, reason.to_string()));
                }
                self.welcome(peer)?;
                tracing::debug!(peer = %name, pid = peer.pid, "same-host peer attached");
                Ok(())
            }
            Message::Ask { id, range, want_file } if !peer.is_strange() => {
                let answer = self.answer(peer, id, range, want_file);
                peer.channel.send(answer)
            }
            Message::Release { slot, sequence } if !peer.is_strange() => {
                self.release(peer, slot, sequence);
                Ok(())
            }
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "message out of place")),
        }
    }

    fn welcome(&self, peer: &Attached) -> io::Result<()> {
        let mut word = [0u8; 8];
        getrandom::fill(&mut word).map_err(io::Error::other)?;
        let (control, file) = ControlPage::create(u64::from_ne_bytes(word))?;
        let message = Message::Welcome {
            pid: std::process::id(),
            probe_addr: control.probe_addr(),
            probe_word: control.probe_word(),
        };
        lock(&peer.state).control = Some(Arc::new(control));
        peer.channel.send(Packet::with_file(&message, file))
    }

    fn answer(&self, peer: &Attached, id: u64, range: ByteRange, want_file: bool) -> Packet {
        let deny = |reason| Packet::new(&Message::Deny { id, reason });
        let Some(region) = self.regions.find(range) else { return deny(DenyReason::NotRegistered) };
        let mut state = lock(&peer.state);
        let state = &mut *state;
        // Under the lock: a region that can be pinned now will be revoked, if at all, after the grant is listed.
        let Some(_pin) = region.pin() else { return deny(DenyReason::NotRegistered) };
        // Read under the lock that `shut` takes after it closed the gate.
        let control = state.control.as_ref().filter(|_| !self.gated.load(Ordering::SeqCst));
        let Some(control) = control else { return deny(DenyReason::Failed) };
        let file = match region.backing().filter(|_| want_file).map(|b| (b, fcntl_dupfd_cloexec(b.file(), 0))) {
            Some((backing, Ok(file))) => Some((file, backing.file_offset())),
            Some((_, Err(error))) => {
                tracing::warn!(%error, "no descriptor for a same-host grant");
                return deny(DenyReason::Failed);
            }
            None => None,
        };
        let by_file = file.is_some();
        // The same region under the same terms is the same grant; under others the peer starts over.
        let addr = region.range().addr();
        let good = state.grants.get(&addr).filter(|g| g.is_of(&region) && g.by_file == by_file).cloned();
        let granted = match good {
            Some(granted) => granted,
            None => {
                if let Some(old) = state.grants.remove(&addr) {
                    control.revoke(old.slot, old.sequence);
                    state.leaving.push(old);
                }
                let Some((slot, after)) = take_slot(control, &mut state.free, &mut state.leaving, &mut state.next_slot)
                else {
                    return deny(DenyReason::Limit);
                };
                let sequence = control.grant(slot, after);
                let region = Arc::downgrade(&region);
                let granted = Granted { region, slot, sequence, by_file, fenced: false };
                state.grants.insert(addr, granted.clone());
                granted
            }
        };
        let message = Message::Grant {
            id,
            slot: granted.slot,
            sequence: granted.sequence,
            region: region.range(),
            file_offset: file.as_ref().map(|(_, offset)| *offset),
        };
        match file {
            Some((file, _)) => Packet::with_file(&message, file),
            None => Packet::new(&message),
        }
    }

    fn release(&self, peer: &Attached, slot: u32, sequence: u64) {
        let mut state = lock(&peer.state);
        let state = &mut *state;
        let Some(control) = &state.control else { return };
        let addr = state.grants.iter().find(|(_, g)| g.slot == slot && g.sequence == sequence).map(|(addr, _)| *addr);
        if let Some(granted) = addr.and_then(|addr| state.grants.remove(&addr)) {
            control.revoke(slot, sequence);
            state.leaving.push(granted);
        }
    }

    /// Grants nothing any more, takes every grant back and waits until the peers left, at most until `deadline`. Processes
    /// that did not are logged: one that copies by address may still write where the engine's regions were.
    pub(super) fn shut(&self, deadline: Instant) {
        self.gated.store(true, Ordering::SeqCst);
        for peer in self.peers() {
            if peer.revoke_all() {
                continue;
            }
            let (control, slots) = {
                let state = lock(&peer.state);
                (state.control.clone(), state.leaving.iter().map(|g| g.slot).collect::<Vec<_>>())
            };
            let left = control.is_none_or(|c| slots.into_iter().all(|slot| c.wait_idle(slot, deadline)));
            if !left {
                tracing::warn!(pid = peer.pid, "same-host peer is inside a region while the engine shuts down");
            }
        }
    }

    /// Ends what stands between `region` and its release, after its accesses were waited for in vain: replaces the file
    /// under the region if every peer that still holds it does so through the file. Operations of this process on the
    /// region get `drain` to end before that, since what they write meanwhile would be lost.
    ///
    /// # Errors
    /// Text naming the process that holds it.
    pub(super) fn evict(&self, region: &Arc<LocalRegion>, drain: Duration) -> Result<(), String> {
        let peers = self.peers();
        let holders: Vec<_> = peers.iter().filter_map(|p| p.holds(region).map(|by_file| (p, by_file))).collect();
        if holders.is_empty() {
            return Ok(());
        }
        if let Some((peer, _)) = holders.iter().find(|(_, by_file)| !by_file) {
            return Err(format!("process {}, which copies by address (cma) and cannot be fenced", peer.pid));
        }
        let pids = holders.iter().map(|(p, _)| p.pid.to_string()).collect::<Vec<_>>().join(", ");
        let backing = region.backing().ok_or_else(|| format!("process {pids}"))?;
        let extent = backing.extent().ok_or_else(|| format!("process {pids} (memory cannot be fenced)"))?;
        let shared = self.regions.snapshot().iter().any(|r| !Arc::ptr_eq(r, region) && r.range().overlaps(extent));
        if shared {
            return Err(format!("process {pids} (allocation holds other registered buffers and cannot be fenced)"));
        }
        if !region.wait_unpinned(Instant::now() + drain) {
            return Err(format!("process {pids} (cannot be fenced while operations of this process use the buffer)"));
        }
        backing.fence().map_err(|e: TransferError| format!("process {pids} (fence failed: {e})"))?;
        for (peer, _) in &holders {
            for granted in lock(&peer.state).leaving.iter_mut().filter(|g| g.is_of(region)) {
                granted.fenced = true;
            }
        }
        self.fences.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(range = %region.range(), pids, "same-host peers did not let go, their mapping was cut off");
        Ok(())
    }
}

impl ForeignAccess for Service {
    fn revoke(&self, region: &Arc<LocalRegion>) {
        let addr = region.range().addr();
        for peer in self.peers() {
            let mut state = lock(&peer.state);
            let state = &mut *state;
            let Some(control) = &state.control else { continue };
            if !state.grants.get(&addr).is_some_and(|g| g.is_of(region)) {
                continue;
            }
            let Some(granted) = state.grants.remove(&addr) else { continue };
            let (slot, sequence) = (granted.slot, granted.sequence);
            control.revoke(slot, sequence);
            state.leaving.push(granted);
            // Only tells the peer to unmap; the revocation is in the page already.
            if let Err(error) = peer.channel.send(Packet::new(&Message::Revoke { slot, sequence })) {
                tracing::debug!(%error, pid = peer.pid, "same-host peer not told of a revocation");
            }
        }
    }

    fn wait_idle(&self, region: &Arc<LocalRegion>, deadline: Instant) -> bool {
        self.peers().iter().all(|peer| {
            let (control, slots) = {
                let state = lock(&peer.state);
                let held = state.leaving.iter().filter(|g| g.is_of(region) && !g.fenced);
                (state.control.clone(), held.map(|g| g.slot).collect::<Vec<_>>())
            };
            control.is_none_or(|control| {
                slots.into_iter().all(|slot| control.wait_idle(slot, deadline) || lock(&peer.state).dead)
            })
        })
    }
}

/// A slot nobody is in, with the last sequence it had.
fn take_slot(
    control: &ControlPage,
    free: &mut Vec<(u32, u64)>,
    leaving: &mut Vec<Granted>,
    next: &mut u32,
) -> Option<(u32, u64)> {
    if free.is_empty() {
        leaving.retain(|g| {
            let left = control.is_idle(g.slot);
            if left {
                free.push((g.slot, g.sequence));
            }
            !left
        });
    }
    free.pop().or_else(|| {
        let slot = *next;
        (slot < SLOTS).then(|| {
            *next += 1;
            (slot, 0)
        })
    })
}
