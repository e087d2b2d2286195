//! A compiled model, opened: its descriptor checked, its payload mapped, a level of code chosen, memory and threads ready.
//!
//! All that can be wrong is found here, before any generated code runs.
//!
//! Deliberately absent: sequences of tokens, which are [`Session`](crate::Session)s, and running a step, which is
//! [`step`](crate::step).

use crate::chat_template::ChatTemplate;
use crate::cpus;
use crate::error::{Error, Result, human_bytes};
use crate::kv::PagePool;
use crate::memory::{self, Memory};
use crate::payload::{Expected, Payload, PayloadSource};
use crate::step::Engine;
use crate::text::Tokenizer;
use crate::threads::{Pool, PoolOptions};
use moec_abi::metadata::Metadata;
use moec_abi::{
    ABI_VERSION, DESCRIPTOR_MAGIC, KvType, LANES, Level, ModelDescriptor, PAGE_TOKENS, ROW_ALIGN, Stage, StepFn,
    features,
};
use std::ffi::{CStr, c_char};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

/// How to open a model.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the weights are.
    pub payload: PayloadSource,
    /// Workers and their cores.
    pub pool: PoolOptions,
    /// Name of the level whose code to run; `None` takes the best that the CPU can run.
    pub level: Option<String>,
    /// Open the model even when its weights are larger than the memory, and read them from the disk again and again.
    pub low_memory: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { payload: PayloadSource::Executable, pool: PoolOptions::default(), level: None, low_memory: false }
    }
}

impl Options {
    /// With the weights in this file, and everything else as it is by default.
    pub fn weights(path: impl Into<std::path::PathBuf>) -> Options {
        Options { payload: PayloadSource::File(path.into()), ..Options::default() }
    }
}

/// The code for one CPU level, of a descriptor that has been checked.
#[derive(Clone, Copy, Debug)]
pub struct CodeLevel(&'static Level);

impl CodeLevel {
    /// Its name, e.g. `x86-64-v3`.
    pub fn name(&self) -> &'static str {
        // SAFETY: levels come from checked descriptors only, whose names are constant C strings.
        unsafe { text(self.0.name) }
    }

    /// Its name as a C string, constant as the descriptor.
    pub fn c_name(&self) -> *const c_char {
        self.0.name
    }

    /// Bits of [`moec_abi::features`] that it needs.
    pub fn features(&self) -> u64 {
        self.0.features
    }

    /// Entry point for one token.
    pub fn decode(&self) -> StepFn {
        self.0.decode
    }

    /// Entry point for any number of tokens.
    pub fn batch(&self) -> StepFn {
        self.0.batch
    }
}

/// What the workers do between two barriers, and what it costs for one token.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StageCost {
    /// The operations in it.
    pub title: &'static str,
    /// Bytes of weights that it reads: on average, where experts are not of one size.
    pub weight_bytes: u64,
    /// Those that it reads whatever experts are chosen.
    pub common_bytes: u64,
    /// Multiply-adds with weights; in the stage of the logits, for one row of them.
    pub multiply_adds: u64,
    /// Bytes of each expert's weights, of which a step reads those that are chosen; empty where nothing depends on the routing.
    pub expert_bytes: &'static [u64],
    /// The layer whose choice of experts that is.
    pub layer: usize,
}

/// The text of a name in a descriptor.
///
/// # Safety
/// `name` is a C string that never changes.
unsafe fn text(name: *const c_char) -> &'static str {
    // SAFETY: as the caller says.
    unsafe { CStr::from_ptr(name) }.to_str().unwrap_or("?")
}

/// A descriptor that has been checked.
#[derive(Clone, Copy)]
pub struct Descriptor(&'static ModelDescriptor);

impl std::ops::Deref for Descriptor {
    type Target = ModelDescriptor;
    fn deref(&self) -> &ModelDescriptor {
        self.0
    }
}

impl Descriptor {
    /// Checks a descriptor.
    ///
    /// # Safety
    /// `descriptor` is null, or points to at least 16 readable bytes that never change; when these hold the magic
    /// number, this interface's version and a size, it points to a descriptor of a generated object, constant.
    pub unsafe fn new(descriptor: *const ModelDescriptor) -> Result<Descriptor> {
        let damaged = |what: String| Err(Error::Descriptor { what });
        if descriptor.is_null() || !descriptor.is_aligned() {
            return damaged("there is none".into());
        }
        // SAFETY: the first three fields lie in the 16 bytes that the caller vouches for.
        let (magic, version, bytes) =
            unsafe { ((*descriptor).magic, (*descriptor).abi_version, (*descriptor).descriptor_bytes) };
        if magic != DESCRIPTOR_MAGIC {
            return damaged(format!("its magic number is {magic:#x}"));
        }
        if version != ABI_VERSION {
            return Err(Error::AbiVersion { expected: ABI_VERSION, found: version });
        }
        if bytes as usize != size_of::<ModelDescriptor>() {
            return damaged(format!("it has {bytes} bytes, {} were expected", size_of::<ModelDescriptor>()));
        }
        // SAFETY: the caller vouches for the rest now.
        let d = unsafe { &*descriptor };
        let rules = [
            (d.name.is_null(), "name"),
            (d.levels.is_null() || d.level_count == 0, "levels"),
            (d.stages.is_null() || d.decode_stages == 0 || d.batch_stages == 0, "stages"),
            (d.vocab == 0 || (d.logits_stride as usize) < d.vocab as usize, "vocab"),
            (!(d.logits_stride as usize).is_multiple_of(LANES), "logits_stride"),
            (d.context == 0, "context"),
            (d.max_tokens == 0, "max_tokens"),
            (d.kv_type != KvType::F16 as u32 && d.kv_type != KvType::F32 as u32, "kv_type"),
            (d.page_tokens as usize != PAGE_TOKENS, "page_tokens"),
            (d.page_bytes == 0, "page_bytes"),
            (d.experts_per_token > d.experts, "experts_per_token"),
            (d.layers == 0 || d.hidden == 0, "layers"),
            (!routes_fit(d), "routes_offset"),
            (!hidden_fits(d), "final_hidden_offset"),
        ];
        match rules.iter().find(|(broken, _)| *broken) {
            Some((_, field)) => damaged(format!("field `{field}` makes no sense")),
            None => Ok(Descriptor(d)),
        }
    }

    /// The model's name.
    pub fn name(&self) -> &'static str {
        // SAFETY: a checked descriptor belongs to a generated object, whose names are constant C strings.
        unsafe { text(self.0.name) }
    }

    /// The stages of the entry point for one token, then those of the one for many.
    pub fn stages(&self) -> [Vec<StageCost>; 2] {
        let [decode, batch] = [self.0.decode_stages, self.0.batch_stages].map(|count| count as usize);
        // SAFETY: a checked descriptor belongs to a generated object, which has this many stages there.
        let all = unsafe { std::slice::from_raw_parts(self.0.stages, decode + batch) };
        let experts = |bytes: *const u64| match bytes.is_null() {
            true => &[][..],
            // SAFETY: where there is a table, it has a constant number for each expert.
            false => unsafe { std::slice::from_raw_parts(bytes, self.0.experts as usize) },
        };
        let costs = |stages: &[Stage]| {
            let cost = |s: &Stage| StageCost {
                // SAFETY: titles are constant C strings, as names are.
                title: unsafe { text(s.title) },
                weight_bytes: s.weight_bytes,
                common_bytes: s.common_bytes,
                multiply_adds: s.multiply_adds,
                expert_bytes: experts(s.expert_bytes),
                layer: s.layer as usize,
            };
            stages.iter().map(cost).collect()
        };
        [costs(&all[..decode]), costs(&all[decode..])]
    }

    /// Code for each CPU level, best first.
    pub fn levels(&self) -> Vec<CodeLevel> {
        // SAFETY: a checked descriptor belongs to a generated object, which has this many levels there.
        let levels = unsafe { std::slice::from_raw_parts(self.0.levels, self.0.level_count as usize) };
        levels.iter().map(CodeLevel).collect()
    }

    /// The sliding window, if the model has one.
    pub fn window(&self) -> Option<usize> {
        (self.sliding_window > 0).then_some(self.sliding_window as usize)
    }

    /// Element type of the cache of keys and values.
    pub fn kv_type(&self) -> KvType {
        if self.0.kv_type == KvType::F32 as u32 { KvType::F32 } else { KvType::F16 }
    }

    /// What the payload must be.
    pub fn payload(&self) -> Expected {
        Expected { key: self.payload_key, bytes: self.payload_bytes }
    }

    /// Bytes of scratch memory for `workers` workers.
    pub fn scratch_for(&self, workers: usize) -> u64 {
        self.scratch_bytes + self.worker_scratch_bytes * workers as u64
    }

    /// Names of all levels, for messages.
    fn level_names(&self) -> String {
        self.levels().iter().map(CodeLevel::name).collect::<Vec<_>>().join(", ")
    }

    /// The level called `wanted`, or the best level, that a CPU with `present` features can run.
    pub fn choose_level(&self, wanted: Option<&str>, present: u64) -> Result<CodeLevel> {
        let mut levels = self.levels();
        levels.retain(|level| wanted.is_none_or(|wanted| wanted == level.name()));
        if let Some(level) = levels.iter().find(|level| level.features() & !present == 0) {
            return Ok(*level);
        }
        let compiled = self.level_names();
        match levels.iter().min_by_key(|level| (level.features() & !present).count_ones()) {
            Some(least) => Err(Error::CpuFeatures {
                level: least.name().to_owned(),
                missing: cpus::feature_names(least.features() & !present).join(", "),
                compiled,
                remedy: remedy(present),
            }),
            None => Err(Error::UnknownLevel { asked: wanted.unwrap_or_default().to_owned(), compiled }),
        }
    }
}

/// What the owner of a CPU with these features can do.
fn remedy(present: u64) -> &'static str {
    let v3 = features::X86_64_V2 | features::AVX2 | features::FMA | features::F16C;
    let v4 = v3 | features::AVX512;
    match present {
        _ if present & v4 == v4 => "build it again with `--target-cpu x86-64-v4`",
        _ if present & v3 == v3 => "build it again with `--target-cpu x86-64-v3`",
        _ if cfg!(target_arch = "x86_64") => "moec needs AVX2 and FMA, so use a CPU of 2013 or later that has them",
        _ => "build it again with `--target-cpu native`",
    }
}

fn routes_fit(d: &ModelDescriptor) -> bool {
    if d.experts == 0 {
        return true;
    }
    let bytes = [d.layers, d.max_tokens, d.experts_per_token].iter().fold(4u64, |n, f| n.saturating_mul(u64::from(*f)));
    [d.routes_offset, d.route_weights_offset]
        .iter()
        .all(|offset| offset % 4 == 0 && offset.checked_add(bytes).is_some_and(|end| end <= d.scratch_bytes))
}

fn hidden_fits(d: &ModelDescriptor) -> bool {
    let row = (d.hidden as usize).next_multiple_of(ROW_ALIGN) as u64 * 4;
    let end = u64::from(d.max_tokens).checked_mul(row).and_then(|bytes| d.final_hidden_offset.checked_add(bytes));
    d.final_hidden_offset.is_multiple_of(4) && end.is_some_and(|end| end <= d.scratch_bytes)
}

/// An opened model. Shared by its sessions; steps of different sessions take turns.
pub struct Model {
    descriptor: Descriptor,
    level: CodeLevel,
    payload: Arc<Payload>,
    /// Ends the reading ahead.
    closed: Arc<AtomicBool>,
    metadata: Metadata,
    tokenizer: OnceLock<std::result::Result<Tokenizer, String>>,
    chat_template: OnceLock<std::result::Result<ChatTemplate, String>>,
    pages: Arc<PagePool>,
    engine: Mutex<Engine>,
    workers: usize,
}

impl Model {
    /// Opens a model: checks the descriptor, chooses the code, maps the payload, takes scratch memory, starts threads.
    pub fn open(descriptor: Descriptor, options: &Options) -> Result<Arc<Model>> {
        let level = descriptor.choose_level(options.level.as_deref(), cpus::detected_features())?;
        let payload = Payload::open(&options.payload, descriptor.payload())?;
        let metadata = payload.metadata()?;
        let workers = options.pool.threads.unwrap_or_else(cpus::default_threads).max(1);
        check_memory(&descriptor, workers, Memory::now(), options.low_memory)?;
        let payload = Arc::new(payload);
        let closed = Arc::new(AtomicBool::new(false));
        if descriptor.payload_bytes >= READ_AHEAD_FROM && descriptor.payload_bytes < Memory::now().available {
            let (payload, closed) = (payload.clone(), closed.clone());
            // A help only: without the thread the weights come in when they are touched. It starts before the pool
            // confines this thread to a core, which it would inherit.
            thread::Builder::new().name("moec-read".into()).spawn(move || payload.read_ahead(&closed)).ok();
        }
        let pool = Pool::with_options(PoolOptions { threads: Some(workers), ..options.pool })?;
        let engine = Engine::new(descriptor, pool)?;
        Ok(Arc::new(Model {
            descriptor,
            level,
            payload,
            closed,
            metadata,
            tokenizer: OnceLock::new(),
            chat_template: OnceLock::new(),
            pages: PagePool::new(descriptor.page_bytes as usize),
            engine: Mutex::new(engine),
            workers,
        }))
    }

    /// The descriptor.
    pub fn descriptor(&self) -> Descriptor {
        self.descriptor
    }

    /// The level whose code runs.
    pub fn level(&self) -> CodeLevel {
        self.level
    }

    /// The mapped weights.
    pub fn payload(&self) -> &Payload {
        &self.payload
    }

    /// What the payload says about the model.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The tokenizer, parsed when first asked for.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        let bytes = self.payload.tokenizer().ok_or(Error::NoTokenizer)?;
        let parsed = self.tokenizer.get_or_init(|| Tokenizer::new(bytes).map_err(|error| error.to_string()));
        parsed.as_ref().map_err(|what| Error::Tokenizer { what: what.clone() })
    }

    /// The chat template, compiled when first asked for.
    ///
    /// # Errors
    /// When the model has none, or it does not compile.
    pub fn chat_template(&self) -> Result<&ChatTemplate> {
        let Metadata { chat_template, bos_token, eos_token, .. } = &self.metadata;
        let source = chat_template.as_deref().ok_or(Error::NoChatTemplate)?;
        let compiled = self.chat_template.get_or_init(|| {
            ChatTemplate::new(source, bos_token.as_deref(), eos_token.as_deref()).map_err(|error| match error {
                Error::ChatTemplate { what } => what,
                other => other.to_string(),
            })
        });
        compiled.as_ref().map_err(|what| Error::ChatTemplate { what: what.clone() })
    }

    /// Whether `id` ends a text.
    pub fn is_end(&self, id: u32) -> bool {
        self.metadata.eos_token_ids.contains(&id)
    }

    /// Threads that run a step.
    pub fn workers(&self) -> usize {
        self.workers
    }

    /// The pool of KV pages.
    pub fn pages(&self) -> &Arc<PagePool> {
        &self.pages
    }

    /// The engine, once no other step runs.
    pub(crate) fn engine(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `job` on the model's workers, between steps. For measuring the machine.
    pub fn on_workers(&self, job: &(dyn Fn(crate::threads::Worker<'_>) + Sync)) {
        self.engine().pool().run(job);
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Relaxed);
    }
}

/// Payloads from this size on are read ahead; smaller ones are there in no time.
const READ_AHEAD_FROM: u64 = 32 << 20;

fn check_memory(descriptor: &Descriptor, workers: usize, memory: Memory, low_memory: bool) -> Result<()> {
    let scratch = descriptor.scratch_for(workers);
    let least = scratch + descriptor.page_bytes;
    if least > memory.available {
        let what = format!("working memory for {workers} threads");
        let remedy = "free memory, or use fewer `--threads`";
        return Err(memory::too_little(&what, least, memory.available, remedy));
    }
    let all = least.saturating_add(descriptor.payload_bytes);
    if all > memory.total && !low_memory {
        let what = format!(
            "the model (weights {}, working memory {})",
            human_bytes(descriptor.payload_bytes),
            human_bytes(least)
        );
        let remedy = "rebuild with a smaller `--quant`, use a machine with more memory, or pass `--low-memory` to read the \
                      weights from the disk again and again";
        return Err(memory::too_little(&what, all, memory.total, remedy));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(payload_bytes: u64) -> Descriptor {
        // SAFETY: integers, and raw pointers that what is tested does not follow: zero is a value of each.
        let mut d: ModelDescriptor = unsafe { std::mem::zeroed() };
        d.scratch_bytes = 50;
        d.worker_scratch_bytes = 10;
        d.page_bytes = 30;
        d.payload_bytes = payload_bytes;
        Descriptor(Box::leak(Box::new(d)))
    }

    #[test]
    fn the_model_must_fit_into_memory() {
        let memory = |total, available| Memory { total, available };
        let fits = |payload, memory, low| check_memory(&descriptor(payload), 2, memory, low).map_err(|e| e.to_string());
        // Working memory is 50 + 2 * 10 + 30.
        fits(900, memory(1000, 100), false).unwrap();
        assert_eq!(
            fits(900, memory(1000, 99), true).unwrap_err(),
            "not enough memory: working memory for 2 threads needs 100 B, but only 99 B is available; free memory, or use \
             fewer `--threads`"
        );
        let error = fits(901, memory(1000, 500), false).unwrap_err();
        assert!(
            error.contains("the model (weights 901 B, working memory 100 B) needs 1.0 kB, but only 1.0 kB"),
            "{error}"
        );
        assert!(error.contains("rebuild with a smaller `--quant`") && error.contains("`--low-memory`"), "{error}");
        fits(901, memory(1000, 500), true).unwrap();
        fits(u64::MAX, memory(u64::MAX, u64::MAX), false).unwrap();
    }
}
