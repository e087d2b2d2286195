//! Where the time of steps goes: stage by stage, as the first worker sees it.
//!
//! Generated code is not changed for it: the workers meet at the caller's barrier after every stage, so the times between are the stages'. What a
//! worker waits for the others counts for the stage. Deliberately absent: what a stage does (the descriptor says it).

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The time of one program's stages, added up over steps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StageTimes {
    /// How many steps.
    pub steps: u64,
    /// For each stage in order.
    pub stages: Vec<Duration>,
}

/// The times of both entry points.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    /// Steps of one token.
    pub decode: StageTimes,
    /// Steps of several.
    pub batch: StageTimes,
}

/// The moments at which one step's stages end, noted by the first worker.
#[derive(Debug, Default)]
pub(crate) struct Marks(Mutex<Vec<Instant>>);

impl Marks {
    /// Notes that a stage ends now; others than the first worker do not.
    pub(crate) fn note(&self, worker: u32) {
        if worker == 0 {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Instant::now());
        }
    }

    /// Adds the step that began at `start` and ends now to `times`.
    pub(crate) fn finish(self, start: Instant, times: &mut StageTimes) {
        let mut ends = self.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        ends.push(Instant::now());
        times.stages.resize(ends.len(), Duration::ZERO);
        let mut before = start;
        for (total, end) in times.stages.iter_mut().zip(ends) {
            *total += end - before;
            before = end;
        }
        times.steps += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_add_up_over_steps() {
        let mut times = StageTimes::default();
        for _ in 0..2 {
            let (marks, start) = (Marks::default(), Instant::now());
            std::thread::sleep(Duration::from_millis(2));
            marks.note(0);
            marks.note(1);
            marks.finish(start, &mut times);
        }
        assert_eq!((times.steps, times.stages.len()), (2, 2), "worker 1 ends no stage");
        assert!(times.stages[0] >= Duration::from_millis(4), "{times:?}");
    }
}
