//! What becomes of the pods: how many there are, of which image, with what of a node.

use crate::error::RenderError;
use crate::kustomize::{self, KustomizeError, id};
use crate::options::{Options, Volume};
use crate::render::device;
use ella_proto::config::{Config, Device};
use serde_json::{Value, json};

const GPU: &str = "nvidia.com/gpu";
/// Beside the data set's files the cache holds models from the hub.
const MODELS: u64 = 50 << 30;

/// Sizes the workers' Job and what depends on how many they are. Gives what people should know.
pub(crate) fn size(objects: &mut Vec<Value>, config: &Config, options: &Options) -> Result<Vec<String>, RenderError> {
    let mut notes = Vec::new();
    let (count, keep) = match config {
        Config::Run(run) => {
            if options.workers.is_some() {
                return Err(crate::error::field("--workers", "given", "a run's workers are workers.count: --set workers.count=N"));
            }
            (run.workers.count, run.workers.min.min(run.workers.count - 1))
        }
        // Units that a worker leaves behind are another's.
        Config::Job(_) => (options.workers.unwrap_or(1) as usize, 0),
    };
    objects.retain(|object| keep > 0 || id(object)[0] != "PodDisruptionBudget");
    for object in objects.iter_mut() {
        if let Some(job) = job(object) {
            job["completions"] = count.into();
            job["parallelism"] = count.into();
            job["template"]["spec"]["terminationGracePeriodSeconds"] = options.grace().into();
            notes.extend(equip(&mut job["template"]["spec"], config, options));
        }
        match id(object)[0] {
            "PodDisruptionBudget" => object["spec"]["minAvailable"] = keep.into(),
            "Deployment" => {
                let own = options.coordinator_image.clone().unwrap_or_else(|| image("ella-coordinator"));
                object["spec"]["template"]["spec"]["containers"][0]["image"] = own.into();
            }
            _ => {}
        }
    }
    Ok(notes)
}

/// An image of this build's version.
fn image(name: &str) -> String {
    format!("{name}:{}", env!("CARGO_PKG_VERSION"))
}

/// A worker's image, device, memory, processors, GPU and cache.
fn equip(pod: &mut Value, config: &Config, options: &Options) -> Option<String> {
    let device = device(config);
    if let (Config::Run(run), Some(volume)) = (config, item(&mut pod["volumes"], "name", "cache")) {
        volume["emptyDir"]["sizeLimit"] = format!("{}Gi", (run.data.cache_bytes + MODELS).div_ceil(1 << 30)).into();
    }
    let container = &mut pod["containers"][0];
    let resources = &mut container["resources"];
    let gpus = options.gpus.unwrap_or(match device {
        Some(Device::Cuda) => 1,
        Some(Device::Cpu) => 0,
        _ => u32::from(resources["limits"].get(GPU).is_some()),
    });
    match resources["limits"].as_object_mut() {
        Some(limits) if gpus == 0 => drop(limits.remove(GPU)),
        _ => resources["limits"][GPU] = gpus.to_string().into(),
    }
    for (name, amount) in [("cpu", &options.cpu), ("memory", &options.memory)] {
        if let Some(amount) = amount {
            resources["requests"][name] = amount.clone().into();
            resources["limits"][name] = amount.clone().into();
        }
    }
    let computes = gpus > 0 && device != Some(Device::Cpu);
    let own = image(if computes { "ella-worker-cuda" } else { "ella-worker" });
    container["image"] = options.worker_image.clone().unwrap_or(own).into();
    let word = match device {
        Some(Device::Cpu) => "cpu",
        Some(Device::Cuda) => "cuda",
        _ => "auto",
    };
    set_env(container, "ELLA_DEVICE", word);
    if gpus > 0 {
        bear_gpu_nodes(pod);
    }
    (gpus > 0 && !computes).then(|| "workers.device = \"cpu\": each worker takes a GPU, and does not use it".to_owned())
}

/// Nodes with GPUs are often tainted, so that nothing else takes their room.
fn bear_gpu_nodes(pod: &mut Value) {
    if item(&mut pod["tolerations"], "key", GPU).is_some() {
        return;
    }
    if let Some(tolerations) = pod["tolerations"].as_array_mut() {
        tolerations.push(json!({ "key": GPU, "operator": "Exists", "effect": "NoSchedule" }));
    }
}

/// What is the same for all pods.
pub(crate) fn surround(object: &mut Value, options: &Options) {
    let Some(pod) = pod(object) else { return };
    for (name, value) in &options.env {
        set_env(&mut pod["containers"][0], name, value);
    }
}

/// Puts the shared folder in the place of the one that the component `volume` has.
pub(crate) fn share(objects: &mut Vec<Value>, volume: &Volume, mounted: &str) {
    objects.retain(|object| !matches!(volume, Volume::Claim(_)) || !id(object)[0].starts_with("PersistentVolume"));
    for object in objects.iter_mut() {
        if id(object)[0] == "PersistentVolume"
            && let Some(spec) = object["spec"].as_object_mut()
        {
            spec.remove("hostPath");
            match volume {
                Volume::Nfs { server, path } => drop(spec.insert("nfs".to_owned(), json!({ "server": server, "path": path }))),
                Volume::Host(path) => drop(spec.insert("hostPath".to_owned(), json!({ "path": path, "type": "Directory" }))),
                Volume::Claim(_) => {}
            }
        }
        let Some(pod) = pod(object) else { continue };
        if let (Volume::Claim(name), Some(own)) = (volume, item(&mut pod["volumes"], "name", "data")) {
            own["persistentVolumeClaim"]["claimName"] = name.clone().into();
        }
        let container = &mut pod["containers"][0];
        if let Some(mount) = item(&mut container["volumeMounts"], "name", "data") {
            mount["mountPath"] = mounted.into();
        }
        container["workingDir"] = mounted.into();
    }
}

/// Makes the workers' Job, as the overlays have it, that of a JobSet.
pub(crate) fn as_jobset(objects: &mut Vec<Value>) -> Result<(), KustomizeError> {
    let job = objects.iter().find(|object| id(object)[0] == "Job").cloned().unwrap_or_default();
    kustomize::change(objects, "jobset")?;
    for set in objects.iter_mut().filter(|object| id(object)[0] == "JobSet") {
        let mut spec = job["spec"].clone();
        if let Some(suspend) = spec.as_object_mut().and_then(|spec| spec.remove("suspend")) {
            set["spec"]["suspend"] = suspend;
        }
        set["metadata"]["labels"] = job["metadata"]["labels"].clone();
        set["spec"]["replicatedJobs"][0]["template"]["spec"] = spec;
    }
    Ok(())
}

/// The spec of the workers' Job, which may be a JobSet's.
fn job(object: &mut Value) -> Option<&mut Value> {
    let at = match id(object)[0] {
        "Job" => "/spec",
        "JobSet" => "/spec/replicatedJobs/0/template/spec",
        _ => return None,
    };
    object.pointer_mut(at)
}

/// The spec of the object's pods.
fn pod(object: &mut Value) -> Option<&mut Value> {
    let at = match id(object)[0] {
        "Deployment" | "Job" => "/spec/template/spec",
        "JobSet" => "/spec/replicatedJobs/0/template/spec/template/spec",
        _ => return None,
    };
    object.pointer_mut(at)
}

fn item<'a>(items: &'a mut Value, key: &str, value: &str) -> Option<&'a mut Value> {
    items.as_array_mut()?.iter_mut().find(|item| item[key] == value)
}

fn set_env(container: &mut Value, name: &str, value: &str) {
    let Some(env) = container["env"].as_array_mut() else { return };
    env.retain(|variable| variable["name"] != name);
    env.push(json!({ "name": name, "value": value }));
}
