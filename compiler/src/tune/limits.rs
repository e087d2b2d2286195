//! What the machine can do at a CPU level: operations out of registers, bytes out of memory, and meeting at a barrier.
//!
//! All but the barrier are loops in tile IR through the same back end as kernels, so that a share of a limit says what the kernel loses and not what the level
//! lacks. Deliberately absent: caches, writes.

use super::arena::Arena;
use super::code::{Code, CodeError, Compiler};
use super::contest::median;
use super::team::{Meeting, Took, together};
use crate::kernels::Dot;
use moec_abi::LANES;
use moec_ir::tile::build::Builder;
use moec_ir::tile::{Binary, Function, Memory, Shift, Type, Value};
use serde::{Deserialize, Serialize};
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Iterations of the loop that measures the peak.
pub const PEAK_LOOPS: usize = 10_000;

/// Bytes that one iteration of the sweep reads.
pub const SWEEP_STEP: usize = 256;

/// Streams that the sweep reads at once, when it reads several.
pub const STREAMS: usize = 4;

/// Numbers of sums in flight that are tried: which keeps all pipes busy depends on latency and registers.
pub const PEAK_SUMS: [usize; 3] = [4, 6, 12];

/// What all threads do together in a second, and what cannot be done faster by doing more of it at once.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Multiply-adds of bytes, by the fastest operation that products have.
    pub dots: f64,
    /// Multiply-adds of f32.
    pub fmas: f64,
    /// Bytes read from memory.
    pub read: f64,
    /// The simplest operations on vectors of 16 lanes.
    pub ops: f64,
    /// Seconds of one f32 multiply-add that waits for the one before it.
    pub latency: f64,
    /// Seconds in which all threads meet at a barrier.
    pub barrier: f64,
}

impl Limits {
    /// With what is usual for the rest where only the first three are known: two simple operations for each multiply-add of vectors, results after four
    /// multiply-adds of `threads` threads, half a microsecond for a barrier.
    pub fn usual(dots: f64, fmas: f64, read: f64, threads: usize) -> Limits {
        let vectors = fmas / LANES as f64;
        Limits { dots, fmas, read, ops: 2.0 * vectors, latency: 4.0 * threads as f64 / vectors, barrier: 0.5e-6 }
    }

    /// The least seconds for so many multiply-adds (of bytes with `quantized`) over so many bytes from memory.
    pub fn seconds(&self, quantized: bool, multiply_adds: f64, bytes: f64) -> f64 {
        let peak = if quantized { self.dots } else { self.fmas };
        (multiply_adds / peak).max(bytes / self.read)
    }
}

/// Multiply-adds of one sum in an iteration of [`peak_loop`].
pub fn peak_adds(dot: Option<Dot>) -> usize {
    match dot {
        None => LANES,
        Some(Dot::Unsigned | Dot::Signed) => 4 * LANES,
        Some(Dot::Small) => 2 * 4 * LANES,
    }
}

/// A loop of multiply-adds out of registers: dot products of bytes, if any, or else f32. Parameters: 128 bytes to read, 64 to write. An iteration does
/// [`peak_adds`] for each of the sums: those of small bytes are as many as may wait in 16 bits.
pub fn peak_loop(dot: Option<Dot>, sums: usize) -> Function {
    let bytes = dot.is_some();
    let (mut b, [x, y]) = Builder::new("peak", ["x", "y"]);
    let initial: Vec<Value> = (0..sums).map(|_| if bytes { b.lanes([0; 16]) } else { b.splat_f32(0.0) }).collect();
    let [mut u, v] = [0, 64].map(|at| if bytes { b.load_bytes(x, at) } else { b.load(Memory::F32, x, at) });
    if dot == Some(Dot::Small) {
        let small = b.lanes([i32::from_ne_bytes([63; 4]); LANES]);
        let small = b.bitcast(Type::VecI8, small);
        u = b.binary(Binary::And, u, small);
    }
    let (start, end) = (b.int(0), b.int(PEAK_LOOPS as i64));
    let sums = b.for_loop(start, end, 1, &initial, |b, _, sums| {
        let multiply_add = |&sum: &Value| match dot {
            Some(Dot::Unsigned) => b.dot_u8s8(sum, u, v),
            Some(Dot::Signed) => b.dot_s8s8(sum, u, v),
            Some(Dot::Small) => {
                let sum = b.dot_u8s8(sum, u, v);
                b.dot_u8s8(sum, u, v)
            }
            None => b.fma(u, v, sum),
        };
        sums.iter().map(multiply_add).collect()
    });
    let all = sums.into_iter().reduce(|a, c| b.add(a, c)).expect("there are sums");
    b.store(if bytes { Memory::I32 } else { Memory::F32 }, all, y, 0);
    b.finish()
}

/// A loop of the simplest operation there is, on vectors in registers. Parameters as [`peak_loop`]; an iteration does `sums` of it.
pub fn simple_loop(sums: usize) -> Function {
    let (mut b, [x, y]) = Builder::new("simple", ["x", "y"]);
    let initial: Vec<Value> = (0..sums).map(|i| b.lanes([i as i32; 16])).collect();
    let u = b.load(Memory::I32, x, 0);
    let (start, end) = (b.int(0), b.int(PEAK_LOOPS as i64));
    let sums = b.for_loop(start, end, 1, &initial, |b, _, sums| {
        sums.iter().map(|&sum| b.binary(Binary::Add, sum, u)).collect()
    });
    let all = sums.into_iter().reduce(|a, c| b.add(a, c)).expect("there are sums");
    b.store(Memory::I32, all, y, 0);
    b.finish()
}

/// Seconds in which `threads` threads meet, each with a little that the next one must see, as the stages of a model's workers read what others have written.
fn barrier_seconds(threads: usize) -> f64 {
    const MEETINGS: usize = 1000;
    /// Words that each writes and another reads: of 16 cache lines.
    const WORDS: usize = 16;
    let written: Vec<Line> = (0..threads * WORDS).map(|_| Line::default()).collect();
    let mut seconds: Vec<f64> = (0..9)
        .map(|_| {
            let meeting = Meeting::new(threads);
            let meet = |worker: usize| {
                let lines = |of: usize| &written[of % threads * WORDS..][..WORDS];
                for count in 1..=MEETINGS {
                    lines(worker).iter().for_each(|line| line.0.store(count, Ordering::Relaxed));
                    meeting.meet();
                    lines(worker + 1).iter().for_each(|line| {
                        black_box(line.0.load(Ordering::Relaxed));
                    });
                }
            };
            together(threads, &meet).wall.as_secs_f64() / MEETINGS as f64
        })
        .collect();
    median(&mut seconds)
}

/// A word in a cache line of its own.
#[derive(Default)]
#[repr(align(64))]
struct Line(AtomicUsize);

/// A loop that reads, in one stream or in [`STREAMS`] at once, as a kernel of several row tiles does; the processor fetches ahead in each stream by itself.
/// Parameters: the memory, 64 bytes to write, and how many bytes to read: a multiple of [`SWEEP_STEP`].
pub fn sweep_loop(streams: bool) -> Function {
    let (mut b, [x, y, bytes]) = Builder::new("sweep", ["x", "y", "bytes"]);
    let zero = b.lanes([0; 16]);
    let start = b.int(0);
    let (end, step, gap) = if streams {
        let part = b.shift(Shift::RightUnsigned, bytes, STREAMS.trailing_zeros() as u8);
        (part, (SWEEP_STEP / STREAMS) as i64, Some(part))
    } else {
        (bytes, SWEEP_STEP as i64, None)
    };
    let sums = b.for_loop(start, end, step, &[zero; STREAMS], |b, at, sums| {
        let mut from = b.add(x, at);
        let mut next = Vec::with_capacity(STREAMS);
        for (i, &sum) in sums.iter().enumerate() {
            let v = b.load(Memory::I32, from, if gap.is_some() { 0 } else { 64 * i as i64 });
            next.push(b.binary(Binary::Xor, sum, v));
            if let Some(gap) = gap {
                from = b.add(from, gap);
            }
        }
        next
    });
    let all = sums.into_iter().reduce(|a, c| b.binary(Binary::Xor, a, c)).expect("there are sums");
    b.store(Memory::I32, all, y, 0);
    b.finish()
}

/// Reading all weights of an arena, as fast as can be.
pub struct Sweep {
    code: Code,
}

impl Sweep {
    /// In one stream or in several.
    ///
    /// # Errors
    /// A bug of a back end, or no memory for code.
    pub fn new(compiler: &Compiler, streams: bool) -> Result<Sweep, CodeError> {
        Ok(Sweep { code: compiler.function(&sweep_loop(streams))? })
    }

    /// Once, by `threads` threads: bytes a second, and how long it took.
    pub fn once(&self, arena: &mut Arena, threads: usize) -> (f64, Took) {
        let share = arena.weight_bytes() / threads / SWEEP_STEP * SWEEP_STEP;
        let [weights, _, results] = arena.addresses();
        let sweep = |worker: usize| {
            let from = weights + (worker * share) as i64;
            // SAFETY: each worker reads its own part of the arena and writes a line of its own.
            unsafe { self.code.call(&[from, results + 64 * worker as i64, share as i64]) };
        };
        let took = together(threads, &sweep);
        ((share * threads) as f64 / took.cpu.as_secs_f64(), took)
    }
}

/// Multiply-adds out of registers, as many as can be.
pub struct Peak {
    code: Code,
    /// Multiply-adds of one iteration.
    adds: usize,
}

impl Peak {
    /// Of bytes or of f32, with so many sums in flight.
    ///
    /// # Errors
    /// A bug of a back end, or no memory for code.
    pub fn new(compiler: &Compiler, bytes: bool, sums: usize) -> Result<Peak, CodeError> {
        let dot = bytes.then(|| compiler.fastest_dot());
        Ok(Peak { code: compiler.function(&peak_loop(dot, sums))?, adds: sums * peak_adds(dot) })
    }

    /// Once, by `threads` threads, in less than a millisecond: multiply-adds a second.
    pub fn once(&self, arena: &mut Arena, threads: usize) -> f64 {
        self.adds as f64 * iterations(&self.code, arena, threads)
    }
}

/// Iterations of a loop with the parameters of [`peak_loop`] that all threads together do in a second.
fn iterations(code: &Code, arena: &mut Arena, threads: usize) -> f64 {
    const CALLS: usize = 20;
    let [_, activations, results] = arena.addresses();
    let work = |worker: usize| {
        for _ in 0..CALLS {
            // SAFETY: the arena has at least so many activations and a line of results for each worker.
            unsafe { code.call(&[activations, results + 64 * worker as i64]) };
        }
    };
    (CALLS * PEAK_LOOPS * threads) as f64 / together(threads, &work).cpu.as_secs_f64()
}

/// What [`measure`] finds.
pub struct Found {
    /// The limits.
    pub limits: Limits,
    /// How much longer threads took than they had a CPU, which is more than 1 when other programs want the same cores.
    pub waited: f64,
    /// The faster way of reading.
    pub sweep: Sweep,
    /// The fastest multiply-adds of bytes, and of f32.
    pub peaks: [Peak; 2],
}

/// Measures the limits with `threads` threads on the memory of `arena`. The peak is the best of several runs, since nothing but disturbance makes
/// one slower; the rate of reading is their median, since it is what the neighbours leave, in one stream or in several, whichever is more.
///
/// # Errors
/// A bug of a back end, or no memory for code.
pub fn measure(compiler: &Compiler, arena: &mut Arena, threads: usize) -> Result<Found, CodeError> {
    const PASSES: usize = 9;
    let mut best = |once: &dyn Fn(&mut Arena) -> f64| (0..PASSES).map(|_| once(arena)).fold(0.0, f64::max);
    let mut peak = |bytes: bool| -> Result<(f64, Peak), CodeError> {
        let mut fastest: Option<(f64, Peak)> = None;
        for sums in PEAK_SUMS {
            let peak = Peak::new(compiler, bytes, sums)?;
            let rate = best(&|arena| peak.once(arena, threads));
            if fastest.as_ref().is_none_or(|(most, _)| rate > *most) {
                fastest = Some((rate, peak));
            }
        }
        Ok(fastest.expect("some numbers of sums are tried"))
    };
    let ((dots, of_bytes), (fmas, of_f32)) = (peak(true)?, peak(false)?);
    let mut ops = 0f64;
    for sums in PEAK_SUMS {
        let code = compiler.function(&simple_loop(sums))?;
        ops = ops.max(best(&|arena| iterations(&code, arena, threads)) * sums as f64);
    }
    let one = compiler.function(&peak_loop(None, 1))?;
    let latency = threads as f64 / best(&|arena| iterations(&one, arena, threads));
    let mut waited = Vec::new();
    let mut rate = |sweep: &Sweep| {
        let (mut rates, took): (Vec<f64>, Vec<Took>) = (0..PASSES).map(|_| sweep.once(arena, threads)).unzip();
        waited.extend(took.iter().map(|took| took.wall.as_secs_f64() / took.cpu.as_secs_f64()));
        median(&mut rates)
    };
    let (one, several) = (Sweep::new(compiler, false)?, Sweep::new(compiler, true)?);
    let rates = [rate(&one), rate(&several)];
    let (read, sweep) = if rates[0] > rates[1] { (rates[0], one) } else { (rates[1], several) };
    let limits = Limits { dots, fmas, read, ops, latency, barrier: barrier_seconds(threads) };
    Ok(Found { limits, waited: median(&mut waited), sweep, peaks: [of_bytes, of_f32] })
}
