//! What must hold for every rendering and every overlay: no rights beyond need, and every name resolves.

use crate::common::{cases, everything, template, text};
use serde_json::{Value, json};
use std::collections::BTreeSet;

fn items<'a>(value: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    value.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

/// All pod templates, with the name of where they are.
fn templates(all: &[(String, Vec<Value>)]) -> impl Iterator<Item = (String, &Value)> {
    all.iter().flat_map(|(name, objects)| {
        objects.iter().filter_map(move |object| Some((format!("{name}: {}", text(object, "/kind")), template(object)?)))
    })
}

#[test]
fn pods_keep_the_restricted_policy_and_more() {
    let all = everything();
    assert_eq!(templates(&all).count(), 2 * all.len());
    for (name, template) in templates(&all) {
        let pod = &template["spec"];
        for forbidden in ["hostNetwork", "hostPID", "hostIPC", "hostUsers", "shareProcessNamespace"] {
            assert!(pod.get(forbidden).is_none(), "{name}: {forbidden}");
        }
        let security = &pod["securityContext"];
        assert_eq!(
            (&security["runAsNonRoot"], &security["runAsUser"], &security["runAsGroup"]),
            (&json!(true), &json!(10001), &json!(10001))
        );
        assert_eq!(security["seccompProfile"], json!({ "type": "RuntimeDefault" }), "{name}");
        for volume in items(pod, "/volumes") {
            let kinds = ["configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"];
            assert!(kinds.iter().any(|kind| volume.get(kind).is_some()), "{name}: {volume}: not of the restricted kinds");
            if let Some(size) = volume.get("emptyDir") {
                assert!(size.get("sizeLimit").is_some(), "{name}: {volume} has no limit");
            }
        }
        for container in items(pod, "/containers").chain(items(pod, "/initContainers")) {
            let own = &container["securityContext"];
            let expected = json!({
                "allowPrivilegeEscalation": false, "privileged": false, "readOnlyRootFilesystem": true, "capabilities": { "drop": ["ALL"] },
            });
            assert_eq!(*own, expected, "{name}");
            for amount in ["/resources/requests/cpu", "/resources/requests/memory", "/resources/limits/cpu", "/resources/limits/memory"] {
                assert!(!text(container, amount).is_empty(), "{name}: {amount}");
            }
            assert!(container.get("lifecycle").is_none(), "{name}: ella leaves by SIGTERM alone");
            assert_eq!(text(container, "/imagePullPolicy"), "IfNotPresent", "{name}: imported images are used");
            let (_, tag) = text(container, "/image").rsplit_once(':').unwrap();
            assert!(!tag.is_empty() && tag != "latest", "{name}: {tag}");
        }
    }
}

#[test]
fn the_coordinator_is_probed_and_workers_are_watched_from_within() {
    for (name, template) in templates(&everything()) {
        let container = &template["spec"]["containers"][0];
        let probes = ["startupProbe", "readinessProbe", "livenessProbe"].map(|probe| container.get(probe).is_some());
        match text(container, "/name") {
            "coordinator" => {
                assert_eq!(probes, [true; 3], "{name}");
                let ports: BTreeSet<&str> = items(container, "/ports").map(|port| text(port, "/name")).collect();
                assert!(ports.contains(text(container, "/startupProbe/httpGet/port")), "{name}");
            }
            "worker" => assert_eq!(probes, [false; 3], "{name}"),
            other => panic!("{name}: {other}"),
        }
    }
}

#[test]
fn only_the_coordinator_may_ask_the_cluster_and_little() {
    for (name, objects) in everything() {
        for object in &objects {
            if let Some(template) = template(object) {
                let worker = text(&template["spec"], "/containers/0/name") == "worker";
                assert_eq!(template["spec"]["automountServiceAccountToken"], json!(!worker), "{name}");
            }
            for rule in items(object, "/rules") {
                let rights: Vec<(&str, &str)> = items(rule, "/resources")
                    .flat_map(|r| items(rule, "/verbs").map(move |v| (r.as_str().unwrap(), v.as_str().unwrap())))
                    .collect();
                assert_eq!(rights.len(), 1, "{name}: {rule}");
                let known = [("tokenreviews", "create"), ("jobs", "patch"), ("jobsets", "patch")];
                assert!(known.contains(&rights[0]), "{name}: {rights:?}");
                assert!(rights[0].1 != "patch" || rule["resourceNames"].as_array().is_some_and(|names| names.len() == 1), "{name}");
            }
        }
    }
}

#[test]
fn tokens_are_reviewed_by_who_asks_for_them_alone() {
    for (name, objects) in everything().into_iter().filter(|(name, _)| !name.contains("claim")) {
        let reviews = objects.iter().filter_map(template).any(|pod| env(&pod["spec"], "ELLA_TOKEN_REVIEW").is_some());
        for kind in ["ClusterRole", "ClusterRoleBinding"] {
            assert_eq!(objects.iter().any(|object| text(object, "/kind") == kind), reviews, "{name}: {kind}");
        }
    }
}

/// A shard's features are gathered there: a gibibyte and more.
#[test]
fn temporary_files_of_workers_are_on_a_disk() {
    for (name, template) in templates(&everything()) {
        let pod = &template["spec"];
        if text(pod, "/containers/0/name") != "worker" {
            continue;
        }
        let folder = env(pod, "TMPDIR").unwrap_or_else(|| panic!("{name}: no TMPDIR"));
        let mount = items(pod, "/containers/0/volumeMounts").find(|mount| mount["mountPath"] == folder).unwrap();
        let volume = items(pod, "/volumes").find(|volume| volume["name"] == mount["name"]).unwrap();
        assert!(volume.get("emptyDir").is_some_and(|size| size.get("medium").is_none()), "{name}: {volume}");
    }
}

/// Whether a pod with these labels is selected.
fn selects(selector: &Value, labels: &Value) -> bool {
    selector.as_object().unwrap().iter().all(|(key, value)| labels.get(key) == Some(value))
}

#[test]
fn every_name_label_and_port_resolves() {
    for (name, objects) in everything() {
        let rendered_alone = name.contains("claim");
        let is = |kind: &str, wanted: &str| objects.iter().any(|o| text(o, "/kind") == kind && text(o, "/metadata/name") == wanted);
        let pods: Vec<&Value> = objects.iter().filter_map(template).collect();
        for object in &objects {
            let (kind, own) = (text(object, "/kind"), text(object, "/metadata/name"));
            let told = format!("{name}: {kind} {own}");
            if let Some(template) = template(object) {
                resolve_pod(&told, &template["spec"], &is, rendered_alone);
            }
            let selector = match kind {
                "Service" => Some(&object["spec"]["selector"]),
                "NetworkPolicy" => Some(&object["spec"]["podSelector"]["matchLabels"]),
                "Deployment" | "PodDisruptionBudget" => Some(&object["spec"]["selector"]["matchLabels"]),
                _ => None,
            };
            if let Some(selector) = selector {
                assert!(pods.iter().any(|pod| selects(selector, &pod["metadata"]["labels"])), "{told}: selects no pod");
            }
            if kind == "Service" {
                let pod = pods.iter().find(|pod| selects(&object["spec"]["selector"], &pod["metadata"]["labels"])).unwrap();
                let names: BTreeSet<&str> = items(&pod["spec"], "/containers/0/ports").map(|port| text(port, "/name")).collect();
                assert!(items(object, "/spec/ports").all(|port| names.contains(text(port, "/targetPort"))), "{told}");
            }
            if kind.ends_with("Binding") {
                assert!(is(text(object, "/roleRef/kind"), text(object, "/roleRef/name")), "{told}");
                assert!(
                    items(object, "/subjects").all(|s| is("ServiceAccount", text(s, "/name")) && s["namespace"] != json!(null)),
                    "{told}"
                );
            }
            if kind == "Role" {
                let target = items(object, "/rules/0/resourceNames").next().unwrap().as_str().unwrap();
                let path = pods.iter().find_map(|pod| env(&pod["spec"], "ELLA_PROGRESS_TO")).unwrap();
                assert!(is("Job", target) || is("JobSet", target), "{told}");
                let namespace = text(object, "/metadata/namespace");
                assert!(path.contains(&format!("/namespaces/{namespace}/")) && path.ends_with(&format!("/{target}")), "{told}: {path}");
            }
            if kind == "ServiceMonitor" {
                assert!(objects.iter().any(|o| text(o, "/kind") == "Service"
                    && selects(&object["spec"]["selector"]["matchLabels"], &o["metadata"]["labels"])
                    && items(o, "/spec/ports").any(|port| port["name"] == object["spec"]["endpoints"][0]["port"])));
            }
        }
    }
}

fn env<'a>(pod: &'a Value, name: &str) -> Option<&'a str> {
    items(pod, "/containers/0/env").find(|variable| variable["name"] == name).map(|variable| text(variable, "/value"))
}

fn resolve_pod(told: &str, pod: &Value, is: &dyn Fn(&str, &str) -> bool, namespaced_only: bool) {
    assert!(is("ServiceAccount", text(pod, "/serviceAccountName")), "{told}");
    assert!(namespaced_only || is("PriorityClass", text(pod, "/priorityClassName")), "{told}");
    let subdomain = text(pod, "/subdomain");
    assert!(subdomain.is_empty() || is("Service", subdomain), "{told}");
    let mounts: BTreeSet<&str> = items(pod, "/containers/0/volumeMounts").map(|mount| text(mount, "/name")).collect();
    let volumes: BTreeSet<&str> = items(pod, "/volumes").map(|volume| text(volume, "/name")).collect();
    assert_eq!(mounts, volumes, "{told}");
    for volume in items(pod, "/volumes") {
        let config = text(volume, "/configMap/name");
        assert!(config.is_empty() || is("ConfigMap", config), "{told}: {config}");
        let secret = text(volume, "/secret/secretName");
        assert!(secret.is_empty() || ["ella-viewer", "ella-coordinator-tls", "ella-worker-tls"].contains(&secret), "{told}: {secret}");
        let claim = text(volume, "/persistentVolumeClaim/claimName");
        assert!(claim.is_empty() || claim == "shared" || is("PersistentVolumeClaim", claim), "{told}: {claim}");
    }
    if let Some(url) = env(pod, "ELLA_COORDINATOR") {
        let (host, port) = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://")).unwrap().rsplit_once(':').unwrap();
        assert!(is("Service", host) && port == "7000", "{told}: {url}");
    }
    let own_port = text(pod, "/containers/0/name") == "worker";
    let listens = env(pod, "ELLA_LISTEN").unwrap().rsplit_once(':').unwrap().1;
    let expected = if own_port { "7100" } else { "7000" };
    assert_eq!(listens, expected, "{told}");
    assert!(items(pod, "/containers/0/ports").any(|port| port["containerPort"].as_u64() == listens.parse().ok()), "{told}");
}

#[test]
fn a_rendering_has_nothing_of_the_name_that_our_files_have() {
    for case in cases() {
        let yaml = case.rendered.to_yaml().unwrap();
        assert!(!yaml.contains("train-") && !yaml.contains("REPLACE"), "{}", case.name);
        let (name, namespace) = (&case.rendered.name, &case.rendered.namespace);
        for object in &case.rendered.objects {
            let labels = &object["metadata"]["labels"];
            let shared = labels.get("app.kubernetes.io/instance").is_none();
            let own = text(object, "/metadata/name");
            let whole = ella_k8s::CLUSTER_SCOPED.contains(&text(object, "/kind"));
            if shared {
                assert!(whole, "{}: {own} goes with no run", case.name);
            } else {
                // What belongs to no namespace is taken away by these names: `cancel`, and section 10 of docs/kubernetes.md.
                let known = ["token-review", "data"].map(|of| format!("{namespace}.{name}.{of}"));
                let named = if whole { known.iter().any(|known| known == own) } else { own.starts_with(&format!("{name}-")) };
                assert!(named && labels["app.kubernetes.io/instance"] == **name, "{}: {own}", case.name);
            }
            assert!(whole || text(object, "/metadata/namespace") == *namespace, "{}: {own}", case.name);
        }
    }
}

#[test]
fn the_jobset_holds_the_bases_job() {
    let base = ella_k8s::build("base", &[]).unwrap();
    let set = ella_k8s::build("overlays/jobset", &[]).unwrap();
    let job = base.iter().find(|object| text(object, "/kind") == "Job").unwrap();
    let set = set.iter().find(|object| text(object, "/kind") == "JobSet").unwrap();
    assert_eq!(set["spec"]["replicatedJobs"][0]["template"]["spec"], job["spec"]);
}
