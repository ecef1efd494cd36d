//! The processes of a run while it goes on: progress is shown, signals are passed on, and who was killed is started again.

use std::net::SocketAddr;
use std::time::Duration;

use ella_coordinator::client;
use ella_coordinator::status::StatusReport;
use ella_proto::access::Access;
use ella_proto::stops::Stops;
use futures::FutureExt;
use futures::future::BoxFuture;
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::ChildStdout;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::places::{MOST, Places, Then};
use crate::children::Children;
use crate::ui::{FAILED, Meter, PREEMPTED, count, note};

/// How long a coordinator may take to open the run.
const OPENING: Duration = Duration::from_secs(300);
/// How often the coordinator is asked for the status.
const POLL: Duration = Duration::from_millis(250);
/// How long the coordinator may take to say what became of the run once no worker is left here: it looks for whom to blame.
const AFTERMATH: Duration = Duration::from_secs(45);
/// How long anyone may take once a worker is gone for good before all had come: the run can't begin without it, and nobody else knows why.
const NOT_BEGUN: Duration = Duration::from_secs(5);
/// How long workers may take to leave once their coordinator has.
pub(super) const LEAVING: Duration = Duration::from_secs(10);
/// How long all may take that are to leave at once: a coordinator needs a moment to write that the run was left.
const AT_ONCE: Duration = Duration::from_secs(3);

/// The coordinator's one line on stdout.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Opened {
    Serving { grpc: SocketAddr, http: SocketAddr, fell_back: Option<String> },
    Done { step: u64 },
}

/// What the coordinator says first; none if it ends, says something else, or takes too long.
pub(crate) async fn first_line(stdout: Option<ChildStdout>) -> Option<Opened> {
    let mut line = String::new();
    let mut reader = BufReader::new(stdout?);
    timeout(OPENING, reader.read_line(&mut line)).await.ok()?.ok()?;
    serde_json::from_str(&line).ok()
}

/// What was seen of a run.
pub(super) struct Seen {
    /// The status, as it was last answered.
    pub(super) last: Option<StatusReport>,
    /// How often a process was started again.
    pub(super) restarts: u32,
    /// The exit code that one which was killed stands for: that was a failure, unless the run was to be left at once.
    pub(super) killed: u8,
}

/// Watches a run's processes until all have ended for good.
pub(super) struct Watch<'a> {
    pub(super) children: &'a mut Children,
    pub(super) places: Places,
    meter: Meter,
    told: Told,
    /// The status, as it was last answered.
    last: Option<StatusReport>,
    /// The newest step of any status: a coordinator that has come back begins with the last commit's.
    step: u64,
    /// Training has begun, or begun again.
    begun: bool,
    /// When places are filled again.
    due: Vec<(Instant, usize)>,
    /// What a coordinator that was started again says first.
    opening: Option<BoxFuture<'static, Option<Opened>>>,
    /// When all that still run are killed.
    deadline: Option<Instant>,
    asked: u32,
}

impl<'a> Watch<'a> {
    pub(super) fn new(children: &'a mut Children, places: Places, meter: Meter) -> Self {
        let (told, due) = (Told::default(), Vec::new());
        Self { children, places, meter, told, last: None, step: 0, begun: false, due, opening: None, deadline: None, asked: 0 }
    }

    /// Watches until the run is over here.
    pub(super) async fn run(mut self, coordinator: Access, stops: &mut Stops) -> Seen {
        let (send, mut status) = watch::channel(None);
        let poll = tokio::spawn(poll(coordinator, send));
        let mut polled = true;
        while !self.children.all_ended() || !self.due.is_empty() {
            let due = self.due.iter().min().copied();
            tokio::select! {
                changed = status.changed(), if polled => {
                    polled = changed.is_ok();
                    let report = status.borrow_and_update().clone();
                    report.into_iter().for_each(|report| self.seen(report));
                }
                at = self.children.next_end() => self.ended(at),
                opened = opened(&mut self.opening) => self.opened(opened),
                () = until(due.map(|due| due.0)) => {
                    self.due.retain(|other| Some(*other) != due);
                    if let Some((_, at)) = due {
                        self.fill(at).await;
                    }
                }
                () = until(self.deadline) => self.kill(),
                _ = stops.next() => self.asked_to_leave(),
            }
        }
        poll.abort();
        self.children.reap(LEAVING).await;
        let killed = if self.asked > 1 { PREEMPTED } else { FAILED };
        Seen { restarts: self.places.restarts(), last: self.last, killed }
    }

    fn seen(&mut self, report: StatusReport) {
        self.told.news(&report).into_iter().for_each(note);
        if !self.begun && !matches!(&*report.phase, "waiting" | "starting") {
            self.begun = true;
            self.meter.starts_at(report.step);
        }
        self.step = self.step.max(report.step);
        self.meter.at(report.step, &shown(&report));
        self.last = Some(report);
    }

    fn phase(&self) -> &str {
        self.last.as_ref().map_or("", |status| &status.phase)
    }

    fn ended(&mut self, at: usize) {
        let Some(status) = self.children.members()[at].ended else { return };
        let phase = self.last.as_ref().map_or("", |status| &status.phase);
        let then = self.places.ended(at, status, phase, self.step);
        let member = &self.children.members()[at];
        let goes_on = self.begun && self.asked == 0 && self.deadline.is_none() && matches!(phase, "training" | "regrouping" | "waiting");
        match then {
            Then::Again(pause) => return self.due.push((Instant::now() + pause, at)),
            Then::GivenUp => note(format_args!("{}; not started again: {MOST} times have brought the run no step further", member.how())),
            _ if !goes_on || self.places.is_coordinator(at) => {}
            Then::Left if status.success() => {}
            Then::Left => note(format_args!("{} has left", member.name)),
            Then::Empty => note(format_args!("{}; not started again", member.how())),
        }
        if self.places.is_coordinator(at) {
            self.over();
        } else if then != Then::Left {
            self.vacant();
        }
    }

    /// The coordinator has ended for good.
    fn over(&mut self) {
        self.due.clear();
        self.places.fix();
        self.within(LEAVING);
    }

    /// A worker's place stays empty. The others go on without it, or the coordinator says why they can't; where there is one, and but for these.
    fn vacant(&mut self) {
        if !self.places.is_coordinator(0) {
            return;
        }
        if !self.begun && matches!(self.phase(), "" | "waiting") {
            self.within(NOT_BEGUN);
        } else if !self.has_workers() {
            self.within(AFTERMATH);
        }
    }

    /// Whether a worker runs, or will.
    fn has_workers(&self) -> bool {
        let running = |(at, _): &(usize, _)| self.children.members()[*at].ended.is_none();
        let mut workers = self.children.members().iter().enumerate().skip(1);
        workers.any(|worker| running(&worker)) || self.due.iter().any(|(_, at)| *at > 0)
    }

    fn within(&mut self, patience: Duration) {
        self.deadline = Some(Instant::now() + patience).into_iter().chain(self.deadline).min();
    }

    /// Starts a process again, if that still makes sense.
    async fn fill(&mut self, at: usize) {
        if !self.places.may_start(at, self.phase()) {
            return self.vacant();
        }
        match self.children.start_again(at).await {
            Ok((how, stdout)) => {
                note(format_args!("{how}; started again{}", time(self.places.started(at))));
                if self.places.is_coordinator(at) {
                    self.opening = Some(first_line(stdout).boxed());
                }
            }
            Err(fail) => {
                note(fail.message);
                if self.places.is_coordinator(at) { self.over() } else { self.vacant() }
            }
        }
    }

    /// A coordinator that was started again serves; or it does not, and is killed if it has not ended.
    fn opened(&mut self, opened: Option<Opened>) {
        match opened {
            Some(Opened::Serving { fell_back, .. }) => fell_back.iter().for_each(|told| note(format_args!("WARNING: {told}"))),
            Some(Opened::Done { .. }) => {}
            None => self.children.signal_one(0, libc::SIGKILL),
        }
        if self.asked > 0 {
            self.children.signal_one(0, libc::SIGTERM);
        }
    }

    fn asked_to_leave(&mut self) {
        self.asked += 1;
        self.places.leave();
        match self.asked {
            1 => note("leaving after a commit; once more to leave at once"),
            2 => {
                note("leaving at once");
                self.due.clear();
                self.places.fix();
                self.within(AT_ONCE);
            }
            _ => return self.kill(),
        }
        if self.places.is_coordinator(0) {
            self.children.signal_one(0, libc::SIGTERM);
        } else {
            self.children.signal(libc::SIGTERM);
        }
    }

    fn kill(&mut self) {
        self.deadline = None;
        self.due.clear();
        self.places.fix();
        self.children.signal(libc::SIGKILL);
    }
}

/// At that time, or never.
async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

async fn opened(opening: &mut Option<BoxFuture<'static, Option<Opened>>>) -> Option<Opened> {
    let Some(first) = opening else { return std::future::pending().await };
    let opened = first.await;
    *opening = None;
    opened
}

/// Asks for the status again and again. What is not answered is not shown; the processes' ends decide.
async fn poll(coordinator: Access, to: watch::Sender<Option<StatusReport>>) {
    let mut ticks = tokio::time::interval(POLL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if let Ok(status) = client::status(&coordinator).await
            && to.send(Some(status.into())).is_err()
        {
            return;
        }
    }
}

/// What a status says beside its step.
fn shown(status: &StatusReport) -> String {
    let StatusReport { phase, reason, commits, last_commit_step, samples_per_second: rate, .. } = status;
    if matches!(&**phase, "waiting" | "starting" | "regrouping") {
        // What it waits for says so itself.
        return if reason.starts_with(&**phase) { reason.clone() } else { format!("{phase} {reason}") };
    }
    let loss = status.loss.map_or_else(String::new, |loss| format!("loss {loss:.4}  "));
    let draining = if phase == "draining" { "  leaving after a commit" } else { "" };
    let commit = if *commits == 0 { String::new() } else { format!(", the last at step {last_commit_step}") };
    let waits = if phase == "training" && !reason.is_empty() { format!("  {reason}") } else { String::new() };
    format!("{loss}{rate:.1} samples/s  {}{commit}{draining}{waits}", count(*commits as usize, "commit"))
}

/// What people were told of already.
#[derive(Debug, Default)]
struct Told {
    term: u64,
    lost: u64,
}

impl Told {
    /// Workers that were lost since the last status. What was lost before the first one is an old story.
    fn news(&mut self, status: &StatusReport) -> Option<String> {
        let lost = status.counts.get("workers_lost").copied().unwrap_or_default();
        let before = if self.term == status.term { self.lost } else { 0 };
        let first = self.term == 0;
        *self = Self { term: status.term, lost };
        let news = lost.saturating_sub(before);
        if first || news == 0 {
            return None;
        }
        let what = if news == 1 { "a worker was lost".to_owned() } else { format!("{news} workers were lost") };
        let why = if status.phase == "training" || status.reason.is_empty() { String::new() } else { format!(": {}", status.reason) };
        Some(format!("{what} at step {}{why}", status.step))
    }
}

/// Which time it is, from the second on: ` (2nd time)`.
fn time(n: u32) -> String {
    let end = match (n % 10, n % 100) {
        (_, 11..=13) => "th",
        (1, _) => "st",
        (2, _) => "nd",
        (3, _) => "rd",
        _ => "th",
    };
    if n > 1 { format!(" ({n}{end} time)") } else { String::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(term: u64, phase: &str, reason: &str, lost: u64) -> StatusReport {
        let counts = [("workers_lost".to_owned(), lost)].into();
        StatusReport { term, phase: phase.into(), reason: reason.into(), step: 7, counts, ..StatusReport::default() }
    }

    #[test]
    fn a_lost_worker_is_told_of_once() {
        let mut told = Told::default();
        assert_eq!(told.news(&status(1, "training", "", 3)), None, "that was before");
        assert_eq!(told.news(&status(1, "regrouping", "rank 1 is gone", 4)).unwrap(), "a worker was lost at step 7: rank 1 is gone");
        assert_eq!(told.news(&status(1, "training", "", 4)), None);
        assert_eq!(told.news(&status(1, "training", "waits for rank 2", 6)).unwrap(), "2 workers were lost at step 7");
        // A new coordinator counts anew.
        assert_eq!(told.news(&status(2, "waiting", "", 0)), None);
        assert_eq!(told.news(&status(2, "waiting", "1 of 2 workers", 1)).unwrap(), "a worker was lost at step 7: 1 of 2 workers");
    }

    #[test]
    fn progress_says_why_nothing_moves() {
        assert_eq!(shown(&status(1, "regrouping", "rank 1 is gone", 1)), "regrouping rank 1 is gone");
        assert_eq!(shown(&status(1, "waiting", "waiting for workers: 1 of 2", 0)), "waiting for workers: 1 of 2");
        assert_eq!(shown(&status(1, "training", "waits for rank 2", 0)), "0.0 samples/s  0 commits  waits for rank 2");
        let once = StatusReport { commits: 1, last_commit_step: 5, ..status(1, "training", "", 0) };
        assert_eq!(shown(&once), "0.0 samples/s  1 commit, the last at step 5");
    }

    #[test]
    fn times_are_ordinal() {
        assert_eq!([1, 2, 3, 4, 11, 22].map(time), ["", " (2nd time)", " (3rd time)", " (4th time)", " (11th time)", " (22nd time)"]);
    }

    /// Processes of these scripts, the first one as the coordinator, which nobody can ask for a status; and so often it is asked to leave.
    async fn watched(scripts: &[&str], asked: u32) -> (Children, Seen) {
        use crate::children::Logs;
        let mut children = Children::default();
        for (n, script) in scripts.iter().enumerate() {
            let arguments = ["-c", script].map(str::to_owned);
            children.start(&n.to_string(), std::path::Path::new("/bin/sh"), &arguments, &Logs { folder: None, verbose: false }).unwrap();
        }
        let places = Places::new(scripts.len(), true, false);
        let mut watch = Watch::new(&mut children, places, Meter::lines("test", 1));
        (0..asked).for_each(|_| watch.asked_to_leave());
        let seen = watch.run("http://127.0.0.1:1".into(), &mut Stops::catch().unwrap()).await;
        (children, seen)
    }

    #[tokio::test]
    async fn the_killed_are_started_again_until_the_coordinator_says_that_the_run_is_over() {
        let dir = tempfile::tempdir().unwrap();
        let (sign, done) = (dir.path().join("sign"), dir.path().join("done"));
        let (sign, done) = (sign.display(), done.display());
        // Each is killed when it first runs. Once both have come back the coordinator ends, and then so does the worker.
        let coordinator = format!("if mkdir {sign}; then kill -9 $$; fi; until [ -e {done} ]; do sleep 0.01; done; exit 3");
        let worker = format!("if mkdir {sign}.w; then kill -9 $$; fi; touch {done}; exit 0");
        let (children, seen) = watched(&[&coordinator, &worker], 0).await;
        let codes: Vec<_> = children.members().iter().map(|member| member.ended.unwrap().code()).collect();
        assert_eq!((codes, seen.restarts, seen.killed), (vec![Some(3), Some(0)], 2, FAILED));
    }

    #[tokio::test]
    async fn whoever_is_killed_because_the_run_is_to_be_left_at_once_has_not_failed() {
        let deaf = "trap '' TERM; while :; do sleep 0.01; done";
        let (children, seen) = watched(&[deaf; 2], 3).await;
        assert!(children.members().iter().all(|member| member.ended.unwrap().code().is_none()));
        assert_eq!((seen.restarts, seen.killed), (0, PREEMPTED));
    }
}
