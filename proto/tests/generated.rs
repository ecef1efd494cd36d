//! The generated types are checked in, so that building needs no protoc. This test makes them anew and compares;
//! `ELLA_UPDATE=1 cargo test -p ella-proto` writes them.

use std::path::Path;

#[test]
fn generated_types_are_those_of_the_proto_file() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = tempfile::tempdir().unwrap();
    let files = protox::compile([root.join("ella/v1/ella.proto")], [root]).unwrap();
    tonic_prost_build::configure().out_dir(out.path()).compile_fds(files).unwrap();
    let fresh = std::fs::read_to_string(out.path().join("ella.v1.rs")).unwrap();
    let kept = root.join("src/ella.v1.rs");
    if std::env::var_os("ELLA_UPDATE").is_some() {
        std::fs::write(&kept, &fresh).unwrap();
    }
    let old = std::fs::read_to_string(&kept).unwrap();
    assert!(
        old == fresh,
        "src/ella.v1.rs is not what ella.proto says: run ELLA_UPDATE=1 cargo test --release -p ella-proto --test generated"
    );
}
