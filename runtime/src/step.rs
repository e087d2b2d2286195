//! One step: tokens of one or more sequences go through the generated code on all workers.
//!
//! This is the only place that calls generated code.

use crate::barrier::Barrier;
use crate::error::{Error, Result};
use crate::expert_counts::ExpertCounts;
use crate::kv::Sequence;
use crate::memory::Zeroed;
use crate::model::{Descriptor, Model};
use crate::profile::{Marks, Profile};
use crate::threads::Pool;
use moec_abi::{ROW_ALIGN, Step};
use std::ffi::c_void;
use std::sync::Arc;
use std::time::Instant;

/// Which tokens of a part need logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Logits {
    /// None of them.
    None,
    /// The last one.
    Last,
    /// All of them.
    All,
}

impl Logits {
    fn rows(self, tokens: usize) -> std::ops::Range<usize> {
        match self {
            Logits::None => tokens..tokens,
            Logits::Last => tokens.saturating_sub(1)..tokens,
            Logits::All => 0..tokens,
        }
    }
}

/// What one sequence contributes to a step.
pub struct Part<'a> {
    /// The sequence; its length is the position of the first token.
    pub sequence: &'a mut Sequence,
    /// Its next tokens, at least one.
    pub tokens: &'a [u32],
    /// Which of them need logits.
    pub logits: Logits,
}

/// Rows of logits, in memory aligned for generated code. Clones share it until one of them is written.
#[derive(Clone, Default)]
pub struct LogitRows {
    memory: Option<Arc<Zeroed>>,
    rows: usize,
    vocab: usize,
    stride: usize,
    /// Final hidden states of the rows, when they are wanted.
    hidden: Option<Vec<f32>>,
}

impl LogitRows {
    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.rows
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Row `row`: a value for each id of the vocabulary.
    pub fn row(&self, row: usize) -> &[f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let memory = self.memory.as_ref().expect("rows have memory");
        let bytes = &memory.bytes()[row * self.stride * 4..][..self.vocab * 4];
        // SAFETY: the memory is aligned to a page and a stride to 64 bytes; every bit pattern is an f32.
        unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), self.vocab) }
    }

    /// Rows that keep the final hidden states too.
    pub fn with_hidden() -> LogitRows {
        LogitRows { hidden: Some(Vec::new()), ..LogitRows::default() }
    }

    /// The final hidden state of row `row`, after the last norm: `[hidden]`.
    ///
    /// # Panics
    /// When they are not kept.
    pub fn hidden(&self, row: usize) -> &[f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let all = self.hidden.as_ref().expect("rows made `with_hidden`");
        let width = all.len() / self.rows;
        &all[row * width..][..width]
    }

    /// One row with these `values`, a logit for each id.
    pub(crate) fn of_row(descriptor: &Descriptor, values: &[f32]) -> Result<LogitRows> {
        assert_eq!(values.len(), descriptor.vocab as usize, "a row has a logit for each id");
        let mut rows = LogitRows::default();
        let first = rows.prepare(descriptor, 1)?;
        // SAFETY: a row has room for at least `vocab` values, and the new memory is nobody else's.
        unsafe { first.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
        Ok(rows)
    }

    /// Forgets all rows.
    pub(crate) fn clear(&mut self) {
        self.rows = 0;
    }

    /// Room for `rows` rows; their content is undefined until a step has written them.
    fn prepare(&mut self, descriptor: &Descriptor, rows: usize) -> Result<*mut f32> {
        self.vocab = descriptor.vocab as usize;
        self.stride = descriptor.logits_stride as usize;
        let bytes = rows * self.stride * 4;
        self.rows = 0;
        if rows == 0 {
            return Ok(std::ptr::null_mut());
        }
        if self.memory.as_mut().and_then(Arc::get_mut).is_none_or(|memory| memory.len() < bytes) {
            self.memory = None;
            let memory = Zeroed::new(bytes, &format!("{rows} rows of logits"), "use a smaller `--chunk`")?;
            self.memory = Some(Arc::new(memory));
        }
        self.rows = rows;
        let memory = self.memory.as_mut().and_then(Arc::get_mut);
        Ok(memory.expect("memory that nobody shares").as_mut_ptr().cast())
    }
}

/// Which experts tokens were sent to: the tokens in order, for every layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routes {
    /// Layers of the model.
    pub layers: usize,
    /// Experts per token.
    pub per_token: usize,
    /// For each layer `[tokens][per_token]`, by falling weight.
    pub experts: Vec<Vec<u32>>,
    /// Their weights, same shape.
    pub weights: Vec<Vec<f32>>,
}

impl Routes {
    /// No tokens yet.
    pub fn new(layers: usize, per_token: usize) -> Routes {
        Routes { layers, per_token, experts: vec![Vec::new(); layers], weights: vec![Vec::new(); layers] }
    }

    /// Tokens so far.
    pub fn tokens(&self) -> usize {
        self.experts.first().map_or(0, Vec::len) / self.per_token.max(1)
    }
}

/// Memory and threads of a model's steps.
pub(crate) struct Engine {
    descriptor: Descriptor,
    pool: Pool,
    scratch: Zeroed,
    token_ids: Vec<u32>,
    positions: Vec<u32>,
    page_tables: Vec<*const *mut u8>,
    logit_rows: Vec<u32>,
    /// Filled while it is there.
    profile: Option<Profile>,
    /// As well.
    expert_counts: Option<ExpertCounts>,
}

// SAFETY: the page tables are scratch space, filled and used within one step; everything else is `Send`.
unsafe impl Send for Engine {}

/// A step as the workers see it.
struct Shared<'a>(&'a Step);

// SAFETY: generated code keeps its workers' accesses apart by index and barrier; that is the contract of `StepFn`.
unsafe impl Sync for Shared<'_> {}

impl Engine {
    pub(crate) fn new(descriptor: Descriptor, pool: Pool) -> Result<Engine> {
        let bytes = descriptor.scratch_for(pool.workers()) as usize;
        let what = format!("working memory for {} threads", pool.workers());
        let scratch = Zeroed::new(bytes, &what, "free memory, or use fewer `--threads`")?;
        Ok(Engine {
            descriptor,
            pool,
            scratch,
            token_ids: Vec::new(),
            positions: Vec::new(),
            page_tables: Vec::new(),
            logit_rows: Vec::new(),
            profile: None,
            expert_counts: None,
        })
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The final hidden states of the first `rows` rows of the last step.
    fn read_hidden(&self, rows: usize, hidden: &mut Vec<f32>) {
        let d = &self.descriptor;
        let width = d.hidden as usize;
        let stride = width.next_multiple_of(ROW_ALIGN);
        hidden.clear();
        for row in 0..rows {
            let at = d.final_hidden_offset as usize + row * stride * 4;
            let words = self.scratch.bytes()[at..][..width * 4].as_chunks::<4>().0;
            hidden.extend(words.iter().map(|word| f32::from_ne_bytes(*word)));
        }
    }

    /// The words of `layer` for the first `tokens` tokens of the last step, in the array `[layers][max_tokens][experts_per_token]` at `offset` of scratch.
    fn chosen(&self, offset: u64, layer: usize, tokens: usize) -> impl Iterator<Item = u32> {
        let d = &self.descriptor;
        let token_bytes = d.experts_per_token as usize * 4;
        let first = offset as usize + layer * d.max_tokens as usize * token_bytes;
        let words = self.scratch.bytes()[first..][..tokens * token_bytes].as_chunks::<4>().0;
        words.iter().map(|word| u32::from_ne_bytes(*word))
    }

    /// Adds the routes of the first `tokens` tokens of the last step to `routes`.
    fn read_routes(&self, tokens: usize, routes: &mut Routes) {
        let d = &self.descriptor;
        for layer in 0..d.layers as usize {
            routes.experts[layer].extend(self.chosen(d.routes_offset, layer, tokens));
            routes.weights[layer].extend(self.chosen(d.route_weights_offset, layer, tokens).map(f32::from_bits));
        }
    }

    /// Counts the experts of the first `tokens` tokens of the last step, if anybody wants to know.
    fn count_experts(&mut self, tokens: usize) {
        let Some(mut counts) = self.expert_counts.take() else { return };
        counts.tokens += tokens as u64;
        for layer in 0..counts.layers.len() {
            counts.add(layer, self.chosen(self.descriptor.routes_offset, layer, tokens));
        }
        self.expert_counts = Some(counts);
    }
}

impl Model {
    /// Times the stages of all steps from now on; what was timed before is forgotten.
    pub fn start_profile(&self) {
        self.engine().profile = Some(Profile::default());
    }

    /// Ends the timing and gives the times; empty when there was none.
    pub fn end_profile(&self) -> Profile {
        self.engine().profile.take().unwrap_or_default()
    }

    /// Counts experts from now on, beginning with `counts`.
    pub(crate) fn set_expert_counts(&self, counts: ExpertCounts) {
        self.engine().expert_counts = Some(counts);
    }

    /// The counts of experts so far, if they are counted.
    pub(crate) fn expert_counts(&self) -> Option<ExpertCounts> {
        self.engine().expert_counts.clone()
    }

    /// Sends the tokens of `parts` through the model in one step and advances their sequences. Rows of logits are in the
    /// order of the parts. With `routes`, the experts of all tokens are added to it.
    ///
    /// # Errors
    /// When there are no tokens or more than [`max_tokens`](moec_abi::ModelDescriptor::max_tokens), when an id is not in
    /// the vocabulary, when a sequence would outgrow the context, or when memory runs out. No sequence has advanced
    /// then.
    pub fn step(&self, parts: &mut [Part<'_>], logits: &mut LogitRows, routes: Option<&mut Routes>) -> Result<()> {
        let descriptor = self.descriptor();
        let tokens: usize = parts.iter().map(|part| part.tokens.len()).sum();
        let max = descriptor.max_tokens as usize;
        if tokens == 0 || tokens > max {
            return Err(Error::StepSize { tokens, max });
        }
        for part in &mut *parts {
            if let Some(&id) = part.tokens.iter().find(|id| **id >= descriptor.vocab) {
                return Err(Error::Token { id, vocab: descriptor.vocab });
            }
            let total = part.sequence.len() + part.tokens.len();
            if total > descriptor.context as usize {
                return Err(Error::ContextFull { tokens: total, context: descriptor.context as usize });
            }
            part.sequence.prepare(part.tokens.len())?;
        }

        let mut guard = self.engine();
        let engine = &mut *guard;
        engine.token_ids.clear();
        engine.positions.clear();
        engine.page_tables.clear();
        engine.logit_rows.clear();
        for part in &*parts {
            let first = engine.token_ids.len();
            engine.token_ids.extend_from_slice(part.tokens);
            engine.positions.extend((0..part.tokens.len()).map(|i| (part.sequence.len() + i) as u32));
            engine.page_tables.extend(part.tokens.iter().map(|_| part.sequence.table()));
            engine.logit_rows.extend(part.logits.rows(part.tokens.len()).map(|row| (first + row) as u32));
        }
        let start = Instant::now();
        let marks = engine.profile.is_some().then(Marks::default);
        let meeting = Meeting { barrier: engine.pool.barrier(), marks };
        let step = Step {
            payload: self.payload().bytes().as_ptr(),
            scratch: engine.scratch.as_mut_ptr(),
            token_ids: engine.token_ids.as_ptr(),
            positions: engine.positions.as_ptr(),
            page_tables: engine.page_tables.as_ptr(),
            logit_rows: engine.logit_rows.as_ptr(),
            logits: logits.prepare(&descriptor, engine.logit_rows.len())?,
            barrier: meet,
            barrier_context: std::ptr::from_ref(&meeting).cast_mut().cast(),
            tokens: tokens as u32,
            logit_count: engine.logit_rows.len() as u32,
            workers: engine.pool.workers() as u32,
            reserved: 0,
        };
        let entry = if tokens == 1 { self.level().decode() } else { self.level().batch() };
        let shared = Shared(&step);
        engine.pool.run(&|worker| {
            let shared = &shared;
            float_environment::with_default(|| {
                // SAFETY: the step is as the ABI says: its memory belongs to this engine, to `logits` and to the
                // sequences, all borrowed until every worker is done; ids and positions were checked, pages prepared; the
                // level's features are present; each worker calls once, with its own index.
                unsafe { entry(shared.0, worker.index as u32) }
            });
        });
        if let (Some(profile), Some(marks)) = (&mut engine.profile, meeting.marks) {
            marks.finish(start, if tokens == 1 { &mut profile.decode } else { &mut profile.batch });
        }
        for part in parts {
            part.sequence.advance(part.tokens.len());
        }
        if let Some(routes) = routes {
            engine.read_routes(tokens, routes);
        }
        engine.count_experts(tokens);
        if let Some(hidden) = &mut logits.hidden {
            engine.read_hidden(engine.logit_rows.len(), hidden);
        }
        Ok(())
    }
}

/// What the workers of a step meet at.
struct Meeting<'a> {
    barrier: &'a Barrier,
    marks: Option<Marks>,
}

/// The barrier of generated code. Panics of other workers end the process here, because nothing may unwind through
/// generated code.
unsafe extern "C" fn meet(context: *mut c_void, worker: u32) {
    // SAFETY: the context of every step is its meeting, which outlives the step.
    let meeting = unsafe { &*context.cast::<Meeting>() };
    meeting.barrier.wait();
    if let Some(marks) = &meeting.marks {
        marks.note(worker);
    }
}

/// The CPU's rounding and denormal modes. Generated code is defined for the default ones; a program around it may have
/// set others (`-ffast-math` does).
mod float_environment {
    /// Runs `f` with the default modes and puts the caller's back.
    #[cfg(target_arch = "x86_64")]
    pub fn with_default(f: impl FnOnce()) {
        use std::arch::asm;
        const DEFAULT: u32 = 0x1f80;
        let mut saved = 0u32;
        // SAFETY: stores and loads the SSE control register; rounding and denormals are as Rust expects in between.
        unsafe {
            asm!("stmxcsr [{0}]", "ldmxcsr [{1}]", in(reg) &mut saved, in(reg) &DEFAULT, options(nostack));
        }
        f();
        // SAFETY: restores what was there.
        unsafe { asm!("ldmxcsr [{0}]", in(reg) &saved, options(nostack, readonly)) };
    }

    /// Runs `f` with the default modes and puts the caller's back.
    #[cfg(target_arch = "aarch64")]
    pub fn with_default(f: impl FnOnce()) {
        use std::arch::asm;
        let saved: u64;
        // SAFETY: reads and writes the floating-point control register; all zeros is the default.
        unsafe { asm!("mrs {0}, fpcr", "msr fpcr, xzr", out(reg) saved, options(nostack)) };
        f();
        // SAFETY: restores what was there.
        unsafe { asm!("msr fpcr, {0}", in(reg) saved, options(nostack)) };
    }

    /// Runs `f`.
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    pub fn with_default(f: impl FnOnce()) {
        f();
    }

    #[cfg(all(test, target_arch = "x86_64"))]
    mod tests {
        use super::*;
        use std::arch::asm;
        use std::hint::black_box;

        #[test]
        fn denormals_survive_a_caller_that_flushes_them() {
            let flush = 0x9fc0u32;
            let default = 0x1f80u32;
            let halve = || black_box(f32::MIN_POSITIVE) * black_box(0.5);
            let mut inside = 0.0;
            // SAFETY: the modes are put back before the test ends.
            unsafe { asm!("ldmxcsr [{0}]", in(reg) &flush, options(nostack, readonly)) };
            let before = halve();
            with_default(|| inside = halve());
            let after = halve();
            // SAFETY: as above.
            unsafe { asm!("ldmxcsr [{0}]", in(reg) &default, options(nostack, readonly)) };
            assert_eq!((before, after), (0.0, 0.0));
            assert_eq!(inside, f32::MIN_POSITIVE * 0.5);
        }
    }
}
