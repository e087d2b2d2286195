//! Running one loop with the widest vectors that this machine has.
//!
//! The loops of quantization and packing are plain Rust over arrays of 16 lanes, which the compiler turns into vector
//! instructions. A release of moec is compiled for the oldest CPU it supports; here the same code is compiled for newer
//! ones too, and chosen when it runs. All operations round exactly and none are contracted, so the results are the same
//! on every CPU.
//!
//! Deliberately absent: instructions by name.

/// A computation that gains from wide vectors.
pub(crate) trait Vectorized {
    /// What it gives.
    type Output;

    /// Does it. Must be `#[inline(always)]`, and so must everything hot that it calls.
    fn run(self) -> Self::Output;
}

/// Runs `work` compiled for the best instruction set of this machine.
pub(crate) fn vectorize<W: Vectorized>(work: W) -> W::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
        {
            // SAFETY: this CPU has the features.
            return unsafe { avx512(work) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: this CPU has the feature.
            return unsafe { avx2(work) };
        }
    }
    work.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn avx512<W: Vectorized>(work: W) -> W::Output {
    work.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2<W: Vectorized>(work: W) -> W::Output {
    work.run()
}

/// Runs the same work once with each instruction set of this machine.
#[cfg(test)]
pub(super) fn every<W: Vectorized>(work: impl Fn() -> W) -> Vec<(&'static str, W::Output)> {
    let mut results = vec![("baseline", work().run()), ("best", vectorize(work()))];
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: this CPU has the feature.
        results.push(("avx2", unsafe { avx2(work()) }));
    }
    results
}
