//! Weights that learn, and what lets their training go on where it stopped.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ella_model::params::{Compute, Params};
use ella_proto::config::{Optimizer, Schedule, ScheduleKind, Train};
use ella_worker::train::optimizer::{clipping, square_norm, update};
use ella_worker::train::state::{Layout, TrainState, part_names};
use serde_json::{Value, json};
use tch::{Device, Tensor};

/// How often a state is written.
const SAVE_EVERY: Duration = Duration::from_secs(120);

/// How long and how fast something is trained.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Course {
    /// Updates.
    pub(crate) steps: u64,
    /// Samples in each.
    pub(crate) batch: i64,
    /// The highest rate; it falls along a cosine.
    pub(crate) lr: f64,
}

/// What is trained in one stage.
pub(crate) struct Learner {
    folder: PathBuf,
    course: Course,
    train: Train,
    state: TrainState,
    weights: Vec<(String, Tensor)>,
    log: File,
    began: Instant,
    /// Seconds of earlier processes.
    before: f64,
    saved: Instant,
    losses: (f64, u64),
}

/// First values of everything that `build` asks for, below `name`.
pub(crate) fn fresh<T>(
    name: &str,
    seed: u64,
    device: Device,
    build: impl FnOnce(&Params) -> ella_model::Result<T>,
) -> Result<Vec<(String, Tensor)>> {
    let p = Params::random(seed, tch::Kind::Float, device);
    build(&p)?;
    Ok(p.taken().into_iter().map(|(key, tensor)| (format!("{name}.{key}"), tensor)).collect())
}

impl Learner {
    /// Takes up the training in `folder`, or begins it with `first` values.
    pub(crate) fn open(folder: &Path, course: Course, first: Vec<(String, Tensor)>, device: Device) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let train = Train {
            steps: course.steps,
            grad_clip: 1.0,
            ema_decay: 0.999,
            optimizer: Optimizer { lr: course.lr, betas: [0.9, 0.99], ..Optimizer::default() },
            schedule: Schedule { kind: ScheduleKind::Cosine, warmup: 200.min(course.steps / 10) },
            ..Train::default()
        };
        let (names, values): (Vec<String>, Vec<Tensor>) = first.into_iter().unzip();
        let layout = Arc::new(Layout::new(names.into_iter().zip(values.iter().map(Tensor::size)).collect()));
        let mut state = TrainState::fresh(layout.clone(), layout.gather(&values, device)?)?;
        let mut before = 0.0;
        if let Some((step, at)) = latest(folder)? {
            let files = part_names().map(|name| fs::read(at.join(name)));
            let [a, b, c] = files;
            state.restore(&[a?.into(), b?.into(), c?.into()])?;
            state.step = step;
            let told: Value = serde_json::from_slice(&fs::read(at.join(DONE))?)?;
            before = told["seconds"].as_f64().unwrap_or_default();
            println!("{}: goes on after step {step}", folder.display());
        }
        let weights = layout.views(&state.buffers.params)?;
        let log = File::options().create(true).append(true).open(folder.join("log.jsonl"))?;
        let now = Instant::now();
        Ok(Self { folder: folder.into(), course, train, state, weights, log, began: now, before, saved: now, losses: (0.0, 0) })
    }

    /// What learns, of what is below `name`.
    pub(crate) fn params(&self, name: &str) -> Params {
        given(self.weights.iter().map(|(key, tensor)| (key.as_str(), tensor.shallow_clone())), name)
    }

    /// The same by name.
    pub(crate) fn named(&self, name: &str) -> Vec<(String, Tensor)> {
        let strip =
            |(key, tensor): &(String, Tensor)| Some((key.strip_prefix(name)?.strip_prefix('.')?.to_owned(), tensor.shallow_clone()));
        self.weights.iter().filter_map(strip).collect()
    }

    /// Its moving average, which does not.
    pub(crate) fn average(&self, name: &str) -> Result<Params> {
        Ok(given(self.averages()?.iter().map(|(key, tensor)| (key.as_str(), tensor.shallow_clone())), name))
    }

    /// The averages below `name`, by the names that they have there.
    pub(crate) fn averaged(&self, name: &str) -> Result<Vec<(String, Tensor)>> {
        let strip = |(key, tensor): (String, Tensor)| Some((key.strip_prefix(name)?.strip_prefix('.')?.to_owned(), tensor));
        Ok(self.averages()?.into_iter().filter_map(strip).collect())
    }

    fn averages(&self) -> Result<Vec<(String, Tensor)>> {
        let views = self.state.layout.views(&self.state.buffers.ema)?;
        Ok(views.into_iter().map(|(key, tensor)| (key, tensor.set_requires_grad(false))).collect())
    }

    /// Samples in a step.
    pub(crate) fn batch(&self) -> i64 {
        self.course.batch
    }

    /// The next step's number, from 0; nothing if all is done. libtorch's noise is keyed by it, so that a training that goes on draws what one that was
    /// not stopped would have drawn.
    pub(crate) fn next(&self) -> Option<u64> {
        let step = self.state.step;
        tch::manual_seed(step as i64);
        (step < self.train.steps).then_some(step)
    }

    /// One update along the gradient of `loss`.
    pub(crate) fn learn(&mut self, loss: &Tensor) -> Result<()> {
        let leaves: Vec<&Tensor> = self.weights.iter().map(|(_, tensor)| tensor).collect();
        let gradients = Tensor::f_run_backward(&[loss], &leaves, false, false)?;
        let mut gradient = self.state.layout.gather(&gradients, loss.device())?;
        let (value, square) = (loss.double_value(&[]), square_norm(&gradient)?.double_value(&[]));
        let step = self.state.step + 1;
        if !(value.is_finite() && square.is_finite()) {
            bail!("step {step}: the loss is {value}, its gradient's norm {}", square.sqrt());
        }
        let scale = clipping(square.sqrt(), self.train.grad_clip);
        update(&mut self.state.buffers, (&mut gradient, scale), &self.train, step)?;
        self.state.step = step;
        self.losses = (self.losses.0 + value, self.losses.1 + 1);
        if step.is_multiple_of(100) || step == self.train.steps {
            let (sum, count) = std::mem::take(&mut self.losses);
            self.tell(&json!({ "loss": sum / count as f64 }))?;
        }
        if self.saved.elapsed() > SAVE_EVERY || step == self.train.steps {
            self.save()?;
        }
        Ok(())
    }

    /// Notes a finding.
    pub(crate) fn tell(&mut self, what: &Value) -> Result<()> {
        let mut line =
            json!({ "step": self.state.step, "samples": self.state.step * self.course.batch as u64, "seconds": self.seconds().round() });
        if let (Value::Object(line), Value::Object(what)) = (&mut line, what) {
            line.extend(what.clone());
        }
        println!("{line}");
        Ok(writeln!(self.log, "{line}")?)
    }

    /// Spent so far, by all processes.
    pub(crate) fn seconds(&self) -> f64 {
        self.before + self.began.elapsed().as_secs_f64()
    }

    fn save(&mut self) -> Result<()> {
        let snapshot = self.state.snapshot(None)?;
        let at = self.folder.join(format!("step-{}", snapshot.step));
        fs::create_dir_all(&at)?;
        for (part, name) in part_names().into_iter().enumerate() {
            fs::write(at.join(name), snapshot.file(part).concat())?;
        }
        // Last: a folder without it is not read.
        fs::write(at.join(DONE), json!({ "seconds": self.seconds() }).to_string())?;
        for (step, old) in states(&self.folder)? {
            if step < snapshot.step {
                fs::remove_dir_all(old)?;
            }
        }
        self.saved = Instant::now();
        Ok(())
    }
}

/// Says that a state is whole.
const DONE: &str = "done.json";

fn given<'a>(all: impl Iterator<Item = (&'a str, Tensor)>, name: &str) -> Params {
    let strip = |(key, tensor): (&str, Tensor)| Some((key.strip_prefix(name)?.strip_prefix('.')?.to_owned(), tensor));
    let p = Params::given(all.filter_map(strip));
    p.compute_by(Compute::PLAIN);
    p
}

/// The states in a folder, by their steps.
fn states(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let step = path.file_name().and_then(|name| name.to_str()?.strip_prefix("step-")?.parse().ok());
        found.extend(step.map(|step| (step, path)));
    }
    Ok(found)
}

fn latest(folder: &Path) -> Result<Option<(u64, PathBuf)>> {
    Ok(states(folder)?.into_iter().filter(|(_, at)| at.join(DONE).is_file()).max())
}
