//! The instruction table: every machine instruction that the back end uses, in the form that each vector width has.
//!
//! The columns are iced's opcodes, whose names say encoding and operands. An instruction whose operands are whole vectors has
//! `ymm` operands in the first column and `zmm` operands in the second; one that works on a scalar in a vector register is
//! encoded by VEX and EVEX, which alone reaches registers 16 to 31. Operand sizes are the opcode's ([`super::encode`] asks for them), so
//! they are stated nowhere else. Deliberately absent: which instructions compute an operation ([`super::select`]).

use iced_x86::Code;

/// The registers that hold a logical vector of 16 lanes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Width {
    /// Two `ymm` registers.
    Ymm,
    /// One `zmm` register.
    Zmm,
}

macro_rules! instructions {
    ($($name:ident = $ymm:tt | $zmm:tt;)*) => {
        /// A machine instruction.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum Name {
            $(#[allow(missing_docs)] $name,)*
        }

        impl Name {
            /// The opcode where logical vectors have this width.
            ///
            /// # Panics
            /// When there is none: the instruction belongs to the other width.
            pub fn code(self, width: Width) -> Code {
                let code = match (self, width) {
                    $((Name::$name, Width::Ymm) => instructions!(@code $ymm),
                      (Name::$name, Width::Zmm) => instructions!(@code $zmm),)*
                };
                code.unwrap_or_else(|| panic!("{self:?} does not exist with vectors in {width:?}"))
            }
        }
    };
    (@code -) => { None };
    (@code $code:ident) => { Some(Code::$code) };
}

instructions! {
    // Floats, whole vectors.
    AddPs = VEX_Vaddps_ymm_ymm_ymmm256 | EVEX_Vaddps_zmm_k1z_zmm_zmmm512b32_er;
    SubPs = VEX_Vsubps_ymm_ymm_ymmm256 | EVEX_Vsubps_zmm_k1z_zmm_zmmm512b32_er;
    MulPs = VEX_Vmulps_ymm_ymm_ymmm256 | EVEX_Vmulps_zmm_k1z_zmm_zmmm512b32_er;
    DivPs = VEX_Vdivps_ymm_ymm_ymmm256 | EVEX_Vdivps_zmm_k1z_zmm_zmmm512b32_er;
    MinPs = VEX_Vminps_ymm_ymm_ymmm256 | EVEX_Vminps_zmm_k1z_zmm_zmmm512b32_sae;
    MaxPs = VEX_Vmaxps_ymm_ymm_ymmm256 | EVEX_Vmaxps_zmm_k1z_zmm_zmmm512b32_sae;
    SqrtPs = VEX_Vsqrtps_ymm_ymmm256 | EVEX_Vsqrtps_zmm_k1z_zmmm512b32_er;
    RoundPs = VEX_Vroundps_ymm_ymmm256_imm8 | EVEX_Vrndscaleps_zmm_k1z_zmmm512b32_imm8_sae;
    Fma213Ps = VEX_Vfmadd213ps_ymm_ymm_ymmm256 | EVEX_Vfmadd213ps_zmm_k1z_zmm_zmmm512b32_er;
    Fma231Ps = VEX_Vfmadd231ps_ymm_ymm_ymmm256 | EVEX_Vfmadd231ps_zmm_k1z_zmm_zmmm512b32_er;
    ComparePs = VEX_Vcmpps_ymm_ymm_ymmm256_imm8 | -;
    ComparePsMask = - | EVEX_Vcmpps_kr_k1_zmm_zmmm512b32_imm8_sae;
    IntToFloat = VEX_Vcvtdq2ps_ymm_ymmm256 | EVEX_Vcvtdq2ps_zmm_k1z_zmmm512b32_er;
    FloatToInt = VEX_Vcvtps2dq_ymm_ymmm256 | EVEX_Vcvtps2dq_zmm_k1z_zmmm512b32_er;

    // Integers and bits, whole vectors.
    AddW = VEX_Vpaddw_ymm_ymm_ymmm256 | EVEX_Vpaddw_zmm_k1z_zmm_zmmm512;
    AddD = VEX_Vpaddd_ymm_ymm_ymmm256 | EVEX_Vpaddd_zmm_k1z_zmm_zmmm512b32;
    SubD = VEX_Vpsubd_ymm_ymm_ymmm256 | EVEX_Vpsubd_zmm_k1z_zmm_zmmm512b32;
    MulD = VEX_Vpmulld_ymm_ymm_ymmm256 | EVEX_Vpmulld_zmm_k1z_zmm_zmmm512b32;
    And = VEX_Vpand_ymm_ymm_ymmm256 | EVEX_Vpandd_zmm_k1z_zmm_zmmm512b32;
    Or = VEX_Vpor_ymm_ymm_ymmm256 | EVEX_Vpord_zmm_k1z_zmm_zmmm512b32;
    Xor = VEX_Vpxor_ymm_ymm_ymmm256 | EVEX_Vpxord_zmm_k1z_zmm_zmmm512b32;
    ShiftLeftD = VEX_Vpslld_ymm_ymm_imm8 | EVEX_Vpslld_zmm_k1z_zmmm512b32_imm8;
    ShiftRightD = VEX_Vpsrld_ymm_ymm_imm8 | EVEX_Vpsrld_zmm_k1z_zmmm512b32_imm8;
    ShiftRightSignedD = VEX_Vpsrad_ymm_ymm_imm8 | EVEX_Vpsrad_zmm_k1z_zmmm512b32_imm8;
    ShiftLeftW = VEX_Vpsllw_ymm_ymm_imm8 | EVEX_Vpsllw_zmm_k1z_zmmm512_imm8;
    ShiftRightW = VEX_Vpsrlw_ymm_ymm_imm8 | EVEX_Vpsrlw_zmm_k1z_zmmm512_imm8;
    ShiftRightSignedW = VEX_Vpsraw_ymm_ymm_imm8 | EVEX_Vpsraw_zmm_k1z_zmmm512_imm8;
    CompareGreaterD = VEX_Vpcmpgtd_ymm_ymm_ymmm256 | -;
    CompareEqualD = VEX_Vpcmpeqd_ymm_ymm_ymmm256 | -;
    CompareDMask = - | EVEX_Vpcmpd_kr_k1_zmm_zmmm512b32_imm8;
    DotBytes = VEX_Vpdpbusd_ymm_ymm_ymmm256 | EVEX_Vpdpbusd_zmm_k1z_zmm_zmmm512b32;
    AbsBytes = VEX_Vpabsb_ymm_ymmm256 | -;
    SignBytes = VEX_Vpsignb_ymm_ymm_ymmm256 | -;
    MultiplyAddBytes = VEX_Vpmaddubsw_ymm_ymm_ymmm256 | EVEX_Vpmaddubsw_zmm_k1z_zmm_zmmm512;
    MultiplyAddPairs = VEX_Vpmaddwd_ymm_ymm_ymmm256 | EVEX_Vpmaddwd_zmm_k1z_zmm_zmmm512;
    ShuffleBytes = VEX_Vpshufb_ymm_ymm_ymmm256 | EVEX_Vpshufb_zmm_k1z_zmm_zmmm512;
    PermuteBytes = - | EVEX_Vpermb_zmm_k1z_zmm_zmmm512;
    Blend = VEX_Vblendvps_ymm_ymm_ymmm256_ymm | -;
    BlendMask = - | EVEX_Vblendmps_zmm_k1z_zmm_zmmm512b32;

    // Loads, stores and broadcasts of whole vectors.
    LoadVector = VEX_Vmovups_ymm_ymmm256 | EVEX_Vmovups_zmm_k1z_zmmm512;
    StoreVector = VEX_Vmovups_ymmm256_ymm | EVEX_Vmovups_zmmm512_k1z_zmm;
    CopyVector = VEX_Vmovaps_ymm_ymmm256 | EVEX_Vmovaps_zmm_k1z_zmmm512;
    Broadcast = VEX_Vpbroadcastd_ymm_xmmm32 | EVEX_Vpbroadcastd_zmm_k1z_xmmm32;
    BroadcastInt = - | EVEX_Vpbroadcastd_zmm_k1z_r32;
    Broadcast16Bytes = VEX_Vbroadcasti128_ymm_m128 | EVEX_Vbroadcasti32x4_zmm_k1z_m128;
    WidenWords = VEX_Vpmovzxwd_ymm_xmmm128 | EVEX_Vpmovzxwd_zmm_k1z_ymmm256;
    WidenBytesSigned = VEX_Vpmovsxbd_ymm_xmmm64 | EVEX_Vpmovsxbd_zmm_k1z_xmmm128;
    WidenHalf = VEX_Vcvtph2ps_ymm_xmmm128 | EVEX_Vcvtph2ps_zmm_k1z_ymmm256_sae;
    NarrowHalf = VEX_Vcvtps2ph_xmmm128_ymm_imm8 | EVEX_Vcvtps2ph_ymmm256_k1z_zmm_imm8_sae;
    NarrowToBytes = - | EVEX_Vpmovdb_xmmm128_k1z_zmm;

    // Parts of vectors.
    ExtractHalf = - | EVEX_Vextractf64x4_ymmm256_k1z_zmm_imm8;
    Extract128 = VEX_Vextractf128_xmmm128_ymm_imm8 | EVEX_Vextractf32x4_xmmm128_k1z_zmm_imm8;
    AddPsYmm = VEX_Vaddps_ymm_ymm_ymmm256 | EVEX_Vaddps_ymm_k1z_ymm_ymmm256b32;
    AddDYmm = VEX_Vpaddd_ymm_ymm_ymmm256 | EVEX_Vpaddd_ymm_k1z_ymm_ymmm256b32;
    MaxPsYmm = VEX_Vmaxps_ymm_ymm_ymmm256 | EVEX_Vmaxps_ymm_k1z_ymm_ymmm256b32;
    Extract128Ymm = VEX_Vextractf128_xmmm128_ymm_imm8 | EVEX_Vextractf32x4_xmmm128_k1z_ymm_imm8;
    AddPsXmm = VEX_Vaddps_xmm_xmm_xmmm128 | EVEX_Vaddps_xmm_k1z_xmm_xmmm128b32;
    AddDXmm = VEX_Vpaddd_xmm_xmm_xmmm128 | EVEX_Vpaddd_xmm_k1z_xmm_xmmm128b32;
    MaxPsXmm = VEX_Vmaxps_xmm_xmm_xmmm128 | EVEX_Vmaxps_xmm_k1z_xmm_xmmm128b32;
    ShuffleDXmm = VEX_Vpshufd_xmm_xmmm128_imm8 | EVEX_Vpshufd_xmm_k1z_xmmm128b32_imm8;
    ShuffleBytesXmm = VEX_Vpshufb_xmm_xmm_xmmm128 | EVEX_Vpshufb_xmm_k1z_xmm_xmmm128;
    ExtractWord = VEX_Vpextrw_r32m16_xmm_imm8 | EVEX_Vpextrw_r32m16_xmm_imm8;
    ExtractLane = VEX_Vextractps_rm32_xmm_imm8 | EVEX_Vextractps_rm32_xmm_imm8;

    // Floats, one in the low lane of a vector register.
    AddSs = VEX_Vaddss_xmm_xmm_xmmm32 | EVEX_Vaddss_xmm_k1z_xmm_xmmm32_er;
    SubSs = VEX_Vsubss_xmm_xmm_xmmm32 | EVEX_Vsubss_xmm_k1z_xmm_xmmm32_er;
    MulSs = VEX_Vmulss_xmm_xmm_xmmm32 | EVEX_Vmulss_xmm_k1z_xmm_xmmm32_er;
    DivSs = VEX_Vdivss_xmm_xmm_xmmm32 | EVEX_Vdivss_xmm_k1z_xmm_xmmm32_er;
    MinSs = VEX_Vminss_xmm_xmm_xmmm32 | EVEX_Vminss_xmm_k1z_xmm_xmmm32_sae;
    MaxSs = VEX_Vmaxss_xmm_xmm_xmmm32 | EVEX_Vmaxss_xmm_k1z_xmm_xmmm32_sae;
    SqrtSs = VEX_Vsqrtss_xmm_xmm_xmmm32 | EVEX_Vsqrtss_xmm_k1z_xmm_xmmm32_er;
    RoundSs = VEX_Vroundss_xmm_xmm_xmmm32_imm8 | EVEX_Vrndscaless_xmm_k1z_xmm_xmmm32_imm8_sae;
    Fma213Ss = VEX_Vfmadd213ss_xmm_xmm_xmmm32 | EVEX_Vfmadd213ss_xmm_k1z_xmm_xmmm32_er;
    Fma231Ss = VEX_Vfmadd231ss_xmm_xmm_xmmm32 | EVEX_Vfmadd231ss_xmm_k1z_xmm_xmmm32_er;
    CompareSs = VEX_Vcmpss_xmm_xmm_xmmm32_imm8 | -;
    CompareSsMask = - | EVEX_Vcmpss_kr_k1_xmm_xmmm32_imm8_sae;
    BlendXmm = VEX_Vblendvps_xmm_xmm_xmmm128_xmm | -;
    BlendMaskXmm = - | EVEX_Vblendmps_xmm_k1z_xmm_xmmm128b32;
    AndXmm = VEX_Vpand_xmm_xmm_xmmm128 | EVEX_Vpandd_xmm_k1z_xmm_xmmm128b32;
    LoadFloat = VEX_Vmovss_xmm_m32 | EVEX_Vmovss_xmm_k1z_m32;
    StoreFloat = VEX_Vmovss_m32_xmm | EVEX_Vmovss_m32_k1_xmm;
    WidenHalfXmm = VEX_Vcvtph2ps_xmm_xmmm64 | EVEX_Vcvtph2ps_xmm_k1z_xmmm64;
    NarrowHalfXmm = VEX_Vcvtps2ph_xmmm64_xmm_imm8 | EVEX_Vcvtps2ph_xmmm64_k1z_xmm_imm8;
    IntToXmm = VEX_Vmovd_xmm_rm32 | EVEX_Vmovd_xmm_rm32;
    XmmToInt = VEX_Vmovd_rm32_xmm | EVEX_Vmovd_rm32_xmm;

    // Masks.
    IntToMask = - | VEX_Kmovd_kr_r32;
    MaskToInt = - | VEX_Kmovd_r32_kr;
    CopyMask = - | VEX_Kmovq_kr_km64;
    StoreMask = - | VEX_Kmovq_m64_kr;

    // General registers.
    Lea = Lea_r64_m | Lea_r64_m;
    Add = Add_r64_rm64 | Add_r64_rm64;
    Sub = Sub_r64_rm64 | Sub_r64_rm64;
    Mul = Imul_r64_rm64 | Imul_r64_rm64;
    MulImm = Imul_r64_rm64_imm32 | Imul_r64_rm64_imm32;
    AndInt = And_r64_rm64 | And_r64_rm64;
    AndImm = And_rm64_imm32 | And_rm64_imm32;
    AndImm32 = And_rm32_imm8 | And_rm32_imm8;
    OrInt = Or_r64_rm64 | Or_r64_rm64;
    OrImm = Or_rm64_imm32 | Or_rm64_imm32;
    XorInt = Xor_r64_rm64 | Xor_r64_rm64;
    XorImm = Xor_rm64_imm32 | Xor_rm64_imm32;
    ShiftLeftInt = Shl_rm64_imm8 | Shl_rm64_imm8;
    ShiftRightInt = Shr_rm64_imm8 | Shr_rm64_imm8;
    ShiftRightSignedInt = Sar_rm64_imm8 | Sar_rm64_imm8;
    Negate = Neg_rm64 | Neg_rm64;
    CompareInt = Cmp_r64_rm64 | Cmp_r64_rm64;
    CompareImm = Cmp_rm64_imm32 | Cmp_rm64_imm32;
    TestInt = Test_rm64_r64 | Test_rm64_r64;
    MoveIfLess = Cmovl_r64_rm64 | Cmovl_r64_rm64;
    MoveIfGreater = Cmovg_r64_rm64 | Cmovg_r64_rm64;
    MoveIfNotZero = Cmovne_r64_rm64 | Cmovne_r64_rm64;
    SetIfEqual = Sete_rm8 | Sete_rm8;
    SetIfLess = Setl_rm8 | Setl_rm8;
    SetIfLessOrEqual = Setle_rm8 | Setle_rm8;
    SetIfGreater = Setg_rm8 | Setg_rm8;
    SetIfGreaterOrEqual = Setge_rm8 | Setge_rm8;
    WidenByteInt = Movzx_r32_rm8 | Movzx_r32_rm8;
    MoveImm32 = Mov_r32_imm32 | Mov_r32_imm32;
    MoveImm = Mov_rm64_imm32 | Mov_rm64_imm32;
    MoveImm64 = Mov_r64_imm64 | Mov_r64_imm64;
    Load64 = Mov_r64_rm64 | Mov_r64_rm64;
    Load32 = Mov_r32_rm32 | Mov_r32_rm32;
    Load32Signed = Movsxd_r64_rm32 | Movsxd_r64_rm32;
    Load16 = Movzx_r32_rm16 | Movzx_r32_rm16;
    Load8Signed = Movsx_r64_rm8 | Movsx_r64_rm8;
    Store64 = Mov_rm64_r64 | Mov_rm64_r64;
    Store32 = Mov_rm32_r32 | Mov_rm32_r32;
    Store8 = Mov_rm8_r8 | Mov_rm8_r8;
    Prefetch = Prefetcht1_m8 | Prefetcht1_m8;

    // Control; branches are relaxed to their short forms when they are encoded.
    Jump = Jmp_rel32_64 | Jmp_rel32_64;
    JumpIfLess = Jl_rel32_64 | Jl_rel32_64;
    JumpIfGreaterOrEqual = Jge_rel32_64 | Jge_rel32_64;
    Push = Push_r64 | Push_r64;
    Pop = Pop_r64 | Pop_r64;
    ZeroUpper = VEX_Vzeroupper | VEX_Vzeroupper;
    Return = Retnq | Retnq;
}
