//! How soon a place is free: what `Retry-After` tells a client that was refused because the queue is full.
//!
//! A place is free when some request has ended, so the pace is the mean time between two ends. Times at which nothing was open
//! do not count.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Weight of the newest interval in the mean.
const NEWEST: f64 = 0.25;
/// Seconds that a client is told at least and at most.
const SHORTEST: u64 = 1;
const LONGEST: u64 = 60;

/// The pace at which requests end.
#[derive(Default)]
pub struct Pace(Mutex<State>);

#[derive(Default)]
struct State {
    /// The last end, or the beginning of the work when none has ended since; `None` while nothing is open.
    since: Option<Instant>,
    /// Mean time between two ends, in seconds.
    interval: Option<f64>,
}

impl Pace {
    /// Takes in that `ended` requests have ended by `now`, since the call before, and whether others are open.
    pub fn observe(&self, ended: usize, open: bool, now: Instant) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if ended > 0
            && let Some(since) = state.since
        {
            let newest = now.saturating_duration_since(since).as_secs_f64() / ended as f64;
            state.interval = Some(state.interval.map_or(newest, |mean| mean + NEWEST * (newest - mean)));
        }
        if !open {
            state.since = None;
        } else if ended > 0 || state.since.is_none() {
            state.since = Some(now);
        }
    }

    /// Whole seconds after which a place may be free. Before anything has ended it is as long as the work has been going on.
    pub fn seconds(&self, now: Instant) -> u64 {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let going_on = state.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        let seconds = state.interval.unwrap_or(going_on.as_secs_f64());
        (seconds.ceil() as u64).clamp(SHORTEST, LONGEST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_is_that_of_busy_times() {
        let (pace, start) = (Pace::default(), Instant::now());
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        assert_eq!(pace.seconds(at(0.0)), 1, "nothing is known");
        pace.observe(0, true, at(0.0));
        assert_eq!(pace.seconds(at(6.5)), 7, "nothing has ended for so long");
        // Two ends in twenty seconds.
        pace.observe(2, true, at(20.0));
        assert_eq!(pace.seconds(at(21.0)), 10);
        // One after two more: the mean moves a quarter of the way.
        pace.observe(1, false, at(22.0));
        assert_eq!(pace.seconds(at(22.0)), 8);
        // An hour of nothing is no pace.
        pace.observe(0, true, at(3600.0));
        pace.observe(1, true, at(3602.0));
        assert_eq!(pace.seconds(at(3602.0)), 7);
        pace.observe(1, true, at(9000.0));
        assert_eq!(pace.seconds(at(9000.0)), 60, "no client is sent away for longer");
    }
}
