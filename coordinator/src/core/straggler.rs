//! Ranks for which the others wait far longer than for any step before: named, and let go if they are to be.

use super::members::Member;
use super::wait::activity_text;
use super::{ConnId, Core, Loss, Note, Phase, Time, Wait};
use ella_proto::v1::Activity;
use std::collections::{BTreeSet, VecDeque};

/// The longest of so many steps is what is usual.
const WINDOW: usize = 32;
/// Shorter waits are nobody's fault, in milliseconds.
const LEAST: u64 = 1_000;

/// How steps follow each other.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Between the last steps, in milliseconds. The first step of a generation is left out: it warms up.
    intervals: VecDeque<u64>,
    /// The newest step that a rank has applied, or the one that the generation began from.
    newest: u64,
    /// Since it was applied, or samples were drawn after it.
    since: Time,
    /// No step of this generation has been applied yet.
    first: bool,
    /// Ranks have drawn samples since the newest step: the time until the next one is no measure of steps.
    drew: bool,
    /// When to look again if nothing happens.
    pub(super) alarm: Option<Time>,
    /// Who was named since the newest step.
    named: BTreeSet<ConnId>,
}

impl Pace {
    /// How long a step takes at most, unless someone straggles.
    fn usual(&self, heartbeat: u64) -> Option<u64> {
        let longest = self.intervals.iter().max().filter(|_| !self.first)?;
        Some(longest.saturating_mul(3).max(2 * heartbeat).max(LEAST))
    }

    fn applied(&mut self, now: Time, step: u64) -> bool {
        if step <= self.newest {
            return false;
        }
        let drew = std::mem::take(&mut self.drew);
        if !std::mem::replace(&mut self.first, false) && !drew {
            self.intervals.push_back(now.since(self.since));
            if self.intervals.len() > WINDOW {
                self.intervals.pop_front();
            }
        }
        (self.newest, self.since) = (step, now);
        self.named.clear();
        true
    }
}

impl Core {
    pub(super) fn begin_pace(&mut self, now: Time) {
        let newest = self.lineup.as_ref().map_or(0, |lineup| lineup.from.0);
        let intervals = std::mem::take(&mut self.pace.intervals);
        let alarm = Some(now.after(self.config.welcome.step_timeout_ms));
        self.pace = Pace { intervals, newest, since: now, first: true, drew: false, alarm, named: BTreeSet::new() };
    }

    /// A rank draws samples: until it has done so nobody is late.
    pub(super) fn keep_pace_of_drawing(&mut self, now: Time) {
        (self.pace.since, self.pace.drew) = (now, true);
        self.set_pace_alarm(now);
    }

    fn set_pace_alarm(&mut self, now: Time) {
        let usual = self.pace.usual(self.config.welcome.heartbeat_ms).unwrap_or(u64::MAX);
        self.pace.alarm = Some(now.after(usual.min(self.config.welcome.step_timeout_ms)));
    }

    /// A rank has applied a step.
    pub(super) fn keep_pace(&mut self, now: Time, step: u64) {
        if self.pace.applied(now, step) {
            self.set_pace_alarm(now);
        }
    }

    /// Names the ranks that others wait for, and lets them go if they are to be, or if the others would not wait any longer anyway.
    pub(super) fn watch_pace(&mut self, now: Time) {
        if self.phase != Phase::Training {
            return;
        }
        let (waited_ms, patience) = (now.since(self.pace.since), self.config.welcome.step_timeout_ms);
        let overdue = waited_ms >= patience;
        let unusual = self.pace.usual(self.config.welcome.heartbeat_ms).is_some_and(|usual| waited_ms >= usual);
        if !overdue && !unusual {
            return;
        }
        self.pace.alarm = (!overdue).then(|| self.pace.since.after(patience));
        let stragglers = self.stragglers();
        for (conn, activity) in &stragglers {
            self.name_straggler(*conn, *activity, waited_ms);
        }
        let enough = self.attached().saturating_sub(stragglers.len()) >= self.least();
        if overdue || (self.config.straggler_evict && enough) {
            // The store is no rank's fault, and it does not wait for that for long.
            for (conn, activity) in stragglers.into_iter().filter(|(_, activity)| overdue || *activity != Activity::Commit) {
                self.let_go(now, conn, Loss::Straggler { activity, waited_ms });
            }
        }
    }

    fn name_straggler(&mut self, conn: ConnId, activity: Activity, waited_ms: u64) {
        if !self.pace.named.insert(conn) {
            return;
        }
        let Some(member) = self.members.get(conn) else { return };
        let (worker, rank) = (member.hello.worker_id.clone(), member.rank().unwrap_or_default().0);
        self.counts.add("stragglers", 1);
        self.note(Note::Straggler { worker, rank, activity: activity_text(activity), waited_ms });
    }

    /// What a rank is at, if it has said so since the newest step.
    fn activity(&self, member: &Member) -> Activity {
        member.activity.filter(|(at, _)| *at > self.pace.since).map_or(Activity::Unspecified, |(_, activity)| activity)
    }

    /// Ranks that do not wait, while others wait to sum with them. One that waits for captions to be encoded says how that goes on; of those that draw
    /// samples some have more of them to draw than others.
    fn stragglers(&self) -> Vec<(ConnId, Activity)> {
        let ranks: Vec<(ConnId, &Member, Activity)> =
            self.members.placed().into_iter().map(|(_, conn, member)| (conn, member, self.activity(member))).collect();
        if !ranks.iter().any(|(_, _, activity)| *activity == Activity::Reduce) {
            return Vec::new();
        }
        let encodes = |member: &Member, activity: Activity| activity == Activity::Data && member.encoding.is_some();
        let straggles = |member: &Member, activity: Activity| {
            member.open && member.finished.is_none() && !matches!(activity, Activity::Reduce | Activity::Draw) && !encodes(member, activity)
        };
        ranks.into_iter().filter(|(_, member, activity)| straggles(member, *activity)).map(|(conn, _, activity)| (conn, activity)).collect()
    }

    /// The ranks that were named since the newest step, if any were.
    pub(super) fn stragglers_named(&self) -> Option<Wait> {
        let named = self.pace.named.iter().filter_map(|conn| self.members.get(*conn));
        let ranks: Vec<_> = named.map(|member| (member.who(), self.activity(member))).collect();
        (!ranks.is_empty()).then_some(Wait::Straggler { ranks })
    }
}
