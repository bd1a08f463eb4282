//! Calls of the etcd store that its background tasks share: reads, listings, leases and fenced puts.

use std::time::Duration;

use etcd_client::{Client, Compare, CompareOp, Error, GetOptions, KeyValue, PutOptions, Txn, TxnOp};

use super::{
    super::{
        Entry, Expect, StoreError,
        session::{Lease, Owned, SessionBackend, Written},
    },
    link::{Link, Repeat},
};

/// Longest answer; etcd's default of 4 MiB is two full values.
const MAX_ANSWER_BYTES: usize = 64 << 20;
/// Keys per page of a listing.
const PAGE: i64 = 256;
/// Tries of a reclaim that is overtaken by our own late puts.
const RECLAIM_TRIES: usize = 3;

/// The cluster and the time to live of our lease.
#[derive(Debug)]
pub(super) struct EtcdBackend {
    link: Link,
    ttl_s: i64,
}

impl EtcdBackend {
    /// `ttl` is rounded up to whole seconds, as etcd has them.
    pub(super) fn new(link: Link, ttl: Duration) -> Self {
        let ttl_s = i64::try_from(ttl.as_millis().div_ceil(1_000)).unwrap_or(i64::MAX).max(1);
        EtcdBackend { link, ttl_s }
    }

    /// The connection.
    pub(super) fn link(&self) -> &Link {
        &self.link
    }

    /// Reads a key.
    pub(super) async fn get(&self, key: &str) -> Result<Option<(Entry, i64)>, StoreError> {
        let call = |client: Client| async move { kv(&client).get(key, None).await };
        let answer = self.link.call("get", key, Repeat::Yes, call).await?;
        Ok(answer.kvs().first().map(|kv| (entry(kv), kv.lease())))
    }

    /// Lists a prefix, with the revision of the listing and the lease of each entry.
    pub(super) async fn list(&self, prefix: &str) -> Result<(i64, Vec<(Entry, i64)>), StoreError> {
        let (mut from, end) = range_of(prefix);
        let mut revision = 0;
        let mut found = Vec::new();
        loop {
            let options = GetOptions::new().with_range(end.clone()).with_limit(PAGE).with_revision(revision);
            let call = |client: Client| {
                let (from, options) = (from.clone(), options.clone());
                async move { kv(&client).get(from, Some(options)).await }
            };
            let answer = self.link.call("list", prefix, Repeat::Yes, call).await?;
            if revision == 0 {
                revision = answer.header().map_or(0, |header| header.revision());
            }
            found.extend(answer.kvs().iter().map(|kv| (entry(kv), kv.lease())));
            match answer.kvs().last() {
                Some(last) if answer.more() => {
                    from = last.key().to_vec();
                    from.push(0);
                }
                _ => return Ok((revision, found)),
            }
        }
    }

    /// Puts without a guard; under a lease unless that is 0.
    pub(super) async fn put(&self, key: &str, value: &[u8], lease: i64) -> Result<Written, StoreError> {
        let options = PutOptions::new().with_lease(lease);
        let call = |client: Client| {
            let options = options.clone();
            async move { kv(&client).put(key, value, Some(options)).await }
        };
        match self.link.call("put", key, Repeat::Yes, call).await {
            Ok(answer) => Ok(Written::At(to_u64(answer.header().map_or(0, |header| header.revision())))),
            Err(error) if lease != 0 && error.is_lease_lost() => Ok(Written::LeaseLost),
            Err(error) => Err(error.into()),
        }
    }

    /// Puts if the guard holds; under a lease unless that is 0.
    pub(super) async fn put_guarded(
        &self,
        key: &str,
        value: &[u8],
        expect: Expect,
        lease: i64,
    ) -> Result<Written, StoreError> {
        let guard = match expect {
            Expect::Absent => Compare::create_revision(key, CompareOp::Equal, 0),
            Expect::Revision(revision) => Compare::mod_revision(key, CompareOp::Equal, to_i64(revision)),
        };
        let put = TxnOp::put(key, value, Some(PutOptions::new().with_lease(lease)));
        let txn = Txn::new().when([guard]).and_then([put]);
        let call = |client: Client| {
            let txn = txn.clone();
            async move { kv(&client).txn(txn).await }
        };
        match self.link.call("compare_and_put", key, Repeat::No, call).await {
            Ok(answer) if answer.succeeded() => {
                Ok(Written::At(to_u64(answer.header().map_or(0, |header| header.revision()))))
            }
            Ok(_) => Ok(Written::Mismatch),
            Err(error) if lease != 0 && error.is_lease_lost() => Ok(Written::LeaseLost),
            Err(error) if error.is_open() && lease != 0 => {
                // Nobody else puts under our lease, so the key itself tells whether it was applied.
                match self.get(key).await {
                    Ok(Some((entry, of))) if of == lease && entry.value == value => Ok(Written::At(entry.revision)),
                    _ => Err(error.into()),
                }
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Removes a key; whether it was there.
    pub(super) async fn remove(&self, key: &str) -> Result<bool, StoreError> {
        let call = |client: Client| async move { kv(&client).delete(key, None).await };
        Ok(self.link.call("remove", key, Repeat::Yes, call).await?.deleted() > 0)
    }

    /// Time left of a lease; `None` if it ran out.
    pub(super) async fn time_left(&self, lease: i64) -> Result<Option<Duration>, StoreError> {
        let call = |mut client: Client| async move { client.lease_time_to_live(lease, None).await };
        let answer = self.link.call("time_to_live", "lease", Repeat::Yes, call).await?;
        Ok(u64::try_from(answer.ttl()).ok().map(Duration::from_secs))
    }

    /// Ends a lease with its keys.
    pub(super) async fn revoke(&self, lease: Lease) -> Result<(), StoreError> {
        let id = to_i64(lease.0);
        let call = |mut client: Client| async move { client.lease_revoke(id).await };
        match self.link.call("revoke", "lease", Repeat::Yes, call).await {
            Ok(_) => Ok(()),
            Err(error) if error.is_lease_lost() => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    async fn grant(&self) -> Result<Lease, StoreError> {
        let ttl_s = self.ttl_s;
        let call = |mut client: Client| async move { client.lease_grant(ttl_s, None).await };
        let answer = self.link.call("grant", "lease", Repeat::Yes, call).await?;
        tracing::debug!(
            store = self.link.describe(),
            lease = answer.id(),
            ttl_s = answer.ttl(),
            "session lease granted"
        );
        Ok(Lease(to_u64(answer.id())))
    }
}

impl SessionBackend for EtcdBackend {
    fn describe(&self) -> String {
        self.link.describe().to_owned()
    }

    async fn renew(&self, known: Option<Lease>) -> Result<Lease, StoreError> {
        let Some(lease) = known else { return self.grant().await };
        let id = to_i64(lease.0);
        let call = |mut client: Client| async move {
            match client.lease_keep_alive(id).await {
                Ok(_) => Ok(true),
                // Either the lease is gone or the stream broke; etcd tells which.
                Err(Error::LeaseKeepAliveError(_)) => Ok(client.lease_time_to_live(id, None).await?.ttl() > 0),
                Err(error) => Err(error),
            }
        };
        if self.link.call("keep_alive", "lease", Repeat::Yes, call).await? {
            return Ok(lease);
        }
        tracing::warn!(store = self.link.describe(), lease = id, "session lease ran out, its keys are put again");
        self.grant().await
    }

    async fn write(&self, lease: Lease, key: &str, value: &[u8], guard: Option<Expect>) -> Result<Written, StoreError> {
        match guard {
            None => self.put(key, value, to_i64(lease.0)).await,
            Some(expect) => self.put_guarded(key, value, expect, to_i64(lease.0)).await,
        }
    }

    async fn reclaim(&self, lease: Lease, key: &str, owned: &Owned, past: &[Lease]) -> Result<Written, StoreError> {
        for _ in 0..RECLAIM_TRIES {
            let expect = match self.get(key).await? {
                None => Expect::Absent,
                Some((entry, of)) => {
                    let of = Lease(to_u64(of));
                    if of == lease && entry.value == owned.value {
                        return Ok(Written::At(entry.revision));
                    }
                    let ours = of == lease || past.contains(&of) || entry.revision == owned.revision;
                    if !ours {
                        return Ok(Written::Mismatch);
                    }
                    Expect::Revision(entry.revision)
                }
            };
            match self.put_guarded(key, &owned.value, expect, to_i64(lease.0)).await? {
                // The old lease took the key between the two calls, or a late put of ours came; look again.
                Written::Mismatch => {}
                written => return Ok(written),
            }
        }
        let reason = format!("{key} changes faster than it can be claimed");
        Err(StoreError::Unreachable { store: self.link.describe().to_owned(), reason })
    }
}

/// First key and end of a prefix, as etcd wants them.
pub(super) fn range_of(prefix: &str) -> (Vec<u8>, Vec<u8>) {
    if prefix.is_empty() {
        return (vec![0], vec![0]);
    }
    let mut end = prefix.as_bytes().to_vec();
    // No byte of UTF-8 is 0xff, so the last one has a successor.
    if let Some(last) = end.last_mut() {
        *last = last.saturating_add(1);
    }
    (prefix.as_bytes().to_vec(), end)
}

/// An entry as the store gives it.
pub(super) fn entry(kv: &KeyValue) -> Entry {
    Entry {
        key: String::from_utf8_lossy(kv.key()).into_owned(),
        value: kv.value().to_vec(),
        revision: to_u64(kv.mod_revision()),
        leased: kv.lease() != 0,
        ttl: None,
    }
}

fn kv(client: &Client) -> etcd_client::KvClient {
    client.kv_client().max_decoding_message_size(MAX_ANSWER_BYTES)
}

/// etcd's revisions and lease ids are positive.
pub(super) fn to_u64(number: i64) -> u64 {
    u64::try_from(number).unwrap_or_default()
}

fn to_i64(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_ends_before_its_successor() {
        assert_eq!(range_of("a/"), (b"a/".to_vec(), b"a0".to_vec()));
        assert_eq!(range_of(""), (vec![0], vec![0]));
        let (start, end) = range_of("é");
        assert!(start < end && "é/x".as_bytes() < &end[..]);
    }
}
