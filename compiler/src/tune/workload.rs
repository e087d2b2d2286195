//! A product as a step of a model does it, on memory of the tuner's own.
//!
//! The loops are those of the plan ([`crate::plan`]): for tokens that one call takes, that call goes through all rows; for more, chunks of interleaved
//! activations, blocks of rows, tiles of tokens. Every run goes on to other weights, so that they come from memory as they do in a model whose weights are larger than the caches.
//! Deliberately absent: interleaving, which takes the same time whatever is chosen; and more rows than make a measurement of a few milliseconds.

use super::arena::Arena;
use super::code::{Code, CodeError, Compiler};
use super::contest::median;
use super::limits::{self, Limits, Peak, Sweep};
use super::products::{MOST_MATRICES, Product};
use super::team::together;
use crate::kernels::Matmul;
use crate::plan::layout::QuantizedRow;
use crate::plan::quant::CODEBOOK;
use crate::target::machine::{Machine, available_memory};
use crate::target::{ProductShape, ProductTuning};
use moec_abi::{LANES, ROW_ALIGN, round_up};
use std::collections::HashMap;
use std::time::Duration;

/// Seconds that one run should take: long against the start of threads, short against what a busy machine does to a minute.
const RUN_SECONDS: f64 = 4e-3;

/// Most tokens of a workload.
pub const MOST_TOKENS: usize = crate::plan::MAX_STEP_TOKENS;

/// Row tiles are taken in multiples of this, so that every block and tile of rows comes out even.
const EVEN_TILES: usize = 16;

/// Memory that is not there.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot get {bytes} bytes of memory to measure on: {source}; close other programs, or tune on a machine that has them"
)]
pub struct NoMemory {
    pub(super) bytes: usize,
    pub(super) source: std::io::Error,
}

/// Runs products on `threads` threads.
pub struct Workload {
    compiler: Compiler,
    threads: usize,
    limits: Limits,
    waited: f64,
    sweep: Sweep,
    peaks: [Peak; 2],
    arena: Arena,
    /// Where each thread's next weights begin, from the start of its part.
    next: usize,
    codes: HashMap<Matmul, Code>,
}

/// Bytes of a row of activations as interleaved.
fn activation_stride(shape: ProductShape) -> usize {
    if shape.format.is_quantized() {
        QuantizedRow::new(shape.k, shape.format.row()).stride()
    } else {
        4 * round_up(shape.k, ROW_ALIGN)
    }
}

/// The kernel of a product for `tokens` tokens at once, in a walk over tokens or as the one call of a single token.
pub fn kernel(product: &Product, tuning: &ProductTuning, tokens: usize, walk: bool) -> Matmul {
    let ProductShape { format, k, epilogue } = product.shape;
    let y_stride = if tokens > 1 { product.stride } else { 0 };
    let block = tuning.block_units(epilogue) * epilogue.tiles();
    let tuning = if walk { tuning.kernel_in_walk(tokens, block * product.tile_bytes()) } else { tuning.kernel(tokens) };
    Matmul { format, k, tokens, row: format.row(), epilogue, y_stride, codebook: CODEBOOK, tuning }
}

/// Bytes of weights that no cache keeps from one reading to the next.
pub fn beyond_caches(machine: &Machine) -> usize {
    (4 * machine.largest_cache()).clamp(128 << 20, 1 << 30)
}

impl Workload {
    /// Memory for `products`, and the machine's limits.
    ///
    /// # Errors
    /// When there is no memory, or a bug of a back end.
    pub fn new(
        compiler: Compiler,
        machine: &Machine,
        threads: usize,
        products: &[Product],
    ) -> Result<Workload, super::TuneError> {
        let most_rows = |product: &Product| product.load(MOST_TOKENS).into_iter().max().unwrap_or(1);
        let rows = |product: &Product| if product.multiply_adds > 0 { most_rows(product) } else { 1 };
        let most = |bytes: &dyn Fn(&Product) -> usize| products.iter().map(bytes).max().unwrap_or(0);
        let one_block = most(&|p| MOST_MATRICES * EVEN_TILES * p.tile_bytes());
        let weights = beyond_caches(machine).max(threads * one_block);
        let activations = (threads * most(&|p| rows(p) * activation_stride(p.shape))).max(4096);
        let results = most(&|p| rows(p) * p.stride.max(p.tiles * LANES * 4)) + threads * 64;
        let bytes = weights + activations + results;
        let no_memory = |source| NoMemory { bytes, source };
        if bytes > available_memory() {
            return Err(no_memory(std::io::ErrorKind::OutOfMemory.into()).into());
        }
        let mut arena = Arena::new(weights, activations, results).map_err(no_memory)?;
        let limits::Found { limits, waited, sweep, peaks } = limits::measure(&compiler, &mut arena, threads)?;
        Ok(Workload { compiler, threads, limits, waited, sweep, peaks, arena, next: 0, codes: HashMap::new() })
    }

    /// The machine's limits, as measured at the start.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Bytes that can be read from memory in a second at this moment.
    pub fn read_rate(&mut self) -> f64 {
        self.sweep.once(&mut self.arena, self.threads).0
    }

    /// Multiply-adds of a second at this moment: of bytes with `quantized`, or else of f32.
    pub fn peak_rate(&mut self, quantized: bool) -> f64 {
        self.peaks[usize::from(!quantized)].once(&mut self.arena, self.threads)
    }

    /// The limits, with what was measured just now of reading and of the multiply-adds that count: the medians.
    pub fn limits_of(&self, quantized: bool, reads: &mut [f64], peaks: &mut [f64]) -> Limits {
        let (read, peak) = (median(reads), median(peaks));
        let Limits { dots, fmas, .. } = self.limits;
        let (dots, fmas) = if quantized { (peak, fmas) } else { (dots, peak) };
        Limits { dots, fmas, read, ..self.limits }
    }

    /// How much longer threads took than they had a CPU.
    pub fn waited(&self) -> f64 {
        self.waited
    }

    /// What compiles the kernels.
    pub fn compiler(&self) -> &Compiler {
        &self.compiler
    }

    /// Threads that work together.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Forgets the kernels compiled so far.
    pub fn forget(&mut self) {
        self.codes.clear();
    }

    /// Row tiles of each matrix for each of `threads` threads in a run with these tokens.
    fn tiles(&self, threads: usize, product: &Product, load: &[usize]) -> usize {
        let part = self.arena.weight_bytes() / threads / load.len();
        let one = self.limit(&self.limits, product, load, 1) * self.threads as f64;
        let wanted = (RUN_SECONDS / one) as usize / EVEN_TILES * EVEN_TILES;
        let there = product.tiles / threads / product.shape.epilogue.tiles() * product.shape.epilogue.tiles();
        wanted.clamp(EVEN_TILES, part / product.tile_bytes()).min(there.max(product.shape.epilogue.tiles()))
    }

    /// The least seconds that the machine needs for `tiles` row tiles of each matrix.
    fn limit(&self, limits: &Limits, product: &Product, load: &[usize], tiles: usize) -> f64 {
        let of_matrix = |tokens: &usize| {
            let adds = (tiles * LANES * product.shape.k * tokens) as f64;
            limits.seconds(product.shape.format.is_quantized(), adds, (tiles * product.tile_bytes()) as f64)
        };
        load.iter().map(of_matrix).sum()
    }

    /// The least seconds that a machine with these limits needs for what [`run`](Workload::run) does.
    pub fn limit_of_run(&self, limits: &Limits, product: &Product, load: &[usize]) -> f64 {
        self.limit(limits, product, load, self.tiles(self.threads, product, load) * self.threads)
    }

    /// Row tiles times tokens of what [`run_with`](Workload::run_with) does.
    pub fn row_tokens(&self, threads: usize, product: &Product, load: &[usize]) -> f64 {
        (self.tiles(threads, product, load) * threads * load.iter().sum::<usize>()) as f64
    }

    /// Runs `product`, written as `tuning` says, with one matrix after the other, which meet so many tokens; the time it took.
    ///
    /// # Errors
    /// A bug of a back end, or no memory for code.
    pub fn run(&mut self, product: &Product, tuning: &ProductTuning, load: &[usize]) -> Result<Duration, CodeError> {
        self.run_with(self.threads, product, tuning, load)
    }

    /// As [`run`](Workload::run), with `threads` threads of all.
    ///
    /// # Errors
    /// As there.
    pub fn run_with(
        &mut self,
        threads: usize,
        product: &Product,
        tuning: &ProductTuning,
        load: &[usize],
    ) -> Result<Duration, CodeError> {
        assert!((1..=self.threads).contains(&threads), "the arena is for {} threads", self.threads);
        let alone = load == [1];
        let kernels: Vec<Matmul> = (1..=tuning.tokens()).map(|n| kernel(product, tuning, n, !alone)).collect();
        let needed = |n: usize| load.iter().any(|&t| n == t.min(tuning.tokens()) || n == t % tuning.tokens());
        for (i, kernel) in kernels.iter().enumerate() {
            if needed(i + 1) && !self.codes.contains_key(kernel) {
                self.codes.insert(kernel.clone(), self.compiler.kernel(kernel.clone())?);
            }
        }
        let codes: Vec<Option<&Code>> = kernels.iter().map(|kernel| self.codes.get(kernel)).collect();

        let tiles = self.tiles(threads, product, load);
        let (part, bytes) = (self.arena.weight_bytes() / threads, tiles * product.tile_bytes());
        let part = part / 64 * 64;
        if self.next + bytes * load.len() > part {
            self.next = 0;
        }
        let (next, shape) = (self.next, product.shape);
        self.next += bytes * load.len();

        let stride = activation_stride(shape);
        let most = load.iter().copied().max().unwrap_or(0);
        let rows = (self.arena.activation_bytes() / threads / stride).min(most);
        assert!(rows == most, "{shape}: the arena has activations for {most} tokens and each thread");
        let units = tiles / shape.epilogue.tiles();
        let unit_bytes = shape.epilogue.tiles() * product.tile_bytes();
        assert!(most * product.stride + threads * units * 64 <= self.arena.result_bytes() + product.stride);
        let chunk = tuning.walk_tokens(stride);
        let block = tuning.block_units(shape.epilogue);
        let (tile, y_stride) = (tuning.tokens(), product.stride);
        let [weights, activations, results] = self.arena.addresses();
        let work = |worker: usize| {
            let first_matrix = weights + (worker * part + next) as i64;
            let x = activations + (worker * rows * stride) as i64;
            let y = results + (worker * units * 64) as i64;
            let call = |w: i64, n: usize, unit: usize, at: usize, first: usize, count: usize| {
                let code = codes[n - 1].expect("compiled above");
                let args = [
                    w + (unit * unit_bytes) as i64,
                    x + (at * stride) as i64,
                    y + (first * y_stride + 64 * unit) as i64,
                    count as i64,
                ];
                // SAFETY: the arena holds the weights of this thread's part from `next` on, a chunk of its activations, and results of all tokens, as asserted;
                // nobody reads the results.
                unsafe { code.call(&args) };
            };
            for (matrix, &tokens) in load.iter().enumerate() {
                let w = first_matrix + (matrix * bytes) as i64;
                for first in (0..tokens).step_by(chunk) {
                    let some = chunk.min(tokens - first);
                    let block = if some <= tile { units } else { block };
                    for unit in (0..units).step_by(block) {
                        let count = block.min(units - unit);
                        for at in (0..some).step_by(tile) {
                            call(w, tile.min(some - at), unit, at, first + at, count);
                        }
                    }
                }
            }
        };
        Ok(together(threads, &work).cpu)
    }
}
