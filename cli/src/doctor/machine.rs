//! The machine without its GPUs, as the kernel tells of it.

use serde::Serialize;

/// With less memory not even the demo trains.
const LEAST: u64 = 2 << 30;

#[derive(Debug, Serialize)]
pub(super) struct Machine {
    pub(super) system: String,
    /// That this process may use.
    pub(super) cores: usize,
    pub(super) memory_bytes: u64,
    pub(super) free_bytes: u64,
}

impl Machine {
    pub(super) fn look() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let (memory, kernel) = (read("/proc/meminfo"), read("/proc/sys/kernel/osrelease"));
        // A container's own bound, where there is one.
        let bound = read("/sys/fs/cgroup/memory.max").trim().parse().unwrap_or(u64::MAX);
        let used = in_use(read("/sys/fs/cgroup/memory.current").trim(), &read("/sys/fs/cgroup/memory.stat"));
        let kibibytes = |name: &str| field(&memory, name).unwrap_or(0) << 10;
        Self {
            system: format!("{} {} {}", std::env::consts::OS, kernel.trim(), std::env::consts::ARCH),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: kibibytes("MemTotal").min(bound),
            free_bytes: kibibytes("MemAvailable").min(bound.saturating_sub(used)),
        }
    }

    pub(super) fn wrong(&self) -> Vec<String> {
        let little = self.free_bytes < LEAST;
        little.then(|| format!("less than {} of memory is free: end other programs", crate::ui::bytes(LEAST))).into_iter().collect()
    }
}

/// What a container holds of its bound. Pages of files that it would give back first are as good as free.
fn in_use(current: &str, stat: &str) -> u64 {
    let number = |text: &str| text.parse().unwrap_or(0_u64);
    let given_back = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")).map_or(0, number);
    number(current).saturating_sub(given_back)
}

/// The number of a line like `MemTotal:  123 kB`.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let text = "MemTotalled:       1 kB\nMemTotal:       24098765 kB\nMemFree:  x\n";
        assert_eq!(field(text, "MemTotal"), Some(24_098_765));
        assert_eq!((field(text, "MemFree"), field(text, "Mem")), (None, None));
    }

    #[test]
    fn pages_of_files_that_are_given_back_are_not_in_use() {
        assert_eq!(in_use("1000", "anon 300\ninactive_file 650\nactive_file 50\n"), 350);
        assert_eq!((in_use("1000", ""), in_use("", "inactive_file 5")), (1000, 0));
    }

    #[test]
    fn this_machine_has_cores_and_memory() {
        let machine = Machine::look();
        assert!(machine.cores > 0 && machine.memory_bytes > machine.free_bytes && machine.free_bytes > 0, "{machine:?}");
    }
}
