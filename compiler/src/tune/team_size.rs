//! How many threads a model is fastest with: its products measured with all and with fewer.
//!
//! Reading may need fewer threads than there are to reach what memory gives, and then more are in each other's way; computing needs all. An executable has one
//! team for both, so what counts is a prompt and an answer together. Deliberately absent: attention, and waiting at barriers, which is longer the more threads there are.

use super::code::CodeError;
use super::contest::{Ended, Ratio, median};
use super::products::Product;
use super::workload::Workload;
use crate::target::Tuning;
use std::time::Instant;

/// Tokens of the prompt that counts …
pub const PROMPT: usize = 512;

/// … and of the answer: what `bench` of an executable measures when nobody says.
pub const ANSWER: usize = 64;

/// Turns in which all sizes are measured.
const TURNS: usize = 9;

/// Sizes are multiples of this part of all threads.
const PARTS: usize = 8;

/// What a team of some size takes for the products of a model.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Sized {
    /// Threads.
    pub threads: usize,
    /// Seconds of one decoded token.
    pub decode: f64,
    /// Seconds of a prompt of [`PROMPT`] tokens.
    pub prefill: f64,
}

/// Teams of several sizes.
#[derive(Clone, PartialEq, Debug)]
pub struct TeamSize {
    /// The best for a prompt and an answer of [`ANSWER`] tokens: all, unless fewer are faster by more than the noise.
    pub best: usize,
    /// What was measured, the largest team first.
    pub measured: Vec<Sized>,
}

/// The sizes that are tried of teams of at most `threads`, the largest first.
fn sizes(threads: usize) -> Vec<usize> {
    let mut all: Vec<usize> = (1..=PARTS).rev().map(|part| (threads * part / PARTS).max(1)).collect();
    all.dedup();
    all
}

/// Measures `products`, written as `tuning` says, with all threads of `workload` and with fewer, in turn.
///
/// # Errors
/// When `until` comes before the end, or a measurement fails.
pub fn measure(
    workload: &mut Workload,
    products: &[Product],
    tuning: &Tuning,
    until: Instant,
    progress: &dyn Fn(f64),
) -> Result<TeamSize, Ended<CodeError>> {
    let sizes = sizes(workload.threads());
    let mut times: Vec<[Vec<f64>; 2]> = vec![Default::default(); sizes.len()];
    for turn in 0..TURNS {
        for step in 0..sizes.len() {
            if Instant::now() >= until {
                return Err(Ended::Time);
            }
            progress((turn * sizes.len() + step) as f64 / (TURNS * sizes.len()) as f64);
            let at = (turn + step) % sizes.len();
            for (which, tokens) in [1, PROMPT].into_iter().enumerate() {
                let seconds = seconds(workload, products, tuning, sizes[at], tokens)?;
                times[at][which].push(seconds);
            }
        }
    }
    workload.forget();
    let both = |[decode, prefill]: &[Vec<f64>; 2]| -> Vec<f64> {
        decode.iter().zip(prefill).map(|(decode, prefill)| ANSWER as f64 * decode + prefill).collect()
    };
    let all = both(&times[0]);
    let mut best = (1.0, sizes[0]);
    for (times, &threads) in times.iter().zip(&sizes).skip(1) {
        let ratio = Ratio::of(&both(times), &all);
        if ratio.wins() && ratio.median < best.0 {
            best = (ratio.median, threads);
        }
    }
    let sized = |(&threads, [decode, prefill]): (&usize, &mut [Vec<f64>; 2])| Sized {
        threads,
        decode: median(decode),
        prefill: median(prefill),
    };
    Ok(TeamSize { best: best.1, measured: sizes.iter().zip(&mut times).map(sized).collect() })
}

/// Seconds that all products of a step of `tokens` tokens take `threads` threads.
fn seconds(
    workload: &mut Workload,
    products: &[Product],
    tuning: &Tuning,
    threads: usize,
    tokens: usize,
) -> Result<f64, CodeError> {
    let mut seconds = 0.0;
    for product in products {
        let wanted = if tokens == 1 { product.decode_row_tokens() } else { product.row_tokens(tokens) };
        if wanted > 0.0 {
            let load = product.load(tokens);
            let took = workload.run_with(threads, product, &tuning.product(product.shape), &load)?;
            seconds += took.as_secs_f64() * wanted / workload.row_tokens(threads, product, &load);
        }
    }
    Ok(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_parts_of_all() {
        assert_eq!(sizes(1), [1]);
        assert_eq!(sizes(2), [2, 1]);
        assert_eq!(sizes(6), [6, 5, 4, 3, 2, 1]);
        assert_eq!(sizes(16), [16, 14, 12, 10, 8, 6, 4, 2]);
    }
}
