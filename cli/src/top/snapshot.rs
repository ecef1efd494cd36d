//! What is shown, as of one moment.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use ella_coordinator::history::{Happening, Rank};
use ella_coordinator::status::JobReport;
use serde::Serialize;

use crate::report::date;
use crate::ui::{count, span};

/// Points of a curve, left to right.
pub(super) type Curve = Vec<(f64, f64)>;

/// By step; of a job, by how often it was looked at.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Curves {
    pub(super) loss: Curve,
    pub(super) held_out: Curve,
    /// Samples a second.
    pub(super) rate: Curve,
}

/// A run or job, as of one moment.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Snapshot {
    pub(super) run: String,
    /// Its coordinator told so; else its folder.
    pub(super) live: bool,
    /// The coordinator does not answer any more.
    pub(super) gone: bool,
    pub(super) phase: String,
    pub(super) reason: String,
    pub(super) term: u64,
    pub(super) generation: u64,
    pub(super) step: u64,
    pub(super) steps: u64,
    pub(super) epoch: Option<u64>,
    pub(super) samples: u64,
    pub(super) samples_per_second: Option<f64>,
    pub(super) loss: Option<f64>,
    pub(super) seconds_left: Option<f64>,
    pub(super) last_commit_step: u64,
    /// That have a place.
    pub(super) workers: usize,
    /// That have none.
    pub(super) waiting: usize,
    pub(super) verdict: String,
    pub(super) ranks: Vec<Rank>,
    /// Newest first.
    pub(super) events: Vec<Happening>,
    pub(super) counts: BTreeMap<String, u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) job: Option<JobReport>,
    pub(super) curves: Curves,
    /// What could not be read.
    pub(super) problems: Vec<String>,
}

/// Without what would move a terminal's cursor.
pub(super) fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(500).collect()
}

impl Snapshot {
    /// What is done, of how much.
    pub(super) fn progress(&self) -> (u64, u64) {
        self.job.as_ref().map_or((self.step, self.steps), |job| (job.units_done, job.units))
    }

    /// Lines of facts: title and value.
    pub(super) fn facts(&self) -> Vec<(&'static str, String)> {
        let left = self.seconds_left.map_or_else(String::new, |left| format!(", {} left", span(left)));
        if let Some(job) = &self.job {
            let JobReport { kind, stage, units, units_done, units_held, units_given_up, samples, samples_per_second, .. } = job;
            return vec![
                ("job", format!("{kind}, stage {stage}{left}")),
                ("units", format!("{units_done} of {units} done, {units_held} held, {units_given_up} given up")),
                ("samples", format!("{samples}, {samples_per_second:.1}/s")),
                ("workers", job.workers.len().to_string()),
            ];
        }
        let epoch = self.epoch.map_or_else(String::new, |epoch| format!(", epoch {epoch}"));
        let rate = self.samples_per_second.map_or_else(String::new, |rate| format!(", {rate:.1}/s"));
        let waiting = if self.waiting > 0 { format!(", {} without a place", self.waiting) } else { String::new() };
        let workers =
            if self.live { format!("{}{waiting}", count(self.workers, "rank")) } else { "none known: no coordinator was asked".into() };
        vec![
            ("step", format!("{} of {}{left}", self.step, self.steps)),
            ("loss", self.loss.map_or_else(|| "–".to_owned(), |loss| format!("{loss:.4}"))),
            ("samples", format!("{}{rate}{epoch}", self.samples)),
            ("commit", if self.last_commit_step > 0 { format!("step {}", self.last_commit_step) } else { "none yet".into() }),
            ("workers", format!("{workers}; term {}, generation {}", self.term, self.generation)),
        ]
    }
}

/// All of it in lines, where there is no terminal.
pub(super) fn text(snapshot: &Snapshot) -> String {
    let Snapshot { run, phase, reason, verdict, ranks, events, counts, job, problems, .. } = snapshot;
    let reason = if reason.is_empty() { String::new() } else { format!(" ({reason})") };
    let mut text = format!("run      {run}\nphase    {phase}{reason}\n");
    text += &snapshot.facts().iter().map(|(name, value)| format!("{name:<8} {value}\n")).collect::<String>();
    if job.is_none() {
        text += &format!("waits    {verdict}\n");
    }
    for rank in ranks {
        let parts: Vec<String> = shares(rank).iter().map(|(name, seconds)| format!("{name} {:.1}", 1000.0 * seconds)).collect();
        let (step, waits) = (1000.0 * rank.seconds, 1000.0 * rank.waits);
        text += &format!("rank     {} on {}: {step:.1} ms a step, waits {waits:.1} ({})\n", rank.rank, rank.host, parts.join(", "));
    }
    for unit in job.iter().flat_map(|job| &job.given_up) {
        text += &format!("given up {}: {}\n", clean(&unit.unit), clean(&unit.error));
    }
    for (name, n) in job.iter().flat_map(|job| &job.results) {
        text += &format!("result   {} {n}\n", clean(name));
    }
    text += &counts.iter().map(|(name, n)| format!("count    {name} {n}\n")).collect::<String>();
    text += &events.iter().take(10).map(|event| format!("event    {}\n", told(event))).collect::<String>();
    text + &problems.iter().map(|problem| format!("problem  {problem}\n")).collect::<String>()
}

/// Where a step goes, in its order, without what is nothing.
pub(super) fn shares(rank: &Rank) -> Vec<(&'static str, f64)> {
    let own = ["data", "forward", "backward", "update", "commit", "draw"].map(|part| (part, rank.part(part)));
    let rest = [("other", rank.other()), ("reduce", (rank.part("reduce") - rank.waits).max(0.0)), ("waits", rank.waits)];
    own.into_iter().chain(rest).filter(|(_, seconds)| *seconds > 0.000_05).collect()
}

/// An event in one line: the time of day (UTC), with the date if that is not today's. Its words name the step that it is about.
pub(super) fn told(event: &Happening) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let (at, now) = (date(event.at_unix_ms), date(u64::try_from(now).unwrap_or(u64::MAX)));
    let today = now.split_inclusive(' ').next().unwrap_or_default();
    format!("{}Z {}", at.strip_prefix(today).unwrap_or(&at), event.text)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use ella_coordinator::history::{Events, judge};
    use ella_coordinator::status::{FailedUnitReport, JobWorkerReport, PartsReport};
    use serde_json::json;

    /// A run with two ranks, one of which the other waits for.
    pub(in crate::top) fn training() -> Snapshot {
        let rank = |rank: u32, data: f64, reduce: f64| {
            Rank::named(rank, "w", "node-1\u{1b}[31m").of_step(&PartsReport { data, forward: 0.04, reduce, ..PartsReport::default() })
        };
        let mut ranks = vec![rank(0, 0.001, 0.1), rank(1, 0.1, 0.001)];
        ranks.iter_mut().for_each(|rank| rank.host = clean(&rank.host));
        let verdict = judge(&mut ranks);
        let mut events = Events::default();
        let lost =
            events.add(1, &json!({"event": "lost", "worker": "w2 on h", "rank": 2, "why": "silent", "at_unix_ms": 3_661_000})).unwrap();
        let curve = |scale: f64| (1..=400).map(|step| (f64::from(step), scale / f64::from(step).sqrt())).collect();
        Snapshot {
            run: "runs/mine".into(),
            live: true,
            phase: "training".into(),
            step: 400,
            steps: 1000,
            epoch: Some(2),
            samples: 12_800,
            samples_per_second: Some(64.25),
            loss: Some(0.125),
            seconds_left: Some(600.0),
            last_commit_step: 300,
            workers: 2,
            waiting: 1,
            verdict,
            ranks,
            events: vec![lost],
            counts: [("workers_lost".to_owned(), 1)].into(),
            curves: Curves { loss: curve(1.0), held_out: Vec::new(), rate: curve(100.0) },
            ..Snapshot::default()
        }
    }

    pub(in crate::top) fn preparing() -> Snapshot {
        let given_up = vec![FailedUnitReport { unit: "a.tar".into(), error: "cut\u{7}off".into(), permanent: true }];
        let workers = vec![JobWorkerReport { host: "node-1".into(), units_done: 4, ..JobWorkerReport::default() }];
        let results = [("kept".to_owned(), 60)].into();
        let (units, units_done, units_held, units_given_up) = (9, 4, 1, 1);
        let job = JobReport {
            kind: "prepare".into(),
            stage: 2,
            units,
            units_done,
            units_held,
            units_given_up,
            results,
            workers,
            given_up,
            ..JobReport::default()
        };
        Snapshot { run: "data/a".into(), live: true, phase: "working".into(), job: Some(job), ..Snapshot::default() }
    }

    #[test]
    fn an_event_names_its_step_once_and_todays_date_not_at_all() {
        let now = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap();
        let line = json!({"event": "started", "step": 7, "generation": 2, "at_unix_ms": now});
        let said = told(&Events::default().add(1, &line).unwrap());
        assert!(said.ends_with("Z training begins at step 7, generation 2") && said.matches("step 7").count() == 1, "{said}");
        assert!(!said.contains('-') && said.find("Z ") == Some(8), "{said}");
    }

    #[test]
    fn all_of_it_is_there_in_plain_lines() {
        let text = text(&training());
        for line in [
            "run      runs/mine",
            "phase    training",
            "step     400 of 1000, 10 min 00 s left",
            "workers  2 ranks, 1 without a place; term 0, generation 0",
            "count    workers_lost 1",
            "event    1970-01-01 01:01:01Z rank 2, w2 on h was lost: silent",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in:\n{text}");
        }
        assert!(text.contains("waits    others wait up to 99 ms") && text.contains("rank     1 on node-1"), "{text}");
        assert!(!text.contains('\u{1b}'));
        let job = super::text(&preparing());
        assert!(job.contains("units    4 of 9 done, 1 held, 1 given up\n") && job.contains("given up a.tar: cut off\n"), "{job}");
        assert!(job.contains("result   kept 60\n") && !job.contains("waits"));
    }
}
