//! What happened to a run or job, each in one line of words. What a line of `events/` says in any version of ella is taken as it is, and cut to
//! a bounded length: a generation may list thousands of workers.

use std::collections::{BTreeSet, VecDeque};

use serde::Serialize;
use serde_json::Value;

/// Commits, and other events, that are kept: the newest.
const MOST: usize = 4_096;
/// Characters of a line.
const LONGEST: usize = 300;

/// What an event is, for those who look for some of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A commit stands, or is retired.
    Commit,
    /// A generation begins, is adopted, or is over.
    Generation,
    /// A worker is lost.
    Lost,
    /// A worker leaves in good order, or had no place.
    Left,
    /// A worker comes.
    Joined,
    /// Something is wrong: a refusal, a straggler, a damaged commit, a failed unit.
    Trouble,
    /// A run, job or stage begins or ends.
    Phase,
    /// Anything else.
    Other,
}

/// One event.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Happening {
    /// When, in milliseconds since 1970.
    pub at_unix_ms: u64,
    /// The coordinator's term; of a job 0.
    pub term: u64,
    /// What it is.
    pub kind: Kind,
    /// Its name in `events/`.
    pub event: String,
    /// The step that it is about, if it names one.
    pub step: Option<u64>,
    /// In words.
    pub text: String,
}

/// The newest events, oldest first.
#[derive(Clone, Debug, Default)]
pub struct Events {
    commits: VecDeque<Happening>,
    others: VecDeque<Happening>,
    /// Members of the newest generation, with its term.
    members: Option<(u64, BTreeSet<String>)>,
    /// That are no longer here.
    dropped: u64,
}

impl Events {
    /// Takes in a line of `events/`, written in `term`. None if it is no event.
    pub fn add(&mut self, term: u64, line: &Value) -> Option<Happening> {
        let event: String = line["event"].as_str()?.chars().take(40).collect();
        let mut text = words(&event, line);
        if matches!(event.as_str(), "generation" | "adopted") {
            text += &self.changes(term, line);
        }
        let step = line["step"].as_u64().or_else(|| line["from_step"].as_u64());
        let happening =
            Happening { at_unix_ms: line["at_unix_ms"].as_u64().unwrap_or(0), term, kind: kind(&event), event, step, text: cut(&text) };
        self.keep(happening.clone());
        Some(happening)
    }

    fn keep(&mut self, happening: Happening) {
        let ring = if happening.event == "committed" { &mut self.commits } else { &mut self.others };
        ring.push_back(happening);
        if ring.len() > MOST {
            ring.pop_front();
            self.dropped += 1;
        }
    }

    /// Who is new in a generation, and who is no longer there.
    fn changes(&mut self, term: u64, line: &Value) -> String {
        let workers: BTreeSet<String> =
            line["workers"].as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect();
        let before = self.members.replace((term, workers));
        let (Some((_, now)), Some((_, before))) = (&self.members, before.filter(|(of, _)| *of == term)) else { return String::new() };
        let (came, went) = (now.difference(&before).count(), before.difference(now).count());
        let said = |n: usize, what: &str| if n > 0 { format!(", {n} {what}") } else { String::new() };
        said(came, "joined") + &said(went, "gone")
    }

    /// Takes in all that came after.
    pub(super) fn append(&mut self, later: Self) {
        later.commits.into_iter().chain(later.others).for_each(|happening| self.keep(happening));
        self.members = later.members.or(self.members.take());
        self.dropped += later.dropped;
    }

    /// Commits, oldest first.
    pub fn commits(&self) -> impl DoubleEndedIterator<Item = &Happening> {
        self.commits.iter()
    }

    /// All else, oldest first.
    pub fn others(&self) -> impl DoubleEndedIterator<Item = &Happening> {
        self.others.iter()
    }

    /// Events that were let go, since there were too many.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }
}

/// Sorts events that are in the order in which they came about: the newest to the front, of one moment, too.
pub fn newest_first(events: &mut [Happening]) {
    events.sort_by_key(|event| event.at_unix_ms);
    events.reverse();
}

fn kind(event: &str) -> Kind {
    match event {
        "committed" | "retired" => Kind::Commit,
        "generation" | "adopted" | "regroup" => Kind::Generation,
        "lost" | "gone" => Kind::Lost,
        "left" => Kind::Left,
        "attached" | "joined" => Kind::Joined,
        "refused" | "stranger" | "straggler" | "unlike" | "damaged" | "unit_failed" => Kind::Trouble,
        "started" | "draining" | "ended" | "stage" | "over" => Kind::Phase,
        _ => Kind::Other,
    }
}

fn words(event: &str, line: &Value) -> String {
    let text = |key: &str| line[key].as_str().unwrap_or_default();
    let number = |key: &str| line[key].as_u64().unwrap_or(0);
    let many = |n: u64, thing: &str| format!("{n} {thing}{}", if n == 1 { "" } else { "s" });
    let length = |key: &str| line[key].as_array().map_or(0, Vec::len) as u64;
    let people = || many(length("workers"), "worker");
    let rank = line["rank"].as_u64().map_or_else(String::new, |rank| format!("rank {rank}, "));
    match event {
        "attached" => format!("{} came, on {} ({} of {})", text("worker"), text("device"), number("have"), number("need")),
        "refused" => format!("{} was refused: {}", text("worker"), text("why")),
        "stranger" => format!("{} was turned away: {}", text("peer"), text("why")),
        "left" => format!("{} left: {}", text("worker"), text("why")),
        "lost" => format!("{rank}{} was lost: {}", text("worker"), text("why")),
        "generation" => format!("generation {} from step {}, {}", number("generation"), number("from_step"), people()),
        "adopted" => {
            format!("generation {} goes on under this coordinator at step {}, {}", number("generation"), number("step"), people())
        }
        "regroup" if line["at_boundary"].as_bool() == Some(true) => {
            format!("generation {} ends with its next step: {}", number("generation"), text("reason"))
        }
        "regroup" => format!("generation {} is over: {}", number("generation"), text("reason")),
        "straggler" => {
            format!("the others have waited {} ms for {rank}{}, which is at: {}", number("waited_ms"), text("worker"), text("activity"))
        }
        "unlike" => format!("{}: {}", text("worker"), text("how")),
        "started" => format!("training begins at step {}, generation {}", number("step"), number("generation")),
        "committed" => format!("step {} is committed: {}, {:.1} MB", number("step"), text("folder"), number("bytes") as f64 / 1e6),
        "retired" => format!("deleted by the keep rule: {}", many(length("folders"), "older commit")),
        "damaged" => format!("the commit of step {} is damaged: {}", number("step"), text("what")),
        "draining" => format!("the run was asked to leave: {}", text("reason")),
        "ended" => ended(text("outcome"), &format!(" at step {}", number("step")), text("reason")),
        "joined" => format!("{} came, on {} ({})", text("worker"), text("host"), many(number("workers"), "worker")),
        "gone" => format!("{} is gone: {}; to be done anew: {}", text("worker"), text("why"), many(number("requeued"), "unit")),
        "unit_failed" => {
            let given_up = if line["given_up"].as_bool() == Some(true) { "given up" } else { "tried again" };
            format!("{} failed and is {given_up}: {}", text("unit"), text("error"))
        }
        "stage" => format!("stage {} begins, {}", number("stage"), many(number("units"), "unit")),
        "over" => ended(text("outcome"), "", text("reason")),
        other => format!("{other} {line}"),
    }
}

fn ended(outcome: &str, place: &str, reason: &str) -> String {
    let reason = if reason.is_empty() { String::new() } else { format!(": {reason}") };
    format!("{outcome}{place}{reason}")
}

fn cut(text: &str) -> String {
    let mut left = text.chars();
    let mut short: String = left.by_ref().take(LONGEST).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if left.next().is_some() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::Note;
    use crate::job::JobNote;
    use serde_json::json;

    fn told(note: &Note) -> Happening {
        Events::default().add(1, &serde_json::to_value(note).unwrap()).unwrap()
    }

    #[test]
    fn events_are_told_in_words_as_the_core_names_them() {
        let worker = || "a1 on h".to_owned();
        let lost = told(&Note::Lost { worker: worker(), rank: Some(2), why: "silent".into() });
        assert_eq!((lost.kind, lost.text.as_str()), (Kind::Lost, "rank 2, a1 on h was lost: silent"));
        let left = told(&Note::Left { worker: worker(), why: "asked by ella drain".into() });
        assert_eq!((left.kind, left.text.as_str()), (Kind::Left, "a1 on h left: asked by ella drain"), "nothing is lost");
        let committed = told(&Note::Committed { step: 7, generation: 1, folder: "commits/7.1".into(), bytes: 2_500_000, took_ms: 900 });
        assert_eq!((committed.kind, committed.step), (Kind::Commit, Some(7)));
        assert_eq!(committed.text, "step 7 is committed: commits/7.1, 2.5 MB");
        let failed = JobNote::UnitFailed { unit: "a.tar".into(), worker: worker(), error: "cut".into(), permanent: true, given_up: true };
        assert_eq!(told(&Note::Job(failed)).text, "a.tar failed and is given up: cut");
        let over = told(&Note::Job(JobNote::Over { outcome: "done", stage: 1, reason: String::new(), permanent: false }));
        assert_eq!((over.kind, over.text.as_str()), (Kind::Phase, "done"));
        let adopted = told(&Note::Adopted { generation: 3, workers: vec![worker()], step: 5 });
        assert_eq!((adopted.kind, adopted.step), (Kind::Generation, Some(5)));
        let unlike = told(&Note::Unlike { worker: worker(), how: "it computes otherwise than rank 0: x".into() });
        assert_eq!((unlike.kind, unlike.text.as_str()), (Kind::Trouble, "a1 on h: it computes otherwise than rank 0: x"));
    }

    #[test]
    fn a_generation_says_who_is_new_and_long_lines_are_cut() {
        let mut events = Events::default();
        let generation = |n: u64, workers: &[&str]| json!({"event": "generation", "generation": n, "workers": workers, "from_step": n});
        events.add(1, &generation(1, &["a", "b"])).unwrap();
        let second = events.add(1, &generation(2, &["a", "c", "d"])).unwrap();
        assert_eq!(second.text, "generation 2 from step 2, 3 workers, 2 joined, 1 gone");
        assert_eq!(events.add(2, &generation(1, &["x"])).unwrap().text, "generation 1 from step 1, 1 worker");
        let long = events.add(1, &json!({"event": "left", "worker": "w\n".repeat(1000), "why": ""})).unwrap();
        assert!(long.text.chars().count() == LONGEST + 1 && !long.text.contains('\n'));
        // A control character may have more bytes than the space in its place.
        assert_eq!(events.add(1, &json!({"event": "left", "worker": "w\u{85}", "why": "x"})).unwrap().text, "w  left: x");
        assert_eq!(events.add(1, &json!({"step": 3})), None);
    }

    #[test]
    fn of_one_moment_what_came_last_is_the_newest() {
        let mut events = Events::default();
        let lines = [(7, "generation"), (8, "started"), (8, "retired"), (8, "lost")];
        lines.iter().for_each(|(at, event)| drop(events.add(1, &json!({"event": event, "at_unix_ms": at, "folders": ["a"]}))));
        let mut all: Vec<Happening> = events.others().cloned().collect();
        newest_first(&mut all);
        assert_eq!(all.iter().map(|one| one.event.as_str()).collect::<Vec<_>>(), ["lost", "retired", "started", "generation"]);
        assert_eq!(all[1].text, "deleted by the keep rule: 1 older commit");
    }

    #[test]
    fn the_newest_are_kept_and_commits_apart() {
        let mut events = Events::default();
        for step in 0..5_000u64 {
            events.add(1, &json!({"event": "committed", "step": step})).unwrap();
        }
        events.add(1, &json!({"event": "lost", "worker": "w"})).unwrap();
        assert_eq!((events.commits().count(), events.others().count(), events.dropped()), (MOST, 1, 904));
        assert_eq!(events.commits().next_back().and_then(|commit| commit.step), Some(4_999));
    }
}
