//! Who takes part: attaching, refusing, liveness, and the forming of a generation.

use super::{Closed, ConnId, Core, CoreConfig, Failure, Field, Loss, Note, Phase, RankTiming, Than, Time, Wait, Who};
use ella_proto::ids::{Generation, Rank, Step};
use ella_proto::v1::{self, to_worker};
use std::collections::BTreeMap;

/// Longest text taken from a worker's Hello.
const MOST_TEXT: usize = 256;

/// Why a worker is turned away.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Worker and coordinator are of different builds.
    #[error("this worker has version {theirs}, the coordinator {ours}; start workers of the same version")]
    Version {
        /// The coordinator's.
        ours: String,
        /// The worker's.
        theirs: String,
    },
    /// The worker insists on another config.
    #[error("this worker was started for config {theirs}, but the coordinator has {ours}; start it with that config, or with none")]
    Config {
        /// The coordinator's digest.
        ours: String,
        /// The worker's.
        theirs: String,
    },
    /// All places are taken.
    #[error("the run has all of its {need} workers (workers.count); spare workers are not kept")]
    Full {
        /// How many there are.
        need: usize,
    },
    /// Two processes on one device would deadlock in their first collective.
    #[error("device {uuid} is already used by {holder}; give each worker a device of its own")]
    DuplicateDevice {
        /// The device.
        uuid: String,
        /// Who has it.
        holder: Box<Who>,
    },
    /// SAME holds for equal device kinds only.
    #[error("this worker computes on {theirs}, those before it on {ours}; all workers of a run must have one device kind")]
    DeviceKind {
        /// That of the first worker.
        ours: String,
        /// That of this one.
        theirs: String,
    },
    /// Its id is taken.
    #[error("the worker id is already used by {holder}; each process must make its own")]
    DuplicateWorker {
        /// Who has it.
        holder: Box<Who>,
    },
    /// It breaks a rule of the protocol.
    #[error("{rule}")]
    Malformed {
        /// Which.
        rule: &'static str,
    },
    /// There is nothing left to do.
    #[error("the run is over ({})", word(*outcome))]
    RunOver {
        /// How it ended.
        outcome: v1::Outcome,
    },
    /// The job ended.
    #[error("the job is over ({})", word(*outcome))]
    JobOver {
        /// How it ended.
        outcome: v1::Outcome,
    },
    /// Another coordinator has the run (TERM).
    #[error("this coordinator has been superseded; attach to the new one")]
    Superseded,
}

fn word(outcome: v1::Outcome) -> &'static str {
    match outcome {
        v1::Outcome::Done => "done",
        v1::Outcome::Preempted => "preempted",
        v1::Outcome::Failed | v1::Outcome::Unspecified => "failed",
    }
}

impl Refusal {
    /// As the wire says it.
    pub fn reason(&self) -> v1::RefusedReason {
        use v1::RefusedReason as R;
        match self {
            Self::Version { .. } => R::Version,
            Self::Config { .. } => R::Config,
            Self::Full { .. } => R::Full,
            Self::DuplicateDevice { .. } => R::DuplicateDevice,
            Self::DeviceKind { .. } => R::DeviceKind,
            Self::DuplicateWorker { .. } => R::DuplicateWorker,
            Self::Malformed { .. } => R::Malformed,
            Self::RunOver { .. } | Self::JobOver { .. } => R::RunOver,
            Self::Superseded => R::Superseded,
        }
    }

    /// As the wire says it, in words too.
    pub(crate) fn on_the_wire(&self) -> v1::Refused {
        let outcome = match self {
            Self::RunOver { outcome } | Self::JobOver { outcome } => *outcome,
            _ => v1::Outcome::Unspecified,
        };
        v1::Refused { reason: self.reason().into(), detail: self.to_string(), outcome: outcome.into() }
    }

    /// Refuses a worker of another version than `ours`, or one that insists on another config than that of `digest`.
    pub(crate) fn of_another_build(hello: &v1::Hello, ours: &str, digest: &str) -> Result<(), Self> {
        if hello.version != ours {
            return Err(Self::Version { ours: ours.to_owned(), theirs: hello.version.clone() });
        }
        if !hello.config_digest.is_empty() && hello.config_digest != digest {
            return Err(Self::Config { ours: digest.to_owned(), theirs: hello.config_digest.clone() });
        }
        Ok(())
    }

    /// The counter's name (KNOWN).
    pub(crate) fn counter(&self) -> &'static str {
        match self {
            Self::Version { .. } => "refused_version",
            Self::Config { .. } => "refused_config",
            Self::Full { .. } => "refused_full",
            Self::DuplicateDevice { .. } => "refused_duplicate_device",
            Self::DeviceKind { .. } => "refused_device_kind",
            Self::DuplicateWorker { .. } => "refused_duplicate_worker",
            Self::Malformed { .. } => "refused_malformed",
            Self::RunOver { .. } | Self::JobOver { .. } => "refused_run_over",
            Self::Superseded => "refused_superseded",
        }
    }
}

/// A worker that was taken in.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) hello: v1::Hello,
    pub(super) rank: Option<Rank>,
    pub(super) heard: Time,
    pub(super) step: u64,
    pub(super) parts: Option<v1::StepParts>,
    /// Captions that it has encoded, while its next step waits for more.
    pub(super) encoding: Option<u64>,
    /// Where its time went since that was last kept.
    pub(super) timing: RankTiming,
    ready: Option<v1::Ready>,
    finished: Option<v1::Finished>,
    failed: bool,
    /// Its stream lives. Members of a generation stay known after that.
    open: bool,
}

impl Member {
    fn who(&self) -> Who {
        Who::of(&self.hello, self.rank)
    }
}

/// What a worker computes on, for people.
pub(crate) fn device(hello: &v1::Hello) -> String {
    let v1::Hello { device_kind, device_uuid, .. } = hello;
    if device_uuid.is_empty() { device_kind.clone() } else { format!("{device_kind} {device_uuid}") }
}

/// The workers that were taken in, in the order in which their streams were opened.
#[derive(Debug, Default)]
pub(super) struct Members(BTreeMap<ConnId, Member>);

impl Members {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&ConnId, &Member)> {
        self.0.iter()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Member> {
        self.0.values_mut()
    }

    pub(super) fn contains(&self, conn: ConnId) -> bool {
        self.0.contains_key(&conn)
    }

    /// Whose stream lives.
    pub(super) fn open(&self) -> Vec<ConnId> {
        self.0.iter().filter(|(_, member)| member.open).map(|(conn, _)| *conn).collect()
    }

    /// Lets everyone go; gives those whose streams lived.
    pub(super) fn close_all(&mut self) -> Vec<ConnId> {
        let open = self.open();
        self.0.values_mut().for_each(|member| member.open = false);
        open
    }

    /// Notes that a member spoke, in this term or another (which is no sign of life). False for a stranger.
    pub(super) fn heard(&mut self, conn: ConnId, now: Time, in_term: bool) -> bool {
        match self.0.get_mut(&conn) {
            Some(member) if in_term => member.heard = now,
            Some(_) => {}
            None => return false,
        }
        true
    }

    pub(super) fn oldest_heard(&self) -> Option<Time> {
        self.0.values().filter(|member| member.open).map(|member| member.heard).min()
    }

    pub(super) fn silent(&self, now: Time, lease_ms: u64) -> Vec<ConnId> {
        let overdue = |member: &Member| member.open && now.since(member.heard) >= lease_ms;
        self.0.iter().filter(|(_, member)| overdue(member)).map(|(conn, _)| *conn).collect()
    }

    pub(super) fn who(&self, conn: ConnId) -> Option<Who> {
        self.0.get(&conn).map(Member::who)
    }

    pub(super) fn who_is(&self, rank: Rank) -> Option<Who> {
        self.0.values().find(|member| member.rank == Some(rank)).map(Member::who)
    }

    pub(super) fn rank(&self, conn: ConnId) -> Option<Rank> {
        self.0.get(&conn)?.rank
    }

    pub(super) fn get_mut(&mut self, conn: ConnId) -> Option<&mut Member> {
        self.0.get_mut(&conn)
    }

    pub(super) fn not_ready(&self) -> Vec<Rank> {
        self.0.values().filter(|member| member.ready.is_none()).filter_map(|member| member.rank).collect()
    }

    /// What ranks wait for, if some wait for captions to be encoded.
    pub(super) fn encoding(&self) -> Option<Wait> {
        let waiting = self.0.values().filter_map(|member| Some((member.rank?, member.encoding?)));
        let (ranks, captions): (Vec<Rank>, Vec<u64>) = waiting.unzip();
        (!ranks.is_empty()).then(|| Wait::Encoding { ranks, captions: captions.iter().sum() })
    }

    pub(super) fn first_not_ready(&self) -> Option<Who> {
        self.0.values().find(|member| member.ready.is_none()).map(Member::who)
    }

    fn all_ready(&self) -> Option<Vec<(Rank, v1::Ready)>> {
        self.0.values().map(|member| Some((member.rank?, member.ready.clone()?))).collect()
    }

    pub(super) fn all_finished(&self) -> Option<Vec<(Rank, v1::Finished)>> {
        self.0.values().map(|member| Some((member.rank?, member.finished?))).collect()
    }

    pub(super) fn all_failed(&self) -> bool {
        self.0.values().all(|member| member.failed || !member.open)
    }

    /// False if it has finished before.
    pub(super) fn set_finished(&mut self, conn: ConnId, finished: v1::Finished) -> bool {
        self.0.get_mut(&conn).is_some_and(|member| member.finished.replace(finished).is_none())
    }

    pub(super) fn set_failed(&mut self, conn: ConnId) -> Option<Who> {
        let member = self.0.get_mut(&conn)?;
        member.failed = true;
        Some(member.who())
    }

    /// The rank whose value is not the most common one (of equally common ones, the lowest rank's stands).
    pub(super) fn disagreement(&self, field: Field, step: Step, values: &[(Rank, String)]) -> Option<Failure> {
        let support = |value: &String| values.iter().filter(|(_, other)| other == value).count();
        // `max_by_key` gives the last of equals, so the ranks are gone through backwards.
        let (_, expected) = values.iter().rev().max_by_key(|(_, value)| support(value))?;
        let (rank, found) = values.iter().find(|(_, found)| found != expected)?;
        let who = self.who_is(*rank)?;
        Some(Failure::Differs { who, step, field, expected: expected.clone(), found: found.clone(), than: Than::Others })
    }

    fn admit(&self, hello: &v1::Hello, config: &CoreConfig) -> Result<(), Refusal> {
        check_form(hello)?;
        Refusal::of_another_build(hello, &config.version, &config.welcome.config_digest)?;
        for member in self.0.values() {
            let other = &member.hello;
            let holder = || Box::new(member.who());
            if other.worker_id == hello.worker_id {
                return Err(Refusal::DuplicateWorker { holder: holder() });
            }
            if other.device_kind != hello.device_kind {
                return Err(Refusal::DeviceKind { ours: other.device_kind.clone(), theirs: hello.device_kind.clone() });
            }
            if !hello.device_uuid.is_empty() && other.device_uuid == hello.device_uuid {
                return Err(Refusal::DuplicateDevice { uuid: hello.device_uuid.clone(), holder: holder() });
            }
        }
        if self.len() >= config.workers {
            return Err(Refusal::Full { need: config.workers });
        }
        Ok(())
    }
}

/// The form of what says who a worker is.
pub(crate) fn check_identity(hello: &v1::Hello) -> Result<(), Refusal> {
    let v1::Hello { worker_id, version, host, device_kind, device_uuid, peer_address, config_digest, .. } = hello;
    let texts = [worker_id, version, host, device_kind, device_uuid, peer_address, config_digest];
    obeyed(&[
        (texts.iter().all(|text| text.len() <= MOST_TEXT), "no text in Hello may be longer than 256 bytes"),
        (!worker_id.is_empty(), "Hello.worker_id must not be empty"),
    ])
}

/// What may be shown of a text of unknown length.
pub(crate) fn shown(text: &str) -> String {
    text.chars().take(MOST_TEXT).collect()
}

fn check_form(hello: &v1::Hello) -> Result<(), Refusal> {
    check_identity(hello)?;
    let v1::Hello { device_kind, device_uuid, peer_address, .. } = hello;
    let port = peer_address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).and_then(|(_, port)| port.parse::<u16>().ok());
    obeyed(&[
        (matches!(device_kind.as_str(), "cpu" | "cuda"), "Hello.device_kind must be \"cpu\" or \"cuda\""),
        (device_kind != "cuda" || !device_uuid.is_empty(), "Hello.device_uuid must name the GPU"),
        (port.is_some_and(|port| port != 0), "Hello.peer_address must be host:port"),
    ])
}

/// Refuses by the first rule that does not hold.
fn obeyed(rules: &[(bool, &'static str)]) -> Result<(), Refusal> {
    match rules.iter().find(|(holds, _)| !holds) {
        Some((_, rule)) => Err(Refusal::Malformed { rule }),
        None => Ok(()),
    }
}

impl Core {
    pub(super) fn hello(&mut self, now: Time, conn: ConnId, hello: v1::Hello) {
        if self.members.contains(conn) {
            return self.counts.add("refused_second_hello", 1);
        }
        let admitted = match &self.phase {
            Phase::Over(outcome) => Err(match outcome {
                super::Outcome::Failed(failure) if matches!(**failure, Failure::Superseded { .. }) => Refusal::Superseded,
                outcome => Refusal::RunOver { outcome: outcome.on_the_wire() },
            }),
            Phase::Ending { outcome, .. } => Err(Refusal::RunOver { outcome: outcome.on_the_wire() }),
            _ => self.members.admit(&hello, &self.config),
        };
        if let Err(refusal) = admitted {
            return self.refuse(conn, shown(&hello.worker_id), refusal);
        }
        let worker = hello.worker_id.clone();
        let member = Member {
            hello,
            rank: None,
            heard: now,
            step: 0,
            parts: None,
            encoding: None,
            timing: RankTiming::default(),
            ready: None,
            finished: None,
            failed: false,
            open: true,
        };
        let device = device(&member.hello);
        self.members.0.insert(conn, member);
        let (have, need) = (self.members.len(), self.config.workers);
        self.send(conn, to_worker::Body::Welcome(self.config.welcome.clone()));
        self.note(Note::Attached { worker, device, have, need });
        if have == need {
            self.form_generation(now);
        }
    }

    pub(super) fn refuse(&mut self, conn: ConnId, worker: String, refusal: Refusal) {
        self.counts.add(refusal.counter(), 1);
        self.send(conn, to_worker::Body::Refused(refusal.on_the_wire()));
        self.effects.push(super::Effect::Close(conn));
        self.note(Note::Refused { worker, why: refusal.to_string() });
    }

    /// Deals the ranks in the order of arrival, and tells everyone its place.
    fn form_generation(&mut self, now: Time) {
        self.generation = Generation(self.generation.0 + 1);
        for (rank, member) in (0..).zip(self.members.0.values_mut()) {
            member.rank = Some(Rank(rank));
            member.step = self.progress.step();
        }
        let peers: Vec<String> = self.members.0.values().map(|member| member.hello.peer_address.clone()).collect();
        let workers = self.members.0.values().map(|member| member.hello.worker_id.clone()).collect();
        let commit_json = self.commits.last().map(|commit| serde_json::to_vec(commit).unwrap_or_default()).unwrap_or_default();
        let session = self.session();
        self.phase = Phase::Starting { until: now.after(self.config.start_timeout) };
        for (rank, conn) in (0..).zip(self.members.open()) {
            let (peers, commit_json, session) = (peers.clone(), commit_json.clone(), session.clone());
            self.send(conn, to_worker::Body::Assign(v1::Assign { rank, peers, commit_json, session }));
        }
        self.note(Note::Generation { generation: self.generation.0, workers, from_step: self.progress.step() });
    }

    /// The same bytes for all of a generation, others for the next.
    fn session(&self) -> Vec<u8> {
        let mut session = self.config.session;
        for (byte, mixed) in session.iter_mut().zip(self.generation.0.to_le_bytes()) {
            *byte ^= mixed;
        }
        session.to_vec()
    }

    /// A rank has loaded and restored. Once all have, they must agree with each other and with the commit, and training begins.
    pub(super) fn ready(&mut self, _now: Time, conn: ConnId, ready: v1::Ready) {
        if !matches!(self.phase, Phase::Starting { .. }) {
            return self.counts.add("refused_out_of_turn", 1);
        }
        let digests = [(Field::State, &*ready.state_digest), (Field::Data, &*ready.data_digest), (Field::Models, &*ready.models_digest)];
        if let Some(failure) = self.malformed(conn, &digests) {
            return self.fail(failure);
        }
        if let Some(member) = self.members.0.get_mut(&conn) {
            member.ready = Some(ready);
        }
        let Some(all) = self.members.all_ready() else { return };
        if let Some(failure) = self.judge_ready(&all) {
            return self.fail(failure);
        }
        self.agreed = all.into_iter().next().map(|(_, ready)| ready);
        self.phase = Phase::Training;
        self.send_all(&to_worker::Body::Start(v1::Start {}));
        self.note(Note::Started { generation: self.generation.0, step: self.progress.step() });
    }

    fn judge_ready(&self, all: &[(Rank, v1::Ready)]) -> Option<Failure> {
        let column = |text: fn(&v1::Ready) -> String| -> Vec<(Rank, String)> { all.iter().map(|(r, ready)| (*r, text(ready))).collect() };
        let data = column(|ready| ready.data_digest.clone());
        let models = column(|ready| ready.models_digest.clone());
        let step = column(|ready| ready.step.to_string());
        let state = column(|ready| ready.state_digest.clone());
        let from = self.commits.last();
        let at = from.map(|commit| Step(commit.step));
        let with_commit = from.and_then(|commit| {
            let checks = [
                (Field::Data, &data, commit.data_digest.to_string()),
                (Field::Models, &models, commit.models_digest.to_string()),
                (Field::State, &state, commit.state_digest.to_string()),
            ];
            checks.into_iter().find_map(|(field, values, expected)| self.differs_from_start(field, values, &expected, at))
        });
        let columns = [
            (Field::Data, &data),
            (Field::Models, &models),
            (Field::SamplesPerEpoch, &column(|ready| ready.samples_per_epoch.to_string())),
            (Field::State, &state),
        ];
        let among = || columns.into_iter().find_map(|(field, values)| self.members.disagreement(field, at.unwrap_or_default(), values));
        let start = self.last_commit().to_string();
        self.differs_from_start(Field::Step, &step, &start, at).or(with_commit).or_else(among)
    }

    /// A digest that is none.
    pub(super) fn malformed(&self, conn: ConnId, digests: &[(Field, &str)]) -> Option<Failure> {
        let (field, found) = digests.iter().find(|(_, text)| text.parse::<ella_store::Digest>().is_err())?;
        Some(Failure::Malformed { who: self.members.who(conn)?, field: *field, found: shown(found) })
    }

    pub(super) fn closed(&mut self, now: Time, conn: ConnId, how: Closed) {
        if let Some(name) = how.counter() {
            self.counts.add(name, 1);
        }
        self.lost(now, conn, how.into());
    }

    /// A member is gone. Before training its place is free again; after that the run can't go on without
    /// it, unless its work was done: what it had to report is in, or the run's last commit stands, whether it said farewell or not.
    pub(super) fn lost(&mut self, now: Time, conn: ConnId, how: Loss) {
        let all_committed = matches!(self.phase, Phase::Closing { .. }) && !self.commits.lacks_reports(self.members.len());
        let last = self.last_commit();
        let Some(member) = self.members.0.get_mut(&conn).filter(|member| member.open) else { return };
        member.open = false;
        let (who, blamed, finished) = (member.who(), member.failed, member.finished);
        self.effects.push(super::Effect::Close(conn));
        match self.phase {
            Phase::Waiting { .. } => {
                self.counts.add("workers_left", 1);
                self.members.0.remove(&conn);
                self.note(Note::Left { worker: who.worker_id, why: how.to_string() });
            }
            Phase::Ending { .. } | Phase::Over(_) => {}
            // It has said why it leaves; the suspicion's window decides.
            _ if blamed => {}
            _ if finished.is_some_and(|finished| all_committed || finished.step <= last.0) => {}
            _ if last.0 >= self.config.steps => {
                self.counts.add("workers_left", 1);
                self.finished(now, conn, v1::Finished { step: last.0, outcome: v1::Outcome::Done.into() });
            }
            _ => {
                self.counts.add("workers_lost", 1);
                self.fail(Failure::Lost { who, how });
            }
        }
    }
}
