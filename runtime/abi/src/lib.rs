//! The border between generated code and the program that runs it.
//!
//! Everything that both sides must agree on is defined here, once: the model descriptor, the step, the payload's
//! header, the feature bits, and the constants of the memory layouts. The compiler takes field offsets from these types
//! with [`core::mem::offset_of!`]; the runtime uses them as they are. Nothing here allocates, prints or calls.
//!
//! Deliberately absent: anything about the *inside* of a model (layouts of weights, kernels, stages). Generated code
//! knows it, the runtime does not need to.
#![cfg_attr(not(feature = "metadata"), no_std)]

#[cfg(feature = "metadata")]
pub mod metadata;

use core::ffi::{c_char, c_void};

/// Version of every layout in this crate. A descriptor with another version is refused.
pub const ABI_VERSION: u32 = 3;

/// First field of a [`ModelDescriptor`]: `"moecmodl"` in little-endian bytes.
pub const DESCRIPTOR_MAGIC: u64 = 0x6c64_6f6d_6365_6f6d;

/// Tokens whose keys and values share one KV page. Also the number of keys that attention reduces at a time: partial
/// results of whole pages are combined in order, so the bits do not depend on who computed which page.
pub const PAGE_TOKENS: usize = 64;

/// Lanes of a logical vector, rows of a weight tile, and the unit to which rows are padded.
pub const LANES: usize = 16;

/// Activation rows, in elements, are padded with zeros to a multiple of this.
pub const ROW_ALIGN: usize = 32;

/// Alignment, in bytes, of the payload in its file and of every tensor's first byte relative to the payload.
pub const PAYLOAD_ALIGN: usize = 4096;

/// Alignment, in bytes, of scratch memory and of KV pages.
pub const MEMORY_ALIGN: usize = 64;

/// Bits of [`Level::features`]: what a CPU must offer to run a level's code.
pub mod features {
    /// SSE up to 4.2, POPCNT (x86-64-v2).
    pub const X86_64_V2: u64 = 1 << 0;
    /// AVX2 with BMI1/2, LZCNT, MOVBE, F16C.
    pub const AVX2: u64 = 1 << 1;
    /// FMA3.
    pub const FMA: u64 = 1 << 2;
    /// F16C conversions.
    pub const F16C: u64 = 1 << 3;
    /// AVX-512 F, BW, CD, DQ and VL (x86-64-v4).
    pub const AVX512: u64 = 1 << 4;
    /// AVX-512 VNNI.
    pub const AVX512_VNNI: u64 = 1 << 5;
    /// AVX-VNNI (VEX-encoded).
    pub const AVX_VNNI: u64 = 1 << 6;
    /// AVX-512 BF16.
    pub const AVX512_BF16: u64 = 1 << 7;
    /// AVX-512 VBMI.
    pub const AVX512_VBMI: u64 = 1 << 8;
    /// AArch64 Advanced SIMD with FMA (every AArch64 CPU).
    pub const NEON: u64 = 1 << 32;
    /// AArch64 `sdot`/`udot`.
    pub const DOTPROD: u64 = 1 << 33;
    /// AArch64 `usdot` (I8MM).
    pub const I8MM: u64 = 1 << 34;

    /// Name of each bit, for messages.
    pub const NAMES: &[(u64, &str)] = &[
        (X86_64_V2, "x86-64-v2"),
        (AVX2, "avx2"),
        (FMA, "fma"),
        (F16C, "f16c"),
        (AVX512, "avx512"),
        (AVX512_VNNI, "avx512vnni"),
        (AVX_VNNI, "avxvnni"),
        (AVX512_BF16, "avx512bf16"),
        (AVX512_VBMI, "avx512vbmi"),
        (NEON, "neon"),
        (DOTPROD, "dotprod"),
        (I8MM, "i8mm"),
    ];
}

/// Element type of the KV cache, as in [`ModelDescriptor::kv_type`].
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KvType {
    /// IEEE half precision, rounded to nearest even when stored.
    F16 = 1,
    /// IEEE single precision.
    F32 = 2,
}

impl KvType {
    /// Size of one element in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            KvType::F16 => 2,
            KvType::F32 => 4,
        }
    }
}

/// The barrier that the caller provides: returns when all [`Step::workers`] workers have called it, and makes every
/// write before it visible to every worker after it.
pub type BarrierFn = unsafe extern "C" fn(context: *mut c_void, worker: u32);

/// One generated entry point. Every worker of a step calls it once with the same `step` and its own index,
/// `0 <= worker < step.workers`; it returns when that worker's part is done, and the step is done when all have returned.
pub type StepFn = unsafe extern "C" fn(step: *const Step, worker: u32);

/// One step: `tokens` tokens, of any number of sequences, go through the whole model.
///
/// All memory belongs to the caller and must stay valid and unmoved until every worker has returned. Tokens of one
/// sequence must be in order of position and contiguous; positions before the first of them must have been through
/// earlier steps.
#[repr(C)]
#[derive(Debug)]
pub struct Step {
    /// The payload, [`ModelDescriptor::payload_bytes`] long, aligned to [`PAYLOAD_ALIGN`].
    pub payload: *const u8,
    /// Scratch memory, aligned to [`MEMORY_ALIGN`]: [`ModelDescriptor::scratch_bytes`] +
    /// `workers` × [`ModelDescriptor::worker_scratch_bytes`]. Its content before a step does not matter, but it must be
    /// readable (freshly mapped zero pages are).
    pub scratch: *mut u8,
    /// Token ids, `[tokens]`, each below [`ModelDescriptor::vocab`].
    pub token_ids: *const u32,
    /// Positions in their sequences, `[tokens]`, each below [`ModelDescriptor::context`].
    pub positions: *const u32,
    /// For each token the page table of its sequence, `[tokens]`: entry `p` is the address of the KV page that holds
    /// positions `p * PAGE_TOKENS ..`, [`ModelDescriptor::page_bytes`] long. Entries wholly outside the sliding window are never
    /// read. Pages must have been zeroed once when they were first allocated.
    pub page_tables: *const *const *mut u8,
    /// Which tokens (indices below `tokens`) need logits, `[logit_count]`.
    pub logit_rows: *const u32,
    /// Where logits go: f32 `[logit_count][logits_stride]`.
    pub logits: *mut f32,
    /// The caller's barrier.
    pub barrier: BarrierFn,
    /// Passed to `barrier`.
    pub barrier_context: *mut c_void,
    /// Tokens in this step: exactly 1 for `decode`, 1 ..= [`ModelDescriptor::max_tokens`] for `batch`.
    pub tokens: u32,
    /// Rows of `logits` wanted: at most `tokens`; 0 is allowed.
    pub logit_count: u32,
    /// Workers that take part, at least 1.
    pub workers: u32,
    /// Zero.
    pub reserved: u32,
}

/// The code of one CPU level.
#[repr(C)]
#[derive(Debug)]
pub struct Level {
    /// NUL-terminated name, e.g. `x86-64-v3`.
    pub name: *const c_char,
    /// What it needs: bits of [`features`].
    pub features: u64,
    /// Entry point for one token (`tokens == 1`).
    pub decode: StepFn,
    /// Entry point for 1 ..= `max_tokens` tokens.
    pub batch: StepFn,
}

// SAFETY: levels and descriptors are constant data of the generated object; the pointers in them point to constants.
unsafe impl Sync for Level {}
// SAFETY: as above.
unsafe impl Sync for ModelDescriptor {}

/// What a compiled model is: exported by its object as `<name>_model`, constant.
#[repr(C)]
#[derive(Debug)]
pub struct ModelDescriptor {
    /// [`DESCRIPTOR_MAGIC`].
    pub magic: u64,
    /// [`ABI_VERSION`] of the compiler.
    pub abi_version: u32,
    /// Size of this struct in bytes.
    pub descriptor_bytes: u32,
    /// NUL-terminated name of the model.
    pub name: *const c_char,
    /// Code for each CPU level, best first, `[level_count]`.
    pub levels: *const Level,
    /// Number of levels.
    pub level_count: u32,
    /// Size of the residual stream.
    pub hidden: u32,
    /// Transformer blocks.
    pub layers: u32,
    /// Query heads.
    pub heads: u32,
    /// Key/value heads.
    pub kv_heads: u32,
    /// Elements of a head, as in the model.
    pub head_dim: u32,
    /// Width of an expert (or of the dense FFN).
    pub ffn: u32,
    /// Experts per layer; 0 for a dense model.
    pub experts: u32,
    /// Experts chosen per token; 0 for a dense model.
    pub experts_per_token: u32,
    /// Vocabulary size.
    pub vocab: u32,
    /// Row stride of [`Step::logits`] in elements: `vocab` rounded up to [`LANES`].
    pub logits_stride: u32,
    /// Longest sequence, in tokens.
    pub context: u32,
    /// Keys that a token attends to, its own included; 0 for all.
    pub sliding_window: u32,
    /// [`KvType`] of the cache.
    pub kv_type: u32,
    /// Most tokens in one step.
    pub max_tokens: u32,
    /// [`PAGE_TOKENS`].
    pub page_tokens: u32,
    /// Bytes of one KV page (all layers).
    pub page_bytes: u64,
    /// Scratch shared by the workers, bytes.
    pub scratch_bytes: u64,
    /// Scratch of each worker, bytes.
    pub worker_scratch_bytes: u64,
    /// Offset in scratch of the experts that each token chose in the last step: u32
    /// `[layers][max_tokens][experts_per_token]` by falling weight.
    pub routes_offset: u64,
    /// Offset in scratch of their weights: f32, same shape.
    pub route_weights_offset: u64,
    /// Offset in scratch of the final normalized hidden states of the rows in `logit_rows`: f32
    /// `[max_tokens][hidden rounded up to ROW_ALIGN]`.
    pub final_hidden_offset: u64,
    /// Size of the payload.
    pub payload_bytes: u64,
    /// Key of the payload: equal keys mean equal content.
    pub payload_key: [u8; 32],
    /// Payload bytes that one decoded token reads: on average, where experts are not of one size.
    pub decode_weight_bytes: u64,
    /// Multiply-adds with weights for one token, the output projection not included.
    pub multiply_adds_per_token: u64,
    /// Multiply-adds of the output projection for one row of logits.
    pub multiply_adds_per_logit_row: u64,
    /// The arithmetic that dominates: 0 = f32 FMA, 1 = 8-bit dot products.
    pub arithmetic: u32,
    /// Stages of [`Level::decode`]: one more than it meets barriers.
    pub decode_stages: u32,
    /// Stages of [`Level::batch`].
    pub batch_stages: u32,
    /// Zero.
    pub reserved: u32,
    /// The stages, those of `decode` first, the same for every level: `[decode_stages + batch_stages]`.
    pub stages: *const Stage,
}

/// What the workers do between two barriers.
#[repr(C)]
pub struct Stage {
    /// NUL-terminated: the operations in it.
    pub title: *const c_char,
    /// Bytes of weights that it reads for one token: on average, where experts are not of one size.
    pub weight_bytes: u64,
    /// Those that it reads whatever experts are chosen.
    pub common_bytes: u64,
    /// Multiply-adds with weights for one token; in the stage of the logits, for one row of them.
    pub multiply_adds: u64,
    /// Bytes of each expert's weights, `[ModelDescriptor::experts]`: a step reads those of every expert that one of its tokens
    /// chose once. Null where nothing depends on the routing.
    pub expert_bytes: *const u64,
    /// The layer whose choice of experts that is.
    pub layer: u32,
    /// Zero.
    pub reserved: u32,
}

// SAFETY: constant data of the generated object, as the descriptor.
unsafe impl Sync for Stage {}

/// First bytes of a payload, at its offset 0 (which is aligned to [`PAYLOAD_ALIGN`] in its file).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PayloadHeader {
    /// [`PAYLOAD_MAGIC`].
    pub magic: [u8; 8],
    /// [`ABI_VERSION`].
    pub abi_version: u32,
    /// Size of this struct in bytes.
    pub header_bytes: u32,
    /// Same as [`ModelDescriptor::payload_key`].
    pub key: [u8; 32],
    /// Whole payload, this header included.
    pub payload_bytes: u64,
    /// Where the metadata (JSON, [`metadata::Metadata`](crate)) lies, from the payload's start.
    pub metadata_offset: u64,
    /// Its length.
    pub metadata_bytes: u64,
    /// Where `tokenizer.json` lies.
    pub tokenizer_offset: u64,
    /// Its length; 0 when the model has none.
    pub tokenizer_bytes: u64,
}

/// [`PayloadHeader::magic`].
pub const PAYLOAD_MAGIC: [u8; 8] = *b"moecwts1";

/// Last bytes of a standalone executable: says where in the file the payload lies.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Trailer {
    /// Offset of the payload in the file, a multiple of [`PAYLOAD_ALIGN`].
    pub payload_offset: u64,
    /// Its size.
    pub payload_bytes: u64,
    /// Its key.
    pub key: [u8; 32],
    /// Offset in the file of the golden values for `selftest` (JSON, [`metadata::Golden`](crate)).
    pub golden_offset: u64,
    /// Their length; 0 when none were recorded.
    pub golden_bytes: u64,
    /// Size of the whole file, this trailer included.
    pub file_bytes: u64,
    /// [`TRAILER_MAGIC`].
    pub magic: [u8; 8],
}

/// [`Trailer::magic`].
pub const TRAILER_MAGIC: [u8; 8] = *b"moecexe1";

/// A struct of plain old data that is written to and read from files as its bytes.
///
/// # Safety
/// The type is `repr(C)`, has no padding, and every bit pattern is valid.
pub unsafe trait Plain: Copy {
    /// The value's bytes.
    fn as_bytes(&self) -> &[u8] {
        // SAFETY: no padding, so all bytes are initialized.
        unsafe { core::slice::from_raw_parts((self as *const Self).cast(), size_of::<Self>()) }
    }

    /// Reads a value from the first bytes of `bytes`; `None` when there are too few.
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() < size_of::<Self>() {
            return None;
        }
        // SAFETY: long enough, and every bit pattern is valid; the read is unaligned.
        Some(unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
    }
}

// SAFETY: repr(C), fields in falling alignment without padding, all integers.
unsafe impl Plain for PayloadHeader {}
// SAFETY: as above.
unsafe impl Plain for Trailer {}

/// `n` rounded up to a multiple of `to`.
pub const fn round_up(n: usize, to: usize) -> usize {
    n.div_ceil(to) * to
}

/// Elements of a head as it is laid out in queries, keys and values: each rotary half padded to [`LANES`].
pub const fn padded_head_dim(head_dim: usize) -> usize {
    2 * round_up(head_dim.div_ceil(2), LANES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_magic_number_is_text() {
        assert_eq!(DESCRIPTOR_MAGIC.to_le_bytes(), *b"moecmodl");
    }

    #[test]
    fn plain_structs_have_no_padding() {
        assert_eq!(size_of::<PayloadHeader>(), 8 + 4 + 4 + 32 + 5 * 8);
        assert_eq!(size_of::<Trailer>(), 8 + 8 + 32 + 8 + 8 + 8 + 8);
    }

    #[test]
    fn heads_are_padded_by_half() {
        assert_eq!([16, 20, 22, 24, 64, 80, 128].map(padded_head_dim), [32, 32, 32, 32, 64, 96, 128]);
    }
}
