//! Native TCP protocol: frames and hello.
