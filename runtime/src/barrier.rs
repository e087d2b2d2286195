//! The barrier at which the workers of a step meet: spins for some microseconds, then sleeps in the kernel.
//!
//! Stages of a step last from a few microseconds to milliseconds, so most waits end while spinning. When there are
//! more workers than CPUs spinning only keeps the last worker from running, and the barrier sleeps almost at once.
//!
//! Deliberately absent: a tree. All workers count on one cache line, which is fast enough for the core counts of one
//! socket.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
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
    /// the new generation before it sleeps: both sides write first and then read, all sequentially consistent.
    fn release(&self, next: u32) {
        self.generation.0.store(next, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) != 0 {
            futex::wake_all(&self.generation.0);
        }
    }

    fn past(&self, generation: u32) -> bool {
        self.generation.0.load(Ordering::Acquire) != generation
    }

    fn spin_until_past(&self, generation: u32) -> bool {
        const BURST: u32 = 64;
        let mut started = None;
        loop {
            for _ in 0..BURST {
                if self.past(generation) {
                    return true;
                }
                std::hint::spin_loop();
            }
            // The clock is read only after a first burst: short waits do not pay for it.
            let started = *started.get_or_insert_with(Instant::now);
            if started.elapsed() >= self.spin {
                return self.past(generation);
            }
        }
    }

    fn sleep_until_past(&self, generation: u32) {
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while self.generation.0.load(Ordering::SeqCst) == generation {
            futex::wait(&self.generation.0, generation);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Sleeping on a word, on Linux.
#[cfg(any(target_os = "linux", target_os = "android"))]
mod futex {
    use std::ptr;
    use std::sync::atomic::AtomicU32;

    /// Sleeps until woken if `word` still holds `expected`; may also return for no reason.
    pub fn wait(word: &AtomicU32, expected: u32) {
        // SAFETY: FUTEX_WAIT only reads the word, which lives as long as the call; no timeout is given.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                word.as_ptr(),
                libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                expected,
                ptr::null::<libc::timespec>(),
            );
        }
    }

    /// Wakes everyone who sleeps on `word`.
    pub fn wake_all(word: &AtomicU32) {
        // SAFETY: FUTEX_WAKE uses only the word's address.
        unsafe {
            libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, i32::MAX);
        }
    }
}

/// Elsewhere there is no such call in the standard library: give the CPU away and look again.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
mod futex {
    use std::sync::atomic::{AtomicU32, Ordering};

    pub fn wait(word: &AtomicU32, expected: u32) {
        if word.load(Ordering::SeqCst) == expected {
            std::thread::sleep(std::time::Duration::from_micros(50));
        }
    }

    pub fn wake_all(_word: &AtomicU32) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;
    use std::thread;

    /// All workers add to a counter of their round; after the barrier everyone must see the full count.
    fn rounds(workers: usize, rounds: u64, spin: Duration) {
        let barrier = Barrier::new(workers, spin);
        let counters: Vec<AtomicU64> = (0..rounds).map(|_| AtomicU64::new(0)).collect();
        thread::scope(|scope| {
            for worker in 0..workers {
                let (barrier, counters) = (&barrier, &counters);
                scope.spawn(move || {
                    for (round, counter) in counters.iter().enumerate() {
                        if (round + worker) % 97 == 0 {
                            thread::yield_now();
                        }
                        counter.fetch_add(1, Ordering::Relaxed);
                        barrier.wait();
                        assert_eq!(counter.load(Ordering::Relaxed), workers as u64, "round {round}");
                    }
                });
            }
        });
    }

    #[test]
    fn nobody_passes_before_all_have_come() {
        for workers in [1, 2, 3, 5] {
            rounds(workers, 3000, Duration::from_micros(20));
        }
    }

    #[test]
    fn nobody_is_forgotten_asleep() {
        // Without spinning every wait goes through the kernel: a lost wake-up would hang here.
        for workers in [2, 3, 8] {
            rounds(workers, 3000, Duration::ZERO);
        }
    }

    #[test]
    fn the_generation_may_wrap() {
        let barrier = Barrier::new(2, Duration::ZERO);
        barrier.generation.0.store(u32::MAX - 2, Ordering::SeqCst);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| (0..8).for_each(|_| barrier.wait()));
            }
        });
        assert_eq!(barrier.generation.0.load(Ordering::SeqCst), 5);
    }

    #[test]
    fn a_poisoned_barrier_lets_nobody_wait_for_ever() {
        let barrier = Barrier::new(2, Duration::ZERO);
        thread::scope(|scope| {
            let waiter = scope.spawn(|| barrier.wait());
            thread::sleep(Duration::from_millis(20));
            barrier.poison();
            assert!(waiter.join().is_err());
        });
        barrier.reset();
        thread::scope(|scope| {
            scope.spawn(|| barrier.wait());
            barrier.wait();
        });
    }
}
