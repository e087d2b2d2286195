//! The barrier at which the workers of a step meet: spins for some microseconds, then sleeps in the kernel.
//!
//! Stages of a step last from a few microseconds to milliseconds, so most waits end while spinning. When there are
//! more workers than CPUs spinning only keeps the last worker from running, and the barrier sleeps almost at once.
//!
//! The atomics and the sleeping come from [`crate::sync`] and [`crate::futex`], in whose place `tests/barrier.rs` puts a model that tries all
//! orders in which threads can see each other's writes.
//!
//! Deliberately absent: a tree. All workers count on one cache line, which is fast enough for the core counts of one
//! socket.

use crate::futex;
use crate::sync::{AtomicBool, AtomicU32, BURST, Ordering, fence, spin_loop};
use std::time::{Duration, Instant};

/// A value alone on its cache lines (two of them: CPUs fetch lines in pairs).
#[repr(align(128))]
struct Line<T>(T);

/// A reusable barrier for a fixed number of workers.
///
/// Every write before a worker's [`wait`](Barrier::wait) is visible to every worker after it.
pub struct Barrier {
    /// Workers that are at the barrier.
    arrived: Line<AtomicU32>,
    /// Counts completed meetings; also the futex word.
    generation: Line<AtomicU32>,
    /// Workers that sleep, or are about to.
    sleepers: AtomicU32,
    poisoned: AtomicBool,
    workers: u32,
    spin: Duration,
}

impl Barrier {
    /// A barrier for `workers` workers, which spin for at most `spin` before they sleep.
    pub fn new(workers: usize, spin: Duration) -> Barrier {
        assert!(workers >= 1, "a barrier needs a worker");
        Barrier {
            arrived: Line(AtomicU32::new(0)),
            generation: Line(AtomicU32::new(0)),
            sleepers: AtomicU32::new(0),
            poisoned: AtomicBool::new(false),
            workers: workers as u32,
            spin,
        }
    }

    /// As [`new`](Barrier::new), after `generation` meetings.
    #[cfg(test)]
    pub(crate) fn after(workers: usize, spin: Duration, generation: u32) -> Barrier {
        let barrier = Barrier::new(workers, spin);
        barrier.generation.0.store(generation, Ordering::SeqCst);
        barrier
    }

    /// Meetings so far.
    #[cfg(test)]
    pub(crate) fn generation(&self) -> u32 {
        self.generation.0.load(Ordering::SeqCst)
    }

    /// Returns when all workers have called it.
    ///
    /// # Panics
    /// When [`poison`](Barrier::poison) was called: some worker will never come.
    pub fn wait(&self) {
        assert!(self.try_wait(), "another worker of this step has panicked");
    }

    /// As [`wait`](Barrier::wait), but returns `false` when the barrier was poisoned.
    pub fn try_wait(&self) -> bool {
        if self.workers == 1 {
            fence(Ordering::SeqCst);
            return !self.is_poisoned();
        }
        if self.is_poisoned() {
            return false;
        }
        // The generation cannot change before this worker has arrived.
        let generation = self.generation.0.load(Ordering::Relaxed);
        if self.arrived.0.fetch_add(1, Ordering::AcqRel) + 1 == self.workers {
            self.arrived.0.store(0, Ordering::Relaxed);
            self.release(generation.wrapping_add(1));
            return true;
        }
        if !self.spin_until_past(generation) {
            self.sleep_until_past(generation);
        }
        !self.is_poisoned()
    }

    /// Sends everyone away who waits, or will wait: for a worker that cannot go on.
    pub fn poison(&self) {
        self.poisoned.store(true, Ordering::SeqCst);
        let generation = self.generation.0.load(Ordering::SeqCst);
        self.release(generation.wrapping_add(1));
    }

    /// As new. Nobody may be at the barrier.
    pub fn reset(&self) {
        self.arrived.0.store(0, Ordering::SeqCst);
        self.poisoned.store(false, Ordering::SeqCst);
    }

    fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Relaxed)
    }

    /// Opens the next generation and wakes the sleepers. Either a sleeper's count is seen here, or that sleeper sees
    /// the new generation before it sleeps: both sides write first and then read, with a fence between.
    fn release(&self, next: u32) {
        self.generation.0.store(next, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.sleepers.load(Ordering::Relaxed) != 0 {
            futex::wake_all(&self.generation.0);
        }
    }

    fn past(&self, generation: u32) -> bool {
        self.generation.0.load(Ordering::Acquire) != generation
    }

    fn spin_until_past(&self, generation: u32) -> bool {
        let mut started = None;
        loop {
            for _ in 0..BURST {
                if self.past(generation) {
                    return true;
                }
                spin_loop();
            }
            // The clock is read only after a first burst: short waits do not pay for it.
            let started = *started.get_or_insert_with(Instant::now);
            if started.elapsed() >= self.spin {
                return self.past(generation);
            }
        }
    }

    fn sleep_until_past(&self, generation: u32) {
        self.sleepers.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        while !self.past(generation) {
            futex::wait(&self.generation.0, generation);
        }
        self.sleepers.fetch_sub(1, Ordering::Relaxed);
    }
}
