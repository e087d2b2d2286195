//! The barrier under loom: every interleaving of a few workers, with every write that a weak memory model lets them see late.
//!
//! A wake-up that is lost is a deadlock to loom, and a write that is not visible after the barrier is a data race. The source is the runtime's own, over
//! loom's atomics and a model of the futex.

/// In the place of the runtime's `sync`.
mod sync {
    pub use loom::hint::spin_loop;
    pub use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
    pub const BURST: u32 = 1;
}

/// In the place of the runtime's `futex`: a queue whose lock orders sleeping and waking, as the kernel's does.
mod futex {
    use loom::sync::atomic::{AtomicU32, Ordering};
    use loom::sync::{Condvar, Mutex};

    loom::lazy_static! {
        static ref QUEUE: (Mutex<()>, Condvar) = (Mutex::new(()), Condvar::new());
    }

    pub fn wait(word: &AtomicU32, expected: u32) {
        let lock = QUEUE.0.lock().unwrap();
        if word.load(Ordering::SeqCst) == expected {
            drop(QUEUE.1.wait(lock).unwrap());
        }
    }

    pub fn wake_all(_word: &AtomicU32) {
        let _lock = QUEUE.0.lock().unwrap();
        QUEUE.1.notify_all();
    }
}

#[allow(dead_code)]
#[path = "../src/barrier.rs"]
mod barrier;

use barrier::Barrier;
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use std::time::Duration;

/// What the workers share: in round `r` each writes its own cell of row `r % 2`, and reads the others' after the barrier.
struct Shared {
    barrier: Barrier,
    cells: [Vec<UnsafeCell<usize>>; 2],
}

fn work(shared: &Shared, worker: usize, rounds: usize) {
    for round in 0..rounds {
        let row = &shared.cells[round % 2];
        // SAFETY: loom looks whether anybody else is at the cell.
        row[worker].with_mut(|cell| unsafe { *cell = round + 1 });
        shared.barrier.wait();
        for cell in row {
            // SAFETY: as above.
            assert_eq!(cell.with(|cell| unsafe { *cell }), round + 1);
        }
    }
}

fn explore(workers: usize, rounds: usize, preemptions: usize) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.check(move || {
        let row = || (0..workers).map(|_| UnsafeCell::new(0)).collect();
        let shared = Arc::new(Shared { barrier: Barrier::new(workers, Duration::ZERO), cells: [row(), row()] });
        let others: Vec<_> = (1..workers)
            .map(|worker| {
                let shared = shared.clone();
                loom::thread::spawn(move || work(&shared, worker, rounds))
            })
            .collect();
        work(&shared, 0, rounds);
        others.into_iter().for_each(|other| other.join().unwrap());
    });
}

#[test]
fn two_workers_meet_again_and_again() {
    explore(2, 3, 3);
}

#[test]
fn three_workers_meet() {
    explore(3, 2, 2);
}
