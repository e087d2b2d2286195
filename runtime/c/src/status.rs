//! What a call came to: a status for the program, a sentence for the person in front of it.
//!
//! [`guard`] is around every function that can fail: it keeps panics out of C and the sentence for [`moec_error_text`].

use moec_runtime::Error;
use std::cell::{Cell, RefCell};
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

/// What a call came to. `moec_error_text` says more.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// An argument is null or out of its range. Nothing was done.
    InvalidArgument = 1,
    /// A handle was never given out, was freed, or is of another kind. Nothing was done.
    InvalidHandle = 2,
    /// Another call is using the session. Nothing was done.
    Busy = 3,
    /// The place for the result is too small. Nothing was written but the size that is needed.
    TooSmall = 4,
    /// The object was compiled for another version of the interface, or its descriptor is damaged.
    AbiMismatch = 5,
    /// The CPU cannot run the model's code.
    Cpu = 6,
    /// The weights cannot be read, are damaged, or belong to another model.
    Weights = 7,
    /// Not enough memory.
    OutOfMemory = 8,
    /// Threads could not be started.
    Threads = 9,
    /// The tokens do not fit into the context. The session is as before.
    ContextFull = 10,
    /// A token id is outside the vocabulary. The session is as before.
    BadToken = 11,
    /// The session cannot go back that far.
    BadRewind = 12,
    /// The session has no logits: feed it first.
    NoLogits = 13,
    /// The model has no tokenizer, or it failed.
    Tokenizer = 14,
    /// A text is not UTF-8.
    NotUtf8 = 15,
    /// The model has no chat template, or it failed, or it refuses the conversation.
    Chat = 16,
    /// A session's file cannot be read or written.
    File = 17,
    /// A session's file is damaged, or belongs to another model.
    BadSessionFile = 18,
    /// The call was cancelled, or a callback stopped it.
    Stopped = 19,
    /// A bug in moec. The session or model that was used must be freed.
    Bug = 20,
}

/// A status and its sentence.
#[derive(Debug)]
pub(crate) struct Failure {
    pub status: Status,
    pub text: String,
}

pub(crate) type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    pub fn new(status: Status, text: impl Into<String>) -> Failure {
        Failure { status, text: text.into() }
    }

    pub fn argument(text: impl Into<String>) -> Failure {
        Failure::new(Status::InvalidArgument, text)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let status = match &error {
            Error::Descriptor { .. } | Error::AbiVersion { .. } => Status::AbiMismatch,
            Error::CpuFeatures { .. } | Error::UnknownLevel { .. } => Status::Cpu,
            Error::PayloadFile { .. }
            | Error::PayloadLost { .. }
            | Error::PayloadDamaged { .. }
            | Error::PayloadForeign { .. } => Status::Weights,
            Error::Memory { .. } => Status::OutOfMemory,
            Error::ContextFull { .. } => Status::ContextFull,
            Error::Token { .. } => Status::BadToken,
            Error::StepSize { .. } | Error::NoTokens => Status::InvalidArgument,
            Error::NoLogits => Status::NoLogits,
            Error::Rewind { .. } | Error::RewindForward { .. } => Status::BadRewind,
            Error::SessionFile { .. } => Status::File,
            Error::SessionDamaged { .. } | Error::SessionForeign { .. } => Status::BadSessionFile,
            Error::Threads { .. } => Status::Threads,
            Error::NoTokenizer | Error::Tokenizer { .. } => Status::Tokenizer,
            Error::NoChatTemplate | Error::ChatTemplate { .. } | Error::ChatRefused { .. } => Status::Chat,
            Error::Interrupted => Status::Stopped,
            Error::Constraint { .. } | Error::NoRoutes => Status::InvalidArgument,
        };
        Failure { status, text: error.to_string() }
    }
}

thread_local! {
    static TEXT: RefCell<CString> = RefCell::default();
    /// This thread is inside a call from C.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
    /// What a panic inside a call said.
    static PANIC: RefCell<String> = RefCell::default();
}

/// The sentence of the last call on this thread that did not return `MOEC_OK`: what went wrong, with what was expected and what was found, and
/// what to do. Never null; empty before the first failure. Valid until the next call of this API on the same thread that fails. Any thread may
/// call it; each sees its own.
#[unsafe(no_mangle)]
pub extern "C" fn moec_error_text() -> *const c_char {
    TEXT.try_with(|text| text.borrow().as_ptr()).unwrap_or(c"this thread is ending".as_ptr())
}

/// Runs `call` so that nothing but a status gets out.
pub(crate) fn guard(call: impl FnOnce() -> Result<()>) -> Status {
    keep_panics_silent();
    let outer = INSIDE.replace(true);
    // What a panic may leave half-done is behind a mutex, which it poisons.
    let result = catch_unwind(AssertUnwindSafe(call));
    INSIDE.set(outer);
    let failure = match result {
        Ok(Ok(())) => return Status::Ok,
        Ok(Err(failure)) => failure,
        Err(_) => {
            let what = PANIC.take();
            Failure::new(Status::Bug, format!("bug in moec: {what}; please report it"))
        }
    };
    let text = CString::new(failure.text.replace('\0', "?")).unwrap_or_default();
    TEXT.with(|last| *last.borrow_mut() = text);
    failure.status
}

/// Panics inside calls, and on the model's own threads, are kept for the error's text instead of being printed.
fn keep_panics_silent() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let outer = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if INSIDE.get() {
                PANIC.set(panic.to_string().replace('\n', " "));
            } else if std::thread::current().name().is_none_or(|name| !name.starts_with("moec-")) {
                outer(panic);
            }
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    fn text() -> String {
        // SAFETY: the text of this thread, until the next failure.
        unsafe { CStr::from_ptr(moec_error_text()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_panic_is_a_status() {
        assert_eq!(guard(|| Ok(())), Status::Ok);
        assert_eq!(guard(|| panic!("seven {}", 7)), Status::Bug);
        assert!(text().starts_with("bug in moec: ") && text().contains("seven 7"), "{}", text());
        assert_eq!(guard(|| Err(Failure::argument("a\0b"))), Status::InvalidArgument);
        assert_eq!(text(), "a?b");
        assert_eq!(guard(|| Ok(())), Status::Ok);
        assert_eq!(text(), "a?b", "success leaves the text alone");
        std::thread::spawn(|| assert_eq!(text(), "")).join().unwrap();
    }
}
