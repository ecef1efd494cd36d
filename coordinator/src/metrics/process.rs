//! What Linux tells of this process. What it does not tell is left out.

use super::text::Exposition;
use super::{PROCESS_CPU, PROCESS_FILES, PROCESS_MEMORY, PROCESS_MOST_FILES, PROCESS_START};

/// Ticks of a second in `/proc/PID/stat`: the kernel's interface has had no other number since 2.6.
const TICKS: f64 = 100.0;

/// Processor time and memory of this process.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Seconds of processors.
    pub cpu_seconds: f64,
    /// Bytes in memory.
    pub memory_bytes: u64,
    /// When it began, in seconds since the machine did.
    begun: f64,
}

/// This process's, if the system tells.
pub fn usage() -> Option<Usage> {
    parse(&std::fs::read_to_string("/proc/self/stat").ok()?, &std::fs::read_to_string("/proc/self/status").ok()?)
}

fn parse(stat: &str, status: &str) -> Option<Usage> {
    // The second field is a name in brackets, which may hold anything.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |at: usize| -> Option<f64> { fields.get(at)?.parse().ok() };
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = resident.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(Usage { cpu_seconds: (ticks(11)? + ticks(12)?) / TICKS, memory_bytes: kilobytes << 10, begun: ticks(19)? / TICKS })
}

pub(super) fn put(all: &mut Exposition) {
    if let Some(usage) = usage() {
        all.put(&PROCESS_CPU, &[], usage.cpu_seconds);
        all.put(&PROCESS_MEMORY, &[], usage.memory_bytes as f64);
        if let Some(booted) = booted() {
            all.put(&PROCESS_START, &[], booted + usage.begun);
        }
    }
    if let Ok(files) = std::fs::read_dir("/proc/self/fd") {
        all.put(&PROCESS_FILES, &[], files.count() as f64);
    }
    if let Some(most) = most_files() {
        all.put(&PROCESS_MOST_FILES, &[], most);
    }
}

/// When the machine began, in seconds since 1970.
fn booted() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

fn most_files() -> Option<f64> {
    let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
    limits.lines().find_map(|line| line.strip_prefix("Max open files"))?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_whose_name_is_odd_is_read_too() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194560 1 2 3 4 250 150 0 0 20 0 4 0 12345 1 2 3";
        let usage = parse(stat, "Name:\tx\nVmRSS:\t    2048 kB\n").unwrap();
        assert_eq!(usage, Usage { cpu_seconds: 4.0, memory_bytes: 2 << 20, begun: 123.45 });
        assert_eq!(parse("7 (a", "VmRSS: 1 kB"), None);
    }

    #[test]
    fn this_process_is_told_of() {
        let usage = usage().unwrap();
        assert!(usage.memory_bytes > 1 << 20 && usage.begun > 0.0 && booted().unwrap() > 1e9 && most_files().unwrap() >= 64.0);
    }
}
