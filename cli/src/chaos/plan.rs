//! What a plan of faults says: `[chaos]`, and faults that are named one by one.

use std::fmt;
use std::path::{Path, PathBuf};

use ella_proto::config::{ConfigError, Millis, RunConfig, read};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Faults that are drawn, where the plan names none and does not say how many.
const FAULTS: usize = 40;
/// Most workers of this machine.
const MOST_WORKERS: usize = 64;

/// A plan file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Plan {
    pub(super) chaos: Chaos,
    /// In any order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) fault: Vec<Named>,
}

/// `[chaos]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Chaos {
    /// The config of the run that is tried; its output, and its number of workers, are the plan's.
    pub(super) run: PathBuf,
    /// A folder of this machine, for the runs and what their processes log.
    pub(super) output: PathBuf,
    /// How many workers the run begins with.
    #[serde(default = "Chaos::workers")]
    pub(super) workers: usize,
    /// Draws the faults.
    #[serde(default = "Chaos::seed")]
    pub(super) seed: u64,
    /// How many are drawn; left out: 40, or none if there are named ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) faults: Option<usize>,
    /// Of which kinds.
    #[serde(default = "Chaos::kinds")]
    pub(super) kinds: Vec<Kind>,
    /// How long what was killed, or has left, stays away.
    #[serde(default = "Chaos::restart_after")]
    pub(super) restart_after: [Millis; 2],
    /// How long a stop, a slowness, a partition or a bad time of the store lasts; left out: up to one and a half of the run's lease.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) lasts: Option<[Millis; 2]>,
    /// The share of store operations that fail: always, if `store` is among the kinds, and while a fault of that kind lasts.
    #[serde(default = "Chaos::store_rates")]
    pub(super) store_rates: [f64; 2],
    /// LIVE: the longest that training may stand still, beyond the faults' own times.
    #[serde(default = "Chaos::stall")]
    pub(super) stall: Millis,
}

/// The kinds of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Kind {
    /// SIGKILL to a worker, which comes back.
    Kill,
    /// SIGSTOP to a worker or the coordinator, and SIGCONT later.
    Stop,
    /// A worker gets a fraction of its time.
    Slow,
    /// A worker is cut off from the coordinator, its peers, or both.
    Partition,
    /// More of the store's operations fail.
    Store,
    /// SIGKILL to the coordinator, which comes back; or it hangs, and goes on only when another is in its place.
    Coordinator,
    /// One more worker comes.
    Join,
    /// SIGTERM to a worker, which comes back.
    Leave,
    /// SIGKILL to all: what the last commit has is all that is left.
    All,
}

impl Kind {
    const DRAWN: [Self; 8] = [Self::Kill, Self::Stop, Self::Slow, Self::Partition, Self::Store, Self::Coordinator, Self::Join, Self::Leave];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Stop => "stop",
            Self::Slow => "slow",
            Self::Partition => "partition",
            Self::Store => "store",
            Self::Coordinator => "coordinator",
            Self::Join => "join",
            Self::Leave => "leave",
            Self::All => "all",
        }
    }

    /// Whether it befalls one worker.
    pub(super) fn is_a_workers(self) -> bool {
        matches!(self, Self::Kill | Self::Stop | Self::Slow | Self::Partition | Self::Leave)
    }
}

/// Whom a fault befalls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// By the order in which they were started, from 0.
    Worker(usize),
    /// Who has this rank then.
    Rank(u32),
    Coordinator,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Worker(number) => write!(f, "worker {number}"),
            Self::Rank(rank) => write!(f, "rank {rank}"),
            Self::Coordinator => f.write_str("coordinator"),
        }
    }
}

impl Serialize for Target {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Target {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let target = match text.split_once(' ') {
            None if text == "coordinator" => Some(Self::Coordinator),
            Some(("worker", number)) => number.parse().ok().map(Self::Worker),
            Some(("rank", number)) => number.parse().ok().map(Self::Rank),
            _ => None,
        };
        let expected = "expected \"worker 2\", \"rank 0\" or \"coordinator\"";
        target.ok_or_else(|| serde::de::Error::custom(format!("\"{text}\" is no target; {expected}")))
    }
}

/// What a partition cuts a worker off from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Off {
    Coordinator,
    /// No peer reaches it.
    Peers,
    #[default]
    Both,
}

/// `[[fault]]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Named {
    /// When so many steps are applied.
    pub(super) at_step: u64,
    pub(super) kind: Kind,
    /// Left out: one that is drawn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) target: Option<Target>,
    /// How long it lasts, or who was killed or left stays away; left out: drawn.
    #[serde(rename = "for", skip_serializing_if = "Option::is_none")]
    pub(super) lasts: Option<Millis>,
    /// Of a partition; left out: both.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) from: Option<Off>,
}

impl Chaos {
    fn workers() -> usize {
        4
    }

    fn seed() -> u64 {
        1
    }

    fn kinds() -> Vec<Kind> {
        Kind::DRAWN.to_vec()
    }

    fn restart_after() -> [Millis; 2] {
        [Millis(100), Millis(2_000)]
    }

    fn store_rates() -> [f64; 2] {
        [0.02, 0.5]
    }

    fn stall() -> Millis {
        Millis(60_000)
    }
}

impl Plan {
    pub(super) fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
        Self::parse(&text, &path.display().to_string())
    }

    /// Parses a plan. `origin` names it in errors.
    pub(super) fn parse(text: &str, origin: &str) -> Result<Self, ConfigError> {
        let (mut plan, origin): (Self, _) = read(text, origin, &[], &Self::full())?;
        let Chaos { workers, kinds, restart_after, lasts, store_rates, stall, .. } = &plan.chaos;
        let wrong = |key, found: String, rule: &str| Err(ConfigError::Value { origin: origin.clone(), key, found, rule: rule.to_owned() });
        if !(1..=MOST_WORKERS).contains(workers) {
            return wrong("chaos.workers", workers.to_string(), "it must lie from 1 to 64");
        }
        for (key, range) in [("chaos.restart_after", Some(restart_after)), ("chaos.lasts", lasts.as_ref())] {
            if let Some([from, to]) = range.filter(|[from, to]| from > to) {
                return wrong(key, format!("[\"{from}\", \"{to}\"]"), "the shortest must come first");
            }
        }
        if let Some(rate) = store_rates.iter().find(|rate| !(0.0..=0.9).contains(*rate)) {
            return wrong("chaos.store_rates", rate.to_string(), "each must lie from 0 to 0.9");
        }
        if stall.0 == 0 {
            return wrong("chaos.stall", format!("\"{stall}\""), "it must be 1ms or more");
        }
        if kinds.is_empty() && plan.drawn() > 0 {
            return wrong("chaos.kinds", "[]".to_owned(), "it must have one or more, unless chaos.faults = 0");
        }
        for fault in &plan.fault {
            if let Some(rule) = fault.broken_rule(*workers) {
                let target = fault.target.map_or_else(String::new, |target| format!(" at {target}"));
                return wrong("fault", format!("{}{target}", fault.kind.name()), rule);
            }
        }
        plan.fault.sort_by_key(|fault| fault.at_step);
        Ok(plan)
    }

    /// How many faults are drawn.
    pub(super) fn drawn(&self) -> usize {
        self.chaos.faults.unwrap_or(if self.fault.is_empty() { FAULTS } else { 0 })
    }

    /// Whether the store fails at all.
    pub(super) fn harms_the_store(&self) -> bool {
        self.drawn() > 0 && self.chaos.kinds.contains(&Kind::Store) || self.fault.iter().any(|fault| fault.kind == Kind::Store)
    }

    /// The run's config under this plan, with as many workers as are said, to lie in `output`.
    pub(super) fn run(&self, set: &[String], workers: usize, output: &Path) -> Result<RunConfig, ConfigError> {
        let mut config = RunConfig::load(&self.chaos.run, set)?;
        config.run.output = output.display().to_string();
        config.workers.count = workers;
        config.workers.min = config.workers.min.min(workers);
        config.workers.max = config.workers.max.map(|max| max.max(workers));
        // The plan's number may be none that the run can have.
        RunConfig::parse(&config.to_toml(), &format!("{} under this plan", self.chaos.run.display()), &[])
    }

    /// A plan that has every key.
    fn full() -> Self {
        let lasts = Some([Millis(1); 2]);
        let chaos = Chaos {
            run: PathBuf::new(),
            output: PathBuf::new(),
            workers: 1,
            seed: 1,
            faults: Some(1),
            kinds: Chaos::kinds(),
            restart_after: Chaos::restart_after(),
            lasts,
            store_rates: Chaos::store_rates(),
            stall: Chaos::stall(),
        };
        let fault = Named { at_step: 1, kind: Kind::Kill, target: None, lasts: None, from: None };
        Self { chaos, fault: vec![fault] }
    }
}

impl Named {
    fn broken_rule(&self, workers: usize) -> Option<&'static str> {
        let may_target = self.kind.is_a_workers() || self.kind == Kind::Coordinator;
        match self.target {
            Some(_) if !may_target => Some("this kind has no target"),
            Some(Target::Coordinator) if !matches!(self.kind, Kind::Stop | Kind::Coordinator) => {
                Some("the coordinator is stopped by kind \"stop\" and killed by kind \"coordinator\"; the others are for workers")
            }
            Some(Target::Worker(_) | Target::Rank(_)) if self.kind == Kind::Coordinator => Some("its target can only be the coordinator"),
            Some(Target::Worker(number)) if number >= workers => Some("workers are numbered from 0 to below chaos.workers"),
            _ if self.from.is_some() && self.kind != Kind::Partition => Some("only a partition has `from`"),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "[chaos]\nrun = \"run.toml\"\noutput = \"chaos\"\n";

    fn parse(more: &str) -> Result<Plan, String> {
        Plan::parse(&format!("{SMALL}{more}"), "plan.toml").map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_left_out_has_defaults_and_named_faults_are_taken_alone() {
        let plan = parse("").unwrap();
        assert_eq!((plan.drawn(), plan.chaos.workers, plan.chaos.seed, plan.chaos.kinds.len()), (40, 4, 1, 8));
        assert!(plan.harms_the_store());
        let text = "[[fault]]\nat_step = 30\nkind = \"kill\"\ntarget = \"worker 2\"\nfor = \"500ms\"\n\
                    [[fault]]\nat_step = 9\nkind = \"partition\"\ntarget = \"rank 0\"\nfrom = \"peers\"\n\
                    [[fault]]\nat_step = 20\nkind = \"stop\"\ntarget = \"coordinator\"\n";
        let plan = parse(text).unwrap();
        assert_eq!((plan.drawn(), plan.harms_the_store()), (0, false));
        let told: Vec<_> = plan.fault.iter().map(|f| (f.at_step, f.kind.name(), f.target.unwrap().to_string())).collect();
        let expected = [(9, "partition", "rank 0"), (20, "stop", "coordinator"), (30, "kill", "worker 2")];
        assert_eq!(told, expected.map(|(step, kind, target)| (step, kind, target.to_owned())));
        assert_eq!(parse(&format!("faults = 3\n{text}")).unwrap().drawn(), 3);
    }

    #[test]
    fn a_plan_reads_back_as_itself() {
        let plan = parse("faults = 3\nlasts = [\"1ms\", \"2s\"]\n[[fault]]\nat_step = 3\nkind = \"all\"\n").unwrap();
        let written = toml_of(&plan);
        assert_eq!(Plan::parse(&written, "x").unwrap(), plan, "{written}");
    }

    fn toml_of(plan: &Plan) -> String {
        // JSON's inline values are TOML's, but for the separators of tables.
        let chaos = serde_json::to_value(&plan.chaos).unwrap();
        let lines = |value: &serde_json::Value| -> String {
            value.as_object().unwrap().iter().map(|(key, value)| format!("{key} = {value}\n")).collect()
        };
        let faults: String = plan.fault.iter().map(|f| format!("[[fault]]\n{}", lines(&serde_json::to_value(f).unwrap()))).collect();
        format!("[chaos]\n{}{faults}", lines(&chaos))
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, words) in [
            ("worker = 3", "unknown key `chaos.worker`; did you mean `chaos.workers`?"),
            ("[[falt]]\nat_step = 1\n", "unknown key `falt`; did you mean `fault`?"),
            ("kinds = [\"kil\"]", "unknown variant `kil`"),
            ("kinds = []", "`chaos.kinds` is []"),
            ("workers = 0", "`chaos.workers` is 0"),
            ("lasts = [\"2s\", \"1s\"]", "`chaos.lasts` is [\"2s\", \"1s\"], but the shortest must come first"),
            ("store_rates = [0.1, 1.0]", "`chaos.store_rates` is 1"),
            ("[[fault]]\nat_step = 1\nkind = \"kill\"\ntarget = \"worker 4\"\n", "from 0 to below chaos.workers"),
            ("[[fault]]\nat_step = 1\nkind = \"kill\"\ntarget = \"coordinator\"\n", "the others are for workers"),
            ("[[fault]]\nat_step = 1\nkind = \"join\"\ntarget = \"worker 0\"\n", "this kind has no target"),
            ("[[fault]]\nat_step = 1\nkind = \"kill\"\nfrom = \"peers\"\n", "only a partition has `from`"),
            ("[[fault]]\nat_step = 1\nkind = \"kill\"\ntarget = \"everyone\"\n", "\"everyone\" is no target"),
            ("[[fault]]\nat_step = 1\nknid = \"kill\"\n", "unknown field `knid`"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(words) && error.starts_with("plan.toml"), "{text}: {error}");
        }
    }
}
