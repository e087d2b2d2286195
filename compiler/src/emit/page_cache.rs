//! The page cache of files that are written to be mapped.
//!
//! What was written stays in memory for who reads it next, in pages as large or as small as the writes were. A CPU that translates addresses of
//! small pages computes short prompts some percent slower, so there is made room in large ones before anything is written. Linux has them for file systems with
//! large folios (ext4 since 6.16, XFS, Btrfs); elsewhere nothing happens. Deliberately absent: how a model asks for them when it opens its weights
//! (`moec_runtime::payload`).

use memmap2::{Advice, MmapOptions};
use std::fs::File;
use std::ops::Range;

/// Bytes whose address a CPU translates at once, with small pages of 4 KiB.
const LARGE_PAGE: usize = 2 << 20;

/// Makes the page cache hold `range` of `file`, which is that long already and about to be written there, in large pages if the system has them.
pub fn make_large(file: &File, range: Range<u64>) {
    let first = range.start / LARGE_PAGE as u64 * LARGE_PAGE as u64;
    let bytes = ((range.end - first) as usize).next_multiple_of(LARGE_PAGE);
    // SAFETY: nothing is read through the map; the kernel is asked to fill its pages, and refuses those behind the end of the file.
    let Ok(map) = (unsafe { MmapOptions::new().offset(first).len(bytes).map(file) }) else { return };
    if map.advise(Advice::HugePage).is_err() {
        return;
    }
    for at in (0..bytes).step_by(LARGE_PAGE) {
        // Where large pages are advised, one comes as a whole.
        map.advise_range(Advice::PopulateRead, at, 1).ok();
    }
}
