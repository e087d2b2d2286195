//! Sleeping until a word changes, in the kernel.
//!
//! Deliberately absent: timeouts, and words shared between processes.

pub use imp::{wait, wake_all};

/// On Linux.
#[cfg(any(target_os = "linux", target_os = "android"))]
mod imp {
    use crate::sync::AtomicU32;
    use std::ptr;

    /// Sleeps until woken if `word` still holds `expected`; may also return for no reason.
    pub fn wait(word: &AtomicU32, expected: u32) {
        // SAFETY: FUTEX_WAIT only reads the word, which lives as long as the call; no timeout is given.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                word.as_ptr(),
                libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                expected,
                ptr::null::<libc::timespec>(),
            );
        }
    }

    /// Wakes everyone who sleeps on `word`.
    pub fn wake_all(word: &AtomicU32) {
        // SAFETY: FUTEX_WAKE uses only the word's address.
        unsafe {
            libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, i32::MAX);
        }
    }
}

/// Elsewhere there is no such call in the standard library: give the CPU away and look again.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
mod imp {
    use crate::sync::{AtomicU32, Ordering};

    pub fn wait(word: &AtomicU32, expected: u32) {
        if word.load(Ordering::SeqCst) == expected {
            std::thread::sleep(std::time::Duration::from_micros(50));
        }
    }

    pub fn wake_all(_word: &AtomicU32) {}
}
