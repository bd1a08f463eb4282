//! `tidewire metadata-server`: the HTTP metadata server, until a signal.

use std::net::{IpAddr, SocketAddr};

use clap::Args;
use tidewire_engine::metadata::server::{MetadataServer, ServerError, ServerOptions};
use tokio::signal::unix::{SignalKind, signal};

use crate::error::CliError;

/// Serves segment metadata over HTTP. Official Mooncake processes can use it too.
#[derive(Args, Clone, Debug)]
pub struct MetadataServerFlags {
    /// Address to listen on. There is no access control: whoever reaches it can read and change metadata.
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDRESS")]
    pub host: IpAddr,
    /// Port; 0: a free one, which is printed.
    #[arg(long, default_value_t = 8080, value_name = "PORT")]
    pub port: u16,
}

/// Serves until SIGINT or SIGTERM.
///
/// # Errors
/// [`CliError::Io`] when the address cannot be listened on.
pub fn run(flags: &MetadataServerFlags) -> Result<(), CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(CliError::io("starting the runtime of the metadata server"))?;
    runtime.block_on(serve(SocketAddr::new(flags.host, flags.port)))
}

async fn serve(addr: SocketAddr) -> Result<(), CliError> {
    let installing = || CliError::io("installing signal handlers");
    let mut interrupt = signal(SignalKind::interrupt()).map_err(installing())?;
    let mut terminate = signal(SignalKind::terminate()).map_err(installing())?;
    let server = MetadataServer::start(addr, ServerOptions::default()).await.map_err(|error| {
        let doing = error.to_string();
        match error {
            ServerError::Listen { source, .. } => CliError::Io { doing, source },
            _ => CliError::Io { doing, source: std::io::Error::other("cannot start") },
        }
    })?;
    println!("metadata server listening, use --metadata {}", server.uri());
    tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
    server.stop().await;
    Ok(())
}
