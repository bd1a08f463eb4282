//! Durations counted in buckets of at most 1.6 % width, so that a run of any length takes the same memory.

use std::time::Duration;

/// Buckets per power of two.
const PER_OCTAVE: u64 = 64;
const OCTAVE_BITS: u32 = PER_OCTAVE.trailing_zeros();
const BUCKETS: usize = ((64 - OCTAVE_BITS as usize) + 1) * PER_OCTAVE as usize;

/// Counts of durations.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Box<[u64]>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { counts: vec![0; BUCKETS].into_boxed_slice(), total: 0 }
    }
}

impl Histogram {
    /// Adds one duration.
    pub fn record(&mut self, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.counts[bucket(nanos)] += 1;
        self.total += 1;
    }

    /// Adds all durations of `other`.
    pub fn merge(&mut self, other: &Histogram) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.total += other.total;
    }

    /// Number of durations.
    pub fn count(&self) -> u64 {
        self.total
    }

    /// The duration that `quantile` (0 to 1) of all do not exceed, in microseconds, to bucket width; `None` when empty.
    pub fn quantile_us(&self, quantile: f64) -> Option<f64> {
        let rank = ((self.total as f64 * quantile).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        let index = self.counts.iter().position(|count| {
            seen += count;
            seen >= rank
        })?;
        Some(middle(index) / 1e3)
    }
}

fn bucket(nanos: u64) -> usize {
    let shift = (63 - (nanos | 1).leading_zeros()).saturating_sub(OCTAVE_BITS);
    (u64::from(shift) * PER_OCTAVE + (nanos >> shift)) as usize
}

fn middle(index: usize) -> f64 {
    let index = index as u64;
    let shift = (index / PER_OCTAVE).saturating_sub(1);
    let low = (index - shift * PER_OCTAVE) << shift;
    low as f64 + ((1u64 << shift) - 1) as f64 / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_bucket_width() {
        let mut histogram = Histogram::default();
        for nanos in 1..=100_000u64 {
            histogram.record(Duration::from_nanos(nanos));
        }
        for (quantile, expected) in [(0.5, 50.0), (0.99, 99.0), (1.0, 100.0)] {
            let found = histogram.quantile_us(quantile).unwrap_or(0.0);
            assert!((found / expected - 1.0).abs() < 0.016, "{quantile}: {found} us instead of {expected}");
        }
    }

    #[test]
    fn every_duration_has_a_bucket_and_small_ones_are_exact() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.quantile_us(0.5), None);
        histogram.record(Duration::MAX);
        histogram.record(Duration::ZERO);
        assert_eq!(histogram.quantile_us(0.01), Some(0.0));
        let mut other = Histogram::default();
        other.record(Duration::from_nanos(63));
        other.merge(&histogram);
        assert_eq!((other.count(), other.quantile_us(0.5)), (3, Some(0.063)));
    }

    #[test]
    fn buckets_follow_each_other() {
        let mut last = 0;
        for nanos in (0..1 << 14).chain([u64::MAX / 2, u64::MAX]) {
            let index = bucket(nanos);
            assert!(index >= last && index < BUCKETS);
            last = index;
        }
    }
}
