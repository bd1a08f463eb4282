//! The own segment: its descriptor, built from the registered buffers when somebody asks.
//!
//! A change only marks the text as old, so registering costs nothing here; the text is made once per version that is
//! looked at. A new process starts from an empty descriptor of its own and never reads what its predecessor published.

use std::{
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tidewire_core::mooncake::{
    descriptor::{BufferDescriptor, NativeExtension, SegmentDescriptor},
    host::HostPort,
};

use crate::{
    memory::{RegionTable, lock},
    transport::Identity,
};

/// Version of the native protocol that the descriptor says.
pub const NATIVE_VERSION: u16 = 1;

/// Where peers reach this engine; known once the transports are started.
#[derive(Clone, Debug, Default)]
pub struct Endpoints {
    /// Host that peers are told for data connections.
    pub host: String,
    /// Port of the native data listener; 0: none.
    pub data_port: u16,
    /// Port for official Mooncake peers; 0: none.
    pub mooncake_port: u16,
    /// Names of the transports on offer to native peers, best first.
    pub transports: Vec<String>,
    /// Abstract Unix socket for same-host peers; empty: none.
    pub local_socket: String,
}

/// The own segment.
#[derive(Debug)]
pub struct OwnSegment {
    identity: Arc<Identity>,
    /// Control address that peers are told.
    pub control: HostPort,
    regions: Arc<RegionTable>,
    endpoints: OnceLock<Endpoints>,
    version: AtomicU64,
    text: Mutex<Option<(u64, Arc<Vec<u8>>)>>,
}

impl OwnSegment {
    /// A segment that nobody can reach yet.
    pub fn new(identity: Arc<Identity>, control: HostPort, regions: Arc<RegionTable>) -> Self {
        let (endpoints, version) = (OnceLock::new(), AtomicU64::new(0));
        OwnSegment { identity, control, regions, endpoints, version, text: Mutex::new(None) }
    }

    /// Who this engine is.
    pub fn identity(&self) -> &Arc<Identity> {
        &self.identity
    }

    /// Says where it can be reached; the first call counts.
    pub fn open(&self, endpoints: Endpoints) {
        // A second call would be a defect of the builder; the first value stays.
        let _ = self.endpoints.set(endpoints);
        self.touch();
    }

    /// Where it can be reached; `None` while the engine is being built.
    pub fn endpoints(&self) -> Option<&Endpoints> {
        self.endpoints.get()
    }

    /// Registered buffers now.
    pub fn buffers(&self) -> usize {
        self.regions.count()
    }

    /// Marks the text as old: a buffer came or went. The result is the new version.
    pub fn touch(&self) -> u64 {
        // AcqRel: who sees the new version sees the region table as it was before the call.
        self.version.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Compact JSON of the descriptor; `None` while the engine is being built.
    pub fn json(&self) -> Option<Arc<Vec<u8>>> {
        let endpoints = self.endpoints.get()?;
        let mut text = lock(&self.text);
        let version = self.version.load(Ordering::Acquire);
        if let Some((_, bytes)) = text.as_ref().filter(|(made, _)| *made == version) {
            return Some(Arc::clone(bytes));
        }
        let bytes = Arc::new(self.descriptor(endpoints).encode());
        *text = Some((version, Arc::clone(&bytes)));
        Some(bytes)
    }

    /// The descriptor now; `None` while the engine is being built.
    pub fn current(&self) -> Option<SegmentDescriptor> {
        self.endpoints.get().map(|endpoints| self.descriptor(endpoints))
    }

    fn descriptor(&self, endpoints: &Endpoints) -> SegmentDescriptor {
        let regions = self.regions.snapshot();
        let name = &self.identity.segment;
        let mut descriptor = SegmentDescriptor::tcp(name.as_str(), endpoints.host.as_str(), endpoints.mooncake_port);
        descriptor.timestamp = timestamp(SystemTime::now());
        descriptor.buffers = regions
            .iter()
            .map(|r| BufferDescriptor::memory(name.as_str(), r.range().addr(), r.range().len()))
            .collect();
        descriptor.tidewire = Some(NativeExtension {
            version: NATIVE_VERSION,
            generation: self.identity.generation.to_string(),
            token: hex(&self.identity.token),
            data_host: endpoints.host.clone(),
            data_port: endpoints.data_port,
            transports: endpoints.transports.clone(),
            host_id: self.identity.host_id.clone(),
            pid: std::process::id(),
            local_socket: endpoints.local_socket.clone(),
            locations: regions.iter().map(|r| r.location().to_string()).collect(),
        });
        descriptor
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `YYYY-MM-DD hh:mm:ss.uuuuuu` in UTC. Informational, as Mooncake's is.
fn timestamp(now: SystemTime) -> String {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil_date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{:06}", since.subsec_micros())
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar.
fn civil_date(days: u64) -> (u64, u64, u64) {
    // Years are counted from March, so that the leap day is the last one; an era is 400 years.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use tidewire_core::{Generation, Location};

    use super::*;

    fn own() -> (OwnSegment, Arc<RegionTable>) {
        let identity = Identity {
            segment: "a:1".to_owned(),
            generation: Generation(0xab),
            token: [7; 16],
            host_id: "h".to_owned(),
        };
        let regions = Arc::new(RegionTable::default());
        (OwnSegment::new(Arc::new(identity), HostPort::new("a", 1), Arc::clone(&regions)), regions)
    }

    #[test]
    fn nothing_is_said_before_the_endpoints_are_known() {
        let (own, _) = own();
        assert!(own.json().is_none());
        own.open(Endpoints::default());
        assert!(own.json().is_some());
    }

    #[test]
    fn text_is_made_once_per_change() {
        let (own, regions) = own();
        own.open(Endpoints::default());
        let first = own.json().unwrap();
        assert!(Arc::ptr_eq(&first, &own.json().unwrap()));
        regions.register(0x1000, 16, Location::Cpu(1), None).unwrap();
        own.touch();
        let second = SegmentDescriptor::decode(&own.json().unwrap()).unwrap();
        assert_eq!((second.buffers[0].addr, second.buffers[0].length), (0x1000, 16));
        let native = second.tidewire.unwrap();
        assert_eq!((native.generation.as_str(), native.locations[0].as_str()), ("00000000000000ab", "cpu:1"));
        assert_eq!(native.token, "07".repeat(16));
    }

    #[test]
    fn dates_are_right() {
        assert_eq!(timestamp(UNIX_EPOCH), "1970-01-01 00:00:00.000000");
        let leap = UNIX_EPOCH + Duration::from_micros(1_709_210_096_000_007);
        assert_eq!(timestamp(leap), "2024-02-29 12:34:56.000007");
    }
}
