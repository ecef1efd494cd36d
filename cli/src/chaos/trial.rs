//! One run under one seed's faults: starts it, harms it as its steps come, brings back what went, and keeps what was seen.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ella_coordinator::client;
use ella_coordinator::status::StatusReport;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};

use super::cluster::{Cluster, Who};
use super::faults::Fault;
use super::plan::{Kind, Target};
use super::proxy::Way;
use crate::children::ending;
use crate::train::{Opened, first_line};
use crate::ui::{DONE, FAILED, Fail, Meter, NO_RETRY, PREEMPTED, USAGE, one_line};

/// How often the coordinator is asked for the status.
const POLL: Duration = Duration::from_millis(15);
/// How long an answer may take before steps are reckoned by the clock.
const ANSWER: Duration = Duration::from_millis(400);
/// Steps that are reckoned by the clock, at most.
const RECKONED: f64 = 20.0;
/// How long what ended unasked stays away.
const AGAIN: Duration = Duration::from_millis(300);
/// The same for a worker that says that all is done: its coordinator says so too, unless it died just then.
const DONE_ALREADY: Duration = Duration::from_secs(3);
/// How long workers may take to leave after their coordinator.
const FAREWELL: Duration = Duration::from_secs(10);
/// A slow process runs, and sleeps, for so long at a time.
const PULSE: [Duration; 2] = [Duration::from_millis(15), Duration::from_millis(45)];
/// When a coordinator that hung goes on, after the start of the next one.
const WAKES_AFTER: Duration = Duration::from_millis(700);
/// More guests than so many leave before another one comes.
const GUESTS: usize = 2;
/// Unasked ends beyond the number of faults, before a run is given up.
const ENDS: usize = 20;

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Done,
    Failed(String),
    /// Nothing moved any more.
    Stuck(String),
}

/// A process that ended before the run did.
#[derive(Clone, Debug)]
pub(super) struct End {
    /// As its log is called.
    pub(super) name: String,
    pub(super) pid: u32,
    pub(super) is_coordinator: bool,
    /// By a fault, or at its word.
    pub(super) asked: bool,
    pub(super) at_ms: u64,
    pub(super) why: String,
}

/// What was seen of a run.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) outcome: Outcome,
    pub(super) faults: BTreeMap<&'static str, usize>,
    /// What was done when, in words.
    pub(super) told: Vec<String>,
    /// Faults that the run was over before.
    pub(super) left: usize,
    pub(super) ends: Vec<End>,
    /// How often each of the processes ended in which way, those after the run's end too.
    pub(super) exits: BTreeMap<String, usize>,
    /// When faults were, in milliseconds since 1970.
    pub(super) spans: Vec<(u64, u64)>,
    /// Steps as they were first seen in the status.
    pub(super) steps: Vec<(u64, u64)>,
    /// Worker ids by process.
    pub(super) ids: BTreeMap<u32, String>,
    /// Coordinators that served.
    pub(super) served: usize,
    pub(super) seconds: f64,
}

/// What the clock brings.
#[derive(Clone, Copy, Debug)]
enum Act {
    Start(Who),
    Wake(usize),
    /// A slow child's turn: until when it is slow, and whether it sleeps now.
    Pulse(usize, Instant, bool),
    Mend(usize, usize),
    Calm,
}

/// A status, and when it came.
type Seen = Option<(Instant, StatusReport)>;

pub(super) struct Trial {
    cluster: Cluster,
    pending: Vec<Fault>,
    /// The longest that nothing may move.
    patience: Duration,
    acts: BTreeMap<(Instant, u64), Act>,
    numbered: u64,
    record: Record,
    /// What is to be done when a child ends: come back after so long.
    back: BTreeMap<usize, Duration>,
    /// Nothing has happened since: no step, no fault.
    quiet: Instant,
    began: Instant,
    /// When the first step was seen, and which.
    first: Option<(Instant, u64)>,
    seen: Seen,
    most: usize,
}

pub(super) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl Record {
    /// Of a trial in which nothing has happened yet.
    pub(super) fn new() -> Self {
        Self {
            outcome: Outcome::Done,
            faults: BTreeMap::new(),
            told: Vec::new(),
            left: 0,
            ends: Vec::new(),
            exits: BTreeMap::new(),
            spans: Vec::new(),
            steps: Vec::new(),
            ids: BTreeMap::new(),
            served: 0,
            seconds: 0.0,
        }
    }
}

impl Trial {
    pub(super) fn new(cluster: Cluster, faults: Vec<Fault>, patience: Duration) -> Self {
        let now = Instant::now();
        let most = faults.len() + ENDS;
        let record = Record::new();
        Self {
            cluster,
            pending: faults,
            patience,
            acts: BTreeMap::new(),
            numbered: 0,
            record,
            back: BTreeMap::new(),
            quiet: now,
            began: now,
            first: None,
            seen: None,
            most,
        }
    }

    /// Runs it with so many workers to its end.
    pub(super) async fn run(mut self, workers: usize, meter: &mut Meter) -> Result<Record, Fail> {
        let (opened, mut openings) = mpsc::unbounded_channel();
        let (address, asked) = watch::channel(None);
        let (answers, mut status) = watch::channel(None);
        let poll = tokio::spawn(poll(asked, answers));
        self.act(Act::Start(Who::Coordinator), &opened)?;
        for _ in 0..workers {
            let seat = self.cluster.add_seat(false)?;
            self.act(Act::Start(Who::Worker(seat)), &opened)?;
        }
        let outcome = loop {
            let next = self.acts.first_key_value().map_or_else(|| Instant::now() + ANSWER, |((at, _), _)| *at);
            tokio::select! {
                at = self.cluster.children.next_end() => if let Some(outcome) = self.ended(at) {
                    break outcome;
                },
                Some((child, serving)) = openings.recv() => self.serves(child, serving, &address),
                Ok(()) = status.changed() => {
                    let seen: Seen = status.borrow_and_update().clone();
                    self.sees(seen);
                }
                () = sleep_until(next) => {}
            }
            if self.cluster.coordinator.is_none() {
                address.send_if_modified(|at| at.take().is_some());
                self.cluster.coordinator_is_at(None);
            }
            while let Some(entry) = self.acts.first_entry().filter(|entry| entry.key().0 <= Instant::now()) {
                let act = entry.remove();
                self.act(act, &opened)?;
            }
            self.harm(&opened)?;
            let (step, injected) = (self.step(), self.record.told.len());
            meter.at(step, &format!("{injected} faults{}", self.record.told.last().map_or_else(String::new, |last| format!("; {last}"))));
            if self.quiet.elapsed() > self.patience && self.first.is_some() {
                break Outcome::Stuck(self.stuck());
            }
        };
        poll.abort();
        self.record.seconds = self.began.elapsed().as_secs_f64();
        self.record.outcome = outcome;
        self.record.left = self.pending.len();
        self.part().await;
        Ok(self.record)
    }

    /// Lets all go on, and waits until they have left.
    async fn part(&mut self) {
        let before: BTreeSet<usize> = self.ended_children();
        let _ = std::fs::remove_file(self.cluster.surge_file());
        for seat in 0..self.cluster.seats.len() {
            self.cluster.set_way(seat, super::plan::Off::Both, Way::Open);
        }
        self.cluster.children.signal(libc::SIGCONT);
        let patience = if self.record.outcome == Outcome::Done { FAREWELL } else { Duration::ZERO };
        self.cluster.children.reap(patience).await;
        for child in self.ended_children().difference(&before) {
            self.count_exit(*child);
        }
    }

    fn ended_children(&self) -> BTreeSet<usize> {
        let members = self.cluster.children.members().iter().enumerate();
        members.filter(|(_, member)| member.ended.is_some()).map(|(at, _)| at).collect()
    }

    fn count_exit(&mut self, child: usize) {
        let member = &self.cluster.children.members()[child];
        let kind = member.name.split('-').next().unwrap_or_default();
        let how = member.ended.map_or_else(String::new, ending);
        *self.record.exits.entry(format!("{kind}: {how}")).or_default() += 1;
    }

    /// A coordinator has said where it is, or that there is nothing to do.
    fn serves(&mut self, child: usize, serving: Option<Opened>, address: &watch::Sender<Option<String>>) {
        if let Some(Opened::Serving { grpc, .. }) = serving
            && self.cluster.who(child) == Some(Who::Coordinator)
        {
            self.record.served += 1;
            self.cluster.coordinator_is_at(Some(grpc));
            address.send_replace(Some(grpc.to_string()));
        }
    }

    fn sees(&mut self, seen: Seen) {
        let Some((at, status)) = seen else { return };
        let trains = matches!(status.phase.as_str(), "training" | "draining");
        for worker in &status.workers {
            let Some(pid) = started(worker.pid) else { continue };
            self.record.ids.insert(pid, worker.worker_id.clone());
            let processes = self.cluster.seats.iter_mut().filter_map(|seat| seat.process.as_mut());
            for process in processes.filter(|process| process.pid == pid) {
                // The state of one that waits may be an old one.
                process.holds = if trains { worker.state == "rank" } else { process.holds };
            }
        }
        let newest = self.record.steps.last().map_or(0, |(_, step)| *step);
        // After all were killed it may be an older one.
        if trains && status.step != newest && status.step > 0 {
            self.record.steps.push((unix_ms(), status.step));
            self.quiet = at;
            self.first.get_or_insert((at, status.step));
        }
        self.seen = Some((at, status));
    }

    /// The step that the run is at: as its coordinator says, or about, by the clock, while there is none that answers.
    fn step(&self) -> u64 {
        let (Some((at, status)), Some((began, first))) = (&self.seen, self.first) else { return 0 };
        if at.elapsed() < ANSWER && self.cluster.coordinator.is_some() {
            return status.step;
        }
        let pace = status.step.saturating_sub(first) as f64 / (*at - began).as_secs_f64().max(0.1);
        status.step + (pace * at.elapsed().as_secs_f64()).min(RECKONED) as u64
    }

    fn stuck(&self) -> String {
        let status = self.seen.as_ref().map(|(_, status)| status);
        let (phase, reason) = status.map_or(("unknown", ""), |status| (status.phase.as_str(), status.reason.as_str()));
        let (seconds, step) = (self.quiet.elapsed().as_secs_f64(), self.step());
        one_line(&format!("no step for {seconds:.0} s after step {step}; the last status: {phase} {reason}"))
    }

    fn later(&mut self, after: Duration, act: Act) {
        self.numbered += 1;
        self.acts.insert((Instant::now() + after, self.numbered), act);
    }

    fn act(&mut self, act: Act, opened: &mpsc::UnboundedSender<(usize, Option<Opened>)>) -> Result<(), Fail> {
        match act {
            Act::Start(Who::Coordinator) => {
                let (child, stdout) = self.cluster.start_coordinator()?;
                let opened = opened.clone();
                tokio::spawn(async move { opened.send((child, first_line(stdout).await)) });
            }
            Act::Start(Who::Worker(seat)) if self.cluster.seats[seat].closed => {}
            Act::Start(Who::Worker(seat)) => self.cluster.start_worker(seat)?,
            Act::Wake(child) => {
                self.cluster.children.signal_one(child, libc::SIGCONT);
                self.recovers(child);
            }
            Act::Pulse(child, until, _) if Instant::now() >= until => self.act(Act::Wake(child), opened)?,
            Act::Pulse(child, until, sleeps) => {
                self.cluster.children.signal_one(child, if sleeps { libc::SIGSTOP } else { libc::SIGCONT });
                self.later(PULSE[usize::from(sleeps)], Act::Pulse(child, until, !sleeps));
            }
            Act::Mend(seat, child) => {
                self.cluster.set_way(seat, super::plan::Off::Both, Way::Open);
                self.recovers(child);
            }
            Act::Calm => drop(std::fs::remove_file(self.cluster.surge_file())),
        }
        Ok(())
    }

    fn recovers(&mut self, child: usize) {
        self.quiet = Instant::now();
        if let Some(process) = self.cluster.who(child).and_then(|who| self.cluster.process(who)) {
            process.ails = false;
        }
    }

    /// A process has ended. Gives the run's outcome, if that is one.
    fn ended(&mut self, child: usize) -> Option<Outcome> {
        self.count_exit(child);
        let who = self.cluster.who(child)?;
        let process = self.cluster.take(who)?;
        let member = &self.cluster.children.members()[child];
        let status = member.ended?;
        let code = status.code();
        let said = member.last_error().map_or_else(String::new, |error| format!(": {}", one_line(&error)));
        let (name, why, is_coordinator) = (member.name.clone(), ending(status) + &said, who == Who::Coordinator);
        if is_coordinator && code == Some(DONE.into()) {
            return Some(Outcome::Done);
        }
        if code == Some(DONE.into()) {
            self.later(DONE_ALREADY, Act::Start(who));
            return None;
        }
        let is_over = code == Some(NO_RETRY.into()) || code == Some(USAGE.into());
        let fatal = is_coordinator && is_over;
        let failed = format!("{name}: {why}");
        let asked = process.goes && (code.is_none() || code == Some(PREEMPTED.into()));
        let end = End { name, pid: process.pid, is_coordinator, asked, at_ms: unix_ms(), why };
        if !asked {
            self.record.told.push(format!("{failed}, unasked"));
        }
        self.record.ends.push(end);
        if fatal || self.record.ends.iter().filter(|end| !end.asked).count() > self.most {
            return Some(Outcome::Failed(failed));
        }
        let closed = matches!(who, Who::Worker(seat) if self.cluster.seats[seat].closed);
        let back = self.back.remove(&child).unwrap_or(AGAIN);
        if !closed {
            self.later(back, Act::Start(who));
        }
        None
    }

    /// Does what is due by now, and can be done.
    fn harm(&mut self, opened: &mpsc::UnboundedSender<(usize, Option<Opened>)>) -> Result<(), Fail> {
        let (step, mut at) = (self.step(), 0);
        while let Some(fault) = self.pending.get(at).filter(|fault| fault.at_step <= step).cloned() {
            let Some(whom) = self.befall(&fault, opened)? else {
                at += 1;
                continue;
            };
            self.pending.remove(at);
            let (now, lasts) = (unix_ms(), fault.lasts.as_millis() as u64);
            self.record.spans.push((now, now + lasts));
            self.quiet = Instant::now() + fault.lasts;
            *self.record.faults.entry(fault.kind.name()).or_default() += 1;
            let words = Fault { target: whom, ..fault }.words();
            self.record.told.push(format!("step {step}, {:.1} s: {words}", self.began.elapsed().as_secs_f64()));
        }
        Ok(())
    }

    /// Does it, and says to whom; or nothing, if it would have to wait.
    fn befall(&mut self, fault: &Fault, opened: &mpsc::UnboundedSender<(usize, Option<Opened>)>) -> Result<Option<Target>, Fail> {
        match fault.kind {
            Kind::Store => {
                let file = self.cluster.surge_file();
                std::fs::write(&file, "").map_err(|error| Fail::io(&file, "written", &error))?;
                self.later(fault.lasts, Act::Calm);
            }
            Kind::Join => self.join(opened)?,
            Kind::All => {
                let all: Vec<Who> = (0..self.cluster.seats.len()).map(Who::Worker).chain([Who::Coordinator]).collect();
                for who in all {
                    self.end(who, libc::SIGKILL, fault.lasts);
                }
            }
            Kind::Coordinator | Kind::Stop if fault.target == Target::Coordinator => {
                let Some(process) = self.cluster.coordinator.as_mut().filter(|process| !process.ails && !process.goes) else {
                    return Ok(None);
                };
                // One that does not serve yet is not worth it.
                if self.seen.as_ref().is_none_or(|(at, _)| at.elapsed() > ANSWER) {
                    return Ok(None);
                }
                if fault.hangs {
                    self.supersede(fault.lasts);
                } else if fault.kind == Kind::Coordinator {
                    self.end(Who::Coordinator, libc::SIGKILL, fault.lasts);
                } else {
                    process.ails = true;
                    let child = process.child;
                    self.cluster.children.signal_one(child, libc::SIGSTOP);
                    self.later(fault.lasts, Act::Wake(child));
                }
            }
            _ => {
                let Some(seat) = self.victim(fault) else { return Ok(None) };
                self.harm_worker(seat, fault);
                return Ok(Some(Target::Worker(seat)));
            }
        }
        Ok(Some(fault.target))
    }

    /// The coordinator hangs for so long that another is started in its place; then it goes on, and must find that it has been superseded.
    fn supersede(&mut self, after: Duration) {
        let Some(process) = self.cluster.take(Who::Coordinator) else { return };
        self.cluster.children.signal_one(process.child, libc::SIGSTOP);
        let name = self.cluster.children.members()[process.child].name.clone();
        let (pid, why) = (process.pid, "it hung".to_owned());
        self.record.ends.push(End { name, pid, is_coordinator: true, asked: true, at_ms: unix_ms(), why });
        self.later(after, Act::Start(Who::Coordinator));
        self.later(after + WAKES_AFTER, Act::Wake(process.child));
    }

    /// A worker for it: the one that is meant, or, if the plan does not name it, the next one whose state another has too.
    fn victim(&self, fault: &Fault) -> Option<usize> {
        let count = self.cluster.seats.len();
        let meant = match fault.target {
            Target::Worker(seat) => seat % count,
            Target::Rank(rank) => {
                let (_, status) = self.seen.as_ref()?;
                let pid = started(status.workers.iter().find(|worker| worker.rank == Some(rank))?.pid)?;
                self.cluster.seats.iter().position(|seat| seat.process.is_some_and(|process| process.pid == pid))?
            }
            Target::Coordinator => return None,
        };
        let tried = if fault.named { 1 } else { count };
        let fit = |seat: &usize| {
            let whole = self.cluster.seats[*seat].process.is_some_and(|process| !process.ails && !process.goes);
            whole && self.cluster.spares(*seat)
        };
        (0..tried).map(|next| (meant + next) % count).find(fit)
    }

    fn harm_worker(&mut self, seat: usize, fault: &Fault) {
        let who = Who::Worker(seat);
        match fault.kind {
            Kind::Kill => return self.end(who, libc::SIGKILL, fault.lasts),
            Kind::Leave => return self.end(who, libc::SIGTERM, fault.lasts),
            _ => {}
        }
        let Some(process) = self.cluster.process(who) else { return };
        process.ails = true;
        let child = process.child;
        match fault.kind {
            Kind::Stop => {
                self.cluster.children.signal_one(child, libc::SIGSTOP);
                self.later(fault.lasts, Act::Wake(child));
            }
            Kind::Slow => self.later(Duration::ZERO, Act::Pulse(child, Instant::now() + fault.lasts, true)),
            _ => {
                self.cluster.set_way(seat, fault.off, if fault.resets { Way::Cut } else { Way::Held });
                self.later(fault.lasts, Act::Mend(seat, child));
            }
        }
    }

    /// Has a process end, and come back after a while.
    fn end(&mut self, who: Who, signal: i32, back: Duration) {
        let Some(process) = self.cluster.process(who) else { return };
        process.goes = true;
        let child = process.child;
        self.back.insert(child, back);
        self.cluster.children.signal_one(child, signal);
    }

    /// One more worker comes; the first that came so leaves, where there are many.
    fn join(&mut self, opened: &mpsc::UnboundedSender<(usize, Option<Opened>)>) -> Result<(), Fail> {
        let guests: Vec<usize> =
            (0..self.cluster.seats.len()).filter(|seat| self.cluster.seats[*seat].guest && !self.cluster.seats[*seat].closed).collect();
        if guests.len() >= GUESTS {
            self.cluster.seats[guests[0]].closed = true;
            self.end(Who::Worker(guests[0]), libc::SIGTERM, Duration::ZERO);
        }
        let seat = self.cluster.add_seat(true)?;
        self.act(Act::Start(Who::Worker(seat)), opened)
    }
}

/// The process that was started as this worker: it watches the one that works, and leads its group. None, if that is gone.
fn started(works: u32) -> Option<u32> {
    let pid = i32::try_from(works).ok()?;
    // SAFETY: takes and gives numbers.
    u32::try_from(unsafe { libc::getpgid(pid) }).ok()
}

/// Asks whoever coordinates for the status, again and again.
async fn poll(address: watch::Receiver<Option<String>>, to: watch::Sender<Seen>) {
    let mut ticks = tokio::time::interval(POLL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(at) = address.borrow().clone() else { continue };
        if let Ok(Ok(status)) = timeout(ANSWER, client::status(&at)).await
            && to.send(Some((Instant::now(), status.into()))).is_err()
        {
            return;
        }
    }
}

/// The exit code that scripts see.
pub(super) fn code(ok: bool) -> u8 {
    if ok { DONE } else { FAILED }
}
