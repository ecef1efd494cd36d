//! What a schedule is made of: the run's settings, what goes wrong and when, and who keeps the processes running.

use super::network::{Cut, Node};
use super::store::Weather;
use super::world::{Happening, World};
use crate::core::{CoreConfig, Failure, Outcome};
use crate::machine::Event;
use crate::random::Random;
use ella_proto::v1;
use ella_store::{Digest, Term};

/// How a schedule ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Verdict {
    /// All steps are committed.
    Done,
    /// It was asked to leave, and did.
    Preempted,
    /// While things went wrong, a coordinator found that starting again would not help.
    GivenUp,
}

/// What can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    KillWorker,
    LoseMachine,
    FreezeWorker,
    TerminateWorker,
    DrainWorker,
    Join,
    FailWorker,
    SlowWorker,
    BreakStream,
    CutFromCoordinator,
    CutWorkers,
    CutOff,
    KillCoordinator,
    LoseCoordinator,
    FreezeCoordinator,
    SecondCoordinator,
    Stop,
    LeaveNow,
    SlowLog,
    FailingLog,
    SlowUploads,
    FailingUploads,
    /// Of two workers, once. Not drawn among the others, after which all is well.
    CutForGood,
}

const FAULTS: [Fault; 22] = [
    Fault::KillWorker,
    Fault::LoseMachine,
    Fault::FreezeWorker,
    Fault::TerminateWorker,
    Fault::DrainWorker,
    Fault::Join,
    Fault::FailWorker,
    Fault::SlowWorker,
    Fault::BreakStream,
    Fault::CutFromCoordinator,
    Fault::CutWorkers,
    Fault::CutOff,
    Fault::KillCoordinator,
    Fault::LoseCoordinator,
    Fault::FreezeCoordinator,
    Fault::SecondCoordinator,
    Fault::Stop,
    Fault::LeaveNow,
    Fault::SlowLog,
    Fault::FailingLog,
    Fault::SlowUploads,
    Fault::FailingUploads,
];

/// The end of no schedule.
const FOR_GOOD: u64 = 1 << 40;

/// What gathering, loading and the last commit take.
const GRACE: u64 = 30_000;

/// Of one schedule. Times in milliseconds.
#[derive(Debug)]
pub(super) struct Setup {
    pub(super) lanes: u64,
    pub(super) steps: u64,
    pub(super) steps_per_epoch: u64,
    /// Steps from one commit to the next.
    pub(super) every: u64,
    pub(super) workers: usize,
    pub(super) lease: u64,
    pub(super) orphan: u64,
    pub(super) step_timeout: u64,
    pub(super) start_timeout: u64,
    /// How long a worker takes to load, and a lane, at most.
    pub(super) load: u64,
    pub(super) lane: u64,
    /// One message in so many is late, and one in so many comes twice.
    pub(super) late: u64,
    pub(super) duplicates: u64,
    pub(super) faults_until: u64,
    pub(super) data: String,
    pub(super) models: String,
    min: usize,
    max: usize,
    keep: usize,
    join_window: u64,
    evicts: bool,
    faults: Vec<Fault>,
    /// From one fault to the next, at most.
    pause: u64,
    /// A run that was asked to leave is started again.
    resumes: bool,
}

impl Setup {
    pub(super) fn new(random: &mut Random) -> Self {
        let mut between = |least: u64, most: u64| least + random.below(most - least + 1);
        let lanes = between(1, 6);
        let workers = between(1, lanes.min(4)) as usize;
        let start_timeout = [8_000, 60_000][between(0, 1) as usize];
        let kinds = between(1, 6);
        Self {
            lanes,
            workers,
            start_timeout,
            steps: between(6, 90),
            steps_per_epoch: between(2, 9),
            every: between(1, 8),
            lease: 2_000,
            orphan: between(3_000, 8_000),
            step_timeout: 3_000,
            load: between(200, 3_000),
            lane: between(10, 120),
            late: between(8, 200),
            duplicates: between(20, 400),
            faults_until: between(0, 25_000),
            data: Digest::of(b"data").to_string(),
            models: Digest::of(b"models").to_string(),
            min: between(1, workers as u64) as usize,
            max: between(workers as u64, lanes) as usize,
            keep: between(1, 3) as usize,
            join_window: between(0, 1_000),
            evicts: between(0, 1) == 1,
            faults: (0..kinds).map(|_| FAULTS[between(0, FAULTS.len() as u64 - 1) as usize]).collect(),
            pause: between(200, 4_000),
            resumes: between(0, 1) == 1,
        }
    }

    /// A run that is long enough for a cut, and needs but one of the two workers.
    pub(super) fn with_lasting_cut(self, random: &mut Random) -> Self {
        let workers = 2 + random.below(3);
        let lanes = self.lanes.max(workers);
        let min = 1 + random.below(workers - 1) as usize;
        let faults_until = self.faults_until.max(10_000);
        let run = Self { lanes, steps: self.steps + 60, workers: workers as usize, min, max: lanes as usize, ..self };
        Self { start_timeout: 8_000, faults: vec![Fault::CutForGood], pause: 500, faults_until, ..run }
    }

    /// The run is over so long after the last fault.
    ///
    /// A coordinator that was superseded while it waits for workers finds out when it has waited in vain, and keeps those that it has until
    /// then. Where that cannot be, nothing waits for `start_timeout`.
    pub(super) fn bound(&self) -> u64 {
        use Fault as F;
        let splits = self.faults.iter().any(|fault| matches!(fault, F::SecondCoordinator | F::FreezeCoordinator));
        self.training() + GRACE + if splits { 2 * self.start_timeout } else { 0 }
    }

    /// How long training takes at most, alone and undisturbed: a collective lasts as long as the latest message of a rank.
    fn training(&self) -> u64 {
        self.steps * (self.lanes * self.lane + 20 + (3_000 / self.late).min(1_500))
    }

    /// As the core of a process has it.
    pub(super) fn core_config(&self, c: usize) -> CoreConfig {
        CoreConfig {
            welcome: v1::Welcome {
                run_url: "/run".into(),
                config_toml: String::new(),
                config_digest: Digest::of(b"config").to_string(),
                heartbeat_ms: self.lease / 4,
                lease_ms: self.lease,
                orphan_ms: self.orphan,
                step_timeout_ms: self.step_timeout,
                ..v1::Welcome::default()
            },
            version: "1".into(),
            workers: self.workers,
            min: self.min,
            max: self.max,
            join_window: self.join_window,
            straggler_evict: self.evicts,
            steps: self.steps,
            keep: self.keep,
            device: None,
            start_timeout: self.start_timeout,
            commit_timeout: self.start_timeout,
            drain_timeout: 20_000,
            session: [c as u8 + 1; 16],
        }
    }

    pub(super) fn term_record(&self) -> Term {
        Term { host: "h".into(), version: "1".into(), config_digest: Digest::of(b"config") }
    }
}

impl World {
    /// The first processes start, and things begin to go wrong.
    pub(super) fn begin(&mut self) {
        self.spawn_coordinator();
        for _ in 0..self.setup.workers {
            self.spawn_worker();
        }
        self.after(0, Happening::Fault);
        self.after(300, Happening::Tend);
    }

    fn is_at_peace(&self) -> bool {
        self.now >= self.setup.faults_until
    }

    /// How the run has ended, once everyone has left.
    pub(super) fn is_over(&self) -> Option<Verdict> {
        self.verdict.filter(|_| self.workers.iter().all(|worker| !worker.lives()))
    }

    pub(super) fn fault(&mut self) {
        if self.is_at_peace() || self.verdict.is_some() {
            return;
        }
        let fault = self.setup.faults[self.random.below(self.setup.faults.len() as u64) as usize];
        let one_in_most = matches!(fault, Fault::Stop | Fault::LeaveNow) && !self.random.chance(6);
        if !one_in_most {
            self.tell(|| format!("-- {fault:?}"));
            self.see(&format!("fault {fault:?}"));
            self.strike(fault);
        }
        let pause = self.between(1, self.setup.pause);
        self.after(pause, Happening::Fault);
    }

    /// A time that ends with the faults.
    fn spell(&mut self, most: u64) -> u64 {
        (self.now + self.between(100, most)).min(self.setup.faults_until)
    }

    fn some_worker(&mut self) -> Option<usize> {
        let alive: Vec<usize> = (0..self.workers.len()).filter(|w| self.workers[*w].lives()).collect();
        (!alive.is_empty()).then(|| alive[self.random.below(alive.len() as u64) as usize])
    }

    fn some_coordinator(&mut self) -> Option<usize> {
        let alive: Vec<usize> = (0..self.coordinators.len()).filter(|c| self.coordinators[*c].lives()).collect();
        (!alive.is_empty()).then(|| alive[self.random.below(alive.len() as u64) as usize])
    }

    fn strike(&mut self, fault: Fault) {
        use Fault as F;
        match fault {
            F::Join => return self.spawn_worker(),
            F::SecondCoordinator => return self.spawn_coordinator(),
            F::SlowLog | F::FailingLog | F::SlowUploads | F::FailingUploads => return self.change_weather(fault),
            F::CutForGood => return self.cut_for_good(),
            _ => {}
        }
        let (worker, coordinator) = (self.some_worker(), self.some_coordinator());
        if let Some(w) = worker {
            self.strike_worker(fault, w);
        }
        if let Some(c) = coordinator {
            self.strike_coordinator(fault, c);
        }
        if let (Some(w), Some(c), Fault::CutFromCoordinator) = (worker, coordinator, fault) {
            let until = self.spell(8_000);
            self.cuts.push(Cut { one: Node::Worker(w), other: Some(Node::Coordinator(c)), until });
        }
        if let (Some(w), Some(other), Fault::CutWorkers) = (worker, self.some_worker(), fault)
            && w != other
        {
            let until = self.spell(8_000);
            self.cuts.push(Cut { one: Node::Worker(w), other: Some(Node::Worker(other)), until });
        }
    }

    fn cut_for_good(&mut self) {
        let train: Vec<usize> = (0..self.workers.len()).filter(|w| self.workers[*w].lives() && self.workers[*w].step > 0).collect();
        if !self.cuts.is_empty() || train.len() < 2 {
            return;
        }
        let n = train.len() as u64;
        let one = self.random.below(n);
        let other = (one + 1 + self.random.below(n - 1)) % n;
        let [one, other] = [one, other].map(|at| Node::Worker(train[at as usize]));
        self.see("lasting cuts");
        self.cuts.push(Cut { one, other: Some(other), until: FOR_GOOD });
    }

    fn strike_worker(&mut self, fault: Fault, w: usize) {
        use Fault as F;
        match fault {
            F::KillWorker => self.kill_worker(w, false),
            F::LoseMachine => self.kill_worker(w, true),
            F::FreezeWorker => {
                let until = self.spell(6_000);
                self.workers[w].frozen_until = until;
            }
            F::TerminateWorker => self.terminate(w),
            F::SlowWorker => {
                let (until, times) = (self.spell(6_000), self.between(5, 60));
                self.workers[w].slow = (until, times);
            }
            F::FailWorker => {
                let kind = if self.random.chance(2) { v1::FailureKind::Store } else { v1::FailureKind::Input };
                if self.workers[w].why.is_none() && self.workers[w].frozen_until <= self.now && self.workers[w].has_loaded() {
                    self.fail(w, kind, false);
                }
            }
            F::BreakStream => {
                if let Some(stream) = self.workers[w].stream() {
                    self.break_stream(stream);
                }
            }
            F::CutOff => {
                let until = self.spell(8_000);
                self.cuts.push(Cut { one: Node::Worker(w), other: None, until });
            }
            _ => {}
        }
    }

    fn strike_coordinator(&mut self, fault: Fault, c: usize) {
        use Fault as F;
        match fault {
            F::KillCoordinator => self.kill_coordinator(c, false),
            F::LoseCoordinator => self.kill_coordinator(c, true),
            F::FreezeCoordinator => {
                let until = self.spell(10_000);
                self.coordinators[c].frozen_until = until;
            }
            F::Stop | F::LeaveNow if self.coordinators[c].frozen_until <= self.now && self.coordinators[c].outcome.is_none() => {
                self.drained = true;
                let event = if fault == F::Stop { Event::Stop("night".into()) } else { Event::Leave("now".into()) };
                self.feed(c, event);
            }
            F::DrainWorker if self.coordinators[c].frozen_until <= self.now && self.coordinators[c].outcome.is_none() => {
                if let Some(w) = self.some_worker() {
                    self.drained = true;
                    self.feed(c, Event::Drain { worker: format!("w{w}"), reason: "drained".into() });
                }
            }
            _ => {}
        }
    }

    fn change_weather(&mut self, fault: Fault) {
        let until = self.spell(6_000);
        let weather = Weather { until, slow: 20, ..Weather::default() };
        match fault {
            Fault::SlowLog => self.store.log = Weather { slow: 4_000, ..weather },
            Fault::FailingLog => self.store.log = Weather { slow: 200, refused: self.between(2, 5), lost: self.between(2, 5), ..weather },
            Fault::SlowUploads => self.store.uploads = Weather { slow: self.between(200, 9_000), ..weather },
            _ => self.store.uploads = Weather { slow: 500, refused: self.between(2, 20), lost: self.between(2, 20), ..weather },
        }
    }

    /// Whoever keeps the processes running starts new ones for those that are gone: at once, or later.
    pub(super) fn tend(&mut self) {
        if self.verdict.is_some() {
            return self.see_off();
        }
        let alive = self.workers.iter().filter(|worker| worker.lives() && worker.why.is_none()).count();
        let hesitates = !self.is_at_peace() && self.random.chance(2);
        if alive < self.setup.workers && !hesitates {
            self.spawn_worker();
        }
        let alive = self.coordinators.iter().filter(|coordinator| coordinator.lives());
        let answering = alive.clone().filter(|coordinator| coordinator.frozen_until <= self.now).count();
        // A process that does not answer is taken for dead at times.
        let replaces = alive.count() > 0 && answering == 0 && self.random.chance(8);
        if answering == 0 && !hesitates && (replaces || self.coordinators.iter().all(|coordinator| !coordinator.lives())) {
            self.spawn_coordinator();
        }
        let pause = self.between(100, 500);
        self.after(pause, Happening::Tend);
    }

    /// The run is over: what is left of its coordinators is stopped.
    fn see_off(&mut self) {
        for c in 0..self.coordinators.len() {
            if self.coordinators[c].lives() && self.coordinators[c].outcome.is_none() {
                self.kill_coordinator(c, false);
            }
        }
    }

    /// A coordinator's process has ended by itself.
    pub(super) fn coordinator_ended(&mut self, c: usize, outcome: Option<Outcome>, superseded: bool) {
        self.tell(|| format!("c{c} ends: {outcome:?}"));
        match outcome {
            Some(Outcome::Done) => self.conclude(Verdict::Done),
            Some(Outcome::Preempted { reason }) => {
                self.see("preempted");
                let asked = self.drained || self.workers.iter().any(|worker| worker.parting);
                assert!(asked, "LIVE: preempted without reason: {reason}");
                if !self.setup.resumes {
                    self.conclude(Verdict::Preempted);
                }
            }
            Some(Outcome::Failed(failure)) if !superseded => self.judge_failure(&failure),
            Some(Outcome::Failed(_)) | None => {}
        }
    }

    /// Only what goes wrong outside may fail a coordinator; the next one goes on.
    fn judge_failure(&mut self, failure: &Failure) {
        use Failure as F;
        self.see(&format!("failed {}", name_of(failure)));
        if self.now > self.setup.faults_until + 20_000 {
            self.see(&format!("failed in peace {}", name_of(failure)));
        }
        match failure {
            F::Differs { .. } | F::Malformed { .. } | F::PartDiffers { .. } => panic!("SAME: {failure}"),
            F::NoProgress { .. } | F::Worker { permanent: true, .. } => self.conclude(Verdict::GivenUp),
            _ => {}
        }
    }

    fn conclude(&mut self, verdict: Verdict) {
        self.tell(|| format!("== {verdict:?}"));
        if self.verdict.is_none() {
            (self.verdict, self.concluded_at) = (Some(verdict), self.now);
            self.see(&format!("verdict {verdict:?}"));
        }
    }
}

fn name_of(failure: &Failure) -> String {
    format!("{failure:?}").chars().take_while(|c| c.is_alphanumeric()).collect()
}
