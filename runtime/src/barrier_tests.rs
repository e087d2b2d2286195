//! The barrier on real threads. Every order in which they can see each other's writes is tried in `tests/barrier.rs`, which includes the
//! barrier's source and has no use for these tests.

use crate::barrier::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

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
    let barrier = Barrier::after(2, Duration::ZERO, u32::MAX - 2);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| (0..8).for_each(|_| barrier.wait()));
        }
    });
    assert_eq!(barrier.generation(), 5);
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
