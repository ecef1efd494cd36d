//! Checks the named invariants after every event, from nothing but what went in and what came out.

use super::*;
use ella_proto::v1::{Assign, Idle, StateDigest};

pub(in crate::core) struct Oracle {
    term: u64,
    /// Steps of commits that were appended, and of those that stand.
    appended: Vec<u64>,
    recorded: BTreeSet<u64>,
    given_up: BTreeSet<String>,
    newest: Option<Commit>,
    finished: bool,
    /// Who said hello in this event, and who is behind a stream.
    greeting: Option<String>,
    workers: BTreeMap<ConnId, String>,
    /// Who has a place and has not left it.
    busy: BTreeSet<String>,
    /// States of those that wait for a place.
    states: BTreeMap<String, Option<u64>>,
    /// The newest generation: its number, members, first place, and who was ready.
    generation: u64,
    lineup: BTreeSet<String>,
    nexts: BTreeSet<String>,
    assign: Option<Assign>,
    ready: BTreeSet<String>,
    /// What ranks reported of commits, by generation and step.
    digests: BTreeMap<(u64, u64), BTreeMap<String, StateDigest>>,
    parts: BTreeMap<(u64, u64), BTreeSet<String>>,
}

impl Oracle {
    pub(in crate::core) fn new(history: &History) -> Self {
        let steps: Vec<u64> = history.commits.iter().map(|commit| commit.step).collect();
        Self {
            term: history.term.0,
            recorded: steps.iter().copied().collect(),
            appended: steps,
            given_up: BTreeSet::new(),
            newest: history.commits.last().cloned(),
            finished: false,
            greeting: None,
            workers: BTreeMap::new(),
            busy: BTreeSet::new(),
            states: BTreeMap::new(),
            generation: 0,
            lineup: BTreeSet::new(),
            nexts: BTreeSet::new(),
            assign: None,
            ready: BTreeSet::new(),
            digests: BTreeMap::new(),
            parts: BTreeMap::new(),
        }
    }

    pub(in crate::core) fn check(&mut self, core: &Core, now: Time, event: &Event, effects: &[Effect]) {
        self.learn(event);
        let was_over = self.finished;
        for effect in effects {
            self.check_effect(core, effect, was_over);
        }
        check_members(core);
        assert_eq!(core.phase.is_over(), self.finished, "P-1: the outcome is announced once, when it is decided");
        assert_eq!(core.next_deadline().is_some(), !core.phase.is_over(), "P-2");
        assert!(core.next_deadline().is_none_or(|at| at > now), "P-2: the deadline {:?} has passed at {now:?}", core.next_deadline());
    }

    fn learn(&mut self, event: &Event) {
        match event {
            Event::Appended(Body::Commit(commit)) => {
                self.recorded.insert(commit.step);
                self.newest = Some(commit.clone());
            }
            Event::Appended(Body::Retire { commits }) => self.given_up.extend(commits.iter().cloned()),
            // Another generation may make a commit of the same step.
            Event::PartUnseen { step, .. } => self.appended.retain(|appended| appended != step),
            Event::Message(conn, message) => self.learn_said(*conn, message),
            Event::Closed(conn, _) => self.gone(*conn),
            _ => {}
        }
    }

    fn learn_said(&mut self, conn: ConnId, message: &FromWorker) {
        use from_worker::Body as B;
        if let Some(B::Hello(hello)) = &message.body {
            self.greeting = Some(hello.worker_id.clone());
            return;
        }
        let Some(worker) = self.workers.get(&conn).filter(|_| message.term == self.term).cloned() else { return };
        let (of_generation, key) = (message.generation == self.generation, |step| (message.generation, step));
        match message.body.as_ref() {
            Some(B::Idle(Idle { step, .. })) if of_generation || !self.busy.contains(&worker) => {
                self.busy.remove(&worker);
                self.states.insert(worker, *step);
            }
            Some(B::Ready(_)) if of_generation => drop(self.ready.insert(worker)),
            Some(B::State(digest)) if self.busy.contains(&worker) => {
                self.digests.entry(key(digest.step)).or_default().entry(worker).or_insert_with(|| digest.clone());
            }
            Some(B::Part(part)) => drop(self.parts.entry(key(part.step)).or_default().insert(part.name.clone())),
            _ => {}
        }
    }

    fn gone(&mut self, conn: ConnId) {
        let Some(worker) = self.workers.remove(&conn) else { return };
        // A worker that came back has another stream, and what is known of it stays.
        if self.workers.values().all(|other| *other != worker) {
            self.busy.remove(&worker);
            self.states.remove(&worker);
        }
    }

    fn check_effect(&mut self, core: &Core, effect: &Effect, was_over: bool) {
        match effect {
            Effect::Append(body) => {
                assert!(!was_over, "P-1: {body:?} after the outcome");
                if let Body::Commit(commit) = body {
                    self.check_commit(commit);
                }
            }
            Effect::Send(conn, ToWorker { body: Some(body), generation, .. }) => {
                assert!(!was_over || matches!(body, to_worker::Body::Refused(_)), "P-1: {body:?} after the outcome");
                self.check_sent(*conn, *generation, body);
            }
            Effect::Send(_, ToWorker { body: None, .. }) => panic!("an empty message"),
            Effect::DeleteFolders(folders) => {
                for folder in folders {
                    assert!(self.given_up.contains(folder), "C-4: {folder} was not given up");
                    assert_ne!(Some(folder), self.newest.as_ref().map(|commit| &commit.folder), "C-4: the newest commit");
                }
            }
            Effect::Finish(outcome) => {
                assert!(!lost_a_worker(outcome) || !self.recorded.contains(&core.config.steps), "C-5: {outcome:?}");
                assert!(!self.finished, "P-1: a second outcome");
                self.finished = true;
            }
            Effect::Close(conn) => self.gone(*conn),
            Effect::Note(Note::Adopted { generation, workers, .. }) => {
                (self.generation, self.assign) = (*generation, None);
                self.lineup = workers.iter().cloned().collect();
                self.ready = self.lineup.clone();
                assert_eq!(self.busy, self.lineup, "M-2: of an adopted generation");
            }
            Effect::Note(Note::Generation { workers, .. }) => assert_eq!(workers.len(), self.lineup.len(), "M-2"),
            Effect::Metric(_) | Effect::Timing(_) | Effect::Note(_) => {}
        }
    }

    fn check_sent(&mut self, conn: ConnId, generation: u64, body: &to_worker::Body) {
        use to_worker::Body as B;
        let worker = self.workers.get(&conn).cloned();
        match body {
            B::Welcome(_) => {
                let worker = self.greeting.take().unwrap();
                self.busy.remove(&worker);
                self.states.remove(&worker);
                self.workers.insert(conn, worker);
            }
            B::Assign(assign) => self.check_assign(worker.unwrap(), generation, assign),
            B::Adopted(_) => drop(self.busy.insert(worker.unwrap())),
            B::Start(_) => {
                assert_eq!(self.ready, self.lineup, "G-4");
                assert!(self.lineup.contains(&worker.unwrap()), "G-4: to whom");
            }
            B::Committed(v1::Committed { step }) => assert!(self.recorded.contains(step), "C-3: step {step}"),
            _ => {}
        }
    }

    fn check_assign(&mut self, worker: String, generation: u64, assign: &Assign) {
        if generation != self.generation {
            assert!(generation > self.generation, "G-2: {generation} after {}", self.generation);
            assert_eq!(self.busy, BTreeSet::new(), "G-1");
            (self.generation, self.assign) = (generation, Some(assign.clone()));
            (self.lineup, self.ready, self.nexts) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
            let last = self.newest.as_ref().map_or(0, |commit| commit.step);
            let commit: Option<Commit> = serde_json::from_slice(&assign.commit_json).ok();
            assert_eq!(commit, self.newest, "G-3: the newest commit");
            match assign.source {
                Some(_) => assert!(assign.step >= last, "G-3: step {} after the commit of {last}", assign.step),
                None => assert_eq!((assign.step, assign.copy), (last, false), "G-3"),
            }
        }
        let rank = assign.rank;
        let first = Assign { rank, next: assign.next.clone(), ..self.assign.clone().unwrap() };
        assert_eq!(first, *assign, "G-3: all ranks are told the same");
        assert_eq!(rank as usize, self.lineup.len(), "M-2");
        assert!(rank < assign.world && self.nexts.insert(assign.next.clone()), "M-2: each has a next rank of its own");
        let state = self.states.remove(&worker).expect("G-1: a place for one that is not idle");
        if assign.source == Some(rank) {
            assert_eq!(state, Some(assign.step), "G-3: what the source holds");
        }
        assert!(assign.source.is_none() || assign.copy || state == Some(assign.step), "G-3: {worker} lacks the state");
        self.busy.insert(worker.clone());
        self.lineup.insert(worker);
    }

    fn check_commit(&mut self, commit: &Commit) {
        assert!(self.appended.last().is_none_or(|last| commit.step > *last), "C-2: {} after {:?}", commit.step, self.appended);
        self.appended.push(commit.step);
        let key = (commit.generation, commit.step);
        let digests = self.digests.remove(&key).unwrap_or_default();
        assert_eq!(commit.world as usize, self.lineup.len(), "C-1: the world");
        assert_eq!(digests.keys().cloned().collect::<BTreeSet<_>>(), self.lineup, "C-1: who has reported");
        assert!(digests.values().all(|digest| digest.digest == commit.state_digest.to_string()), "C-1: {digests:?}");
        assert_eq!(self.parts.remove(&key).unwrap_or_default().len(), PARTS.len(), "C-1: parts");
        assert_eq!(commit.parts.len(), PARTS.len(), "C-1");
    }
}

/// Whether a run failed because of workers that went.
fn lost_a_worker(outcome: &Outcome) -> bool {
    use Failure as F;
    let Outcome::Failed(failure) = outcome else { return false };
    matches!(
        **failure,
        F::TooFew { .. } | F::TooFewLeft { .. } | F::NotReady { .. } | F::Unreached { .. } | F::NoProgress { .. } | F::Worker { .. }
    )
}

fn check_members(core: &Core) {
    let members: Vec<_> = core.members.iter().map(|(_, member)| member).filter(|member| member.open).collect();
    let ids: BTreeSet<_> = members.iter().map(|member| &member.hello.worker_id).collect();
    let kinds: BTreeSet<_> = members.iter().map(|member| &member.hello.device_kind).collect();
    let gpus: Vec<_> = members.iter().map(|member| &member.hello.device_uuid).filter(|uuid| !uuid.is_empty()).collect();
    assert_eq!(ids.len(), members.len(), "M-1: worker ids");
    assert!(kinds.len() <= 1, "M-1: device kinds");
    assert_eq!(gpus.iter().collect::<BTreeSet<_>>().len(), gpus.len(), "M-1: devices");
    if core.phase.has_begun() || matches!(core.phase, Phase::Starting { .. }) {
        let ranks: Vec<_> = core.members.placed().iter().map(|(rank, ..)| rank.0).collect();
        assert_eq!(ranks, (0..core.world() as u32).collect::<Vec<_>>(), "M-2");
    }
}
