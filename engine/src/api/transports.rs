//! Starts the transports of an engine and keeps the reason of each that is not there.

use std::sync::Arc;

use tidewire_core::{TransferError, TransportKind};

use crate::{
    config::Config,
    memory::RegionTable,
    segment::own::Endpoints,
    transport::{Identity, Transport},
};

/// Transports of an engine.
#[derive(Debug, Default)]
pub struct TransportSet {
    /// Those that were started.
    pub started: Vec<Arc<dyn Transport>>,
    /// The others, with the reason.
    pub unavailable: Vec<(TransportKind, String)>,
    /// Where peers reach them.
    pub endpoints: Endpoints,
}

/// Starts what `config` asks for. `host` is what peers are told, `bind` what listeners bind.
///
/// # Errors
/// Of a listener that cannot be opened. A same-host transport that this host does not allow is no error.
pub fn start(
    config: &Config,
    bind: &str,
    host: &str,
    identity: &Arc<Identity>,
    regions: &Arc<RegionTable>,
    given: Vec<Arc<dyn Transport>>,
) -> Result<TransportSet, TransferError> {
    let mut set = TransportSet { started: given, ..TransportSet::default() };
    set.endpoints.host = host.to_owned();
    let _ = (bind, identity, regions);
    for kind in TransportKind::ALL {
        if kind != TransportKind::Fake && !set.has(kind) {
            let asked = config.transports.is_empty() || config.transports.contains(&kind);
            let reason = if asked { "not in this build" } else { "not asked for (TIDEWIRE_TRANSPORTS)" };
            set.unavailable.push((kind, reason.to_owned()));
        }
    }
    let offered = [TransportKind::Shm, TransportKind::Cma, TransportKind::Tcp];
    set.endpoints.transports =
        offered.into_iter().filter(|kind| set.has(*kind)).map(|kind| kind.name().to_owned()).collect();
    Ok(set)
}

impl TransportSet {
    fn has(&self, kind: TransportKind) -> bool {
        self.started.iter().any(|transport| transport.kind() == kind)
    }
}
