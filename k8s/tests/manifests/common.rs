//! What the tests render: runs and jobs as people would have them, and every overlay as it is.

use ella_k8s::{Options, Rendered, build, overlays, render};
use serde_json::Value;

/// A run in object stores.
pub(crate) const RUN: &str = r#"
[run]
output = "s3://bucket/runs/first"
seed = 7
[base]
model = "org/sd15"
[text]
model = "org/t5"
[data]
path = "s3://bucket/data/mine"
[train]
global_batch = 32
micro_batch = 4
[workers]
count = 4
"#;

/// A run in a folder that all nodes share.
pub(crate) const SHARED: &str = r#"
[run]
output = "runs/first"
[base]
model = "models/nano/base"
[text]
model = "models/nano/text"
[data]
path = "data/scenes"
[workers]
count = 2
device = "cpu"
"#;

pub(crate) const PREPARE: &str = r#"
[job]
kind = "prepare"
data = "/srv/ella/data/scenes"
[prepare]
sources = ["/srv/ella/raw"]
"#;

pub(crate) const EMBED: &str = r#"
[job]
kind = "embed"
data = "s3://bucket/data/mine"
[embed]
text = "org/t5"
"#;

/// One rendering, by the name of its snapshot.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) rendered: Rendered,
}

pub(crate) fn options(overlays: &[&str]) -> Options {
    Options { overlays: overlays.iter().map(|overlay| (*overlay).to_owned()).collect(), ..Options::default() }
}

/// All renderings.
pub(crate) fn cases() -> Vec<Case> {
    let shared = |options: Options| Options { volume: Some("nfs:10.0.0.1:/srv/ella".parse().unwrap()), ..options };
    let text = |text: &str| Some(text.to_owned());
    let case = |name, config: &str, options: &Options| {
        let rendered = render(config, "the config", &[], options).unwrap_or_else(|error| panic!("{name}: {error}"));
        Case { name, rendered }
    };
    let identity = Options { identity: text("identity@example"), ..options(&[]) };
    let cloud = |overlay: &str| Options { overlays: vec![overlay.to_owned()], ..identity.clone() };
    let sized = Options { cpu: text("500m"), memory: text("1Gi"), save_seconds: Some(40.0), ..options(&["s3-secret"]) };
    let spot = Options { env: vec![("AWS_REGION".into(), "eu-central-1".into())], ..cloud("s3") };
    let spot = Options { overlays: vec!["s3".into(), "spot-gpu".into(), "prometheus".into()], namespace: text("team"), ..spot };
    let queued = Options { queue: text("gpus"), ..options(&["s3-secret", "jobset", "kueue", "spot-gpu", "ipv6"]) };
    let claimed = Options { volume: Some("claim:shared".parse().unwrap()), namespaced_only: true, ..options(&["local"]) };
    vec![
        case("run-s3-secret", RUN, &sized),
        case("run-spot", RUN, &spot),
        case("run-queued", RUN, &queued),
        case("run-mtls", RUN, &options(&["mtls", "s3-secret"])),
        case("run-gcs", RUN, &cloud("gcs")),
        case("run-azure", RUN, &cloud("azure")),
        case("run-local", SHARED, &options(&["local"])),
        case("run-claim", SHARED, &claimed),
        case("run-gpu", SHARED, &shared(Options { gpus: Some(1), egress: vec![9443], env: odd(), ..options(&["kueue"]) })),
        case("prepare", PREPARE, &shared(Options { workers: Some(3), ..options(&[]) })),
        case("embed", EMBED, &Options { name: text("embed-2"), gpus: Some(1), ..options(&["s3-secret"]) }),
    ]
}

/// Values that a reader of YAML 1.1 or 1.2 may take for something else than text.
fn odd() -> Vec<(String, String)> {
    let values = [
        "yes",
        "no",
        "on",
        "y",
        "true",
        "null",
        "~",
        "",
        "012",
        "0x1f",
        "0o17",
        "1e3",
        "1_000",
        ".5",
        ".inf",
        "12:30:45",
        "2026-01-01",
        "=",
        "<<",
        "a: b",
        "- x",
        "#",
        "a #b",
        "'",
        "\"",
        "*a",
        "&a",
        "!a",
        "%a",
        "@a",
        "`a",
        "{",
        "[",
        ",",
        "?",
        "|",
        ">",
        " a ",
        "a\nb\n",
        "\u{e9}",
    ];
    values.iter().enumerate().map(|(at, value)| (format!("ODD_{at}"), (*value).to_owned())).collect()
}

/// All renderings, and all overlays as they are, by name.
pub(crate) fn everything() -> Vec<(String, Vec<Value>)> {
    let own = overlays().map(|overlay| (format!("overlays/{overlay}"), build(&format!("overlays/{overlay}"), &[]).unwrap()));
    let rendered = cases().into_iter().map(|case| (case.name.to_owned(), case.rendered.objects));
    own.chain(rendered).collect()
}

/// The text at a pointer; empty if there is none.
pub(crate) fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// The pod templates of an object.
pub(crate) fn template(object: &Value) -> Option<&Value> {
    let of = |pointer: &str| object.pointer(pointer).filter(|template| template.is_object());
    of("/spec/template").or_else(|| of("/spec/replicatedJobs/0/template/spec/template"))
}
