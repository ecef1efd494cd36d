//! All units in this process.

use super::hand::Hand;
use super::leased::{Served, ending, identity, serve};
use super::{Job, JobEnd};
use crate::control::{ControlError, Link};
use crate::train::Ending;
use ella_coordinator::shell::LocalJob;
use ella_coordinator::status::StatusReport;
use ella_proto::config::JobConfig;
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

/// How often a watcher is shown how far the job is.
const WATCH: Duration = Duration::from_millis(250);

/// Does all units of a job in this process, `slots` at once, until it is done or `stop` says to leave ([`Ending::Preempted`]): then the
/// units in hand are dropped, and the same job started again goes on. `watch` is shown now and then, and once at the end, what `ella
/// status` would show. Of `config` only that is used.
///
/// # Errors
/// If the job failed: the error names what could not be done.
pub async fn run_local(
    config: &JobConfig,
    job: Box<dyn Job>,
    slots: u32,
    stop: CancellationToken,
    watch: &mut (dyn FnMut(&StatusReport) + Send),
) -> Result<Ending, JobEnd> {
    let (local, out, incoming) = LocalJob::start(config);
    let mut link = Link::within(out, incoming, identity()?).await?;
    let mut hand = Hand::new(job, slots);
    let served = {
        let serving = serve(&mut link, &mut hand, &stop);
        tokio::pin!(serving);
        let mut ticks = interval(WATCH);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                served = &mut serving => break served,
                _ = ticks.tick() => show(&local, watch).await,
            }
        }
    };
    hand.let_go().await;
    show(&local, watch).await;
    match served {
        Served::Over(over) => ending(over),
        Served::Stopped => Ok(Ending::Preempted),
        Served::Broken(error) => Err(JobEnd::Broken(error)),
        Served::Lost(why) => Err(ControlError::Orphaned { seconds: 0, why }.into()),
        Served::Silent(orphan) => Err(ControlError::Orphaned { seconds: orphan.as_secs(), why: "it answers nothing".to_owned() }.into()),
    }
}

async fn show(local: &LocalJob, watch: &mut (dyn FnMut(&StatusReport) + Send)) {
    if let Some(status) = local.status().await {
        watch(&status.into());
    }
}
