//! Machine code gives the evaluator's bits: every operation, every conversion, random functions.

use half::f16;
use moec::lower::backend::KernelBackend;
use moec::lower::wide;
use moec::target;
use moec_ir::math;
use moec_ir::tile::build::Builder;
use moec_ir::tile::{Binary, Compare, Function, Memory, Reduce, Type, Value};
use moec_tests::native::{Arg, assert_same, evaluate, same_bytes};
use proptest::prelude::*;

use crate::random;

/// `y[i] = f(x[i])` for `vectors` vectors of 16.
fn elementwise(
    name: &str,
    (from, to): (Memory, Memory),
    vectors: usize,
    f: impl FnOnce(&mut Builder, Value) -> Value,
) -> Function {
    let (mut b, [x, y]) = Builder::new(name, ["x", "y"]);
    let (start, end) = (b.int(0), b.int(vectors as i64 * 16));
    b.for_loop(start, end, 16, &[], |b, i, _| {
        let (at_x, at_y) = (b.mul_int(i, from.bytes() as i64), b.mul_int(i, to.bytes() as i64));
        let (x, y) = (b.add(x, at_x), b.add(y, at_y));
        let v = b.load(from, x, 0);
        let v = f(b, v);
        b.store(to, v, y, 0);
        Vec::new()
    });
    b.finish()
}

fn all_u16() -> Vec<u8> {
    (0..=u16::MAX).flat_map(u16::to_le_bytes).collect()
}

#[test]
fn every_f16_and_bf16_is_widened_exactly() {
    for format in [Memory::F16, Memory::Bf16] {
        let function = elementwise("widen", (format, Memory::F32), 4096, |_, v| v);
        assert_same(&function, &[Arg::Memory(all_u16()), Arg::Memory(vec![0; 65536 * 4])], same_bytes);
        // One at a time, in all lanes and as a scalar.
        let (mut b, [x, y]) = Builder::new("widen_one", ["x", "y"]);
        let (start, end) = (b.int(0), b.int(65536));
        b.for_loop(start, end, 1, &[], |b, i, _| {
            let (at_x, at_y) = (b.mul_int(i, 2), b.mul_int(i, 8));
            let (x, y) = (b.add(x, at_x), b.add(y, at_y));
            let splat = b.load_splat(format, x, 0);
            let scalar = b.load_scalar(format, x, 0);
            // Lanes 0 and 1 stay: the next vector overwrites the others, or ends beyond.
            b.store(Memory::F32, splat, y, 0);
            b.store_scalar(Memory::F32, scalar, y, 4);
            Vec::new()
        });
        assert_same(&b.finish(), &[Arg::Memory(all_u16()), Arg::Memory(vec![0; 65536 * 8 + 64])], same_bytes);
    }
}

#[test]
fn f32_is_narrowed_to_the_nearest_f16() {
    // Each f16 and the middle between it and the next, with their neighbours; and every exponent with some mantissas.
    let mut xs: Vec<u32> = Vec::new();
    for h in 0..=u16::MAX {
        let (a, b) = (f16::from_bits(h).to_f32(), f16::from_bits(h.wrapping_add(1)).to_f32());
        for x in [a, (a + b) / 2.0] {
            xs.extend([-1, 0, 1].map(|d: i32| x.to_bits().wrapping_add_signed(d)));
        }
    }
    for high in 0..=0x1ff_u32 {
        xs.extend([0, 1, 0xfff, 0x1000, 0x1001, 0x2000, 0x3f_f000, 0x40_0000, 0x7f_ffff].map(|m| high << 23 | m));
    }
    while !xs.len().is_multiple_of(16) {
        xs.push(0);
    }
    let input: Vec<u8> = xs.iter().flat_map(|x| x.to_le_bytes()).collect();
    let vectors = xs.len() / 16;
    let function = elementwise("narrow", (Memory::F32, Memory::F16), vectors, |_, v| v);
    let args = [Arg::Memory(input), Arg::Memory(vec![0; xs.len() * 2])];
    assert_same(&function, &args, same_bytes);
    let got = &evaluate(&function, &args).unwrap()[1];
    for (x, h) in xs.iter().zip(got.chunks_exact(2)) {
        assert_eq!(u16::from_le_bytes([h[0], h[1]]), f16::from_f32(f32::from_bits(*x)).to_bits(), "{x:#x}");
    }
}

#[test]
fn exp_and_silu_are_the_same_everywhere() {
    let mut xs: Vec<f32> = (0..40_000).map(|i| (i as f32 - 20_000.0) * 0.005).collect();
    xs.extend([0.0, -0.0, 1e-40, -1e-40, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 3e38, -3e38, -87.3, -87.30001]);
    xs.resize(40_016, 88.3);
    let bytes = xs.len() * 4;
    for (name, build, scalar) in [
        ("exp", math::build_exp as fn(&mut Builder, Value) -> Value, math::exp as fn(f32) -> f32),
        ("silu", math::build_silu, math::silu),
    ] {
        let function = elementwise(name, (Memory::F32, Memory::F32), xs.len() / 16, build);
        assert_same(&function, &[Arg::f32s(&xs), Arg::Memory(vec![0; bytes])], same_bytes);
        let (mut b, [x, y]) = Builder::new(format!("{name}_scalar"), ["x", "y"]);
        b.repeat(bytes as i64, 4, |b, i| {
            let (x, y) = (b.add(x, i), b.add(y, i));
            let v = b.load_scalar(Memory::F32, x, 0);
            let v = build(b, v);
            b.store_scalar(Memory::F32, v, y, 0);
        });
        let function = b.finish();
        let args = [Arg::f32s(&xs), Arg::Memory(vec![0; bytes])];
        assert_same(&function, &args, same_bytes);
        let got = &evaluate(&function, &args).unwrap()[1];
        for (x, y) in xs.iter().zip(got.chunks_exact(4)) {
            let y = f32::from_le_bytes([y[0], y[1], y[2], y[3]]);
            assert!(y.to_bits() == scalar(*x).to_bits() || (y.is_nan() && x.is_nan()), "{name}({x}) = {y}");
        }
    }
}

#[test]
fn dot_products_are_exact_at_the_extremes() {
    let extremes_w = [0u8, 1, 127, 128, 254, 255];
    let extremes_a = [0x80u8, 0x81, 0xff, 0, 1, 0x7f];
    let (mut b, [w, a, acc, y]) = Builder::new("dot", ["w", "a", "acc", "y"]);
    b.repeat(64 * 256, 64, |b, i| {
        let [w, a, acc, y] = [w, a, acc, y].map(|p| b.add(p, i));
        let (w, a) = (b.load_bytes(w, 0), b.load_bytes(a, 0));
        let acc = b.load(Memory::I32, acc, 0);
        let once = b.dot_u8s8(acc, w, a);
        let twice = b.dot_u8s8(once, a, w);
        let odd = b.lanes([0x0101_0101; 16]);
        let odd = b.bitcast(Type::VecI8, odd);
        let [x, z] = [w, a].map(|bytes| b.binary(Binary::Or, bytes, odd));
        let signed = [(w, z), (a, x), (x, x)].into_iter().fold(twice, |acc, (w, a)| b.dot_s8s8(acc, w, a));
        b.store(Memory::I32, signed, y, 0);
    });
    let mut n = 12345u32;
    let mut next = || {
        n = n.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        n >> 16
    };
    let w: Vec<u8> =
        (0..64 * 256).map(|i| if i < 64 * 128 { extremes_w[next() as usize % 6] } else { next() as u8 }).collect();
    let a: Vec<u8> =
        (0..64 * 256).map(|i| if i < 64 * 128 { extremes_a[next() as usize % 6] } else { next() as u8 }).collect();
    let acc: Vec<u8> =
        (0..16 * 256).flat_map(|_| [i32::MAX, i32::MIN, 0, next() as i32][next() as usize % 4].to_le_bytes()).collect();
    let args = [Arg::Memory(w), Arg::Memory(a), Arg::Memory(acc), Arg::Memory(vec![0; 64 * 256])];
    assert_same(&b.finish(), &args, same_bytes);
}

/// Sums of products of small bytes may wait in 16 bits: as many as have room at the extremes, and none that is used otherwise.
#[test]
fn sums_of_small_products_never_overflow() {
    for most in [1u8, 15, 16, 21, 31, 42, 43, 63, 64, 127, 128] {
        let (mut b, [w, a, acc, y]) = Builder::new(format!("small_{most}"), ["w", "a", "acc", "y"]);
        b.repeat(64 * 8, 64, |b, i| {
            let [w, a, acc, y] = [w, a, acc, y].map(|p| b.add(p, i));
            let mask = b.lanes([i32::from_ne_bytes([most; 4]); 16]);
            let mask = b.bitcast(Type::VecI8, mask);
            let (w, a) = (b.load_bytes(w, 0), b.load_bytes(a, 0));
            let w = b.binary(Binary::And, w, mask);
            let acc = b.load(Memory::I32, acc, 0);
            let dots = |b: &mut Builder, sum: Value, n: usize| (0..n).fold(sum, |sum, _| b.dot_u8s8(sum, w, a));
            let some = dots(b, acc, 5);
            let more = dots(b, some, 130);
            let zero = b.splat_i32(0);
            let others = dots(b, zero, 3);
            let all = b.binary(Binary::Xor, some, more);
            let all = b.add(all, others);
            b.store(Memory::I32, all, y, 0);
        });
        let w = Arg::Memory(vec![0xff; 64 * 8]);
        let a = (0..64 * 8).map(|i: usize| [0x80, 0x7f, 0x81, (37 * i) as u8][i / 64 % 4]).collect();
        let acc = (0..16 * 8).flat_map(|i| [0, i32::MAX, i32::MIN, -1][i / 16 % 4].to_le_bytes()).collect();
        assert_same(&b.finish(), &[w, Arg::Memory(a), Arg::Memory(acc), Arg::Memory(vec![0; 64 * 8])], same_bytes);
    }
}

/// Numbers at which rounding, comparison and conversion could go wrong.
const EDGES: [f32; 32] = [
    0.0,
    -0.0,
    0.5,
    -0.5,
    1.5,
    -1.5,
    2.5,
    0.499_999_97,
    -0.499_999_97,
    8_388_607.5,
    -8_388_607.5,
    8_388_609.0,
    2_147_483_520.0,
    2_147_483_648.0,
    -2_147_483_648.0,
    -2_147_483_904.0,
    3e9,
    -3e9,
    1e20,
    -1e20,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
    f32::MIN_POSITIVE,
    1e-45,
    -1e-45,
    1.0,
    -1.0,
    127.5,
    -127.5,
    f32::MAX,
    f32::MIN,
];

#[test]
fn rounding_and_conversion_at_the_edges() {
    let input = Arg::f32s(&EDGES);
    let to_int = elementwise("to_int", (Memory::F32, Memory::I32), 2, |b, v| b.float_to_int(v));
    let args = [input.clone(), Arg::Memory(vec![0; 128])];
    assert_same(&to_int, &args, same_bytes);
    let got = &evaluate(&to_int, &args).unwrap()[1];
    let got: Vec<i32> = got.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    assert_eq!(got[..9], [0, 0, 0, 0, 2, -2, 2, 0, 0]);
    assert_eq!(got[12..18], [2_147_483_520, i32::MIN, i32::MIN, i32::MIN, i32::MIN, i32::MIN]);
    assert_eq!(got[20..23], [i32::MIN; 3]);
    let to_bytes = elementwise("to_bytes", (Memory::F32, Memory::I8), 2, |b, v| b.float_to_int(v));
    assert_same(&to_bytes, &[input.clone(), Arg::Memory(vec![0; 32])], same_bytes);
    let rounded = elementwise("round", (Memory::F32, Memory::F32), 2, |b, v| b.round(v));
    assert_same(&rounded, &[input, Arg::Memory(vec![0; 128])], same_bytes);
    let bytes: Vec<u8> = (0..=255).collect();
    let widened = elementwise("from_bytes", (Memory::I8, Memory::I32), 16, |_, v| v);
    assert_same(&widened, &[Arg::Memory(bytes), Arg::Memory(vec![0; 1024])], same_bytes);
}

#[test]
fn minimum_and_maximum_take_the_second_operand_for_nan() {
    // Each edge with each other, as vectors and as scalars; -0 and NaN show which operand is taken.
    let (mut b, [x, y]) = Builder::new("min_max", ["x", "y"]);
    for i in 0..EDGES.len() {
        let splat = b.load_splat(Memory::F32, x, 4 * i as i64);
        let scalar = b.load_scalar(Memory::F32, x, 4 * i as i64);
        let one = b.load_scalar(Memory::F32, x, 4 * ((i * 7 + 1) % EDGES.len()) as i64);
        for (o, op) in [Binary::Min, Binary::Max].into_iter().enumerate() {
            for half in 0..2 {
                let v = b.load(Memory::F32, x, 64 * half);
                let (r, s) = (b.binary(op, splat, v), b.binary(op, v, splat));
                let at = ((i * 2 + o) as i64 * 5 + 2 * half) * 64;
                b.store(Memory::F32, r, y, at);
                b.store(Memory::F32, s, y, at + 64);
            }
            let s = b.binary(op, scalar, one);
            b.store_scalar(Memory::F32, s, y, ((i * 2 + o) as i64 * 5 + 4) * 64);
        }
    }
    let function = b.finish();
    let args = [Arg::f32s(&EDGES), Arg::Memory(vec![0; EDGES.len() * 10 * 64])];
    assert_same(&function, &args, same_bytes);
}

#[test]
fn reductions_follow_the_tree() {
    let (mut b, [x, n, y]) = Builder::new("reduce", ["x", "n", "y"]);
    b.repeat(64 * 64, 64, |b, i| {
        let (x, n, y) = (b.add(x, i), b.add(n, i), b.add(y, i));
        let v = b.load(Memory::F32, x, 0);
        let (sum, max) = (b.reduce(Reduce::Add, v), b.reduce(Reduce::Max, v));
        let n = b.load(Memory::I32, n, 0);
        let n = b.reduce(Reduce::Add, n);
        b.store_scalar(Memory::F32, sum, y, 0);
        b.store_scalar(Memory::F32, max, y, 4);
        b.store_scalar(Memory::I32, n, y, 8);
        let high = b.shift(moec_ir::tile::Shift::RightSigned, n, 32);
        b.store_scalar(Memory::I32, high, y, 12);
    });
    let xs: Vec<f32> =
        (0..1024u32).map(|i| (i.wrapping_mul(2_654_435_761) as i32 as f32) * 1.7f32.powi(i as i32 % 40 - 60)).collect();
    let ns: Vec<u8> = (0..1024u32).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    assert_same(&b.finish(), &[Arg::f32s(&xs), Arg::Memory(ns), Arg::Memory(vec![0; 64 * 64])], same_bytes);
}

#[test]
fn loops_run_as_often_as_they_should() {
    // Bounds from arguments, so that nothing is known when the loop is compiled.
    let (mut b, [start, end, y]) = Builder::new("loops", ["start", "end", "y"]);
    for (i, step) in [1, 2, 7].into_iter().enumerate() {
        let (zero, one) = (b.int(0), b.int(1));
        let after = b.for_loop(start, end, step, &[zero, zero, one], |b, index, c| {
            let count = b.add_int(c[0], 1);
            // Two values change places, one of them growing.
            let sum = b.add(c[1], index);
            vec![count, c[2], sum]
        });
        for (j, &v) in after.iter().enumerate() {
            b.store_scalar(Memory::I32, v, y, (i * 3 + j) as i64 * 4);
        }
    }
    let function = b.finish();
    for (start, end) in [(0, 0), (0, 1), (5, -5), (-5, 5), (3, 21), (7, 7), (i64::MIN, i64::MIN + 3)] {
        let args = [Arg::Int(start), Arg::Int(end), Arg::Memory(vec![0; 36])];
        assert_same(&function, &args, same_bytes);
        let count = i32::from_le_bytes(evaluate(&function, &args).unwrap()[2][..4].try_into().unwrap());
        assert_eq!(i64::from(count), (end.wrapping_sub(start)).max(0), "{start}..{end}");
    }
}

#[test]
fn masks_are_values_like_others() {
    // A mask carried by a loop is no comparison that instruction selection could see.
    let (mut b, [x, y]) = Builder::new("masks", ["x", "y"]);
    let (start, end) = (b.int(0), b.int(4));
    let v = b.load(Memory::F32, x, 0);
    let zero = b.splat_f32(0.0);
    let mask = b.compare(Compare::Greater, v, zero);
    let out = b.for_loop(start, end, 1, &[mask, v], |b, _, c| {
        let w = b.add(c[1], c[1]);
        let one = b.splat_f32(1.0);
        let kept = b.select(c[0], w, one);
        let n = b.bitcast(Type::VecI32, kept);
        let one = b.splat_i32(1 << 24);
        let n = b.select(c[0], n, one);
        let kept = b.bitcast(Type::VecF32, n);
        let limit = b.splat_f32(10.0);
        vec![b.compare(Compare::LessEqual, kept, limit), kept]
    });
    b.store(Memory::F32, out[1], y, 0);
    assert_same(&b.finish(), &[Arg::f32s(&EDGES[..16]), Arg::Memory(vec![0; 64])], same_bytes);
}

#[test]
fn offsets_reach_two_gigabytes_either_way() {
    let (mut b, [x, y]) = Builder::new("far", ["x", "y"]);
    let high = b.add_int(x, -i64::from(i32::MAX));
    let low = b.add_int(x, 1 << 31);
    let v = b.load(Memory::F32, high, i64::from(i32::MAX));
    let w = b.load(Memory::F32, low, i64::from(i32::MIN));
    let v = b.add(v, w);
    let at = b.add_int(y, -i64::from(i32::MAX));
    b.store(Memory::F32, v, at, i64::from(i32::MAX));
    assert_same(&b.finish(), &[Arg::f32s(&EDGES[..16]), Arg::Memory(vec![0; 64])], same_bytes);
}

/// Words are the same, or both NaN.
fn same_outputs(argument: usize, expected: &[u8], got: &[u8]) -> Result<(), String> {
    match argument {
        1 => same_floats(expected, got, |b: [u8; 4]| f32::from_le_bytes(b).is_nan()),
        2 => same_floats(expected, got, |b: [u8; 2]| f16::from_le_bytes(b).is_nan()),
        _ => same_bytes(argument, expected, got),
    }
}

fn same_floats<const N: usize>(expected: &[u8], got: &[u8], is_nan: impl Fn([u8; N]) -> bool) -> Result<(), String> {
    let (expected, got) = (expected.as_chunks::<N>().0, got.as_chunks::<N>().0);
    match expected.iter().zip(got).position(|(e, g)| e != g && !(is_nan(*e) && is_nan(*g))) {
        None => Ok(()),
        Some(i) => Err(format!("word {i}: expected {:02x?}, found {:02x?}", expected[i], got[i])),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn random_functions_give_the_same_bits(
        steps in prop::collection::vec(any::<random::Step>(), 1..60),
        seed in any::<u64>(),
    ) {
        let function = random::function(&steps);
        assert_same(&function, &random::arguments(seed), same_outputs);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn random_functions_compile_for_every_cpu(steps in prop::collection::vec(any::<random::Step>(), 1..60)) {
        let function = random::function(&steps);
        for triple in ["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"] {
            let triple = triple.parse().unwrap();
            for level in target::levels(&triple) {
                let isa = target::isa_for(level.features, &triple).unwrap();
                KernelBackend::Cranelift.compile(&function, &*isa).unwrap();
                if let KernelBackend::Wide(cpu) = KernelBackend::choose(level.features, &triple) {
                    wide::check_allocation(&function, cpu).unwrap();
                }
            }
        }
    }
}
