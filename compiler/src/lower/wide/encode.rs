//! Encoding: allocated machine functions → bytes, by iced.
//!
//! Fills the allocator's registers into the operands, turns its moves into instructions, adds the frame (only when something is in it), leaves out jumps
//! to what follows anyway, and puts the constants after the code. Registers' sizes are read off the opcodes.
//! Deliberately absent: decisions.

use iced_x86::{
    BlockEncoder, BlockEncoderOptions, Code, Instruction, InstructionBlock, MemoryOperand, OpCodeOperandKind, OpKind,
    Register,
};
use regalloc2::{Allocation, Block, Edit, InstOrEdit, Output, PReg, RegClass};

use super::allocate::{Allocatable, gpr};
use super::machine::{Base, Function, Inst, Mem, Operand};
use super::registers::{immediate, register};
use super::table::Name;

/// Alignment of code and constants in bytes.
pub const ALIGNMENT: u32 = 64;

/// Bytes of a slot of the frame.
const SLOT: i64 = 8;

/// Machine code, and the number of the machine instruction that each encoded instruction comes from.
pub struct Encoded {
    /// Code, then constants.
    pub bytes: Vec<u8>,
    /// Bytes of code.
    pub code_bytes: usize,
    /// For each encoded instruction: its offset, and the machine instruction that it belongs to.
    pub origins: Vec<(u32, usize)>,
}

/// Encodes a function with the registers of `output`.
///
/// # Errors
/// What iced says of an instruction that cannot be encoded, which is a bug in moec.
pub fn encode(allocatable: &Allocatable, output: &Output) -> Result<Encoded, String> {
    let function = allocatable.function();
    let mut encoder = Encoder {
        allocatable,
        function,
        output,
        frame: Frame::new(function, output),
        listing: Vec::new(),
        labels: vec![0; function.blocks.len()],
    };
    encoder.whole()?;
    encoder.bytes()
}

/// What the function keeps on the stack.
struct Frame {
    /// Callee-saved registers that are used.
    saved: Vec<usize>,
    /// Bytes of spill slots.
    bytes: i64,
    /// Whether there is a frame at all.
    exists: bool,
}

impl Frame {
    fn new(function: &Function, output: &Output) -> Frame {
        let mut used = [false; 16];
        let mut note = |a: Allocation| {
            if let Some(reg) = a.as_reg()
                && reg.class() == RegClass::Int
            {
                used[reg.hw_enc()] = true;
            }
        };
        output.allocs.iter().copied().for_each(&mut note);
        for (_, Edit::Move { from, to }) in &output.edits {
            note(*from);
            note(*to);
        }
        let saved: Vec<usize> = gpr::CALLEE_SAVED.into_iter().filter(|&n| used[n]).collect();
        let bytes = (output.num_spillslots as i64 * SLOT + 63) & !63;
        let stack_params = function.insts.iter().any(|i| match i {
            Inst::Machine { operands, .. } => {
                operands.iter().any(|o| matches!(o, Operand::Mem(m) if m.base == Base::StackParams))
            }
            Inst::Entry(_) | Inst::Jump { .. } | Inst::Branch { .. } | Inst::Return => false,
        });
        let exists = !saved.is_empty() || bytes > 0 || stack_params;
        Frame { saved, bytes, exists }
    }
}

struct Encoder<'a> {
    allocatable: &'a Allocatable<'a>,
    function: &'a Function,
    output: &'a Output,
    frame: Frame,
    /// The instructions with the machine instruction each comes from. An instruction's address, until all are placed, is its number plus one.
    listing: Vec<(Instruction, usize)>,
    /// The address of each block's first instruction.
    labels: Vec<u64>,
}

impl Encoder<'_> {
    fn whole(&mut self) -> Result<(), String> {
        self.prologue()?;
        for index in 0..self.function.blocks.len() {
            if self.is_empty(index) {
                continue;
            }
            self.labels[index] = self.next_address();
            let block = Block::new(index);
            let mut at = self.function.blocks[index].insts.start;
            for item in self.output.block_insts_and_edits(self.allocatable, block) {
                match item {
                    InstOrEdit::Inst(inst) => {
                        at = inst.index();
                        self.inst(at, index)?;
                        at += 1;
                    }
                    InstOrEdit::Edit(Edit::Move { from, to }) => self.movement(*from, *to, at)?,
                }
            }
        }
        Ok(())
    }

    fn next_address(&self) -> u64 {
        self.listing.len() as u64 + 1
    }

    fn push(&mut self, mut instruction: Instruction, origin: usize) {
        instruction.set_ip(self.next_address());
        self.listing.push((instruction, origin));
    }

    fn code(&self, name: Name) -> Code {
        name.code(self.function.width)
    }

    // The frame.

    fn prologue(&mut self) -> Result<(), String> {
        if !self.frame.exists {
            return Ok(());
        }
        self.simple(Instruction::with1(self.code(Name::Push), Register::RBP))?;
        self.simple(Instruction::with2(self.code(Name::Store64), Register::RBP, Register::RSP))?;
        for n in self.frame.saved.clone() {
            self.simple(Instruction::with1(self.code(Name::Push), Register::RAX + n as u32))?;
        }
        if self.frame.bytes > 0 {
            let below = MemoryOperand::with_base_displ(Register::RSP, -self.frame.bytes);
            self.simple(Instruction::with2(self.code(Name::Lea), Register::RSP, below))?;
            self.simple(Instruction::with2(self.code(Name::AndImm), Register::RSP, -(ALIGNMENT as i32)))?;
        }
        Ok(())
    }

    fn epilogue(&mut self, origin: usize) -> Result<(), String> {
        let first = self.listing.len();
        if self.frame.exists {
            if self.frame.bytes > 0 {
                let saved = -SLOT * self.frame.saved.len() as i64;
                let below = MemoryOperand::with_base_displ(Register::RBP, saved);
                self.simple(Instruction::with2(self.code(Name::Lea), Register::RSP, below))?;
            }
            for n in self.frame.saved.clone().into_iter().rev() {
                self.simple(Instruction::with1(self.code(Name::Pop), Register::RAX + n as u32))?;
            }
            self.simple(Instruction::with1(self.code(Name::Pop), Register::RBP))?;
        }
        self.simple(Ok(Instruction::with(self.code(Name::ZeroUpper))))?;
        self.simple(Ok(Instruction::with(self.code(Name::Return))))?;
        self.listing[first..].iter_mut().for_each(|(_, from)| *from = origin);
        Ok(())
    }

    fn simple(&mut self, instruction: Result<Instruction, iced_x86::IcedError>) -> Result<(), String> {
        self.push(instruction.map_err(|e| e.to_string())?, 0);
        Ok(())
    }

    /// A slot of the frame.
    fn slot(&self, index: usize) -> MemoryOperand {
        MemoryOperand::with_base_displ(Register::RSP, index as i64 * SLOT)
    }

    // Instructions.

    fn inst(&mut self, at: usize, block: usize) -> Result<(), String> {
        let allocs = self.output.inst_allocs(regalloc2::Inst::new(at));
        match &self.function.insts[at] {
            Inst::Entry(_) => Ok(()),
            Inst::Return => self.epilogue(at),
            Inst::Jump { to, .. } => {
                let to = self.destination(*to);
                if Some(to) != self.after(block) { self.jump(Name::Jump, to, at) } else { Ok(()) }
            }
            Inst::Branch { name, then, otherwise } => {
                let (then, otherwise) = (self.destination(*then), self.destination(*otherwise));
                let after = self.after(block);
                if Some(then) == after {
                    return self.jump(opposite(*name), otherwise, at);
                }
                self.jump(*name, then, at)?;
                if Some(otherwise) == after { Ok(()) } else { self.jump(Name::Jump, otherwise, at) }
            }
            Inst::Machine { name, operands, mask } => {
                let mut allocs = allocs.iter().filter_map(|a| a.as_reg());
                let mut instruction = Instruction::default();
                let code = self.code(*name);
                instruction.set_code(code);
                for (i, operand) in operands.iter().enumerate() {
                    let kind = code.op_code().op_kind(i as u32);
                    self.operand(&mut instruction, i as u32, kind, operand, &mut allocs)?;
                }
                if mask.is_some() {
                    instruction.set_op_mask(register(next(&mut allocs)?, OpCodeOperandKind::k_reg)?);
                }
                self.push(instruction, at);
                Ok(())
            }
        }
    }

    /// Whether a block is nothing but a jump, to which the allocator added no moves.
    fn is_empty(&self, block: usize) -> bool {
        let insts = &self.function.blocks[block].insts;
        let moved = |at: &regalloc2::ProgPoint| insts.contains(&at.inst().index());
        matches!(&self.function.insts[insts.clone()], [Inst::Jump { .. }])
            && !self.output.edits.iter().any(|(at, _)| moved(at))
    }

    /// The block that a jump to `block` ends up in.
    fn destination(&self, block: Block) -> usize {
        match &self.function.insts[self.function.blocks[block.index()].insts.start] {
            Inst::Jump { to, .. } if self.is_empty(block.index()) => self.destination(*to),
            _ => block.index(),
        }
    }

    /// The block that is laid out after `block`.
    fn after(&self, block: usize) -> Option<usize> {
        (block + 1..self.function.blocks.len()).find(|&b| !self.is_empty(b))
    }

    fn jump(&mut self, name: Name, to: usize, origin: usize) -> Result<(), String> {
        // Its address follows when all blocks are placed.
        let instruction = Instruction::with_branch(self.code(name), to as u64).map_err(|e| e.to_string())?;
        self.push(instruction, origin);
        Ok(())
    }

    fn operand(
        &self,
        instruction: &mut Instruction,
        i: u32,
        kind: OpCodeOperandKind,
        operand: &Operand,
        allocs: &mut impl Iterator<Item = PReg>,
    ) -> Result<(), String> {
        let set = |instruction: &mut Instruction, reg: Register| {
            instruction.set_op_kind(i, OpKind::Register);
            instruction.set_op_register(i, reg);
        };
        match operand {
            Operand::Use(_) | Operand::Def(_) => set(instruction, register(next(allocs)?, kind)?),
            Operand::Tied { .. } => {
                let (from, to) = (next(allocs)?, next(allocs)?);
                debug_assert_eq!(from, to, "{}: a tied operand in two registers", self.function.name);
                set(instruction, register(to, kind)?);
            }
            Operand::First => {
                let first = instruction.op_register(0);
                set(instruction, first);
            }
            Operand::Mem(mem) => self.memory(instruction, i, mem, allocs)?,
            Operand::Imm(n) => {
                instruction.set_op_kind(i, immediate(kind)?);
                instruction.try_set_immediate_i64(i, *n).map_err(|e| e.to_string())?;
            }
        }
        Ok(())
    }

    fn memory(
        &self,
        instruction: &mut Instruction,
        i: u32,
        mem: &Mem,
        allocs: &mut impl Iterator<Item = PReg>,
    ) -> Result<(), String> {
        use OpCodeOperandKind::r64_reg;
        instruction.set_op_kind(i, OpKind::Memory);
        let mut displacement = i64::from(mem.offset);
        let mut size = if mem.offset == 0 { 0 } else { 8 };
        match mem.base {
            Base::None => size = 8,
            Base::Reg(_) => {
                let base = register(next(allocs)?, r64_reg)?;
                // These have no form without a displacement.
                if matches!(base, Register::RBP | Register::R13) {
                    size = 8;
                }
                instruction.set_memory_base(base);
            }
            Base::Constant(index) => {
                // The constant's number, until its address is known.
                instruction.set_memory_base(Register::RIP);
                instruction.set_memory_displ_size(8);
                instruction.set_memory_displacement64(constant_label(index, mem.offset));
                instruction.set_is_broadcast(mem.broadcast);
                return Ok(());
            }
            Base::StackParams => {
                // Above the saved frame pointer and the return address.
                instruction.set_memory_base(Register::RBP);
                displacement += 2 * SLOT;
                size = 8;
            }
        }
        if let Some((_, scale)) = mem.index {
            instruction.set_memory_index(register(next(allocs)?, r64_reg)?);
            instruction.set_memory_index_scale(u32::from(scale));
        }
        instruction.set_memory_displ_size(size);
        instruction.set_memory_displacement64(displacement.cast_unsigned());
        instruction.set_is_broadcast(mem.broadcast);
        Ok(())
    }

    /// A move of the allocator.
    fn movement(&mut self, from: Allocation, to: Allocation, origin: usize) -> Result<(), String> {
        let class = from.as_reg().or(to.as_reg()).map(PReg::class).ok_or("a move from memory to memory")?;
        let (load, store) = match class {
            RegClass::Int => (Name::Load64, Name::Store64),
            RegClass::Float => (Name::LoadVector, Name::StoreVector),
            RegClass::Vector => (Name::CopyMask, Name::StoreMask),
        };
        let copy = if class == RegClass::Float { Name::CopyVector } else { load };
        let view = |r: PReg| register(r, self.code(copy).op_code().op_kind(0));
        let instruction = match (from.as_reg(), to.as_reg(), from.as_stack(), to.as_stack()) {
            (Some(from), Some(to), ..) => Instruction::with2(self.code(copy), view(to)?, view(from)?),
            (None, Some(to), Some(slot), _) => Instruction::with2(self.code(load), view(to)?, self.slot(slot.index())),
            (Some(from), None, _, Some(slot)) => {
                Instruction::with2(self.code(store), self.slot(slot.index()), view(from)?)
            }
            _ => return Err(format!("a move from {from} to {to}")),
        };
        self.push(instruction.map_err(|e| e.to_string())?, origin);
        Ok(())
    }

    // Placement.

    /// Resolves jumps and constants, and encodes everything.
    fn bytes(mut self) -> Result<Encoded, String> {
        let code = self.listing.len();
        let mut constants = vec![0; self.function.constants.len()];
        // The first address that no instruction has is that of the first constant.
        let mut data = Vec::new();
        // Large ones first, so that all are aligned to their size.
        let mut order: Vec<usize> = (0..constants.len()).collect();
        order.sort_by_key(|&i| std::cmp::Reverse(self.function.constants[i].len()));
        for i in order {
            constants[i] = (code + 1 + data.len()) as u64;
            data.extend(self.function.constants[i].chunks(4).map(|c| c.to_vec()));
        }
        self.resolve(&constants);
        // Once to learn how long the code is; then with the constants where they are aligned.
        let length = if data.is_empty() { 0 } else { self.place(code, &[], &data)?.1 };
        let padding = vec![vec![0xcc]; length.next_multiple_of(ALIGNMENT as usize) - length];
        let (bytes, code_bytes, offsets) = self.place(code, &padding, &data)?;
        let origins = offsets[..code].iter().copied().zip(self.listing.iter().map(|(_, origin)| *origin)).collect();
        Ok(Encoded { bytes, code_bytes, origins })
    }

    /// Gives jumps and constants the addresses of what they mean.
    fn resolve(&mut self, constants: &[u64]) {
        for (instruction, _) in &mut self.listing {
            if instruction.op0_kind() == OpKind::NearBranch64 {
                instruction.set_near_branch64(self.labels[instruction.near_branch64() as usize]);
            } else if instruction.memory_base() == Register::RIP {
                let (index, offset) = constant_of(instruction.memory_displacement64());
                let at = constants[index] + offset / 4;
                instruction.set_memory_displacement64(at);
            }
        }
    }

    /// Encodes the listing, `padding` and `data`, one after another; also gives the length of the code and the instructions' offsets.
    #[allow(clippy::type_complexity)]
    fn place(&self, code: usize, padding: &[Vec<u8>], data: &[Vec<u8>]) -> Result<(Vec<u8>, usize, Vec<u32>), String> {
        let mut all: Vec<Instruction> = self.listing.iter().map(|(i, _)| *i).collect();
        let mut declare = |bytes: &[u8], address: u64| -> Result<(), String> {
            let mut instruction = Instruction::with_declare_byte(bytes).map_err(|e| e.to_string())?;
            instruction.set_ip(address);
            all.push(instruction);
            Ok(())
        };
        for (i, bytes) in padding.iter().enumerate() {
            // Addresses that nothing refers to.
            declare(bytes, (1 << 32) + i as u64)?;
        }
        for (i, bytes) in data.iter().enumerate() {
            declare(bytes, (code + 1 + i) as u64)?;
        }
        let block = InstructionBlock::new(&all, 0);
        let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
        let result = BlockEncoder::encode(64, block, options).map_err(|e| e.to_string())?;
        let offsets = result.new_instruction_offsets;
        let code_bytes = offsets.get(code).map_or(result.code_buffer.len(), |&o| o as usize);
        Ok((result.code_buffer, code_bytes, offsets))
    }
}

fn next(allocs: &mut impl Iterator<Item = PReg>) -> Result<PReg, String> {
    allocs.next().ok_or_else(|| "an operand without a register".to_string())
}

fn constant_label(index: usize, offset: i32) -> u64 {
    (index as u64) << 32 | u64::from(offset.cast_unsigned())
}

fn constant_of(label: u64) -> (usize, u64) {
    ((label >> 32) as usize, label & u64::from(u32::MAX))
}

fn opposite(name: Name) -> Name {
    match name {
        Name::JumpIfLess => Name::JumpIfGreaterOrEqual,
        Name::JumpIfGreaterOrEqual => Name::JumpIfLess,
        other => unreachable!("{other:?} is not a conditional jump"),
    }
}
