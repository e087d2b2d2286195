//! The memory that kernels are measured on: weights larger than the caches, activations, results.
//!
//! One piece for all shapes, so that tuning a model of any size takes the same memory. As in an executable, activations and results are in large pages and
//! weights in small ones, since those are a file's. It is filled so that every aligned 16 and 32 bits are a small normal number in each float format, and codes
//! are arbitrary: kernels never meet the slow paths of denormal numbers or NaN, and the time of integer arithmetic does not depend on its operands.
//! Deliberately absent: weights of a model, whose values would change nothing.

use memmap2::MmapMut;
use rand::{RngCore, SeedableRng};
use rand_xoshiro::Xoshiro256PlusPlus;

/// Alignment of every part, in bytes: a page.
const ALIGN: usize = 4096;

/// Memory of fewer bytes is in small pages, as that of an executable is.
const LEAST_LARGE: usize = 4 << 20;

/// Memory for several threads.
pub struct Arena {
    weights: MmapMut,
    activations: MmapMut,
    results: MmapMut,
}

// The kernels get addresses; who writes where is the caller's contract with them.
impl Arena {
    /// Memory of these sizes.
    ///
    /// # Errors
    /// When the system has not so much.
    pub fn new(weights: usize, activations: usize, results: usize) -> std::io::Result<Arena> {
        let mut arena = Arena {
            weights: MmapMut::map_anon(weights.next_multiple_of(ALIGN))?,
            activations: large_pages(activations.next_multiple_of(ALIGN))?,
            results: large_pages(results.next_multiple_of(ALIGN))?,
        };
        let mut random = Xoshiro256PlusPlus::seed_from_u64(0);
        fill(&mut arena.weights, &mut random);
        fill(&mut arena.activations, &mut random);
        arena.results.fill(0);
        Ok(arena)
    }

    /// Bytes of weights.
    pub fn weight_bytes(&self) -> usize {
        self.weights.len()
    }

    /// Bytes of activations.
    pub fn activation_bytes(&self) -> usize {
        self.activations.len()
    }

    /// Bytes of results.
    pub fn result_bytes(&self) -> usize {
        self.results.len()
    }

    /// Addresses of weights, activations and results.
    pub fn addresses(&mut self) -> [i64; 3] {
        [self.weights.as_ptr() as i64, self.activations.as_ptr() as i64, self.results.as_mut_ptr() as i64]
    }
}

/// Memory of zeros in large pages where the system has them, as the scratch memory of an executable is.
///
/// # Errors
/// When the system has not so much.
pub fn large_pages(bytes: usize) -> std::io::Result<MmapMut> {
    let map = MmapMut::map_anon(bytes)?;
    if bytes >= LEAST_LARGE {
        // A system without them has small ones.
        map.advise(memmap2::Advice::HugePage).ok();
    }
    Ok(map)
}

/// Every 16 bits: a random sign and random low bits under a constant exponent, which makes bf16 numbers near 0.01, f16 near 1, f32 near 0.01.
pub fn fill(memory: &mut [u8], random: &mut impl RngCore) {
    for word in memory.as_chunks_mut::<8>().0 {
        *word = ((random.next_u64() & 0x80ff_80ff_80ff_80ff) | 0x3c00_3c00_3c00_3c00).to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_small_and_normal_in_every_format() {
        let arena = Arena::new(1 << 16, 1, 1).unwrap();
        for word in arena.weights.as_chunks::<4>().0 {
            let wide = f32::from_le_bytes(*word);
            assert!(wide.is_normal() && wide.abs() < 1.0, "{wide}");
            let half = u16::from_le_bytes([word[0], word[1]]);
            let (a, b) = (half::f16::from_bits(half).to_f32(), half::bf16::from_bits(half).to_f32());
            assert!(a.is_normal() && a.abs() < 2.0 && b.is_normal() && b.abs() < 1.0, "{a} {b}");
        }
    }
}
