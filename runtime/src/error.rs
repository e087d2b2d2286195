//! Everything that can go wrong in the runtime, each as one sentence that says whose fault it is and what to do.
//!
//! Deliberately absent: wrapping with context. An error names the file, tensor or limit itself, so that the program on
//! top can print it as it is.

use std::path::PathBuf;

/// Result of a runtime function.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The descriptor is not one, or contradicts itself.
    #[error("the model's descriptor is damaged: {what}; build the model again")]
    Descriptor {
        /// What was expected and what was found.
        what: String,
    },
    /// The object was compiled for another version of the interface.
    #[error(
        "the model was compiled for version {found} of the runtime's interface, but is linked with version {expected}: \
         build it again with one version of moec"
    )]
    AbiVersion {
        /// Version of this runtime.
        expected: u32,
        /// Version in the descriptor or payload.
        found: u32,
    },
    /// No level of the model's code runs on this CPU.
    #[error(
        "this CPU lacks {missing}, which the model's code for {level} needs: {remedy} (this model was compiled for \
         {compiled})"
    )]
    CpuFeatures {
        /// The level that needs least.
        level: String,
        /// Features that this CPU does not have.
        missing: String,
        /// All levels compiled in.
        compiled: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// The caller asked for a level that is not compiled in.
    #[error("the model has no code for {asked}; it was compiled for {compiled}")]
    UnknownLevel {
        /// The name asked for.
        asked: String,
        /// All levels compiled in.
        compiled: String,
    },
    /// The file that should carry the weights could not be opened or mapped.
    #[error("cannot read the weights from {}: {source}; check that the file exists and may be read", path.display())]
    PayloadFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The executable's end does not say where its weights are.
    #[error(
        "{} has lost its weights ({what}): it was stripped, truncated or not copied to its end; copy the original again \
         or rebuild it, and do not strip it", path.display()
    )]
    PayloadLost {
        /// The file.
        path: PathBuf,
        /// What was found at its end.
        what: String,
    },
    /// The weights are there but not whole.
    #[error("the weights in {} are damaged ({what}); copy the file again or rebuild it", path.display())]
    PayloadDamaged {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        what: String,
    },
    /// The weights are those of another build.
    #[error(
        "the weights in {} belong to another model or another build (key {found}, this code needs {expected}); use the \
         weights that were written together with this code", path.display()
    )]
    PayloadForeign {
        /// The file.
        path: PathBuf,
        /// Key in the descriptor, in hexadecimal digits.
        expected: String,
        /// Key in the file.
        found: String,
    },
    /// Memory that the model cannot do without is not there.
    #[error("not enough memory: {what} needs {need}, but only {available} is available; {remedy}")]
    Memory {
        /// What it is for.
        what: String,
        /// How much is needed, for people.
        need: String,
        /// How much there is, for people.
        available: String,
        /// What to do.
        remedy: String,
    },
    /// The sequence does not fit into the context that the model was built for.
    #[error(
        "the text does not fit: it has {tokens} tokens and the model was built for a context of {context}; shorten it, or \
         rebuild with a larger `--context` if the model allows it"
    )]
    ContextFull {
        /// Tokens that the sequence would have.
        tokens: usize,
        /// The model's limit.
        context: usize,
    },
    /// A token id that the model does not know.
    #[error("token id {id} does not exist: the model's vocabulary has {vocab} tokens, 0 to {}", vocab - 1)]
    Token {
        /// The id.
        id: u32,
        /// Size of the vocabulary.
        vocab: u32,
    },
    /// A step without tokens, or with more than the model takes at once.
    #[error("a step takes 1 to {max} tokens, not {tokens}")]
    StepSize {
        /// What was asked for.
        tokens: usize,
        /// The model's limit.
        max: usize,
    },
    /// Nothing to compute with.
    #[error("there are no tokens: give at least one")]
    NoTokens,
    /// No logits to choose a token by.
    #[error(
        "the session has no logits: feed it at least one token (after going back to earlier tokens, go back by one more and feed \
         that token again)"
    )]
    NoLogits,
    /// Going back to where keys and values have already been given up.
    #[error(
        "cannot go back to position {to}: the sliding window has moved on and the keys and values before {kept} are gone; \
         clear the session and feed its tokens again"
    )]
    Rewind {
        /// The position asked for.
        to: usize,
        /// First position still kept.
        kept: usize,
    },
    /// Going back to where the session has not been.
    #[error("cannot go back to position {to}: the session has {tokens} tokens")]
    RewindForward {
        /// The position asked for.
        to: usize,
        /// Tokens of the session.
        tokens: usize,
    },
    /// A session's file cannot be read or written.
    #[error("cannot {doing} the session {}: {source}; check the path, its permissions and the disk's room", path.display())]
    SessionFile {
        /// Read or write.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A session's file is not whole, or is none.
    #[error("{} is no whole saved session ({what}); save it again, or feed its tokens again", path.display())]
    SessionDamaged {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        what: String,
    },
    /// A session was saved by another model.
    #[error(
        "the session {} belongs to another model or another build ({what}); load it with the model that saved it, or feed \
         its tokens again", path.display()
    )]
    SessionForeign {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// A worker thread could not be started.
    #[error("cannot start {threads} threads: {source}; ask for fewer with `--threads`")]
    Threads {
        /// How many were wanted.
        threads: usize,
        /// Why.
        source: std::io::Error,
    },
    /// The payload has no tokenizer.
    #[error(
        "the model carries no tokenizer (its directory had no tokenizer.json): give token ids with `--tokens` and take \
         them with `--print-tokens`"
    )]
    NoTokenizer,
    /// The tokenizer does not load or does not do its work.
    #[error("the model's tokenizer failed: {what}; check tokenizer.json in the model's directory and rebuild")]
    Tokenizer {
        /// The tokenizer's own message.
        what: String,
    },
    /// The payload has no chat template.
    #[error(
        "the model carries no chat template (its directory had neither chat_template.jinja nor `chat_template` in \
         tokenizer_config.json): it is no chat model; use plain text, or add the template and rebuild"
    )]
    NoChatTemplate,
    /// The chat template does not compile or does not run.
    #[error("the model's chat template failed: {what}; check chat_template in the model's directory and rebuild")]
    ChatTemplate {
        /// Jinja's message, with the line.
        what: String,
    },
    /// The chat template refuses the conversation.
    #[error("the model's chat template refuses this conversation: {what}")]
    ChatRefused {
        /// The template's own words.
        what: String,
    },
    /// A dense model has no routes.
    #[error("this model has no experts, so there are no routes to show or count")]
    NoRoutes,
    /// A constrained answer cannot go on.
    #[error("the rule for the answer cannot be followed: {what}")]
    Constraint {
        /// Why, from the rule itself.
        what: String,
    },
    /// The interrupt flag was set.
    #[error("interrupted")]
    Interrupted,
}

/// A number of bytes for people: `512 B`, `1.5 MB`, in powers of 1000.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["kB", "MB", "GB", "TB", "PB"];
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1000.0;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_for_people() {
        assert_eq!(human_bytes(0), "0 B");
        assert_eq!(human_bytes(999), "999 B");
        assert_eq!(human_bytes(1500), "1.5 kB");
        assert_eq!(human_bytes(999_960), "1.0 MB");
        assert_eq!(human_bytes(26_400_000_000), "26.4 GB");
        assert_eq!(hex(&[0, 255, 16]), "00ff10");
    }
}
