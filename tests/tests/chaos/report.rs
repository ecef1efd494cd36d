//! What a trial counted, to be read by people.

use crate::proxy::{Fault, Proxy};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;

/// The counts of one job.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) seconds: f64,
    /// Of workers, by the moment.
    pub(crate) kills: BTreeMap<&'static str, usize>,
    /// Of coordinators.
    pub(crate) coordinators: usize,
    /// Workers that found no coordinator.
    pub(crate) failed: usize,
    requests: u64,
    faults: BTreeMap<Fault, u64>,
    /// Store calls that workers tried again, as their logs say.
    retries: usize,
    /// What coordinators counted, those that were killed too, up to the last that they said.
    counts: BTreeMap<String, u64>,
}

impl Report {
    pub(crate) fn workers_killed(&self) -> usize {
        self.kills.values().sum()
    }

    /// Adds what coordinators counted, and how often the logs tell of a retry.
    pub(crate) fn add(&mut self, said: &[Value], logs: &[(String, String)]) {
        for (name, count) in said.iter().filter_map(|status| status["counts"].as_object()).flatten() {
            *self.counts.entry(name.clone()).or_default() += count.as_u64().unwrap_or_default();
        }
        self.retries = logs.iter().map(|(_, log)| log.matches("store call is retried").count()).sum();
    }

    /// Adds what a proxy did since it had counted this.
    pub(crate) fn add_faults(&mut self, proxy: &Proxy, (before, faults_before): &(u64, BTreeMap<Fault, u64>)) {
        let (requests, faults) = proxy.faults();
        self.requests = requests - before;
        let since = |(fault, count): (Fault, u64)| (fault, count - faults_before.get(&fault).copied().unwrap_or_default());
        self.faults = faults.into_iter().map(since).collect();
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.0} s; {} workers killed {:?}, ", self.seconds, self.workers_killed(), self.kills)?;
        write!(f, "{} coordinators ({} workers found none); these counted {:?}", self.coordinators, self.failed, self.counts)?;
        if self.requests > 0 {
            let failed: u64 = self.faults.values().sum();
            write!(f, "; {} requests, {failed} failed {:?}; {} retries", self.requests, self.faults, self.retries)?;
        }
        Ok(())
    }
}
