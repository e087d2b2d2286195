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
use crate::target::machine::{Machine, available_memory};
use crate::target::{ProductShape, ProductTuning};
use moec_abi::{LANES, ROW_ALIGN, round_up};
use std::collections::HashMap;
use std::ops::Range;
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
    /// Where sums begin that parts of columns leave, among the results.
    sums: usize,
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

/// The kernels for 1, 2, … tokens that go through the same columns.
#[derive(Clone)]
struct Calls {
    kernels: Vec<Matmul>,
    /// Columns before these; `None` where these are all.
    start: Option<usize>,
}

impl Calls {
    fn of_part(kernels: &[Matmul], columns: &Range<usize>) -> Calls {
        let kernels = kernels.iter().map(|kernel| kernel.in_part(columns)).collect();
        Calls { kernels, start: Some(columns.start) }
    }

    /// The arguments of the kernel for `tokens` tokens, out of those that all may have; surplus ones are ignored.
    fn arguments(&self, tokens: usize, [w, x, y, units, sums, ahead, stride]: [i64; 7]) -> Vec<i64> {
        match self.start {
            None => vec![w, x, y, units, ahead, stride],
            Some(start) => {
                let before = self.kernels[0].format.bytes_before(start) as i64;
                vec![w + before, x, (start * tokens) as i64, y, units, sums, ahead, stride]
            }
        }
    }
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
        let sums = round_up(most(&|p| rows(p) * p.stride.max(p.tiles * LANES * 4)) + threads * 64, 64);
        let results = sums + most(&|p| rows(p) * p.tiles.max(threads * EVEN_TILES) * 64);
        let bytes = weights + activations + results;
        let no_memory = |source| NoMemory { bytes, source };
        if bytes > available_memory() {
            return Err(no_memory(std::io::ErrorKind::OutOfMemory.into()).into());
        }
        let mut arena = Arena::new(weights, activations, results).map_err(no_memory)?;
        let limits::Found { limits, waited, sweep, peaks } = limits::measure(&compiler, &mut arena, threads)?;
        Ok(Workload { compiler, threads, limits, waited, sweep, peaks, arena, sums, next: 0, codes: HashMap::new() })
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

    /// The kernel of a product for `tokens` tokens at once.
    pub fn kernel(&self, product: &Product, tuning: &ProductTuning, tokens: usize) -> Matmul {
        let ProductShape { format, k, epilogue } = product.shape;
        Matmul {
            format,
            k,
            part: None,
            fetch: false,
            tokens,
            row: format.row(),
            dot: self.compiler.dot(format),
            epilogue,
            y_stride: if tokens > 1 { product.stride } else { 0 },
            tuning: tuning.kernel(tokens),
        }
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
        // Few tokens have one call for all rows, more of them a walk for each part of the columns.
        let tile = tuning.tokens();
        let columns = if load.iter().any(|&t| t > tile) { tuning.parts(product.shape.k) } else { Vec::new() };
        let needed = |n: usize| load.iter().any(|&t| n == t.min(tile) || n == t % tile);
        let kernels: Vec<Matmul> = (1..=tile).map(|n| self.kernel(product, tuning, n)).collect();
        let few = Calls { kernels: kernels.clone(), start: None };
        let kernels: Vec<Matmul> = kernels.into_iter().map(|kernel| tuning.in_walk(kernel)).collect();
        let walks: Vec<Calls> = match &columns[..] {
            [] | [_] => vec![Calls { kernels, start: None }],
            parts => parts.iter().map(|columns| Calls::of_part(&kernels, columns)).collect(),
        };
        for kernel in walks.iter().chain([&few]).flat_map(|calls| &calls.kernels).filter(|k| needed(k.tokens)) {
            if !self.codes.contains_key(kernel) {
                self.codes.insert(kernel.clone(), self.compiler.kernel(kernel.clone())?);
            }
        }
        let block = tuning.block_units(product.shape.epilogue);
        let codes = |calls: &Calls| calls.kernels.iter().map(|kernel| self.codes.get(kernel)).collect::<Vec<_>>();
        let few_codes = codes(&few);
        let walks: Vec<(&Calls, Vec<Option<&Code>>)> = walks.iter().map(|calls| (calls, codes(calls))).collect();

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
        let chunk = tuning.walk_tokens(stride, shape.k);
        let y_stride = product.stride;
        let [weights, activations, results] = self.arena.addresses();
        let sums = results + self.sums as i64;
        assert!(self.sums + threads * most * tiles * 64 <= self.arena.result_bytes());
        let work = |worker: usize| {
            let first_matrix = weights + (worker * part + next) as i64;
            let x = activations + (worker * rows * stride) as i64;
            let y = results + (worker * units * 64) as i64;
            let sums = sums + (worker * most * tiles * 64) as i64;
            // Of `n` tokens from `at` of a chunk on, which are those from `first` on of all, `count` units.
            let call = |calls: &Calls,
                        codes: &[Option<&Code>],
                        w: i64,
                        n: usize,
                        unit: usize,
                        [at, first, count]: [usize; 3],
                        [ahead, stride]: [usize; 2]| {
                let code = codes[n - 1].expect("compiled above");
                let kept = shape.epilogue.tiles() * (unit * most + at * count);
                let (w, x) = (w + (unit * unit_bytes) as i64, x + (at * stride) as i64);
                let (y, sums) = (y + (first * y_stride + 64 * unit) as i64, sums + 64 * kept as i64);
                let args = calls.arguments(n, [w, x, y, count as i64, sums, ahead as i64, stride as i64]);
                // SAFETY: the arena holds the weights of this thread's part from `next` on, a chunk of its activations, its sums, and results of all tokens, as asserted;
                // nobody reads the results.
                unsafe { code.call(&args) };
            };
            for (matrix, &tokens) in load.iter().enumerate() {
                let w = first_matrix + (matrix * bytes) as i64;
                for first in (0..tokens).step_by(chunk) {
                    let some = chunk.min(tokens - first);
                    if some <= tile {
                        call(&few, &few_codes, w, some, 0, [0, first, units], [0, 0]);
                        continue;
                    }
                    for (calls, codes) in &walks {
                        let share = |of: usize, tokens| of * tokens / some;
                        for unit in (0..units).step_by(block) {
                            for at in (0..some).step_by(tile) {
                                let count = block.min(units - unit);
                                let n = tile.min(some - at);
                                let step = calls.kernels[n - 1].step_bytes();
                                let later = [share(step, at) + block * unit_bytes, share(64, n) + 1];
                                call(calls, codes, w, n, unit, [at, first + at, count], later);
                            }
                        }
                    }
                }
            }
        };
        Ok(together(threads, &work).cpu)
    }
}
