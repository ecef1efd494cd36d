//! What a rendering can be told besides the config, and the rules for it.

use crate::error::{RenderError, field};
use std::str::FromStr;

/// Longest name of a run in a cluster: with what Kubernetes adds for a worker's pod it must fit into 63 characters.
const LONGEST_NAME: usize = 40;
/// Grace that is left to workers where nobody says how long a save takes, in seconds.
const GRACE: u64 = 300;
/// Least and most of it.
const GRACES: (u64, u64) = (60, 3600);
/// Overlays of clouds, each of which wants an identity of its own.
const CLOUDS: [&str; 3] = ["s3", "gcs", "azure"];
/// Parts of an environment variable's name that tell of a secret. Not every KEY does: AWS_SSE_KMS_KEY_ID is one's name.
const SECRETS: [&str; 9] = ["SECRET", "PASSWORD", "TOKEN", "ACCESS_KEY", "ACCOUNT_KEY", "API_KEY", "CUSTOMER_KEY", "MASTER_KEY", "SAS_KEY"];

/// How a run or job is to stand in a cluster. What is left out has the overlays' values.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// What its objects are called after; left out: the last part of the run's folder, or the job's kind.
    pub name: Option<String>,
    /// Where they are; left out: `ella`.
    pub namespace: Option<String>,
    /// Overlays by name, in the order that they are applied in.
    pub overlays: Vec<String>,
    /// The coordinator's image; left out: `ella-coordinator` of this version.
    pub coordinator_image: Option<String>,
    /// The workers' image; left out: `ella-worker` of this version, or `ella-worker-cuda`.
    pub worker_image: Option<String>,
    /// A folder that all pods share.
    pub volume: Option<Volume>,
    /// Where the pods see it; left out: where it is itself, or `/srv/ella`.
    pub mount: Option<String>,
    /// Processors of a worker, as in `2` or `500m`.
    pub cpu: Option<String>,
    /// Memory of a worker, as in `8Gi`.
    pub memory: Option<String>,
    /// GPUs of a worker: none, or one; left out: one where `workers.device` is `cuda` or an overlay says so.
    pub gpus: Option<u32>,
    /// Workers of a job; a run's are `workers.count`.
    pub workers: Option<u32>,
    /// How long a save takes, in seconds; left out: unknown.
    pub save_seconds: Option<f64>,
    /// Environment variables of all pods.
    pub env: Vec<(String, String)>,
    /// TCP ports that stores listen on, besides those that the overlays open.
    pub egress: Vec<u16>,
    /// A cloud's identity for the pods, for the overlays s3, gcs and azure.
    pub identity: Option<String>,
    /// Kueue's queue; left out: `ella`.
    pub queue: Option<String>,
    /// Leaves out what only a cluster's administrator may make.
    pub namespaced_only: bool,
}

/// A folder that all pods share, whatever node they are on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Volume {
    /// A claim that is there already.
    Claim(String),
    /// Exported by an NFS server.
    Nfs {
        /// Its name or address.
        server: String,
        /// What it exports.
        path: String,
    },
    /// A folder of the nodes: the same file system on each.
    Host(String),
}

impl FromStr for Volume {
    type Err = RenderError;

    fn from_str(text: &str) -> Result<Self, RenderError> {
        let rule = "it must be claim:NAME, nfs:SERVER:/FOLDER or host:/FOLDER";
        match text.split_once(':') {
            Some(("claim", name)) if is_label(name) => Ok(Self::Claim(name.to_owned())),
            Some(("host", path)) if is_folder(path) => Ok(Self::Host(path.trim_end_matches('/').to_owned())),
            // An IPv6 address has colons too.
            Some(("nfs", rest)) => match rest.split_once(":/") {
                Some((server, path)) if !server.is_empty() && is_folder(&format!("/{path}")) => {
                    Ok(Self::Nfs { server: server.to_owned(), path: format!("/{}", path.trim_end_matches('/')) })
                }
                _ => Err(field("--volume", text, rule)),
            },
            _ => Err(field("--volume", text, rule)),
        }
    }
}

/// Whether it is an absolute path of something below `/`, and leads to where it says.
fn is_folder(path: &str) -> bool {
    path.starts_with('/') && !path.trim_matches('/').is_empty() && !path.split('/').any(|part| part == "..")
}

/// Whether it is a DNS label (RFC 1123): what Kubernetes takes as a name everywhere.
pub(crate) fn is_label(text: &str) -> bool {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=63).contains(&text.len()) && text.chars().all(fits) && !text.starts_with('-') && !text.ends_with('-')
}

impl Options {
    /// Refuses the first value outside its rule.
    pub(crate) fn check(&self) -> Result<(), RenderError> {
        let label = "it must be a DNS label: a-z, 0-9 and -, beginning and ending with a letter or digit";
        for (flag, name) in [("--namespace", &self.namespace), ("--queue", &self.queue)] {
            if let Some(name) = name.as_ref().filter(|name| !is_label(name)) {
                return Err(field(flag, name, label));
            }
        }
        if let Some(name) = &self.name {
            check_name("--name", name)?;
        }
        for overlay in &self.overlays {
            if !crate::files::overlays().any(|known| known == overlay) {
                let known: Vec<&str> = crate::files::overlays().collect();
                return Err(field("--overlay", overlay, &format!("it must be one of {}", known.join(", "))));
            }
        }
        let both = |a: &str, b: &str| [a, b].iter().all(|name| self.overlays.iter().any(|overlay| overlay == name));
        if both("mtls", "prometheus") {
            let rule =
                "the coordinator asks for certificates by mtls, and Prometheus is given none; let it in by an access file of your own";
            return Err(field("--overlay", "mtls with prometheus", rule));
        }
        let clouds: Vec<&str> = CLOUDS.into_iter().filter(|cloud| self.overlays.iter().any(|overlay| overlay == cloud)).collect();
        if clouds.len() > 1 {
            let rule = "each wants an identity of its own, and --identity gives one; leave one of them out";
            return Err(field("--overlay", clouds.join(" with "), rule));
        }
        for image in [&self.coordinator_image, &self.worker_image].into_iter().flatten() {
            check_image(image)?;
        }
        self.check_sizes()?;
        self.check_pods()
    }

    fn check_sizes(&self) -> Result<(), RenderError> {
        let number = |text: &str| text.parse::<f64>().is_ok_and(|n| n > 0.0 && n.is_finite()) && !text.contains(['e', 'E', '+']);
        if let Some(cpu) = self.cpu.as_ref().filter(|cpu| !number(cpu.strip_suffix('m').unwrap_or(cpu))) {
            return Err(field("--cpu", cpu, "it must be a number of processors, as in 2 or 500m"));
        }
        let sized = |text: &str| ["Ki", "Mi", "Gi", "Ti"].iter().any(|unit| text.strip_suffix(unit).is_some_and(number));
        if let Some(memory) = self.memory.as_ref().filter(|memory| !sized(memory)) {
            return Err(field("--memory", memory, "it must be a number with a unit, as in 512Mi or 8Gi"));
        }
        if let Some(gpus) = self.gpus.filter(|gpus| *gpus > 1) {
            return Err(field("--gpus", gpus, "a worker computes on one GPU at most: give it 0 or 1, and the run more workers"));
        }
        if self.workers == Some(0) {
            return Err(field("--workers", 0, "it must be 1 or more"));
        }
        if let Some(seconds) = self.save_seconds.filter(|seconds| !(*seconds >= 0.0 && seconds.is_finite())) {
            return Err(field("--save-seconds", seconds, "it must be 0 or more"));
        }
        Ok(())
    }

    fn check_pods(&self) -> Result<(), RenderError> {
        for (name, _) in &self.env {
            let fits = |c: char| c.is_ascii_alphanumeric() || c == '_';
            if name.is_empty() || !name.chars().all(fits) || name.starts_with(|c: char| c.is_ascii_digit()) {
                return Err(field("--env", name, "it must be NAME=VALUE, the name of letters, digits and _"));
            }
            if SECRETS.iter().any(|part| name.to_ascii_uppercase().contains(part)) {
                let rule =
                    "what anyone who sees the manifests can read must be no secret; put it into the Secret ella-s3 (--overlay s3-secret)";
                return Err(field("--env", name, rule));
            }
        }
        if self.identity.is_some() && !self.overlays.iter().any(|overlay| CLOUDS.contains(&overlay.as_str())) {
            return Err(field("--identity", "given", "it goes with --overlay s3, gcs or azure"));
        }
        if self.queue.is_some() && !self.overlays.iter().any(|overlay| overlay == "kueue") {
            return Err(field("--queue", "given", "it goes with --overlay kueue"));
        }
        match &self.mount {
            Some(_) if self.volume.is_none() => Err(field("--mount", "given", "it goes with --volume")),
            Some(path) if !is_folder(path) => Err(field("--mount", path, "it must be an absolute path without .., and not /")),
            _ => Ok(()),
        }
    }

    /// Where the shared folder is in the pods.
    pub(crate) fn mounted(&self) -> Option<String> {
        let volume = self.volume.as_ref()?;
        let own = match volume {
            Volume::Claim(_) => "/srv/ella".to_owned(),
            Volume::Nfs { path, .. } | Volume::Host(path) => path.clone(),
        };
        Some(self.mount.as_ref().map_or(own, |path| path.trim_end_matches('/').to_owned()))
    }

    /// How long a worker that is told to leave has, in seconds: half a minute for its step and for the others to take the state over, and
    /// thrice a save: the one under way, its own, and as much again for a store that is slow.
    pub(crate) fn grace(&self) -> u64 {
        // Seconds of a day at most, so that nothing is cut off.
        self.save_seconds.map_or(GRACE, |save| (30.0 + 3.0 * save.min(86_400.0)).ceil() as u64).clamp(GRACES.0, GRACES.1)
    }
}

/// Refuses what can't be the name of a run's objects.
pub(crate) fn check_name(flag: &str, name: &str) -> Result<(), RenderError> {
    if is_label(name) && name.len() <= LONGEST_NAME && name.starts_with(|c: char| c.is_ascii_lowercase()) {
        return Ok(());
    }
    let rule = format!("it must be a DNS label of at most {LONGEST_NAME} characters: a-z first, then a-z, 0-9 and -, and no - at its end");
    Err(field(flag, name, &rule))
}

/// Refuses an image that may be another one tomorrow.
fn check_image(image: &str) -> Result<(), RenderError> {
    let rule = "it must name a version: a tag other than latest, or a digest, as in ella-worker:0.1.0";
    let last = image.rsplit('/').next().unwrap_or(image);
    let good = match (image.split_once("@sha256:"), last.split_once(':')) {
        (Some((name, digest)), _) => !name.is_empty() && digest.len() == 64,
        (None, Some((name, tag))) => !name.is_empty() && !tag.is_empty() && tag != "latest",
        (None, None) => false,
    };
    if good && !image.contains(char::is_whitespace) { Ok(()) } else { Err(field("--image", image, rule)) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn said(change: impl FnOnce(&mut Options)) -> String {
        let mut options = Options::default();
        change(&mut options);
        options.check().map_or_else(|error| error.to_string(), |()| String::new())
    }

    #[test]
    fn each_value_outside_its_rule_is_refused_by_its_flag() {
        let some = |text: &str| Some(text.to_owned());
        let mounted = |path: &'static str| {
            move |o: &mut Options| (o.volume, o.mount) = (Some(Volume::Claim("data".to_owned())), Some(path.to_owned()))
        };
        for (found, words) in [
            (said(|o| o.name = some("First_Run")), "`--name` is First_Run, but it must be a DNS label"),
            (said(|o| o.name = some(&"a".repeat(41))), "at most 40 characters"),
            (said(|o| o.name = some("7up")), "a-z first"),
            (said(|o| o.namespace = some("-x")), "`--namespace` is -x"),
            (said(|o| o.overlays = vec!["spot".to_owned()]), "it must be one of azure, gcs, ipv6, jobset, kueue, local,"),
            (said(|o| o.overlays = ["gcs", "s3"].map(str::to_owned).to_vec()), "`--overlay` is s3 with gcs, but each wants an identity"),
            (said(|o| o.worker_image = some("ella-worker")), "`--image` is ella-worker, but it must name a version"),
            (said(|o| o.worker_image = some("host:5000/ella-worker")), "a tag other than latest"),
            (said(|o| o.coordinator_image = some("x/ella-coordinator:latest")), "a tag other than latest"),
            (said(|o| o.cpu = some("many")), "`--cpu` is many"),
            (said(|o| o.memory = some("8")), "`--memory` is 8"),
            (said(|o| o.gpus = Some(8)), "a worker computes on one GPU at most"),
            (said(|o| o.save_seconds = Some(f64::NAN)), "`--save-seconds` is NaN"),
            (said(|o| o.env = vec![("AWS_SECRET_ACCESS_KEY".to_owned(), "hidden".to_owned())]), "the Secret ella-s3"),
            (said(|o| o.env = vec![("AZURE_STORAGE_ACCOUNT_KEY".to_owned(), "hidden".to_owned())]), "the Secret ella-s3"),
            (said(|o| o.env = vec![("AZURE_STORAGE_SAS_KEY".to_owned(), "hidden".to_owned())]), "the Secret ella-s3"),
            (said(|o| o.env = vec![("OPENAI_API_KEY".to_owned(), "hidden".to_owned())]), "the Secret ella-s3"),
            (said(|o| o.identity = some("arn:x")), "--overlay s3, gcs or azure"),
            (said(|o| o.queue = some("q")), "--overlay kueue"),
            (said(|o| o.mount = some("/x")), "it goes with --volume"),
            (said(mounted("/")), "`--mount` is /, but it must be an absolute path without .., and not /"),
            (said(mounted("//")), "`--mount` is //"),
            (said(mounted("srv")), "`--mount` is srv"),
            (said(mounted("/srv/../..")), "`--mount` is /srv/../.."),
        ] {
            assert!(found.contains(words) && !found.contains("hidden"), "{found:?}: {words}");
        }
        assert_eq!(said(|o| o.worker_image = Some(format!("h:5000/w@sha256:{}", "0".repeat(64)))), "");
        assert_eq!(said(|o| (o.cpu, o.memory) = (some("500m"), some("1.5Gi"))), "");
        assert_eq!(said(mounted("/srv/data/")), "");
        assert_eq!(said(|o| o.env = vec![("AWS_SSE_KMS_KEY_ID".to_owned(), "id".to_owned())]), "");
    }

    #[test]
    fn volumes_are_told_apart() {
        assert_eq!("claim:data".parse::<Volume>().unwrap(), Volume::Claim("data".to_owned()));
        assert_eq!("host:/srv/ella/".parse::<Volume>().unwrap(), Volume::Host("/srv/ella".to_owned()));
        let nfs = |server: &str| Volume::Nfs { server: server.to_owned(), path: "/srv/ella".to_owned() };
        assert_eq!("nfs:10.0.0.1:/srv/ella".parse::<Volume>().unwrap(), nfs("10.0.0.1"));
        assert_eq!("nfs:fd00::1:/srv/ella".parse::<Volume>().unwrap(), nfs("fd00::1"));
        for wrong in [
            "",
            "/srv/ella",
            "host:",
            "host:srv",
            "host:/",
            "host://",
            "host:/a/../b",
            "nfs:server",
            "nfs:server://",
            "nfs::/x",
            "claim:",
            "claim:A",
            "s3:/x",
        ] {
            assert!(wrong.parse::<Volume>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn grace_follows_the_save() {
        let grace = |save| Options { save_seconds: save, ..Options::default() }.grace();
        assert_eq!([grace(None), grace(Some(0.4)), grace(Some(60.0)), grace(Some(1e9))], [300, 60, 210, 3600]);
    }
}
