//! A run in a cluster, for people without kubectl: made, looked at, resized and taken away.

use crate::kustomize::id;
use crate::render::{CLUSTER_SCOPED, Rendered};
use futures::{AsyncBufReadExt, StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Pod;
pub use kube::Client;
use kube::api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, LogParams, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Config, ResourceExt};
use serde_json::{Value, json};
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
        left: u64,
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
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let labels = format!("app.kubernetes.io/instance={name},app.kubernetes.io/component={component}");
        let found = pods.list(&ListParams::default().labels(&labels)).await.map_err(|e| refused("the list of pods", e))?;
        if found.items.is_empty() {
            return Err(self.no_run(name));
        }
        let client = if follow { &self.patient } else { &self.client };
        let pods: Api<Pod> = Api::namespaced(client.clone(), &self.namespace);
        let mut streams = Vec::new();
        for pod in found.items.iter().map(ResourceExt::name_any) {
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
    /// If there is no such run, or the cluster refuses.
    pub async fn scale(&self, name: &str, workers: u32) -> Result<(), ClientError> {
        let change = json!({ "spec": { "completions": workers, "parallelism": workers } });
        self.change_job(name, &change).await.map(drop)
    }

    /// Takes the run away, once its workers have committed and left: they are given `patience` for that, or none with [`Duration::ZERO`].
    /// The run's folder stays. Gives what was taken away, and what only an administrator may look for.
    ///
    /// # Errors
    /// If there is no such run, workers do not leave in time, or the cluster refuses.
    pub async fn cancel(&self, name: &str, patience: Duration) -> Result<Taken, ClientError> {
        if patience > Duration::ZERO {
            let job = self.suspend(name).await?;
            self.workers_gone(name, &job, patience).await?;
        }
        let mut taken = Taken::default();
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
        let own = ["token-review", "data"].map(|of| format!("{}-{name}-{of}", self.namespace));
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

    async fn change_job(&self, name: &str, change: &Value) -> Result<DynamicObject, ClientError> {
        let jobs = self.api(KINDS[0], &self.namespace);
        let own = format!("{name}-workers");
        match jobs.patch(&own, &PatchParams::default(), &Patch::Merge(change)).await {
            Err(error) if is_unknown(&error) => Err(self.no_run(name)),
            answer => answer.map_err(|error| refused(&format!("Job {own}"), error)),
        }
    }

    /// Has the workers told to leave, and none started in their place. Gives the name of their Job.
    async fn suspend(&self, name: &str) -> Result<String, ClientError> {
        let change = json!({ "spec": { "suspend": true } });
        let own = format!("{name}-workers");
        match self.change_job(name, &change).await {
            // It may be a JobSet's.
            Err(ClientError::NoRun { .. }) => {}
            done => return done.map(|_| own),
        }
        match self.api(KINDS[1], &self.namespace).patch(&own, &PatchParams::default(), &Patch::Merge(&change)).await {
            Err(error) if is_unknown(&error) => Err(self.no_run(name)),
            // The first Job of those that components/jobset calls "w".
            answer => answer.map(|_| format!("{own}-w-0")).map_err(|error| refused(&format!("JobSet {own}"), error)),
        }
    }

    /// Waits until no pod of the workers' Job is there any more.
    async fn workers_gone(&self, name: &str, job: &str, patience: Duration) -> Result<(), ClientError> {
        let jobs = self.api(KINDS[0], &self.namespace);
        let until = Instant::now() + patience;
        loop {
            let there = match jobs.get(job).await {
                // A JobSet that was suspended from the beginning may have made none; another may have deleted it.
                Err(error) if is_unknown(&error) => return Ok(()),
                answer => answer.map_err(|e| refused("the workers' Job", e))?,
            };
            let number = |key: &str| there.data.pointer(&format!("/status/{key}")).and_then(Value::as_u64).unwrap_or(0);
            let left = number("active") + number("terminating");
            if left == 0 {
                return Ok(());
            }
            if Instant::now() >= until {
                let (namespace, name) = (self.namespace.clone(), name.to_owned());
                return Err(ClientError::Late { namespace, name, left, seconds: patience.as_secs() });
            }
            sleep(LOOK.min(until - Instant::now())).await;
        }
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
