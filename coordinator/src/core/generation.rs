//! Generations: forming one of those that are idle, and ending it when its members change.

use super::loss::MOST_TEXT;
use super::members::{Held, Member};
use super::{ConnId, Core, Failure, Mutation, Note, Outcome, Phase, Time, Who};
use ella_proto::ids::{Generation, Rank, Step};
use ella_proto::v1::{self, to_worker};
use ella_store::Commit;
use std::cmp::Reverse;

/// So many generations in a row that make no step are no accident.
const MOST_FRUITLESS: u32 = 3;

/// The newest generation: how it began, and how it ended or is to end.
#[derive(Debug)]
pub(super) struct Lineup {
    /// How many ranks it has.
    pub(super) world: usize,
    /// The step that it began from.
    pub(super) from: Step,
    /// Who held the state of that step, if anyone did.
    pub(super) source: Option<Rank>,
    /// The newest commit as it began.
    pub(super) commit: Option<Commit>,
    /// Start was sent, or it was adopted.
    pub(super) started: bool,
    /// Under which term it ran before it was adopted, if it was.
    pub(super) adopted: Option<u64>,
    /// When a worker came back into it last, if one did: messages may be lost.
    pub(super) shaken: Option<Time>,
    /// It was asked to end after a step.
    pub(super) boundary: bool,
    /// Why it ended or is to end.
    pub(super) why: String,
    /// All were told to stop at once.
    pub(super) told: bool,
    /// It ended by itself: a collective broke.
    pub(super) broken: bool,
    /// A worker was lost before all were ready.
    pub(super) lost_early: bool,
    /// Ranks of it did not reach each other, and nobody went for that.
    pub(super) apart: bool,
    /// By rank, if it was formed here.
    pub(super) ranks: Vec<ConnId>,
}

impl Lineup {
    pub(super) fn new(world: usize, from: Step) -> Self {
        Self {
            world,
            from,
            source: None,
            commit: None,
            started: false,
            adopted: None,
            shaken: None,
            boundary: false,
            why: String::new(),
            told: false,
            broken: false,
            lost_early: false,
            apart: false,
            ranks: Vec::new(),
        }
    }
}

/// A worker that may get a place, and the step of the state that it holds, if that is worth anything.
pub(super) type Candidate = (ConnId, Option<Step>);

impl Core {
    /// How many ranks the newest generation has.
    pub(super) fn world(&self) -> usize {
        self.lineup.as_ref().map_or(0, |lineup| lineup.world)
    }

    /// Workers that are needed for a generation. A run begins with all that it is to have; it goes on with fewer.
    pub(super) fn need(&self) -> usize {
        let last = self.last_commit();
        let goes_on = self.lineup.is_some() || self.members.any(|member| member.is_busy() || member.state(last).is_some());
        match self.drain {
            Some(_) => 1,
            None if goes_on => self.least(),
            None => self.config.workers,
        }
    }

    /// Workers without which training does not go on.
    pub(super) fn least(&self) -> usize {
        if self.drain.is_some() { 1 } else { self.config.min.max(1) }
    }

    /// Whether a generation may have this worker: one that was asked to leave takes part in a drain, or to leave its state to others.
    fn counts(&self, member: &Member) -> bool {
        (member.parting.is_none() || member.bequeaths || self.drain.is_some()) && !self.is_barred(member)
    }

    /// Whether a worker waits for a place that it is to have.
    pub(super) fn is_to_join(&self, member: &Member) -> bool {
        member.is_idle() && member.parting.is_none() && !self.is_barred(member)
    }

    /// Workers that are here for a generation, loaded or not.
    pub(super) fn attached(&self) -> usize {
        self.members.which(|member| self.counts(member)).len()
    }

    /// Forms a generation if none runs and it can be done. Called whenever something has changed.
    pub(super) fn settle(&mut self, now: Time) {
        if !matches!(self.phase, Phase::Waiting { .. } | Phase::Regrouping { .. }) || self.returning.is_some() {
            return;
        }
        if self.members.any(Member::is_busy) {
            // G-1: whoever is in a generation leaves it first.
            if matches!(self.phase, Phase::Waiting { .. }) {
                self.phase = Phase::Regrouping { until: now.after(self.config.welcome.step_timeout_ms) };
            }
            return;
        }
        if self.last_commit().0 >= self.config.steps {
            return self.end(now, Outcome::Done);
        }
        self.release_parting(now);
        if self.drain.is_some() && !self.holds_uncommitted() {
            return self.leave_resumable(now);
        }
        let mut eligible = self.eligible();
        // The record on its way is newer than what all would begin with, or is all that was to be done.
        let awaits_log =
            |step: Step| self.config.steps <= step.0 || eligible.iter().all(|(_, state)| state.is_none_or(|state| state < step));
        if eligible.len() < self.need() || self.commits.appending().is_some_and(awaits_log) {
            return self.wait_for_workers(now);
        }
        if self.paused_until.is_some() {
            return self.wait_for_workers(now);
        }
        eligible.sort_by_key(|(conn, state)| (Reverse(*state), *conn));
        eligible.truncate(self.config.max.max(1));
        eligible.sort_by_key(|(conn, _)| *conn);
        self.keep_apart(&mut eligible);
        self.form(now, &eligible);
    }

    fn eligible(&self) -> Vec<Candidate> {
        let last = self.last_commit();
        let fit = self.members.iter().filter(|(_, member)| member.is_idle() && self.counts(member));
        fit.map(|(conn, member)| (conn, member.state(last))).collect()
    }

    /// Whether a worker that waits for a place holds what no commit has.
    fn holds_uncommitted(&self) -> bool {
        let last = self.last_commit();
        self.members.any(|member| member.state(last).is_some_and(|step| step > last))
    }

    /// Waits for workers, or for those that are here to load: for either once.
    fn wait_for_workers(&mut self, now: Time) {
        let enough = self.attached() >= self.need();
        let anew = now.after(self.config.start_timeout);
        self.phase = match self.phase {
            Phase::Waiting { until, here } => Phase::Waiting { until: if enough && !here { anew } else { until }, here: here || enough },
            _ => Phase::Waiting { until: anew, here: enough },
        };
    }

    /// Deals the ranks in the order of the chosen, and names who holds the newest state.
    fn form(&mut self, now: Time, chosen: &[Candidate]) {
        let newest = chosen.iter().filter_map(|(_, state)| *state).max();
        let from = newest.unwrap_or(self.last_commit());
        if let Some(failure) = self.fruitless(from) {
            return self.fail(failure);
        }
        let holder = |(_, state): &Candidate| newest.is_some() && *state == newest;
        let source = (0..).map(Rank).zip(chosen).find(|(_, candidate)| holder(candidate)).map(|(rank, _)| rank);
        let copy = newest.is_some() && !chosen.iter().all(holder);
        let commit = self.commits.last().cloned();
        self.generation = Generation(self.generation.0 + 1);
        self.formed += 1;
        (self.adopts, self.join_at) = (false, None);
        self.commits.drop_unrecorded();
        self.progress.restart(from, commit.as_ref());
        self.phase = Phase::Starting { until: now.after(self.config.start_timeout) };
        let ranks = chosen.iter().map(|(conn, _)| *conn).collect();
        // Why ranks try again is of interest until the ring is closed.
        let why = self.lineup.take().filter(|before| before.apart).map(|before| before.why).unwrap_or_default();
        let lineup = Lineup { source, commit, ranks, why, ..Lineup::new(chosen.len(), from) };
        self.assign(chosen, &lineup, copy);
        self.lineup = Some(lineup);
    }

    /// Tells everyone its place.
    fn assign(&mut self, chosen: &[Candidate], lineup: &Lineup, copy: bool) {
        for (rank, (conn, _)) in (0..).map(Rank).zip(chosen) {
            if let Some(member) = self.members.get_mut(*conn) {
                member.enter(Held::Busy(Some(rank)));
                member.step = lineup.from.0;
            }
        }
        let placed = self.members.placed();
        let workers = placed.iter().map(|(_, _, member)| member.hello.worker_id.clone()).collect();
        let assign = v1::Assign {
            rank: 0,
            next: String::new(),
            world: chosen.len() as u32,
            commit_json: lineup.commit.as_ref().map(|commit| serde_json::to_vec(commit).unwrap_or_default()).unwrap_or_default(),
            session: self.session(),
            source: lineup.source.map(|rank| rank.0),
            step: lineup.from.0,
            copy,
        };
        let addresses: Vec<String> = placed.iter().map(|(_, _, member)| member.hello.peer_address.clone()).collect();
        for (rank, (conn, _)) in (0..).zip(chosen) {
            let next = addresses[(rank as usize + 1) % addresses.len()].clone();
            let rank = if self.is_mutated(Mutation::DealsTwice) { rank / 2 } else { rank };
            self.send(*conn, to_worker::Body::Assign(v1::Assign { rank, next, ..assign.clone() }));
        }
        self.note(Note::Generation { generation: self.generation.0, workers, from_step: lineup.from.0 });
    }

    /// The same bytes for all of a generation, others for the next: whoever was in one learns nothing of another's.
    pub(super) fn session(&self) -> Vec<u8> {
        let own = blake3::derive_key("ella 2026-11-26 a coordinator's sessions", &self.config.session);
        blake3::keyed_hash(&own, &self.generation.0.to_le_bytes()).as_bytes()[..self.config.session.len()].to_vec()
    }

    /// Counts generations that came to nothing. One that lost a worker before it could begin says nothing about the run, nor does one whose ranks did
    /// not reach each other.
    fn fruitless(&mut self, from: Step) -> Option<Failure> {
        let before = self.lineup.as_ref()?;
        if from != before.from {
            self.fruitless = 0;
            return None;
        }
        if (before.started || before.broken) && !before.lost_early && !before.apart {
            self.fruitless += 1;
        }
        let (generations, step, why) = (self.fruitless, from, before.why.clone());
        (generations >= MOST_FRUITLESS).then_some(Failure::NoProgress { generations, step, why })
    }

    /// The generation is over: all that are still in it are told to stop at once.
    pub(super) fn end_generation(&mut self, now: Time, why: String, broken: bool) {
        if !self.phase.has_generation() {
            return;
        }
        let until = match self.phase {
            Phase::Regrouping { until } => until,
            _ => now.after(self.config.welcome.step_timeout_ms),
        };
        self.keep_all_timing();
        self.members.retain_open();
        self.phase = Phase::Regrouping { until };
        if let Some(lineup) = &mut self.lineup {
            lineup.broken |= broken;
            if !std::mem::replace(&mut lineup.told, true) {
                lineup.why.clone_from(&why);
                self.note(Note::Regroup { generation: self.generation.0, reason: why.clone(), at_boundary: false });
                self.send_placed(&to_worker::Body::Regroup(v1::Regroup { at_boundary: false, reason: why }));
            }
        }
        self.settle(now);
    }

    /// A worker of the generation is gone, before or after all were ready.
    pub(super) fn weaken(&mut self) {
        if let Some(lineup) = &mut self.lineup {
            lineup.lost_early |= !lineup.started;
        }
    }

    /// All ranks are to stop after the same step, so that the next generation has other members.
    pub(super) fn ask_boundary(&mut self, reason: String) {
        let Some(lineup) = self.lineup.as_mut().filter(|lineup| !lineup.boundary) else { return };
        lineup.boundary = true;
        lineup.why.clone_from(&reason);
        self.join_at = None;
        self.note(Note::Regroup { generation: self.generation.0, reason: reason.clone(), at_boundary: true });
        self.send_placed(&to_worker::Body::Regroup(v1::Regroup { at_boundary: true, reason }));
    }

    /// A worker waits for a place, or is in no generation any more.
    pub(super) fn idle(&mut self, now: Time, conn: ConnId, idle: v1::Idle) {
        let steps = self.config.steps;
        let held = Held::Idle(idle.step.filter(|step| *step <= steps).map(Step));
        let Some(member) = self.members.get(conn) else { return };
        let (who, placed, returned) = (member.who(), member.rank().is_some(), member.place.is_some());
        if let Some(refusal) = self.stranger(&idle).filter(|_| !placed && member.open) {
            self.members.remove(conn);
            return self.refuse(conn, who.worker_id, refusal);
        }
        if self.has_done_its_work(member) {
            return;
        }
        if placed && self.phase.has_begun() && self.last_commit().0 >= steps {
            return self.says_nothing_more(now, conn);
        }
        if placed && idle.next_unreached && self.next_unreached(now, conn, held, &idle.broken) {
            return;
        }
        self.keep_timing(conn, true);
        if let Some(member) = self.members.get_mut(conn) {
            member.enter(held);
        }
        if returned {
            self.give_up_adoption("a rank of the generation that came back has stopped");
        }
        let asked = idle.broken.is_empty() && self.lineup.as_ref().is_some_and(|lineup| lineup.boundary);
        match self.phase {
            Phase::Starting { .. } | Phase::Training | Phase::Draining { .. } | Phase::Closing { .. } if placed && !asked => {
                let why = if idle.broken.is_empty() { format!("{who} stopped unasked") } else { broke(&who, &idle.broken) };
                self.end_generation(now, why, true);
            }
            Phase::Starting { .. } | Phase::Training | Phase::Draining { .. } | Phase::Closing { .. } if placed => {
                self.phase = Phase::Regrouping { until: now.after(self.config.welcome.step_timeout_ms) };
                self.settle(now);
            }
            // Others may still wait for it in a collective, if they were to stop at a boundary.
            Phase::Regrouping { .. } if placed && !idle.broken.is_empty() => self.end_generation(now, broke(&who, &idle.broken), true),
            _ => self.settle(now),
        }
    }

    /// Takes in those that wait for a place, at the next boundary: together with others that come within a window, and not in the midst
    /// of a commit, unless that takes too long.
    pub(super) fn take_in(&mut self, now: Time) {
        let has_room = self.lineup.as_ref().is_some_and(|lineup| !lineup.boundary && lineup.world < self.config.max);
        let candidates = self.members.which(|member| self.is_to_join(member)).len();
        if self.phase != Phase::Training || !has_room || candidates == 0 {
            self.join_at = None;
            return;
        }
        self.join_at.get_or_insert(now.after(self.config.join_window));
        if self.join_deadline().is_some_and(|at| now >= at) {
            self.ask_boundary(format!("workers that are to join: {candidates}"));
        }
    }

    /// When workers are taken in.
    pub(super) fn join_deadline(&self) -> Option<Time> {
        let commit = if self.commits.lacks_reports(self.generation, self.world()) { self.config.commit_timeout } else { 0 };
        self.join_at.map(|at| at.after(commit))
    }

    /// All ranks are there: steps are taken from here on, towards the run's end or that of a drain.
    pub(super) fn begin_training(&mut self, now: Time) {
        self.tell_unlike();
        self.phase = match &self.drain {
            None => Phase::Training,
            Some(drain) => Phase::Draining { reason: drain.reason.clone(), until: drain.until },
        };
        self.members.iter_mut().for_each(|member| member.trained = member.rank().is_some());
        self.reached();
        self.begin_pace(now);
        if let Phase::Draining { reason, .. } = &self.phase {
            let reason = reason.clone();
            self.send_placed(&to_worker::Body::Drain(v1::Drain { reason }));
        }
    }
    /// Those that have not left a generation in time are let go.
    pub(super) fn let_busy_go(&mut self, now: Time) {
        let waited_ms = self.config.welcome.step_timeout_ms;
        for conn in self.members.which(Member::is_busy) {
            self.let_go(now, conn, super::Loss::NotIdle { waited_ms });
        }
    }
}

/// What a worker says of its end in a generation, which all ranks are told.
fn broke(who: &Who, words: &str) -> String {
    format!("{who}: {words}").chars().take(MOST_TEXT).collect()
}
