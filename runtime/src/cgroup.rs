//! Limits that a Linux control group puts on this process: CPU quota and memory, versions 1 and 2.
//!
//! A limit holds for a group and everything below it, so all groups from the process's own up to the root are asked
//! and the tightest wins. Inside a container the path in `/proc/self/cgroup` may be that of the host; groups that are
//! not visible are skipped.

use std::fs;
use std::path::{Path, PathBuf};

/// What one or more groups allow. `None` means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Limits {
    /// CPUs' worth of time, e.g. 1.5.
    pub cpus: Option<f64>,
    /// Memory that the process may use in all, in bytes.
    pub memory: Option<u64>,
    /// Of that, memory that is not taken (the file cache counts as free), in bytes.
    pub memory_left: Option<u64>,
}

impl Limits {
    /// The limits of this process.
    pub fn of_this_process() -> Limits {
        let (Ok(groups), Ok(mounts)) =
            (fs::read_to_string("/proc/self/cgroup"), fs::read_to_string("/proc/self/mountinfo"))
        else {
            return Limits::default();
        };
        Limits::of(&groups, &mounts, Path::new("/"))
    }

    /// From the text of `/proc/self/cgroup` and `/proc/self/mountinfo`, with all mount points taken below `root`.
    fn of(groups: &str, mounts: &str, root: &Path) -> Limits {
        let mut limits = Limits::default();
        for mount in mounts.lines().filter_map(Mount::parse) {
            for line in groups.lines() {
                let mut fields = line.splitn(3, ':').skip(1);
                let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
                let controllers: Vec<&str> = controllers.split(',').filter(|c| !c.is_empty()).collect();
                let point = root.join(mount.point.trim_start_matches('/'));
                if mount.version == 2 && controllers.is_empty() {
                    for group in ancestors(&point, mount.root, path) {
                        limits.tighten(version2(&group));
                    }
                } else if mount.version == 1 && controllers.iter().any(|c| mount.options.split(',').any(|o| o == *c)) {
                    for group in ancestors(&point, mount.root, path) {
                        limits.tighten(version1(&group));
                    }
                }
            }
        }
        limits
    }

    fn tighten(&mut self, other: Limits) {
        fn least<T: PartialOrd>(a: Option<T>, b: Option<T>) -> Option<T> {
            match (a, b) {
                (Some(a), Some(b)) => Some(if b < a { b } else { a }),
                (a, b) => a.or(b),
            }
        }
        self.cpus = least(self.cpus, other.cpus);
        self.memory = least(self.memory, other.memory);
        self.memory_left = least(self.memory_left, other.memory_left);
    }
}

/// A mounted cgroup file system.
struct Mount<'a> {
    version: u8,
    /// The group that the mount point shows.
    root: &'a str,
    point: &'a str,
    options: &'a str,
}

impl<'a> Mount<'a> {
    /// A line of mountinfo: `id parent dev root point options [fields] - type source options`.
    fn parse(line: &'a str) -> Option<Mount<'a>> {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let (root, point) = (left.next()?, left.next()?);
        let mut right = right.split(' ');
        let version = match right.next()? {
            "cgroup" => 1,
            "cgroup2" => 2,
            _ => return None,
        };
        Some(Mount { version, root, point, options: right.nth(1)? })
    }
}

/// The visible directories of group `path` and all groups above it.
fn ancestors(point: &Path, root: &str, path: &str) -> Vec<PathBuf> {
    let inside = path.strip_prefix(root.trim_end_matches('/')).unwrap_or("").trim_start_matches('/');
    let own = point.join(inside);
    own.ancestors().take_while(|dir| dir.starts_with(point)).filter(|dir| dir.is_dir()).map(Path::to_owned).collect()
}

fn version2(group: &Path) -> Limits {
    let cpus = read(group, "cpu.max").and_then(|text| {
        let (quota, period) = text.trim().split_once(' ')?;
        Some(quota.parse::<f64>().ok()? / period.parse::<f64>().ok()?)
    });
    let memory = number(group, "memory.max");
    let used = number(group, "memory.current").map(|used| used.saturating_sub(file_cache(group)));
    Limits { cpus, memory, memory_left: left(memory, used) }
}

fn version1(group: &Path) -> Limits {
    let quota = read(group, "cpu.cfs_quota_us").and_then(|text| text.trim().parse::<f64>().ok());
    let period = read(group, "cpu.cfs_period_us").and_then(|text| text.trim().parse::<f64>().ok());
    let cpus = quota.zip(period).filter(|(quota, period)| *quota > 0.0 && *period > 0.0).map(|(q, p)| q / p);
    // "No limit" is the largest multiple of the page size.
    let memory = number(group, "memory.limit_in_bytes").filter(|limit| *limit < 1 << 60);
    let used = number(group, "memory.usage_in_bytes").map(|used| used.saturating_sub(file_cache(group)));
    Limits { cpus, memory, memory_left: left(memory, used) }
}

fn left(limit: Option<u64>, used: Option<u64>) -> Option<u64> {
    limit.map(|limit| limit.saturating_sub(used.unwrap_or(0)))
}

/// Bytes of file cache that the kernel would give up for this group.
fn file_cache(group: &Path) -> u64 {
    let Some(text) = read(group, "memory.stat") else { return 0 };
    let value =
        |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse::<u64>().ok());
    // Version 1 has own figures and `total_` ones, which count the groups below too.
    let all = |key: &str| value(&format!("total_{key}")).or_else(|| value(key)).unwrap_or(0);
    all("active_file") + all("inactive_file")
}

fn read(group: &Path, file: &str) -> Option<String> {
    fs::read_to_string(group.join(file)).ok()
}

fn number(group: &Path, file: &str) -> Option<u64> {
    read(group, file)?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new(files: &[(&str, &str)]) -> Tree {
            let dir = tempfile::tempdir().unwrap();
            for (path, text) in files {
                let path = dir.path().join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            Tree(dir)
        }
    }

    const V2: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";

    #[test]
    fn version_2_takes_the_tightest_group_on_the_way_up() {
        let tree = Tree::new(&[
            ("sys/fs/cgroup/a/cpu.max", "150000 100000\n"),
            ("sys/fs/cgroup/a/memory.max", "2000000\n"),
            ("sys/fs/cgroup/a/memory.current", "1500000\n"),
            ("sys/fs/cgroup/a/memory.stat", "anon 500000\nactive_file 700000\ninactive_file 300000\n"),
            ("sys/fs/cgroup/a/b/cpu.max", "max 100000\n"),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
        ]);
        let limits = Limits::of("0::/a/b\n", V2, tree.0.path());
        assert_eq!(limits, Limits { cpus: Some(1.5), memory: Some(2_000_000), memory_left: Some(1_500_000) });
    }

    #[test]
    fn version_1_has_a_mount_per_controller() {
        let tree = Tree::new(&[
            ("cg/cpu/x/cpu.cfs_quota_us", "50000\n"),
            ("cg/cpu/x/cpu.cfs_period_us", "100000\n"),
            ("cg/cpu/cpu.cfs_quota_us", "-1\n"),
            ("cg/memory/x/memory.limit_in_bytes", "9223372036854771712\n"),
            ("cg/memory/memory.limit_in_bytes", "4096000\n"),
            ("cg/memory/memory.usage_in_bytes", "4096000\n"),
            ("cg/memory/memory.stat", "active_file 1\ntotal_active_file 96000\ntotal_inactive_file 0\n"),
        ]);
        let mounts =
            "1 0 0:1 / /cg/cpu rw - cgroup cgroup rw,cpu,cpuacct\n2 0 0:2 / /cg/memory rw - cgroup cgroup rw,memory\n";
        let limits = Limits::of("2:cpu,cpuacct:/x\n4:memory:/x\n", mounts, tree.0.path());
        assert_eq!(limits, Limits { cpus: Some(0.5), memory: Some(4_096_000), memory_left: Some(96_000) });
    }

    #[test]
    fn a_group_of_the_host_is_looked_up_at_the_mount_point() {
        let tree = Tree::new(&[("sys/fs/cgroup/cpu.max", "200000 100000\n")]);
        let limits = Limits::of("0::/docker/0123\n", V2, tree.0.path());
        assert_eq!(limits.cpus, Some(2.0));
        let bound = V2.replace("0:26 / ", "0:26 /docker/0123 ");
        assert_eq!(Limits::of("0::/docker/0123\n", &bound, tree.0.path()).cpus, Some(2.0));
    }

    #[test]
    fn nonsense_is_no_limit() {
        let tree = Tree::new(&[("sys/fs/cgroup/cpu.max", "hello\n"), ("sys/fs/cgroup/memory.max", "\n")]);
        assert_eq!(Limits::of("0::/\nrubbish\n", V2, tree.0.path()), Limits::default());
        assert_eq!(Limits::of("", "", tree.0.path()), Limits::default());
    }
}
