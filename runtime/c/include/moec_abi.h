/* The border between code that moec generates and the program that runs it.
 * Made from the crate moec-abi; do not edit. C11, or C++. */

#ifndef MOEC_ABI_H
#define MOEC_ABI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Version of every layout in this crate. A descriptor with another version is refused.
#define MOEC_ABI_VERSION 3

// First field of a moec_model_descriptor: `"moecmodl"` in little-endian bytes.
#define MOEC_DESCRIPTOR_MAGIC 7810490169376993133

// Tokens whose keys and values share one KV page. Also the number of keys that attention reduces at a time: partial
// results of whole pages are combined in order, so the bits do not depend on who computed which page.
#define MOEC_PAGE_TOKENS 64

// Lanes of a logical vector, rows of a weight tile, and the unit to which rows are padded.
#define MOEC_LANES 16

// Activation rows, in elements, are padded with zeros to a multiple of this.
#define MOEC_ROW_ALIGN 32

// Alignment, in bytes, of the payload in its file and of every tensor's first byte relative to the payload.
#define MOEC_PAYLOAD_ALIGN 4096

// Alignment, in bytes, of scratch memory and of KV pages.
#define MOEC_MEMORY_ALIGN 64

// SSE up to 4.2, POPCNT (x86-64-v2).
#define MOEC_FEATURE_X86_64_V2 (UINT64_C(1) << 0)

// AVX2 with BMI1/2, LZCNT, MOVBE, F16C.
#define MOEC_FEATURE_AVX2 (UINT64_C(1) << 1)

// FMA3.
#define MOEC_FEATURE_FMA (UINT64_C(1) << 2)

// F16C conversions.
#define MOEC_FEATURE_F16C (UINT64_C(1) << 3)

// AVX-512 F, BW, CD, DQ and VL (x86-64-v4).
#define MOEC_FEATURE_AVX512 (UINT64_C(1) << 4)

// AVX-512 VNNI.
#define MOEC_FEATURE_AVX512_VNNI (UINT64_C(1) << 5)

// AVX-VNNI (VEX-encoded).
#define MOEC_FEATURE_AVX_VNNI (UINT64_C(1) << 6)

// AVX-512 BF16.
#define MOEC_FEATURE_AVX512_BF16 (UINT64_C(1) << 7)

// AVX-512 VBMI.
#define MOEC_FEATURE_AVX512_VBMI (UINT64_C(1) << 8)

// AArch64 Advanced SIMD with FMA (every AArch64 CPU).
#define MOEC_FEATURE_NEON (UINT64_C(1) << 32)

// AArch64 `sdot`/`udot`.
#define MOEC_FEATURE_DOTPROD (UINT64_C(1) << 33)

// AArch64 `usdot` (I8MM).
#define MOEC_FEATURE_I8MM (UINT64_C(1) << 34)

// Element type of the KV cache, as in moec_model_descriptor.kv_type.
enum moec_kv_type
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    // IEEE half precision, rounded to nearest even when stored.
    MOEC_KV_TYPE_F16 = 1,
    // IEEE single precision.
    MOEC_KV_TYPE_F32 = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum moec_kv_type moec_kv_type;
#else
typedef uint32_t moec_kv_type;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// The barrier that the caller provides: returns when all moec_step.workers workers have called it, and makes every
// write before it visible to every worker after it.
typedef void (*moec_barrier_fn)(void *context, uint32_t worker);

// One step: `tokens` tokens, of any number of sequences, go through the whole model.
//
// All memory belongs to the caller and must stay valid and unmoved until every worker has returned. Tokens of one
// sequence must be in order of position and contiguous; positions before the first of them must have been through
// earlier steps.
typedef struct moec_step {
    // The payload, moec_model_descriptor.payload_bytes long, aligned to MOEC_PAYLOAD_ALIGN.
    const uint8_t *payload;
    // Scratch memory, aligned to MOEC_MEMORY_ALIGN: moec_model_descriptor.scratch_bytes +
    // `workers` × moec_model_descriptor.worker_scratch_bytes. Its content before a step does not matter, but it must be
    // readable (freshly mapped zero pages are).
    uint8_t *scratch;
    // Token ids, `[tokens]`, each below moec_model_descriptor.vocab.
    const uint32_t *token_ids;
    // Positions in their sequences, `[tokens]`, each below moec_model_descriptor.context.
    const uint32_t *positions;
    // For each token the page table of its sequence, `[tokens]`: entry `p` is the address of the KV page that holds
    // positions `p * MOEC_PAGE_TOKENS ..`, moec_model_descriptor.page_bytes long. Entries wholly outside the sliding window are never
    // read. Pages must have been zeroed once when they were first allocated.
    uint8_t *const *const *page_tables;
    // Which tokens (indices below `tokens`) need logits, `[logit_count]`.
    const uint32_t *logit_rows;
    // Where logits go: f32 `[logit_count][logits_stride]`.
    float *logits;
    // The caller's barrier.
    moec_barrier_fn barrier;
    // Passed to `barrier`.
    void *barrier_context;
    // Tokens in this step: exactly 1 for `decode`, 1 ..= moec_model_descriptor.max_tokens for `batch`.
    uint32_t tokens;
    // Rows of `logits` wanted: at most `tokens`; 0 is allowed.
    uint32_t logit_count;
    // Workers that take part, at least 1.
    uint32_t workers;
    // Zero.
    uint32_t reserved;
} moec_step;

// One generated entry point. Every worker of a step calls it once with the same `step` and its own index,
// `0 <= worker < step.workers`; it returns when that worker's part is done, and the step is done when all have returned.
typedef void (*moec_step_fn)(const struct moec_step *step, uint32_t worker);

// The code of one CPU level.
typedef struct moec_level {
    // NUL-terminated name, e.g. `x86-64-v3`.
    const char *name;
    // What it needs: bits of features.
    uint64_t features;
    // Entry point for one token (`tokens == 1`).
    moec_step_fn decode;
    // Entry point for 1 ..= `max_tokens` tokens.
    moec_step_fn batch;
} moec_level;

// What the workers do between two barriers.
typedef struct moec_stage {
    // NUL-terminated: the operations in it.
    const char *title;
    // Bytes of weights that it reads for one token: on average, where experts are not of one size.
    uint64_t weight_bytes;
    // Those that it reads whatever experts are chosen.
    uint64_t common_bytes;
    // Multiply-adds with weights for one token; in the stage of the logits, for one row of them.
    uint64_t multiply_adds;
    // Bytes of each expert's weights, `[ModelDescriptor::experts]`: a step reads those of every expert that one of its tokens
    // chose once. Null where nothing depends on the routing.
    const uint64_t *expert_bytes;
    // The layer whose choice of experts that is.
    uint32_t layer;
    // Zero.
    uint32_t reserved;
} moec_stage;

// What a compiled model is: exported by its object as `<name>_model`, constant.
typedef struct moec_model_descriptor {
    // MOEC_DESCRIPTOR_MAGIC.
    uint64_t magic;
    // MOEC_ABI_VERSION of the compiler.
    uint32_t abi_version;
    // Size of this struct in bytes.
    uint32_t descriptor_bytes;
    // NUL-terminated name of the model.
    const char *name;
    // Code for each CPU level, best first, `[level_count]`.
    const struct moec_level *levels;
    // Number of levels.
    uint32_t level_count;
    // Size of the residual stream.
    uint32_t hidden;
    // Transformer blocks.
    uint32_t layers;
    // Query heads.
    uint32_t heads;
    // Key/value heads.
    uint32_t kv_heads;
    // Elements of a head, as in the model.
    uint32_t head_dim;
    // Width of an expert (or of the dense FFN).
    uint32_t ffn;
    // Experts per layer; 0 for a dense model.
    uint32_t experts;
    // Experts chosen per token; 0 for a dense model.
    uint32_t experts_per_token;
    // Vocabulary size.
    uint32_t vocab;
    // Row stride of moec_step.logits in elements: `vocab` rounded up to MOEC_LANES.
    uint32_t logits_stride;
    // Longest sequence, in tokens.
    uint32_t context;
    // Keys that a token attends to, its own included; 0 for all.
    uint32_t sliding_window;
    // moec_kv_type of the cache.
    uint32_t kv_type;
    // Most tokens in one step.
    uint32_t max_tokens;
    // MOEC_PAGE_TOKENS.
    uint32_t page_tokens;
    // Bytes of one KV page (all layers).
    uint64_t page_bytes;
    // Scratch shared by the workers, bytes.
    uint64_t scratch_bytes;
    // Scratch of each worker, bytes.
    uint64_t worker_scratch_bytes;
    // Offset in scratch of the experts that each token chose in the last step: u32
    // `[layers][max_tokens][experts_per_token]` by falling weight.
    uint64_t routes_offset;
    // Offset in scratch of their weights: f32, same shape.
    uint64_t route_weights_offset;
    // Offset in scratch of the final normalized hidden states of the rows in `logit_rows`: f32
    // `[max_tokens][hidden rounded up to ROW_ALIGN]`.
    uint64_t final_hidden_offset;
    // Size of the payload.
    uint64_t payload_bytes;
    // Key of the payload: equal keys mean equal content.
    uint8_t payload_key[32];
    // Payload bytes that one decoded token reads: on average, where experts are not of one size.
    uint64_t decode_weight_bytes;
    // Multiply-adds with weights for one token, the output projection not included.
    uint64_t multiply_adds_per_token;
    // Multiply-adds of the output projection for one row of logits.
    uint64_t multiply_adds_per_logit_row;
    // The arithmetic that dominates: 0 = f32 FMA, 1 = 8-bit dot products.
    uint32_t arithmetic;
    // Stages of moec_level.decode: one more than it meets barriers.
    uint32_t decode_stages;
    // Stages of moec_level.batch.
    uint32_t batch_stages;
    // Zero.
    uint32_t reserved;
    // The stages, those of `decode` first, the same for every level: `[decode_stages + batch_stages]`.
    const struct moec_stage *stages;
} moec_model_descriptor;

// First bytes of a payload, at its offset 0 (which is aligned to MOEC_PAYLOAD_ALIGN in its file).
typedef struct moec_payload_header {
    // PAYLOAD_MAGIC.
    uint8_t magic[8];
    // MOEC_ABI_VERSION.
    uint32_t abi_version;
    // Size of this struct in bytes.
    uint32_t header_bytes;
    // Same as moec_model_descriptor.payload_key.
    uint8_t key[32];
    // Whole payload, this header included.
    uint64_t payload_bytes;
    // Where the metadata (JSON, Metadata) lies, from the payload's start.
    uint64_t metadata_offset;
    // Its length.
    uint64_t metadata_bytes;
    // Where `tokenizer.json` lies.
    uint64_t tokenizer_offset;
    // Its length; 0 when the model has none.
    uint64_t tokenizer_bytes;
} moec_payload_header;

#endif  /* MOEC_ABI_H */

/* Layouts are those of the generated code, or nothing works. */
#ifdef __cplusplus
#define MOEC_STATIC_ASSERT static_assert
#else
#define MOEC_STATIC_ASSERT _Static_assert
#endif
MOEC_STATIC_ASSERT(sizeof(struct moec_level) == 32, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_level, name) == 0, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_level, features) == 8, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_level, decode) == 16, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_level, batch) == 24, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(sizeof(struct moec_step) == 88, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_step, payload) == 0, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_step, scratch) == 8, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_step, token_ids) == 16, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_step, positions) == 24, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_step, page_tables) == 32, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_step, logit_rows) == 40, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_step, logits) == 48, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_step, barrier) == 56, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_step, barrier_context) == 64, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_step, tokens) == 72, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_step, logit_count) == 76, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_step, workers) == 80, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(sizeof(struct moec_model_descriptor) == 232, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_model_descriptor, magic) == 0, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_model_descriptor, abi_version) == 8, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_model_descriptor, descriptor_bytes) == 12, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_model_descriptor, name) == 16, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_model_descriptor, levels) == 24, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_model_descriptor, level_count) == 32, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_model_descriptor, logits_stride) == 72, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_model_descriptor, page_bytes) == 96, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_model_descriptor, scratch_bytes) == 104, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_model_descriptor, final_hidden_offset) == 136, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_model_descriptor, payload_bytes) == 144, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_model_descriptor, payload_key) == 152, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_model_descriptor, arithmetic) == 208, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(sizeof(struct moec_payload_header) == 88, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_payload_header, key) == 16, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_payload_header, payload_bytes) == 48, "moec lays out this struct in another way");
MOEC_STATIC_ASSERT(offsetof(struct moec_payload_header, tokenizer_bytes) == 80, "moec lays out this struct in another way");
