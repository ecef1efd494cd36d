//! As much of Kustomize as our own files use: resources, components, config maps from files, strategic merges and JSON patches (RFC 6902).
//! What else a kustomization may hold is refused. `kubectl kustomize` makes the same of the same files, which an opt-in test compares.

use crate::files;
use crate::patch;
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// Why a folder can't be built: a fault of our own files, which tests find.
#[derive(Debug, thiserror::Error)]
#[error("k8s/{file}: {reason}")]
pub struct KustomizeError {
    /// Which file.
    pub file: String,
    /// What is wrong with it.
    pub reason: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Kustomization {
    #[serde(rename = "apiVersion")]
    _api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    #[serde(default)]
    resources: Vec<String>,
    #[serde(default)]
    components: Vec<String>,
    #[serde(default)]
    patches: Vec<Patch>,
    #[serde(default)]
    config_map_generator: Vec<Generator>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Patch {
    path: Option<String>,
    patch: Option<String>,
    target: Option<Target>,
}

/// Kinds and names are alternatives, separated by `|`; a name may end in `.*`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Target {
    kind: String,
    name: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Generator {
    name: String,
    namespace: String,
    /// `FILE`, or `KEY=FILE`.
    files: Vec<String>,
    options: Options,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Options {
    disable_name_suffix_hash: bool,
    #[serde(default)]
    labels: Map<String, Value>,
    #[serde(default)]
    annotations: Map<String, Value>,
}

/// Builds a folder, and applies the components that are named besides.
///
/// # Errors
/// If there is no such folder, or one of its files holds what is not understood.
pub fn build(folder: &str, components: &[&str]) -> Result<Vec<Value>, KustomizeError> {
    let mut objects = Vec::new();
    apply(folder, &mut objects)?;
    components.iter().try_for_each(|name| change(&mut objects, name))?;
    Ok(objects)
}

/// Applies one more component to what was built.
pub(crate) fn change(objects: &mut Vec<Value>, component: &str) -> Result<(), KustomizeError> {
    apply(&format!("components/{component}"), objects)
}

/// The objects of a YAML text.
pub(crate) fn parse(file: &str, text: &str) -> Result<Vec<Value>, KustomizeError> {
    serde_saphyr::from_multiple(text).map_err(|error| KustomizeError { file: file.to_owned(), reason: error.to_string() })
}

/// What identifies an object: kind, namespace and name.
pub(crate) fn id(object: &Value) -> [&str; 3] {
    let text = |pointer| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    [text("/kind"), text("/metadata/namespace"), text("/metadata/name")]
}

fn apply(folder: &str, objects: &mut Vec<Value>) -> Result<(), KustomizeError> {
    let file = format!("{folder}/kustomization.yaml");
    let wrong = |reason: String| KustomizeError { file: file.clone(), reason };
    let kustomization: Kustomization = serde_saphyr::from_str(read(&file)?).map_err(|error| wrong(error.to_string()))?;
    for resource in &kustomization.resources {
        let path = join(folder, resource);
        if path.ends_with(".yaml") { objects.extend(parse(&path, read(&path)?)?) } else { apply(&path, objects)? }
    }
    for component in &kustomization.components {
        apply(&join(folder, component), objects)?;
    }
    for generator in &kustomization.config_map_generator {
        objects.push(generate(folder, generator)?);
    }
    for patch in &kustomization.patches {
        patch.apply(folder, objects).map_err(|error| wrong(error.to_string()))?;
    }
    Ok(())
}

fn read(path: &str) -> Result<&'static str, KustomizeError> {
    files::text(path).ok_or_else(|| KustomizeError { file: path.to_owned(), reason: "there is no such file".to_owned() })
}

/// `folder` and a path that may begin with `../`.
fn join(folder: &str, path: &str) -> String {
    let mut parts: Vec<&str> = folder.split('/').collect();
    for part in path.split('/') {
        match part {
            ".." => drop(parts.pop()),
            "." => {}
            part => parts.push(part),
        }
    }
    parts.join("/")
}

fn generate(folder: &str, generator: &Generator) -> Result<Value, KustomizeError> {
    let mut data = Map::new();
    for entry in &generator.files {
        let (key, file) = entry.split_once('=').unwrap_or((entry.rsplit('/').next().unwrap_or(entry), entry));
        data.insert(key.to_owned(), read(&join(folder, file))?.into());
    }
    let options = &generator.options;
    if !options.disable_name_suffix_hash {
        return Err(KustomizeError { file: format!("{folder}/kustomization.yaml"), reason: "names with hashes are not made".to_owned() });
    }
    let mut metadata = json!({ "name": generator.name, "namespace": generator.namespace });
    for (key, values) in [("labels", &options.labels), ("annotations", &options.annotations)] {
        if !values.is_empty() {
            metadata[key] = values.clone().into();
        }
    }
    Ok(json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data }))
}

impl Patch {
    fn apply(&self, folder: &str, objects: &mut Vec<Value>) -> Result<(), KustomizeError> {
        let inline = |text: &str| parse(folder, text);
        let bodies = match (&self.path, &self.patch) {
            (Some(path), None) => parse(path, read(&join(folder, path))?)?,
            (None, Some(text)) => inline(text)?,
            _ => return Err(KustomizeError { file: folder.to_owned(), reason: "a patch has either path or patch".to_owned() }),
        };
        for body in &bodies {
            self.apply_one(body, objects).map_err(|reason| KustomizeError { file: folder.to_owned(), reason })?;
        }
        Ok(())
    }

    fn apply_one(&self, body: &Value, objects: &mut Vec<Value>) -> Result<(), String> {
        let meant = |object: &Value| match &self.target {
            Some(target) => target.means(object),
            None => id(object)[0] == id(body)[0] && id(object)[2] == id(body)[2],
        };
        if self.target.is_none() && !objects.iter().any(meant) {
            return Err(format!("there is no {} that could be patched", id(body).join(" ")));
        }
        if body["$patch"] == "delete" {
            objects.retain(|object| !meant(object));
            return Ok(());
        }
        for object in objects.iter_mut().filter(|object| meant(object)) {
            match body.as_array() {
                Some(operations) => operations.iter().try_for_each(|operation| patch::json(object, operation))?,
                None => patch::strategic(object, body),
            }
        }
        Ok(())
    }
}

impl Target {
    fn means(&self, object: &Value) -> bool {
        let [kind, _, name] = id(object);
        let like = |pattern: &str, text: &str| match pattern.strip_suffix(".*") {
            Some(prefix) => text.starts_with(prefix),
            None => pattern == text,
        };
        self.kind.split('|').any(|pattern| like(pattern, kind)) && self.name.as_ref().is_none_or(|pattern| like(pattern, name))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_folder_builds_and_what_is_not_understood_is_refused() {
        for overlay in files::overlays() {
            let objects = build(&format!("overlays/{overlay}"), &[]).unwrap();
            assert!(objects.len() >= 20, "{overlay}: {}", objects.len());
        }
        assert!(build("overlays/none", &[]).unwrap_err().to_string().contains("there is no such file"));
        let unknown: Result<Kustomization, _> = serde_saphyr::from_str("apiVersion: a\nkind: b\nnamePrefix: c\n");
        assert!(unknown.unwrap_err().to_string().contains("namePrefix"));
    }

    #[test]
    fn a_patch_that_nothing_is_meant_by_is_an_error_unless_it_has_a_target() {
        let body = json!({ "kind": "Job", "metadata": { "name": "other" } });
        let own = Patch { path: None, patch: None, target: None };
        assert!(own.apply_one(&body, &mut vec![]).is_err());
        let targeted = Patch { target: Some(Target { kind: "Job|JobSet".to_owned(), name: Some("tr.*".to_owned()) }), ..own };
        let mut objects =
            vec![json!({ "kind": "Job", "metadata": { "name": "train" } }), json!({ "kind": "Job", "metadata": { "name": "x" } })];
        targeted.apply_one(&json!([{ "op": "add", "path": "/a", "value": 1 }]), &mut objects).unwrap();
        assert_eq!((&objects[0]["a"], objects[1].get("a")), (&json!(1), None));
    }
}
