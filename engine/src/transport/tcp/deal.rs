//! Deals waiting slices out to the streams of a link, and brings streams up.

use std::sync::{MutexGuard, TryLockError, atomic::Ordering};

use super::link::{Failure, MAX_STREAMS, Stream, StreamState, TcpLink};
use crate::memory::lock;

impl TcpLink {
    /// Moves waiting slices to streams with room, least backlog first, and sends. Called with no stream locked.
    pub(super) fn pump(&self) {
        while self.queued.load(Ordering::Acquire) > 0 && !self.failed.load(Ordering::Acquire) {
            match self.pump_once() {
                Ok(true) => {}
                Ok(false) => break,
                Err(failure) => self.fail(failure),
            }
        }
    }

    fn pump_once(&self) -> Result<bool, Failure> {
        let Some((stream, mut state)) = self.pick()? else { return Ok(false) };
        let Some(conn) = &mut state.conn else { return Ok(false) };
        let more = {
            let mut pending = lock(&self.pending);
            if !conn.load(&mut pending, self.options.frame_bytes) {
                self.queued.store(0, Ordering::Release);
                return Ok(false);
            }
            self.queued.store(pending.len(), Ordering::Release);
            !pending.is_empty()
        };
        stream.unanswered.store(conn.unanswered_bytes(), Ordering::Release);
        let result = conn.flush();
        if let Err(why) = result {
            self.lose(stream, &mut state, why)?;
        } else {
            self.watch(stream, &mut state);
        }
        drop(state);
        if more {
            self.spread()?;
        }
        Ok(true)
    }

    /// The ready stream with the least unanswered bytes and room for a frame; dials where none is left.
    fn pick(&self) -> Result<Option<(&Stream, MutexGuard<'_, StreamState>)>, Failure> {
        let mut order: [usize; MAX_STREAMS] = std::array::from_fn(|i| i);
        let order = &mut order[..self.streams.len()];
        order.sort_by_key(|i| self.streams[*i].unanswered.load(Ordering::Relaxed));
        let mut fallback = None;
        for stream in order.iter().map(|i| &self.streams[*i]) {
            if !stream.ready.load(Ordering::Acquire) {
                continue;
            }
            match stream.state.try_lock() {
                Ok(state) if state.conn.as_ref().is_some_and(|c| c.has_room(self.options.window_bytes)) => {
                    return Ok(Some((stream, state)));
                }
                Err(TryLockError::WouldBlock) => fallback = fallback.or(Some(stream)),
                _ => {}
            }
        }
        if let Some(stream) = fallback {
            // All others are full and this one is busy in another thread: its turn is one system call long.
            let state = lock(&stream.state);
            let room = state.conn.as_ref().is_some_and(|c| c.has_room(self.options.window_bytes));
            return Ok(room.then_some((stream, state)));
        }
        if self.streams.iter().all(|s| !s.ready.load(Ordering::Acquire)) {
            self.redial()?;
        }
        Ok(None)
    }

    /// With no stream left, dials the first that may be dialled.
    fn redial(&self) -> Result<(), Failure> {
        for stream in &self.streams {
            let mut state = lock(&stream.state);
            while state.conn.is_none() && !state.disabled && !self.failed.load(Ordering::Acquire) {
                self.dial(stream, &mut state)?;
            }
            if state.conn.is_some() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// More waits than one frame: brings another stream up.
    fn spread(&self) -> Result<(), Failure> {
        for stream in self.streams.iter().filter(|s| !s.ready.load(Ordering::Acquire)) {
            let Ok(mut state) = stream.state.try_lock() else { continue };
            if state.conn.is_none() && !state.disabled {
                return self.dial(stream, &mut state);
            }
        }
        Ok(())
    }
}
