//! Work done by several threads at once, and how long it took.
//!
//! A model's workers share the memory's bandwidth, the last cache and the power of the chip, so kernels are measured on as many threads as models use.
//! Deliberately absent: what is done.

use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long work took.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Took {
    /// The time that the slowest thread had a CPU. What other programs take from a thread is not in it.
    pub cpu: Duration,
    /// From the first beginning to the last end.
    pub wall: Duration,
}

/// Where threads wait for each other, as often as they like: each says that it is there and looks until all are, as a model's workers do.
#[derive(Debug)]
pub struct Meeting {
    threads: usize,
    /// How often a thread has come, over all meetings.
    arrived: AtomicUsize,
}

impl Meeting {
    /// Of so many threads.
    pub fn new(threads: usize) -> Meeting {
        Meeting { threads, arrived: AtomicUsize::new(0) }
    }

    /// Waits until all threads are here. What each wrote before is seen by all after.
    pub fn meet(&self) {
        let ticket = self.arrived.fetch_add(1, Ordering::AcqRel);
        let all = (ticket / self.threads + 1) * self.threads;
        let mut looks = 0u32;
        while self.arrived.load(Ordering::Acquire) < all {
            looks = looks.wrapping_add(1);
            // A thread whose partner has no CPU must not keep it from getting one.
            if looks.is_multiple_of(4096) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
    }
}

/// The time that this thread has had a CPU.
pub fn cpu_time() -> Duration {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is valid for the call.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t) };
    Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
}

/// Runs `work` on `threads` threads, each with its index, all beginning together.
pub fn together(threads: usize, work: &(impl Fn(usize) + Sync)) -> Took {
    let barrier = Barrier::new(threads);
    let one = |index: usize| {
        barrier.wait();
        let (began, cpu) = (Instant::now(), cpu_time());
        work(index);
        (began, Instant::now(), cpu_time() - cpu)
    };
    std::thread::scope(|scope| {
        let one = &one;
        let others: Vec<_> = (1..threads).map(|index| scope.spawn(move || one(index))).collect();
        let (mut first, mut last, mut cpu) = one(0);
        for other in others {
            let (began, ended, used) = other.join().expect("measuring does not panic");
            (first, last, cpu) = (first.min(began), last.max(ended), cpu.max(used));
        }
        Took { cpu, wall: last - first }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_leaves_a_meeting_before_all_have_come() {
        let (meeting, came) = (Meeting::new(3), AtomicUsize::new(0));
        together(3, &|_| {
            for round in 1..=100 {
                came.fetch_add(1, Ordering::Relaxed);
                meeting.meet();
                assert_eq!(came.load(Ordering::Relaxed), 3 * round);
                meeting.meet();
            }
        });
    }

    #[test]
    fn every_thread_works_once_and_waiting_is_no_work() {
        let sum = AtomicUsize::new(0);
        let took = together(3, &|index| {
            sum.fetch_add(1 << (8 * index), Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(10 * index as u64));
        });
        assert_eq!(sum.into_inner(), 0x01_0101);
        assert!(took.wall >= Duration::from_millis(20) && took.cpu < took.wall, "{took:?}");
    }
}
