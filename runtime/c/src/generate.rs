//! Generation with a callback.

use crate::handles::{SessionHandle, SessionState};
use crate::session::with;
use crate::status::{Failure, Result, Status, guard};
use moec_runtime::{Error, Logits, TextStream};
use std::ffi::{c_char, c_int, c_void};
use std::sync::atomic::Ordering;

/// Called for each new token, in order, on the thread that called `moec_generate`: `token`; the piece of text that is certain now, `text_bytes` bytes
/// of UTF-8 and a NUL, often empty (and always without a tokenizer), valid during the call; and `user` as given. Returns 0 to go on. It may use
/// other sessions, but not this one, and must not be left by an exception or `longjmp`.
pub type GenerateFn =
    Option<unsafe extern "C" fn(user: *mut c_void, token: u32, text: *const c_char, text_bytes: usize) -> c_int>;

/// Stands in a last call for no token: only text that was held back.
pub const NO_TOKEN: u32 = u32::MAX;

/// Goes on from the session's logits by its sampling, for at most `max_tokens` tokens (0 for as many as fit), until the model ends its text, the
/// context is full, or `callback` returns something else than 0. Afterwards every token that the callback saw is in the session, so that
/// another call goes on as if there had been one; a token that ends the text is neither shown nor fed. When text is left at the end, the callback gets
/// it with the token `MOEC_NO_TOKEN`. `callback` may be null. `*generated` (or null) takes the number of tokens.
///
/// Errors: `MOEC_NO_LOGITS`; `MOEC_STOPPED` when the callback or `moec_cancel` ended it; `MOEC_OUT_OF_MEMORY`, `MOEC_TOKENIZER`, `MOEC_BUSY`,
/// `MOEC_INVALID_HANDLE`.
///
/// # Safety
/// `callback` is null or such a function, and `generated` null or a place for a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moec_generate(
    session: *mut SessionHandle,
    max_tokens: usize,
    callback: GenerateFn,
    user: *mut c_void,
    generated: *mut usize,
) -> Status {
    guard(|| {
        let mut count = 0;
        let done = with(session, |state| {
            let model = state.session.model().clone();
            let stream = match (callback, model.payload().tokenizer()) {
                (Some(_), Some(_)) => Some(model.tokenizer()?.stream()),
                _ => None,
            };
            let show = |token: u32, text: &str| match callback {
                Some(callback) => {
                    let text: Vec<u8> = text.bytes().chain([0]).collect();
                    // SAFETY: the caller vouches for the function; the text lives during the call.
                    unsafe { callback(user, token, text.as_ptr().cast(), text.len() - 1) == 0 }
                }
                None => true,
            };
            generate(state, max_tokens, stream, &mut count, show)
        });
        if !generated.is_null() {
            // SAFETY: as the caller says.
            unsafe { generated.write_unaligned(count) };
        }
        done
    })
}

fn generate(
    state: &mut SessionState,
    max_tokens: usize,
    mut stream: Option<TextStream<'_>>,
    count: &mut usize,
    show: impl Fn(u32, &str) -> bool,
) -> Result<()> {
    let limit = if max_tokens == 0 { usize::MAX } else { max_tokens };
    let mut go_on = true;
    let mut cancelled = false;
    while go_on && !cancelled && *count < limit {
        let session = &mut state.session;
        let logits = session.try_last_logits().ok_or(Error::NoLogits)?;
        if session.room() == 0 {
            break;
        }
        let token = state.sampler.sample(logits, session.tokens());
        if session.model().is_end(token) {
            break;
        }
        let text = stream.as_mut().map(|stream| stream.push(token)).transpose()?.unwrap_or_default();
        go_on = show(token, &text);
        match session.feed(&[token], Logits::Last) {
            // Nothing was fed, but the token was shown.
            Err(Error::Interrupted) => {
                state.cancel.store(false, Ordering::Relaxed);
                session.feed(&[token], Logits::Last)?;
                cancelled = true;
            }
            fed => fed?,
        }
        *count += 1;
    }
    if let Some(rest) =
        stream.map(TextStream::finish).transpose()?.filter(|rest| go_on && !cancelled && !rest.is_empty())
    {
        go_on = show(NO_TOKEN, &rest);
    }
    if cancelled {
        return Err(Error::Interrupted.into());
    }
    if go_on { Ok(()) } else { Err(Failure::new(Status::Stopped, "the callback stopped the generation")) }
}
