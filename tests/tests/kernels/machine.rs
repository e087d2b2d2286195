//! Runs kernels as machine code on this machine.

use std::collections::BTreeMap;

use memmap2::MmapMut;
use moec::kernels::Kernel;
use moec::lower::backend::KernelBackend;
use moec::target::{find_level, host};
use moec::tune::code::{Code, Compiler};
use target_lexicon::Triple;

use crate::harness::Case;

/// Bytes before and after each region that must not change.
const GUARD: usize = 64;

/// A compiler for a CPU of the table (or `native`), whose features this machine must have, by the back end that its models get.
pub fn compiler(cpu: &str) -> Compiler {
    let level = find_level(cpu, &Triple::host()).expect("a CPU of the table");
    Compiler::new(level).unwrap_or_else(|e| panic!("{e}"))
}

/// Compiles `kernel` by that back end.
pub fn by_choice(kernel: &Kernel, cpu: &str) -> Code {
    compiler(cpu).kernel(kernel.clone()).unwrap_or_else(|e| panic!("{e}"))
}

/// Compiles `kernel` by Cranelift.
pub fn by_cranelift(kernel: &Kernel, cpu: &str) -> Code {
    compiler(cpu).by(KernelBackend::Cranelift).kernel(kernel.clone()).unwrap_or_else(|e| panic!("{e}"))
}

/// Whether this machine can run code for a CPU of the table.
pub fn can_run(cpu: &str) -> bool {
    find_level(cpu, &Triple::host()).is_ok_and(|level| level.features & !host() == 0)
}

/// Memory aligned to 64 bytes with a guard around it.
pub struct Guarded {
    memory: MmapMut,
    bytes: usize,
}

impl Guarded {
    /// Holds a copy of `bytes`.
    pub fn new(bytes: &[u8]) -> Guarded {
        let mut memory = MmapMut::map_anon(bytes.len() + 2 * GUARD).expect("memory");
        memory.fill(0xee);
        memory[GUARD..GUARD + bytes.len()].copy_from_slice(bytes);
        Guarded { memory, bytes: bytes.len() }
    }

    /// Where the content begins.
    pub fn address(&self) -> i64 {
        self.memory.as_ptr() as i64 + GUARD as i64
    }

    /// The content.
    pub fn content(&mut self) -> &mut [u8] {
        &mut self.memory[GUARD..GUARD + self.bytes]
    }

    fn intact(&self) -> bool {
        let (before, rest) = self.memory.split_at(GUARD);
        before.iter().chain(&rest[self.bytes..]).all(|&b| b == 0xee)
    }
}

/// Memory for a case, and the arguments of the call.
pub fn memory(case: &Case) -> (Vec<Guarded>, Vec<i64>) {
    let mut memory: Vec<Guarded> = case.regions.iter().map(|r| Guarded::new(&r.bytes)).collect();
    let addresses: Vec<i64> = memory.iter().map(Guarded::address).collect();
    let args = case.resolve(&addresses, |region, offset, address| {
        memory[region].content()[offset..offset + 8].copy_from_slice(&address.to_le_bytes());
    });
    (memory, args)
}

/// Runs cases as machine code for `cpu` by each back end, each kernel compiled once.
pub fn run(cases: &[Case], cpu: &str) {
    run_by(cases, cpu, "by the back end of choice", by_choice);
    run_by(cases, cpu, "by Cranelift", by_cranelift);
}

fn run_by(cases: &[Case], cpu: &str, how: &str, compile: impl Fn(&Kernel, &str) -> Code) {
    let mut codes: BTreeMap<&Kernel, Code> = BTreeMap::new();
    for case in cases {
        let code = codes.entry(&case.kernel).or_insert_with(|| compile(&case.kernel, cpu));
        let (mut memory, args) = memory(case);
        // SAFETY: the case gives the kernel what its contract asks for; the evaluator has run it without a fault.
        unsafe { code.call(&args) };
        for (guarded, region) in memory.iter().zip(&case.regions) {
            assert!(guarded.intact(), "{}: written beyond `{}`", case.kernel.name(), region.name);
        }
        let addresses: Vec<i64> = memory.iter().map(Guarded::address).collect();
        let contents: Vec<Vec<u8>> = memory.iter_mut().map(|m| m.content().to_vec()).collect();
        case.check(&format!("{cpu} {how}"), &addresses, |i| contents[i].clone());
    }
}
