//! Physical registers and immediates in iced's terms: which one an allocated register is depends on the operand of the opcode.
//!
//! Deliberately absent: which registers may be used ([`super::allocate`]).

use iced_x86::{OpCodeOperandKind, OpKind, Register};
use regalloc2::PReg;

/// The register `reg` as an operand of this kind sees it.
pub fn register(reg: PReg, kind: OpCodeOperandKind) -> Result<Register, String> {
    use OpCodeOperandKind as K;
    let n = reg.hw_enc() as u32;
    Ok(match kind {
        // AH to BH lie between BL and SPL.
        K::r8_or_mem | K::r8_reg if n >= 4 => Register::AL + n + 4,
        K::r8_or_mem | K::r8_reg => Register::AL + n,
        K::r16_or_mem | K::r16_reg => Register::AX + n,
        K::r32_or_mem | K::r32_reg | K::r32_reg_mem | K::r32_rm | K::r32_opcode => Register::EAX + n,
        K::r64_or_mem | K::r64_reg | K::r64_rm | K::r64_opcode => Register::RAX + n,
        K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => Register::XMM0 + n,
        K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => Register::YMM0 + n,
        K::zmm_or_mem | K::zmm_reg | K::zmm_rm | K::zmm_vvvv => Register::ZMM0 + n,
        K::k_or_mem | K::k_reg | K::k_rm | K::k_vvvv => Register::K0 + n,
        other => return Err(format!("an operand of kind {other:?} is no register")),
    })
}

/// How a constant operand of this kind is encoded.
pub fn immediate(kind: OpCodeOperandKind) -> Result<OpKind, String> {
    use OpCodeOperandKind as K;
    Ok(match kind {
        K::imm8 => OpKind::Immediate8,
        K::imm8sex32 => OpKind::Immediate8to32,
        K::imm8sex64 => OpKind::Immediate8to64,
        K::imm32 => OpKind::Immediate32,
        K::imm32sex64 => OpKind::Immediate32to64,
        K::imm64 => OpKind::Immediate64,
        other => return Err(format!("an operand of kind {other:?} is no constant")),
    })
}
