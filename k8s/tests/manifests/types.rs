//! Every manifest is what Kubernetes' API types say, with no field that they do not know.

use crate::common::{everything, text};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::batch::v1::{Job, JobTemplateSpec};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, PersistentVolume, PersistentVolumeClaim, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use k8s_openapi::api::scheduling::v1::PriorityClass;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// Parses it, and finds what parsing left behind: fields that the type does not have.
fn same<T: DeserializeOwned + Serialize>(value: &Value) -> Result<(), String> {
    let typed: T = serde_json::from_value(value.clone()).map_err(|error| error.to_string())?;
    let back = serde_json::to_value(typed).unwrap();
    if back == *value { Ok(()) } else { Err(format!("fields that are not known\n{value:#}\n{back:#}")) }
}

/// As much of jobset.x-k8s.io/v1alpha2 as is used.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct JobSet {
    api_version: String,
    kind: String,
    metadata: ObjectMeta,
    spec: JobSetSpec,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct JobSetSpec {
    network: Value,
    success_policy: Value,
    replicated_jobs: Vec<ReplicatedJob>,
    #[serde(skip_serializing_if = "Option::is_none")]
    suspend: Option<bool>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct ReplicatedJob {
    name: String,
    replicas: u32,
    template: JobTemplateSpec,
}

/// As much of monitoring.coreos.com/v1 as is used.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct ServiceMonitor {
    api_version: String,
    kind: String,
    metadata: ObjectMeta,
    spec: ServiceMonitorSpec,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct ServiceMonitorSpec {
    selector: LabelSelector,
    endpoints: Vec<Endpoint>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Endpoint {
    port: String,
    path: String,
    interval: String,
    scrape_timeout: String,
    authorization: Value,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct PrometheusRule {
    api_version: String,
    kind: String,
    metadata: ObjectMeta,
    spec: RuleGroups,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleGroups {
    groups: Vec<RuleGroup>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleGroup {
    name: String,
    rules: Vec<AlertRule>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AlertRule {
    alert: String,
    expr: String,
    #[serde(rename = "for", skip_serializing_if = "Option::is_none")]
    lasts: Option<String>,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
}

fn check(object: &Value) -> Result<(), String> {
    match (text(object, "/apiVersion"), text(object, "/kind")) {
        ("v1", "Namespace") => same::<Namespace>(object),
        ("v1", "ConfigMap") => same::<ConfigMap>(object),
        ("v1", "Service") => same::<Service>(object),
        ("v1", "ServiceAccount") => same::<ServiceAccount>(object),
        ("v1", "PersistentVolume") => same::<PersistentVolume>(object),
        ("v1", "PersistentVolumeClaim") => same::<PersistentVolumeClaim>(object),
        ("apps/v1", "Deployment") => same::<Deployment>(object),
        ("batch/v1", "Job") => same::<Job>(object),
        ("networking.k8s.io/v1", "NetworkPolicy") => same::<NetworkPolicy>(object),
        ("policy/v1", "PodDisruptionBudget") => same::<PodDisruptionBudget>(object),
        ("rbac.authorization.k8s.io/v1", "Role") => same::<Role>(object),
        ("rbac.authorization.k8s.io/v1", "RoleBinding") => same::<RoleBinding>(object),
        ("rbac.authorization.k8s.io/v1", "ClusterRole") => same::<ClusterRole>(object),
        ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding") => same::<ClusterRoleBinding>(object),
        ("scheduling.k8s.io/v1", "PriorityClass") => same::<PriorityClass>(object),
        ("jobset.x-k8s.io/v1alpha2", "JobSet") => same::<JobSet>(object),
        ("monitoring.coreos.com/v1", "ServiceMonitor") => same::<ServiceMonitor>(object),
        ("monitoring.coreos.com/v1", "PrometheusRule") => same::<PrometheusRule>(object),
        (version, kind) => Err(format!("no type is known for {version} {kind}")),
    }
}

#[test]
fn every_manifest_is_what_its_type_says() {
    for (name, objects) in everything() {
        for object in &objects {
            check(object).unwrap_or_else(|error| panic!("{name}: {} {}: {error}", text(object, "/kind"), text(object, "/metadata/name")));
        }
    }
}

#[test]
fn a_field_that_no_type_has_is_found() {
    let (_, objects) = everything().swap_remove(0);
    let mut job = objects.into_iter().find(|object| text(object, "/kind") == "Job").unwrap();
    check(&job).unwrap();
    job["spec"]["template"]["spec"]["containers"][0]["imagePulPolicy"] = "Never".into();
    assert!(check(&job).unwrap_err().contains("imagePulPolicy"));
}
