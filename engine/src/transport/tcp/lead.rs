//! Who drives a link: a waiting caller, or the event loops once it is detached.

use std::{
    os::fd::AsFd,
    sync::{
        Arc, Weak,
        atomic::{Ordering, fence},
    },
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, epoll::EventFlags, poll};

use super::{
    link::{Settled, Stream, StreamState, TcpLink},
    reactor::{Next, Source},
};
use crate::{
    batch::BatchCore,
    memory::lock,
    transport::{Drive, Link},
};

/// Longest sleep of a leader between looks at heartbeats.
const LOOK: Duration = Duration::from_millis(50);

impl TcpLink {
    /// Drives the link until `batch` is settled, or waits for whoever does.
    pub(super) fn lead_or_wait(&self, batch: &Arc<BatchCore>, how: Drive) -> bool {
        loop {
            if batch.is_settled() {
                return true;
            }
            if Instant::now() >= how.deadline {
                return false;
            }
            if self.try_lead(batch, how) {
                continue;
            }
            lock(&self.waiters).push(Arc::clone(batch));
            // The leader may have left before it could see us.
            if !self.try_lead(batch, how) {
                batch.park(how.deadline);
            }
            lock(&self.waiters).retain(|b| !Arc::ptr_eq(b, batch));
            if batch.is_settled() || Instant::now() >= how.deadline {
                // The lead may have been offered to this waiter, which leaves.
                self.pass_on(batch);
            }
        }
    }

    /// Leads until `batch` is settled or the deadline passed; false if another thread leads.
    fn try_lead(&self, batch: &Arc<BatchCore>, how: Drive) -> bool {
        let Ok(guard) = self.lead.try_lock() else { return false };
        self.attach();
        self.lead_until(batch, how);
        drop(guard);
        self.pass_on(batch);
        true
    }

    fn lead_until(&self, batch: &Arc<BatchCore>, how: Drive) {
        let mut settled = Settled::new();
        let mut spin_until = (!how.spin.is_zero()).then(|| Instant::now() + how.spin);
        let mut looked = Instant::now();
        loop {
            let seen = self.step_all(&mut settled);
            if batch.is_settled() {
                return;
            }
            let now = Instant::now();
            if now >= how.deadline {
                return;
            }
            if now.duration_since(looked) >= LOOK {
                looked = now;
                self.look(now);
                continue;
            }
            if seen.heard {
                // Something comes in: what polls for the rest pays.
                spin_until = spin_until.map(|_| now + how.spin);
            }
            match spin_until {
                // Receiving takes the lock of the socket, which keeps bulk data from coming in; asking `poll` does not.
                Some(until) if now < until && seen.bulk => self.wait_ready(Duration::ZERO),
                Some(until) if now < until => std::hint::spin_loop(),
                _ => self.sleep(how.deadline),
            }
        }
    }

    /// One pass over all streams.
    fn step_all(&self, settled: &mut Settled) -> Seen {
        let mut seen = Seen::default();
        for stream in &self.streams {
            let outcome = {
                let mut state = lock(&stream.state);
                if !state.conn.as_ref().is_some_and(|c| c.expects() || c.wants_write()) {
                    continue;
                }
                let outcome = self.step(stream, &mut state, settled);
                seen.bulk |= state.conn.as_ref().is_some_and(|c| c.expects_bulk());
                outcome
            };
            match outcome {
                Ok(heard) => seen.heard |= heard,
                Err(failure) => {
                    self.settle(settled);
                    self.fail(failure);
                    return Seen::default();
                }
            }
        }
        self.pump();
        self.settle(settled);
        seen
    }

    /// Sleeps until a stream is ready, somebody kicks, or it is time to look at the heartbeats.
    pub(super) fn sleep(&self, deadline: Instant) {
        self.wait_ready(deadline.saturating_duration_since(Instant::now()).min(LOOK));
    }

    /// Waits at most `wait` for a stream to be ready.
    fn wait_ready(&self, wait: Duration) {
        // Before the set is made: who sends after that on a stream that is not in it sees the flag and kicks.
        self.sleeping.store(true, Ordering::SeqCst);
        // Each descriptor is kept open by its own count, for another thread may take the connection down meanwhile.
        let mut raw = Vec::with_capacity(self.streams.len());
        for stream in &self.streams {
            let state = lock(&stream.state);
            if let Some(conn) = state.conn.as_ref().filter(|c| c.expects() || c.wants_write()) {
                let mut flags = PollFlags::IN;
                flags.set(PollFlags::OUT, conn.wants_write());
                raw.push((Arc::clone(&conn.socket), flags));
            }
        }
        let mut fds: Vec<PollFd<'_>> =
            raw.iter().map(|(fd, flags)| PollFd::from_borrowed_fd(fd.as_fd(), *flags)).collect();
        fds.push(PollFd::from_borrowed_fd(self.kick.as_fd(), PollFlags::IN));
        let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(wait.subsec_nanos()) };
        // Interrupted or not: the caller looks at everything again.
        let _ = poll(&mut fds, Some(&timeout));
        self.sleeping.store(false, Ordering::Relaxed);
        if fds.last().is_some_and(|fd| !fd.revents().is_empty()) {
            let mut count = [0; 8];
            let _ = rustix::io::read(&self.kick, &mut count);
        }
    }

    /// Wakes a leader that sleeps.
    pub(super) fn kick(&self) {
        // An eventfd that cannot take more is readable already.
        let _ = rustix::io::write(&self.kick, &1u64.to_ne_bytes());
    }

    /// Whether a leader sleeps that may not know of bytes to be sent.
    pub(super) fn leader_sleeps(&self) -> bool {
        self.sleeping.load(Ordering::SeqCst)
    }

    /// After leading: another waiter takes over, or the loops do.
    fn pass_on(&self, batch: &Arc<BatchCore>) {
        if self.open_slices() == 0 {
            return;
        }
        match self.next_waiter(Some(batch)) {
            Some(waiter) => waiter.nudge(),
            None => self.detach_now(),
        }
    }

    /// One non-blocking pass, unless another thread leads.
    pub(super) fn poll_once(&self) {
        let Ok(guard) = self.lead.try_lock() else { return };
        let mut settled = Settled::new();
        self.step_all(&mut settled);
        self.look(Instant::now());
        drop(guard);
        // Who found the lead taken meanwhile waits for nobody otherwise.
        fence(Ordering::SeqCst);
        match self.next_waiter(None) {
            Some(waiter) => waiter.nudge(),
            None if self.unled.load(Ordering::SeqCst) => self.detach_now(),
            None => {}
        }
    }

    /// A batch that somebody waits for, other than `but`.
    fn next_waiter(&self, but: Option<&Arc<BatchCore>>) -> Option<Arc<BatchCore>> {
        let other = |b: &&Arc<BatchCore>| !b.is_settled() && but.is_none_or(|but| !Arc::ptr_eq(b, but));
        lock(&self.waiters).iter().find(other).cloned()
    }

    /// Hands the link to the event loops, unless a thread leads it.
    pub(super) fn detach_now(&self) {
        self.unled.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let Ok(_guard) = self.lead.try_lock() else { return };
        self.unled.store(false, Ordering::SeqCst);
        if !self.detached.swap(true, Ordering::AcqRel) {
            for stream in &self.streams {
                self.watch(stream, &mut lock(&stream.state));
            }
        }
        // A loop stops ticking while the link is idle.
        self.streams.iter().for_each(|s| s.event_loop.want_ticks());
    }

    /// Takes the link back from the event loops. Called by the leader.
    fn attach(&self) {
        if self.detached.swap(false, Ordering::AcqRel) {
            for stream in &self.streams {
                self.watch(stream, &mut lock(&stream.state));
            }
        }
    }

    /// Tells the event loop what to watch a stream for: everything while detached, nothing while a caller leads.
    pub(super) fn watch(&self, stream: &Stream, state: &mut StreamState) {
        let Some(conn) = &mut state.conn else { return };
        let mut interest = EventFlags::empty();
        if self.detached.load(Ordering::Acquire) {
            interest.set(EventFlags::IN, true);
            interest.set(EventFlags::OUT, conn.wants_write());
        }
        if interest == conn.interest {
            return;
        }
        let result = match conn.key {
            Some(key) => stream.event_loop.modify(conn.socket.as_fd(), key, interest).map(|()| key),
            None => {
                let source = StreamSource { link: Weak::clone(&self.own), index: stream.index };
                stream.event_loop.add(conn.socket.as_fd(), Arc::new(source), interest)
            }
        };
        match result {
            Ok(key) => (conn.key, conn.interest) = (Some(key), interest),
            // Without the loop a waiting caller still drives the stream.
            Err(error) => tracing::warn!(peer = %self.peer.address, %error, "event loop does not take the stream"),
        }
    }
}

/// What a pass over the streams saw.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    /// Something came in.
    heard: bool,
    /// Bulk data is on its way in.
    bulk: bool,
}

/// A detached stream in an event loop.
struct StreamSource {
    link: Weak<TcpLink>,
    index: usize,
}

impl Source for StreamSource {
    fn ready(&self, _: EventFlags, _: Instant) -> Next {
        let Some(link) = self.link.upgrade() else { return Next::Remove };
        let Some(stream) = link.streams.get(self.index) else { return Next::Remove };
        let mut settled = Settled::new();
        let outcome = {
            let mut state = lock(&stream.state);
            let outcome = link.step(stream, &mut state, &mut settled);
            link.watch(stream, &mut state);
            outcome
        };
        link.settle(&mut settled);
        if !link.detached.load(Ordering::Acquire) {
            // A leader took over meanwhile; what it sleeps for may be settled.
            link.kick();
        }
        match outcome {
            Ok(_) => link.pump(),
            Err(failure) => link.fail(failure),
        }
        if link.open_slices() > 0 { Next::Tick } else { Next::Keep }
    }

    fn tick(&self, now: Instant) -> Next {
        let Some(link) = self.link.upgrade() else { return Next::Remove };
        if !link.detached.load(Ordering::Acquire) || link.open_slices() == 0 {
            return Next::Keep;
        }
        link.look(now);
        link.pump();
        Next::Tick
    }
}
