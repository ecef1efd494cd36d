//! The client of the cluster's API against one in memory, which knows objects by their path and nothing of what they mean.
#![cfg(feature = "client")]
#![allow(clippy::unwrap_used)]

use ella_k8s::client::{Client, ClientError, Cluster};
use ella_k8s::{Options, Rendered, render};
use http::{Method, Request, Response, StatusCode};
use kube::client::Body;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const RUN: &str = "[run]\noutput = \"s3://b/first\"\n[base]\nmodel = \"o/sd\"\n[text]\nmodel = \"o/t5\"\n[data]\npath = \"s3://b/d\"\n";

/// Objects by their path.
#[derive(Clone, Default)]
struct Fake {
    objects: Arc<Mutex<BTreeMap<String, Value>>>,
    /// What is deleted together with its pods is there until it was looked at so often.
    looks: Arc<Mutex<u32>>,
    /// Parts of paths that this user may not ask for.
    forbidden: &'static [&'static str],
}

impl Fake {
    fn cluster(&self) -> Cluster {
        let fake = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let fake = fake.clone();
            async move { Ok::<_, Infallible>(fake.answer(request).await) }
        });
        Cluster::of(Client::new(service, "ella"), "ella")
    }

    async fn answer(&self, request: Request<Body>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let (path, query) = (parts.uri.path().to_owned(), parts.uri.query().unwrap_or_default().to_owned());
        let body: Value = serde_json::from_slice(&body.collect_bytes().await.unwrap()).unwrap_or_default();
        let (code, text) = match parts.method {
            _ if self.forbidden.iter().any(|part| path.contains(part)) => refusal(StatusCode::FORBIDDEN, "Forbidden"),
            Method::GET if path.ends_with("/log") => (StatusCode::OK, format!("one line of {path}\nand another\n")),
            Method::GET if query.contains("labelSelector") => self.list(&path, &query),
            Method::GET => self.get(&path),
            Method::PATCH => self.patch(&path, &query, body),
            Method::DELETE => self.delete(&path, &body),
            _ => not_found(),
        };
        Response::builder().status(code).body(Body::from(text.into_bytes())).unwrap()
    }

    fn list(&self, path: &str, query: &str) -> (StatusCode, String) {
        if path.contains("jobset") || path.contains("monitoring") {
            return not_found();
        }
        let instance = query.split("instance%3D").nth(1).unwrap().split(['&', '%']).next().unwrap();
        let objects = self.objects.lock().unwrap();
        let below = objects.iter().filter(|(at, _)| at.rsplit_once('/').unwrap().0 == path).map(|(_, object)| object.clone());
        let items: Vec<Value> = below.filter(|object| object["metadata"]["labels"]["app.kubernetes.io/instance"] == instance).collect();
        (StatusCode::OK, json!({ "apiVersion": "v1", "kind": "List", "metadata": {}, "items": items }).to_string())
    }

    fn get(&self, path: &str) -> (StatusCode, String) {
        let (mut looks, mut objects) = (self.looks.lock().unwrap(), self.objects.lock().unwrap());
        let Some(object) = objects.get(path).cloned() else { return not_found() };
        if object["metadata"].get("deletionTimestamp").is_some() {
            if *looks == 0 {
                objects.remove(path);
                return not_found();
            }
            *looks -= 1;
        }
        (StatusCode::OK, object.to_string())
    }

    fn patch(&self, path: &str, query: &str, body: Value) -> (StatusCode, String) {
        let mut objects = self.objects.lock().unwrap();
        if query.contains("fieldManager=ella") {
            objects.insert(path.to_owned(), body.clone());
            return (StatusCode::OK, body.to_string());
        }
        let Some(object) = objects.get_mut(path) else { return not_found() };
        for (key, value) in body["spec"].as_object().unwrap() {
            object["spec"][key] = value.clone();
        }
        (StatusCode::OK, object.to_string())
    }

    fn delete(&self, path: &str, body: &Value) -> (StatusCode, String) {
        if body["propagationPolicy"] == "Foreground" {
            let mut objects = self.objects.lock().unwrap();
            let Some(object) = objects.get_mut(path) else { return not_found() };
            object["metadata"]["deletionTimestamp"] = "2026-11-28T08:00:00Z".into();
            return (StatusCode::OK, object.to_string());
        }
        self.objects.lock().unwrap().remove(path).map_or_else(not_found, |object| (StatusCode::OK, object.to_string()))
    }

    fn add_pod(&self, name: &str, component: &str) {
        let labels = json!({ "app.kubernetes.io/instance": "first", "app.kubernetes.io/component": component });
        let pod = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "labels": labels } });
        self.objects.lock().unwrap().insert(format!("/api/v1/namespaces/ella/pods/{name}"), pod);
    }
}

fn not_found() -> (StatusCode, String) {
    refusal(StatusCode::NOT_FOUND, "NotFound")
}

fn refusal(code: StatusCode, reason: &str) -> (StatusCode, String) {
    let told = json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code.as_u16(), "message": reason, "metadata": {} });
    (code, told.to_string())
}

fn rendered(name: &str) -> Rendered {
    let options = Options { name: Some(name.to_owned()), overlays: vec!["s3-secret".to_owned()], ..Options::default() };
    render(RUN, "run.toml", &[], &options).unwrap()
}

#[tokio::test]
async fn a_run_is_made_resized_and_taken_away_once_its_workers_have_left() {
    let fake = Fake::default();
    let cluster = fake.cluster();
    let made = cluster.submit(&rendered("first")).await.unwrap();
    assert_eq!(made.len(), fake.objects.lock().unwrap().len());
    cluster.submit(&rendered("first-2")).await.unwrap();
    let job = "/apis/batch/v1/namespaces/ella/jobs/first-workers";

    cluster.scale("first", 5).await.unwrap();
    let spec = fake.objects.lock().unwrap()[job]["spec"].clone();
    assert_eq!((&spec["completions"], &spec["parallelism"]), (&json!(5), &json!(5)));

    *fake.looks.lock().unwrap() = 1;
    let taken = cluster.cancel("first", Duration::from_secs(60)).await.unwrap();
    assert!(taken.gone.contains(&"ClusterRoleBinding ella.first.token-review".to_owned()) && taken.left.is_empty(), "{taken:?}");
    assert_eq!((taken.gone[0].as_str(), *fake.looks.lock().unwrap()), ("Job first-workers", 0), "it was waited for");
    let left: Vec<String> = fake.objects.lock().unwrap().keys().filter(|path| !path.contains("first-2")).cloned().collect();
    let shared =
        ["/api/v1/namespaces/ella", "clusterroles/ella-token-review", "priorityclasses/ella-coordinator", "priorityclasses/ella-worker"];
    assert_eq!(left.len(), shared.len(), "{left:?}");
    assert!(shared.iter().all(|path| left.iter().any(|there| there.ends_with(path))), "{left:?}");
    assert_eq!(fake.objects.lock().unwrap().len(), made.len(), "the other run has all of its own, and shares the rest");
}

#[tokio::test]
async fn workers_of_a_jobset_are_told_to_leave_too() {
    let fake = Fake::default();
    let cluster = fake.cluster();
    let options = Options { overlays: vec!["s3-secret".to_owned(), "jobset".to_owned()], ..Options::default() };
    cluster.submit(&render(RUN, "run.toml", &[], &options).unwrap()).await.unwrap();
    cluster.cancel("first", Duration::from_secs(60)).await.unwrap();
    let set = "/apis/jobset.x-k8s.io/v1alpha2/namespaces/ella/jobsets/first-workers";
    assert!(!fake.objects.lock().unwrap().contains_key(set));
}

#[tokio::test]
async fn workers_that_do_not_leave_are_waited_for_no_longer_than_said() {
    let fake = Fake::default();
    let cluster = fake.cluster();
    cluster.submit(&rendered("first")).await.unwrap();
    fake.add_pod("first-workers-0", "worker");
    *fake.looks.lock().unwrap() = u32::MAX;
    let error = cluster.cancel("first", Duration::from_millis(1)).await.unwrap_err();
    assert!(matches!(error, ClientError::Late { left: 1, .. }) && error.to_string().contains("--now"), "{error}");
    let job = fake.objects.lock().unwrap()["/apis/batch/v1/namespaces/ella/jobs/first-workers"].clone();
    assert!(job["metadata"]["deletionTimestamp"].is_string(), "a queue would take back that it is suspended");
    assert!(!cluster.cancel("first", Duration::ZERO).await.unwrap().gone.is_empty());
}

/// The label of its binding is the same.
#[tokio::test]
async fn a_run_of_the_same_name_in_another_namespace_keeps_what_is_the_whole_clusters() {
    let fake = Fake::default();
    let path = |name: &str| format!("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/{name}");
    fake.cluster().submit(&rendered("first")).await.unwrap();
    let mut other = fake.objects.lock().unwrap()[&path("ella.first.token-review")].clone();
    other["metadata"]["name"] = "ella-first.first.token-review".into();
    fake.objects.lock().unwrap().insert(path("ella-first.first.token-review"), other);
    fake.cluster().cancel("first", Duration::ZERO).await.unwrap();
    assert!(fake.objects.lock().unwrap().contains_key(&path("ella-first.first.token-review")), "of the namespace ella-first");
    assert!(!fake.objects.lock().unwrap().contains_key(&path("ella.first.token-review")));
}

#[tokio::test]
async fn what_a_user_may_not_ask_for_is_left_and_told_and_the_rest_is_taken_away() {
    let fake = Fake { forbidden: &["jobsets", "monitoring.coreos.com", "clusterrolebindings", "persistentvolumes"], ..Fake::default() };
    let options =
        Options { name: Some("first".to_owned()), namespaced_only: true, overlays: vec!["s3-secret".to_owned()], ..Options::default() };
    fake.cluster().submit(&render(RUN, "run.toml", &[], &options).unwrap()).await.unwrap();
    let taken = fake.cluster().cancel("first", Duration::ZERO).await.unwrap();
    assert_eq!(taken.left, ["JobSet", "ServiceMonitor", "PrometheusRule", "ClusterRoleBinding", "PersistentVolume"]);
    assert!(fake.objects.lock().unwrap().is_empty(), "{taken:?}");
    let fake = Fake { forbidden: &["services"], ..fake };
    fake.cluster().submit(&render(RUN, "run.toml", &[], &options).unwrap()).await.unwrap_err();
    let error = fake.cluster().cancel("first", Duration::ZERO).await.unwrap_err();
    assert!(error.to_string().contains("administrator"), "what every run has must be looked for: {error}");
}

#[tokio::test]
async fn logs_are_those_of_the_runs_own_pods() {
    let fake = Fake::default();
    let cluster = fake.cluster();
    fake.add_pod("first-coordinator-x", "coordinator");
    let mut lines = Vec::new();
    cluster.logs("first", "coordinator", false, &mut |pod, line| lines.push(format!("{pod}: {line}"))).await.unwrap();
    let path = "/api/v1/namespaces/ella/pods/first-coordinator-x/log";
    assert_eq!(lines, [format!("first-coordinator-x: one line of {path}"), "first-coordinator-x: and another".to_owned()]);
}

#[tokio::test]
async fn a_run_that_is_not_there_is_said_to_be_none() {
    let cluster = Fake::default().cluster();
    for error in [
        cluster.scale("none", 2).await.unwrap_err(),
        cluster.cancel("none", Duration::from_secs(1)).await.unwrap_err(),
        cluster.cancel("none", Duration::ZERO).await.unwrap_err(),
        cluster.logs("none", "worker", false, &mut |_, _| ()).await.unwrap_err(),
    ] {
        assert!(error.to_string().starts_with("ella/none: no workers of this name"), "{error}");
    }
}

#[tokio::test]
async fn a_jobset_is_not_resized_and_that_is_said() {
    let fake = Fake::default();
    let cluster = fake.cluster();
    let options =
        Options { name: Some("first".to_owned()), overlays: vec!["s3-secret".to_owned(), "jobset".to_owned()], ..Options::default() };
    cluster.submit(&render(RUN, "run.toml", &[], &options).unwrap()).await.unwrap();
    let error = cluster.scale("first", 2).await.unwrap_err().to_string();
    assert!(error.starts_with("ella/first: a JobSet's number of workers is fixed; cancel the run"), "{error}");
}
