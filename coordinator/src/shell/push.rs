//! How far a run or job is, written where the cluster's own tools show it: as annotations of an object, for `kubectl get`, or as the status of
//! the TrainJob that this process belongs to (Kubeflow Trainer's TrainJobStatus, KEP-2779).
//!
//! It is told again when it has changed, and not often; and once more as it ends. Nothing depends on it: what fails is counted and told, and
//! holds nobody up.

use super::RunError;
use super::cluster::{Cluster, ClusterError};
use super::driver::Input;
use super::grpc::ask_status;
use super::start::unix_ms;
use crate::core::Outcome;
use crate::status::StatusReport;
use ella_proto::v1::RunStatus;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

/// How often it is looked whether there is something new to tell.
const EVERY: Duration = Duration::from_secs(10);
/// How long telling one of them how it ended may take: this process waits for it before it leaves.
const LAST: Duration = Duration::from_secs(5);
/// What Kubeflow's Trainer gives the pods of a TrainJob: where to report, its CA, and the token to show.
const TRAINER: [&str; 3] = ["KUBEFLOW_TRAINER_SERVER_URL", "KUBEFLOW_TRAINER_SERVER_CA_CERT", "KUBEFLOW_TRAINER_SERVER_TOKEN"];

/// Where it is written.
#[derive(Clone, Debug)]
pub struct ProgressTo {
    server: Arc<Cluster>,
    path: String,
    form: Form,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    Annotations,
    TrainJob,
}

impl ProgressTo {
    /// As annotations of what is at this path of the API, as in `/apis/batch/v1/namespaces/NS/jobs/NAME`.
    pub fn annotations(server: Cluster, path: impl Into<String>) -> Self {
        Self { server: Arc::new(server), path: path.into(), form: Form::Annotations }
    }

    /// The status of this process's TrainJob, if it belongs to one that takes it.
    pub fn trainer() -> Option<Self> {
        let [url, ca, token] = TRAINER.map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()));
        Self::trainer_at(&url?, &ca?, &token?)
    }

    /// The Trainer puts both files into one folder, under the names that every pod knows.
    fn trainer_at(url: &str, ca: &str, token: &str) -> Option<Self> {
        let folder = Path::new(token).parent().filter(|folder| *folder == Path::new(ca).parent().unwrap_or(Path::new("")));
        let at = url.find("://").and_then(|at| url[at + 3..].find('/').map(|slash| at + 3 + slash));
        let (Some(folder), Some(at), true) = (folder, at, token.ends_with("/token") && ca.ends_with("/ca.crt")) else {
            tracing::warn!("{}: the TrainJob's status cannot be reported: its files are not where they are expected", TRAINER[0]);
            return None;
        };
        let (server, path) = url.split_at(at);
        Some(Self { server: Arc::new(Cluster::at(server, folder)), path: path.to_owned(), form: Form::TrainJob })
    }

    async fn tell(&self, said: &Value) -> Result<(), ClusterError> {
        match self.form {
            Form::Annotations => self.server.patch(&self.path, said).await.map(drop),
            Form::TrainJob => {
                let mut said = said.clone();
                said["trainerStatus"]["lastUpdatedTime"] = rfc3339(unix_ms()).into();
                self.server.post(&self.path, &said).await.map(drop)
            }
        }
    }

    fn words(&self, report: &StatusReport) -> Value {
        match self.form {
            Form::Annotations => annotations(report),
            Form::TrainJob => trainer_status(report),
        }
    }
}

/// One of those who are told.
struct Target {
    to: ProgressTo,
    /// What it was told last.
    told: Value,
    /// What has kept it from being told since; empty if nothing has.
    error: String,
}

impl Target {
    fn new(to: ProgressTo) -> Self {
        Self { to, told: Value::Null, error: String::new() }
    }

    /// Tells it what is new. A failure is added to `failed`, and logged unless it is the one before again.
    async fn tell(&mut self, report: &StatusReport, failed: &AtomicU64) {
        let said = self.to.words(report);
        if said == self.told {
            return;
        }
        match self.to.tell(&said).await {
            Ok(()) => {
                self.told = said;
                self.error.clear();
            }
            Err(error) => {
                failed.fetch_add(1, Relaxed);
                let error = error.to_string();
                if error != self.error {
                    tracing::warn!("progress could not be told: {error}; nothing waits for it");
                    self.error = error;
                }
            }
        }
    }
}

/// Tells until `shutdown`, and then what the driver says as it ends, if it says something. Failures are added to `failed`.
pub(super) async fn push(
    targets: Vec<ProgressTo>,
    inputs: mpsc::Sender<Input>,
    failed: Arc<AtomicU64>,
    last_word: oneshot::Receiver<RunStatus>,
    shutdown: CancellationToken,
) -> Result<Option<Outcome>, RunError> {
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut targets: Vec<Target> = targets.into_iter().map(Target::new).collect();
    let telling = async {
        loop {
            ticks.tick().await;
            let Some(status) = ask_status(&inputs).await else { continue };
            let report = StatusReport::from(status);
            for target in &mut targets {
                target.tell(&report, &failed).await;
            }
        }
    };
    let _: Option<()> = shutdown.run_until_cancelled(telling).await;
    // The driver ends at the latest when it is cut off, as this task is.
    let Ok(status) = last_word.await else { return Ok(None) };
    let report = StatusReport::from(status);
    for target in &mut targets {
        if timeout(LAST, target.tell(&report, &failed)).await.is_err() {
            tracing::warn!("how it ended ({}) could not be told within {LAST:?}", report.phase);
        }
    }
    Ok(None)
}

/// How much is done, from 0 to 1.
fn share(report: &StatusReport) -> f64 {
    let (done, all) = match &report.job {
        Some(job) => (job.units_done, job.units),
        None => (report.step, report.steps),
    };
    if all == 0 { 0.0 } else { done as f64 / all as f64 }
}

fn annotations(report: &StatusReport) -> Value {
    let done = match &report.job {
        Some(job) => format!("{:.1} % (stage {}: {} of {} units)", 100.0 * share(report), job.stage, job.units_done, job.units),
        None => format!("{:.1} % (step {} of {})", 100.0 * share(report), report.step, report.steps),
    };
    let workers = report.job.as_ref().map_or(report.workers.iter().filter(|w| w.rank.is_some()).count(), |job| job.workers.len());
    let mut all = json!({
        "ella/phase": report.phase,
        "ella/progress": done,
        "ella/workers": workers.to_string(),
        "ella/reason": report.reason,
    });
    if report.job.is_none() {
        all["ella/last-commit-step"] = report.last_commit_step.to_string().into();
        all["ella/loss"] = report.loss.map(|loss| format!("{loss:.4}")).into();
    }
    json!({ "metadata": { "annotations": all } })
}

/// As KEP-2779 has it.
fn trainer_status(report: &StatusReport) -> Value {
    let mut metrics = vec![json!({ "name": "phase", "value": report.phase })];
    metrics.extend(report.loss.map(|loss| json!({ "name": "loss", "value": loss.to_string() })));
    let number = |name: &str, value: u64| json!({ "name": name, "value": value.to_string() });
    metrics.extend([number("step", report.step), number("epoch", report.epoch), number("last_commit_step", report.last_commit_step)]);
    let mut status = json!({ "progressPercentage": (100.0 * share(report)) as i32, "metrics": metrics });
    let left = report.samples_per_second.gt(&0.0).then(|| {
        let per_step = report.samples as f64 / report.step.max(1) as f64;
        (report.steps.saturating_sub(report.step) as f64 * per_step / report.samples_per_second) as i32
    });
    if let Some(left) = left.filter(|_| report.job.is_none()) {
        status["estimatedRemainingSeconds"] = left.into();
    }
    json!({ "trainerStatus": status })
}

/// Milliseconds since 1970 as RFC 3339 has it (the civil calendar; Hinnant's algorithm, "days to civil").
fn rfc3339(unix_ms: u64) -> String {
    let (days, second) = (unix_ms / 86_400_000, unix_ms / 1000 % 86_400);
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::status::JobReport;
    use axum::http::StatusCode;
    use axum::{Json, Router};

    fn run() -> StatusReport {
        StatusReport {
            phase: "training".into(),
            step: 840,
            steps: 2000,
            samples: 13_440,
            samples_per_second: 32.0,
            loss: Some(0.125),
            last_commit_step: 800,
            ..StatusReport::default()
        }
    }

    #[test]
    fn annotations_say_how_far_it_is() {
        let said = &annotations(&run())["metadata"]["annotations"];
        assert_eq!((&said["ella/phase"], &said["ella/progress"]), (&json!("training"), &json!("42.0 % (step 840 of 2000)")));
        assert_eq!((&said["ella/loss"], &said["ella/last-commit-step"]), (&json!("0.1250"), &json!("800")));
        let job = JobReport { stage: 2, units: 8, units_done: 2, ..JobReport::default() };
        let said = annotations(&StatusReport { phase: "working".into(), job: Some(job), ..StatusReport::default() });
        assert_eq!(said["metadata"]["annotations"]["ella/progress"], "25.0 % (stage 2: 2 of 8 units)");
        let none = annotations(&StatusReport { loss: None, ..run() });
        assert!(none["metadata"]["annotations"]["ella/loss"].is_null(), "a merge patch takes away what is not known any more");
    }

    #[test]
    fn a_trainjobs_status_is_as_its_api_has_it() {
        let said = &trainer_status(&run())["trainerStatus"];
        assert_eq!((&said["progressPercentage"], &said["estimatedRemainingSeconds"]), (&json!(42), &json!(580)));
        assert!(said["metrics"].as_array().unwrap().iter().all(|metric| metric["value"].is_string()), "{said}");
        assert!(trainer_status(&StatusReport::default())["trainerStatus"].get("estimatedRemainingSeconds").is_none());
    }

    #[test]
    fn a_trainjobs_server_is_told_by_the_files_beside_each_other() {
        let folder = "/var/run/secrets/kubeflow/trainer";
        let url = "https://manager.kubeflow:8082/apis/trainer.kubeflow.org/v1alpha1/namespaces/n/trainjobs/t/status";
        let made = ProgressTo::trainer_at(url, &format!("{folder}/ca.crt"), &format!("{folder}/token")).unwrap();
        assert_eq!(made.path, "/apis/trainer.kubeflow.org/v1alpha1/namespaces/n/trainjobs/t/status");
        for (url, ca) in
            [(url, "/elsewhere/ca.crt"), (url, "/var/run/secrets/kubeflow/trainer/other.crt"), ("nonsense", "/var/run/x/ca.crt")]
        {
            assert!(ProgressTo::trainer_at(url, ca, &format!("{folder}/token")).is_none(), "{url} {ca}");
        }
    }

    /// An API that answers with the status that `code` holds.
    async fn api(code: Arc<AtomicU64>) -> (ProgressTo, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("token"), "of this pod").unwrap();
        let answer = move || {
            let code = code.load(Relaxed);
            async move { (StatusCode::from_u16(u16::try_from(code).unwrap()).unwrap(), Json(json!({}))) }
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, Router::new().fallback(answer)).await });
        (ProgressTo::annotations(Cluster::at(url, folder.path()), "/jobs/a"), folder)
    }

    #[tokio::test]
    async fn what_kept_one_from_being_told_is_forgotten_once_it_is_told() {
        let (codes, failed) = ([403, 200].map(|code| Arc::new(AtomicU64::new(code))), AtomicU64::new(0));
        let [(refusing, _one), (willing, _two)] = [api(codes[0].clone()).await, api(codes[1].clone()).await];
        let (mut refusing, mut willing) = (Target::new(refusing), Target::new(willing));
        for target in [&mut refusing, &mut willing] {
            target.tell(&run(), &failed).await;
        }
        assert!(refusing.error.contains("403") && refusing.told.is_null() && willing.error.is_empty(), "{}", refusing.error);
        codes[0].store(200, Relaxed);
        refusing.tell(&run(), &failed).await;
        assert!(refusing.error.is_empty() && refusing.told == annotations(&run()), "{}", refusing.error);
        assert_eq!(failed.load(Relaxed), 1);
    }

    #[test]
    fn dates_are_civil() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_827_696_789), "2000-02-29T12:34:56Z");
        assert_eq!(rfc3339(1_764_201_600_000), "2025-11-27T00:00:00Z");
    }
}
