//! The workers that are here, and what each of them is at.

use super::{ConnId, Failure, Field, RankTiming, Than, Time, Wait, Who};
use crate::machine::total;
use ella_proto::ids::{Rank, Step};
use ella_proto::v1;
use std::collections::BTreeMap;

/// What a member is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Held {
    /// It loads its models.
    Loading,
    /// It waits for a place, with a state of so many steps, or with none.
    Idle(Option<Step>),
    /// It is in a generation and has not said Idle since: in the newest one if it has a rank, else in one of before.
    Busy(Option<Rank>),
}

/// A worker that was taken in.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) hello: v1::Hello,
    pub(super) held: Held,
    /// The generation in which it came back, until it is known whether that goes on.
    pub(super) place: Option<v1::Place>,
    /// Why it was asked to leave, if it was.
    pub(super) parting: Option<String>,
    /// It leaves only when others have its state, and takes part in a generation for that.
    pub(super) bequeaths: bool,
    /// When it came.
    pub(super) since: Time,
    pub(super) heard: Time,
    pub(super) step: u64,
    pub(super) parts: Option<v1::StepParts>,
    /// How its process is.
    pub(super) vitals: Option<v1::Vitals>,
    /// Captions that it has encoded, while its next step waits for more.
    pub(super) encoding: Option<u64>,
    /// What it said last that it is at, and when.
    pub(super) activity: Option<(Time, v1::Activity)>,
    /// Where its time went since that was last kept.
    pub(super) timing: RankTiming,
    pub(super) ready: Option<v1::Ready>,
    pub(super) finished: Option<v1::Finished>,
    /// It was in the last generation that trained: others reach it.
    pub(super) trained: bool,
    /// Its stream lives. One that has done all its work stays known after that.
    pub(super) open: bool,
}

impl Member {
    pub(super) fn new(hello: v1::Hello, held: Held, now: Time) -> Self {
        Self {
            hello,
            held,
            place: None,
            parting: None,
            bequeaths: false,
            since: now,
            heard: now,
            step: 0,
            parts: None,
            vitals: None,
            encoding: None,
            activity: None,
            timing: RankTiming::default(),
            ready: None,
            finished: None,
            trained: false,
            open: true,
        }
    }

    pub(super) fn who(&self) -> Who {
        Who::of(&self.hello, self.rank())
    }

    /// Its place in the newest generation.
    pub(super) fn rank(&self) -> Option<Rank> {
        match self.held {
            Held::Busy(rank) => rank,
            Held::Loading | Held::Idle(_) => None,
        }
    }

    pub(super) fn is_busy(&self) -> bool {
        matches!(self.held, Held::Busy(_))
    }

    /// It waits for a place.
    pub(super) fn is_idle(&self) -> bool {
        self.open && matches!(self.held, Held::Idle(_))
    }

    /// Steps of the state that it holds while it waits for a place. One older than the last commit is worth nothing.
    pub(super) fn state(&self, last_commit: Step) -> Option<Step> {
        match self.held {
            Held::Idle(step) => step.filter(|step| *step >= last_commit),
            Held::Loading | Held::Busy(_) => None,
        }
    }

    /// Gives it a place, or another state to be in. What belonged to the one before is forgotten.
    pub(super) fn enter(&mut self, held: Held) {
        self.held = held;
        (self.place, self.ready, self.finished, self.encoding, self.activity) = (None, None, None, None, None);
    }
}

/// The workers that were taken in, in the order in which their streams were opened.
#[derive(Debug, Default)]
pub(super) struct Members(BTreeMap<ConnId, Member>);

impl Members {
    pub(super) fn iter(&self) -> impl Iterator<Item = (ConnId, &Member)> {
        self.0.iter().map(|(conn, member)| (*conn, member))
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Member> {
        self.0.values_mut()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn contains(&self, conn: ConnId) -> bool {
        self.0.contains_key(&conn)
    }

    pub(super) fn insert(&mut self, conn: ConnId, member: Member) {
        self.0.insert(conn, member);
    }

    pub(super) fn remove(&mut self, conn: ConnId) -> Option<Member> {
        self.0.remove(&conn)
    }

    /// Forgets those that have done their work and gone.
    pub(super) fn retain_open(&mut self) {
        self.0.retain(|_, member| member.open);
    }

    pub(super) fn get(&self, conn: ConnId) -> Option<&Member> {
        self.0.get(&conn)
    }

    pub(super) fn get_mut(&mut self, conn: ConnId) -> Option<&mut Member> {
        self.0.get_mut(&conn)
    }

    /// Of those whose streams live, which are such.
    pub(super) fn which(&self, such: impl Fn(&Member) -> bool) -> Vec<ConnId> {
        self.iter().filter(|(_, member)| member.open && such(member)).map(|(conn, _)| conn).collect()
    }

    /// Whether there is such a one among those whose streams live.
    pub(super) fn any(&self, such: impl Fn(&Member) -> bool) -> bool {
        self.0.values().any(|member| member.open && such(member))
    }

    pub(super) fn conn_of(&self, worker_id: &str) -> Option<ConnId> {
        self.iter().find(|(_, member)| member.open && member.hello.worker_id == worker_id).map(|(conn, _)| conn)
    }

    /// Those of the newest generation, in the order of their ranks.
    pub(super) fn placed(&self) -> Vec<(Rank, ConnId, &Member)> {
        let mut placed: Vec<_> = self.iter().filter_map(|(conn, member)| Some((member.rank()?, conn, member))).collect();
        placed.sort_unstable_by_key(|(rank, ..)| *rank);
        placed
    }

    /// Lets everyone go; gives those whose streams lived.
    pub(super) fn close_all(&mut self) -> Vec<ConnId> {
        let open = self.which(|_| true);
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

    pub(super) fn who(&self, conn: ConnId) -> Option<Who> {
        self.0.get(&conn).map(Member::who)
    }

    pub(super) fn who_is(&self, rank: Rank) -> Option<Who> {
        self.0.values().find(|member| member.rank() == Some(rank)).map(Member::who)
    }

    pub(super) fn rank(&self, conn: ConnId) -> Option<Rank> {
        self.0.get(&conn)?.rank()
    }

    pub(super) fn not_ready(&self) -> Vec<(Rank, ConnId)> {
        self.placed().into_iter().filter(|(_, _, member)| member.ready.is_none()).map(|(rank, conn, _)| (rank, conn)).collect()
    }

    /// What ranks wait for, if some wait for captions to be encoded.
    pub(super) fn encoding(&self) -> Option<Wait> {
        let waiting = self.placed().into_iter().filter_map(|(rank, _, member)| Some((rank, member.encoding?)));
        let (ranks, captions): (Vec<Rank>, Vec<u64>) = waiting.unzip();
        (!ranks.is_empty()).then(|| Wait::Encoding { ranks, captions: total(captions) })
    }

    pub(super) fn all_ready(&self) -> Option<Vec<(Rank, v1::Ready)>> {
        // Looked at first, for it is asked as often as there are ranks.
        if self.iter().any(|(_, member)| member.rank().is_some() && member.ready.is_none()) {
            return None;
        }
        self.placed().into_iter().map(|(rank, _, member)| Some((rank, member.ready.clone()?))).collect()
    }

    pub(super) fn all_finished(&self) -> Option<Vec<(Rank, v1::Finished)>> {
        self.placed().into_iter().map(|(rank, _, member)| Some((rank, member.finished?))).collect()
    }

    /// The rank whose value is not the most common one (of equally common ones, the lowest rank's stands).
    pub(super) fn disagreement(&self, field: Field, step: Step, values: &[(Rank, String)]) -> Option<Failure> {
        if values.iter().all(|(_, value)| *value == values[0].1) {
            return None;
        }
        let support = |value: &String| values.iter().filter(|(_, other)| other == value).count();
        // `max_by_key` gives the last of equals, so the ranks are gone through backwards.
        let (_, expected) = values.iter().rev().max_by_key(|(_, value)| support(value))?;
        self.difference(field, step, values, expected, Than::Others)
    }

    /// The first rank whose value is not as expected.
    pub(super) fn difference(&self, field: Field, step: Step, values: &[(Rank, String)], expected: &str, than: Than) -> Option<Failure> {
        let (rank, found) = values.iter().find(|(_, found)| found != expected)?;
        let who = self.who_is(*rank)?;
        Some(Failure::Differs { who, step, field, expected: expected.to_owned(), found: found.clone(), than })
    }
}
