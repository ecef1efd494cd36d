//! A run in a cluster, for people without kubectl: made, looked at, resized and taken away.

use crate::kustomize::id;
use crate::naming;
use crate::render::{CLUSTER_SCOPED, Rendered};
use futures::{AsyncBufReadExt, StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Pod;
pub use kube::Client;
use kube::api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, LogParams, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Config, ResourceExt};
use serde_json::json;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Under this name the API server keeps which fields are ours.
const MANAGER: &str = "ella";
/// How often it is looked whether workers have left.
const LOOK: Duration = Duration::from_secs(2);
/// How long a connection may take, and how long it may be silent while an answer is awaited.
const ANSWER: Duration = Duration::from_secs(30);
/// What a run consists of, in the order in which it is taken away.
const KINDS: [(&str, &str, &str); 15] = [
    ("batch", "v1", "Job"),
    ("jobset.x-k8s.io", "v1alpha2", "JobSet"),
    ("apps", "v1", "Deployment"),
    ("monitoring.coreos.com", "v1", "ServiceMonitor"),
    ("monitoring.coreos.com", "v1", "PrometheusRule"),
    ("", "v1", "Service"),
    ("policy", "v1", "PodDisruptionBudget"),
    ("networking.k8s.io", "v1", "NetworkPolicy"),
    ("", "v1", "ConfigMap"),
    ("rbac.authorization.k8s.io", "v1", "RoleBinding"),
    ("rbac.authorization.k8s.io", "v1", "ClusterRoleBinding"),
    ("rbac.authorization.k8s.io", "v1", "Role"),
    ("", "v1", "ServiceAccount"),
    ("", "v1", "PersistentVolumeClaim"),
    ("", "v1", "PersistentVolume"),
];

/// Most runs have none of these, or an administrator makes them: who may not ask for them can still take the rest away.
const NOT_OURS: [&str; 5] = ["JobSet", "ServiceMonitor", "PrometheusRule", "ClusterRoleBinding", "PersistentVolume"];

/// What became of a run that was taken away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// What is gone.
    pub gone: Vec<String>,
    /// What may be there still: the cluster does not let this user look for it, or delete it.
    pub left: Vec<String>,
}

/// Why a cluster did not do as it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no cluster to ask.
    #[error("no cluster is known ({0}); give --context, or set KUBECONFIG")]
    NoConfig(String),
    /// It refused, or did not answer.
    #[error("{what}: {source}{}", hint(source))]
    Api {
        /// What was asked for.
        what: String,
        /// Its answer.
        source: Box<kube::Error>,
    },
    /// There is no such run.
    #[error("{namespace}/{name}: no workers of this name are in the cluster; see kubectl get jobs --namespace {namespace}")]
    NoRun {
        /// Where it was looked for.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// The run has a JobSet, whose template does not change.
    #[error(
        "{namespace}/{name}: a JobSet's number of workers is fixed; cancel the run, and submit it again with another workers.count: it goes on"
    )]
    Fixed {
        /// Where.
        namespace: String,
        /// Which run.
        name: String,
    },
    /// Workers have not left in time.
    #[error(
        "{namespace}/{name}: {left} workers are still there after {seconds} s; wait, or take it away without them having committed: --now"
    )]
    Late {
        /// Where.
        namespace: String,
        /// Which run.
        name: String,
        /// How many.
        left: usize,
        /// For how long it was waited.
        seconds: u64,
    },
}

/// What to do about it, where that is known.
fn hint(error: &kube::Error) -> &'static str {
    match error {
        kube::Error::Api(status) if status.code == 422 && status.message.contains("immutable") => {
            "; workers that are there can only be resized (ella k8s scale): cancel the run first, it resumes from its last commit"
        }
        kube::Error::Api(status) if status.code == 403 => "; ask the cluster's administrator for this right",
        _ => "",
    }
}

/// One namespace of a cluster.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
    /// For answers that may be silent for as long as they like.
    patient: Client,
    namespace: String,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster").field("namespace", &self.namespace).finish_non_exhaustive()
    }
}

impl Cluster {
    /// That of this kubeconfig context; left out: the current one, or the one that this process runs in.
    ///
    /// # Errors
    /// If none is known.
    pub async fn connect(context: Option<&str>, namespace: &str) -> Result<Self, ClientError> {
        let wrong = |error: &dyn std::fmt::Display| ClientError::NoConfig(error.to_string());
        let mut config = match context {
            None => Config::infer().await.map_err(|error| wrong(&error))?,
            Some(context) => {
                let options = KubeConfigOptions { context: Some(context.to_owned()), ..KubeConfigOptions::default() };
                let file = Kubeconfig::read().map_err(|error| wrong(&error))?;
                Config::from_custom_kubeconfig(file, &options).await.map_err(|error| wrong(&error))?
            }
        };
        config.connect_timeout = Some(ANSWER);
        let patient = Client::try_from(config.clone()).map_err(|error| wrong(&error))?;
        config.read_timeout = Some(ANSWER);
        // Else the time that a connection was not used counts too.
        config.reset_reader_on_write = true;
        let client = Client::try_from(config).map_err(|error| wrong(&error))?;
        Ok(Self { patient, ..Self::of(client, namespace) })
    }

    /// Over a client that is there.
    pub fn of(client: Client, namespace: &str) -> Self {
        Self { patient: client.clone(), client, namespace: namespace.to_owned() }
    }

    /// Makes all objects, or changes them to what was rendered (server-side apply). Gives their names.
    ///
    /// # Errors
    /// If the cluster refuses one; those before it are made.
    pub async fn submit(&self, rendered: &Rendered) -> Result<Vec<String>, ClientError> {
        let mut made = Vec::new();
        for object in &rendered.objects {
            let [kind, namespace, name] = id(object);
            let (group, version) = object["apiVersion"].as_str().and_then(|text| text.split_once('/')).unwrap_or(("", "v1"));
            let api = self.api((group, version, kind), namespace);
            let what = format!("{kind} {name}");
            api.patch(name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(object)).await.map_err(|e| refused(&what, e))?;
            made.push(what);
        }
        Ok(made)
    }

    /// Gives each line of the log of the run's pods to `told`, with the pod's name: of all that there is, or with `follow` as it comes.
    /// Pods that start later are not followed.
    ///
    /// # Errors
    /// If there are no such pods, or the cluster refuses.
    pub async fn logs(&self, name: &str, component: &str, follow: bool, told: &mut dyn FnMut(&str, &str)) -> Result<(), ClientError> {
        let found = self.pods(name, component).await?;
        if found.is_empty() {
            return Err(self.no_run(name));
        }
        let client = if follow { &self.patient } else { &self.client };
        let pods: Api<Pod> = Api::namespaced(client.clone(), &self.namespace);
        let mut streams = Vec::new();
        for pod in found.iter().map(ResourceExt::name_any) {
            let lines = pods.log_stream(&pod, &LogParams { follow, ..LogParams::default() }).await;
            match lines {
                Ok(lines) => streams.push(lines.lines().map_ok(move |line| (pod.clone(), line)).boxed()),
                // One that has not started yet has no log.
                Err(error) => told(&pod, &format!("(no log: {error})")),
            }
        }
        let mut lines = futures::stream::select_all(streams);
        while let Some(line) = lines.next().await {
            match line {
                Ok((pod, line)) => told(&pod, &line),
                Err(error) => told("", &format!("(a log broke off: {error})")),
            }
        }
        Ok(())
    }

    /// Has the run trained by so many workers.
    ///
    /// # Errors
    /// If there is no such run, it has a JobSet, or the cluster refuses.
    pub async fn scale(&self, name: &str, workers: u32) -> Result<(), ClientError> {
        let change = json!({ "spec": { "completions": workers, "parallelism": workers } });
        let own = format!("{name}-workers");
        match self.api(KINDS[0], &self.namespace).patch(&own, &PatchParams::default(), &Patch::Merge(&change)).await {
            Err(error) if is_unknown(&error) => match self.api(KINDS[1], &self.namespace).get_opt(&own).await {
                Ok(Some(_)) => Err(ClientError::Fixed { namespace: self.namespace.clone(), name: name.to_owned() }),
                _ => Err(self.no_run(name)),
            },
            answer => answer.map(drop).map_err(|error| refused(&format!("Job {own}"), error)),
        }
    }

    /// Takes the run away, once its workers have committed and left: they are given `patience` for that, or none with [`Duration::ZERO`].
    /// The run's folder stays. Gives what was taken away, and what only an administrator may look for.
    ///
    /// # Errors
    /// If there is no such run, workers do not leave in time, or the cluster refuses.
    pub async fn cancel(&self, name: &str, patience: Duration) -> Result<Taken, ClientError> {
        let mut taken = Taken::default();
        if patience > Duration::ZERO {
            taken.gone.extend(self.dismiss(name, patience).await?);
        }
        for kind in KINDS {
            self.take_kind(name, kind, &mut taken).await?;
        }
        if taken.gone.is_empty() { Err(self.no_run(name)) } else { Ok(taken) }
    }

    /// Takes away what the run has of one kind.
    async fn take_kind(&self, name: &str, kind: (&str, &str, &str), taken: &mut Taken) -> Result<(), ClientError> {
        let api = self.api(kind, &self.namespace);
        let mine = ListParams::default().labels(&format!("app.kubernetes.io/instance={name}"));
        let found = match api.list(&mine).await {
            Err(error) if is_unknown(&error) => return Ok(()),
            Err(error) if is_not_ours(kind.2, &error) => {
                taken.left.push(kind.2.to_owned());
                return Ok(());
            }
            found => found.map_err(|e| refused(kind.2, e))?,
        };
        // What belongs to no namespace may be that of a run of this name in another.
        let own = ["token-review", "data"].map(|of| naming::whole(&self.namespace, name, of));
        let ours = |object: &String| !CLUSTER_SCOPED.contains(&kind.2) || own.contains(object);
        for object in found.items.iter().map(ResourceExt::name_any).filter(ours) {
            let what = format!("{} {object}", kind.2);
            match api.delete(&object, &DeleteParams::background()).await {
                Ok(_) => taken.gone.push(what),
                Err(error) if is_unknown(&error) => taken.gone.push(what),
                Err(error) if is_not_ours(kind.2, &error) => taken.left.push(what),
                Err(error) => return Err(refused(&what, error)),
            }
        }
        Ok(())
    }

    /// Has the workers told to leave, and none started in their place, and their Job taken away once they have left; or the JobSet that it is one
    /// of. (To suspend it would not do: Kueue has it go on.) Gives what was taken away.
    async fn dismiss(&self, name: &str, patience: Duration) -> Result<Option<String>, ClientError> {
        let own = format!("{name}-workers");
        for kind in &KINDS[..2] {
            let (api, what) = (self.api(*kind, &self.namespace), format!("{} {own}", kind.2));
            match api.delete(&own, &DeleteParams::foreground()).await {
                Err(error) if is_unknown(&error) || is_not_ours(kind.2, &error) => continue,
                answer => drop(answer.map_err(|error| refused(&what, error))?),
            }
            let until = Instant::now() + patience;
            while !is_gone(api.get(&own).await).map_err(|error| refused(&what, error))? {
                if Instant::now() >= until {
                    return Err(self.late(name, patience).await?);
                }
                sleep(LOOK.min(until - Instant::now())).await;
            }
            return Ok(Some(what));
        }
        Ok(None)
    }

    async fn late(&self, name: &str, patience: Duration) -> Result<ClientError, ClientError> {
        let left = self.pods(name, "worker").await?.len();
        Ok(ClientError::Late { namespace: self.namespace.clone(), name: name.to_owned(), left, seconds: patience.as_secs() })
    }

    /// The run's pods.
    async fn pods(&self, name: &str, component: &str) -> Result<Vec<Pod>, ClientError> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let labels = format!("app.kubernetes.io/instance={name},app.kubernetes.io/component={component}");
        let found = pods.list(&ListParams::default().labels(&labels)).await;
        found.map(|found| found.items).map_err(|error| refused("the list of pods", error))
    }

    fn api(&self, (group, version, kind): (&str, &str, &str), namespace: &str) -> Api<DynamicObject> {
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
        match CLUSTER_SCOPED.contains(&kind) {
            true => Api::all_with(self.client.clone(), &resource),
            false => Api::namespaced_with(self.client.clone(), namespace, &resource),
        }
    }

    fn no_run(&self, name: &str) -> ClientError {
        ClientError::NoRun { namespace: self.namespace.clone(), name: name.to_owned() }
    }
}

fn is_gone(answer: Result<DynamicObject, kube::Error>) -> Result<bool, kube::Error> {
    match answer {
        Err(error) if is_unknown(&error) => Ok(true),
        answer => answer.map(|_| false),
    }
}

/// There is no such object, or the cluster does not know its kind.
fn is_unknown(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

/// This user may not ask for it, and need not.
fn is_not_ours(kind: &str, error: &kube::Error) -> bool {
    NOT_OURS.contains(&kind) && matches!(error, kube::Error::Api(status) if status.code == 403)
}

fn refused(what: &str, source: kube::Error) -> ClientError {
    ClientError::Api { what: what.to_owned(), source: Box::new(source) }
}
