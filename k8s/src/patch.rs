//! Two ways to change an object: strategic merge, which knows by what the items of Kubernetes' lists are told apart, and JSON patches.

use serde_json::{Map, Value};

/// By what the items of a list of this name are told apart; lists of other names are replaced.
fn merge_key(list: &str, items: &[Value]) -> Option<&'static str> {
    match list {
        "containers" | "initContainers" | "volumes" | "env" | "imagePullSecrets" => Some("name"),
        "volumeMounts" => Some("mountPath"),
        "topologySpreadConstraints" => Some("topologyKey"),
        "ports" if items.iter().all(|item| item.get("containerPort").is_some()) => Some("containerPort"),
        "ports" if items.iter().all(|item| item.get("targetPort").is_some()) => Some("port"),
        _ => None,
    }
}

/// Merges `patch` into `target`: maps key by key, lists item by item where Kubernetes does so; null takes a key away.
pub(crate) fn strategic(target: &mut Value, patch: &Value) {
    let Value::Object(fields) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    for (key, change) in fields {
        match (change, target.get_mut(key)) {
            (Value::Null, _) => drop(target.as_object_mut().and_then(|map| map.remove(key))),
            (Value::Array(changes), Some(Value::Array(items))) => match merge_key(key, changes) {
                Some(by) => merge_items(items, changes, by),
                None => items.clone_from(changes),
            },
            (change, Some(there)) => strategic(there, change),
            (change, None) => target[key] = without_nulls(change),
        }
    }
}

/// Items that the patch names come first, in its order, as Kustomize has it.
fn merge_items(items: &mut Vec<Value>, changes: &[Value], by: &str) {
    let mut named = Vec::new();
    for change in changes {
        let there = items.iter().position(|item| item[by] == change[by]).map(|at| items.remove(at));
        if change["$patch"] == "delete" {
            continue;
        }
        let mut item = there.unwrap_or_default();
        strategic(&mut item, change);
        named.push(item);
    }
    items.splice(0..0, named);
}

fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(map) => map.iter().filter(|(_, value)| !value.is_null()).map(|(k, v)| (k.clone(), without_nulls(v))).collect(),
        value => value.clone(),
    }
}

/// Carries out one operation of a JSON patch: add, replace or remove.
pub(crate) fn json(target: &mut Value, operation: &Value) -> Result<(), String> {
    let text = |key: &str| operation.get(key).and_then(Value::as_str).unwrap_or_default();
    let (op, path) = (text("op"), text("path"));
    let wrong = || format!("{op} {path}: there is no such place, or it is no operation that is known");
    let (parent, key) = path.rsplit_once('/').ok_or_else(wrong)?;
    let key = key.replace("~1", "/").replace("~0", "~");
    match (op, target.pointer_mut(parent).ok_or_else(wrong)?) {
        ("add", Value::Array(items)) if key == "-" => items.push(operation["value"].clone()),
        ("replace", Value::Array(items)) => {
            let item = key.parse().ok().and_then(|at: usize| items.get_mut(at)).ok_or_else(wrong)?;
            item.clone_from(&operation["value"]);
        }
        ("add", Value::Object(map)) => drop(map.insert(key, operation["value"].clone())),
        ("replace", Value::Object(map)) if map.contains_key(&key) => drop(map.insert(key, operation["value"].clone())),
        ("remove", Value::Object(map)) => drop(map.remove(&key).ok_or_else(wrong)?),
        _ => return Err(wrong()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn lists_are_merged_where_kubernetes_does_and_replaced_elsewhere() {
        let mut target = json!({ "env": [{ "name": "A", "value": "1" }, { "name": "B", "value": "2" }, { "name": "D" }], "args": ["x", "y"], "gone": 1 });
        let patch = json!({ "env": [{ "name": "B", "value": "3" }, { "name": "C", "value": "4" }, { "name": "D", "$patch": "delete" }], "args": ["z"], "gone": null, "new": { "n": null } });
        strategic(&mut target, &patch);
        let env = json!([{ "name": "B", "value": "3" }, { "name": "C", "value": "4" }, { "name": "A", "value": "1" }]);
        assert_eq!(target, json!({ "env": env, "args": ["z"], "new": {} }));
    }

    #[test]
    fn ports_are_told_apart_by_what_they_are_of() {
        let mut container = json!({ "ports": [{ "name": "a", "containerPort": 1 }] });
        strategic(&mut container, &json!({ "ports": [{ "containerPort": 1, "protocol": "TCP" }] }));
        assert_eq!(container, json!({ "ports": [{ "name": "a", "containerPort": 1, "protocol": "TCP" }] }));
        let mut policy = json!({ "ports": [{ "port": 1 }] });
        strategic(&mut policy, &json!({ "ports": [{ "port": 2 }] }));
        assert_eq!(policy, json!({ "ports": [{ "port": 2 }] }), "a network policy's are replaced");
    }

    #[test]
    fn json_patches_do_as_they_say_or_are_errors() {
        let mut target = json!({ "a": { "b/c": 1 }, "l": [1] });
        for operation in [
            json!({ "op": "add", "path": "/l/-", "value": 2 }),
            json!({ "op": "replace", "path": "/l/0", "value": 0 }),
            json!({ "op": "replace", "path": "/a/b~1c", "value": 2 }),
            json!({ "op": "add", "path": "/a/d", "value": 3 }),
        ] {
            assert_eq!(json(&mut target, &operation), Ok(()), "{operation}");
        }
        assert_eq!(target, json!({ "a": { "b/c": 2, "d": 3 }, "l": [0, 2] }));
        for operation in [
            json!({ "op": "replace", "path": "/a/none", "value": 1 }),
            json!({ "op": "remove", "path": "/a/none" }),
            json!({ "op": "add", "path": "/none/x", "value": 1 }),
            json!({ "op": "replace", "path": "/l/9", "value": 1 }),
            json!({ "op": "move", "path": "/a" }),
        ] {
            assert!(json(&mut target, &operation).is_err(), "{operation}");
        }
    }
}
