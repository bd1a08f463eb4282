//! A target that does what no target should: a listener whose connections run a script.

use std::{
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use tidewire_core::{
    Generation,
    mooncake::descriptor::{NativeExtension, SegmentDescriptor},
    native::{
        FEATURE_CHECKSUM,
        frame::{ENTRY_LEN, FrameHeader, FrameKind, FrameStatus, HEADER_LEN},
        hello::{HELLO_LEN, Limits, Welcome},
    },
};

use crate::transport::Peer;

/// Control address that errors have to name.
pub(super) const PEER: &str = "127.0.0.1:1";

/// A target of one script. Dropping it waits for the script to end.
pub(super) struct FaultyTarget {
    port: u16,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl FaultyTarget {
    /// Runs `script` on every connection, one after the other; what goes wrong with a connection ends only that one.
    pub(super) fn start(script: impl Fn(&mut TcpStream) -> io::Result<()> + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            for socket in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let mut socket = socket.unwrap();
                socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                socket.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
                // The other side hanging up is what most scripts provoke.
                let _ = script(&mut socket);
            }
        });
        FaultyTarget { port, stop, thread: Some(thread) }
    }

    pub(super) fn peer(&self) -> Arc<Peer> {
        let extension = NativeExtension {
            version: 1,
            generation: Generation(1).to_string(),
            token: "09".repeat(16),
            data_port: self.port,
            ..Default::default()
        };
        let descriptor = SegmentDescriptor { name: "faulty".into(), tidewire: Some(extension), ..Default::default() };
        Arc::new(Peer { segment: "faulty".into(), address: PEER.into(), descriptor: Arc::new(descriptor) })
    }
}

impl Drop for FaultyTarget {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What a proper target says first.
pub(super) fn welcome() -> Welcome {
    let limits = Limits { entries: 512, frame_bytes: 16 << 20, open_frames: 64, heartbeat_ms: 1000 };
    Welcome { refused: None, version: 1, features: FEATURE_CHECKSUM, generation: Generation(1), limits }
}

/// Reads the hello.
pub(super) fn hear(socket: &mut TcpStream) -> io::Result<()> {
    socket.read_exact(&mut [0; HELLO_LEN])
}

/// A proper handshake.
pub(super) fn admit(socket: &mut TcpStream) -> io::Result<()> {
    hear(socket)?;
    socket.write_all(&welcome().encode())
}

/// The next read or write, its payload thrown away; the number of payload bytes is in the header. Pings are answered.
pub(super) fn request(socket: &mut TcpStream) -> io::Result<FrameHeader> {
    loop {
        let mut head = [0; HEADER_LEN];
        socket.read_exact(&mut head)?;
        let header = FrameHeader::decode(&head).map_err(io::Error::other)?;
        if header.kind == FrameKind::Ping {
            socket.write_all(&FrameHeader::bare(FrameKind::Alive, FrameStatus::Done, header.id).encode())?;
            continue;
        }
        let mut rest = usize::from(header.entries_or_status) * ENTRY_LEN;
        if header.kind == FrameKind::Write {
            rest += header.payload_len as usize + if header.checksum { 4 } else { 0 };
        }
        socket.read_exact(&mut vec![0; rest])?;
        return Ok(header);
    }
}

/// The proper answer to a request, without the payload of a read.
pub(super) fn answer(to: &FrameHeader) -> FrameHeader {
    let read = to.kind == FrameKind::Read;
    let kind = if read { FrameKind::ReadData } else { FrameKind::WriteDone };
    let mut header = FrameHeader::bare(kind, FrameStatus::Done, to.id);
    if read {
        (header.payload_len, header.checksum) = (to.payload_len, to.checksum);
    }
    header
}
