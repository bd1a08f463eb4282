//! What both loops stand on: readiness, a mailbox that wakes the loop, and a slab whose stale keys find nothing.
//!
//! Invariants:
//! * a key of a removed entry never names a later one;
//! * a command put into an open mailbox is taken by its loop, or dropped when the mailbox closes; after closing, it comes
//!   back to the sender.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex},
    time::Duration,
};

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};

use crate::memory::lock;

/// Key of the mailbox.
const WAKE: u64 = u64::MAX;
/// Events taken at a time.
const EVENTS: usize = 128;

/// Readiness of sockets and of one mailbox.
#[derive(Debug)]
pub(super) struct Poller {
    epoll: OwnedFd,
    wake: Arc<OwnedFd>,
}

impl Poller {
    /// A poller and the sending half of its mailbox.
    pub(super) fn new<C>() -> io::Result<(Self, Arc<Mailbox<C>>)> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        epoll::add(&epoll, &wake, epoll::EventData::new_u64(WAKE), epoll::EventFlags::IN)?;
        let mailbox = Mailbox { queue: Mutex::new(Some(Vec::new())), wake: Arc::clone(&wake) };
        Ok((Poller { epoll, wake }, Arc::new(mailbox)))
    }

    /// Watches `fd`, level-triggered.
    pub(super) fn add(&self, fd: impl AsFd, key: u64, interest: epoll::EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, epoll::EventData::new_u64(key), interest)?)
    }

    /// Changes what `fd` is watched for.
    pub(super) fn modify(&self, fd: impl AsFd, key: u64, interest: epoll::EventFlags) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, fd, epoll::EventData::new_u64(key), interest)?)
    }

    /// Waits at most `timeout` (for ever if `None`) and fills `ready` with keys and events. The mailbox is not among them.
    pub(super) fn wait(&self, ready: &mut Vec<(u64, epoll::EventFlags)>, timeout: Option<Duration>) -> io::Result<()> {
        ready.clear();
        let timeout = timeout.map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: i64::from(t.subsec_nanos()) });
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); EVENTS];
        let events = match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
            Ok((events, _)) => events,
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        for event in events.iter() {
            match event.data.u64() {
                WAKE => {
                    // Only resets the counter.
                    let _ = rustix::io::read(&*self.wake, &mut [0; 8]);
                }
                key => ready.push((key, event.flags)),
            }
        }
        Ok(())
    }
}

/// Commands for a loop.
#[derive(Debug)]
pub(super) struct Mailbox<C> {
    /// `None` once closed.
    queue: Mutex<Option<Vec<C>>>,
    wake: Arc<OwnedFd>,
}

impl<C> Mailbox<C> {
    /// Puts a command and wakes the loop.
    ///
    /// # Errors
    /// The command, if the loop has ended.
    pub(super) fn put(&self, command: C) -> Result<(), C> {
        let first = {
            let mut queue = lock(&self.queue);
            let Some(queue) = queue.as_mut() else { return Err(command) };
            queue.push(command);
            queue.len() == 1
        };
        if first {
            // A counter that cannot grow is readable already.
            let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
        }
        Ok(())
    }

    /// Takes all commands.
    pub(super) fn take(&self) -> Vec<C> {
        lock(&self.queue).as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Refuses further commands and returns those not taken.
    pub(super) fn close(&self) -> Vec<C> {
        lock(&self.queue).take().unwrap_or_default()
    }
}

/// Closes a mailbox when its loop ends, also by a panic.
pub(super) struct CloseOnDrop<C>(pub(super) Arc<Mailbox<C>>);

impl<C> Drop for CloseOnDrop<C> {
    fn drop(&mut self) {
        drop(self.0.close());
    }
}

/// Entries under keys that are never used twice.
#[derive(Debug)]
pub(super) struct Slab<T> {
    slots: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Slab { slots: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    /// Stores an entry; its key.
    pub(super) fn insert(&mut self, entry: T) -> u64 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push((0, None));
            (self.slots.len() - 1) as u32
        });
        let slot = &mut self.slots[index as usize];
        slot.1 = Some(entry);
        u64::from(slot.0) << 32 | u64::from(index)
    }

    /// The entry of a key.
    pub(super) fn get_mut(&mut self, key: u64) -> Option<&mut T> {
        let slot = self.slots.get_mut(key as u32 as usize)?;
        if slot.0 == (key >> 32) as u32 { slot.1.as_mut() } else { None }
    }

    /// Takes an entry out.
    pub(super) fn remove(&mut self, key: u64) -> Option<T> {
        let slot = self.slots.get_mut(key as u32 as usize)?;
        if slot.0 != (key >> 32) as u32 {
            return None;
        }
        let entry = slot.1.take()?;
        // The top generation stays unused, so that no key equals WAKE.
        slot.0 = (slot.0 + 1) % (u32::MAX - 1);
        self.free.push(key as u32);
        Some(entry)
    }

    /// Keys and entries.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (u64, &mut T)> {
        let keyed = self.slots.iter_mut().enumerate();
        keyed.filter_map(|(i, (generation, entry))| {
            entry.as_mut().map(|entry| (u64::from(*generation) << 32 | i as u64, entry))
        })
    }

    /// Number of entries.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_keys_find_nothing() {
        let mut slab = Slab::default();
        let old = slab.insert('a');
        assert_eq!(slab.remove(old), Some('a'));
        let new = slab.insert('b');
        assert_eq!(slab.get_mut(old), None);
        assert_eq!(slab.remove(old), None);
        assert_eq!(slab.get_mut(new), Some(&mut 'b'));
        assert_eq!(slab.len(), 1);
    }

    #[test]
    fn closed_mailbox_hands_commands_back() -> io::Result<()> {
        let (poller, mailbox) = Poller::new()?;
        assert_eq!((mailbox.put(1), mailbox.put(2)), (Ok(()), Ok(())));
        poller.wait(&mut Vec::new(), None)?;
        assert_eq!(mailbox.take(), [1, 2]);
        drop(CloseOnDrop(Arc::clone(&mailbox)));
        assert_eq!(mailbox.put(3), Err(3));
        Ok(())
    }
}
