//! Register allocation: regalloc2, Cranelift's allocator, over our machine functions.
//!
//! Here is what the allocator asks of a function and a machine: blocks, operands with constraints, and which registers there are. Deliberately
//! absent: the allocation itself, and what its moves become ([`super::encode`]).

use regalloc2::{
    Block, Inst as InstId, InstRange, MachineEnv, Operand as Constraint, Output, PReg, PRegSet, RegClass,
    RegallocOptions, VReg,
};

use super::machine::{Base, Function, INT, Inst, MASK, Operand, VECTOR};
use super::table::Width;

/// Numbers of general registers as the encoding has them.
pub mod gpr {
    /// The stack pointer.
    pub const RSP: usize = 4;
    /// The frame pointer.
    pub const RBP: usize = 5;
    /// Registers of the first parameters, in order (System V).
    pub const PARAMS: [usize; 6] = [7, 6, 2, 1, 8, 9];
    /// What a function must give back as it got it, without the frame pointer (System V).
    pub const CALLEE_SAVED: [usize; 5] = [3, 12, 13, 14, 15];
}

/// A function with the constraints of its operands.
pub struct Allocatable<'a> {
    function: &'a Function,
    operands: Vec<Constraint>,
    /// Where each instruction's operands begin; one more than there are instructions.
    starts: Vec<usize>,
}

impl<'a> Allocatable<'a> {
    /// Lists the operands.
    pub fn new(function: &'a Function) -> Allocatable<'a> {
        let mut operands = Vec::new();
        let mut starts = vec![0];
        for inst in &function.insts {
            constrain(inst, &mut operands);
            starts.push(operands.len());
        }
        Allocatable { function, operands, starts }
    }

    /// The function.
    pub fn function(&self) -> &'a Function {
        self.function
    }

    /// Finds a register for every operand.
    ///
    /// # Errors
    /// What the allocator says: more is needed in registers at one place than there is.
    pub fn allocate(&self) -> Result<Output, String> {
        let options = RegallocOptions { validate_ssa: cfg!(debug_assertions), ..RegallocOptions::default() };
        regalloc2::run(self, &environment(self.function.width), &options).map_err(|e| e.to_string())
    }

    /// Proves that an allocation gives every operand the value that it asks for.
    ///
    /// # Errors
    /// Where it does not, which is a bug of the allocator or of the constraints.
    pub fn check(&self, output: &Output) -> Result<(), String> {
        let environment = environment(self.function.width);
        let mut checker = regalloc2::checker::Checker::new(self, &environment);
        checker.prepare(output);
        checker.run().map_err(|errors| format!("{errors:?}"))
    }
}

/// The operands of an instruction in a fixed order: those of the machine instruction (for memory base, then index), then the mask.
fn constrain(inst: &Inst, list: &mut Vec<Constraint>) {
    match inst {
        Inst::Entry(params) => {
            for (&v, n) in params.iter().zip(gpr::PARAMS) {
                list.push(Constraint::reg_fixed_def(v, PReg::new(n, INT)));
            }
        }
        Inst::Machine { operands, mask, .. } => {
            let first = list.len();
            for operand in operands {
                match operand {
                    Operand::Use(v) => list.push(Constraint::reg_use(*v)),
                    Operand::Def(v) => list.push(Constraint::reg_def(*v)),
                    Operand::Tied { from, to } => {
                        list.push(Constraint::reg_use(*from));
                        list.push(Constraint::reg_reuse_def(*to, list.len() - 1 - first));
                    }
                    Operand::Mem(mem) => {
                        if let Base::Reg(v) = mem.base {
                            list.push(Constraint::reg_use(v));
                        }
                        if let Some((v, _)) = mem.index {
                            list.push(Constraint::reg_use(v));
                        }
                    }
                    Operand::First | Operand::Imm(_) => {}
                }
            }
            list.extend(mask.map(Constraint::reg_use));
        }
        Inst::Jump { .. } | Inst::Branch { .. } | Inst::Return => {}
    }
}

/// The registers that may be used. Those that a callee must keep come last.
fn environment(width: Width) -> MachineEnv {
    let mut int = PRegSet::empty();
    let mut kept = PRegSet::empty();
    for n in (0..16).filter(|&n| n != gpr::RSP && n != gpr::RBP) {
        if gpr::CALLEE_SAVED.contains(&n) { kept.add(PReg::new(n, INT)) } else { int.add(PReg::new(n, INT)) }
    }
    let vectors = match width {
        Width::Ymm => 16,
        Width::Zmm => 32,
    };
    let mut vector = PRegSet::empty();
    (0..vectors).for_each(|n| vector.add(PReg::new(n, VECTOR)));
    let mut mask = PRegSet::empty();
    // Mask register 0 means no mask.
    (1..8).for_each(|n| mask.add(PReg::new(n, MASK)));
    MachineEnv {
        preferred_regs_by_class: [int, vector, mask],
        non_preferred_regs_by_class: [kept, PRegSet::empty(), PRegSet::empty()],
        scratch_by_class: [None; 3],
        fixed_stack_slots: Vec::new(),
    }
}

impl regalloc2::Function for Allocatable<'_> {
    fn num_insts(&self) -> usize {
        self.function.insts.len()
    }

    fn num_blocks(&self) -> usize {
        self.function.blocks.len()
    }

    fn entry_block(&self) -> Block {
        Block::new(0)
    }

    fn block_insns(&self, block: Block) -> InstRange {
        let range = &self.function.blocks[block.index()].insts;
        InstRange::new(InstId::new(range.start), InstId::new(range.end))
    }

    fn block_succs(&self, block: Block) -> &[Block] {
        &self.function.blocks[block.index()].successors
    }

    fn block_preds(&self, block: Block) -> &[Block] {
        &self.function.blocks[block.index()].predecessors
    }

    fn block_params(&self, block: Block) -> &[VReg] {
        &self.function.blocks[block.index()].params
    }

    fn is_ret(&self, inst: InstId) -> bool {
        matches!(self.function.insts[inst.index()], Inst::Return)
    }

    fn is_branch(&self, inst: InstId) -> bool {
        matches!(self.function.insts[inst.index()], Inst::Jump { .. } | Inst::Branch { .. })
    }

    fn branch_blockparams(&self, _block: Block, inst: InstId, _successor: usize) -> &[VReg] {
        match &self.function.insts[inst.index()] {
            Inst::Jump { arguments, .. } => arguments,
            Inst::Entry(_) | Inst::Machine { .. } | Inst::Branch { .. } | Inst::Return => &[],
        }
    }

    fn inst_operands(&self, inst: InstId) -> &[Constraint] {
        &self.operands[self.starts[inst.index()]..self.starts[inst.index() + 1]]
    }

    fn inst_clobbers(&self, _inst: InstId) -> PRegSet {
        PRegSet::empty()
    }

    fn num_vregs(&self) -> usize {
        self.function.vregs
    }

    fn spillslot_size(&self, class: RegClass) -> usize {
        match (class, self.function.width) {
            (RegClass::Float, Width::Ymm) => 4,
            (RegClass::Float, Width::Zmm) => 8,
            (RegClass::Int | RegClass::Vector, _) => 1,
        }
    }
}
