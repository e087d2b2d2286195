//! Tile IR → Cranelift IR.
//!
//! A logical vector is four 128-bit values, lanes 0..4 in the first; a mask is four vectors of 32-bit lanes, all ones or all
//! zeros; a Bool is an I8. The function takes its parameters as I64 by the platform's convention, returns nothing, and
//! calls nothing. What each CPU is asked for beyond plain Cranelift IR is decided here, once, in [`Cpu`].
//!
//! Instructions keep the order in which the generator wrote them ([`crate::target::isa_for`] says why). Constants, and halves of
//! dot products' operands, are made once in a block.
//!
//! Deliberately absent: optimization beyond that, and prefetches, for which Cranelift has no instruction: they are dropped.

mod arithmetic;
mod convert;
mod memory;

use std::collections::HashMap;

use cranelift_codegen::ir::{
    AbiParam, Block, BlockArg, Function, InstBuilder, MemFlagsData, Signature, Type as ClifType, UserFuncName,
    Value as ClifValue, condcodes::IntCC, types,
};
use cranelift_codegen::isa::TargetIsa;
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};
use moec_ir::tile::{self, Binary, Inst, Loop, Memory, Op, Reduce, Type, Value};

/// The Cranelift IR of `function`, under the name `name`.
///
/// # Panics
/// When `isa` lacks FMA on x86-64 (Cranelift would call a library), or when `function` does not verify.
pub fn build_function(
    function: &tile::Function,
    name: UserFuncName,
    isa: &dyn TargetIsa,
    context: &mut FunctionBuilderContext,
) -> Function {
    build_traced(function, name, isa, context).0
}

/// [`build_function`], and for each instruction of `function`, counted in the order of the text, how many instructions there
/// are in the Cranelift IR before its own.
pub(super) fn build_traced(
    function: &tile::Function,
    name: UserFuncName,
    isa: &dyn TargetIsa,
    context: &mut FunctionBuilderContext,
) -> (Function, Vec<usize>) {
    let mut signature = Signature::new(isa.default_call_conv());
    signature.params.extend(function.params.iter().map(|_| AbiParam::new(types::I64)));
    let mut built = Function::with_name_signature(name, signature);
    let builder = FunctionBuilder::new(&mut built, context);
    let mut lowering = Lowering {
        function,
        b: builder,
        values: vec![Parts::None; function.types.len()],
        ints: vec![None; function.types.len()],
        floats: vec![None; function.types.len()],
        cpu: Cpu::new(isa, &function.name),
        made: Made::default(),
        trace: Vec::new(),
    };
    lowering.whole();
    let Lowering { b, trace, .. } = lowering;
    b.finalize(isa.frontend_config());
    (built, trace)
}

/// What the CPU offers beyond plain Cranelift IR.
#[derive(Clone, Copy)]
struct Cpu {
    /// x86-64, not AArch64.
    x86: bool,
    /// `vpdpbusd` or `usdot`, which Cranelift finds by the shape of the expression.
    dot: bool,
}

impl Cpu {
    fn new(isa: &dyn TargetIsa, function: &str) -> Cpu {
        let x86 = isa.triple().architecture == target_lexicon::Architecture::X86_64;
        let flags = isa.isa_flags();
        let has = |name: &str| flags.iter().any(|f| f.name == name && f.as_bool() == Some(true));
        assert!(
            !x86 || (has("has_fma") && has("has_avx2")),
            "{function}: code is generated for CPUs with AVX2 and FMA"
        );
        let dot =
            if x86 { has("has_avx_vnni") || (has("has_avx512vnni") && has("has_avx512vl")) } else { has("has_i8mm") };
        Cpu { x86, dot }
    }
}

/// A value of the tile IR in Cranelift IR.
#[derive(Clone, Copy)]
enum Parts {
    /// Not defined yet.
    None,
    /// A scalar.
    One(ClifValue),
    /// A logical vector.
    Four([ClifValue; 4]),
}

struct Lowering<'a> {
    function: &'a tile::Function,
    b: FunctionBuilder<'a>,
    values: Vec<Parts>,
    /// The Int values that are constants.
    ints: Vec<Option<i64>>,
    /// The F32 values that are constants, as bits.
    floats: Vec<Option<u32>>,
    cpu: Cpu,
    made: Made,
    trace: Vec<usize>,
}

/// What has been made in the current block and can be used again.
#[derive(Default)]
struct Made {
    constants: HashMap<(ClifType, [u8; 16]), ClifValue>,
    /// Of vectors of bytes: even and odd bytes as 16 bits, signed or not.
    pairs: HashMap<(ClifValue, bool), [ClifValue; 2]>,
}

impl Lowering<'_> {
    fn whole(&mut self) {
        let entry = self.b.create_block();
        self.b.append_block_params_for_function_params(entry);
        self.b.switch_to_block(entry);
        self.b.seal_block(entry);
        for (i, (v, _)) in self.function.params.iter().enumerate() {
            self.values[v.0 as usize] = Parts::One(self.b.block_params(entry)[i]);
        }
        let function = self.function;
        self.block(&function.body);
        self.b.ins().return_(&[]);
    }

    fn block(&mut self, block: &[Inst]) {
        for inst in block {
            self.trace.push(self.b.func.dfg.num_insts());
            if let Op::For(l) = &inst.op {
                self.run_loop(l, &inst.results);
                continue;
            }
            let parts = self.op(&inst.op);
            if let [result] = inst.results[..] {
                self.values[result.0 as usize] = parts;
                match inst.op {
                    Op::Int(n) => self.ints[result.0 as usize] = Some(n),
                    Op::F32(bits) => self.floats[result.0 as usize] = Some(bits),
                    _ => {}
                }
            }
        }
    }

    /// The test is at the end of the body; before the loop it is left out when constants tell that the body runs.
    fn run_loop(&mut self, l: &Loop, results: &[Value]) {
        let (start, end) = (self.scalar(l.start), self.scalar(l.end));
        let body = self.b.create_block();
        let exit = self.b.create_block();
        let index = self.b.append_block_param(body, types::I64);
        self.values[l.index.0 as usize] = Parts::One(index);
        self.block_params(body, &l.carried);
        self.block_params(exit, results);

        let initial = self.arguments(&l.initial);
        let mut enter = vec![BlockArg::from(start)];
        enter.extend(&initial);
        match (self.ints[l.start.0 as usize], self.ints[l.end.0 as usize]) {
            (Some(start), Some(end)) if start < end => {
                self.b.ins().jump(body, &enter);
            }
            _ => {
                let some = self.b.ins().icmp(IntCC::SignedLessThan, start, end);
                self.b.ins().brif(some, body, &enter, exit, &initial);
            }
        }

        self.enter(body);
        self.block(&l.body);
        let index = self.b.ins().iadd_imm_s(index, l.step);
        let next = self.arguments(&l.next);
        let mut again = vec![BlockArg::from(index)];
        again.extend(&next);
        let more = self.b.ins().icmp(IntCC::SignedLessThan, index, end);
        self.b.ins().brif(more, body, &again, exit, &next);
        self.b.seal_block(body);
        self.enter(exit);
        self.b.seal_block(exit);
    }

    fn enter(&mut self, block: Block) {
        self.b.switch_to_block(block);
        self.made = Made::default();
    }

    fn block_params(&mut self, block: Block, values: &[Value]) {
        for &v in values {
            let ty = self.function.ty(v);
            let mut param = || self.b.append_block_param(block, clif_type(ty));
            self.values[v.0 as usize] =
                if ty.is_vector() { Parts::Four(std::array::from_fn(|_| param())) } else { Parts::One(param()) };
        }
    }

    fn arguments(&self, values: &[Value]) -> Vec<BlockArg> {
        let mut flat = Vec::new();
        for &v in values {
            match self.values[v.0 as usize] {
                Parts::None => self.undefined(v),
                Parts::One(x) => flat.push(x.into()),
                Parts::Four(x) => flat.extend(x.map(BlockArg::from)),
            }
        }
        flat
    }

    fn undefined(&self, v: Value) -> ! {
        panic!("{}: {v} is not what its use needs; verify tile IR before it is lowered", self.function.name)
    }

    fn scalar(&self, v: Value) -> ClifValue {
        let Parts::One(x) = self.values[v.0 as usize] else { self.undefined(v) };
        x
    }

    fn vector(&self, v: Value) -> [ClifValue; 4] {
        let Parts::Four(x) = self.values[v.0 as usize] else { self.undefined(v) };
        x
    }

    fn ty(&self, v: Value) -> Type {
        self.function.ty(v)
    }

    /// `f` of each part of a scalar or vector.
    fn map(&mut self, a: Value, mut f: impl FnMut(&mut Self, ClifValue) -> ClifValue) -> Parts {
        match self.values[a.0 as usize] {
            Parts::None => self.undefined(a),
            Parts::One(a) => Parts::One(f(self, a)),
            Parts::Four(a) => Parts::Four(a.map(|a| f(self, a))),
        }
    }

    /// `f` of the parts of two scalars or two vectors.
    fn zip(&mut self, a: Value, b: Value, mut f: impl FnMut(&mut Self, ClifValue, ClifValue) -> ClifValue) -> Parts {
        match (self.values[a.0 as usize], self.values[b.0 as usize]) {
            (Parts::One(a), Parts::One(b)) => Parts::One(f(self, a, b)),
            (Parts::Four(a), Parts::Four(b)) => Parts::Four(std::array::from_fn(|i| f(self, a[i], b[i]))),
            _ => self.undefined(a),
        }
    }

    /// Anything but a loop; [`Parts::None`] when it has no result.
    fn op(&mut self, op: &Op) -> Parts {
        match op {
            Op::Int(n) => Parts::One(self.b.ins().iconst(types::I64, *n)),
            Op::F32(bits) => Parts::One(self.b.ins().f32const(f32::from_bits(*bits))),
            Op::Lanes(n) => Parts::Four(std::array::from_fn(|i| {
                let lanes: [i32; 4] = std::array::from_fn(|l| n[4 * i + l]);
                self.constant(types::I32X4, bytes_of(lanes))
            })),
            Op::Binary(op, a, b) => self.binary(*op, *a, *b),
            Op::Shift(op, a, by) => self.shift(*op, *a, *by),
            Op::Sqrt(a) => self.map(*a, |s, a| s.b.ins().sqrt(a)),
            Op::Abs(a) => self.map(*a, |s, a| s.b.ins().fabs(a)),
            Op::Round(a) => self.map(*a, |s, a| s.b.ins().nearest(a)),
            Op::Fma(x, y, z) => {
                let z = self.values[z.0 as usize];
                let mut i = 0;
                self.zip(*x, *y, |s, x, y| {
                    let z = match z {
                        Parts::None => s.undefined(Value(0)),
                        Parts::One(z) => z,
                        Parts::Four(z) => z[i],
                    };
                    i += 1;
                    s.b.ins().fma(x, y, z)
                })
            }
            Op::Compare(op, a, b) => self.compare(*op, *a, *b),
            Op::Select(c, a, b) => self.select(*c, *a, *b),
            Op::Splat(a) => self.splat(*a),
            Op::IntToFloat(a) => self.map(*a, |s, a| s.b.ins().fcvt_from_sint(types::F32X4, a)),
            Op::FloatToInt(a) => self.map(*a, Self::float_to_int),
            Op::Bitcast(to, a) => self.bitcast(*to, *a),
            Op::Reduce(Reduce::Add, a) => self.reduce(*a, Binary::Add),
            Op::Reduce(Reduce::Max, a) => self.reduce(*a, Binary::Max),
            Op::DotU8S8(acc, w, a) | Op::DotS8S8(acc, w, a) => {
                let signed = matches!(op, Op::DotS8S8(..));
                let (acc, w, a) = (self.vector(*acc), self.vector(*w), self.vector(*a));
                Parts::Four(std::array::from_fn(|i| self.dot(acc[i], w[i], a[i], signed)))
            }
            Op::NibbleLow(a) => {
                let mask = self.constant(types::I8X16, [0x0f; 16]);
                self.map(*a, |s, a| s.b.ins().band(a, mask))
            }
            Op::NibbleHigh(a) if self.cpu.x86 => {
                // Bytes have no shift of their own there; the mask is the one of `NibbleLow`.
                let mask = self.constant(types::I8X16, [0x0f; 16]);
                self.map(*a, |s, a| {
                    let lanes = s.cast(types::I32X4, a);
                    let lanes = s.b.ins().ushr_imm_u(lanes, 4);
                    let bytes = s.cast(types::I8X16, lanes);
                    s.b.ins().band(bytes, mask)
                })
            }
            Op::NibbleHigh(a) => self.map(*a, |s, a| s.b.ins().ushr_imm_u(a, 4)),
            Op::Lookup(table, a) => {
                let table = self.constant(types::I8X16, *table);
                let x86 = self.cpu.x86;
                self.map(*a, |s, a| if x86 { s.b.ins().x86_pshufb(table, a) } else { s.b.ins().swizzle(table, a) })
            }
            Op::Load(format, at) => Parts::Four(self.load(*format, *at)),
            Op::LoadBytes(at) => Parts::Four(self.load_parts(types::I8X16, *at)),
            Op::LoadSplat(format, at) => Parts::Four([self.load_splat(*format, *at); 4]),
            Op::LoadSplatBytes(at) => {
                let splat = self.load_splat(Memory::F32, *at);
                Parts::Four([self.cast(types::I8X16, splat); 4])
            }
            Op::LoadScalar(format, at) => Parts::One(self.load_scalar(*format, *at)),
            Op::LoadInt(at) => Parts::One(self.load_one(types::I64, *at)),
            Op::LoadU32(at) => Parts::One(self.load_u32(*at)),
            Op::Store(format, v, at) => self.store(*format, *v, *at),
            Op::StoreStrided(format, v, at, stride) => self.store_strided(*format, *v, *at, *stride),
            Op::StoreScalar(format, v, at) => self.store_scalar(*format, *v, *at),
            Op::Prefetch(_) => Parts::None,
            Op::For(_) => unreachable!("{}: loops are lowered by run_loop", self.function.name),
        }
    }

    /// A 128-bit constant.
    fn constant(&mut self, ty: ClifType, bytes: [u8; 16]) -> ClifValue {
        if let Some(&made) = self.made.constants.get(&(ty, bytes)) {
            return made;
        }
        let constant = self.b.func.dfg.constants.insert(bytes.as_slice().into());
        let made = self.b.ins().vconst(ty, constant);
        self.made.constants.insert((ty, bytes), made);
        made
    }

    /// The same 32 bits in the four lanes of a part.
    fn constant32(&mut self, ty: ClifType, bits: u32) -> ClifValue {
        self.constant(ty, bytes_of([bits.cast_signed(); 4]))
    }

    /// The same bits as another type of the same size.
    fn cast(&mut self, to: ClifType, v: ClifValue) -> ClifValue {
        let flags = MemFlagsData::new().with_endianness(cranelift_codegen::ir::Endianness::Little);
        self.b.ins().bitcast(to, flags, v)
    }
}

fn bytes_of(lanes: [i32; 4]) -> [u8; 16] {
    std::array::from_fn(|i| lanes[i / 4].to_le_bytes()[i % 4])
}

/// The type of a scalar, or of one part of a vector.
fn clif_type(ty: Type) -> ClifType {
    match ty {
        Type::Int => types::I64,
        Type::F32 => types::F32,
        Type::Bool => types::I8,
        Type::VecF32 => types::F32X4,
        Type::VecI32 | Type::Mask => types::I32X4,
        Type::VecI8 => types::I8X16,
    }
}
