//! Machine functions: the instructions of one kernel over virtual registers, in basic blocks.
//!
//! The form between instruction selection and register allocation. An [`Inst`] is one machine instruction with explicit operands
//! (each virtual register says whether it is read, written, or both), or one of the few control instructions. Values pass from block to
//! block as block parameters, given by [`Inst::Jump`] only: an edge from a block with several successors to one with several
//! predecessors has a block of its own, as the allocator wants it. Deliberately absent: physical registers and the frame.

use super::table::{Name, Width};
use regalloc2::{Block, RegClass, VReg};

/// General registers: integers and addresses.
pub const INT: RegClass = RegClass::Int;
/// `xmm`, `ymm` and `zmm`.
pub const VECTOR: RegClass = RegClass::Float;
/// AVX-512 mask registers (the allocator's third class).
pub const MASK: RegClass = RegClass::Vector;

/// What a memory operand's address starts from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Base {
    /// Nothing.
    None,
    /// A register.
    Reg(VReg),
    /// A constant of the pool, by its index.
    Constant(usize),
    /// The caller's frame: the first parameter that was passed in memory.
    StackParams,
}

/// `[base + index × scale + offset]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mem {
    /// The base.
    pub base: Base,
    /// The index and its scale: 1, 2, 4 or 8.
    pub index: Option<(VReg, u8)>,
    /// Bytes added.
    pub offset: i32,
    /// Whether the instruction spreads one element to all lanes (AVX-512).
    pub broadcast: bool,
}

impl Mem {
    /// The address in a register, plus `offset`.
    pub fn at(base: VReg, offset: i32) -> Mem {
        Mem { base: Base::Reg(base), index: None, offset, broadcast: false }
    }

    /// A constant of the pool.
    pub fn constant(index: usize) -> Mem {
        Mem { base: Base::Constant(index), index: None, offset: 0, broadcast: false }
    }

    /// `bytes` further on.
    pub fn plus(self, bytes: i32) -> Mem {
        Mem { offset: self.offset + bytes, ..self }
    }
}

/// An operand of a machine instruction, in the order of the opcode's operands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operand {
    /// A register that is read.
    Use(VReg),
    /// A register that is written.
    Def(VReg),
    /// A register that is read as one value and written as another.
    Tied {
        /// The value read.
        from: VReg,
        /// The value written.
        to: VReg,
    },
    /// The register of the first operand once more: what is read does not matter.
    First,
    /// Memory.
    Mem(Mem),
    /// A constant.
    Imm(i64),
}

/// One instruction.
#[derive(Clone, PartialEq, Debug)]
pub enum Inst {
    /// The parameters arrive in registers: nothing is done.
    Entry(Vec<VReg>),
    /// A machine instruction, with an AVX-512 mask for what it writes if any.
    Machine {
        /// Which.
        name: Name,
        /// Its operands.
        operands: Vec<Operand>,
        /// The lanes that take the second source.
        mask: Option<VReg>,
    },
    /// The end of a block with one successor.
    Jump {
        /// The successor.
        to: Block,
        /// Its parameters' values.
        arguments: Vec<VReg>,
    },
    /// The end of a block with two successors, after a comparison.
    Branch {
        /// The conditional jump.
        name: Name,
        /// Where it jumps.
        then: Block,
        /// Where it does not.
        otherwise: Block,
    },
    /// The end of the function.
    Return,
}

/// A basic block.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct BlockData {
    /// Defined at its start.
    pub params: Vec<VReg>,
    /// Its instructions: a range of the function's.
    pub insts: std::ops::Range<usize>,
    /// Blocks after it.
    pub successors: Vec<Block>,
    /// Blocks before it.
    pub predecessors: Vec<Block>,
}

/// A kernel in machine instructions.
#[derive(Clone, PartialEq, Debug)]
pub struct Function {
    /// For people.
    pub name: String,
    /// What holds a logical vector.
    pub width: Width,
    /// The blocks in the order in which they are laid out; the entry first.
    pub blocks: Vec<BlockData>,
    /// All instructions, block by block.
    pub insts: Vec<Inst>,
    /// Number of virtual registers.
    pub vregs: usize,
    /// The constants that instructions read.
    pub constants: Vec<Vec<u8>>,
}

/// Appends instructions to a [`Function`], block after block.
#[derive(Debug)]
pub struct Builder {
    function: Function,
    /// Each block's instructions, until the end.
    bodies: Vec<Vec<Inst>>,
    /// The blocks in the order of their first instruction.
    order: Vec<Block>,
    current: Block,
}

impl Builder {
    /// A function with an entry block, which is current.
    pub fn new(name: String, width: Width) -> Builder {
        let function = Function { name, width, blocks: Vec::new(), insts: Vec::new(), vregs: 0, constants: Vec::new() };
        let mut builder = Builder { function, bodies: Vec::new(), order: Vec::new(), current: Block::new(0) };
        let entry = builder.block();
        builder.enter(entry);
        builder
    }

    /// A new virtual register.
    pub fn vreg(&mut self, class: RegClass) -> VReg {
        self.function.vregs += 1;
        VReg::new(self.function.vregs - 1, class)
    }

    /// A new block, entered later.
    pub fn block(&mut self) -> Block {
        self.function.blocks.push(BlockData::default());
        self.bodies.push(Vec::new());
        Block::new(self.bodies.len() - 1)
    }

    /// Adds a parameter to a block.
    pub fn param(&mut self, block: Block, class: RegClass) -> VReg {
        let v = self.vreg(class);
        self.function.blocks[block.index()].params.push(v);
        v
    }

    /// Makes a block the current one; each is entered once.
    pub fn enter(&mut self, block: Block) {
        debug_assert!(!self.order.contains(&block), "{}: {block:?} is entered twice", self.function.name);
        self.order.push(block);
        self.current = block;
    }

    /// Number of instructions so far.
    pub fn count(&self) -> usize {
        self.bodies.iter().map(Vec::len).sum()
    }

    /// Appends an instruction to the current block.
    pub fn push(&mut self, inst: Inst) {
        let from = self.current;
        let mut edge = |to: Block| {
            self.function.blocks[from.index()].successors.push(to);
            self.function.blocks[to.index()].predecessors.push(from);
        };
        match &inst {
            Inst::Jump { to, .. } => edge(*to),
            Inst::Branch { then, otherwise, .. } => {
                edge(*then);
                edge(*otherwise);
            }
            Inst::Entry(_) | Inst::Machine { .. } | Inst::Return => {}
        }
        self.bodies[from.index()].push(inst);
    }

    /// The index of a constant in the pool; equal ones are one.
    pub fn constant(&mut self, bytes: &[u8]) -> usize {
        let constants = &mut self.function.constants;
        constants.iter().position(|c| c == bytes).unwrap_or_else(|| {
            constants.push(bytes.to_vec());
            constants.len() - 1
        })
    }

    /// The finished function, its blocks numbered in the order in which they were entered.
    pub fn finish(self) -> Function {
        let Builder { mut function, mut bodies, order, .. } = self;
        let mut number = vec![Block::invalid(); order.len()];
        for (new, old) in order.iter().enumerate() {
            number[old.index()] = Block::new(new);
        }
        let renumber = |b: &mut Block| *b = number[b.index()];
        let mut blocks = Vec::with_capacity(order.len());
        for old in &order {
            let mut block = std::mem::take(&mut function.blocks[old.index()]);
            block.successors.iter_mut().chain(&mut block.predecessors).for_each(renumber);
            let first = function.insts.len();
            function.insts.append(&mut bodies[old.index()]);
            block.insts = first..function.insts.len();
            blocks.push(block);
        }
        for inst in &mut function.insts {
            match inst {
                Inst::Jump { to, .. } => renumber(to),
                Inst::Branch { then, otherwise, .. } => {
                    renumber(then);
                    renumber(otherwise);
                }
                Inst::Entry(_) | Inst::Machine { .. } | Inst::Return => {}
            }
        }
        function.blocks = blocks;
        function
    }
}
