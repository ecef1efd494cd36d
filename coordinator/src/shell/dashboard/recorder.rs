//! Takes down what happens to this coordinator's run or job, restores what was before, and tells it on.

use super::super::driver::Input;
use super::super::grpc::ask_status;
use super::super::start::{session, unix_ms};
use super::feed::Feed;
use super::view::RunView;
use crate::core::{Note, RankTiming};
use crate::history::{Point, Reader, Timing};
use crate::status::StatusReport;
use ella_proto::v1;
use ella_store::Store;
use serde::Serialize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

/// How often steps are told on.
const TICK: Duration = Duration::from_millis(500);
/// Steps that are told on at once. If there are more, the page asks for its curves anew.
const MOST_STEPS: usize = 200;

/// Given to the driver; never blocks it for longer than a reader copies a curve.
#[derive(Debug)]
pub(in crate::shell) struct Recorder {
    term: u64,
    view: Arc<RunView>,
    feed: Arc<Feed>,
    /// Steps that were not told on yet.
    steps: Mutex<Vec<Point>>,
}

/// A step as it is told on.
#[derive(Serialize)]
struct Step {
    step: u64,
    at_unix_ms: u64,
    samples: u64,
    loss: Option<f32>,
    held_out: Option<f32>,
    grad_norm: Option<f32>,
    lr: Option<f32>,
    step_seconds: f32,
}

impl Recorder {
    /// Of a run of this term in `store`; of a job without one. Gives also what restores the run's past.
    pub(in crate::shell) fn new(store: Option<Store>, term: u64) -> (Arc<Self>, Option<Reader>) {
        let (view, reader) = RunView::new(store, Some(term));
        (Arc::new(Self { term, view, feed: Arc::new(Feed::new(session())), steps: Mutex::default() }), reader)
    }

    pub(super) fn view(&self) -> &Arc<RunView> {
        &self.view
    }

    pub(super) fn feed(&self) -> &Arc<Feed> {
        &self.feed
    }

    pub(in crate::shell) fn measured(&self, progress: &v1::Progress) {
        self.take(Point::of(self.term, progress));
    }

    fn take(&self, point: Point) {
        self.view.past().measured(&point);
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        // One too many says that there were more.
        if steps.len() <= MOST_STEPS {
            steps.push(point);
        }
    }

    pub(in crate::shell) fn timed(&self, timing: &RankTiming) {
        self.view.past().timings.add(Timing::of(self.term, timing));
    }

    pub(in crate::shell) fn noted(&self, note: &Note) {
        // What cannot be written as JSON the journal counts.
        let Ok(mut line) = serde_json::to_value(note) else { return };
        line["at_unix_ms"] = unix_ms().into();
        let mut past = self.view.past();
        let Some(mut happening) = past.happened(self.term, &line) else { return };
        happening.step = happening.step.or(past.curves.last().map(|last| last.step));
        drop(past);
        self.feed.tell("event", serde_json::to_string(&happening).unwrap_or_default());
    }

    /// Restores the past, then tells on what comes, until `shutdown`.
    pub(in crate::shell) async fn keep(&self, reader: Option<Reader>, inputs: mpsc::Sender<Input>, shutdown: CancellationToken) {
        let restore = async {
            if let Some(reader) = reader {
                self.view.restore(reader).await;
                self.feed.tell("reset", "{}".into());
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = restore => {}
            () = self.tell(&inputs) => {}
        }
        self.tell_steps();
    }

    async fn tell(&self, inputs: &mpsc::Sender<Input>) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (began, mut said, mut job) = (Instant::now(), String::new(), JobCurve::default());
        loop {
            ticks.tick().await;
            self.tell_steps();
            if !self.feed.is_read() && !job.is_due(began.elapsed()) {
                continue;
            }
            let Some(status) = ask_status(inputs).await.map(StatusReport::from) else { continue };
            job.measure(&status, began.elapsed()).into_iter().for_each(|point| self.take(point));
            let summary = serde_json::to_string(&super::api::Summary::of(&self.view, status)).unwrap_or_default();
            if summary != said && self.feed.is_read() {
                self.feed.tell("summary", summary.clone());
                said = summary;
            }
        }
    }

    fn tell_steps(&self) {
        let points = std::mem::take(&mut *self.steps.lock().unwrap_or_else(PoisonError::into_inner));
        if points.is_empty() {
            return;
        }
        if points.len() > MOST_STEPS {
            return self.feed.tell("curves", "{}".into());
        }
        let steps: Vec<Step> = points.iter().map(step).collect();
        self.feed.tell("steps", serde_json::to_string(&steps).unwrap_or_default());
    }
}

fn step(point: &Point) -> Step {
    let short = |value: Option<f64>| value.filter(|value| value.is_finite()).map(|value| value as f32);
    Step {
        step: point.step,
        at_unix_ms: point.at_unix_ms,
        samples: point.samples,
        loss: short(point.loss),
        held_out: short(point.held_out_loss),
        grad_norm: short(point.grad_norm),
        lr: short(point.lr),
        step_seconds: point.step_seconds as f32,
    }
}

/// A job has no steps: its curve has a point for each second.
#[derive(Debug, Default)]
struct JobCurve {
    /// The second and the samples of the last point. None for a run.
    last: Option<(u64, u64)>,
    is_run: bool,
}

impl JobCurve {
    fn is_due(&self, since: Duration) -> bool {
        !self.is_run && self.last.is_none_or(|(second, _)| second < since.as_secs())
    }

    fn measure(&mut self, status: &StatusReport, since: Duration) -> Option<Point> {
        let Some(job) = &status.job else {
            self.is_run = true;
            return None;
        };
        let (second, before) = (since.as_secs(), self.last);
        if before.is_some_and(|(last, _)| last >= second) {
            return None;
        }
        // What a lost worker had begun is counted anew.
        self.last = Some((second, job.samples.max(before.map_or(0, |(_, samples)| samples))));
        let (last, samples) = before?;
        let (samples, seconds) = (job.samples.saturating_sub(samples), second - last);
        Some(Point { step: second, at_unix_ms: unix_ms(), samples, step_seconds: seconds as f64, ..Point::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::JobReport;

    #[test]
    fn a_job_has_a_point_a_second_and_no_sample_counts_twice() {
        let mut curve = JobCurve::default();
        let mut at = |samples: u64, millis: u64| {
            let status = StatusReport { job: Some(JobReport { samples, ..JobReport::default() }), ..StatusReport::default() };
            curve.measure(&status, Duration::from_millis(millis)).map(|point| (point.step, point.samples))
        };
        let seen = [at(0, 0), at(10, 1_000), at(12, 1_500), at(4, 2_100), at(30, 4_000)];
        assert_eq!(seen, [None, Some((1, 10)), None, Some((2, 0)), Some((4, 20))]);
        let mut run = JobCurve::default();
        assert!(run.is_due(Duration::ZERO) && run.measure(&StatusReport::default(), Duration::ZERO).is_none());
        assert!(!run.is_due(Duration::from_secs(9)));
    }
}
