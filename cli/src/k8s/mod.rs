//! `ella k8s`: a run's or job's manifests for a Kubernetes cluster, and what people do with them there.

#[cfg(feature = "k8s-client")]
mod cluster;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use ella_k8s::{Options, RenderError, Rendered, Volume, render};
use ella_proto::config::MOST_SECONDS;
use serde_json::json;

use crate::run::{Metric, RunFolder};
use crate::ui::{DONE, Fail, Out, note};

/// How ella is built with a client of the cluster's API.
#[cfg(not(feature = "k8s-client"))]
const BUILD: &str = "this build has no client of the cluster's API, which takes minutes to compile: cargo build --release --features k8s-client \
                     -p ella; or use kubectl, see docs/kubernetes.md";

#[derive(Debug, Args)]
pub(crate) struct K8s {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Write the manifests of a run, or of a job that --write-job wrote: pipe them into kubectl apply -f -
    Render(Box<Render>),
    /// Make a run or job in the cluster, or change it to what its config says now
    Submit(Box<Submit>),
    /// Show the logs of a run's pods
    Logs(Logs),
    /// Have a run trained by another number of workers
    Scale(Scale),
    /// Have a run's workers commit and leave, and take it out of the cluster; its folder stays
    Cancel(Cancel),
}

#[derive(Debug, Args)]
struct Render {
    #[command(flatten)]
    what: What,
    /// Write them to this file; left out: to stdout
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// What is rendered, and how it is to stand in the cluster.
#[derive(Debug, Args)]
struct What {
    /// The run's config, or a job's
    config: PathBuf,
    /// Override a key of it, as in --set workers.count=4
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// What its objects are called after; left out: the last part of run.output, or the job's kind
    #[arg(long)]
    name: Option<String>,
    /// Where they are
    #[arg(long, default_value = "ella")]
    namespace: String,
    /// Change the base in one more way: azure, gcs, ipv6, jobset, kueue, local, mtls, prometheus, s3, s3-secret, spot-gpu
    #[arg(long = "overlay", value_name = "NAME")]
    overlays: Vec<String>,
    /// Another image, with its version: coordinator=HOST/ella-coordinator:0.1.0 or worker=...
    #[arg(long = "image", value_name = "WHO=IMAGE", value_parser = pair)]
    images: Vec<(String, String)>,
    /// A folder that all nodes share: nfs:SERVER:/FOLDER, claim:NAME, or host:/FOLDER
    #[arg(long, value_name = "VOLUME", value_parser = volume)]
    volume: Option<Volume>,
    /// Where the pods see it; left out: at its own path, or /srv/ella
    #[arg(long, value_name = "PATH")]
    mount: Option<String>,
    /// Processors of each worker, as in 4 or 500m
    #[arg(long, value_name = "N")]
    cpu: Option<String>,
    /// Memory of each worker, as in 16Gi
    #[arg(long, value_name = "BYTES")]
    memory: Option<String>,
    /// GPUs of each worker, 0 or 1; left out: 1 if workers.device is "cuda" or an overlay says so
    #[arg(long, value_name = "N")]
    gpus: Option<u32>,
    /// Workers of a job; a run has workers.count
    #[arg(long, value_name = "N")]
    workers: Option<u32>,
    /// How long a save takes: workers that are told to leave have 30 s and thrice that
    #[arg(long, value_name = "SECONDS", conflicts_with = "save_of")]
    save_seconds: Option<f64>,
    /// As long as the longest save of this run's folder (path or URL)
    #[arg(long, value_name = "RUN")]
    save_of: Option<String>,
    /// An environment variable of all pods; no secrets
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = pair)]
    env: Vec<(String, String)>,
    /// A TCP port of a store, source or endpoint that the pods may reach, besides 443
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    egress: Vec<u16>,
    /// The cloud's identity for the pods, with --overlay s3 (a role's ARN), gcs (a service account) or azure (a client id)
    #[arg(long, value_name = "ID")]
    identity: Option<String>,
    /// Kueue's queue, with --overlay kueue
    #[arg(long, value_name = "NAME")]
    queue: Option<String>,
    /// Leave out what only an administrator may make: namespace, priorities, the right to review tokens, volumes
    #[arg(long)]
    namespaced_only: bool,
}

#[derive(Debug, Args)]
#[cfg_attr(not(feature = "k8s-client"), allow(dead_code))] // it is parsed all the same, so that a wrong use is told first
struct Submit {
    #[command(flatten)]
    what: What,
    /// A context of the kubeconfig; left out: the current one
    #[arg(long)]
    context: Option<String>,
}

/// A run that is there.
#[derive(Debug, Args)]
#[cfg_attr(not(feature = "k8s-client"), allow(dead_code))] // it is parsed all the same, so that a wrong use is told first
struct There {
    /// Its name
    name: String,
    /// Where it is
    #[arg(long, default_value = "ella")]
    namespace: String,
    /// A context of the kubeconfig; left out: the current one
    #[arg(long)]
    context: Option<String>,
}

#[derive(Debug, Args)]
#[cfg_attr(not(feature = "k8s-client"), allow(dead_code))] // it is parsed all the same, so that a wrong use is told first
struct Logs {
    #[command(flatten)]
    there: There,
    /// Of whom
    #[arg(long, default_value = "coordinator", value_parser = ["coordinator", "worker"])]
    of: String,
    /// Go on as lines come; not of pods that start later
    #[arg(long, short)]
    follow: bool,
}

#[derive(Debug, Args)]
#[cfg_attr(not(feature = "k8s-client"), allow(dead_code))] // it is parsed all the same, so that a wrong use is told first
struct Scale {
    #[command(flatten)]
    there: There,
    /// How many there are to be
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    workers: u32,
}

#[derive(Debug, Args)]
#[cfg_attr(not(feature = "k8s-client"), allow(dead_code))] // it is parsed all the same, so that a wrong use is told first
struct Cancel {
    #[command(flatten)]
    there: There,
    /// How long the workers may take to commit and leave, in seconds
    #[arg(
        long, value_name = "SECONDS", default_value_t = 600, conflicts_with = "now",
        value_parser = clap::value_parser!(u64).range(..=MOST_SECONDS)
    )]
    timeout: u64,
    /// Wait for nobody: what is not committed is lost
    #[arg(long)]
    now: bool,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

fn volume(text: &str) -> Result<Volume, String> {
    text.parse().map_err(|error: RenderError| error.to_string())
}

impl From<RenderError> for Fail {
    fn from(error: RenderError) -> Self {
        match error {
            RenderError::Config(_) | RenderError::Field { .. } => Self::usage(error),
            RenderError::Kustomize(_) | RenderError::Yaml(_) => Self::failed(error),
        }
    }
}

impl K8s {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        match &self.command {
            Command::Render(command) => command.run(out),
            #[cfg(feature = "k8s-client")]
            Command::Submit(command) => command.run(out),
            #[cfg(feature = "k8s-client")]
            Command::Logs(command) => command.run(out),
            #[cfg(feature = "k8s-client")]
            Command::Scale(command) => command.run(out),
            #[cfg(feature = "k8s-client")]
            Command::Cancel(command) => command.run(out),
            #[cfg(not(feature = "k8s-client"))]
            asked => Err(Fail::usage(format_args!("ella k8s {}: {BUILD}", asked.name()))),
        }
    }
}

#[cfg(not(feature = "k8s-client"))]
impl Command {
    fn name(&self) -> &'static str {
        match self {
            Self::Render(_) => "render",
            Self::Submit(_) => "submit",
            Self::Logs(_) => "logs",
            Self::Scale(_) => "scale",
            Self::Cancel(_) => "cancel",
        }
    }
}

impl Render {
    fn run(&self, out: Out) -> Result<u8, Fail> {
        let rendered = self.what.render()?;
        let yaml = rendered.to_yaml()?;
        if let Some(file) = &self.out {
            crate::whole::write(file, yaml.as_bytes())?;
        }
        let Rendered { name, namespace, objects, notes } = &rendered;
        let result = json!({ "name": name, "namespace": namespace, "objects": objects, "notes": notes });
        out.result(&result, || match &self.out {
            Some(file) => format!("{}: {} objects of {namespace}/{name}", file.display(), objects.len()),
            None => yaml.trim_end().to_owned(),
        });
        Ok(DONE)
    }
}

impl What {
    fn render(&self) -> Result<Rendered, Fail> {
        let unread = |error| format!("{}: cannot be read ({error}); give the path of a run's or job's TOML file", self.config.display());
        let text = std::fs::read_to_string(&self.config).map_err(|error| Fail::usage(unread(error)))?;
        let rendered = render(&text, &self.config.display().to_string(), &self.set, &self.options()?)?;
        rendered.notes.iter().for_each(note);
        Ok(rendered)
    }

    fn options(&self) -> Result<Options, Fail> {
        let image = |who: &str| self.images.iter().rev().find(|(name, _)| name == who).map(|(_, image)| image.clone());
        if let Some((name, _)) = self.images.iter().find(|(name, _)| !["coordinator", "worker"].contains(&name.as_str())) {
            return Err(Fail::usage(format_args!("`--image` is of {name}, but it must be of coordinator or worker")));
        }
        let save_seconds = match &self.save_of {
            Some(run) => Some(longest_save(run)?),
            None => self.save_seconds,
        };
        Ok(Options {
            name: self.name.clone(),
            namespace: Some(self.namespace.clone()),
            overlays: self.overlays.clone(),
            coordinator_image: image("coordinator"),
            worker_image: image("worker"),
            volume: self.volume.clone(),
            mount: self.mount.clone(),
            cpu: self.cpu.clone(),
            memory: self.memory.clone(),
            gpus: self.gpus,
            workers: self.workers,
            save_seconds,
            env: self.env.clone(),
            egress: self.egress.clone(),
            identity: self.identity.clone(),
            queue: self.queue.clone(),
            namespaced_only: self.namespaced_only,
        })
    }
}

/// From a step's end to the record of its commit: the longest that there was, in seconds.
fn longest_save(run: &str) -> Result<f64, Fail> {
    let runtime = crate::runtime()?;
    let (events, metrics): (_, Vec<Metric>) = runtime.block_on(async {
        let folder = RunFolder::open(run).await?;
        Ok::<_, Fail>((folder.events().await?, folder.metrics().await?))
    })?;
    let saves = events.iter().filter(|(_, event)| event["event"] == "committed").filter_map(|(_, event)| {
        let (step, at) = (event["step"].as_u64()?, event["at_unix_ms"].as_u64()?);
        let ended = metrics.iter().find(|metric| metric.step == step)?.at_unix_ms;
        Some(at.saturating_sub(ended) as f64 / 1000.0)
    });
    let none = || Fail::failed(format_args!("{run}: no commit of it was measured; give --save-seconds"));
    saves.max_by(f64::total_cmp).ok_or_else(none)
}
