//! From the names that our files have to a run's own.

use crate::kustomize::id;
use serde_json::Value;

/// What every name in our files begins with.
const OURS: &str = "train";
/// The namespace in our files.
pub(crate) const NAMESPACE: &str = "ella";

/// Renames all objects, and all that refers to them: names that begin with `train-`, or for objects of the whole cluster with `ella.train.`,
/// the label of the instance, and the namespace.
pub(crate) fn rename(objects: &mut [Value], name: &str, namespace: &str) {
    for object in objects {
        if id(object)[0] == "Namespace" {
            object["metadata"]["name"] = namespace.into();
        }
        walk(object, "", name, namespace);
    }
}

fn walk(value: &mut Value, key: &str, name: &str, namespace: &str) {
    match value {
        Value::Object(map) => map.iter_mut().for_each(|(key, value)| walk(value, key, name, namespace)),
        Value::Array(items) => items.iter_mut().for_each(|item| walk(item, key, name, namespace)),
        Value::String(text) => {
            let renamed = match key {
                "namespace" if text == NAMESPACE => namespace.to_owned(),
                "app.kubernetes.io/instance" if text == OURS => name.to_owned(),
                _ => renamed(text, name, namespace),
            };
            *text = renamed;
        }
        _ => {}
    }
}

fn renamed(text: &str, name: &str, namespace: &str) -> String {
    let text = text.replace(&whole(NAMESPACE, OURS, ""), &whole(namespace, name, ""));
    let text = replace(&text, &format!("{OURS}-"), &format!("{name}-"));
    let text = text.replace(&format!("/namespaces/{NAMESPACE}/"), &format!("/namespaces/{namespace}/"));
    // Service accounts, in TOML.
    text.replace(&format!("\"{NAMESPACE}/"), &format!("\"{namespace}/"))
}

/// The name of a run's object that belongs to the whole cluster. No namespace and no run has a dot in its name, so it is that of one run.
pub(crate) fn whole(namespace: &str, name: &str, of: &str) -> String {
    format!("{namespace}.{name}.{of}")
}

/// Replaces `from` where a name begins with it.
fn replace(text: &str, from: &str, to: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(from) {
        let (before, after) = rest.split_at(at);
        out += before;
        let within = out.ends_with(|c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.');
        out += if within { from } else { to };
        rest = &after[from.len()..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn names_and_what_refers_to_them_are_renamed_together() {
        let mut objects = vec![json!({
            "kind": "Job",
            "metadata": { "name": "train-workers", "namespace": "ella", "labels": { "app.kubernetes.io/instance": "train", "app.kubernetes.io/name": "ella" } },
            "url": "http://train-coordinator:7000",
            "path": "/apis/batch/v1/namespaces/ella/jobs/train-workers",
            "binding": "ella.train.token-review",
            "other": "constrain-train-x ella-worker",
        })];
        rename(&mut objects, "ella-train-2", "team");
        let labels = json!({ "app.kubernetes.io/instance": "ella-train-2", "app.kubernetes.io/name": "ella" });
        assert_eq!(
            objects[0],
            json!({
                "kind": "Job",
                "metadata": { "name": "ella-train-2-workers", "namespace": "team", "labels": labels },
                "url": "http://ella-train-2-coordinator:7000",
                "path": "/apis/batch/v1/namespaces/team/jobs/ella-train-2-workers",
                "binding": "team.ella-train-2.token-review",
                "other": "constrain-train-x ella-worker",
            })
        );
    }
}
