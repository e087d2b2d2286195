//! `moec tune`: measuring, on the machine it runs on, the choices that the kernels of a model leave open.
//!
//! Shapes ([`products`]) come from the plan. For each, [`search`] proposes ways by a [`cost`] model and lets a [`contest`] decide, on a [`workload`] that runs
//! kernels ([`code`]) in this process on memory of its own ([`arena`]): no linker, no model file, no weights. Then all shapes are measured on fewer threads
//! ([`team_size`]). At last a [`trial`] compares whole [`steps`] of the model's first layers, over memory that lies as its [`weights`] do, and choices that
//! make these slower are given up. The result is a [`record`], which [`apply`] gives to the levels of a build, as it does those that moec carries
//! ([`shipped`]). Only speed depends on it. Deliberately absent: kernels other than products, which take little of a step.

pub mod apply;
mod arena;
pub mod code;
mod contest;
pub mod cost;
pub mod limits;
pub mod products;
pub mod record;
pub mod search;
pub mod shipped;
pub mod steps;
pub mod team;
pub mod team_size;
pub mod trial;
pub mod weights;
mod workload;

pub use record::{Record, RecordError};

use crate::emit::EmitError;
use crate::emit::files::Unfinished;
use crate::pipeline::BuildError;
use crate::plan::Plan;
use crate::target::machine::Machine;
use crate::target::{CpuLevel, Tuning};
use code::{CodeError, Compiler};
use contest::Ended;
use limits::Limits;
use products::{Product, products};
use search::Search;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};
use trial::{FirstLayers, Trial, WholeSteps};
use workload::Workload;

/// Products below this share of a step's bytes and multiply-adds are not worth measuring.
const LEAST_SHARE: f64 = 0.002;

/// How much longer than they have a CPU threads may take on a machine that is not busy.
const MOST_WAITED: f64 = 1.15;

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum TuneError {
    /// Kernels cannot be compiled or run here.
    #[error(transparent)]
    Code(#[from] CodeError),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] workload::NoMemory),
    /// The model's first layers cannot be planned.
    #[error(transparent)]
    Plan(Box<BuildError>),
    /// The record that is there cannot be read.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The record cannot be written.
    #[error(transparent)]
    Emit(#[from] EmitError),
    /// The record that is there is another machine's.
    #[error(
        "{0}: holds a record of another machine, CPU level, number of threads or version of moec, which would be lost; delete it, or write elsewhere"
    )]
    OtherKey(String),
}

/// What to measure.
pub struct Request<'a> {
    /// The model, planned for `level`.
    pub plan: &'a Plan,
    /// Plans its first layers.
    pub first_layers: &'a FirstLayers<'a>,
    /// The level.
    pub level: CpuLevel,
    /// How kernels are written without the record: what must be beaten.
    pub default: &'a Tuning,
    /// Threads that work together, as many as the model will have.
    pub threads: usize,
    /// How long it may take.
    pub budget: Duration,
    /// The record to write, or to go on with.
    pub output: &'a Path,
    /// Whether what is in the record already is compared with the default once more.
    pub confirm: bool,
}

/// How it goes.
pub trait Progress {
    /// So many of all shapes are behind; this is what is measured now.
    fn at(&self, share: f64, shape: &str, what: &str);
}

/// What was measured.
#[derive(Debug)]
pub struct Outcome {
    /// The record, as written.
    pub record: Record,
    /// The model's shapes that are worth measuring, those that read most first.
    pub products: Vec<Product>,
    /// Shapes that an earlier run had measured.
    pub earlier: usize,
    /// Those of them whose choices were not confirmed, and given up at least in part.
    pub given_up: usize,
    /// What came of comparing whole steps, when that was to be done.
    pub trial: Tried,
    /// Whether other programs wanted the same cores, which makes what is measured doubtful.
    pub busy: bool,
}

/// What came of comparing whole steps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tried {
    /// There was nothing new to compare, or not all shapes were measured.
    Nothing,
    /// The time was over before.
    NoTime,
    /// Of so many choices — the kernel of a single token or all the rest, for each shape — some were given up.
    Done {
        /// All that were on trial.
        choices: usize,
        /// Those that were given up.
        given_up: usize,
    },
}

impl Outcome {
    /// Shapes for which there was no time.
    pub fn left(&self) -> usize {
        self.products.iter().filter(|product| !self.record.products.contains_key(&product.shape)).count()
    }
}

/// The products of `plan` that are worth measuring.
pub fn worth_measuring(plan: &Plan) -> Vec<Product> {
    let mut all = products(plan);
    let sum = |part: fn(&Product) -> usize| all.iter().map(part).sum::<usize>().max(1) as f64;
    let (bytes, adds) = (sum(|p| p.decode_bytes), sum(|p| p.multiply_adds));
    all.retain(|p| p.decode_bytes as f64 / bytes > LEAST_SHARE || p.multiply_adds as f64 / adds > LEAST_SHARE);
    all
}

/// The limits of this machine at `level` with `threads` threads, and whether other programs wanted the same cores meanwhile.
///
/// # Errors
/// When this machine cannot run the level's code, or has no memory.
pub fn limits_here(level: CpuLevel, threads: usize) -> Result<(Limits, bool), TuneError> {
    let compiler = Compiler::new(level)?;
    let workload = Workload::new(compiler, &Machine::this(), threads, &[])?;
    Ok((workload.limits(), workload.waited() > MOST_WAITED))
}

/// Measures what is not yet in the record at the output, shape by shape, and writes the record after each. With [`Request::confirm`] also what is. When all
/// shapes are there, compares whole steps, unless that was done with these choices.
///
/// # Errors
/// When kernels cannot be run, the first layers cannot be planned, or the record that is there is not one to go on with.
pub fn tune(request: &Request, progress: &dyn Progress) -> Result<Outcome, TuneError> {
    let Request { plan, first_layers, level, default, threads, budget, output, confirm } = *request;
    let until = Instant::now() + budget;
    let machine = Machine::this();
    let wanted = worth_measuring(plan);
    let compiler = Compiler::new(level)?;
    let earlier = if output.exists() { Some(Record::read(output)?) } else { None };
    let mut workload = Workload::new(compiler, &machine, threads, &wanted)?;
    let busy = workload.waited() > MOST_WAITED;
    let mut record = Record {
        source: output.display().to_string(),
        moec: env!("CARGO_PKG_VERSION").to_string(),
        machine,
        features: level.features,
        threads,
        limits: workload.limits(),
        team: None,
        steps: None,
        products: BTreeMap::new(),
    };
    let (mut found_before, mut given_up) = (0, 0);
    if let Some(earlier) = earlier {
        if !earlier.same_key(&record) {
            return Err(TuneError::OtherKey(record.source));
        }
        found_before = wanted.iter().filter(|product| earlier.products.contains_key(&product.shape)).count();
        // What is kept was measured against the limits of its own run.
        record = earlier;
    }
    let write = |record: &Record| Unfinished::with_content(output, record.to_toml().as_bytes())?.finish(0o666);
    // The last parts are the team's size and the whole steps.
    let part = |index: usize, share: f64| (index as f64 + share) / (wanted.len() + 2) as f64;
    for (index, product) in wanted.iter().enumerate() {
        let shape = product.shape.to_string();
        let at = |what: &str, share: f64| progress.at(part(index, share), &shape, what);
        let search = Search { workload: &mut workload, product, until, progress: &at };
        let default = default.product(product.shape);
        let earlier = record.products.get(&product.shape);
        let found = match earlier {
            Some(earlier) if confirm => search.confirm(&default, earlier),
            Some(_) => continue,
            None => search.run(&default),
        };
        match found {
            Ok(found) => {
                given_up += usize::from(earlier.is_some_and(|earlier| earlier.tuning != found.tuning));
                record.products.insert(product.shape, found);
                record.steps = None;
                write(&record)?;
            }
            Err(Ended::Time) => break,
            Err(Ended::Failed(error)) => return Err(error.into()),
        }
    }
    let whole = wanted.iter().all(|product| record.products.contains_key(&product.shape));
    if whole && record.team.is_none() {
        let mut tuned = default.clone();
        tuned.products.extend(record.products.iter().map(|(shape, found)| (*shape, found.tuning.clone())));
        let at = |share: f64| progress.at(part(wanted.len(), share), "all", "fewer threads");
        match team_size::measure(&mut workload, &wanted, &tuned, until, &at) {
            Ok(team) => {
                record.team = Some(team);
                write(&record)?;
            }
            Err(Ended::Time) => {}
            Err(Ended::Failed(error)) => return Err(error.into()),
        }
    }
    let mut tried = Tried::Nothing;
    if whole && record.steps.is_none() {
        let limits = workload.limits();
        drop(workload);
        let all = products(plan);
        let parts = trial::parts(&all, default, &record.products);
        let layers = trial::layers(plan, &limits);
        let at = |tokens: usize, share: f64| {
            progress.at(part(wanted.len() + 1, share), "whole steps", &format!("{tokens} tokens at once"));
        };
        let trial = Trial {
            first_layers,
            layers,
            level,
            threads,
            default,
            found: &record.products,
            parts: &parts,
            until,
            progress: &at,
        };
        match trial.run() {
            Ok(verdict) => {
                let given_up = trial::give_up(&mut record.products, default, &parts, &verdict.kept);
                tried = Tried::Done { choices: parts.len(), given_up };
                record.steps = Some(WholeSteps { layers, measured: verdict.measured });
                write(&record)?;
            }
            Err(Ended::Time) => tried = Tried::NoTime,
            Err(Ended::Failed(error)) => return Err(error),
        }
    }
    if !output.exists() {
        write(&record)?;
    }
    Ok(Outcome { record, products: wanted, earlier: found_before, given_up, trial: tried, busy })
}
