//! The rewrites between import and plan, one file each, in the order of [`PASSES`].
//!
//! A pass finds places and describes each rewrite as a [`Patch`]; [`run`] applies them one at a time. Every pass preserves the
//! bits that the evaluator gives, so each can be left out, except the last, which the plan relies on. In debug builds
//! the verifier runs after each. Deliberately absent: memory, workers and code, which begin with the plan.

pub mod drop_dead;
pub mod fold_constants;
pub mod fuse_gate_up;
pub mod fuse_norm_quantize;
pub mod fuse_qkv;
pub mod fuse_residual;
pub mod fuse_rope_store;
mod matching;
pub mod quantization;
pub mod quantize_activations;
pub mod select_kernels;
pub mod specialize_dispatch;

pub use quantization::{HotExperts, QuantConfig, QuantError};

use std::fmt;
use std::str::FromStr;

use moec_ir::graph::{Graph, Patch, PatchError, Stage, VerifyError, verify};

/// A pass.
#[derive(Debug)]
pub struct Pass {
    /// The verb it goes by, as its file does.
    pub name: &'static str,
    /// What it does, in a line.
    pub doc: &'static str,
    /// Whether the plan relies on it.
    pub required: bool,
    /// Does it.
    run: fn(&mut Rewriter<'_>) -> Result<(), PatchError>,
}

macro_rules! passes {
    ($($name:ident $required:literal $doc:literal;)*) => {
        /// All passes, in the order in which they run.
        pub const PASSES: &[Pass] = &[
            $( Pass { name: stringify!($name), doc: $doc, required: $required, run: $name::run }, )*
        ];
    };
}

passes! {
    fold_constants false "drops windows and slices that leave everything as it is";
    fuse_qkv false "multiplies with the rows of q, k and v at once";
    fuse_rope_store false "rotates and stores keys and values where they are computed";
    fuse_gate_up false "multiplies with gate and up at once, with the activation in the epilogue";
    fuse_residual false "adds the residual where the last projection of a block is computed";
    specialize_dispatch false "fits the dispatch to experts to one token, or groups a batch by expert";
    quantize_activations false "quantizes rows once for all the quantized weights that they meet";
    fuse_norm_quantize false "quantizes normed rows while they are at hand";
    drop_dead false "removes what nobody reads";
    select_kernels true "resolves layouts and chooses a family of kernels for each operation on weights";
}

/// A pass by its place in [`PASSES`]; parses from its name and prints it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PassId(usize);

impl PassId {
    /// All of them, in order.
    pub fn all() -> impl Iterator<Item = PassId> {
        (0..PASSES.len()).map(PassId)
    }

    /// The pass.
    pub fn pass(self) -> &'static Pass {
        &PASSES[self.0]
    }
}

impl fmt::Display for PassId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.pass().name)
    }
}

impl FromStr for PassId {
    type Err = PassError;

    fn from_str(name: &str) -> Result<PassId, PassError> {
        PassId::all().find(|id| id.pass().name == name).ok_or_else(|| PassError::Unknown(name.into()))
    }
}

/// What to run and how far.
#[derive(Clone, Default, Debug)]
pub struct Options {
    /// Passes to leave out.
    pub disabled: Vec<PassId>,
    /// The last pass to run; all of them when there is none.
    pub stop_after: Option<PassId>,
    /// Rewrites to apply at most, over all passes that are not required: halving it finds the one that breaks a model.
    pub stop_after_rewrites: Option<usize>,
    /// The layouts of weights.
    pub quant: QuantConfig,
    /// Experts for which it does not hold.
    pub hot: Option<HotExperts>,
}

/// What one pass did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    /// The pass.
    pub pass: PassId,
    /// The labels of its rewrites, in order.
    pub rewrites: Vec<String>,
}

/// What all passes did, in order.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Trace {
    /// One for each pass that ran.
    pub steps: Vec<Step>,
}

impl fmt::Display for Trace {
    /// One rewrite a line, numbered from 1: with `--stop-after-rewrites n`, number n is the last.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut number = 0;
        for step in &self.steps {
            for label in &step.rewrites {
                number += 1;
                writeln!(f, "{number:4} {}: {label}", step.pass)?;
            }
        }
        Ok(())
    }
}

/// Why passes did not run to the end.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PassError {
    /// No pass has this name.
    #[error("there is no pass `{0}`; there are {names}", names = PASSES.iter().map(|p| p.name).collect::<Vec<_>>().join(", "))]
    Unknown(String),
    /// A pass that cannot be left out.
    #[error("{0} cannot be disabled: nothing can be planned without it")]
    Required(PassId),
    /// A rewrite does not fit.
    #[error("{pass}: {error}")]
    Patch {
        /// The pass.
        pass: PassId,
        /// What does not fit.
        error: PatchError,
    },
    /// A pass broke the graph.
    #[error("bug in moec: {pass} broke the graph: {error}")]
    Broken {
        /// The pass.
        pass: PassId,
        /// The rule that it broke.
        error: VerifyError,
    },
}

/// Assigns layouts and runs the passes.
///
/// # Errors
/// A required pass is disabled, or there is a bug in a pass.
pub fn run(graph: &mut Graph, options: &Options) -> Result<Trace, PassError> {
    if let Some(&pass) = options.disabled.iter().find(|id| id.pass().required) {
        return Err(PassError::Required(pass));
    }
    options.quant.assign_with(graph, options.hot.as_ref());
    let mut trace = Trace::default();
    let mut budget = options.stop_after_rewrites;
    for id in PassId::all() {
        if !options.disabled.contains(&id) {
            let rewrites = run_pass(graph, id, budget.filter(|_| !id.pass().required))?;
            budget = budget.map(|left| left.saturating_sub(rewrites.len()));
            trace.steps.push(Step { pass: id, rewrites });
        }
        if options.stop_after == Some(id) {
            break;
        }
    }
    Ok(trace)
}

/// Runs one pass, with as many rewrites as `budget` allows, and gives their labels.
///
/// # Errors
/// A bug in the pass.
pub fn run_pass(graph: &mut Graph, id: PassId, budget: Option<usize>) -> Result<Vec<String>, PassError> {
    graph.set_stage(Stage::Fused);
    let mut rewriter = Rewriter { graph, budget, labels: Vec::new() };
    (id.pass().run)(&mut rewriter).map_err(|error| PassError::Patch { pass: id, error })?;
    let rewrites = rewriter.labels;
    if cfg!(debug_assertions) || id.pass().required {
        verify(graph).map_err(|error| PassError::Broken { pass: id, error })?;
    }
    Ok(rewrites)
}

/// What a pass works on: the graph, and how many rewrites it may still apply.
struct Rewriter<'a> {
    graph: &'a mut Graph,
    budget: Option<usize>,
    labels: Vec<String>,
}

impl Rewriter<'_> {
    /// Applies a patch, unless the budget is spent: then the graph stays as it is.
    fn apply(&mut self, patch: Patch) -> Result<(), PatchError> {
        if self.budget.is_some_and(|budget| self.labels.len() >= budget) {
            return Ok(());
        }
        let label = patch.label().to_string();
        patch.apply(self.graph)?;
        self.labels.push(label);
        Ok(())
    }

    /// Applies what `rewrite` finds at each node that was there in the beginning, in schedule order.
    fn each_node(
        &mut self,
        rewrite: impl Fn(&Graph, moec_ir::graph::NodeId) -> Result<Option<Patch>, PatchError>,
    ) -> Result<(), PatchError> {
        for node in self.graph.nodes().collect::<Vec<_>>() {
            if self.graph.get(node).is_some()
                && let Some(patch) = rewrite(self.graph, node)?
            {
                self.apply(patch)?;
            }
        }
        Ok(())
    }
}
