//! The page cache of files that are written to be mapped.
//!
//! What was written stays in memory for who reads it next, in pages as large or as small as the writes were. A CPU that translates addresses of
//! small pages decodes and reads prompts 5 to 20 % slower (measured on Intel's Emerald Rapids, in a virtual machine), so room is made in large ones before
//! anything is written. Linux has them for file systems with large folios (XFS since 5.18, ext4 since 6.16); elsewhere nothing happens. Deliberately
//! absent: how a model asks for them when it opens its weights (`moec_runtime::payload`).

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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn room_is_neither_length_nor_content() {
        let file = tempfile::tempfile().unwrap();
        let length = 5 * LARGE_PAGE / 2 + 7;
        let (within, behind) = (LARGE_PAGE / 2 + 1, length - 3);
        let mut expected = vec![0; length];
        let mut write = |what: &[u8], at: usize| {
            file.write_all_at(what, at as u64).unwrap();
            expected[at..at + what.len()].copy_from_slice(what);
        };
        write(b"written before", LARGE_PAGE - 5);
        file.set_len(length as u64).unwrap();
        make_large(&file, within as u64..(within + LARGE_PAGE) as u64);
        write(b"written into it", within);
        make_large(&file, behind as u64..(behind + 10 * LARGE_PAGE) as u64);
        write(b"end", behind);
        assert_eq!(file.metadata().unwrap().len(), length as u64);
        let mut found = vec![1; length];
        file.read_exact_at(&mut found, 0).unwrap();
        assert!(found == expected, "the file has other bytes than were written");
    }
}
