//! Sessions: feeding, reading logits, forking, going back, files, sampling.

use crate::handles::{self, ModelHandle, SessionHandle, SessionState};
use crate::pointers::{Place, not_null, path, slice};
use crate::status::{Failure, Result, Status, guard};
use moec_runtime::{Error, Logits, Sampler, Session};
use std::sync::TryLockError;
use std::sync::atomic::Ordering;

/// How tokens are chosen: begin with `moec_sampling_default` and change what should be different.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Sampling {
    /// Size of this struct, set by `moec_sampling_default`.
    pub struct_bytes: usize,
    /// Divides the logits; 0 takes the most probable token always.
    pub temperature: f32,
    /// Only the most probable tokens that together reach this probability; 1 for all.
    pub top_p: f32,
    /// Only tokens at least this many times as probable as the best; 0 for all.
    pub min_p: f32,
    /// Divides positive logits, and multiplies negative ones, of tokens among the last `repeat_last`; 1 for none.
    pub repeat_penalty: f32,
    /// Only so many of the most probable tokens; 0 for all.
    pub top_k: u32,
    /// How many of the session's last tokens `repeat_penalty` looks at.
    pub repeat_last: u32,
    /// Seed of the random numbers: the same seed, logits and settings give the same tokens on every machine.
    pub seed: u64,
}

/// Runs `call` with the session of a handle, if nobody else does.
pub(crate) fn with<T>(handle: *const SessionHandle, call: impl FnOnce(&mut SessionState) -> Result<T>) -> Result<T> {
    let open = handles::session(handle)?;
    let mut state = match open.state.try_lock() {
        Ok(state) => state,
        Err(TryLockError::WouldBlock) => {
            let text = "the session is in use by another call (or by the call whose callback this is): one at a time";
            return Err(Failure::new(Status::Busy, text));
        }
        Err(TryLockError::Poisoned(_)) => {
            return Err(Failure::new(Status::Bug, "an earlier call with this session ended by a bug in moec: free it"));
        }
    };
    open.cancel.store(false, Ordering::Relaxed);
    call(&mut state)
}

/// Makes an empty session of `model` in `*session`; free it with `moec_session_free`. It takes no memory to speak of before tokens are fed. Any
/// thread may call it. A session may move between threads, but is used by one call at a time: another one gets `MOEC_BUSY`. Steps of
/// different sessions of a model take turns.
///
/// Errors: `MOEC_INVALID_HANDLE`, `MOEC_INVALID_ARGUMENT` for null.
///
/// # Safety
/// `session` is null or a place for a handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moec_session_new(model: *const ModelHandle, session: *mut *mut SessionHandle) -> Status {
    guard(|| {
        let model = handles::model(model)?;
        // SAFETY: as the caller says.
        unsafe { give_out(Session::new(&model), greedy(), session) }
    })
}

fn greedy() -> Sampler {
    Sampler::new(moec_runtime::Sampling::default())
}

/// # Safety
/// `to` is null or a place for a handle.
unsafe fn give_out(session: Session, sampler: Sampler, to: *mut *mut SessionHandle) -> Result<()> {
    not_null(to, "session")?;
    let handle = handles::new_session(session, sampler)?;
    // SAFETY: as the caller says.
    unsafe { to.write_unaligned(handle) };
    Ok(())
}

/// Frees a session; null is allowed. Other sessions, forks of it too, are not touched. Any thread may call it; a call that uses the session
/// meanwhile goes on to its end.
///
/// Errors: `MOEC_INVALID_HANDLE` for a session that is not open.
#[unsafe(no_mangle)]
pub extern "C" fn moec_session_free(session: *mut SessionHandle) -> Status {
    guard(|| if session.is_null() { Ok(()) } else { handles::free_session(session) })
}

/// Sends `count` tokens through the model, after those that the session has. Afterwards `moec_logits` has the logits after the last of them. The
/// result does not depend on how the tokens are divided among calls. No tokens are no error, and change nothing.
///
/// Errors: `MOEC_BAD_TOKEN`, `MOEC_CONTEXT_FULL`, `MOEC_OUT_OF_MEMORY`: the session is as before. `MOEC_STOPPED` after `moec_cancel`: the session has
/// some of the tokens (`moec_tokens`). `MOEC_BUSY`, `MOEC_INVALID_HANDLE`, `MOEC_INVALID_ARGUMENT`.
///
/// # Safety
/// `tokens` points to `count` ids.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moec_feed(session: *mut SessionHandle, tokens: *const u32, count: usize) -> Status {
    guard(|| {
        with(session, |state| {
            // SAFETY: as the caller says.
            let tokens = unsafe { slice(tokens, count, "tokens") }?;
            Ok(state.session.feed(tokens, Logits::Last)?)
        })
    })
}

/// As `moec_feed`, and writes the logits after every one of the tokens to `logits`: `count` rows of `moec_model_info.vocab` floats. `capacity` is the
/// number of floats that have room there.
///
/// Errors: as `moec_feed`, and `MOEC_TOO_SMALL`: the session is as before.
///
/// # Safety
/// `tokens` points to `count` ids, and `logits` to room for `capacity` floats.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moec_feed_all(
    session: *mut SessionHandle,
    tokens: *const u32,
    count: usize,
    logits: *mut f32,
    capacity: usize,
) -> Status {
    guard(|| {
        with(session, |state| {
            // SAFETY: as the caller says.
            let tokens = unsafe { slice(tokens, count, "tokens") }?;
            let vocab = state.session.model().descriptor().vocab as usize;
            let needed = count.saturating_mul(vocab);
            if needed > capacity {
                let text = format!(
                    "{count} rows of {vocab} logits need room for {needed} floats, there is room for {capacity}"
                );
                return Err(Failure::new(Status::TooSmall, text));
            }
            if needed > 0 {
                not_null(logits, "logits")?;
            }
            let write = |row: usize, values: &[f32]| {
                // SAFETY: there is room for `count` rows; the rows are the session's own memory.
                unsafe {
                    logits.add(row * vocab).cast::<u8>().copy_from_nonoverlapping(values.as_ptr().cast(), vocab * 4)
                };
            };
            Ok(state.session.feed_each(tokens, write)?)
        })
    })
}

/// Writes the logits after the session's last token to `logits`: `moec_model_info.vocab` floats; `capacity` have room. `*needed` (or null) takes how many
/// there are; with null `logits` and capacity 0 that is all.
///
/// Errors: `MOEC_NO_LOGITS` for a session that was not fed, or not since `moec_rewind`; `MOEC_TOO_SMALL`, `MOEC_BUSY`, `MOEC_INVALID_HANDLE`,
/// `MOEC_INVALID_ARGUMENT`.
///
/// # Safety
/// The pointers are null or have the room that is said.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moec_logits(
    session: *const SessionHandle,
    logits: *mut f32,
    capacity: usize,
    needed: *mut usize,
) -> Status {
    guard(|| {
        let place = Place::new(logits, capacity, needed, "logits")?;
        // SAFETY: as the caller says.
        with(session, |state| unsafe { place.fill(state.session.try_last_logits().ok_or(Error::NoLogits)?) })
    })
}

/// Writes the session's tokens to `tokens`; `capacity` have room. `*needed` (or null) takes how many there are; with null `tokens` and capacity 0
/// that is all.
///
/// Errors: `MOEC_TOO_SMALL`, `MOEC_BUSY`, `MOEC_INVALID_HANDLE`, `MOEC_INVALID_ARGUMENT`.
///
/// # Safety
/// The pointers are null or have the room that is said.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moec_tokens(
    session: *const SessionHandle,
    tokens: *mut u32,
    capacity: usize,
    needed: *mut usize,
) -> Status {
    guard(|| {
        let place = Place::new(tokens, capacity, needed, "tokens")?;
        // SAFETY: as the caller says.
        with(session, |state| unsafe { place.fill(state.session.tokens()) })
    })
}

/// Makes another session in `*fork` with the same tokens, logits and sampling (its random numbers begin anew), over shared keys and values: it is made
/// at once, whatever the length, and memory is taken only where the two go different ways. Free both.
///
/// Errors: `MOEC_BUSY`, `MOEC_INVALID_HANDLE`, `MOEC_INVALID_ARGUMENT` for null.
///
/// # Safety
/// `fork` is null or a place for a handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moec_fork(session: *const SessionHandle, fork: *mut *mut SessionHandle) -> Status {
    guard(|| {
        let (session, sampler) =
            with(session, |state| Ok((state.session.fork(), Sampler::new(state.sampler.settings().clone()))))?;
        // SAFETY: as the caller says.
        unsafe { give_out(session, sampler, fork) }
    })
}

/// Goes back to the first `count` tokens. The logits are gone then (unless all tokens stay): to choose again in the same place, go back one token
/// more and feed that token again, or fork before.
///
/// Errors: `MOEC_BAD_REWIND` when there are fewer tokens, or what a sliding window has left behind would be needed; the session is as before.
/// `MOEC_BUSY`, `MOEC_INVALID_HANDLE`.
#[unsafe(no_mangle)]
pub extern "C" fn moec_rewind(session: *mut SessionHandle, count: usize) -> Status {
    guard(|| with(session, |state| Ok(state.session.rewind(count)?)))
}

/// Writes the session (tokens, keys and values, logits; not the sampling) to the file `path`, which is replaced when all is written.
///
/// Errors: `MOEC_FILE`, `MOEC_BUSY`, `MOEC_INVALID_HANDLE`, `MOEC_INVALID_ARGUMENT`.
///
/// # Safety
/// `path` is null or a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moec_save(session: *const SessionHandle, file: *const std::ffi::c_char) -> Status {
    guard(|| {
        // SAFETY: as the caller says.
        let file = unsafe { path(file, "file") }?;
        with(session, |state| Ok(state.session.save(&file)?))
    })
}

/// Makes a session in `*session` from a file that `moec_save` wrote with the same model: it goes on with the same bits. Free it with
/// `moec_session_free`.
///
/// Errors: `MOEC_FILE`, `MOEC_BAD_SESSION_FILE`, `MOEC_OUT_OF_MEMORY`, `MOEC_INVALID_HANDLE`, `MOEC_INVALID_ARGUMENT`.
///
/// # Safety
/// `file` is null or a C string, and `session` null or a place for a handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moec_load(
    model: *const ModelHandle,
    file: *const std::ffi::c_char,
    session: *mut *mut SessionHandle,
) -> Status {
    guard(|| {
        let model = handles::model(model)?;
        not_null(session, "session")?;
        // SAFETY: as the caller says.
        let file = unsafe { path(file, "file") }?;
        let loaded = Session::load(&model, &file)?;
        // SAFETY: as the caller says.
        unsafe { give_out(loaded, greedy(), session) }
    })
}

/// Sampling as it is when nobody says otherwise: greedy. The other settings are those that take effect once `temperature` is above 0. Any thread may
/// call it.
#[unsafe(no_mangle)]
pub extern "C" fn moec_sampling_default() -> Sampling {
    let default = moec_runtime::Sampling::default();
    Sampling {
        struct_bytes: size_of::<Sampling>(),
        temperature: default.temperature,
        top_p: default.top_p,
        min_p: default.min_p,
        repeat_penalty: default.repeat_penalty,
        top_k: default.top_k as u32,
        repeat_last: default.repeat_last as u32,
        seed: default.seed,
    }
}

/// Sets how the session chooses tokens, and begins its random numbers anew from `sampling->seed`.
///
/// Errors: `MOEC_INVALID_ARGUMENT` for null, a struct not begun with `moec_sampling_default`, or a number out of its range. `MOEC_BUSY`,
/// `MOEC_INVALID_HANDLE`.
///
/// # Safety
/// `sampling` is null or points to the struct.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moec_set_sampling(session: *mut SessionHandle, sampling: *const Sampling) -> Status {
    guard(|| {
        not_null(sampling, "sampling")?;
        // SAFETY: the first field says how much there is.
        let bytes = unsafe { (&raw const (*sampling).struct_bytes).read_unaligned() };
        if bytes != size_of::<Sampling>() {
            let expected = size_of::<Sampling>();
            return Err(Failure::argument(format!(
                "`sampling->struct_bytes` is {bytes}, not {expected}: begin with moec_sampling_default()"
            )));
        }
        // SAFETY: there is a whole struct.
        let s = unsafe { sampling.read_unaligned() };
        for (name, value, fits, range) in [
            ("temperature", s.temperature, s.temperature >= 0.0, "0 or more"),
            ("top_p", s.top_p, s.top_p > 0.0 && s.top_p <= 1.0, "above 0, at most 1"),
            ("min_p", s.min_p, (0.0..=1.0).contains(&s.min_p), "from 0 to 1"),
            ("repeat_penalty", s.repeat_penalty, s.repeat_penalty > 0.0, "above 0"),
        ] {
            if !fits || !value.is_finite() {
                return Err(Failure::argument(format!("`sampling->{name}` is {value}: {range}")));
            }
        }
        let settings = moec_runtime::Sampling {
            temperature: s.temperature,
            top_k: s.top_k as usize,
            top_p: s.top_p,
            min_p: s.min_p,
            repeat_penalty: s.repeat_penalty,
            repeat_last: s.repeat_last as usize,
            seed: s.seed,
            ..moec_runtime::Sampling::default()
        };
        with(session, |state| {
            state.sampler = Sampler::new(settings);
            Ok(())
        })
    })
}

/// Chooses a token by the session's logits and sampling, into `*token`. The session does not change but for its random numbers: feed the token to go
/// on.
///
/// Errors: `MOEC_NO_LOGITS`, `MOEC_BUSY`, `MOEC_INVALID_HANDLE`, `MOEC_INVALID_ARGUMENT` for null.
///
/// # Safety
/// `token` is null or a place for an id.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moec_sample(session: *mut SessionHandle, token: *mut u32) -> Status {
    guard(|| {
        not_null(token, "token")?;
        let id = with(session, |state| {
            let logits = state.session.try_last_logits().ok_or(Error::NoLogits)?;
            Ok(state.sampler.sample(logits, state.session.tokens()))
        })?;
        // SAFETY: as the caller says.
        unsafe { token.write_unaligned(id) };
        Ok(())
    })
}

/// Makes a call that feeds this session now, on another thread, end soon with `MOEC_STOPPED`. Without such a call it has no effect. Any thread may call
/// it, at any time.
///
/// Errors: `MOEC_INVALID_HANDLE`.
#[unsafe(no_mangle)]
pub extern "C" fn moec_cancel(session: *const SessionHandle) -> Status {
    guard(|| {
        handles::session(session)?.cancel.store(true, Ordering::Relaxed);
        Ok(())
    })
}
