//! Whole steps of a model in this process, with its kernels written in several ways.
//!
//! Everything is as in an executable: the programs of the plan with their barriers, machine code from the same back ends, weights where the payload has them
//! ([`super::weights`]), scratch memory in large pages. Only the code is defined in memory instead of in an object. Deliberately absent: results that mean
//! something, tokens before those of the step, and threads that sleep while they wait.

use super::TuneError;
use super::arena::large_pages;
use super::code::CodeError;
use super::team::{Meeting, together};
use super::weights::Weights;
use super::workload::NoMemory;
use crate::emit::EmitError;
use crate::emit::level::{LevelTarget, define_level};
use crate::plan::{ModelShape, Plan};
use crate::target::machine::available_memory;
use crate::target::{CpuLevel, isa_for};
use cranelift_jit::{ArenaMemoryProvider, JITBuilder, JITModule};
use memmap2::MmapMut;
use moec_abi::{LANES, PAGE_TOKENS, Step, StepFn, round_up};
use std::collections::HashMap;
use std::ffi::c_void;
use std::rc::Rc;
use std::time::Duration;
use target_lexicon::Triple;

/// Address space for the code of all ways, so that each function can call each kernel.
const CODE_BYTES: usize = 1 << 28;

/// Seconds that one run should take at least: shorter steps are repeated.
const RUN_SECONDS: f64 = 4e-3;

/// Steps of one model, whose plan has a level for each way.
pub struct Steps {
    plan: Plan,
    threads: usize,
    /// Machine code; there until this is dropped.
    code: Option<JITModule>,
    ways: Vec<Way>,
    weights: Rc<Weights>,
    scratch: MmapMut,
    /// Of one sequence that is as long as a step can be.
    pages: Vec<MmapMut>,
    logits: Vec<f32>,
    /// How often a run repeats a step of so many tokens.
    times: HashMap<usize, usize>,
}

/// The entry points of one way.
#[derive(Clone, Copy)]
struct Way {
    decode: StepFn,
    batch: StepFn,
}

/// A step as the threads see it.
struct Shared<'a>(&'a Step);

// SAFETY: generated code keeps its workers' accesses apart by index and barrier; that is the contract of `StepFn`.
unsafe impl Sync for Shared<'_> {}

impl Shared<'_> {
    /// Lets `worker` do its part.
    ///
    /// # Safety
    /// As [`StepFn`] says.
    unsafe fn work(&self, entry: StepFn, worker: usize) {
        // SAFETY: the caller's promise.
        unsafe { entry(self.0, worker as u32) };
    }
}

impl Steps {
    /// Steps of `plan`, all of whose levels are for the features of `level`, on `threads` threads with the weights of a plan for the same model.
    ///
    /// # Errors
    /// When this machine cannot run the level's code, there is no memory, or a bug of a back end.
    ///
    /// # Panics
    /// When the weights are too few for the plan.
    pub fn new(plan: Plan, level: CpuLevel, threads: usize, weights: Rc<Weights>) -> Result<Steps, TuneError> {
        assert!(weights.bytes() >= plan.payload.weights_end, "the weights are those of the plan's model");
        CodeError::unless_runnable(level)?;
        let scratch_bytes = plan.scratch_bytes + threads * plan.worker_scratch_bytes;
        let pages = plan.model.max_tokens.div_ceil(PAGE_TOKENS);
        let bytes = scratch_bytes + pages * plan.page_bytes();
        let no_memory = |source| NoMemory { bytes, source };
        if bytes > available_memory() {
            return Err(no_memory(std::io::ErrorKind::OutOfMemory.into()).into());
        }
        let (code, ways) = compile(&plan, level)?;
        let scratch = large_pages(scratch_bytes.max(1)).map_err(no_memory)?;
        let page = |_| MmapMut::map_anon(plan.page_bytes().max(1));
        let pages = (0..pages).map(page).collect::<Result<_, _>>().map_err(no_memory)?;
        let logits = vec![0.0; round_up(plan.model.vocab, LANES) + LANES];
        Ok(Steps { plan, threads, code: Some(code), ways, weights, scratch, pages, logits, times: HashMap::new() })
    }

    /// The logits of the last token of the last step.
    pub fn logits(&self) -> &[f32] {
        &self.logits[self.logits.as_ptr().align_offset(4 * LANES)..][..self.plan.model.vocab]
    }

    /// The experts that each of the first `tokens` tokens of the last step chose in a layer.
    pub fn routes(&self, layer: usize, tokens: usize) -> Vec<u32> {
        let ModelShape { max_tokens, experts_per_token: k, .. } = self.plan.model;
        let from = self.plan.outputs.routes + 4 * layer * max_tokens * k;
        let words = self.scratch[from..][..4 * tokens * k].as_chunks::<4>().0;
        words.iter().map(|word| u32::from_ne_bytes(*word)).collect()
    }

    /// Sends a sequence of `tokens` tokens through the model, in the way of the plan's level `way`; the time it took.
    ///
    /// # Panics
    /// When a step cannot have so many.
    pub fn run(&mut self, way: usize, tokens: usize) -> Duration {
        let times = match self.times.get(&tokens) {
            Some(&times) => times,
            None => {
                // The first run meets pages that nobody has touched.
                self.timed(way, tokens, 1);
                let times = (RUN_SECONDS / self.timed(way, tokens, 1).as_secs_f64()).ceil().clamp(1.0, 1e4) as usize;
                self.times.insert(tokens, times);
                times
            }
        };
        self.timed(way, tokens, times) / times as u32
    }

    /// Repeats a step so many times.
    fn timed(&mut self, way: usize, tokens: usize, times: usize) -> Duration {
        let (plan, threads) = (&self.plan, self.threads);
        assert!((1..=plan.model.max_tokens).contains(&tokens), "{tokens} tokens in a step");
        // Neighbours in a text are unlike each other; so are numbers that a prime multiplies.
        let ids: Vec<u32> = (1..=tokens).map(|i| (i * 7919 % plan.model.vocab) as u32).collect();
        let positions: Vec<u32> = (0..tokens as u32).collect();
        let table: Vec<*mut u8> = self.pages.iter_mut().map(|page| page.as_mut_ptr()).collect();
        let tables: Vec<*const *mut u8> = vec![table.as_ptr(); tokens];
        let logit_rows = [tokens as u32 - 1];
        let meeting = Meeting::new(threads);
        let aligned = self.logits.as_ptr().align_offset(4 * LANES);
        let step = Step {
            payload: self.weights.address(),
            scratch: self.scratch.as_mut_ptr(),
            token_ids: ids.as_ptr(),
            positions: positions.as_ptr(),
            page_tables: tables.as_ptr(),
            logit_rows: logit_rows.as_ptr(),
            logits: self.logits[aligned..].as_mut_ptr(),
            barrier: meet,
            barrier_context: std::ptr::from_ref(&meeting).cast_mut().cast(),
            tokens: tokens as u32,
            logit_count: 1,
            workers: threads as u32,
            reserved: 0,
        };
        let entry = if tokens == 1 { self.ways[way].decode } else { self.ways[way].batch };
        let shared = Shared(&step);
        let work = |worker: usize| {
            for _ in 0..times {
                // SAFETY: the step is as the ABI says: its memory is this one's and borrowed, ids and positions are within the model's, pages are there for
                // all; the level's features are present, since code for another would not have been compiled; each worker calls once, with its own index.
                unsafe { shared.work(entry, worker) };
                meeting.meet();
            }
        };
        together(threads, &work).cpu
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        if let Some(code) = self.code.take() {
            // SAFETY: nobody calls it any more; its entry points are gone with this.
            unsafe { code.free_memory() };
        }
    }
}

/// The barrier of generated code.
unsafe extern "C" fn meet(context: *mut c_void, _worker: u32) {
    // SAFETY: the context of every step is its meeting, which outlives the step.
    unsafe { &*context.cast::<Meeting>() }.meet();
}

/// The machine code of every level of `plan`, all for the features of `level`.
fn compile(plan: &Plan, level: CpuLevel) -> Result<(JITModule, Vec<Way>), TuneError> {
    let no_memory = |error| CodeError::Memory(std::io::Error::other(error));
    let mut builder = JITBuilder::new(cranelift_module::default_libcall_names()).map_err(EmitError::module)?;
    builder.memory_provider(Box::new(ArenaMemoryProvider::new_with_size(CODE_BYTES).map_err(no_memory)?));
    let mut module = JITModule::new(builder);
    let isa = isa_for(level.features, &Triple::host()).map_err(CodeError::from)?;
    let target = LevelTarget { level, isa };
    let define = |(i, programs)| define_level(&mut module, plan, programs, &target, &format!("way{i}"));
    let all = plan.levels.iter().enumerate().map(define).collect::<Result<Vec<_>, EmitError>>()?;
    module.finalize_definitions().map_err(EmitError::module)?;
    let entry = |id| {
        let code = module.get_finalized_function(id);
        // SAFETY: it was defined with the signature of an entry point, and its code stays until the module is freed.
        unsafe { std::mem::transmute::<*const u8, StepFn>(code) }
    };
    let ways = all.into_iter().map(|e| Way { decode: entry(e.decode), batch: entry(e.batch) }).collect();
    Ok((module, ways))
}
