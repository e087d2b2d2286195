//! Which of several ways is fastest, on a machine that is never quiet.
//!
//! The ways take turns, so that a disturbance meets all of them, and are compared turn by turn with the incumbent: the ratio of two times that were
//! measured one after the other does not know whether the machine was slow in that minute. The slower half leaves from time to time. What remains is
//! measured anew, since the best of many is also the luckiest, and must win by more than the noise; otherwise the incumbent stays.
//! Deliberately absent: what is measured.

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

/// Turns before the slower half leaves.
const ROUNDS: usize = 5;

/// Turns of two that are compared, at least and at most, when a run takes some milliseconds.
pub const TURNS: RangeInclusive<usize> = 15..=61;

/// A gain less than this is none: it would not be worth an entry in a record.
const LEAST_GAIN: f64 = 0.01;

/// Standard errors by which a winner must win.
const CERTAIN: f64 = 3.0;

/// How the time of a way compares to that of the incumbent.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Ratio {
    /// The median of the ratios of all turns; less than 1 is faster.
    pub median: f64,
    /// The standard error of the median, from the spread of the ratios.
    pub error: f64,
}

impl Ratio {
    /// Of times measured in turn.
    pub fn of(times: &[f64], incumbent: &[f64]) -> Ratio {
        let mut ratios: Vec<f64> = times.iter().zip(incumbent).map(|(a, b)| a / b).collect();
        let middle = median(&mut ratios);
        let mut spread: Vec<f64> = ratios.iter().map(|r| (r - middle).abs()).collect();
        // 1.4826 makes a standard deviation of the median absolute deviation, 1.2533 the error of a median of it (both for normal noise).
        let error = 1.2533 * 1.4826 * median(&mut spread) / (ratios.len() as f64).sqrt();
        Ratio { median: middle, error }
    }

    /// Whether it is faster, for certain and by enough.
    pub fn wins(self) -> bool {
        self.median + CERTAIN * self.error < 1.0 - LEAST_GAIN / 2.0 && self.median < 1.0 - LEAST_GAIN
    }

    /// Whether it is slower, for certain and by enough to matter.
    pub fn loses(self) -> bool {
        self.median - CERTAIN * self.error > 1.0 + LEAST_GAIN / 2.0 && self.median > 1.0 + LEAST_GAIN
    }
}

/// The median; NaN of none.
pub fn median(numbers: &mut [f64]) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Why a contest has no result.
#[derive(Debug, thiserror::Error)]
pub enum Ended<E> {
    /// The time is over.
    #[error("the time is over")]
    Time,
    /// A measurement failed.
    #[error(transparent)]
    Failed(#[from] E),
}

/// The number of the winner among `ways`; 0, the incumbent, unless another is faster for certain.
///
/// # Errors
/// When `until` comes before the result, or `run` fails.
pub fn contest<E>(
    ways: usize,
    until: Instant,
    run: &mut impl FnMut(usize) -> Result<Duration, E>,
) -> Result<usize, Ended<E>> {
    let mut left: Vec<usize> = (1..ways).collect();
    while left.len() > 1 {
        let times = rounds(&left, ROUNDS, until, run)?;
        let mut ranked: Vec<(f64, usize)> =
            left.iter().enumerate().map(|(i, &way)| (Ratio::of(&times[i + 1], &times[0]).median, way)).collect();
        ranked.sort_by(|a, b| a.0.total_cmp(&b.0));
        ranked.truncate(left.len().div_ceil(2));
        left = ranked.into_iter().map(|(_, way)| way).collect();
    }
    let Some(&last) = left.first() else { return Ok(0) };
    Ok(if duel(last, TURNS, until, run)?.wins() { last } else { 0 })
}

/// Compares a way with the incumbent until it is certain which is faster, or that it does not matter: in so many turns at least and at most.
///
/// # Errors
/// As [`contest`].
pub fn duel<E>(
    way: usize,
    turns: RangeInclusive<usize>,
    until: Instant,
    run: &mut impl FnMut(usize) -> Result<Duration, E>,
) -> Result<Ratio, Ended<E>> {
    let (mut ours, mut incumbent) = (Vec::new(), Vec::new());
    loop {
        let times = rounds(&[way], (*turns.start()).min(*turns.end() - ours.len()), until, run)?;
        incumbent.extend(&times[0]);
        ours.extend(&times[1]);
        let ratio = Ratio::of(&ours, &incumbent);
        let clear = ratio.wins() || ratio.loses() || CERTAIN * ratio.error < LEAST_GAIN;
        if clear || ours.len() >= *turns.end() {
            return Ok(ratio);
        }
    }
}

/// Times of the incumbent and of each of `ways`, in seconds: one for each turn. Who begins changes from turn to turn.
fn rounds<E>(
    ways: &[usize],
    turns: usize,
    until: Instant,
    run: &mut impl FnMut(usize) -> Result<Duration, E>,
) -> Result<Vec<Vec<f64>>, Ended<E>> {
    let all: Vec<usize> = std::iter::once(0).chain(ways.iter().copied()).collect();
    let mut times = vec![Vec::with_capacity(turns); all.len()];
    for turn in 0..turns {
        for step in 0..all.len() {
            if Instant::now() >= until {
                return Err(Ended::Time);
            }
            let i = (turn + step) % all.len();
            times[i].push(run(all[i])?.as_secs_f64());
        }
    }
    Ok(times)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};
    use rand_xoshiro::Xoshiro256PlusPlus;

    /// Runs a contest of ways that take `times` milliseconds on a machine that is slower by up to 30 % for stretches, with jitter of 3 %.
    fn noisy(times: &[f64], seed: u64) -> usize {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
        let (mut slow, mut left) = (1.0, 0);
        let mut run = |way: usize| {
            if left == 0 {
                (slow, left) = (random.random_range(1.0..1.3), random.random_range(5..40));
            }
            left -= 1;
            let jitter: f64 = random.random_range(0.97..1.03);
            Ok::<_, std::io::Error>(Duration::from_secs_f64(times[way] * slow * jitter / 1e3))
        };
        contest(times.len(), Instant::now() + Duration::from_secs(60), &mut run).expect("there is time")
    }

    #[test]
    fn the_faster_wins_through_noise() {
        for seed in 0..50 {
            assert_eq!(noisy(&[10.0, 9.9, 9.0, 10.5, 12.0], seed), 2, "seed {seed}");
        }
    }

    #[test]
    fn equals_never_replace_the_incumbent() {
        let replaced = (0..200).filter(|&seed| noisy(&[10.0; 6], seed) != 0).count();
        assert!(replaced <= 1, "{replaced} of 200");
    }

    #[test]
    fn no_time_is_no_result() {
        let mut run = |_| Ok::<_, std::io::Error>(Duration::ZERO);
        assert!(matches!(contest(2, Instant::now(), &mut run), Err(Ended::Time)));
        assert_eq!(contest(1, Instant::now(), &mut run).unwrap(), 0);
    }

    #[test]
    fn the_median_has_an_error() {
        let ratio = Ratio::of(&[1.0, 2.0, 3.0], &[1.0, 1.0, 1.0]);
        assert_eq!(ratio.median, 2.0);
        assert!((ratio.error - 1.2533 * 1.4826 / 3f64.sqrt()).abs() < 1e-12);
    }
}
