//! The pool of workers: every worker runs the same function, the calling thread is worker 0.
//!
//! The workers of a step meet at [`Barrier`]s inside generated code; the pool itself is two more of them, one before
//! and one after each job. Nothing is queued and nothing is stolen: each worker knows its share by its index.
//!
//! Deliberately absent: nested or simultaneous jobs. A second caller waits until the first is done.

use crate::barrier::Barrier;
use crate::cpus;
use crate::error::{Error, Result};
use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::Duration;

/// How long a worker spins at a barrier inside a step.
const SPIN_IN_STEP: Duration = Duration::from_micros(100);
/// How long a worker spins for the next step: a token is sampled and printed meanwhile.
const SPIN_BETWEEN_STEPS: Duration = Duration::from_micros(300);

/// One worker of a running job.
#[derive(Clone, Copy)]
pub struct Worker<'a> {
    /// Which one: 0 is the thread that called [`Pool::run`].
    pub index: usize,
    /// How many there are.
    pub count: usize,
    /// Where all workers of the job can meet.
    pub barrier: &'a Barrier,
}

type Job = *const (dyn Fn(Worker<'_>) + Sync);

struct Shared {
    start: Barrier,
    inner: Barrier,
    end: Barrier,
    /// The job of the current round; `None` tells the workers to stop. Written by the caller before `start`, read by
    /// the workers between `start` and `end`.
    job: UnsafeCell<Option<Job>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is the only part that is not `Sync`. It is written only before the barrier `start` and read only after
// it, and the barriers order the two; the function behind it is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above; a job does not belong to a thread.
unsafe impl Send for Shared {}

/// A pool of workers.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    workers: usize,
    /// The thread that was confined to its core, and where it could run before.
    confined: Option<(ThreadId, Vec<usize>)>,
    /// Held while a job runs.
    running: Mutex<()>,
}

/// How a pool uses the CPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PoolOptions {
    /// Workers, the caller included; `None` takes [`cpus::default_threads`].
    pub threads: Option<usize>,
    /// Also confine the thread that makes the pool to its own core, until that thread drops the pool. For programs that
    /// own their main thread.
    pub pin_caller: bool,
}

impl Pool {
    /// A pool of `threads` workers, the caller included.
    pub fn new(threads: usize) -> Result<Pool> {
        Pool::with_options(PoolOptions { threads: Some(threads), ..PoolOptions::default() })
    }

    /// A pool made to measure. When there is exactly one worker for each core that the process may use, each stays on
    /// its core; with fewer, the operating system chooses (another process may use the first cores too).
    pub fn with_options(options: PoolOptions) -> Result<Pool> {
        let cores = cpus::cores();
        let workers = options.threads.unwrap_or_else(cpus::default_threads).max(1);
        // With more workers than CPUs, or than the quota pays for, spinning takes time from those that work.
        let cpus = (cores.iter().map(Vec::len).sum::<usize>() as f64).min(cpus::quota().unwrap_or(f64::INFINITY));
        let spin = |time: Duration| if workers as f64 <= cpus { time } else { Duration::ZERO };
        let shared = Arc::new(Shared {
            start: Barrier::new(workers, spin(SPIN_BETWEEN_STEPS)),
            inner: Barrier::new(workers, spin(SPIN_IN_STEP)),
            end: Barrier::new(workers, spin(SPIN_IN_STEP)),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
        });
        let pinned = workers == cores.len() && workers > 1;
        let mut handles = Vec::with_capacity(workers - 1);
        for index in 1..workers {
            let theirs = shared.clone();
            let core = cores.get(index).filter(|_| pinned).cloned().unwrap_or_default();
            let body = move || {
                if !core.is_empty() {
                    cpus::pin(&core);
                }
                work(&theirs, index, workers);
            };
            match thread::Builder::new().name(format!("moec-{index}")).spawn(body) {
                Ok(handle) => handles.push(handle),
                Err(source) => {
                    shared.start.poison();
                    handles.into_iter().for_each(|handle| drop(handle.join()));
                    return Err(Error::Threads { threads: workers, source });
                }
            }
        }
        let confined = (pinned && options.pin_caller).then(|| {
            cpus::pin(&cores[0]);
            (thread::current().id(), cores.concat())
        });
        Ok(Pool { shared, threads: handles, workers, confined, running: Mutex::new(()) })
    }

    /// Workers, the caller included.
    pub fn workers(&self) -> usize {
        self.workers
    }

    /// Where the workers of a running job meet.
    pub fn barrier(&self) -> &Barrier {
        &self.shared.inner
    }

    /// Runs `job` on every worker and returns when all are done.
    ///
    /// # Panics
    /// When `job` panics on a worker: the others are let go from the barrier and panic too, and one of the panics goes
    /// on here.
    pub fn run(&self, job: &(dyn Fn(Worker<'_>) + Sync)) {
        let _running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. The workers use the job between `start` and `end`, and this function does
        // not return before `end`.
        let job_pointer: Job = unsafe { std::mem::transmute::<*const (dyn Fn(Worker<'_>) + Sync + '_), Job>(job) };
        // SAFETY: all workers wait at `start`, so nobody reads the cell.
        unsafe { *shared.job.get() = Some(job_pointer) };
        shared.start.wait();
        perform(shared, job, 0, self.workers);
        shared.end.wait();
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            shared.inner.reset();
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: all workers wait at `start`, so nobody reads the cell.
        unsafe { *self.shared.job.get() = None };
        self.shared.start.wait();
        for thread in self.threads.drain(..) {
            thread.join().ok();
        }
        if let Some((thread, cpus)) = &self.confined
            && *thread == thread::current().id()
        {
            cpus::pin(cpus);
        }
    }
}

/// The life of a worker thread.
fn work(shared: &Shared, index: usize, count: usize) {
    // A poisoned start means that the pool could not be completed.
    while shared.start.try_wait() {
        // SAFETY: the caller wrote the cell before `start` and does not touch it before `end`.
        let Some(job) = (unsafe { *shared.job.get() }) else { return };
        // SAFETY: the caller keeps the job alive until `end`.
        perform(shared, unsafe { &*job }, index, count);
        shared.end.wait();
    }
}

fn perform(shared: &Shared, job: &(dyn Fn(Worker<'_>) + Sync), index: usize, count: usize) {
    let worker = Worker { index, count, barrier: &shared.inner };
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(worker))) {
        // The first panic is the cause; later ones come from the poisoned barrier.
        shared.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        shared.inner.poison();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_worker_runs_once_per_job() {
        for workers in [1, 2, 3, 7] {
            let pool = Pool::new(workers).unwrap();
            assert_eq!(pool.workers(), workers);
            let calls: Vec<AtomicUsize> = (0..workers).map(|_| AtomicUsize::new(0)).collect();
            for round in 1..=200 {
                pool.run(&|worker| {
                    assert_eq!(worker.count, workers);
                    calls[worker.index].fetch_add(1, Ordering::Relaxed);
                });
                assert!(calls.iter().all(|c| c.load(Ordering::Relaxed) == round));
            }
        }
    }

    #[test]
    fn stages_see_all_of_the_stage_before() {
        // Each stage adds up what all workers wrote in the stage before; more workers than this machine may have CPUs.
        for workers in [1, 2, 3, 6] {
            let pool = Pool::new(workers).unwrap();
            let rows: [Vec<AtomicUsize>; 2] =
                std::array::from_fn(|_| (0..workers).map(|_| AtomicUsize::new(1)).collect());
            pool.run(&|worker| {
                for stage in 0..500 {
                    let sum: usize = rows[stage % 2].iter().map(|v| v.load(Ordering::Relaxed)).sum();
                    rows[(stage + 1) % 2][worker.index].store(sum % 1009, Ordering::Relaxed);
                    worker.barrier.wait();
                }
            });
            let expected = (0..500).fold(1, |value, _| value * workers % 1009);
            assert!(rows[0].iter().all(|v| v.load(Ordering::Relaxed) == expected));
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3).unwrap();
        for guilty in 0..3 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.run(&|worker| {
                    assert_ne!(worker.index, guilty, "worker gives up");
                    worker.barrier.wait();
                });
            }));
            let panic = caught.unwrap_err();
            let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
            assert!(text.contains("worker gives up"), "{text}");
            let count = AtomicUsize::new(0);
            pool.run(&|worker| {
                worker.barrier.wait();
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.into_inner(), 3);
        }
    }

    #[test]
    fn the_caller_is_let_go_again() {
        thread::spawn(|| {
            let before = cpus::allowed_cpus();
            let cores = cpus::cores();
            let pool = Pool::with_options(PoolOptions { threads: Some(cores.len()), pin_caller: true }).unwrap();
            if cores.len() > 1 {
                assert_eq!(cpus::allowed_cpus(), cores[0]);
            }
            drop(pool);
            assert_eq!(cpus::allowed_cpus(), before);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn callers_take_turns() {
        let pool = Pool::new(2).unwrap();
        let inside = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        pool.run(&|worker| {
                            inside.fetch_add(1, Ordering::SeqCst);
                            worker.barrier.wait();
                            assert_eq!(inside.load(Ordering::SeqCst), 2);
                            worker.barrier.wait();
                            inside.fetch_sub(1, Ordering::SeqCst);
                        });
                    }
                });
            }
        });
    }
}
