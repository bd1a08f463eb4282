//! Event loops `tw-tcp-<n>`: readiness of sockets, ticks, stopping.
//!
//! A loop owns an epoll instance and the sources registered with it. It sleeps without a timeout unless a source asked
//! for ticks, so an idle engine costs nothing. After work it polls for `spin` before it sleeps again.
//!
//! Invariants:
//! * a source is called by its loop only, never concurrently by two loops;
//! * a removed source is not called again.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::{
    event::{EventfdFlags, epoll, eventfd},
    time::Timespec,
};

use crate::memory::lock;

/// Time between ticks, where a source wants them.
const TICK: Duration = Duration::from_millis(100);

/// Key of the wake-up eventfd.
const WAKE: u64 = u64::MAX;

/// What a source wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Wait for readiness.
    Keep,
    /// Wait for readiness, and tick.
    Tick,
    /// Never call again.
    Remove,
}

/// Something with a file descriptor that an event loop watches.
pub(super) trait Source: Send + Sync {
    /// The descriptor is ready (or something else happened to it), as was seen at `seen`.
    fn ready(&self, events: epoll::EventFlags, seen: Instant) -> Next;
    /// Called about every 100 ms while some source of the loop wants ticks; whether this one still does.
    fn tick(&self, now: Instant) -> Next;
}

#[derive(Default)]
struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

#[derive(Default)]
struct Slot {
    generation: u32,
    source: Option<Arc<dyn Source>>,
}

/// Names a source within its loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SourceKey(u64);

impl Slots {
    fn insert(&mut self, source: Arc<dyn Source>) -> SourceKey {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            (self.slots.len() - 1) as u32
        });
        let slot = &mut self.slots[index as usize];
        slot.source = Some(source);
        SourceKey(u64::from(slot.generation) << 32 | u64::from(index))
    }

    fn get(&self, key: SourceKey) -> Option<Arc<dyn Source>> {
        let slot = self.slots.get(key.0 as u32 as usize)?;
        (slot.generation == (key.0 >> 32) as u32).then(|| slot.source.clone()).flatten()
    }

    fn remove(&mut self, key: SourceKey) -> Option<Arc<dyn Source>> {
        let index = key.0 as u32;
        let slot = self.slots.get_mut(index as usize)?;
        if slot.generation != (key.0 >> 32) as u32 {
            return None;
        }
        // The top generation is left out so that no key equals WAKE.
        slot.generation = (slot.generation + 1) % (u32::MAX - 1);
        self.free.push(index);
        slot.source.take()
    }
}

/// One event loop.
pub(super) struct EventLoop {
    epoll: OwnedFd,
    wake: OwnedFd,
    slots: Mutex<Slots>,
    ticking: AtomicBool,
    stop: AtomicBool,
    spin: Duration,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl std::fmt::Debug for EventLoop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventLoop").finish_non_exhaustive()
    }
}

impl EventLoop {
    /// Starts the loop on its own thread `name`.
    pub(super) fn start(name: String, spin: Duration) -> io::Result<Arc<Self>> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &wake, epoll::EventData::new_u64(WAKE), epoll::EventFlags::IN)?;
        let event_loop = Arc::new(EventLoop {
            epoll,
            wake,
            slots: Mutex::new(Slots::default()),
            ticking: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            spin,
            thread: Mutex::new(None),
        });
        let own = Arc::clone(&event_loop);
        let thread = std::thread::Builder::new().name(name).spawn(move || own.run())?;
        *lock(&event_loop.thread) = Some(thread);
        Ok(event_loop)
    }

    /// Watches `fd` for `source`.
    pub(super) fn add(
        &self,
        fd: BorrowedFd<'_>,
        source: Arc<dyn Source>,
        interest: epoll::EventFlags,
    ) -> io::Result<SourceKey> {
        let key = lock(&self.slots).insert(source);
        if let Err(e) = epoll::add(&self.epoll, fd, epoll::EventData::new_u64(key.0), interest) {
            lock(&self.slots).remove(key);
            return Err(e.into());
        }
        Ok(key)
    }

    /// Changes what `fd` is watched for.
    pub(super) fn modify(&self, fd: BorrowedFd<'_>, key: SourceKey, interest: epoll::EventFlags) -> io::Result<()> {
        epoll::modify(&self.epoll, fd, epoll::EventData::new_u64(key.0), interest).map_err(Into::into)
    }

    /// Stops watching. The source is dropped by the caller of this, not by the loop.
    pub(super) fn remove(&self, fd: BorrowedFd<'_>, key: SourceKey) -> Option<Arc<dyn Source>> {
        // A descriptor that was closed already has left the epoll set by itself.
        let _ = epoll::delete(&self.epoll, fd);
        lock(&self.slots).remove(key)
    }

    /// Makes the loop tick from now on, until no source wants ticks.
    pub(super) fn want_ticks(&self) {
        // AcqRel pairs with the swap of the loop, which looks again after a wake-up.
        if !self.ticking.swap(true, Ordering::AcqRel) {
            self.kick();
        }
    }

    fn kick(&self) {
        // An eventfd that cannot take more is readable already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Stops the thread and drops all sources. Blocks until the thread ended.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.kick();
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
        {
            // A panic of the loop was reported by the panic hook already.
            let _ = thread.join();
        }
        let slots = std::mem::take(&mut *lock(&self.slots));
        drop(slots);
    }

    fn run(&self) {
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); 128];
        let mut spin_until = None::<Instant>;
        let mut next_tick = Instant::now() + TICK;
        while !self.stop.load(Ordering::Acquire) {
            let timeout = self.timeout(spin_until.is_some(), next_tick);
            let ready = match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
                Ok((ready, _)) => ready,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => {
                    tracing::error!(%error, "event loop cannot wait, tcp stops");
                    return;
                }
            };
            let mut worked = false;
            let seen = Instant::now();
            for event in ready.iter() {
                worked |= self.dispatch(event.data.u64(), event.flags, seen);
            }
            spin_until = if worked && !self.spin.is_zero() {
                Some(Instant::now() + self.spin)
            } else {
                spin_until.filter(|until| Instant::now() < *until)
            };
            if self.ticking.load(Ordering::Acquire) && Instant::now() >= next_tick {
                next_tick = Instant::now() + TICK;
                self.tick();
            }
        }
    }

    fn timeout(&self, spinning: bool, next_tick: Instant) -> Option<Timespec> {
        let wait = if spinning {
            Duration::ZERO
        } else if self.ticking.load(Ordering::Acquire) {
            next_tick.saturating_duration_since(Instant::now())
        } else {
            return None;
        };
        Some(Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) })
    }

    fn dispatch(&self, key: u64, events: epoll::EventFlags, seen: Instant) -> bool {
        if key == WAKE {
            let mut count = [0; 8];
            // Only resets the counter.
            let _ = rustix::io::read(&self.wake, &mut count);
            return false;
        }
        let key = SourceKey(key);
        let Some(source) = lock(&self.slots).get(key) else { return false };
        self.apply(key, source.ready(events, seen));
        true
    }

    fn apply(&self, key: SourceKey, next: Next) {
        match next {
            Next::Keep => {}
            Next::Tick => self.ticking.store(true, Ordering::Release),
            Next::Remove => drop(lock(&self.slots).remove(key)),
        }
    }

    fn tick(&self) {
        let now = Instant::now();
        self.ticking.store(false, Ordering::Release);
        let sources: Vec<(SourceKey, Arc<dyn Source>)> = {
            let slots = lock(&self.slots);
            let keyed = slots.slots.iter().enumerate();
            keyed
                .filter_map(|(i, s)| {
                    let key = SourceKey(u64::from(s.generation) << 32 | i as u64);
                    s.source.clone().map(|source| (key, source))
                })
                .collect()
        };
        for (key, source) in sources {
            self.apply(key, source.tick(now));
        }
    }
}
