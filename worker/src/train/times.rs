//! Where the time of a step goes.

use super::TrainError;
use super::mark::Mark;
use ella_proto::v1::StepParts;
use std::time::Duration;

/// When a lane was computed.
pub(super) struct Passes {
    pub(super) begin: Mark,
    /// The forward pass is done, where that was told.
    pub(super) halfway: Option<Mark>,
    pub(super) end: Mark,
    /// How long sums over ranks held this thread up meanwhile.
    pub(super) held: Duration,
}

/// Where the time of a step went.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Times {
    pub(super) data: Duration,
    pub(super) encode: Duration,
    pub(super) forward: Duration,
    pub(super) backward: Duration,
    pub(super) reduce: Duration,
    /// Beside the backward pass.
    pub(super) reduce_hidden: Duration,
    pub(super) update: Duration,
    pub(super) commit: Duration,
    pub(super) draw: Duration,
}

impl Times {
    /// The passes of all lanes. On a processor, sums over ranks that began meanwhile have held them up, and count as their own.
    pub(super) fn passes(&mut self, lanes: &[Passes]) -> Result<(), TrainError> {
        for Passes { begin, halfway, end, held } in lanes {
            let on_processor = matches!(end, Mark::Host(_));
            let halfway = halfway.as_ref().unwrap_or(begin);
            self.forward += halfway.since(begin)?;
            self.backward += end.since(halfway)?.saturating_sub(if on_processor { *held } else { Duration::ZERO });
        }
        Ok(())
    }

    pub(super) fn parts(&self) -> StepParts {
        StepParts {
            data: self.data.as_secs_f64(),
            encode: self.encode.as_secs_f64(),
            forward: self.forward.as_secs_f64(),
            backward: self.backward.as_secs_f64(),
            reduce: self.reduce.as_secs_f64(),
            reduce_hidden: self.reduce_hidden.as_secs_f64(),
            update: self.update.as_secs_f64(),
            commit: self.commit.as_secs_f64(),
            draw: self.draw.as_secs_f64(),
        }
    }
}
