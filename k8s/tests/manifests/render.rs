//! What `ella k8s render` makes of a config: snapshots in `tests/snapshots`, which UPDATE_SNAPSHOTS=1 writes anew; and what it refuses.

use crate::common::{PREPARE, RUN, SHARED, cases, options, template, text};
use ella_k8s::{FILES, Options, Rendered, render};
use serde_json::{Value, json};
use std::path::Path;

#[test]
fn renderings_are_as_they_were() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots");
    for case in cases() {
        let (path, yaml) = (folder.join(format!("{}.yaml", case.name)), case.rendered.to_yaml().unwrap());
        if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
            std::fs::write(&path, &yaml).unwrap();
        }
        let before = std::fs::read_to_string(&path).unwrap_or_default();
        let differs = before.lines().zip(yaml.lines()).position(|(old, new)| old != new);
        assert!(
            before == yaml,
            "{}: differs from line {differs:?} on; look at it, and write it anew with UPDATE_SNAPSHOTS=1",
            path.display()
        );
    }
}

#[test]
fn yaml_reads_back_as_what_was_rendered() {
    for case in cases() {
        let back: Vec<Value> = serde_saphyr::from_multiple(&case.rendered.to_yaml().unwrap()).unwrap();
        assert_eq!(back, case.rendered.objects, "{}", case.name);
    }
}

#[test]
fn every_file_of_the_folders_is_built_in() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let mut folders = ["base", "components", "overlays"].map(|name| root.join(name)).to_vec();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() { folders.push(entry) } else { found.push(entry.strip_prefix(root).unwrap().display().to_string()) }
        }
    }
    found.sort();
    let mut built: Vec<&str> = FILES.iter().map(|(path, _)| *path).collect();
    built.sort_unstable();
    assert_eq!(found, built);
}

fn rendered(config: &str, set: &[&str], options: &Options) -> Result<Rendered, String> {
    let set: Vec<String> = set.iter().map(|item| (*item).to_owned()).collect();
    render(config, "run.toml", &set, options).map_err(|error| error.to_string())
}

fn find<'a>(rendered: &'a Rendered, kind: &str) -> Option<&'a Value> {
    rendered.objects.iter().find(|object| text(object, "/kind") == kind)
}

#[test]
fn the_config_sizes_the_workers() {
    let four = rendered(RUN, &[], &options(&["s3-secret"])).unwrap();
    let job = find(&four, "Job").unwrap();
    assert_eq!((&job["spec"]["completions"], &job["spec"]["parallelism"]), (&json!(4), &json!(4)));
    assert_eq!(find(&four, "PodDisruptionBudget").unwrap()["spec"]["minAvailable"], json!(1));
    let one = rendered(RUN, &["workers.count=1"], &options(&["s3-secret"])).unwrap();
    assert!(find(&one, "PodDisruptionBudget").is_none(), "its node could never be drained");
    let all = rendered(RUN, &["workers.min=4"], &options(&["s3-secret"])).unwrap();
    assert_eq!(find(&all, "PodDisruptionBudget").unwrap()["spec"]["minAvailable"], json!(3));
    let jobs = rendered(PREPARE, &[], &Options { workers: Some(9), ..options(&["local"]) }).unwrap();
    assert_eq!(find(&jobs, "Job").unwrap()["spec"]["completions"], json!(9));
}

#[test]
fn gpus_follow_the_device() {
    let of = |set: &[&str], options: &Options| {
        let rendered = rendered(RUN, set, options).unwrap();
        let container = template(find(&rendered, "Job").unwrap()).unwrap()["spec"]["containers"][0].clone();
        let gpus = container["resources"]["limits"].get("nvidia.com/gpu").map_or("0", |gpus| gpus.as_str().unwrap()).to_owned();
        (gpus, text(&container, "/image").rsplit_once(':').unwrap().0.to_owned())
    };
    let pair = |gpus: &str, image: &str| (gpus.to_owned(), image.to_owned());
    let (none, spot) = (options(&["s3-secret"]), options(&["s3-secret", "spot-gpu"]));
    assert_eq!(of(&[], &none), pair("0", "ella-worker"));
    assert_eq!(of(&["workers.device=cuda"], &none), pair("1", "ella-worker-cuda"));
    assert_eq!(of(&[], &spot), pair("1", "ella-worker-cuda"));
    assert_eq!(of(&["workers.device=cpu"], &spot), pair("0", "ella-worker"));
    assert_eq!(of(&["workers.device=cpu"], &Options { gpus: Some(1), ..none }), pair("1", "ella-worker"));
}

#[test]
fn who_takes_a_gpu_may_go_where_only_such_may() {
    let of = |device: &str, overlays: &[&str]| {
        let set = format!("workers.device={device}");
        let rendered = rendered(RUN, &[&set], &options(overlays)).unwrap();
        let job = find(&rendered, "Job").or_else(|| find(&rendered, "JobSet")).unwrap();
        let tolerations = template(job).unwrap()["spec"]["tolerations"].as_array().unwrap().clone();
        tolerations.iter().filter(|toleration| toleration["key"] == "nvidia.com/gpu").count()
    };
    assert_eq!(of("cpu", &["s3-secret"]), 0);
    for overlays in [&["s3-secret"][..], &["s3-secret", "jobset"], &["s3-secret", "spot-gpu"]] {
        assert_eq!(of("cuda", overlays), 1, "{overlays:?}");
    }
}

#[test]
fn a_run_is_told_to_bear_a_node_that_is_gone_unless_it_says_otherwise() {
    let timeout = |set: &[&str]| {
        let rendered = rendered(RUN, set, &options(&["s3-secret"])).unwrap();
        let config = text(find(&rendered, "ConfigMap").unwrap(), "/data/config.toml").to_owned();
        config.lines().find(|line| line.starts_with("orphan_timeout")).unwrap().to_owned()
    };
    assert_eq!(timeout(&[]), "orphan_timeout = \"5m\"");
    assert_eq!(timeout(&["workers.orphan_timeout=\"30s\""]), "orphan_timeout = \"30s\"");
}

#[test]
fn a_change_of_the_config_starts_the_coordinator_anew() {
    let digest = |set: &[&str]| {
        let rendered = rendered(RUN, set, &options(&["s3-secret"])).unwrap();
        text(find(&rendered, "Deployment").unwrap(), "/spec/template/metadata/annotations/ella~1config-digest").to_owned()
    };
    assert_eq!(digest(&[]), digest(&[]));
    assert_ne!(digest(&[]), digest(&["train.steps=2000"]));
}

#[test]
fn what_cannot_stand_in_a_cluster_is_refused_by_field() {
    let s3 = options(&["s3-secret"]);
    for (found, words) in [
        (rendered(SHARED, &[], &options(&[])), "`run.output` is \"runs/first\", but pods see no files of this machine"),
        (rendered(RUN, &["workers.count=64"], &s3), "`workers.count` is 64, but there are only 8 lanes"),
        (rendered(RUN, &["run.output=s3://bucket/runs/--"], &s3), "its last part cannot name objects of a cluster; give --name"),
        (rendered(RUN, &["run.outputs=x"], &s3), "did you mean `run.output`?"),
        (rendered(RUN, &[], &options(&["s3"])), "`--identity` is left out, but --overlay s3 needs"),
        (rendered(RUN, &[], &options(&["none"])), "`--overlay` is none, but it must be one of"),
        (rendered(RUN, &[], &Options { workers: Some(2), ..s3.clone() }), "--set workers.count=N"),
        (rendered("nonsense", &[], &s3), "run.toml: "),
    ] {
        let error = found.unwrap_err();
        assert!(error.contains(words), "{error}: {words}");
    }
}

#[test]
fn what_people_should_know_is_told() {
    let notes = |config: &str, options: &Options| rendered(config, &["workers.device=cpu"], options).unwrap().notes.join("\n");
    assert!(notes(RUN, &options(&[])).contains("no overlay gives the pods credentials"));
    assert!(notes(RUN, &Options { gpus: Some(1), ..options(&["s3-secret"]) }).contains("takes a GPU, and does not use it"));
    assert_eq!(notes(SHARED, &options(&["local"])), "");
    let team = |namespaced_only| Options { namespace: Some("team".to_owned()), namespaced_only, ..options(&["local"]) };
    assert!(notes(SHARED, &team(false)).contains("the namespace team is made, or if it is there"));
    assert!(!notes(SHARED, &team(true)).contains("the namespace team"));
}

#[test]
fn overlays_of_two_stores_let_the_pods_out_to_both() {
    for overlays in [["gcs", "s3-secret"], ["s3-secret", "gcs"]] {
        let identity = Some("identity@example".to_owned());
        let both = rendered(RUN, &[], &Options { identity, egress: vec![9443], ..options(&overlays) }).unwrap();
        let policy = both.objects.iter().find(|object| text(object, "/metadata/name") == "first-stores").unwrap();
        let rules = policy["spec"]["egress"].as_array().unwrap();
        let ports = rules.iter().flat_map(|rule| rule["ports"].as_array().unwrap()).map(|port| port["port"].as_u64().unwrap());
        let mut ports: Vec<u64> = ports.collect();
        ports.sort_unstable();
        assert_eq!(ports, [80, 80, 443, 988, 9000, 9443], "{overlays:?}: {rules:?}");
    }
}

#[test]
fn no_two_runs_have_an_object_of_the_whole_cluster_under_the_same_name() {
    let of = |namespace: &str, name: &str| {
        let some = |text: &str| Some(text.to_owned());
        let run = rendered(SHARED, &[], &Options { namespace: some(namespace), name: some(name), ..options(&["local"]) }).unwrap();
        let whole = run.objects.into_iter().filter(|object| object.pointer("/metadata/labels/app.kubernetes.io~1instance").is_some());
        let whole = whole.filter(|object| ella_k8s::CLUSTER_SCOPED.contains(&text(object, "/kind")));
        whole.map(|object| text(&object, "/metadata/name").to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(of("a", "b-c"), ["a.b-c.data", "a.b-c.token-review"]);
    assert_eq!(of("a-b", "c"), ["a-b.c.data", "a-b.c.token-review"]);
}

/// Our own names begin with `train-`, and become the run's. Those of the people who render need not be ours to begin so.
#[test]
fn what_people_have_named_keeps_its_name() {
    let some = |text: &str| Some(text.to_owned());
    for overlays in [&["kueue"][..], &["kueue", "jobset"]] {
        for (volume, own) in [("nfs:train-nas:/train-disk", ["train-nas", "/train-disk"]), ("claim:train-claim", ["train-claim"; 2])] {
            let named = Options {
                volume: Some(volume.parse().unwrap()),
                worker_image: some("host/train-images/ella-worker:2"),
                coordinator_image: some("host/train-images/ella-coordinator:2"),
                env: vec![("PLACE".to_owned(), "train-place".to_owned())],
                queue: some("train-queue"),
                ..options(overlays)
            };
            let yaml = rendered(SHARED, &[], &named).unwrap().to_yaml().unwrap();
            let others = ["host/train-images/ella-worker:2", "host/train-images/ella-coordinator:2", "train-place", "train-queue"];
            for kept in own.into_iter().chain(others) {
                assert!(yaml.contains(kept), "{overlays:?}: {kept}\n{yaml}");
            }
            assert!(yaml.contains("first-workers") && !yaml.contains("train-workers"), "{yaml}");
        }
    }
}

#[test]
fn a_jobset_has_the_job_that_the_other_overlays_and_the_config_make() {
    let others = ["jobset", "s3-secret", "kueue", "spot-gpu"];
    let set = rendered(RUN, &[], &options(&others)).unwrap();
    let job = rendered(RUN, &[], &options(&others[1..])).unwrap();
    assert!(find(&set, "Job").is_none());
    let (set, job) = (find(&set, "JobSet").unwrap(), find(&job, "Job").unwrap());
    assert_eq!(template(set), template(job));
    assert_eq!(set["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"], json!(4));
    assert_eq!((&set["spec"]["suspend"], &set["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]), (&json!(true), &json!("ella")));
}

/// Where kubectl is: KUBECTL, or on the path.
fn kubectl() -> Option<std::process::Command> {
    let command = || std::process::Command::new(std::env::var_os("KUBECTL").unwrap_or_else(|| "kubectl".into()));
    command().args(["version", "--client"]).output().ok().filter(|ran| ran.status.success()).map(|_| command())
}

#[test]
fn kubectl_makes_the_same_of_every_overlay_where_it_is_there() {
    for overlay in ella_k8s::overlays() {
        let Some(mut kubectl) = kubectl() else {
            return eprintln!("kubectl is not there: not compared (make test-k8s does)");
        };
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("overlays").join(overlay);
        let ran = kubectl.arg("kustomize").arg(folder).output().unwrap();
        assert!(ran.status.success(), "{overlay}: {}", String::from_utf8_lossy(&ran.stderr));
        let mut theirs: Vec<Value> = serde_saphyr::from_multiple(&String::from_utf8(ran.stdout).unwrap()).unwrap();
        let mut ours = ella_k8s::build(&format!("overlays/{overlay}"), &[]).unwrap();
        for objects in [&mut theirs, &mut ours] {
            objects.sort_by_key(|object| format!("{} {}", text(object, "/kind"), text(object, "/metadata/name")));
        }
        for (theirs, ours) in theirs.iter().zip(&ours) {
            assert_eq!(theirs, ours, "{overlay}");
        }
        assert_eq!(theirs.len(), ours.len(), "{overlay}");
    }
}
