//! The compiler's table of contents: import → passes → plan → lower → emit.
//!
//! [`compile`] goes as far as the plan, which is enough to look at; [`build`] goes on to an executable, [`build_library`] to what other
//! programs link. Each step is one call, and what it
//! does is in the module of its name. Deliberately absent: the command line, and the steps' own work.

use crate::emit::cache;
use crate::emit::executable::{self, Objects, Placement};
use crate::emit::level::LevelTarget;
use crate::emit::library::{Contents, Library};
use crate::emit::object::{emit_main, emit_object};
use crate::emit::pack::Packing;
use crate::emit::{EmitError, library, payload};
use crate::expert_bits::{self, BitsError, ByHeat};
use crate::expert_profile::{self, ExpertProfile, Heat, ProfileError};
use crate::import::build::build_graph;
use crate::import::{self, Model, ModelConfig};
use crate::passes::{self, HotExperts, PassError, PassId, QuantConfig, Trace};
use crate::plan::{ModelShape, Plan, PlanError, payload_map, plan};
use crate::target::{self, CpuLevel, TargetError, Tuning};
use crate::tune::apply::{Ambiguous, Applied, apply};
use crate::tune::{Record, worth_measuring};
use moec_abi::KvType;
use moec_abi::metadata::Metadata;
use moec_ir::graph::{Graph, Layout, Mode, Role};
use std::fs::File;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use target_lexicon::Triple;

/// What to build.
#[derive(Clone, Debug)]
pub struct Options {
    /// The layouts of weights.
    pub quant: QuantConfig,
    /// Element type of the KV cache.
    pub kv: KvType,
    /// Longest sequence; the model's own limit without.
    pub context: Option<usize>,
    /// For which system.
    pub target: Triple,
    /// For which CPUs, the best first.
    pub levels: Vec<CpuLevel>,
    /// Starts the names of exported symbols.
    pub prefix: String,
    /// Passes to leave out.
    pub disabled: Vec<PassId>,
    /// The last pass to run.
    pub stop_after: Option<PassId>,
    /// Rewrites to apply at most in each graph.
    pub stop_after_rewrites: Option<usize>,
    /// What was measured of kernels, for levels and shapes that may or may not be those of this build.
    pub tuning: Vec<Record>,
    /// Whether levels without one of these are written by the records that moec carries.
    pub carried_tuning: bool,
    /// How often experts are chosen: those that are chosen most come first in the payload.
    pub expert_profiles: Vec<ExpertProfile>,
    /// For experts with bits by heat: bytes that the payload may have.
    pub size_budget: Option<u64>,
}

impl Default for Options {
    /// For this machine, with the defaults of the command line.
    fn default() -> Options {
        Options {
            quant: QuantConfig::default(),
            kv: KvType::F16,
            context: None,
            target: Triple::host(),
            levels: target::find_level("native", &Triple::host()).into_iter().collect(),
            prefix: "model".to_string(),
            disabled: Vec::new(),
            stop_after: None,
            stop_after_rewrites: None,
            tuning: Vec::new(),
            carried_tuning: true,
            expert_profiles: Vec::new(),
            size_budget: None,
        }
    }
}

/// Why a model was not built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The model cannot be read, or is not supported.
    #[error(transparent)]
    Import(#[from] import::ImportError),
    /// The context asked for is longer than the model's.
    #[error(
        "--context {asked}: the model was made for {limit} tokens (max_position_embeddings); ask for at most as many"
    )]
    Context {
        /// What was asked for.
        asked: usize,
        /// What the model can.
        limit: usize,
    },
    /// Passes failed.
    #[error(transparent)]
    Pass(#[from] PassError),
    /// The graph cannot be planned.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// There is no code for the target.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// A profile of experts is of another model.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// Experts cannot have bits by heat.
    #[error(transparent)]
    Bits(#[from] BitsError),
    /// Tuning records contradict each other.
    #[error(transparent)]
    Tuning(#[from] Ambiguous),
    /// Only objects can be made for other systems.
    #[error(
        "limit of moec: it carries the runtime for {host} only, and cannot link it for {target}; build with --emit object, which needs no runtime"
    )]
    ForeignRuntime {
        /// What moec runs on.
        host: Triple,
        /// What was asked for.
        target: Triple,
    },
    /// Packing failed.
    #[error(transparent)]
    Pack(#[from] crate::emit::pack::PackError),
    /// Files could not be made.
    #[error(transparent)]
    Emit(#[from] EmitError),
    /// The user stopped it.
    #[error("interrupted; nothing was written")]
    Cancelled,
}

/// A model on its way, planned.
#[derive(Debug)]
pub struct Compiled {
    /// The graph of one token, after the passes.
    pub decode: Graph,
    /// The graph of many tokens.
    pub batch: Graph,
    /// What the passes did to each.
    pub traces: [Trace; 2],
    /// What is to be made of them.
    pub plan: Plan,
    /// How often experts are chosen, if profiles say so.
    pub heat: Option<Heat>,
    /// Which experts have more bits than others, when bits are by heat.
    pub by_heat: Option<ByHeat>,
    /// How kernels are written for each level, and what the user should know of tuning records.
    pub tuned: Applied,
}

/// The longest sequence to compile for.
fn context(model: &Model, options: &Options) -> Result<usize, BuildError> {
    let limit = model.config.context;
    match options.context {
        Some(asked) if asked > limit || asked == 0 => Err(BuildError::Context { asked, limit }),
        asked => Ok(asked.unwrap_or(limit)),
    }
}

/// The role of every weight of the model, the type that it is stored in, and the layout that it will have: that of experts which are not chosen
/// often, where there are two.
pub fn layouts(model: &Model, options: &Options) -> Vec<(Role, import::Dtype, Layout)> {
    let mut graph = build_graph(&model.config, &model.tensors, Mode::Decode);
    options.quant.assign(&mut graph);
    let weights = graph.weights().map(|(_, weight)| {
        let stored = model.tensors.info(&weight.name).dtype;
        (weight.role, stored, weight.format())
    });
    weights.collect()
}

/// How often experts are chosen, and which have more bits for it, as `options` say.
///
/// # Errors
/// A profile of another model, or experts that cannot have bits by heat.
pub fn heat(model: &Model, options: &Options) -> Result<(Option<Heat>, Option<ByHeat>), BuildError> {
    let heat = expert_profile::heat(&options.expert_profiles, model)?;
    // Sizes are those of all passes, wherever somebody stops to look.
    let whole = Options { stop_after: None, ..options.clone() };
    let by_heat = expert_bits::choose(model, &whole, heat.as_ref())?;
    Ok((heat, by_heat))
}

/// The graph of one mode after the passes that `options` leave.
///
/// # Errors
/// A pass that cannot be disabled, a bug in one, or experts that cannot have the bits that are asked for.
pub fn rewrite(model: &Model, options: &Options, mode: Mode) -> Result<(Graph, Trace), BuildError> {
    let (_, by_heat) = heat(model, options)?;
    rewrite_with(model, &model.config, options, by_heat.as_ref().map(|by_heat| &by_heat.hot), mode)
}

/// [`rewrite`] of as many layers as `config`, otherwise the model's own, says, with the experts that have more bits.
fn rewrite_with(
    model: &Model,
    config: &ModelConfig,
    options: &Options,
    hot: Option<&HotExperts>,
    mode: Mode,
) -> Result<(Graph, Trace), BuildError> {
    let mut graph = build_graph(config, &model.tensors, mode);
    graph.set_context(context(model, options)?);
    let trace = passes::run(
        &mut graph,
        &passes::Options {
            disabled: options.disabled.clone(),
            stop_after: options.stop_after,
            stop_after_rewrites: options.stop_after_rewrites,
            quant: options.quant,
            hot: hot.cloned(),
        },
    )?;
    Ok((graph, trace))
}

/// Import, passes, plan.
///
/// # Errors
/// Whatever keeps the model from being planned.
pub fn compile(model: &Model, options: &Options) -> Result<Compiled, BuildError> {
    let (heat, by_heat) = heat(model, options)?;
    let hot = by_heat.as_ref().map(|by_heat| &by_heat.hot);
    let (decode, first) = rewrite_with(model, &model.config, options, hot, Mode::Decode)?;
    let (batch, second) = rewrite_with(model, &model.config, options, hot, Mode::Batch)?;
    let shape = shape(model, &model.config, options, heat.as_ref())?;
    let mut tuned = apply(&options.tuning, options.carried_tuning, &options.levels, &options.target)?;
    let mut plan = plan(&decode, &batch, shape, &tuned.tunings)?;
    tuned.compare(&worth_measuring(&plan));
    payload::seal(&mut plan.payload, model);
    Ok(Compiled { decode, batch, traces: [first, second], plan, heat, by_heat, tuned })
}

/// The plan of the model's first `layers` layers, of all if it has no more, with a level for each of `tunings`: in place of those of `options`, which
/// `compiled` is by. Experts are those of the whole model.
///
/// # Errors
/// As for [`compile`].
pub fn plan_first_layers(
    model: &Model,
    options: &Options,
    compiled: &Compiled,
    layers: usize,
    tunings: &[Tuning],
) -> Result<Plan, BuildError> {
    let config = ModelConfig { layers: layers.min(model.config.layers), ..model.config.clone() };
    let hot = compiled.by_heat.as_ref().map(|by_heat| &by_heat.hot);
    let graph = |mode| rewrite_with(model, &config, options, hot, mode);
    let (decode, batch) = (graph(Mode::Decode)?.0, graph(Mode::Batch)?.0);
    Ok(plan(&decode, &batch, shape(model, &config, options, compiled.heat.as_ref())?, tunings)?)
}

fn shape(
    model: &Model,
    config: &ModelConfig,
    options: &Options,
    heat: Option<&Heat>,
) -> Result<ModelShape, BuildError> {
    let shape = ModelShape::new(&model.name, config, options.kv, context(model, options)?);
    Ok(ModelShape { heat: heat.cloned(), ..shape })
}

/// The bytes of the payload that the model would have with these `hot` experts.
///
/// # Errors
/// As for [`compile`].
pub fn payload_bytes(
    model: &Model,
    options: &Options,
    heat: Option<&Heat>,
    hot: &HotExperts,
) -> Result<u64, BuildError> {
    let graph = |mode| rewrite_with(model, &model.config, options, Some(hot), mode);
    let (decode, batch) = (graph(Mode::Decode)?.0, graph(Mode::Batch)?.0);
    let mut payload = payload_map(&decode, &batch, &shape(model, &model.config, options, heat)?)?;
    payload::seal(&mut payload, model);
    Ok(payload.bytes as u64)
}

/// How the building goes.
pub trait Progress: Sync {
    /// The file with the weights will have this size; they are packed, or copied from an earlier build.
    fn begin(&self, bytes: u64, reused: bool);
    /// So many bytes of so many are packed or copied. Called by any thread.
    fn packed(&self, done: u64, all: u64);
    /// All weights are in place.
    fn end(&self);
    /// Something that the user should know.
    fn note(&self, text: &str);
    /// The executable runs for the first time, to record what `selftest` compares with.
    fn recording(&self);
    /// Set when the user wants to stop.
    fn cancelled(&self) -> &AtomicBool;
}

/// What was built.
#[derive(Debug)]
pub struct Built {
    /// What was made of the model.
    pub compiled: Compiled,
    /// Whether the payload of an earlier build was used.
    pub copied: bool,
    /// What the payload says of itself.
    pub metadata: Metadata,
    /// Size of all that was written.
    pub bytes: u64,
}

/// Machine code for the levels of `options`.
///
/// # Errors
/// A target without code generator, or a bug in lowering.
pub fn lower(plan: &Plan, options: &Options, key: [u8; 32]) -> Result<Vec<u8>, BuildError> {
    let isa = |level: &CpuLevel| target::isa_for(level.features, &options.target);
    let targets: Vec<LevelTarget> = options
        .levels
        .iter()
        .map(|level| Ok(LevelTarget { level: *level, isa: isa(level)? }))
        .collect::<Result<_, TargetError>>()?;
    Ok(emit_object(plan, &targets, &options.prefix, key)?)
}

/// Fails when there is no runtime for `target`.
fn check_runtime(target: &Triple) -> Result<(), BuildError> {
    let host = Triple::host();
    if host == *target { Ok(()) } else { Err(BuildError::ForeignRuntime { host, target: target.clone() }) }
}

/// Fails when the user wants to stop.
fn go_on(progress: &dyn Progress) -> Result<(), BuildError> {
    match progress.cancelled().load(Ordering::Relaxed) {
        true => Err(BuildError::Cancelled),
        false => Ok(()),
    }
}

/// The whole way: a model directory to a standalone executable at `output`.
///
/// # Errors
/// Whatever keeps it from being built; then there is nothing new at `output`.
pub fn build(model: &Model, options: &Options, output: &Path, progress: &dyn Progress) -> Result<Built, BuildError> {
    let (built, place) = build_executable(model, options, output, progress)?;
    cache::remember(&place, output);
    Ok(built)
}

/// As [`build`], of an executable that will not stay where it is: later builds do not look for its weights there.
///
/// # Errors
/// As for [`build`].
pub fn build_to_try(
    model: &Model,
    options: &Options,
    output: &Path,
    progress: &dyn Progress,
) -> Result<Built, BuildError> {
    build_executable(model, options, output, progress).map(|(built, _)| built)
}

fn build_executable(
    model: &Model,
    options: &Options,
    output: &Path,
    progress: &dyn Progress,
) -> Result<(Built, Placement), BuildError> {
    check_runtime(&options.target)?;
    let compiled = compile(model, options)?;
    compiled.tuned.notes.iter().for_each(|note| progress.note(note));
    let plan = &compiled.plan;
    let key = payload::key(plan, model);
    let isa = target::isa_for(options.levels[0].features, &options.target)?;
    let objects = Objects { model: lower(plan, options, key)?, main: emit_main(&isa, &options.prefix)? };
    go_on(progress)?;

    let mut unfinished = executable::link(&objects, output, plan.payload.bytes as u64, key)?;
    let place = unfinished.payload;
    let copied = fill(model, plan, place, unfinished.file(), progress)?;
    let metadata = payload::read_metadata(unfinished.file(), place.offset, plan)?;

    unfinished.seal(&[])?;
    let host = target::host();
    if options.levels.iter().any(|l| l.features & !host == 0) {
        progress.recording();
        let golden = unfinished.record();
        go_on(progress)?;
        unfinished.seal(&golden?)?;
    }
    go_on(progress)?;
    let bytes = unfinished.finish()?;
    Ok((Built { compiled, copied, metadata, bytes }, place))
}

/// The whole way to the files that other programs link, in `directory`: named after [`Options::prefix`], as [`library`] says.
///
/// # Errors
/// Whatever keeps it from being built; then there is nothing new in `directory`.
pub fn build_library(
    model: &Model,
    options: &Options,
    kind: Library,
    directory: &Path,
    progress: &dyn Progress,
) -> Result<Built, BuildError> {
    if kind.has_runtime() {
        check_runtime(&options.target)?;
    }
    let compiled = compile(model, options)?;
    compiled.tuned.notes.iter().for_each(|note| progress.note(note));
    let plan = &compiled.plan;
    let key = payload::key(plan, model);
    let prefix = &options.prefix;
    let object = lower(plan, options, key)?;
    go_on(progress)?;

    let Options { levels, target, .. } = options;
    let contents = Contents { plan, levels, prefix, key: &key, object: &object, target, directory };
    let parts = kind.parts(&contents)?;
    let unfinished = library::begin(directory, prefix, &parts, plan.payload.bytes as u64, key)?;
    let place = unfinished.payload;
    let copied = fill(model, plan, place, unfinished.file(), progress)?;
    let metadata = payload::read_metadata(unfinished.file(), place.offset, plan)?;
    go_on(progress)?;
    let (weights, bytes) = unfinished.finish()?;
    cache::remember(&place, &weights);
    Ok(Built { compiled, copied, metadata, bytes })
}

/// What an earlier build says of the payload that `compiled` would have, if there is one.
pub fn earlier_metadata(model: &Model, compiled: &Compiled) -> Option<Metadata> {
    let key = payload::key(&compiled.plan, model);
    let wanted = Placement { offset: 0, bytes: compiled.plan.payload.bytes as u64, key };
    cache::find(&wanted)?.metadata(&compiled.plan).ok()
}

/// Puts the payload into its place in `file`: copied from an earlier build, or packed. Whether it was copied.
fn fill(
    model: &Model,
    plan: &Plan,
    place: Placement,
    file: &File,
    progress: &dyn Progress,
) -> Result<bool, BuildError> {
    let earlier = cache::find(&place);
    let copied = earlier.is_some();
    let end = place.offset + place.bytes;
    progress.begin(end, copied);
    payload::make_room(file, end)?;
    match earlier {
        Some(earlier) => {
            earlier.copy_to(file, place.offset, |done, all| {
                progress.packed(done, all);
                if go_on(progress).is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            })?;
        }
        None => pack(model, plan, place, file, progress)?,
    }
    progress.end();
    go_on(progress)?;
    Ok(copied)
}

/// Packs the payload into its place in `file`.
fn pack(model: &Model, plan: &Plan, place: Placement, file: &File, progress: &dyn Progress) -> Result<(), BuildError> {
    let packing = Packing {
        items: &plan.payload.items,
        source: &model.tensors,
        rope: model.config.rope.clone(),
        head_dim: model.config.head_dim,
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        progress: &|done, all| progress.packed(done, all),
        cancel: progress.cancelled(),
    };
    let report = packing.write(file, place.offset).map_err(|error| match error {
        crate::emit::pack::PackError::Cancelled => BuildError::Cancelled,
        other => BuildError::Pack(other),
    })?;
    Ok(payload::write_frame(file, place.offset, plan, model, place.key, &report)?)
}
