//! A run's or job's manifests: those of `base` and the overlays that are named, under its name, with its config.

use crate::error::{RenderError, field};
use crate::kustomize::{self, id};
use crate::options::{Options, Volume, check_name};
use crate::{naming, places, workers};
use ella_proto::config::{Config, Device};
use serde_json::{Value, json};

/// What stands for a cloud's identity in the overlays.
const IDENTITY: &str = "REPLACE_WITH_IDENTITY";
/// How long workers train on without a coordinator, where the config does not say it: a node that is gone is given up after a minute and a half.
const ORPHAN_TIMEOUT: &str = "workers.orphan_timeout=\"5m\"";
/// Kinds in the order in which they are made, as far as it matters.
const ORDER: [&str; 18] = [
    "Namespace",
    "PriorityClass",
    "PersistentVolume",
    "PersistentVolumeClaim",
    "ServiceAccount",
    "ClusterRole",
    "Role",
    "ClusterRoleBinding",
    "RoleBinding",
    "ConfigMap",
    "NetworkPolicy",
    "PodDisruptionBudget",
    "Service",
    "ServiceMonitor",
    "PrometheusRule",
    "Deployment",
    "JobSet",
    "Job",
];
/// Kinds that belong to no namespace.
pub const CLUSTER_SCOPED: [&str; 5] = ["Namespace", "PriorityClass", "PersistentVolume", "ClusterRole", "ClusterRoleBinding"];

/// Manifests, and what people should know of them.
#[derive(Clone, Debug)]
pub struct Rendered {
    /// The run's name in the cluster.
    pub name: String,
    /// Where it is.
    pub namespace: String,
    /// In the order in which they are made.
    pub objects: Vec<Value>,
    /// Warnings, one line each.
    pub notes: Vec<String>,
}

/// Renders a config, which is a run's or a job's. `origin` names it in errors; `set` overrides its keys.
///
/// # Errors
/// If the config or an option cannot be used, or names what pods could not reach.
pub fn render(text: &str, origin: &str, set: &[String], options: &Options) -> Result<Rendered, RenderError> {
    options.check()?;
    let options = &with_local(options);
    let config = parse(text, origin, set)?;
    let mut notes = places::check(&config, options.mounted().as_deref(), &options.overlays, &options.egress)?;
    let name = name_of(&config, options)?;
    let namespace = options.namespace.clone().unwrap_or_else(|| naming::NAMESPACE.to_owned());
    let mut objects = kustomize::build("base", &components(options))?;
    if options.overlays.iter().any(|overlay| overlay == "jobset") {
        workers::as_jobset(&mut objects)?;
    }
    // Before anything of the options is in them: what people have named keeps its name.
    naming::rename(&mut objects, &name, &namespace);
    if let Some(volume) = &options.volume {
        workers::share(&mut objects, volume, &options.mounted().unwrap_or_default());
    }
    notes.extend(workers::size(&mut objects, &config, options)?);
    for object in &mut objects {
        fill(object, &name, options);
        workers::surround(object, options);
    }
    put_config(&mut objects, &config);
    settle_identity(&mut objects, options)?;
    objects.retain(|object| !(options.namespaced_only && CLUSTER_SCOPED.contains(&id(object)[0])));
    let rank = |object: &Value| ORDER.iter().position(|kind| *kind == id(object)[0]).unwrap_or(ORDER.len());
    objects.sort_by(|a, b| (rank(a), id(a)).cmp(&(rank(b), id(b))));
    if !options.namespaced_only && namespace != naming::NAMESPACE {
        notes.push(format!(
            "the namespace {namespace} is made, or if it is there told to enforce the policy `restricted` on all its pods, others' too; \
             --namespaced-only leaves it as it is"
        ));
    }
    if options.namespaced_only {
        notes.push(format!("left out are {}, which an administrator must have made", CLUSTER_SCOPED.join(", ")));
    }
    Ok(Rendered { name, namespace, objects, notes })
}

impl Rendered {
    /// As one YAML text of many documents.
    ///
    /// # Errors
    /// If an object can't be written, which none of ours is.
    pub fn to_yaml(&self) -> Result<String, RenderError> {
        let documents: Result<Vec<String>, _> = self.objects.iter().map(serde_saphyr::to_string).collect();
        documents.map(|documents| documents.join("---\n")).map_err(|error| RenderError::Yaml(error.to_string()))
    }
}

/// The config, with a cluster's defaults where it does not say otherwise.
fn parse(text: &str, origin: &str, set: &[String]) -> Result<Config, RenderError> {
    let config = Config::parse(text, origin, set)?;
    let says = |table: &toml::Table| table.get("workers").is_some_and(|workers| workers.get("orphan_timeout").is_some());
    let said =
        text.parse::<toml::Table>().is_ok_and(|table| says(&table)) || set.iter().any(|item| item.starts_with("workers.orphan_timeout"));
    match config {
        Config::Run(_) if !said => Ok(Config::parse(text, origin, &[set, &[ORPHAN_TIMEOUT.to_owned()]].concat())?),
        config => Ok(config),
    }
}

/// The overlay `local` has a shared folder, and where none is named that is /srv/ella of the node.
fn with_local(options: &Options) -> Options {
    let local = options.overlays.iter().any(|overlay| overlay == "local");
    let volume = options.volume.clone().or_else(|| local.then(|| Volume::Host("/srv/ella".to_owned())));
    Options { volume, ..options.clone() }
}

/// The components of the overlays, each once; but for the JobSet, which is made of what the others make of the Job.
fn components(options: &Options) -> Vec<&str> {
    let mut components: Vec<&str> = options.volume.iter().map(|_| "volume").collect();
    for overlay in &options.overlays {
        if !components.contains(&overlay.as_str()) && overlay != "jobset" {
            components.push(overlay);
        }
    }
    components
}

fn name_of(config: &Config, options: &Options) -> Result<String, RenderError> {
    if let Some(name) = &options.name {
        return Ok(name.clone());
    }
    let (key, from) = match config {
        Config::Run(run) => ("run.output", run.run.output.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_owned()),
        Config::Job(job) => ("job.kind", job.job.kind.to_string()),
    };
    let name = from.to_ascii_lowercase().replace(['_', '.', ' '], "-");
    let wrong = |_| field(key, format_args!("{from:?}"), "its last part cannot name objects of a cluster; give --name");
    check_name(key, &name).map_err(wrong).map(|()| name)
}

/// The config itself, and its digest where a change of it must start the coordinator anew.
fn put_config(objects: &mut [Value], config: &Config) {
    let text = match config {
        Config::Run(run) => run.to_toml(),
        Config::Job(job) => job.to_toml(),
    };
    let digest = blake3::hash(text.as_bytes()).to_hex().to_string();
    for object in objects {
        match id(object)[0] {
            "ConfigMap" if object["data"].get("config.toml").is_some() => object["data"]["config.toml"] = text.clone().into(),
            "Deployment" => object["spec"]["template"]["metadata"]["annotations"]["ella/config-digest"] = digest.clone().into(),
            _ => {}
        }
    }
}

/// What options say of single objects.
fn fill(object: &mut Value, run: &str, options: &Options) {
    let [kind, _, name] = id(object).map(str::to_owned);
    match kind.as_str() {
        "NetworkPolicy" if name == format!("{run}-stores") => {
            let ports: Vec<Value> = options.egress.iter().map(|port| json!({ "protocol": "TCP", "port": port })).collect();
            if let (Some(egress), false) = (object["spec"]["egress"].as_array_mut(), ports.is_empty()) {
                egress.push(json!({ "ports": ports }));
            }
        }
        "Job" | "JobSet" => {
            if let Some(queue) = &options.queue {
                object["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = queue.clone().into();
            }
        }
        _ => {}
    }
}

/// Puts the identity where overlays want one.
fn settle_identity(objects: &mut [Value], options: &Options) -> Result<(), RenderError> {
    for object in objects.iter_mut().filter(|object| id(object)[0] == "ServiceAccount") {
        let Some(annotations) = object["metadata"].get_mut("annotations").and_then(Value::as_object_mut) else { continue };
        for value in annotations.values_mut().filter(|value| *value == IDENTITY) {
            let Some(identity) = &options.identity else {
                let overlays = options.overlays.join(", ");
                return Err(field("--identity", "left out", &format!("--overlay {overlays} needs the cloud's identity for the pods")));
            };
            *value = identity.clone().into();
        }
    }
    Ok(())
}

/// What a config computes on, if it says so.
pub(crate) fn device(config: &Config) -> Option<Device> {
    match config {
        Config::Run(run) => Some(run.workers.device),
        Config::Job(_) => None,
    }
}
