//! The C API of a compiled model, `moec.h`: a thin layer over the crate `moec-runtime`.
//!
//! A C program holds *handles*, which are numbers and not addresses: a handle that was freed, or was never given out, is refused and does no harm
//! ([`handles`]). Every function that can fail returns a [`moec_status`](status::Status) and leaves a sentence for `moec_error_text`
//! ([`status`]). Pointers are checked where that is possible ([`pointers`]). Nothing prints, exits or unwinds into C.
//!
//! The header is made of this crate by cbindgen (`tests/headers.rs`). Deliberately absent: anything that the runtime does not do.
#![warn(missing_docs)]

mod generate;
mod handles;
mod model;
mod pointers;
mod session;
mod status;
mod text;

pub use generate::{GenerateFn, NO_TOKEN, moec_generate};
pub use handles::{ModelHandle, SessionHandle};
pub use model::{
    API_VERSION, Info, Memory, Options, Pooling, moec_api_version, moec_close, moec_embed, moec_info, moec_is_end,
    moec_memory, moec_open, moec_open_fd, moec_open_memory, moec_options_default,
};
pub use session::{
    Sampling, moec_cancel, moec_feed, moec_feed_all, moec_fork, moec_load, moec_logits, moec_rewind, moec_sample,
    moec_sampling_default, moec_save, moec_session_free, moec_session_new, moec_set_sampling, moec_tokens,
};
pub use status::{Status, moec_error_text};
pub use text::{Message, moec_chat, moec_detokenize, moec_tokenize};
