//! Bytes read from memory, by all of a model's threads.

use moec_runtime::memory::{Memory, Zeroed};
use moec_runtime::{Model, Result};
use std::fs;
use std::hint::black_box;
use std::time::Instant;

/// A buffer larger than the caches, to be read by all threads.
pub struct ReadSweep {
    buffer: Zeroed,
}

/// A worker's part of the buffer.
struct Share {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: each share is used by one worker only, within one job.
unsafe impl Sync for Share {}

impl ReadSweep {
    /// Takes the buffer and fills it: untouched pages would all be the same page of zeros.
    pub fn new(model: &Model) -> Result<ReadSweep> {
        const LEAST: u64 = 256 << 20;
        let wanted = (4 * largest_cache()).max(LEAST).min(Memory::now().available / 4);
        let bytes = (wanted as usize).max(1 << 20);
        let mut buffer = Zeroed::new(bytes, "measuring the memory", "free memory")?;
        let shares = shares(buffer.as_mut_ptr(), bytes, model.workers());
        model.on_workers(&|worker| {
            let share = &shares[worker.index];
            // SAFETY: the share lies in the buffer and is this worker's alone.
            unsafe { std::ptr::write_bytes(share.start, 0x5a, share.bytes) };
        });
        Ok(ReadSweep { buffer })
    }

    /// Bytes per second over the whole buffer: of the ways to read it the fastest, by the medians of several passes in turn.
    pub fn bytes_per_second(&self, model: &Model) -> f64 {
        const PASSES: usize = 7;
        let bytes = self.buffer.bytes();
        let share = (bytes.len() / model.workers()).next_multiple_of(4096);
        let mut rates = vec![[0.0; PASSES]; WAYS.len()];
        for pass in 0..PASSES {
            for (&way, rates) in WAYS.iter().zip(&mut rates) {
                let started = Instant::now();
                model.on_workers(&|worker| {
                    let start = (worker.index * share).min(bytes.len());
                    let end = (start + share).min(bytes.len());
                    black_box(read(&bytes[start..end], way));
                });
                rates[pass] = bytes.len() as f64 / started.elapsed().as_secs_f64();
            }
        }
        let median = |mut rates: [f64; PASSES]| {
            rates.sort_by(f64::total_cmp);
            rates[PASSES / 2]
        };
        rates.into_iter().map(median).fold(0.0, f64::max)
    }
}

fn shares(start: *mut u8, bytes: usize, workers: usize) -> Vec<Share> {
    let share = (bytes / workers).next_multiple_of(4096);
    (0..workers)
        .map(|worker| {
            let first = (worker * share).min(bytes);
            Share { start: start.wrapping_add(first), bytes: share.min(bytes - first) }
        })
        .collect()
}

/// Size of the largest cache of the first CPU, as the kernel tells it; 0 when it does not.
fn largest_cache() -> u64 {
    (0..8)
        .filter_map(|index| {
            let text = fs::read_to_string(format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size")).ok()?;
            text.trim().strip_suffix('K')?.parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
        })
        .max()
        .unwrap_or(0)
}

/// How a worker reads its share. Which is the fastest differs from CPU to CPU.
#[derive(Clone, Copy)]
enum Way {
    /// From front to back; the CPU fetches ahead by itself.
    Plain,
    /// In four streams that prefetch, as kernels do where a CPU fetches too little by itself.
    #[cfg(target_arch = "x86_64")]
    Prefetched,
}

const WAYS: &[Way] = &[
    Way::Plain,
    #[cfg(target_arch = "x86_64")]
    Way::Prefetched,
];

/// A cache line.
type Line = [u64; 8];

/// Reads all lines of some bytes and returns something that depends on each.
fn read(bytes: &[u8], way: Way) -> u64 {
    // SAFETY: any eight words are a line.
    let (_, lines, _) = unsafe { bytes.align_to::<Line>() };
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the feature is there.
            return unsafe { x86::read_512(lines, way) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the feature is there.
            return unsafe { x86::read_256(lines, way) };
        }
    }
    read_lines(lines, way)
}

#[inline(always)]
fn read_lines(lines: &[Line], way: Way) -> u64 {
    const STREAMS: usize = 4;
    let mut sums = [[0; 8]; STREAMS];
    match way {
        Way::Plain => {
            for lines in lines.as_chunks::<STREAMS>().0 {
                for (sum, line) in sums.iter_mut().zip(lines) {
                    *sum = xor(sum, line);
                }
            }
        }
        #[cfg(target_arch = "x86_64")]
        Way::Prefetched => {
            let size = lines.len() / STREAMS;
            let streams: [&[Line]; STREAMS] = std::array::from_fn(|i| &lines[i * size..(i + 1) * size]);
            for at in 0..size {
                for (sum, stream) in sums.iter_mut().zip(streams) {
                    x86::prefetch(&stream[at]);
                    *sum = xor(sum, &stream[at]);
                }
            }
        }
    }
    sums.iter().flatten().fold(0, |all, word| all ^ word)
}

#[inline(always)]
fn xor(a: &Line, b: &Line) -> Line {
    std::array::from_fn(|i| a[i] ^ b[i])
}

/// The same in vector registers.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Line, Way, read_lines};
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};

    /// What comes 16 lines later.
    #[inline(always)]
    pub fn prefetch(line: &Line) {
        // SAFETY: a prefetch of any address does nothing but move it into a cache.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(line).wrapping_add(16).cast()) };
    }

    #[target_feature(enable = "avx512f")]
    pub fn read_512(lines: &[Line], way: Way) -> u64 {
        read_lines(lines, way)
    }

    #[target_feature(enable = "avx2")]
    pub fn read_256(lines: &[Line], way: Way) -> u64 {
        read_lines(lines, way)
    }
}
