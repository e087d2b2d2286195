//! A case — a kernel, the memory it is given and the memory it must leave — and what runs it.
//!
//! Every region has exactly the bytes that the kernel's contract lets it touch, and all of them are compared afterwards; so
//! reads and writes outside the contract show.

use moec::kernels::Kernel;
use moec_ir::tile::eval;

/// A piece of memory.
#[derive(Clone, Debug)]
pub struct Region {
    /// Before the call.
    pub bytes: Vec<u8>,
    /// After the call.
    pub expect: Expect,
    /// What it is, for messages.
    pub name: &'static str,
}

/// What a region must hold after the call.
#[derive(Clone, Debug)]
pub enum Expect {
    /// What it held before.
    Same,
    /// These bytes.
    Bytes(Vec<u8>),
    /// Anything: scratch memory.
    Any,
}

/// A parameter.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    /// An address: byte `.1` of region `.0`.
    At(usize, usize),
    /// A number.
    Int(i64),
}

/// A kernel with memory.
#[derive(Clone, Debug)]
pub struct Case {
    pub kernel: Kernel,
    pub regions: Vec<Region>,
    /// Addresses in memory: 8 bytes at `.0`'s offset `.1` hold the address of `.2`'s offset `.3`.
    pub pointers: Vec<[usize; 4]>,
    pub args: Vec<Arg>,
}

impl Case {
    /// No memory yet.
    pub fn new(kernel: impl Into<Kernel>) -> Case {
        Case { kernel: kernel.into(), regions: Vec::new(), pointers: Vec::new(), args: Vec::new() }
    }

    fn region(&mut self, name: &'static str, bytes: Vec<u8>, expect: Expect) -> usize {
        self.regions.push(Region { bytes, expect, name });
        self.regions.len() - 1
    }

    /// Adds a region that is only read; its number.
    pub fn input(&mut self, name: &'static str, bytes: Vec<u8>) -> usize {
        self.region(name, bytes, Expect::Same)
    }

    /// Adds a region that becomes `after`; its number.
    pub fn inout(&mut self, name: &'static str, before: Vec<u8>, after: Vec<u8>) -> usize {
        assert_eq!(before.len(), after.len(), "{}: {name} before and after", self.kernel.name());
        self.region(name, before, Expect::Bytes(after))
    }

    /// Adds a region of garbage that becomes `after`; its number.
    pub fn output(&mut self, name: &'static str, after: Vec<u8>) -> usize {
        self.inout(name, vec![0xa5; after.len()], after)
    }

    /// Adds scratch memory; its number.
    pub fn scratch(&mut self, name: &'static str, bytes: usize) -> usize {
        self.region(name, vec![0xff; bytes], Expect::Any)
    }

    /// Parameters: starts of regions.
    pub fn at(&mut self, regions: &[usize]) {
        self.args.extend(regions.iter().map(|&r| Arg::At(r, 0)));
    }

    /// Parameters: numbers.
    pub fn ints(&mut self, n: &[usize]) {
        self.args.extend(n.iter().map(|&n| Arg::Int(n as i64)));
    }

    /// Writes the pointers and evaluates the arguments, given the regions' addresses.
    pub fn resolve(&self, addresses: &[i64], mut write: impl FnMut(usize, usize, i64)) -> Vec<i64> {
        for &[region, offset, target, to] in &self.pointers {
            write(region, offset, addresses[target] + to as i64);
        }
        let value = |arg: &Arg| match *arg {
            Arg::At(region, offset) => addresses[region] + offset as i64,
            Arg::Int(n) => n,
        };
        self.args.iter().map(value).collect()
    }

    /// Panics unless memory after the call is as expected.
    pub fn check(&self, runner: &str, addresses: &[i64], after: impl Fn(usize) -> Vec<u8>) {
        for (i, region) in self.regions.iter().enumerate() {
            let got = after(i);
            let mut want = match &region.expect {
                Expect::Same => region.bytes.clone(),
                Expect::Bytes(bytes) => bytes.clone(),
                Expect::Any => continue,
            };
            for &[from, offset, target, to] in &self.pointers {
                if from == i {
                    want[offset..offset + 8].copy_from_slice(&(addresses[target] + to as i64).to_le_bytes());
                }
            }
            if let Some(at) = (0..want.len()).find(|&b| got[b] != want[b]) {
                let word = |bytes: &[u8]| {
                    let at = at / 4 * 4;
                    let bits = bytes.get(at..at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
                    bits.map_or(String::new(), |b| format!("{b:#010x} = {:e} = {b}", f32::from_bits(b)))
                };
                panic!(
                    "{} on {runner}: `{}` differs at byte {at} of {}: expected {}, found {}",
                    self.kernel.name(),
                    region.name,
                    want.len(),
                    word(&want),
                    word(&got)
                );
            }
        }
    }

    /// Runs it on the evaluator.
    pub fn evaluate(&self) {
        let function = self.kernel.generate();
        let names: Vec<&str> = function.params.iter().map(|(_, name)| name.as_str()).collect();
        assert_eq!(names, self.kernel.params(), "{}: parameters", function.name);
        let mut memory = eval::Memory::new();
        let addresses: Vec<i64> = self.regions.iter().map(|r| memory.add(r.bytes.clone())).collect();
        let args = self.resolve(&addresses, |region, offset, address| {
            memory.bytes_mut(addresses[region])[offset..offset + 8].copy_from_slice(&address.to_le_bytes());
        });
        if let Err(e) = eval::run(&function, &args, &mut memory) {
            panic!("{e}");
        }
        self.check("the evaluator", &addresses, |i| memory.bytes(addresses[i]).to_vec());
    }
}

/// The bytes of f32 numbers.
pub fn f32s(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// The bytes of u32 numbers.
pub fn u32s(x: &[u32]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// `x` followed by zeros up to a multiple of `to`.
pub fn padded(x: &[f32], to: usize) -> Vec<f32> {
    let mut x = x.to_vec();
    x.resize(x.len().next_multiple_of(to), 0.0);
    x
}

/// Numbers by a rule (SplitMix64), so that a failure is found again.
pub struct Random(u64);

impl Random {
    /// Starts a sequence.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// 64 random bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() >> 16) as usize % n
    }

    /// Mostly within ±2, sometimes far smaller, sometimes zero of either sign.
    pub fn f32(&mut self) -> f32 {
        let unit = (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        match self.below(40) {
            0 => 0.0,
            1 => -0.0,
            2 => unit * 1e-6,
            _ => unit * 2.0,
        }
    }

    /// `n` of them.
    pub fn f32s(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.f32()).collect()
    }

    /// `n` random bytes.
    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| (self.next() >> 24) as u8).collect()
    }
}
