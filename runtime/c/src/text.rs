//! Text to tokens and back, and conversations to text.

use crate::handles::{self, ModelHandle};
use crate::pointers::{Place, slice, utf8_string};
use crate::status::{Status, guard};
use std::ffi::{c_char, c_int};

/// One turn of a conversation.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Message {
    /// Who speaks, a C string: `system`, `user`, `assistant`, or what else the template knows.
    pub role: *const c_char,
    /// What is said, a C string in UTF-8.
    pub content: *const c_char,
}

/// Writes the token ids of `bytes` bytes of UTF-8 `text` to `tokens`; `capacity` have room. `*needed` (or null) takes how many there are; with null
/// `tokens` and capacity 0 that is all. With `special` not 0, with the ids that the tokenizer puts around a text (a bos token, usually): for a
/// text that begins a session, and not for one from `moec_chat`. Any thread may call it.
///
/// Errors: `MOEC_NOT_UTF8`, `MOEC_TOKENIZER`, `MOEC_TOO_SMALL`, `MOEC_INVALID_HANDLE`, `MOEC_INVALID_ARGUMENT`.
///
/// # Safety
/// The pointers are null or have the size that is said.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moec_tokenize(
    model: *const ModelHandle,
    text: *const c_char,
    bytes: usize,
    special: c_int,
    tokens: *mut u32,
    capacity: usize,
    needed: *mut usize,
) -> Status {
    guard(|| {
        let model = handles::model(model)?;
        let place = Place::new(tokens, capacity, needed, "tokens")?;
        // SAFETY: as the caller says.
        unsafe {
            let text = crate::pointers::text(text, bytes, "text")?;
            place.fill(&model.tokenizer()?.encode(text, special != 0)?)
        }
    })
}

/// Writes the text of `count` tokens, without special tokens, and a NUL to `text`; `capacity` bytes have room. `*needed` (or null) takes the bytes of
/// the text without the NUL; with null `text` and capacity 0 that is all. For text that grows token by token use `moec_generate`: a character
/// may be spread over several tokens. Any thread may call it.
///
/// Errors: `MOEC_BAD_TOKEN`, `MOEC_TOKENIZER`, `MOEC_TOO_SMALL`, `MOEC_INVALID_HANDLE`, `MOEC_INVALID_ARGUMENT`.
///
/// # Safety
/// The pointers are null or have the size that is said.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moec_detokenize(
    model: *const ModelHandle,
    tokens: *const u32,
    count: usize,
    text: *mut c_char,
    capacity: usize,
    needed: *mut usize,
) -> Status {
    guard(|| {
        let model = handles::model(model)?;
        let place = Place::new(text, capacity, needed, "text")?;
        // SAFETY: as the caller says.
        let tokens = unsafe { slice(tokens, count, "tokens") }?;
        let vocab = model.descriptor().vocab;
        if let Some(&id) = tokens.iter().find(|id| **id >= vocab) {
            return Err(moec_runtime::Error::Token { id, vocab }.into());
        }
        let decoded = model.tokenizer()?.decode(tokens)?;
        // SAFETY: as the caller says.
        unsafe { place.fill_text(&decoded) }
    })
}

/// Writes the text that the model's chat template makes of a conversation, and a NUL, to `text`; `capacity` bytes have room. `*needed` (or null) takes
/// the bytes of the text without the NUL; with null `text` and capacity 0 that is all. With `answer` not 0 the text ends where the assistant
/// begins to speak. It has its special tokens in it: tokenize it with `special` 0. Any thread may call it.
///
/// Errors: `MOEC_CHAT`, `MOEC_NOT_UTF8`, `MOEC_TOO_SMALL`, `MOEC_INVALID_HANDLE`, `MOEC_INVALID_ARGUMENT`.
///
/// # Safety
/// The pointers are null or have the size that is said, and the messages are of C strings.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moec_chat(
    model: *const ModelHandle,
    messages: *const Message,
    count: usize,
    answer: c_int,
    text: *mut c_char,
    capacity: usize,
    needed: *mut usize,
) -> Status {
    guard(|| {
        let model = handles::model(model)?;
        let place = Place::new(text, capacity, needed, "text")?;
        // SAFETY: as the caller says.
        let messages = unsafe { slice(messages, count, "messages") }?;
        let mut conversation = Vec::new();
        for message in messages {
            // SAFETY: as the caller says.
            unsafe {
                let role = utf8_string(message.role, "messages[].role")?;
                let content = utf8_string(message.content, "messages[].content")?;
                conversation.push(moec_runtime::Message::new(role, content));
            }
        }
        let rendered = model.chat_template()?.render(&conversation, answer != 0)?;
        // SAFETY: as the caller says.
        unsafe { place.fill_text(&rendered) }
    })
}
