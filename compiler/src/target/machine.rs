//! Which machine moec runs on: what tuning records are keyed by, and how much can be measured at once.
//!
//! As the Linux kernel tells it, without root. Deliberately absent: instruction sets ([`super::host`]).

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// A machine, as far as the speed of kernels depends on it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Machine {
    /// Vendor, name, family and model of the CPU; `unknown` where the system does not tell.
    pub cpu: String,
    /// Bytes of the first CPU's data caches, the nearest first; empty where the system does not tell.
    pub caches: Vec<usize>,
}

impl Machine {
    /// This one.
    pub fn this() -> Machine {
        Machine {
            cpu: cpu_name(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
            caches: caches(Path::new("/sys/devices/system/cpu/cpu0/cache")),
        }
    }

    /// The family and model numbers of an x86 CPU, which its name ends with.
    pub fn numbers(&self) -> Option<(u32, u32)> {
        let (_, numbers) = self.cpu.rsplit_once(", family ")?;
        let (family, model) = numbers.split_once(" model ")?;
        Some((family.parse().ok()?, model.parse().ok()?))
    }

    /// Bytes of the largest cache; what is usual where the system does not tell.
    pub fn largest_cache(&self) -> usize {
        self.caches.iter().copied().max().unwrap_or(32 << 20)
    }
}

/// Threads that can run at full speed: the physical cores that the process may use.
pub fn cores() -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let siblings = |cpu| fs::read_to_string(format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"));
    let cores: BTreeSet<String> = (0..4096).map_while(|cpu| siblings(cpu).ok()).collect();
    if cores.is_empty() { cpus } else { cpus.min(cores.len()) }
}

/// Bytes of memory that can be taken without pushing others out.
pub fn available_memory() -> usize {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<usize>().ok())
        .map_or(1 << 30, |kilobytes| kilobytes << 10)
}

/// The CPU by what `/proc/cpuinfo` says of the first.
fn cpu_name(info: &str) -> String {
    let value = |key: &str| {
        let line = info.lines().find(|line| line.split(':').next().is_some_and(|name| name.trim() == key))?;
        Some(line.split_once(':')?.1.trim().to_string())
    };
    let numbered = |keys: &[(&str, &str)]| {
        let parts = keys.iter().filter_map(|(key, name)| Some(format!("{name} {}", value(key)?)));
        parts.collect::<Vec<_>>().join(" ")
    };
    let (name, numbers) = match value("model name") {
        Some(name) => (name, numbered(&[("cpu family", "family"), ("model", "model")])),
        None => (String::new(), numbered(&[("CPU implementer", "implementer"), ("CPU part", "part")])),
    };
    let all: Vec<String> = [name, numbers].into_iter().filter(|part| !part.is_empty()).collect();
    if all.is_empty() { "unknown".to_string() } else { all.join(", ") }
}

fn caches(directory: &Path) -> Vec<usize> {
    let mut found: Vec<(usize, usize)> = (0..16)
        .map(|index| directory.join(format!("index{index}")))
        .filter_map(|cache| {
            let read = |name: &str| fs::read_to_string(cache.join(name)).ok().map(|text| text.trim().to_string());
            if read("type")? == "Instruction" {
                return None;
            }
            let size = read("size")?;
            let bytes = match size.strip_suffix('K') {
                Some(kilobytes) => kilobytes.parse::<usize>().ok()? << 10,
                None => size.strip_suffix('M')?.parse::<usize>().ok()? << 20,
            };
            Some((read("level")?.parse().ok()?, bytes))
        })
        .collect();
    found.sort_unstable();
    found.into_iter().map(|(_, bytes)| bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_named_by_what_the_system_tells() {
        let x86 =
            "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n";
        assert_eq!(cpu_name(x86), "AMD EPYC, family 25 model 17");
        assert_eq!(cpu_name("CPU implementer\t: 0x41\nCPU part\t: 0xd4f\n"), "implementer 0x41 part 0xd4f");
        assert_eq!(cpu_name(""), "unknown");
    }

    #[test]
    fn caches_are_data_caches_by_level() {
        let directory = tempfile::TempDir::new().unwrap();
        let rows =
            [("3", "Unified", "32768K"), ("1", "Data", "32K"), ("1", "Instruction", "64K"), ("2", "Unified", "1M")];
        for (index, (level, kind, size)) in rows.iter().enumerate() {
            let cache = directory.path().join(format!("index{index}"));
            fs::create_dir(&cache).unwrap();
            for (name, text) in [("level", level), ("type", kind), ("size", size)] {
                fs::write(cache.join(name), format!("{text}\n")).unwrap();
            }
        }
        assert_eq!(caches(directory.path()), [32 << 10, 1 << 20, 32 << 20]);
    }
}
