//! The limit on open descriptors: every connection, mapping and batch with an eventfd takes one.
//!
//! The soft limit is usually 1024, for the sake of programs that use `select`; the hard one is far above. The engine
//! uses `epoll` and `poll` only, so it may take all that it is allowed.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the soft limit on open descriptors of this process to the hard one; the limit after that, `None`: no limit.
///
/// A limit that cannot be raised stays as it is: what needs more descriptors then fails where it opens them.
pub fn raise_limit() -> Option<u64> {
    let limit = getrlimit(Resource::Nofile);
    let from = limit.current;
    let is_highest = match (from, limit.maximum) {
        (None, _) => true,
        (Some(soft), Some(hard)) => soft >= hard,
        (Some(_), None) => false,
    };
    if is_highest {
        return from;
    }
    match setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        Ok(()) => tracing::debug!(?from, to = ?limit.maximum, "limit on open descriptors raised"),
        Err(error) => tracing::debug!(?from, %error, "limit on open descriptors stays"),
    }
    getrlimit(Resource::Nofile).current
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        let hard = getrlimit(Resource::Nofile).maximum;
        assert_eq!(raise_limit(), hard);
        assert_eq!(getrlimit(Resource::Nofile), Rlimit { current: hard, maximum: hard });
        assert_eq!(raise_limit(), hard);
    }
}
