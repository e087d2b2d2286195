//! What can be checked of C's pointers and sizes, once for all functions.
//!
//! Null and impossible sizes are refused with the argument's name. Whether the memory is there is the caller's word.

use crate::status::{Failure, Result, Status};
use std::ffi::{CStr, OsStr, c_char};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// `count` values at `start`. Null is allowed for none.
///
/// # Safety
/// Unless it is null, `start` points to `count` values that are not written to while the slice is used.
pub unsafe fn slice<'a, T>(start: *const T, count: usize, name: &str) -> Result<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    if start.is_null() {
        return Err(Failure::argument(format!("`{name}` is null, but there should be {count} of them")));
    }
    if !start.is_aligned() {
        return Err(Failure::argument(format!("`{name}` is not aligned to {} bytes", align_of::<T>())));
    }
    if count.checked_mul(size_of::<T>()).is_none_or(|bytes| isize::try_from(bytes).is_err()) {
        return Err(Failure::argument(format!("`{name}`: {count} of them are more than any memory holds")));
    }
    // SAFETY: not null, aligned, of a possible size; the rest is the caller's word.
    Ok(unsafe { std::slice::from_raw_parts(start, count) })
}

/// `bytes` bytes of UTF-8 at `start`.
///
/// # Safety
/// As for [`slice`].
pub unsafe fn text<'a>(start: *const c_char, bytes: usize, name: &str) -> Result<&'a str> {
    // SAFETY: as the caller says; a character is a byte.
    let bytes = unsafe { slice(start.cast::<u8>(), bytes, name) }?;
    utf8(bytes, name)
}

fn utf8<'a>(bytes: &'a [u8], name: &str) -> Result<&'a str> {
    std::str::from_utf8(bytes).map_err(|error| {
        let at = error.valid_up_to();
        Failure::new(Status::NotUtf8, format!("`{name}` is not UTF-8 from byte {at} on"))
    })
}

/// The C string at `start`.
///
/// # Safety
/// Unless it is null, `start` is a C string.
pub unsafe fn string<'a>(start: *const c_char, name: &str) -> Result<&'a CStr> {
    if start.is_null() {
        return Err(Failure::argument(format!("`{name}` is null")));
    }
    // SAFETY: as the caller says.
    Ok(unsafe { CStr::from_ptr(start) })
}

/// The UTF-8 C string at `start`.
///
/// # Safety
/// As for [`string`].
pub unsafe fn utf8_string<'a>(start: *const c_char, name: &str) -> Result<&'a str> {
    // SAFETY: as the caller says.
    utf8(unsafe { string(start, name) }?.to_bytes(), name)
}

/// The path at `start`.
///
/// # Safety
/// As for [`string`].
pub unsafe fn path(start: *const c_char, name: &str) -> Result<PathBuf> {
    // SAFETY: as the caller says.
    let bytes = unsafe { string(start, name) }?.to_bytes();
    if bytes.is_empty() {
        return Err(Failure::argument(format!("`{name}` is empty")));
    }
    Ok(PathBuf::from(OsStr::from_bytes(bytes)))
}

/// Refuses null.
pub fn not_null<T>(pointer: *const T, name: &str) -> Result<()> {
    if pointer.is_null() { Err(Failure::argument(format!("`{name}` is null"))) } else { Ok(()) }
}

/// A place for a result of variable size.
pub struct Place<T> {
    start: *mut T,
    capacity: usize,
    needed: *mut usize,
}

impl<T: Copy> Place<T> {
    /// `start` has room for `capacity` values; `needed` takes how many there are.
    pub fn new(start: *mut T, capacity: usize, needed: *mut usize, name: &str) -> Result<Place<T>> {
        if start.is_null() && capacity > 0 {
            return Err(Failure::argument(format!("`{name}` is null, but its capacity is {capacity}")));
        }
        if start.is_null() && needed.is_null() {
            return Err(Failure::argument(format!("`{name}` and the place for the size are both null")));
        }
        if !start.is_aligned() {
            return Err(Failure::argument(format!("`{name}` is not aligned to {} bytes", align_of::<T>())));
        }
        Ok(Place { start, capacity, needed })
    }

    /// Writes `values`, and their number; only the number when there is no place at all.
    ///
    /// # Safety
    /// `start` and `needed` are null or have the room they were said to have.
    pub unsafe fn fill(&self, values: &[T]) -> Result<()> {
        if !self.needed.is_null() {
            // SAFETY: as the caller says.
            unsafe { self.needed.write(values.len()) };
        }
        if self.start.is_null() {
            return Ok(());
        }
        if values.len() > self.capacity {
            let (needed, capacity) = (values.len(), self.capacity);
            return Err(Failure::new(
                Status::TooSmall,
                format!("the result has {needed} elements, the place for it {capacity}"),
            ));
        }
        // SAFETY: as the caller says; the values are ours, so they do not overlap.
        unsafe { self.start.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
        Ok(())
    }
}

impl Place<c_char> {
    /// Writes `text` and a NUL behind it; the number is without the NUL.
    ///
    /// # Safety
    /// As for [`fill`](Place::fill).
    pub unsafe fn fill_text(&self, text: &str) -> Result<()> {
        let bytes: Vec<c_char> = text.bytes().chain([0]).map(|byte| byte as c_char).collect();
        // SAFETY: as the caller says.
        let filled = unsafe { self.fill(&bytes) };
        if !self.needed.is_null() {
            // SAFETY: as the caller says.
            unsafe { self.needed.write(text.len()) };
        }
        filled
    }
}
