//! How fast kernels are on one thread of this machine: `cargo test --release --test kernels -- --ignored --nocapture bench`.
//!
//! The best of several runs, in time that the thread had a CPU, and as a share of the limits of the same moment: multiply-adds out of registers, and a
//! sweep over memory. Environment: `BENCH` — only kernels whose name contains it;
//! `BENCH_CPU` — a CPU of the table instead of `native`.

use std::time::Duration;

use moec::kernels::{
    Attention, Epilogue, Kernel, KvFormat, Matmul, MatmulTuning, Norm, Outputs, Prefetch, Quantize, Together,
};
use moec::plan::layout::{Format, QuantizedRow};
use moec::tune::code::Code;
use moec::tune::limits::{PEAK_LOOPS, PEAK_SUMS, peak_adds, peak_loop, sweep_loop};
use moec::tune::team::cpu_time;
use moec_ir::graph::Activation;
use moec_ir::tile::Function;

use crate::machine::{Guarded, by_choice, compiler};

/// A call to be timed: the kernel, its memory, its arguments (indices of memory or numbers), multiply-adds and bytes.
struct Timed {
    kernel: Kernel,
    multiply_adds: usize,
    bytes: usize,
    memory: Vec<Guarded>,
    args: Vec<i64>,
}

fn function(function: &Function, cpu: &str) -> Code {
    compiler(cpu).function(function).unwrap_or_else(|e| panic!("{e}"))
}

/// What kernels are compiled for.
fn cpu() -> String {
    std::env::var("BENCH_CPU").unwrap_or_else(|_| "native".to_string())
}

/// The most multiply-adds per second.
fn peak(bytes: bool, cpu: &str) -> f64 {
    let memory = [pattern(128), pattern(64)];
    let args: Vec<i64> = memory.iter().map(Guarded::address).collect();
    // As many sums as have registers, whatever a CPU has.
    let rate = |sums: usize| {
        let dot = bytes.then(|| compiler(cpu).fastest_dot());
        let code = function(&peak_loop(dot, sums), cpu);
        (sums * peak_adds(dot) * PEAK_LOOPS) as f64 / seconds(&args, &code)
    };
    PEAK_SUMS.map(rate).into_iter().fold(0.0, f64::max)
}

/// Bytes per second that one thread reads from memory.
fn read_rate(cpu: &str) -> f64 {
    const BYTES: usize = 256 << 20;
    let memory = [pattern(BYTES), pattern(64)];
    let mut args: Vec<i64> = memory.iter().map(Guarded::address).collect();
    args.push(BYTES as i64);
    BYTES as f64 / seconds(&args, &function(&sweep_loop(false), cpu))
}

/// Seconds of one call, at best.
fn seconds(args: &[i64], code: &Code) -> f64 {
    let mut best = f64::INFINITY;
    let mut spent = Duration::ZERO;
    while spent < Duration::from_millis(600) {
        let start = cpu_time();
        let mut calls = 0;
        while calls == 0 || cpu_time() - start < Duration::from_millis(10) {
            // SAFETY: the memory is as large as the kernel's contract asks for.
            unsafe { code.call(args) };
            calls += 1;
        }
        let took = cpu_time() - start;
        best = best.min(took.as_secs_f64() / f64::from(calls));
        spent += took;
    }
    best
}

/// Bytes of a pattern in which every 32-bit word and every 16-bit half is a small number in all formats.
fn pattern(bytes: usize) -> Guarded {
    let content: Vec<u8> = (0..bytes).map(|i| [0x11u8, 0x23, 0x35, 0x3c][i % 4]).collect();
    Guarded::new(&content)
}

fn matmul(format: Format, tokens: usize, epilogue: Epilogue, tuning: MatmulTuning, weights: usize) -> Timed {
    let k = 4096;
    let units = (weights / (format.tile_bytes(k) * epilogue.tiles())).max(4);
    let x_stride = if format.is_quantized() { QuantizedRow::new(k, format.row()).stride() } else { 4 * k };
    let y_stride = 64 * units;
    let (row, dot) = (format.row(), compiler(&cpu()).dot(format));
    let kernel = Matmul { format, k, part: None, fetch: false, tokens, row, dot, epilogue, y_stride, tuning };
    let bytes = units * kernel.unit_bytes();
    let memory = vec![pattern(bytes), pattern(tokens * x_stride), pattern(tokens * y_stride)];
    let mut args: Vec<i64> = memory.iter().map(Guarded::address).collect();
    args.push(units as i64);
    let multiply_adds = units * epilogue.tiles() * 16 * k * tokens;
    Timed { kernel: kernel.into(), multiply_adds, bytes, memory, args }
}

fn attention(head_dim: usize, group: usize, kv: KvFormat, [rows, vectors]: [usize; 2], several: bool) -> Timed {
    let stride = 4 * head_dim * group;
    let tokens = if several { Attention::tokens_together(group, rows) } else { 1 };
    let together = several.then_some(Together { tokens, q_stride: stride, out_stride: stride });
    let kernel = Attention { head_dim, group, kv, cap_bits: None, rows, vectors, together };
    let (pages, half) = (64, 64 * head_dim * kv.bytes());
    let mut memory: Vec<Guarded> = (0..pages).map(|_| pattern(2 * half)).collect();
    let table: Vec<u8> = memory.iter().flat_map(|p| p.address().to_le_bytes()).collect();
    memory.push(Guarded::new(&table));
    memory.push(pattern(tokens * stride));
    memory.push(pattern(tokens * stride));
    memory.push(pattern(kernel.scratch_bytes()));
    let heads = 1;
    let at = |i: usize| memory[pages + i].address();
    let args = vec![at(1), at(0), 0, heads, -(tokens as i64), (64 * pages - tokens + 1) as i64, at(2), at(3)];
    let multiply_adds = tokens * 2 * 64 * pages * head_dim * group;
    Timed { kernel: kernel.into(), multiply_adds, bytes: pages * 2 * half, memory, args }
}

fn row(kernel: Kernel, h: usize) -> Timed {
    let memory = vec![pattern(4 * h), pattern(4 * h), pattern(4 * h), pattern(2 * h + 64)];
    let args: Vec<i64> = match kernel {
        Kernel::Quantize(_) => vec![memory[0].address(), memory[3].address()],
        _ => memory.iter().map(Guarded::address).collect(),
    };
    Timed { kernel, multiply_adds: h, bytes: 4 * h, memory, args }
}

/// Row tiles and tokens whose sums may fit the registers of some CPU.
const SHAPES: [(usize, usize); 14] =
    [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (1, 6), (1, 8), (1, 12), (2, 2), (2, 4), (2, 6), (2, 8), (2, 12), (4, 3)];

#[test]
#[ignore = "measures"]
fn bench() {
    let only = std::env::var("BENCH").unwrap_or_default();
    let cpu = cpu();
    let (dots, fmas, read) = (peak(true, &cpu), peak(false, &cpu), read_rate(&cpu));
    println!(
        "{cpu}: at most {:.1} G multiply-adds/s of bytes, {:.1} of f32, {:.1} GB/s from memory",
        dots / 1e9,
        fmas / 1e9,
        read / 1e9
    );
    println!("{:<60} {:>10} {:>8} {:>8} {:>8} {:>10}", "kernel", "G mul-add", "of peak", "GB/s", "of read", "us");
    let report = |label: &str, timed: Timed| {
        if !only.split(',').any(|part| timed.kernel.name().contains(part)) {
            return;
        }
        let seconds = seconds(&timed.args, &by_choice(&timed.kernel, &cpu));
        let (adds, bytes) = (timed.multiply_adds as f64 / seconds, timed.bytes as f64 / seconds);
        let quantized = matches!(&timed.kernel, Kernel::Matmul(m) if m.format.is_quantized());
        let peak = 100.0 * adds / if quantized { dots } else { fmas };
        let name = format!("{} {label}", timed.kernel.name());
        println!(
            "{name:<60} {:>10.2} {peak:>6.1} % {:>8.2} {:>6.1} % {:>10.2}",
            adds / 1e9,
            bytes / 1e9,
            100.0 * bytes / read,
            seconds * 1e6
        );
        drop(timed.memory);
    };
    let formats = [Format::Q4, Format::Q8, Format::Bf16, Format::F16, Format::F32];
    for format in formats {
        for tokens in [1, 2, 3, 4, 6, 8] {
            report("in cache", matmul(format, tokens, Epilogue::Store, MatmulTuning::plain(format), 200 << 10));
        }
        report(
            "in cache",
            matmul(format, 1, Epilogue::Gated(Activation::Silu), MatmulTuning::plain(format), 200 << 10),
        );
        report("from memory", matmul(format, 1, Epilogue::Store, MatmulTuning::plain(format), 256 << 20));
    }
    for format in Format::ALL.into_iter().filter(|format| format.is_exact()) {
        let tuning = MatmulTuning::plain(format);
        for tokens in [1, 6, 8] {
            report("in cache", matmul(format, tokens, Epilogue::Store, tuning, 200 << 10));
        }
        report("from memory", matmul(format, 1, Epilogue::Store, tuning, 256 << 20));
    }
    for format in formats {
        for (tiles, tokens) in SHAPES {
            for unroll in if format.is_quantized() { [1, 2] } else { [2, 8] } {
                let tuning = MatmulTuning { tiles, unroll, prefetch: Prefetch::None };
                report("in cache", matmul(format, tokens, Epilogue::Store, tuning, 200 << 10));
            }
        }
    }
    for kv in [KvFormat::F16, KvFormat::F32] {
        for group in [1, 4, 8] {
            for held in [[2, 2], [4, 1], [8, 2]] {
                for several in [false, true] {
                    report("4096 keys", attention(128, group, kv, held, several));
                }
            }
        }
    }
    for outputs in [Outputs::F32, Outputs::Quantized, Outputs::Both] {
        report(
            "",
            row(
                Norm { h: 4096, width: 4096, eps_bits: 1e-5f32.to_bits(), outputs, row: Format::Q8.row() }.into(),
                4096,
            ),
        );
    }
    report("", row(Quantize { k: 4096, row: Format::Q8.row() }.into(), 4096));
}
