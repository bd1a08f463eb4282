//! What only the same-host transports promise.
