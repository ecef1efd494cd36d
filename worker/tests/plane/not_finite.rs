//! Steps with a number that is not finite: nothing is updated from them, their samples are listed, and all ranks say and do the same.

use crate::coordinator::{Scripted, TERM, Worker};
use crate::generations::{begin, idle};
use crate::session::run_folder;
use crate::world::{LANES, RUNTIME, config, embedded, order};
use ella_proto::config::RunConfig;
use ella_proto::v1::from_worker::Body as Said;
use ella_proto::v1::{self, FailureKind};
use ella_store::commit_folder;
use std::collections::BTreeMap;
use std::path::Path;

/// Its first update makes every later loss infinite, or no number at all.
const RUINOUS: &str = "train.optimizer.lr=1e30";

/// What a worker says until it gives up, or has finished.
#[derive(Default)]
struct Heard {
    progress: Vec<v1::Progress>,
    states: Vec<v1::StateDigest>,
    failed: Option<v1::Failed>,
}

async fn heard(worker: &mut Worker) -> Heard {
    let mut heard = Heard::default();
    loop {
        match worker.next().await {
            Said::Progress(step) => heard.progress.push(step),
            Said::State(state) => heard.states.push(state),
            Said::Part(_) => {}
            Said::Failed(failed) => return Heard { failed: Some(failed), ..heard },
            Said::Finished(_) => return heard,
            other => panic!("{other:?}"),
        }
    }
}

/// The listed samples of a step: its lanes', by all ranks.
fn listed(folder: &Path, step: u64) -> BTreeMap<u64, Vec<String>> {
    let mut lanes = BTreeMap::new();
    for file in std::fs::read_dir(folder.join(format!("failed/step-{step:012}"))).unwrap() {
        let list: serde_json::Value = serde_json::from_slice(&std::fs::read(file.unwrap().path()).unwrap()).unwrap();
        assert_eq!(list["step"], step);
        for lane in list["lanes"].as_array().unwrap() {
            let finite = lane["loss"].as_str().unwrap().parse::<f64>().unwrap().is_finite();
            assert!(!finite, "{lane}");
            let keys = lane["samples"].as_array().unwrap().iter().map(|key| key.as_str().unwrap().to_owned());
            assert!(lanes.insert(lane["lane"].as_u64().unwrap(), keys.collect()).is_none());
        }
    }
    lanes
}

/// What the step's lanes consist of, by the run's order.
fn expected(config: &RunConfig, step: u64) -> BTreeMap<u64, Vec<String>> {
    let (order, keys) = order(config);
    (0..LANES)
        .map(|lane| (u64::from(lane), order.lane(step - 1, lane).iter().map(|at| keys[at.index as usize].clone()).collect()))
        .collect()
}

/// By one rank and by two, in both reductions.
#[test]
fn the_run_stops_before_it_updates_anything_and_lists_the_step_s_samples() {
    RUNTIME.block_on(async {
        for (reduction, ranks) in [("exact", 1), ("exact", 2), ("fast", 2)] {
            let config = config(&[RUINOUS, "checkpoint.every=1", "workers.count=2", &format!("train.reduction={reduction}")]);
            embedded(&config);
            let (folder, url) = run_folder();
            let mut coordinator = Scripted::start().await;
            let mut workers = idle(&mut coordinator, &config, &url, ranks).await;
            begin(&mut workers).await;
            let mut said = Vec::new();
            for worker in &mut workers {
                let Heard { progress, states, failed } = heard(worker).await;
                let failed = failed.unwrap();
                assert_eq!((failed.kind(), failed.permanent), (FailureKind::Numeric, true), "{failed:?}");
                assert_eq!(progress.iter().map(|step| step.step).collect::<Vec<_>>(), [1]);
                assert_eq!(states.iter().map(|state| state.step).collect::<Vec<_>>(), [1], "the last commit is kept");
                said.push(failed.message);
            }
            assert!(said.iter().all(|message| *message == said[0]), "{said:?}");
            for words in ["step 2, lane 0", "the loss is", "train.optimizer.lr", "failed/step-000000000002/"] {
                assert!(said[0].contains(words), "{}", said[0]);
            }
            assert_eq!(listed(folder.path(), 2), expected(&config, 2), "{reduction}, {ranks} ranks");
        }
    });
}

/// They count as used (ONCE), and as left out (KNOWN); the moments are those of the step before.
#[test]
fn so_many_such_steps_in_a_row_may_be_left_out() {
    RUNTIME.block_on(async {
        for (ranks, steps) in [(1, 20), (2, 20), (2, 3)] {
            let steps_key = format!("train.steps={steps}");
            let config = config(&[RUINOUS, "checkpoint.every=1", "workers.count=2", "train.skip_nonfinite=2", &steps_key]);
            embedded(&config);
            let (folder, url) = run_folder();
            let mut coordinator = Scripted::start().await;
            let mut workers = idle(&mut coordinator, &config, &url, ranks).await;
            begin(&mut workers).await;
            let mut all_states = Vec::new();
            for (rank, worker) in workers.iter_mut().enumerate() {
                let Heard { progress, states, failed } = heard(worker).await;
                let message = failed.map(|failed| failed.message);
                assert!(message.as_ref().map_or(steps == 3, |message| message.contains("step 4, lane 0")), "{steps}: {message:?}");
                assert_eq!(progress.iter().map(|step| step.step).collect::<Vec<_>>(), [1, 2, 3]);
                let left_out: Vec<_> = progress.iter().map(|step| step.skipped.get("steps_not_finite").copied()).collect();
                assert_eq!(left_out, if rank == 0 { [None, Some(1), Some(1)] } else { [None; 3] }, "rank 0 speaks for all");
                let has_norm: Vec<_> = progress.iter().map(|step| step.grad_norm.is_finite()).collect();
                assert_eq!(has_norm, if rank == 0 { [true, false, false] } else { [true; 3] }, "of a step that was left out there is none");
                assert_eq!(states.iter().map(|state| state.ledger[0].samples).collect::<Vec<_>>(), [8, 16, 24]);
                all_states.push(states);
            }
            assert!(all_states.iter().all(|states| *states == all_states[0]), "SAME");
            for step in 2..steps.min(4) + 1 {
                assert_eq!(listed(folder.path(), step), expected(&config, step));
            }
            if steps == 3 {
                let optimizer = |step: u64| {
                    let file = folder.path().join(commit_folder(step, TERM, 1)).join("optimizer.safetensors");
                    let mut header = std::fs::read(file).unwrap();
                    let moments = header.split_off(8 + u64::from_le_bytes(header[..8].try_into().unwrap()) as usize);
                    (String::from_utf8(header.split_off(8)).unwrap(), moments)
                };
                let [(before, moments), (after, same)] = [1, 3].map(optimizer);
                assert!(moments == same);
                // What the next update's bias correction goes by.
                assert!(before.contains(r#""updates":"1""#) && after.contains(r#""step":"3","updates":"1""#), "{after}");
            }
        }
    });
}
