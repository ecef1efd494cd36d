//! `ella doctor`, on a machine that need not have a GPU.

mod common;

use common::ella;
use serde_json::json;

#[test]
fn it_says_what_is_there_and_tries_a_store() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    let found = ella(here, &["doctor", "--quick", "--store", "runs", "--json"]).json();
    assert!(found["machine"]["cores"].as_u64() > Some(0) && found["libtorch"]["version"].as_str().unwrap().starts_with("2.11"), "{found}");
    assert_eq!((&found["speeds"], found["store"].is_string()), (&json!([]), true), "{found}");
    let said = ella(here, &["doctor", "--quick"]).stdout;
    if std::path::Path::new("/dev/nvidiactl").exists() {
        assert!(said.contains("nccl ") && !found["gpus"]["devices"].as_array().unwrap().is_empty(), "{said}");
        return;
    }
    assert_eq!((&found["ok"], &found["wrong"], &found["nccl"]), (&json!(true), &json!([]), &json!(null)));
    assert!(said.contains("verdict   ready to train on the processor: this machine has no GPU"), "{said}");
}

#[test]
fn what_a_run_would_stumble_over_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    std::fs::write(here.join("file"), "in the way").unwrap();
    ella(here, &["doctor", "--store", "file/runs"]).fails(2, &["file is a file"]);
    let refused = ella(here, &["doctor", "--store", "ftp://host/x"]);
    assert!(!refused.stderr.contains("measuring"), "before anything is measured: {refused:?}");
    refused.fails(2, &["ftp"]);
    let ran = ella(here, &["doctor", "--quick", "--store", "https://127.0.0.1:1/runs", "--json"]);
    let found = ran.json();
    assert_eq!((ran.code, &found["ok"]), (1, &json!(false)), "{ran:?}");
    assert!(found["wrong"][0].as_str().unwrap().starts_with("runs cannot be kept in https://127.0.0.1:1/runs: "), "{found}");
}
