//! What this process may use of the machine: CPUs and cores, and the instruction sets they have.
//!
//! Deliberately absent: cache sizes and frequencies, which nothing here decides by.

use crate::cgroup::Limits;
use moec_abi::features;
use std::fs;
use std::path::Path;

/// The CPUs that this process may run on, by physical core: SMT siblings are in one group. In order of number.
pub fn cores() -> Vec<Vec<usize>> {
    let allowed = allowed_cpus();
    let cores = group_by_core(&allowed, Path::new("/sys/devices/system/cpu"));
    if cores.is_empty() { vec![vec![0]] } else { cores }
}

/// Threads to use when nobody says: the physical cores that the process may use, and no more than its CPU quota.
pub fn default_threads() -> usize {
    threads_for(cores().len(), quota())
}

/// CPUs' worth of time that the control groups allow; `None` for no limit.
pub fn quota() -> Option<f64> {
    Limits::of_this_process().cpus
}

/// A quota of 1.5 CPUs gives one thread: two would be stopped for a quarter of the time, each while the other waits.
fn threads_for(cores: usize, quota: Option<f64>) -> usize {
    let quota = quota.map_or(usize::MAX, |cpus| cpus.floor().max(1.0) as usize);
    cores.min(quota).max(1)
}

fn group_by_core(allowed: &[usize], sysfs: &Path) -> Vec<Vec<usize>> {
    let mut cores: Vec<(String, Vec<usize>)> = Vec::new();
    for &cpu in allowed {
        // Without the topology every CPU counts as a core of its own.
        let list = sysfs.join(format!("cpu{cpu}/topology/thread_siblings_list"));
        let siblings = fs::read_to_string(list).map_or_else(|_| format!("cpu {cpu}"), |text| text.trim().to_owned());
        match cores.iter_mut().find(|(name, _)| *name == siblings) {
            Some((_, cpus)) => cpus.push(cpu),
            None => cores.push((siblings, vec![cpu])),
        }
    }
    cores.into_iter().map(|(_, cpus)| cpus).collect()
}

#[cfg(any(target_os = "linux", target_os = "android"))]
mod affinity {
    /// Bits of a CPU mask in machine words; large enough for the largest kernels (8192 CPUs).
    type Mask = [usize; 8192 / usize::BITS as usize];

    /// CPUs that the calling thread may run on.
    pub fn allowed_cpus() -> Vec<usize> {
        let mut mask: Mask = [0; _];
        // SAFETY: the kernel writes at most the given number of bytes into the mask; 0 is the calling thread.
        let rc = unsafe { libc::sched_getaffinity(0, size_of::<Mask>(), mask.as_mut_ptr().cast()) };
        if rc != 0 {
            return (0..std::thread::available_parallelism().map_or(1, |n| n.get())).collect();
        }
        let bits = usize::BITS as usize;
        (0..mask.len() * bits).filter(|cpu| mask[cpu / bits] >> (cpu % bits) & 1 == 1).collect()
    }

    /// Confines the calling thread to `cpus`. Best effort: where it is not allowed, nothing changes.
    pub fn pin(cpus: &[usize]) {
        let mut mask: Mask = [0; _];
        let bits = usize::BITS as usize;
        for &cpu in cpus {
            if let Some(word) = mask.get_mut(cpu / bits) {
                *word |= 1 << (cpu % bits);
            }
        }
        // SAFETY: the kernel only reads the mask; 0 is the calling thread.
        unsafe { libc::sched_setaffinity(0, size_of::<Mask>(), mask.as_ptr().cast()) };
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
mod affinity {
    pub fn allowed_cpus() -> Vec<usize> {
        (0..std::thread::available_parallelism().map_or(1, |n| n.get())).collect()
    }

    pub fn pin(_cpus: &[usize]) {}
}

pub use affinity::{allowed_cpus, pin};

/// Bits of [`moec_abi::features`] that this CPU and its operating system offer.
#[cfg(target_arch = "x86_64")]
pub fn detected_features() -> u64 {
    use std::arch::is_x86_feature_detected as has;
    let mut bits = 0;
    let mut set = |bit: u64, present: bool| {
        if present {
            bits |= bit;
        }
    };
    let v2 = has!("sse3") && has!("ssse3") && has!("sse4.1") && has!("sse4.2") && has!("popcnt") && has!("cmpxchg16b");
    set(features::X86_64_V2, v2);
    let avx2 = has!("avx2") && has!("bmi1") && has!("bmi2") && has!("lzcnt") && has!("movbe") && has!("f16c");
    set(features::AVX2, avx2);
    set(features::FMA, has!("fma"));
    set(features::F16C, has!("f16c"));
    let avx512 = has!("avx512f") && has!("avx512bw") && has!("avx512cd") && has!("avx512dq") && has!("avx512vl");
    set(features::AVX512, avx512);
    set(features::AVX512_VNNI, has!("avx512vnni"));
    set(features::AVX_VNNI, has!("avxvnni"));
    set(features::AVX512_BF16, has!("avx512bf16"));
    set(features::AVX512_VBMI, has!("avx512vbmi"));
    bits
}

/// Bits of [`moec_abi::features`] that this CPU and its operating system offer.
#[cfg(target_arch = "aarch64")]
pub fn detected_features() -> u64 {
    use std::arch::is_aarch64_feature_detected as has;
    let mut bits = features::NEON;
    if has!("dotprod") {
        bits |= features::DOTPROD;
    }
    if has!("i8mm") {
        bits |= features::I8MM;
    }
    bits
}

/// Bits of [`moec_abi::features`] that this CPU and its operating system offer.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub fn detected_features() -> u64 {
    0
}

/// Names of the bits, for messages.
pub fn feature_names(bits: u64) -> Vec<&'static str> {
    features::NAMES.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn siblings_are_one_core() {
        let dir = tempfile::tempdir().unwrap();
        for (cpu, siblings) in [(0, "0,4"), (1, "1,5"), (4, "0,4"), (5, "1,5")] {
            let topology = dir.path().join(format!("cpu{cpu}/topology"));
            fs::create_dir_all(&topology).unwrap();
            fs::write(topology.join("thread_siblings_list"), format!("{siblings}\n")).unwrap();
        }
        assert_eq!(group_by_core(&[0, 1, 4, 5], dir.path()), [vec![0, 4], vec![1, 5]]);
        assert_eq!(group_by_core(&[1, 5], dir.path()), [vec![1, 5]]);
        assert_eq!(group_by_core(&[0, 7], dir.path()), [vec![0], vec![7]]);
    }

    #[test]
    fn a_quota_limits_the_threads() {
        assert_eq!(threads_for(8, None), 8);
        assert_eq!(threads_for(8, Some(3.7)), 3);
        assert_eq!(threads_for(8, Some(0.2)), 1);
        assert_eq!(threads_for(2, Some(64.0)), 2);
        assert_eq!(threads_for(0, None), 1);
    }

    #[test]
    fn affinity_is_respected() {
        let all = allowed_cpus();
        assert!(!all.is_empty());
        std::thread::spawn(move || {
            pin(&all[..1]);
            assert_eq!(allowed_cpus(), all[..1]);
            assert_eq!(cores(), [vec![all[0]]]);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn every_feature_has_a_name() {
        assert_eq!(feature_names(features::FMA | features::AVX2), ["avx2", "fma"]);
        assert_eq!(feature_names(detected_features()).len() as u32, detected_features().count_ones());
    }
}
