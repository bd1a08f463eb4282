//! What a watcher has been told, to tell it only the difference after a gap.
//!
//! A watch that lost its place (the server compacted or lost its history) lists again; [`Known::diff`] turns the fresh
//! listing into the changes that lead from what was told to what is.

use std::collections::BTreeMap;

use super::{Entry, WatchEvent};

/// Keys and revisions a watcher knows.
#[derive(Debug, Default)]
pub(crate) struct Known {
    revisions: BTreeMap<String, u64>,
}

impl Known {
    /// Starts from a listing that the watcher needs not be told.
    pub(crate) fn from_listing(listing: &[Entry]) -> Self {
        Known { revisions: listing.iter().map(|entry| (entry.key.clone(), entry.revision)).collect() }
    }

    /// Takes note of a change that is told.
    pub(crate) fn apply(&mut self, event: &WatchEvent) {
        match event {
            WatchEvent::Put(entry) => {
                self.revisions.insert(entry.key.clone(), entry.revision);
            }
            WatchEvent::Removed { key } => {
                self.revisions.remove(key);
            }
        }
    }

    /// Changes from what is known to `listing`, removals first; takes note of them.
    pub(crate) fn diff(&mut self, listing: Vec<Entry>) -> Vec<WatchEvent> {
        let fresh = Known::from_listing(&listing);
        let gone = self.revisions.keys().filter(|key| !fresh.revisions.contains_key(*key));
        let mut events: Vec<_> = gone.map(|key| WatchEvent::Removed { key: key.clone() }).collect();
        let changed = listing.into_iter().filter(|entry| self.revisions.get(&entry.key) != Some(&entry.revision));
        events.extend(changed.map(WatchEvent::Put));
        *self = fresh;
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: &str, revision: u64) -> Entry {
        Entry { key: key.to_owned(), value: Vec::new(), revision, leased: false, ttl: None }
    }

    #[test]
    fn only_the_difference_is_told() {
        let mut known = Known::from_listing(&[entry("a", 1), entry("b", 2), entry("c", 3)]);
        known.apply(&WatchEvent::Put(entry("d", 4)));
        known.apply(&WatchEvent::Removed { key: "c".to_owned() });
        let events = known.diff(vec![entry("a", 1), entry("c", 6), entry("d", 5)]);
        let removed = WatchEvent::Removed { key: "b".to_owned() };
        assert_eq!(events, [removed, WatchEvent::Put(entry("c", 6)), WatchEvent::Put(entry("d", 5))]);
        assert!(known.diff(vec![entry("a", 1), entry("c", 6), entry("d", 5)]).is_empty());
    }
}
