//! Makes an executable that is cut short unstartable, instead of one that dies by a signal.
//!
//! The kernel does not compare a program's segments with the file's length: of a file that ends inside them it maps pages that are not there, and the
//! process is killed before its first instruction, so no code of ours can say why. But it reads the path of the dynamic loader
//! (`PT_INTERP`) from the file before it starts anything, and refuses to start the program when the file ends before it. So the path is moved
//! behind all segments: what is cut before that gives "Input/output error" from the shell, and what is cut after it starts and is found
//! by the payload's own checks. The loader itself looks for the path in memory, where it stays.
//!
//! The section moves too, or `strip` would drop the path. Deliberately absent: 32-bit and big-endian files, and static ones, which have no loader: they are left as they are.

use object::LittleEndian as LE;
use object::elf::{FileHeader64, PT_INTERP, ProgramHeader64, SectionHeader64};
use object::pod;

/// Appends a copy of the loader's path to a linked ELF file and names it in the headers.
pub fn move_to_end(elf: &mut Vec<u8>) {
    if let Some((path, place)) = find(elf) {
        let end = elf.len() as u64;
        elf.extend(path);
        let moved = rewrite(elf, place, end);
        debug_assert!(moved.is_some(), "the headers are where they were found");
    }
}

/// The path, and its offset in the file.
fn find(elf: &[u8]) -> Option<(Vec<u8>, u64)> {
    let (header, _) = pod::from_bytes::<FileHeader64<LE>>(elf).ok()?;
    if !is_supported(header) {
        return None;
    }
    let table = elf.get(usize::try_from(header.e_phoff.get(LE)).ok()?..)?;
    let (segments, _) = pod::slice_from_bytes::<ProgramHeader64<LE>>(table, header.e_phnum.get(LE).into()).ok()?;
    let segment = segments.iter().find(|segment| segment.p_type.get(LE) == PT_INTERP)?;
    let start = segment.p_offset.get(LE);
    let range = usize::try_from(start).ok()?..usize::try_from(start.checked_add(segment.p_filesz.get(LE))?).ok()?;
    Some((elf.get(range)?.to_vec(), start))
}

fn is_supported(header: &FileHeader64<LE>) -> bool {
    use object::elf::{ELFCLASS64, ELFDATA2LSB, ELFMAG};
    header.e_ident.magic == ELFMAG && header.e_ident.class == ELFCLASS64 && header.e_ident.data == ELFDATA2LSB
}

/// Lets the segment and the section that start at `from` start at `to`.
fn rewrite(elf: &mut [u8], from: u64, to: u64) -> Option<()> {
    let (header, _) = pod::from_bytes::<FileHeader64<LE>>(elf).ok()?;
    let (segments, segment_count) = (header.e_phoff.get(LE), header.e_phnum.get(LE));
    let (sections, section_count) = (header.e_shoff.get(LE), header.e_shnum.get(LE));
    let table = elf.get_mut(usize::try_from(segments).ok()?..)?;
    let (all, _) = pod::slice_from_bytes_mut::<ProgramHeader64<LE>>(table, segment_count.into()).ok()?;
    all.iter_mut()
        .filter(|segment| segment.p_type.get(LE) == PT_INTERP)
        .for_each(|segment| segment.p_offset.set(LE, to));
    let table = elf.get_mut(usize::try_from(sections).ok()?..)?;
    let (all, _) = pod::slice_from_bytes_mut::<SectionHeader64<LE>>(table, section_count.into()).ok()?;
    all.iter_mut()
        .filter(|section| section.sh_offset.get(LE) == from)
        .for_each(|section| section.sh_offset.set(LE, to));
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_elf_file_stays() {
        for file in [&b""[..], b"\x7fELF", &[0; 200], b"#!/bin/sh\nexit 0\n"] {
            let mut bytes = file.to_vec();
            move_to_end(&mut bytes);
            assert_eq!(bytes, file);
        }
    }

    #[test]
    fn this_program_gets_its_path_at_the_end() {
        let before = std::fs::read(std::env::current_exe().expect("this test")).expect("readable");
        let (path, place) = find(&before).expect("a dynamic executable");
        let mut after = before.clone();
        move_to_end(&mut after);
        assert_eq!(find(&after), Some((path.clone(), before.len() as u64)));
        assert!(after.ends_with(&path) && path.ends_with(b"\0"));
        assert_eq!(after[place as usize..][..path.len()], path[..], "it stays in memory");
    }
}
