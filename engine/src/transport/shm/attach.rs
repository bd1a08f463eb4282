//! Attaching to a peer: the hello, the checks of who is there, and the first grants.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, PoisonError},
    time::Instant,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, getuid, pidfd_open},
};
use tidewire_core::{
    ByteRange, Generation, TransferError,
    local::{Message, VERSION},
    mooncake::descriptor::NativeExtension,
};

use super::{
    client::{Attachment, Client},
    reactor::Shared,
    socket::{Channel, Packet, Received, connect_to, receive, send_packet},
};
use crate::{
    memory::lock,
    shm::{ControlPage, RemoteProcess, peer_credentials},
    transport::{Peer, TransportKind, cma},
};

/// Published buffers whose grants are fetched while attaching; those of further ones come with their first slice.
const AHEAD_MAX: usize = 256;
/// Bytes of mappings that are entered into the page table while attaching.
const POPULATE_MAX_BYTES: u64 = 1 << 30;

impl Client {
    /// Attaches to `peer` before `deadline`.
    ///
    /// # Errors
    /// [`TransferError::Unavailable`] when this way does not lead there; [`TransferError::Unreachable`],
    /// [`TransferError::HandshakeRefused`] or [`TransferError::Protocol`] when it should have.
    pub(super) fn attach(
        shared: &Arc<Shared>,
        peer: Arc<Peer>,
        kind: TransportKind,
        host_id: &str,
        deadline: Instant,
    ) -> Result<Arc<Self>, TransferError> {
        let unavailable = |reason: String| {
            let what = format!("{} to segment {}", kind.name(), peer.segment);
            TransferError::Unavailable { what, reason }
        };
        if kind == TransportKind::Cma && !shared.options.allow_cma {
            return Err(unavailable("turned off here".to_owned()));
        }
        let offer = offer_of(&peer, kind, host_id).map_err(unavailable)?;
        let unreachable = |reason: String| TransferError::Unreachable {
            segment: peer.segment.clone(),
            peer: peer.address.clone(),
            transport: kind.name(),
            reason,
        };
        let socket = connect_to(&offer.local_socket).map_err(|e| unreachable(format!("unix socket: {e}")))?;
        let who = peer_credentials(socket.as_fd()).map_err(|e| unreachable(e.to_string()))?;
        let own = getuid().as_raw();
        if who.uid != own && who.uid != 0 && own != 0 {
            return Err(unavailable(format!("peer belongs to user {}, this process to {own}", who.uid)));
        }
        if offer.pid != 0 && u32::try_from(who.pid) != Ok(offer.pid) {
            return Err(unreachable(format!("process {} answers in the place of {}", who.pid, offer.pid)));
        }
        let pidfd = Pid::from_raw(who.pid).ok_or_else(|| unreachable("peer is in another pid namespace".to_owned()));
        let pidfd = pidfd_open(pidfd?, PidfdFlags::empty()).map_err(|e| unreachable(format!("pidfd_open: {e}")))?;
        let hello = hello_of(shared, offer).map_err(unavailable)?;
        send_packet(socket.as_fd(), &Packet::new(&hello)).map_err(|e| unreachable(e.to_string()))?;
        let (answer, file) = wait_answer(&socket, deadline).map_err(|e| unreachable(e.to_string()))?;
        let broken = |reason: &str| TransferError::Protocol { peer: peer.address.clone(), reason: reason.to_owned() };
        let (pid, probe_addr, probe_word) = match answer {
            Message::Welcome { pid, probe_addr, probe_word } => (pid, probe_addr, probe_word),
            Message::Refuse { reason } => {
                let (segment, peer) = (peer.segment.clone(), peer.address.clone());
                return Err(TransferError::HandshakeRefused { segment, peer, reason });
            }
            _ => return Err(broken("same-host hello answered with another message")),
        };
        let file = file.ok_or_else(|| broken("same-host welcome without a control page"))?;
        if u32::try_from(who.pid) != Ok(pid) {
            return Err(unavailable(format!("process {} calls itself {pid}: different pid namespaces", who.pid)));
        }
        let control = ControlPage::attach(file.as_fd()).map_err(|e| broken(&e.to_string()))?;
        if control.probe_word() != probe_word {
            return Err(broken("control page is not the one announced"));
        }
        let process = RemoteProcess::new(who.pid);
        let offered = offer.transports.iter().any(|t| t == TransportKind::Cma.name());
        let cma = match (shared.options.allow_cma, offered) {
            (false, _) => Err("turned off here".to_owned()),
            (_, false) => Err("not offered by the peer".to_owned()),
            _ => cma::probe(process, probe_addr, probe_word),
        };
        if let (TransportKind::Cma, Err(reason)) = (kind, &cma) {
            return Err(unavailable(reason.clone()));
        }
        let to = Attachment { kind, peer: Arc::clone(&peer), pid: who.pid, process, pidfd, control, cma };
        Client::start(shared, socket, to, deadline).map_err(|e| unreachable(e.to_string()))
    }

    /// Hands the connection to `tw-local` and fetches the first grants.
    fn start(shared: &Arc<Shared>, socket: OwnedFd, to: Attachment, deadline: Instant) -> io::Result<Arc<Self>> {
        let key = shared.new_key();
        let channel = Channel::new(socket, &shared.poller, key, false)?;
        shared.poller.add(&to.pidfd, key | 1)?;
        let client = Arc::new(Client::new(shared, key, channel, to));
        // Events before this line find no client; both descriptors are level-triggered, so they come again.
        shared.add_client(key, &client);
        let descriptor = Arc::clone(&client.to.peer.descriptor);
        let buffers = descriptor.buffers.iter().filter_map(|b| ByteRange::new(b.addr, b.length)).take(AHEAD_MAX);
        let mut state = lock(&client.state);
        buffers.for_each(|range| client.ask(&mut state, range, None));
        while !state.asks.is_empty() && state.ended.is_none() {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { break };
            state = client.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        let grants = state.grants.all();
        drop(state);
        let mut budget = POPULATE_MAX_BYTES;
        for grant in grants {
            if let Some(mapping) = grant.mapping.as_ref().filter(|_| grant.region.len() <= budget) {
                mapping.populate();
                budget -= grant.region.len();
            }
        }
        Ok(client)
    }
}

/// The peer's side of the bargain, or why there is none.
fn offer_of<'a>(peer: &'a Peer, kind: TransportKind, host_id: &str) -> Result<&'a NativeExtension, String> {
    let offer = peer.descriptor.tidewire.as_ref().ok_or("peer is not a Tidewire engine")?;
    if !offer.transports.iter().any(|t| t == kind.name()) || offer.local_socket.is_empty() {
        return Err("not offered by the peer".to_owned());
    }
    if offer.host_id != host_id {
        return Err(format!("peer is on host {}, this is {host_id}", offer.host_id));
    }
    Ok(offer)
}

fn hello_of(shared: &Shared, offer: &NativeExtension) -> Result<Message, String> {
    let token = u128::from_str_radix(&offer.token, 16).ok().filter(|_| offer.token.len() == 32);
    let generation = u64::from_str_radix(&offer.generation, 16);
    Ok(Message::Hello {
        version: VERSION,
        generation: Generation(generation.map_err(|e| format!("generation in the descriptor: {e}"))?),
        token: token.ok_or("token in the descriptor is not 32 hex digits")?.to_be_bytes(),
        name: shared.service.identity.segment.clone(),
    })
}

fn wait_answer(socket: &OwnedFd, deadline: Instant) -> io::Result<(Message, Option<OwnedFd>)> {
    loop {
        let left = deadline.checked_duration_since(Instant::now()).ok_or(io::ErrorKind::TimedOut)?;
        let left =
            Timespec { tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&left)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        match receive(socket.as_fd())? {
            Received::Message(message, file) => return Ok((message, file)),
            Received::Nothing => {}
            Received::Closed => return Err(io::ErrorKind::ConnectionReset.into()),
        }
    }
}
