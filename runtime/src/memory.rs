//! Memory: how much there is for this process, and zeroed memory straight from the kernel.
//!
//! Deliberately absent: an allocator. Scratch is taken once, KV pages have their own pool.

use crate::cgroup::Limits;
use crate::error::{Error, Result, human_bytes};
use memmap2::{MmapMut, MmapOptions};
use std::fs;

/// Bytes that the process may have in all, and bytes of them that it can still get (the file cache counts as free).
/// `u64::MAX` where nothing is known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Memory {
    /// In all.
    pub total: u64,
    /// Still to be had.
    pub available: u64,
}

impl Memory {
    /// As it is now: the machine's memory, the control groups' limits and the process's own address space limit.
    pub fn now() -> Memory {
        let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kilobytes = |key: &str| {
            let line = info.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
            line.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kb| kb * 1024)
        };
        let groups = Limits::of_this_process();
        let (space, space_left) = address_space();
        let least = |values: [Option<u64>; 3]| values.into_iter().flatten().min().unwrap_or(u64::MAX);
        Memory {
            total: least([kilobytes("MemTotal"), groups.memory, space]),
            available: least([kilobytes("MemAvailable"), groups.memory_left, space_left]),
        }
    }
}

/// The limit on the process's address space (`ulimit -v`), and what is left of it.
#[cfg(unix)]
fn address_space() -> (Option<u64>, Option<u64>) {
    let mut limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: getrlimit writes one struct.
    let rc = unsafe { libc::getrlimit(libc::RLIMIT_AS, &mut limit) };
    if rc != 0 || limit.rlim_cur == libc::RLIM_INFINITY {
        return (None, None);
    }
    let pages = fs::read_to_string("/proc/self/statm").ok();
    let used =
        pages.and_then(|text| text.split(' ').next()?.parse::<u64>().ok()).map_or(0, |pages| pages * page_size());
    (Some(limit.rlim_cur), Some(limit.rlim_cur.saturating_sub(used)))
}

#[cfg(not(unix))]
fn address_space() -> (Option<u64>, Option<u64>) {
    (None, None)
}

#[cfg(unix)]
fn page_size() -> u64 {
    // SAFETY: sysconf has no preconditions.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.max(1) as u64
}

/// Fails with a sentence when `bytes` for `what` are not to be had.
pub fn check(what: &str, bytes: u64, remedy: &str) -> Result<()> {
    check_against(Memory::now(), what, bytes, remedy)
}

fn check_against(memory: Memory, what: &str, bytes: u64, remedy: &str) -> Result<()> {
    if bytes <= memory.available { Ok(()) } else { Err(too_little(what, bytes, memory.available, remedy)) }
}

/// The error for `bytes` that could not be had.
pub fn too_little(what: &str, bytes: u64, available: u64, remedy: &str) -> Error {
    Error::Memory {
        what: what.to_owned(),
        need: human_bytes(bytes),
        available: human_bytes(available),
        remedy: remedy.to_owned(),
    }
}

/// Zeroed memory, aligned to a page of the machine; pages are taken when first touched.
pub struct Zeroed(MmapMut);

impl Zeroed {
    /// `bytes` bytes (at least one is mapped), or the error for `what` with `remedy`.
    pub fn new(bytes: usize, what: &str, remedy: &str) -> Result<Zeroed> {
        let map = MmapOptions::new()
            .len(bytes.max(1))
            .no_reserve_swap()
            .map_anon()
            .map_err(|_| too_little(what, bytes as u64, Memory::now().available, remedy))?;
        #[cfg(target_os = "linux")]
        if bytes >= 4 << 20 {
            // Fewer misses of the address translation; a kernel without huge pages refuses, which costs nothing.
            map.advise(memmap2::Advice::HugePage).ok();
        }
        Ok(Zeroed(map))
    }

    /// The first byte.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.0.as_mut_ptr()
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Never: at least one byte is mapped.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_memory() {
        let memory = Memory::now();
        assert!(memory.total > 1 << 20 && memory.available <= memory.total, "{memory:?}");
    }

    #[test]
    fn too_much_is_refused_in_one_sentence() {
        let memory = Memory { total: 8_000_000_000, available: 2_000_000_000 };
        check_against(memory, "scratch", 2_000_000_000, "do without").unwrap();
        let error = check_against(memory, "scratch", 2_000_000_001, "do without").unwrap_err();
        let text = "not enough memory: scratch needs 2.0 GB, but only 2.0 GB is available; do without";
        assert_eq!(error.to_string(), text);
    }

    #[test]
    fn zeroed_memory_is_zero_and_aligned() {
        let mut memory = Zeroed::new(5 << 20, "test", "").unwrap();
        assert!(memory.bytes().iter().all(|b| *b == 0));
        assert_eq!(memory.as_mut_ptr() as usize % moec_abi::MEMORY_ALIGN, 0);
        assert!(matches!(Zeroed::new(usize::MAX / 2, "test", ""), Err(Error::Memory { .. })));
    }
}
