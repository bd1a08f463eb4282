//! What a caller asks for and what it gets back.

use crate::{error::TransferError, id::SegmentId};

/// Direction of a request, seen from the initiator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Opcode {
    /// Remote memory to local memory.
    Read = 0,
    /// Local memory to remote memory.
    Write = 1,
}

/// One entry of a batch. One-sided: the target's application takes no part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransferRequest {
    /// Direction.
    pub opcode: Opcode,
    /// Address of the local memory, for both directions. It must lie inside one registered buffer.
    pub source: u64,
    /// Segment that holds the remote memory.
    pub target: SegmentId,
    /// Absolute virtual address in the target process.
    pub target_offset: u64,
    /// Length in bytes, at least 1.
    pub length: u64,
}

/// A message that the target receives after every byte of the batch is in place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notify {
    /// Free text; callers use it as the sender or a key.
    pub name: String,
    /// Free text, not empty.
    pub message: String,
}

/// State of a task or a batch. The numbers are Mooncake's status codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum TaskState {
    /// In flight.
    Waiting = 0,
    /// Cancelled by the caller or by shutdown.
    Cancelled = 3,
    /// Every byte is in place.
    Completed = 4,
    /// The deadline passed first.
    TimedOut = 5,
    /// Ended with an error.
    Failed = 6,
}

impl TaskState {
    /// Whether nothing more will happen.
    pub fn is_terminal(self) -> bool {
        self != TaskState::Waiting
    }
}

/// State of one task.
#[derive(Clone, Debug)]
pub struct TaskStatus {
    /// Where it stands.
    pub state: TaskState,
    /// Bytes of settled slices.
    pub transferred_bytes: u64,
    /// The first error of the task.
    pub error: Option<TransferError>,
}

/// State of a batch: completed only when every byte of every entry is in place.
#[derive(Clone, Debug)]
pub struct BatchStatus {
    /// Where it stands; an empty batch is completed.
    pub state: TaskState,
    /// Tasks submitted so far.
    pub tasks: usize,
    /// Tasks that have not ended.
    pub open_tasks: usize,
    /// Bytes of settled slices.
    pub transferred_bytes: u64,
    /// The first error of the batch.
    pub error: Option<TransferError>,
}

impl BatchStatus {
    /// The status of a completed batch, or the first error of one that is not.
    ///
    /// # Errors
    /// The batch's error; [`TransferError::Internal`] if it is still in flight.
    pub fn into_result(self) -> Result<BatchStatus, TransferError> {
        match (self.state, &self.error) {
            (TaskState::Completed, _) => Ok(self),
            (_, Some(error)) => Err(error.clone()),
            (_, None) => Err(TransferError::Internal { reason: "batch is in flight and has no error" }),
        }
    }
}
