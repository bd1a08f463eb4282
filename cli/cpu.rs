//! CPU time of processes.

use rustix::time::{ClockId, clock_gettime};

/// User plus system time of this process so far, in seconds.
pub fn process_seconds() -> f64 {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 * 1e-9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_takes_cpu_time() {
        let before = process_seconds();
        let mut sum = 0u64;
        while process_seconds() - before < 0.002 {
            sum = sum.wrapping_add(std::hint::black_box(1));
        }
        assert!(sum > 0 && process_seconds() > before);
    }
}
