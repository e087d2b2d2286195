//! Models: opening, closing, and what they say about themselves.

use crate::handles::{self, ModelHandle};
use crate::pointers::{Place, not_null, path, slice, utf8_string};
use crate::status::{Failure, Result, Status, guard};
use moec_abi::ModelDescriptor;
use moec_runtime::kv::Sequence;
use moec_runtime::{Descriptor, Model, PayloadSource, PoolOptions, scheduler};
use std::ffi::{c_char, c_int, c_void};
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// Version of this API: functions and structs are only added, never changed, while it stays the same. A program compares it with
/// `moec_api_version`.
pub const API_VERSION: u32 = 1;

/// How to open a model: begin with `moec_options_default` and change what should be different.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Options {
    /// Size of this struct, set by `moec_options_default`.
    pub struct_bytes: usize,
    /// Threads that compute, the calling one included; 0 for one for each physical core that the process may use.
    pub threads: u32,
    /// Not 0 to open a model whose weights are larger than the memory, and read them from the disk again and again.
    pub low_memory: u32,
    /// Name of the CPU level whose code to run, a C string; null for the best that the CPU can run. Used during the call only.
    pub level: *const c_char,
}

/// What a model is. The texts belong to the object that the model is in, and live as long as it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Info {
    /// Its name.
    pub name: *const c_char,
    /// The CPU level whose code runs.
    pub level: *const c_char,
    /// Token ids are below this; also the number of logits.
    pub vocab: u32,
    /// Most tokens of a session.
    pub context: u32,
    /// Positions that a token sees, its own included; 0 for all.
    pub sliding_window: u32,
    /// Elements of an embedding.
    pub hidden: u32,
    /// Transformer blocks.
    pub layers: u32,
    /// Experts of a layer; 0 for a dense model.
    pub experts: u32,
    /// Experts of a token; 0 for a dense model.
    pub experts_per_token: u32,
    /// Threads that compute.
    pub threads: u32,
    /// The token that begins a text, or -1.
    pub bos_token: i64,
    /// Not 0 when text can be tokenized.
    pub has_tokenizer: u32,
    /// Not 0 when there is a chat template.
    pub has_chat_template: u32,
}

/// Memory of a model, in bytes.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Memory {
    /// The weights, mapped from their file or where the program put them.
    pub weights: u64,
    /// How much of them is in memory now.
    pub weights_resident: u64,
    /// Scratch, taken when the model was opened.
    pub scratch: u64,
    /// Keys and values that all sessions of the model hold now; shared ones count once.
    pub kv: u64,
    /// One page of keys and values, for 64 tokens: what a session grows by.
    pub kv_page: u64,
    /// The most keys and values that one session can hold.
    pub kv_session_max: u64,
}

/// Which hidden states make the vector of a text.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pooling {
    /// That of the last token, which has seen all others.
    Last = 0,
    /// The mean over all tokens.
    Mean = 1,
}

/// The version of the library that is linked, to be compared with `MOEC_API_VERSION` of the header. Any thread may call it.
#[unsafe(no_mangle)]
pub extern "C" fn moec_api_version() -> u32 {
    API_VERSION
}

/// Options as they are when nobody says otherwise. Any thread may call it.
#[unsafe(no_mangle)]
pub extern "C" fn moec_options_default() -> Options {
    Options { struct_bytes: size_of::<Options>(), threads: 0, low_memory: 0, level: std::ptr::null() }
}

/// Opens a model whose weights are the file at `weights`, a C string.
///
/// `descriptor` is `NAME_model` of the model's header. `options` may be null. The model goes to `*model`; free it with `moec_close`. The weights
/// are mapped, so opening is fast, and the file must not be changed while the model is open. Any thread may call it; several models can be open.
///
/// Errors: `MOEC_ABI_MISMATCH`, `MOEC_CPU`, `MOEC_WEIGHTS`, `MOEC_OUT_OF_MEMORY`, `MOEC_THREADS`, `MOEC_INVALID_ARGUMENT` for null.
///
/// # Safety
/// The pointers are null or as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moec_open(
    descriptor: *const ModelDescriptor,
    weights: *const c_char,
    options: *const Options,
    model: *mut *mut ModelHandle,
) -> Status {
    guard(|| {
        // SAFETY: as the caller says.
        unsafe {
            let source = PayloadSource::File(path(weights, "weights")?);
            open(descriptor, source, options, model)
        }
    })
}

/// Opens a model whose weights are in memory: `bytes` bytes at `weights`, aligned to `MOEC_PAYLOAD_ALIGN`. The memory belongs to the caller, and
/// must stay as it is until the model and all its sessions are freed. Otherwise as `moec_open`.
///
/// # Safety
/// The pointers are null or as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moec_open_memory(
    descriptor: *const ModelDescriptor,
    weights: *const c_void,
    bytes: usize,
    options: *const Options,
    model: *mut *mut ModelHandle,
) -> Status {
    guard(|| {
        not_null(weights, "weights")?;
        // SAFETY: as the caller says, who keeps the memory as long as the model.
        unsafe {
            let bytes: &'static [u8] = slice(weights.cast(), bytes, "weights")?;
            open(descriptor, PayloadSource::Memory(bytes), options, model)
        }
    })
}

/// Opens a model whose weights are in the open file `fd`, from byte `offset` on, a multiple of `MOEC_PAYLOAD_ALIGN`. The file descriptor stays the
/// caller's and can be closed after the call. Otherwise as `moec_open`.
///
/// # Safety
/// The pointers are null or as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moec_open_fd(
    descriptor: *const ModelDescriptor,
    fd: c_int,
    offset: u64,
    options: *const Options,
    model: *mut *mut ModelHandle,
) -> Status {
    guard(|| {
        if fd < 0 {
            return Err(Failure::argument(format!("`fd` is {fd}")));
        }
        // SAFETY: not negative; a number that is no open file is refused by the system.
        let owned = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned();
        let owned = owned.map_err(|error| Failure::argument(format!("`fd` {fd} is no open file: {error}")))?;
        // SAFETY: as the caller says.
        unsafe { open(descriptor, PayloadSource::Opened(Arc::new(File::from(owned)), offset), options, model) }
    })
}

/// # Safety
/// As for [`moec_open`].
unsafe fn open(
    descriptor: *const ModelDescriptor,
    payload: PayloadSource,
    options: *const Options,
    model: *mut *mut ModelHandle,
) -> Result<()> {
    not_null(model, "model")?;
    not_null(descriptor, "descriptor")?;
    let mut own = moec_options_default();
    if !options.is_null() {
        // SAFETY: the first field says how much there is.
        let bytes = unsafe { (&raw const (*options).struct_bytes).read_unaligned() };
        if bytes != size_of::<Options>() {
            let expected = size_of::<Options>();
            return Err(Failure::argument(format!(
                "`options->struct_bytes` is {bytes}, not {expected}: begin with moec_options_default()"
            )));
        }
        // SAFETY: there is a whole struct.
        own = unsafe { options.read_unaligned() };
    }
    // SAFETY: as the caller says.
    let level = match own.level.is_null() {
        true => None,
        // SAFETY: the caller promises a NUL-terminated string there.
        false => Some(unsafe { utf8_string(own.level, "options->level") }?.to_owned()),
    };
    const MOST: u32 = 4096;
    if own.threads > MOST {
        return Err(Failure::argument(format!("`options->threads` is {}; at most {MOST}", own.threads)));
    }
    // SAFETY: the caller vouches for the descriptor.
    let descriptor = unsafe { Descriptor::new(descriptor) }?;
    let threads = (own.threads > 0).then_some(own.threads as usize);
    let options = moec_runtime::Options {
        payload,
        pool: PoolOptions { threads, pin_caller: false },
        level,
        low_memory: own.low_memory != 0,
    };
    let opened = handles::new_model(Model::open(descriptor, &options)?)?;
    // SAFETY: the caller vouches for the place.
    unsafe { model.write(opened) };
    Ok(())
}

/// Closes a model; null is allowed. Its sessions stay good: what they use is freed with the last of them. Any thread may call it, at any time.
///
/// Errors: `MOEC_INVALID_HANDLE` for a model that is not open.
#[unsafe(no_mangle)]
pub extern "C" fn moec_close(model: *mut ModelHandle) -> Status {
    guard(|| if model.is_null() { Ok(()) } else { handles::close_model(model) })
}

/// Writes the first `info_bytes` bytes (`sizeof *info`) of what a model is to `*info`. Any thread may call it.
///
/// Errors: `MOEC_INVALID_HANDLE`, `MOEC_INVALID_ARGUMENT` for null or a size that is not one of the struct's.
///
/// # Safety
/// `info` is null or has `info_bytes` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moec_info(model: *const ModelHandle, info: *mut Info, info_bytes: usize) -> Status {
    guard(|| {
        let model = handles::model(model)?;
        let d = model.descriptor();
        let metadata = model.metadata();
        let filled = Info {
            name: d.name,
            level: model.level().c_name(),
            vocab: d.vocab,
            context: d.context,
            sliding_window: d.sliding_window,
            hidden: d.hidden,
            layers: d.layers,
            experts: d.experts,
            experts_per_token: d.experts_per_token,
            threads: model.workers() as u32,
            bos_token: metadata.bos_token_id.map_or(-1, i64::from),
            has_tokenizer: model.payload().tokenizer().is_some().into(),
            has_chat_template: metadata.chat_template.is_some().into(),
        };
        // SAFETY: as the caller says.
        unsafe { write_struct(info, info_bytes, filled, "info") }
    })
}

/// Writes a model's memory to `*memory`, `memory_bytes` (`sizeof *memory`) bytes. Any thread may call it.
///
/// Errors: as `moec_info`.
///
/// # Safety
/// `memory` is null or has `memory_bytes` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moec_memory(model: *const ModelHandle, memory: *mut Memory, memory_bytes: usize) -> Status {
    guard(|| {
        let model = handles::model(model)?;
        let d = model.descriptor();
        let payload = model.payload();
        let pages = Sequence::pages_for(d.context as usize, d.max_tokens as usize, d.window()) as u64;
        let filled = Memory {
            weights: d.payload_bytes,
            weights_resident: (payload.resident(0..payload.bytes().len()) * d.payload_bytes as f64) as u64,
            scratch: d.scratch_for(model.workers()),
            kv: model.pages().pages_in_use() as u64 * d.page_bytes,
            kv_page: d.page_bytes,
            kv_session_max: pages.saturating_mul(d.page_bytes),
        };
        // SAFETY: as the caller says.
        unsafe { write_struct(memory, memory_bytes, filled, "memory") }
    })
}

/// # Safety
/// `to` is null or has `bytes` bytes.
unsafe fn write_struct<T>(to: *mut T, bytes: usize, value: T, name: &str) -> Result<()> {
    not_null(to, name)?;
    if bytes != size_of::<T>() {
        return Err(Failure::argument(format!("`{name}_bytes` is {bytes}, not sizeof *{name}, {}", size_of::<T>())));
    }
    // SAFETY: not null, and large enough.
    unsafe { to.write_unaligned(value) };
    Ok(())
}

/// Whether `token` ends a text: 1, 0, or -1 when the model is not open. Any thread may call it.
#[unsafe(no_mangle)]
pub extern "C" fn moec_is_end(model: *const ModelHandle, token: u32) -> c_int {
    let mut answer = -1;
    guard(|| {
        answer = handles::model(model)?.is_end(token).into();
        Ok(())
    });
    answer
}

/// The vector of a text: its final hidden states, pooled, not normalized, `moec_model_info.hidden` floats to `vector`, which has room for `capacity`.
/// `*needed` (or null) takes how many there are. `pooling` is a `moec_pooling`. Any thread may call it; it waits for its turn.
///
/// Errors: `MOEC_INVALID_ARGUMENT` for null or no tokens, `MOEC_BAD_TOKEN`, `MOEC_CONTEXT_FULL`, `MOEC_TOO_SMALL`, `MOEC_OUT_OF_MEMORY`.
///
/// # Safety
/// The pointers are null or have the room that is said.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moec_embed(
    model: *const ModelHandle,
    tokens: *const u32,
    count: usize,
    pooling: u32,
    vector: *mut f32,
    capacity: usize,
    needed: *mut usize,
) -> Status {
    guard(|| {
        let model = handles::model(model)?;
        let place = Place::new(vector, capacity, needed, "vector")?;
        let pooling = match pooling {
            0 => scheduler::Pooling::Last,
            1 => scheduler::Pooling::Mean,
            _ => {
                return Err(Failure::argument(format!(
                    "`pooling` is {pooling}: MOEC_POOLING_LAST or MOEC_POOLING_MEAN"
                )));
            }
        };
        // SAFETY: as the caller says.
        unsafe {
            let tokens = slice(tokens, count, "tokens")?;
            place.fill(&model.embed(tokens, pooling)?)
        }
    })
}
