//! Choice of a transport per peer.
