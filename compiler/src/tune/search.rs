//! The search for one shape: what is tried, in which order, and what must hold in the end.
//!
//! One choice after another, each against the best so far: the kernel of a single token; the tile of many; the kernels of the few tokens that are left
//! over, or that an expert has in a short prompt; then block and chunk. For each the [cost model](super::cost) proposes and a [contest](super::contest)
//! decides. At last the whole is compared with the default for one token and for prompts of all [`STEPS`]: what is faster nowhere or slower anywhere is not taken.
//! Deliberately absent: what is known of other shapes.

use super::code::CodeError;
use super::contest::{Ended, Ratio, TURNS, contest, duel, median};
use super::cost::{Cost, cost};
use super::limits::Limits;
use super::products::Product;
use super::workload::{MOST_TOKENS, Workload};
use crate::kernels::{MAX_TOKENS, MatmulTuning, Prefetch};
use crate::target::ProductTuning;
use std::time::{Duration, Instant};

/// Tokens of the steps that are measured: one, and prompts.
pub const STEPS: [usize; 4] = [1, 16, 64, 512];

/// Ways that are measured at most for one choice.
const PROPOSED: usize = 8;

/// What was measured for one length of a step.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Measured {
    /// Tokens of the step.
    pub step: usize,
    /// Tokens that meet one matrix.
    pub tokens: usize,
    /// Share of the machine's limit that the default reaches.
    pub default_share: f64,
    /// Share that the choices reach.
    pub tuned_share: f64,
}

/// The result for one shape.
#[derive(Clone, PartialEq, Debug)]
pub struct Found {
    /// The choices.
    pub tuning: ProductTuning,
    /// What they are worth, for each step that was measured.
    pub measured: Vec<Measured>,
}

/// A search under way.
pub struct Search<'a> {
    /// Where products run.
    pub workload: &'a mut Workload,
    /// What is tuned.
    pub product: &'a Product,
    /// When it must end.
    pub until: Instant,
    /// Told what is tried, and what share of the search is behind it.
    pub progress: &'a dyn Fn(&str, f64),
}

/// `default` with parts of `best`: the kernel of a single token if `single`, all the rest if `several`.
pub fn merged(default: &ProductTuning, best: &ProductTuning, single: bool, several: bool) -> ProductTuning {
    let mut kept = if several { best.clone() } else { default.clone() };
    kept.kernels[0] = if single { best.kernels[0] } else { default.kernels[0] };
    kept
}

type Result<T> = std::result::Result<T, Ended<CodeError>>;

impl Search<'_> {
    /// Searches, beginning from `default`.
    ///
    /// # Errors
    /// When the time ends before the search, or a measurement fails.
    pub fn run(mut self, default: &ProductTuning) -> Result<Found> {
        let mut best = default.clone();
        if self.product.decode_bytes > 0 {
            (self.progress)("one token", 0.0);
            self.single(&mut best)?;
        }
        if self.product.multiply_adds > 0 {
            (self.progress)("tokens × rows", 0.2);
            self.tile(&mut best)?;
            (self.progress)("few tokens", 0.4);
            self.few(&mut best)?;
            (self.progress)("block and chunk", 0.6);
            self.block(&mut best)?;
        }
        (self.progress)("against the default", 0.8);
        self.settle(default, best)
    }

    /// Compares what was found earlier with `default` once more: what is not faster again is given up.
    ///
    /// # Errors
    /// As [`run`](Search::run).
    pub fn confirm(mut self, default: &ProductTuning, found: &Found) -> Result<Found> {
        (self.progress)("against the default", 0.0);
        self.settle(default, found.tuning.clone())
    }

    /// What is approved of `best`, measured.
    fn settle(&mut self, default: &ProductTuning, best: ProductTuning) -> Result<Found> {
        let tuning = self.approve(default, best)?;
        let measured = self.measure(default, &tuning)?;
        self.workload.forget();
        Ok(Found { tuning, measured })
    }

    /// Replaces `best` by the fastest of `ways`, if it is faster with all of `loads` taken together: each counts alike, by the share of the
    /// machine's limit that it reaches.
    fn choose(&mut self, best: &mut ProductTuning, ways: Vec<ProductTuning>, loads: &[Vec<usize>]) -> Result<()> {
        let mut all = vec![best.clone()];
        all.extend(ways.into_iter().filter(|way| way != best));
        let limits = self.limits_now();
        let Search { workload, product, until, .. } = self;
        let mut run = |way: usize| {
            let mut took = Duration::ZERO;
            for load in loads {
                let seconds = workload.run(product, &all[way], load)?.as_secs_f64();
                took += Duration::from_secs_f64(seconds / workload.limit_of_run(&limits, product, load));
            }
            Ok(took)
        };
        let winner = contest(all.len(), *until, &mut run)?;
        *best = all.swap_remove(winner);
        Ok(())
    }

    /// The machine's limits of this moment, which may not be those of the start.
    fn limits_now(&mut self) -> Limits {
        const LOOKS: usize = 3;
        let (workload, quantized) = (&mut *self.workload, self.product.shape.format.is_quantized());
        let (mut reads, mut peaks): (Vec<f64>, Vec<f64>) =
            (0..LOOKS).map(|_| (workload.read_rate(), workload.peak_rate(quantized))).unzip();
        workload.limits_of(quantized, &mut reads, &mut peaks)
    }

    /// The ways that the cost model thinks best, cheapest first, without those that spill more than the cheapest.
    fn propose(&self, ways: Vec<ProductTuning>, tokens: impl Fn(&ProductTuning) -> usize) -> Vec<ProductTuning> {
        let priced = |way: ProductTuning| {
            let cost = cost(self.workload.compiler(), &self.workload.kernel(self.product, &way, tokens(&way)))?;
            Some((cost, way))
        };
        let mut priced: Vec<(Cost, ProductTuning)> = ways.into_iter().filter_map(priced).collect();
        priced.sort_by(|a, b| a.0.instructions.total_cmp(&b.0.instructions));
        priced.truncate(PROPOSED);
        priced.into_iter().map(|(_, way)| way).collect()
    }

    fn unrolls(&self) -> [usize; 2] {
        if self.product.shape.format.is_quantized() { [1, 2] } else { [4, 8] }
    }

    /// Row tiles, unrolling and prefetching for a single token. Its weights come from memory, so instructions are not what it waits for: all that
    /// do not spill are measured.
    fn single(&mut self, best: &mut ProductTuning) -> Result<()> {
        let with = |best: &ProductTuning, kernel: MatmulTuning| {
            let mut way = best.clone();
            way.kernels[0] = kernel;
            way
        };
        let mut ways = Vec::new();
        for tiles in [1, 2, 4, 8] {
            for unroll in self.unrolls() {
                ways.push(with(best, MatmulTuning { tiles, unroll, prefetch: Prefetch::None }));
            }
        }
        let ways = self.propose(ways, |_| 1);
        self.choose(best, ways, &[vec![1]])?;
        let found = best.kernels[0];
        let ahead = [512, 1024, 2048, 4096].map(|n| with(best, MatmulTuning { prefetch: Prefetch::Ahead(n), ..found }));
        self.choose(best, ahead.to_vec(), &[vec![1]])
    }

    /// How many tokens at a time, and row tiles for them.
    fn tile(&mut self, best: &mut ProductTuning) -> Result<()> {
        let single = best.kernels[0];
        let mut ways = Vec::new();
        for tokens in 2..=MAX_TOKENS {
            for tiles in [1, 2, 4] {
                for unroll in self.unrolls() {
                    let kernel = |n: usize| {
                        let prefetch = best.kernels.get(n).map_or(best.many(), |was| was.prefetch);
                        if n == 0 { single } else { MatmulTuning { tiles, unroll, prefetch } }
                    };
                    let kernels = (0..tokens).map(kernel).collect();
                    ways.push(ProductTuning { kernels, block: best.block.max(tiles), ..best.clone() });
                }
            }
        }
        let most = self.product.tokens(MOST_TOKENS);
        let ways = self.propose(ways, |way| way.tokens().min(most));
        let loads = self.loads();
        self.choose(best, ways, &loads)
    }

    /// Row tiles for fewer tokens than a tile has: their sums leave registers for more rows. They are all that there is, or left over by a whole tile.
    fn few(&mut self, best: &mut ProductTuning) -> Result<()> {
        for tokens in 2..best.tokens() {
            let mut ways = Vec::new();
            for tiles in [1, 2, 4, 8] {
                for unroll in self.unrolls() {
                    let mut way = best.clone();
                    way.kernels[tokens - 1] = MatmulTuning { tiles, unroll, ..way.kernels[tokens - 1] };
                    way.block = way.block.max(tiles);
                    ways.push(way);
                }
            }
            let mut ways = self.propose(ways, |_| tokens);
            ways.truncate(PROPOSED / 2);
            self.choose(best, ways, &[vec![tokens], vec![best.tokens() + tokens]])?;
        }
        Ok(())
    }

    /// Rows for one walk over the tokens, bytes of activations for one walk over the rows, and what is prefetched: by walks, and by kernels that
    /// go through all rows by themselves.
    fn block(&mut self, best: &mut ProductTuning) -> Result<()> {
        let loads = self.loads();
        let widest = best.kernels.iter().map(|kernel| kernel.tiles).max().unwrap_or(1);
        let blocks = [1, 2, 4, 8, 16].map(|block| ProductTuning { block, ..best.clone() });
        self.choose(best, blocks.into_iter().filter(|way| way.block >= widest).collect(), &loads)?;
        let chunks = [256, 512, 1024, 2048, 4096].map(|n| ProductTuning { activation_bytes: n << 10, ..best.clone() });
        self.choose(best, chunks.to_vec(), &loads)?;
        let k = self.product.shape.k;
        let parts = [0, 512, 1024, 2048].into_iter().filter(|&columns| columns < k);
        let parts = parts.flat_map(|columns| {
            [2, 8].map(|block| ProductTuning { columns, block: block.max(widest), ..best.clone() })
        });
        self.choose(best, parts.collect(), &loads)?;
        let ahead = [false, true].map(|ahead| ProductTuning { ahead, ..best.clone() });
        self.choose(best, ahead.to_vec(), &loads)?;
        let ahead = [2048, 4096, 8192].map(Prefetch::Ahead);
        let ways = [Prefetch::None, Prefetch::Next(4)].into_iter().chain(ahead).map(|prefetch| {
            let mut way = best.clone();
            way.set_many(prefetch);
            way
        });
        let ways = ways.collect();
        self.choose(best, ways, &loads)
    }

    /// What of `best` is somewhere faster than `default` and nowhere slower: the kernel of one token, those of several, both or neither.
    fn approve(&mut self, default: &ProductTuning, best: ProductTuning) -> Result<ProductTuning> {
        if best == *default {
            return Ok(best);
        }
        let loads = if self.product.multiply_adds > 0 { self.loads() } else { Vec::new() };
        let several = self.faster(default, &best, &loads)?;
        let differs = best.kernels[0] != default.kernels[0];
        let loads = if self.product.decode_bytes > 0 && differs { vec![vec![1]] } else { Vec::new() };
        let single = self.faster(default, &best, &loads)?;
        Ok(merged(default, &best, single, several))
    }

    /// Whether `best` is faster than `default` with one of `loads`, and slower with none.
    fn faster(&mut self, default: &ProductTuning, best: &ProductTuning, loads: &[Vec<usize>]) -> Result<bool> {
        let both = [default, best];
        let mut wins = false;
        for load in loads {
            let Search { workload, product, until, .. } = self;
            let ratio = duel(1, TURNS, *until, &mut |way| workload.run(product, both[way], load))?;
            if ratio.loses() {
                return Ok(false);
            }
            wins |= ratio.wins();
        }
        Ok(wins)
    }

    /// What matrices meet in prompts of all lengths.
    fn loads(&self) -> Vec<Vec<usize>> {
        STEPS.iter().filter(|&&step| step > 1).map(|&step| self.product.load(step)).collect()
    }

    /// The steps that this product is part of, with the tokens that meet one of its matrices.
    fn steps(&self) -> Vec<(usize, usize)> {
        let part = |&step: &usize| match step {
            1 => self.product.decode_bytes > 0,
            _ => self.product.multiply_adds > 0,
        };
        STEPS.iter().copied().filter(part).map(|step| (step, self.product.tokens(step))).collect()
    }

    /// What share of the limit default and choices reach. The rates of reading and of multiply-adds are those of the same moments.
    fn measure(&mut self, default: &ProductTuning, tuning: &ProductTuning) -> Result<Vec<Measured>> {
        let quantized = self.product.shape.format.is_quantized();
        let mut all = Vec::new();
        for (step, tokens) in self.steps() {
            let load = &self.product.load(step);
            let (mut times, mut tuned_times) = (Vec::new(), Vec::new());
            let (mut reads, mut peaks) = (Vec::new(), Vec::new());
            for _ in 0..15 {
                if Instant::now() >= self.until {
                    return Err(Ended::Time);
                }
                let default = self.workload.run(self.product, default, load)?.as_secs_f64();
                let tuned = self.workload.run(self.product, tuning, load)?.as_secs_f64();
                times.push(default);
                tuned_times.push(tuned);
                reads.push(self.workload.read_rate());
                peaks.push(self.workload.peak_rate(quantized));
            }
            let same = if step == 1 { default.kernels[0] == tuning.kernels[0] } else { default == tuning };
            let ratio = if same { 1.0 } else { Ratio::of(&tuned_times, &times).median };
            let limits = self.workload.limits_of(quantized, &mut reads, &mut peaks);
            let default_share = self.workload.limit_of_run(&limits, self.product, load) / median(&mut times);
            all.push(Measured { step, tokens, default_share, tuned_share: default_share / ratio });
        }
        Ok(all)
    }
}
