//! The runtime: what a compiled model is linked with.
//!
//! On the way from a model's descriptor to text: [`Model::open`] checks the [descriptor](model), maps the
//! [payload] and starts the [threads]; a [`Session`] keeps a sequence's [pages](kv) and sends tokens through the
//! generated code, one [step] at a time; a [`Sampler`] chooses from the logits; a [`Tokenizer`] makes text of ids. For many
//! texts at once there is a [`Scheduler`](scheduler::Scheduler), which batches their steps.
//!
//! Deliberately absent: the compiler and everything it knows about the inside of a model; printing and exiting; command
//! lines and servers, which are the crate `moec-app`.
#![warn(missing_docs)]

/// Includes what `moec::build` made in a build script, as a module `NAME` with `descriptor()`, the [`Descriptor`](crate::Descriptor), and
/// `WEIGHTS`, the path of the weights as they were built.
///
/// ```ignore
/// moec_runtime::include_model!(mixtral);
/// let model = Model::open(mixtral::descriptor()?, &Options::weights(mixtral::WEIGHTS))?;
/// ```
#[macro_export]
macro_rules! include_model {
    ($name:ident) => {
        /// The model that the build script compiled.
        mod $name {
            include!(concat!(env!("OUT_DIR"), "/", stringify!($name), ".rs"));
        }
    };
}

#[doc(hidden)]
pub use moec_abi as abi;

pub mod barrier;
#[cfg(test)]
mod barrier_tests;
pub mod cgroup;
pub mod chat_template;
pub mod cpus;
pub mod embed;
pub mod error;
pub mod expert_counts;
mod futex;
pub mod generate;
pub mod kv;
pub mod logprobs;
pub mod math;
pub mod memory;
pub mod model;
pub mod payload;
pub mod profile;
pub mod sampler;
pub mod saved;
pub mod scheduler;
pub mod session;
pub mod step;
mod sync;
pub mod text;
pub mod threads;

pub use chat_template::{ChatTemplate, Message};
pub use error::{Error, Result};
pub use generate::Generation;
pub use model::{Descriptor, Model, Options};
pub use payload::{Payload, PayloadSource};
pub use sampler::{Sampler, Sampling};
pub use session::Session;
pub use step::{LogitRows, Logits, Part, Routes};
pub use text::{Matched, StopMatcher, TextStream, Tokenizer};
pub use threads::{Pool, PoolOptions};
