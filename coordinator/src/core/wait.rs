//! Why the run waits, put into words at the edge only.

use super::{Core, Phase, Who};
use ella_proto::ids::{Rank, Step};
use ella_proto::v1;
use std::fmt;

/// Why the run waits.
#[derive(Clone, Debug, PartialEq)]
pub enum Wait {
    /// For workers to come.
    Workers {
        /// That are here.
        have: usize,
        /// That are needed.
        need: usize,
    },
    /// For workers to load their models: enough are here.
    Models {
        /// That have not.
        workers: Vec<Who>,
    },
    /// For the ranks of a generation that outlived its coordinator to come back.
    Return {
        /// That are back.
        have: usize,
        /// That it has.
        world: usize,
    },
    /// For ranks to restore or copy the state, and to close their ring.
    Loading {
        /// Not ready yet.
        ranks: Vec<Rank>,
        /// Why the ring of the generation before did not close, if it did not.
        reason: String,
    },
    /// For ranks to leave a generation that is over.
    Regroup {
        /// How many have not.
        busy: usize,
        /// Why it is over.
        reason: String,
    },
    /// For a moment, before ranks that did not reach each other try again.
    Pause {
        /// In a rank's words.
        reason: String,
    },
    /// For captions to be encoded, before the next step.
    Encoding {
        /// Whose.
        ranks: Vec<Rank>,
        /// That they have encoded.
        captions: u64,
    },
    /// For ranks that take far longer than any step before.
    Straggler {
        /// Which, and what each is at.
        ranks: Vec<(Who, v1::Activity)>,
    },
    /// For the next step, after which other members go on.
    NextStep {
        /// Why.
        reason: String,
    },
    /// For workers to reach a step boundary and commit.
    Boundary {
        /// Why they were asked to.
        reason: String,
    },
    /// For the last commit.
    LastCommit {
        /// Its step.
        step: Step,
    },
    /// For the end to be recorded.
    Record,
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workers { have, need } => write!(f, "waiting for workers: {have} of {need} are here"),
            Self::Models { workers } => write!(f, "waiting for workers to load their models: {}", listed(workers)),
            Self::Return { have, world } => {
                write!(f, "waiting for the ranks of the last coordinator to come back: {have} of {world} are here")
            }
            Self::Loading { ranks, reason } => {
                write!(f, "waiting for ranks to restore and to reach each other: {}", listed(ranks))?;
                if reason.is_empty() { Ok(()) } else { write!(f, " (they did not before: {reason})") }
            }
            Self::Regroup { busy, reason } => write!(f, "waiting for workers to stop, so that others can go on: {busy} ({reason})"),
            Self::Pause { reason } => write!(f, "workers that do not reach each other try again shortly ({reason})"),
            Self::Encoding { ranks, captions } => {
                write!(f, "the next step waits for captions to be encoded: {captions} are, by ranks {}", listed(ranks))
            }
            Self::Straggler { ranks } => {
                let ranks: Vec<String> = ranks.iter().map(|(who, activity)| format!("{who}, which {}", activity_text(*activity))).collect();
                write!(f, "the other ranks wait for {}", ranks.join(", and for "))
            }
            Self::NextStep { reason } => write!(f, "after the next step another generation begins ({reason})"),
            Self::Boundary { reason } => write!(f, "waiting for the workers to commit and leave ({reason})"),
            Self::LastCommit { step } => write!(f, "waiting for the commit of step {step}"),
            Self::Record => f.write_str("waiting for the log to take the end's record"),
        }
    }
}

fn listed<T: ToString>(all: &[T]) -> String {
    all.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

/// What a rank is at, after "which".
pub(super) fn activity_text(activity: v1::Activity) -> &'static str {
    match activity {
        v1::Activity::Unspecified => "does not say what it is at",
        v1::Activity::Data => "waits for samples",
        v1::Activity::Compute => "computes",
        v1::Activity::Reduce => "waits for the others",
        v1::Activity::Commit => "waits for a commit to be saved",
        v1::Activity::Draw => "draws samples",
    }
}

impl Core {
    /// Where the run is.
    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    /// Why the run waits, if it does.
    pub fn wait(&self) -> Option<Wait> {
        match &self.phase {
            Phase::Waiting { .. } => Some(self.wait_for_whom()),
            Phase::Starting { .. } => {
                let ranks = self.members.not_ready().into_iter().map(|(rank, _)| rank).collect();
                Some(Wait::Loading { ranks, reason: self.why() })
            }
            Phase::Regrouping { .. } => {
                let busy = self.members.which(super::members::Member::is_busy).len();
                Some(Wait::Regroup { busy, reason: self.why() })
            }
            Phase::Draining { reason, .. } => Some(Wait::Boundary { reason: reason.clone() }),
            Phase::Closing { step, .. } => Some(Wait::LastCommit { step: *step }),
            Phase::Ending { .. } => Some(Wait::Record),
            Phase::Training => self.stragglers_named().or_else(|| self.next_step()).or_else(|| self.members.encoding()),
            Phase::Over(_) => None,
        }
    }

    fn why(&self) -> String {
        self.lineup.as_ref().map_or_else(String::new, |lineup| lineup.why.clone())
    }

    fn next_step(&self) -> Option<Wait> {
        let asked = self.lineup.as_ref().filter(|lineup| lineup.boundary);
        asked.map(|lineup| Wait::NextStep { reason: lineup.why.clone() })
    }

    fn wait_for_whom(&self) -> Wait {
        if let Some((have, world)) = self.awaited() {
            return Wait::Return { have, world };
        }
        let (have, need) = (self.attached(), self.need());
        let workers = self.loading();
        if let (Some(_), Some(lineup)) = (self.paused_until, &self.lineup) {
            return Wait::Pause { reason: lineup.why.clone() };
        }
        if have >= need && !workers.is_empty() { Wait::Models { workers } } else { Wait::Workers { have, need } }
    }

    /// Those that load their models.
    pub(super) fn loading(&self) -> Vec<Who> {
        let loads = |member: &super::members::Member| member.open && member.held == super::members::Held::Loading;
        self.members.iter().filter(|(_, member)| loads(member)).map(|(_, member)| member.who()).collect()
    }
}
