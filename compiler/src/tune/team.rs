//! Work done by several threads at once, and how long it took.
//!
//! A model's workers share the memory's bandwidth, the last cache and the power of the chip, so kernels are measured on as many threads as models use.
//! Deliberately absent: what is done.

use std::sync::Barrier;
use std::time::{Duration, Instant};

/// Runs `work` on `threads` threads, each with its index, all beginning together; the time until the last ends.
pub fn together(threads: usize, work: &(impl Fn(usize) + Sync)) -> Duration {
    if threads == 1 {
        let started = Instant::now();
        work(0);
        return started.elapsed();
    }
    let barrier = Barrier::new(threads);
    let one = |index: usize| {
        barrier.wait();
        let started = Instant::now();
        work(index);
        (started, Instant::now())
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|index| scope.spawn(move || one(index))).collect();
        let (mut first, mut last) = one(0);
        for other in others {
            let (started, ended) = other.join().expect("measuring does not panic");
            (first, last) = (first.min(started), last.max(ended));
        }
        last - first
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_thread_works_once_and_the_slowest_counts() {
        let sum = AtomicUsize::new(0);
        let took = together(3, &|index| {
            sum.fetch_add(1 << (8 * index), Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(2 * index as u64));
        });
        assert_eq!(sum.into_inner(), 0x01_0101);
        assert!(took >= Duration::from_millis(4), "{took:?}");
    }
}
