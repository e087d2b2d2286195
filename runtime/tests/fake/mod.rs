//! A model written by hand against the ABI, for tests of everything around generated code.
//!
//! Its logits depend on every visible token, read back from the KV pages, and on bytes of the payload, and they are
//! computed in stages that need the barrier: whatever the runtime does wrong with pages, positions, windows, threads
//! or mapping changes them. [`expected_logits`] says what they must be.
//!
//! Like generated code it trusts the step it is given; the ABI says what may be trusted.
#![allow(dead_code, missing_docs, clippy::undocumented_unsafe_blocks)]

use moec_abi::metadata::{Golden, Metadata};
use moec_abi::*;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::slice;

pub const EXPERTS: u32 = 5;
pub const PER_TOKEN: u32 = 2;
pub const LAYERS: u32 = 2;
/// A multiple of `ROW_ALIGN`, so that rows need no padding.
pub const HIDDEN: u32 = 32;
const TABLE_OFFSET: usize = 4096;
const TABLE: usize = 256;

/// What a fake model looks like.
#[derive(Clone, Debug)]
pub struct Shape {
    pub vocab: u32,
    pub context: u32,
    pub window: u32,
    pub max_tokens: u32,
    pub experts: u32,
    pub features: u64,
    pub extra_scratch: u64,
    pub eos: Vec<u32>,
    pub tokenizer: Vec<u8>,
    pub chat_template: Option<String>,
}

impl Default for Shape {
    fn default() -> Shape {
        Shape {
            vocab: 384,
            context: 1000,
            window: 0,
            max_tokens: 16,
            experts: EXPERTS,
            features: 0,
            extra_scratch: 0,
            eos: vec![2],
            tokenizer: include_bytes!("../data/byte_fallback_tokenizer.json").to_vec(),
            chat_template: None,
        }
    }
}

/// The bytes of a shape's payload. The key depends on the shape.
pub fn payload(shape: &Shape) -> Vec<u8> {
    let metadata = Metadata {
        name: "fake".into(),
        architecture: "FakeForCausalLM".into(),
        parameters: 1_234_567,
        quantization: [("experts".to_owned(), "q4".to_owned())].into(),
        bos_token_id: Some(1),
        eos_token_ids: shape.eos.clone(),
        packed_by: "a test".into(),
        chat_template: shape.chat_template.clone(),
        bos_token: Some("<s>".into()),
        eos_token: Some("</s>".into()),
        ..Metadata::default()
    };
    let metadata = serde_json::to_vec(&metadata).unwrap();
    let metadata_offset = TABLE_OFFSET + TABLE;
    let tokenizer_offset = metadata_offset + metadata.len();
    let bytes = round_up(tokenizer_offset + shape.tokenizer.len(), PAYLOAD_ALIGN);
    let header = PayloadHeader {
        magic: PAYLOAD_MAGIC,
        abi_version: ABI_VERSION,
        header_bytes: size_of::<PayloadHeader>() as u32,
        key: key(shape),
        payload_bytes: bytes as u64,
        metadata_offset: metadata_offset as u64,
        metadata_bytes: metadata.len() as u64,
        tokenizer_offset: tokenizer_offset as u64,
        tokenizer_bytes: shape.tokenizer.len() as u64,
    };
    let mut payload = header.as_bytes().to_vec();
    payload.resize(TABLE_OFFSET, 0);
    payload.extend((0..TABLE).map(table_entry));
    payload.extend(metadata);
    payload.extend(&shape.tokenizer);
    payload.resize(bytes, 0);
    payload
}

fn table_entry(i: usize) -> u8 {
    (i * 167 + 13) as u8
}

fn key(shape: &Shape) -> [u8; 32] {
    let mut key = [0; 32];
    let words =
        [shape.vocab, shape.context, shape.window, shape.max_tokens, shape.tokenizer.len() as u32, shape.experts];
    for (to, word) in key.as_chunks_mut::<4>().0.iter_mut().zip(words) {
        *to = word.to_le_bytes();
    }
    key
}

/// The descriptor of a shape. Lives as long as the process, as that of a generated object does.
pub fn descriptor(shape: &Shape) -> &'static ModelDescriptor {
    let level = |name: &'static std::ffi::CStr, features| Level { name: name.as_ptr(), features, decode, batch };
    let levels: &'static [Level] =
        Box::leak(Box::new([level(c"impossible", u64::MAX), level(c"plain", shape.features)]));
    let per_step = u64::from(LAYERS * shape.max_tokens * PER_TOKEN) * 4;
    let sums = u64::from(shape.max_tokens) * 8;
    let hidden = u64::from(shape.max_tokens) * u64::from(HIDDEN) * 4;
    let dense = shape.experts == 0;
    Box::leak(Box::new(ModelDescriptor {
        magic: DESCRIPTOR_MAGIC,
        abi_version: ABI_VERSION,
        descriptor_bytes: size_of::<ModelDescriptor>() as u32,
        name: c"fake".as_ptr(),
        levels: levels.as_ptr(),
        level_count: levels.len() as u32,
        hidden: HIDDEN,
        layers: LAYERS,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        ffn: 64,
        experts: shape.experts,
        experts_per_token: if dense { 0 } else { PER_TOKEN },
        vocab: shape.vocab,
        logits_stride: round_up(shape.vocab as usize, LANES) as u32,
        context: shape.context,
        sliding_window: shape.window,
        kv_type: KvType::F16 as u32,
        max_tokens: shape.max_tokens,
        page_tokens: PAGE_TOKENS as u32,
        page_bytes: (PAGE_TOKENS * 8) as u64,
        scratch_bytes: sums + 2 * per_step + hidden + shape.extra_scratch,
        worker_scratch_bytes: 64,
        routes_offset: sums,
        route_weights_offset: sums + per_step,
        final_hidden_offset: sums + 2 * per_step,
        payload_bytes: payload(shape).len() as u64,
        payload_key: key(shape),
        decode_weight_bytes: 1 << 20,
        multiply_adds_per_token: 1 << 20,
        multiply_adds_per_logit_row: 1 << 16,
        arithmetic: 1,
        decode_stages: 1,
        batch_stages: 1,
        reserved: 0,
        stages: STAGES.as_ptr(),
    }))
}

/// Each program has one stage.
static STAGES: [Stage; 2] = [stage(c"decode"), stage(c"batch")];

const fn stage(title: &'static std::ffi::CStr) -> Stage {
    Stage {
        title: title.as_ptr(),
        weight_bytes: 1 << 20,
        common_bytes: 1 << 20,
        multiply_adds: 1 << 20,
        expert_bytes: std::ptr::null(),
        layer: 0,
        reserved: 0,
    }
}

/// The numbers that generated code has as immediates.
struct Layout {
    vocab: usize,
    stride: usize,
    window: usize,
    max_tokens: usize,
    dense: bool,
}

/// A generated object has its shape built in. One process of the tests runs several shapes, so here the payload's
/// key, whose words are those of the shape, tells them apart.
unsafe fn layout(step: &Step) -> Layout {
    let header = unsafe { PayloadHeader::from_bytes(slice::from_raw_parts(step.payload, 256)) }.unwrap();
    let words: Vec<u32> = header.key.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
    let vocab = words[0] as usize;
    Layout {
        vocab,
        stride: round_up(vocab, LANES),
        window: words[2] as usize,
        max_tokens: words[3] as usize,
        dense: words[5] == 0,
    }
}

unsafe extern "C" fn decode(step: *const Step, worker: u32) {
    assert_eq!(unsafe { (*step).tokens }, 1, "decode takes one token");
    unsafe { run(&*step, worker) }
}

unsafe extern "C" fn batch(step: *const Step, worker: u32) {
    unsafe { run(&*step, worker) }
}

unsafe fn run(step: &Step, worker: u32) {
    let layout = unsafe { layout(step) };
    let (workers, me) = (step.workers as usize, worker as usize);
    let tokens = step.tokens as usize;
    assert!(tokens <= layout.max_tokens && step.logit_count <= step.tokens && step.reserved == 0);
    assert!((step.payload as usize).is_multiple_of(4096) && (step.scratch as usize).is_multiple_of(MEMORY_ALIGN));
    if std::env::var_os("FAKE_SLOW").is_some() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let ids = unsafe { slice::from_raw_parts(step.token_ids, tokens) };
    let positions = unsafe { slice::from_raw_parts(step.positions, tokens) };
    let tables = unsafe { slice::from_raw_parts(step.page_tables, tokens) };
    let slot = |token: usize, position: usize| unsafe {
        let page = *tables[token].add(position / PAGE_TOKENS);
        page.cast::<[u32; 2]>().add(position % PAGE_TOKENS)
    };

    // Stage 1: store ids and positions; choose experts.
    for token in (me..tokens).step_by(workers) {
        let position = positions[token] as usize;
        unsafe { slot(token, position).write([ids[token] + 1, positions[token] + 1]) };
        if !layout.dense {
            for layer in 0..LAYERS as usize {
                for k in 0..PER_TOKEN as usize {
                    let at = (layer * layout.max_tokens + token) * PER_TOKEN as usize + k;
                    let routes = unsafe { step.scratch.add(layout.max_tokens * 8).cast::<u32>() };
                    let weights = unsafe { routes.add(LAYERS as usize * layout.max_tokens * PER_TOKEN as usize) };
                    let (expert, weight) = route(ids[token], layer, k);
                    unsafe { routes.add(at).write(expert) };
                    unsafe { weights.cast::<f32>().add(at).write(weight) };
                }
            }
        }
    }
    unsafe { (step.barrier)(step.barrier_context, worker) };

    // Stage 2: sum up what is visible; by other workers than those that stored it.
    let sums = step.scratch.cast::<u64>();
    for token in ((workers - 1 - me)..tokens).step_by(workers) {
        let position = positions[token] as usize;
        let mut sum = 0;
        for seen in first_visible(position, layout.window)..=position {
            let [id, stored] = unsafe { slot(token, seen).read() };
            let stored = if stored as usize == seen + 1 { stored } else { 0xbad };
            let table = unsafe { *step.payload.add(TABLE_OFFSET + id as usize % TABLE) };
            sum = mix(sum, u64::from(id), u64::from(stored), table);
        }
        unsafe { sums.add(token).write(sum) };
    }
    unsafe { (step.barrier)(step.barrier_context, worker) };

    // Stage 3: logits and hidden states, each worker a part of every row.
    let hidden = layout.max_tokens * 8 + 2 * (LAYERS * PER_TOKEN) as usize * layout.max_tokens * 4;
    let hidden = unsafe { step.scratch.add(hidden).cast::<f32>() };
    for row in 0..step.logit_count as usize {
        let token = unsafe { *step.logit_rows.add(row) } as usize;
        let sum = unsafe { *sums.add(token) };
        for id in (me..layout.vocab).step_by(workers) {
            unsafe { step.logits.add(row * layout.stride + id).write(logit(sum, id)) };
        }
        for i in (me..HIDDEN as usize).step_by(workers) {
            unsafe { hidden.add(row * HIDDEN as usize + i).write(hidden_value(sum, i)) };
        }
    }
}

fn first_visible(position: usize, window: usize) -> usize {
    if window == 0 { 0 } else { (position + 1).saturating_sub(window) }
}

fn mix(sum: u64, id: u64, stored: u64, table: u8) -> u64 {
    (sum.rotate_left(7) ^ (id << 20) ^ stored).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(u64::from(table))
}

fn logit(sum: u64, id: usize) -> f32 {
    let bits = (sum ^ (id as u64).wrapping_mul(0xd6e8_feb8_6659_fd93)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    bits as f32 / (1u64 << 24) as f32 * 8.0 - 4.0
}

fn hidden_value(sum: u64, i: usize) -> f32 {
    logit(sum, i + 5000)
}

/// The final hidden state of the last of `tokens`.
pub fn expected_hidden(shape: &Shape, tokens: &[u32]) -> Vec<f32> {
    let sum = sum_of(shape, tokens);
    (0..HIDDEN as usize).map(|i| hidden_value(sum, i)).collect()
}

/// The expert and weight of slot `k` for token `id` in `layer`.
pub fn route(id: u32, layer: usize, k: usize) -> (u32, f32) {
    ((id + layer as u32 + k as u32) % EXPERTS, 1.0 / (1 + k) as f32 + id as f32)
}

/// The logits of the last of `tokens`.
pub fn expected_logits(shape: &Shape, tokens: &[u32]) -> Vec<f32> {
    let sum = sum_of(shape, tokens);
    (0..shape.vocab as usize).map(|id| logit(sum, id)).collect()
}

fn sum_of(shape: &Shape, tokens: &[u32]) -> u64 {
    let last = tokens.len() - 1;
    (first_visible(last, shape.window as usize)..=last).fold(0, |sum, i| {
        let id = tokens[i] as usize + 1;
        mix(sum, id as u64, i as u64 + 1, table_entry(id % TABLE))
    })
}

/// Writes the payload into `dir`.
pub fn write_payload(shape: &Shape, dir: &Path) -> PathBuf {
    let path = dir.join("fake.weights");
    fs::write(&path, payload(shape)).unwrap();
    path
}

/// Makes an executable out of `program`: payload, recorded values and trailer at its end.
pub fn append(shape: &Shape, program: &Path, to: &Path, golden: Option<&Golden>) {
    let mut bytes = fs::read(program).unwrap();
    bytes.resize(round_up(bytes.len(), PAYLOAD_ALIGN), 0);
    let payload_offset = bytes.len();
    let payload = payload(shape);
    bytes.extend(&payload);
    let golden = golden.map_or(Vec::new(), |golden| serde_json::to_vec(golden).unwrap());
    let golden_offset = bytes.len();
    bytes.extend(&golden);
    let trailer = Trailer {
        payload_offset: payload_offset as u64,
        payload_bytes: payload.len() as u64,
        key: key(shape),
        golden_offset: golden_offset as u64,
        golden_bytes: golden.len() as u64,
        file_bytes: (bytes.len() + size_of::<Trailer>()) as u64,
        magic: TRAILER_MAGIC,
    };
    bytes.extend(trailer.as_bytes());
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).open(to).unwrap();
    file.write_all(&bytes).unwrap();
    drop(file);
    #[cfg(unix)]
    fs::set_permissions(to, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
}
