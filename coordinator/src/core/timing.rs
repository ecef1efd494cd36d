//! Where the time of each rank's steps goes, summed over some steps at a time.

use super::members::Member;
use super::{Core, Effect};
use ella_proto::v1;

/// Steps that are summed before they are kept: what thousands of ranks say of every step would be more than what is trained.
const WINDOW: u64 = 64;

/// Sums over some steps of one rank.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RankTiming {
    /// The rank, in its generation.
    pub rank: u32,
    /// Its generation.
    pub generation: u64,
    /// Who it is.
    pub worker_id: String,
    /// The machine that it runs on.
    pub host: String,
    /// The last of the steps.
    pub step: u64,
    /// How many steps.
    pub steps: u64,
    /// Seconds in all.
    pub seconds: f64,
    /// Seconds by what they were spent on.
    pub parts: v1::StepParts,
}

impl RankTiming {
    pub(super) fn add(&mut self, progress: &v1::Progress) {
        let Some(parts) = progress.parts.filter(|_| progress.step > self.step && progress.step_seconds > 0.0) else { return };
        self.step = progress.step;
        self.steps += 1;
        self.seconds += progress.step_seconds;
        let sum = &mut self.parts;
        for (sum, part) in [
            (&mut sum.data, parts.data),
            (&mut sum.encode, parts.encode),
            (&mut sum.forward, parts.forward),
            (&mut sum.backward, parts.backward),
            (&mut sum.reduce, parts.reduce),
            (&mut sum.update, parts.update),
            (&mut sum.commit, parts.commit),
            (&mut sum.reduce_hidden, parts.reduce_hidden),
            (&mut sum.draw, parts.draw),
        ] {
            *sum += part;
        }
    }

    /// What is summed of a member, if there are so many steps or `all` is wanted; it begins anew.
    fn taken(member: &mut Member, generation: u64, all: bool) -> Option<Self> {
        let Self { step, steps, .. } = member.timing;
        if steps == 0 || (steps < WINDOW && !all) {
            return None;
        }
        let taken = std::mem::replace(&mut member.timing, Self { step, ..Self::default() });
        let (worker_id, host) = (member.hello.worker_id.clone(), member.hello.host.clone());
        Some(Self { rank: member.rank()?.0, generation, worker_id, host, ..taken })
    }
}

impl Core {
    /// Keeps what has been summed of a member that has told of enough steps, or `all` of it.
    pub(super) fn keep_timing(&mut self, conn: super::ConnId, all: bool) {
        let generation = self.generation.0;
        let taken = self.members.get_mut(conn).and_then(|member| RankTiming::taken(member, generation, all));
        self.effects.extend(taken.map(Effect::Timing));
    }

    /// Keeps what is left of all members.
    pub(super) fn keep_all_timing(&mut self) {
        let generation = self.generation.0;
        let taken = self.members.iter_mut().filter_map(|member| RankTiming::taken(member, generation, true));
        self.effects.extend(taken.map(Effect::Timing));
    }
}
