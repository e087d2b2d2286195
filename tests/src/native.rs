//! Kernels as machine code that tests can call, and the comparison with the evaluator.

use memmap2::{Mmap, MmapMut};
use moec::lower::backend::KernelBackend;
use moec::target::{self, CpuLevel};
use moec_ir::tile::Function;
use moec_ir::tile::eval::{self, Memory};
use target_lexicon::Triple;

/// Machine code of one kernel in executable memory.
pub struct NativeKernel {
    code: Mmap,
    params: usize,
}

impl NativeKernel {
    /// Compiles `function` for `level` by the back end that models get there.
    ///
    /// # Panics
    /// When that fails, or this machine cannot run the level.
    pub fn new(function: &Function, level: CpuLevel) -> NativeKernel {
        NativeKernel::compile(function, level, back_ends(level)[0])
    }

    fn compile(function: &Function, level: CpuLevel, backend: KernelBackend) -> NativeKernel {
        assert_eq!(level.features & !target::host(), 0, "this machine cannot run code for {}", level.name);
        let isa = target::isa_for(level.features, &Triple::host()).unwrap_or_else(|e| panic!("{e}"));
        let compiled = backend.compile(function, &*isa).unwrap_or_else(|e| panic!("{e}"));
        let mut code = MmapMut::map_anon(compiled.code.len()).expect("memory for code");
        code.copy_from_slice(&compiled.code);
        NativeKernel { code: code.make_exec().expect("executable memory"), params: function.params.len() }
    }

    /// Calls it.
    ///
    /// # Safety
    /// The arguments must be such that every access of the kernel is to memory that the caller may read or write.
    pub unsafe fn call(&self, args: &[i64]) {
        assert_eq!(args.len(), self.params, "arguments");
        let entry = self.code.as_ptr();
        macro_rules! call {
            ($($arg:ident: $ty:ty),*) => {{
                // SAFETY: the code is a function of as many 64-bit integers by the C convention, and the caller promises
                // that its accesses are allowed.
                unsafe {
                    let f: extern "C" fn($($ty),*) = std::mem::transmute(entry);
                    f($($arg),*)
                }
            }};
        }
        match *args {
            [] => call!(),
            [a] => call!(a: i64),
            [a, b] => call!(a: i64, b: i64),
            [a, b, c] => call!(a: i64, b: i64, c: i64),
            [a, b, c, d] => call!(a: i64, b: i64, c: i64, d: i64),
            [a, b, c, d, e] => call!(a: i64, b: i64, c: i64, d: i64, e: i64),
            [a, b, c, d, e, f] => call!(a: i64, b: i64, c: i64, d: i64, e: i64, f: i64),
            [a, b, c, d, e, f, g] => call!(a: i64, b: i64, c: i64, d: i64, e: i64, f: i64, g: i64),
            [a, b, c, d, e, f, g, h] => call!(a: i64, b: i64, c: i64, d: i64, e: i64, f: i64, g: i64, h: i64),
            _ => panic!("no kernel has {} parameters", args.len()),
        }
    }
}

/// The back ends that compile for `level`, the one of choice first.
pub fn back_ends(level: CpuLevel) -> Vec<KernelBackend> {
    let mut all = vec![KernelBackend::choose(level.features, &Triple::host())];
    if all[0] != KernelBackend::Cranelift {
        all.push(KernelBackend::Cranelift);
    }
    all
}

/// The levels that this machine can run and whose code differs: each set of features once.
pub fn host_levels() -> Vec<CpuLevel> {
    let mut found: Vec<CpuLevel> = Vec::new();
    for &level in target::levels(&Triple::host()) {
        if level.features & !target::host() == 0 && found.iter().all(|l| l.features != level.features) {
            found.push(level);
        }
    }
    assert!(!found.is_empty(), "this machine can run code for none of the levels");
    found
}

/// An argument of a kernel under test.
#[derive(Clone, Debug)]
pub enum Arg {
    /// A number.
    Int(i64),
    /// The address of memory with this content, which the kernel may change.
    Memory(Vec<u8>),
}

impl Arg {
    /// Memory with these numbers.
    pub fn f32s(x: &[f32]) -> Arg {
        Arg::Memory(x.iter().flat_map(|x| x.to_le_bytes()).collect())
    }
}

/// Runs `function` on the evaluator: the memory of the arguments afterwards (nothing for numbers).
pub fn evaluate(function: &Function, args: &[Arg]) -> Result<Vec<Vec<u8>>, eval::Error> {
    let mut memory = Memory::new();
    let values: Vec<i64> = args
        .iter()
        .map(|arg| match arg {
            Arg::Int(n) => *n,
            Arg::Memory(bytes) => memory.add(bytes.as_slice()),
        })
        .collect();
    eval::run(function, &values, &mut memory)?;
    let after = args.iter().zip(&values).map(|(arg, &value)| match arg {
        Arg::Int(_) => Vec::new(),
        Arg::Memory(_) => memory.bytes(value).to_vec(),
    });
    Ok(after.collect())
}

/// Runs `function` as machine code for `level` by `backend`. The evaluator must have run it on the same arguments before, which shows that
/// all accesses are within their memory.
fn execute(function: &Function, args: &[Arg], level: CpuLevel, backend: KernelBackend) -> Vec<Vec<u8>> {
    let mut after: Vec<Vec<u8>> = args
        .iter()
        .map(|arg| match arg {
            Arg::Int(_) => Vec::new(),
            Arg::Memory(bytes) => bytes.clone(),
        })
        .collect();
    let values: Vec<i64> = args
        .iter()
        .zip(&mut after)
        .map(|(arg, after)| match arg {
            Arg::Int(n) => *n,
            Arg::Memory(_) => after.as_mut_ptr() as i64,
        })
        .collect();
    // SAFETY: the evaluator found every access within the same memory.
    unsafe { NativeKernel::compile(function, level, backend).call(&values) };
    after
}

/// Runs `function` on the evaluator and as machine code for every level of this machine by every back end, and compares each argument's memory by
/// `same`.
///
/// # Panics
/// When they differ, or the evaluator refuses.
pub fn assert_same(function: &Function, args: &[Arg], same: impl Fn(usize, &[u8], &[u8]) -> Result<(), String>) {
    let expected = evaluate(function, args).unwrap_or_else(|e| panic!("{e}\n{function}"));
    for level in host_levels() {
        for backend in back_ends(level) {
            let got = execute(function, args, level, backend);
            for (i, (expected, got)) in expected.iter().zip(&got).enumerate() {
                if let Err(difference) = same(i, expected, got) {
                    panic!("{} by {backend:?}: memory of argument {i}: {difference}\n{function}", level.name);
                }
            }
        }
    }
}

/// The same bytes.
pub fn same_bytes(_argument: usize, expected: &[u8], got: &[u8]) -> Result<(), String> {
    match expected.iter().zip(got).position(|(e, g)| e != g) {
        None => Ok(()),
        Some(at) => {
            let word = at / 4 * 4..(at / 4 * 4 + 4).min(expected.len());
            Err(format!("byte {at}: expected {:02x?} in its word, found {:02x?}", &expected[word.clone()], &got[word]))
        }
    }
}
