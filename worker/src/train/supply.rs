//! Waiting for samples together, where captions are encoded ahead of the steps (`text.features = "ahead"`).
//!
//! An encoder may take longer than ranks wait for each other in a step. So they ask each other, a little at a time, until nobody has to wait
//! any more: a rank is late only if its encoder stands still. Once encoders are ahead, each step tells so for the next, and nothing is asked.

use super::TrainError;
use super::stats::authority;
use crate::control::Flags;
use crate::feed::Feed;
use crate::reduce::Collective;
use std::time::Duration;

/// How long a rank waits for its own samples until it asks, and answers, the others again.
const ASK: Duration = Duration::from_secs(1);

/// What ranks found out together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Supply {
    /// All have the next step's samples.
    All,
    /// The run leaves before that step; all ranks have one coordinator, which can record a commit.
    Leave,
    /// The generation ends before that step.
    Boundary,
}

/// Returns once all ranks have the next step's samples, or none is to wait for them. In an exchange ranks wait for each other no
/// longer than `step_timeout`, which is what the collective waits for one that is late. `goes_on` is asked meanwhile whether there is reason to.
pub(super) fn all_are_supplied(
    feed: &mut Feed,
    collective: &mut dyn Collective,
    flags: &Flags,
    step_timeout: Duration,
    mut goes_on: impl FnMut() -> Result<(), TrainError>,
) -> Result<Supply, TrainError> {
    let (world, patience) = (i64::from(collective.world()), ASK.min(step_timeout / 4));
    loop {
        goes_on()?;
        let there = feed.await_next(patience)?;
        flags.encoding((!there).then(|| feed.encoded()));
        let mine = authority(flags.attended());
        let mut all = [i64::from(there), i64::from(flags.drain.is_cancelled()), i64::from(flags.at_boundary()), mine];
        collective.sum_i64(&mut all)?;
        let [supplied, leaving, boundary, authority] = all;
        let can_leave = leaving > 0 && mine != 0 && authority == mine.wrapping_mul(world);
        let found = match () {
            () if can_leave => Supply::Leave,
            () if boundary > 0 => Supply::Boundary,
            () if supplied == world => Supply::All,
            () => continue,
        };
        flags.encoding(None);
        return Ok(found);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commit::CommitError;
    use crate::control::Era;
    use crate::feed::Made;
    use crate::feed::tests::{fed_by_hand, made, nothing};
    use crate::reduce::InProcess;
    use std::sync::mpsc::SyncSender;

    const STEP_TIMEOUT: Duration = Duration::from_secs(1);
    type Sender = SyncSender<Made>;
    const LONG: Duration = Duration::from_secs(60);

    /// Two ranks that wait; what each is told after the others' samples have come, or it has been asked to leave, in this way.
    fn waiting(then: impl FnOnce(&[Sender; 2], &Flags) + Send) -> [Result<Supply, TrainError>; 2] {
        let (flags, (one, first), (two, second)) = (Flags::default(), fed_by_hand(LONG), fed_by_hand(LONG));
        std::thread::scope(|scope| {
            let ranks = InProcess::group(2).into_iter().zip([first, second]).map(|(mut ranks, mut feed)| {
                let flags = &flags;
                ranks.set_timeout(STEP_TIMEOUT);
                scope.spawn(move || {
                    let supplied = all_are_supplied(&mut feed, &mut ranks, flags, STEP_TIMEOUT, || Ok(()));
                    supplied.inspect(|supply| assert!(*supply != Supply::All || feed.has_next()))
                })
            });
            let ranks: Vec<_> = ranks.collect();
            let senders = [one, two];
            then(&senders, &flags);
            let ends: Vec<_> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
            ends.try_into().unwrap()
        })
    }

    /// A rank that waits longer for its encoder than ranks wait for each other in a step is no lost one.
    #[test]
    fn a_rank_whose_encoder_is_behind_is_not_late() {
        let ends = waiting(|[one, two], _| {
            one.send(made(Ok(nothing()))).unwrap();
            std::thread::sleep(STEP_TIMEOUT * 2);
            two.send(made(Ok(nothing()))).unwrap();
        });
        assert!(ends.iter().all(|end| matches!(end, Ok(Supply::All))), "{ends:?}");
    }

    #[test]
    fn who_is_to_leave_does_not_wait_for_samples_and_nobody_goes_on_without() {
        let era = Era { term: 3, generation: 2 };
        let ends = waiting(|[one, _], flags| {
            flags.enter(era);
            one.send(made(Ok(nothing()))).unwrap();
            flags.drain.cancel();
        });
        assert!(ends.iter().all(|end| matches!(end, Ok(Supply::Leave))), "{ends:?}");
        let ends = waiting(|_, flags| {
            flags.enter(era);
            flags.end(era, true);
        });
        assert!(ends.iter().all(|end| matches!(end, Ok(Supply::Boundary))), "{ends:?}");
    }

    #[test]
    fn an_encoder_that_stands_still_is_told_by_the_setting_to_raise() {
        let (_send, mut feed) = fed_by_hand(Duration::from_millis(20));
        let mut alone = InProcess::group(1).remove(0);
        let error = all_are_supplied(&mut feed, &mut alone, &Flags::default(), STEP_TIMEOUT, || Ok(())).unwrap_err().to_string();
        assert!(error.contains("workers.step_timeout") && error.contains("encoded"), "{error}");
    }

    #[test]
    fn a_commit_that_fails_meanwhile_ends_the_wait() {
        let (_send, mut feed) = fed_by_hand(LONG);
        let mut alone = InProcess::group(1).remove(0);
        let mut asked = 0;
        let failed = || {
            asked += 1;
            if asked < 3 { Ok(()) } else { Err(CommitError::Died.into()) }
        };
        let ended = all_are_supplied(&mut feed, &mut alone, &Flags::default(), STEP_TIMEOUT / 10, failed);
        assert!(matches!(ended, Err(TrainError::Commit(CommitError::Died))), "{ended:?}");
    }
}
