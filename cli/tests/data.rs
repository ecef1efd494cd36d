//! scenes, prepare, init-base, embed, as black boxes.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod common;

use common::{ella, world};
use serde_json::json;

#[test]
fn scenes_are_the_same_for_the_same_seed_and_wrong_sizes_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    let made = ella(here, &["scenes", "--out", "a", "--count", "5", "--per-tar", "3", "--json"]).ok().json();
    assert_eq!((&made["scenes"], &made["tars"]), (&json!(5), &json!(2)));
    ella(here, &["scenes", "--out", "b", "--count", "5", "--per-tar", "3", "--seed", "7"]).ok();
    for tar in ["scenes-00000.tar", "scenes-00001.tar"] {
        assert!(std::fs::read(here.join("a").join(tar)).unwrap() == std::fs::read(here.join("b").join(tar)).unwrap(), "{tar}");
    }
    ella(here, &["scenes", "--out", "c", "--size", "8", "--json"]).fails(2, &["size", "8", "16 to 4096"]);
    ella(here, &["scenes", "--count", "5"]).fails(2, &["--out"]);
    std::fs::write(here.join("file"), "x").unwrap();
    ella(here, &["scenes", "--out", "file/x", "--json"]).fails(4, &["file/x"]);
}

#[test]
fn a_result_that_nobody_gets_is_no_success() {
    let dir = tempfile::tempdir().unwrap();
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_ella"));
    command.args(["scenes", "--out", "a", "--count", "1", "--json"]).current_dir(dir.path()).stdout(full);
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && said.contains("ella: stdout: cannot be written"), "{said}");
}

#[test]
fn prepare_counts_what_it_refuses_and_names_broken_sources() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    ella(here, &["scenes", "--out", "small", "--count", "3", "--size", "64"]).ok();
    ella(here, &["scenes", "--out", "large", "--count", "4", "--size", "96", "--seed", "9"]).ok();
    let all = ["prepare", "small", "large/scenes-00000.tar", "--out", "data", "--resolution", "64", "--min-edge", "80"];
    let made = ella(here, &[&all[..], &["--json"]].concat()).ok().json();
    assert_eq!((&made["read"], &made["kept"]), (&json!(7), &json!(4)));
    let refused = made["refused"]["min_edge"].as_array().unwrap();
    assert_eq!(refused.len(), 3);
    assert!(refused.iter().all(|key| key.as_str().unwrap().starts_with("scene-")));
    assert_eq!(made.as_object().unwrap().len(), 3);

    // The same again is done already; the text for people names the counts and the list.
    let text = ella(here, &all).ok().stdout;
    assert!(text.contains("7  read") && text.contains("3    min_edge") && text.contains("report.json"), "{text}");

    ella(here, &["prepare", "nowhere", "--out", "x", "--json"]).fails(4, &["nowhere", "no source is there"]);
    ella(here, &["prepare", "small", "--out", "x", "--resolution", "63", "--json"]).fails(2, &["resolution", "multiple of 8", "63"]);
    ella(here, &["prepare", "small", "--out", "x", "--resolution", "512", "--json"]).fails(4, &["no sample was kept", "min_edge"]);
    ella(here, &["prepare", "small", "--out", "x", "--resolution", "64", "--json"]).ok();
    for (more, words) in [
        (["--resolution", "-5"], ["--resolution", "-5 is not in"]),
        (["--seed", "-1"], ["--seed", "a whole number of 0 or more"]),
        (["--shard-mib", "0"], ["--shard-mib", "1 to 4096"]),
        (["--threads", "100000"], ["--threads", "at most 1024"]),
        (["--bucket-aspect", "3"], ["--bucket-aspect", "--buckets"]),
        (["--near-bits", "65"], ["--near-bits", "--duplicates near"]),
        (["--format", "none"], ["--format none", "--latents"]),
        (["--workers", "-1"], ["--workers", "-1 is not in 1..=1024"]),
        (["--listen", "localhost:7000"], ["--listen", "expected ADDRESS:PORT"]),
    ] {
        ella(here, &[&["prepare", "small", "--out", "y", "--json"], &more[..]].concat()).fails(2, &words);
    }
    for more in [&[][..], &["--workers", "1"]] {
        let latents = ["prepare", "small", "--out", "y", "--resolution", "64", "--latents", "nowhere", "--json"];
        ella(here, &[&latents[..], more].concat()).fails(4, &["--latents", "nowhere", "not found"]);
    }
    let bad = ["prepare", "small", "--out", "y", "--resolution", "65", "--write-job", "job.toml", "--json"];
    ella(here, &bad).fails(2, &["resolution", "65"]);
    ella(here, &["prepare", "small", "--out", "data", "--resolution", "32", "--json"])
        .fails(4, &["data/plan.json", "holds something else"]);
    ella(here, &["prepare", "small", "--out", "ftp://x/y"]).fails(2, &["ftp"]);
    ella(here, &["prepare", "small", "--out", "memory://z"]).fails(2, &["unknown scheme memory"]);
    let tar = std::fs::read(here.join("small/scenes-00000.tar")).unwrap();
    std::fs::write(here.join("cut.tar"), &tar[..tar.len() / 2]).unwrap();
    ella(here, &["prepare", "cut.tar", "--out", "y", "--resolution", "64", "--json"]).fails(4, &["cut.tar", "truncated"]);
    // What the file holds is told, and steers no terminal.
    let noise: Vec<u8> = std::iter::repeat_n(b"\x1b[31m\x0e\x07", 128).flatten().copied().collect();
    std::fs::write(here.join("noise.tar"), noise).unwrap();
    let told = ella(here, &["prepare", "noise.tar", "--out", "n", "--resolution", "64"]);
    assert!(!told.stderr.contains(['\u{1b}', '\u{e}', '\u{7}']) && told.stderr.contains("\\u{1b}"), "{told:?}");
    told.fails(4, &["noise.tar", "not a plain tar"]);
    std::fs::write(here.join("empty.tar"), "").unwrap();
    ella(here, &["prepare", "empty.tar", "--out", "z", "--resolution", "64"]).fails(4, &["empty.tar", "is empty"]);
}

#[test]
fn what_is_unfinished_or_told_wrongly_is_named() {
    let dir = world();
    let here = dir.path();
    // A source that was moved must keep its name.
    let shards = |data: &str| std::fs::read_dir(here.join(data).join("shards")).unwrap().map(|entry| entry.unwrap().path());
    let shard = shards("data").find(|path| path.extension().is_some_and(|ending| ending == "arrow")).unwrap();
    std::fs::write(&shard, "no shard").unwrap();
    std::fs::rename(here.join("tars/scenes-00000.tar"), here.join("renamed.tar")).unwrap();
    ella(here, &["verify", "data", "--repair", "--source", "renamed.tar", "--source", "tars/scenes-00001.tar", "--json"])
        .fails(2, &["--source renamed.tar", "scenes-00000.tar", "must have the name"]);
    ella(here, &["verify", "data", "--repair", "--source", "renamed.tar"]).fails(2, &["--source", "2 sources", "found 1"]);

    std::fs::remove_file(here.join("data/manifest.json")).unwrap();
    ella(here, &["inspect", "data", "--json"]).fails(4, &["data: a data set whose preparing did not finish"]);
    ella(here, &["embed", "data", "--text", "models/text"]).fails(4, &["manifest.json"]);
    std::fs::create_dir(here.join("run")).unwrap();
    std::fs::write(here.join("run/run.toml"), "").unwrap();
    let tars = ella(here, &["inspect", "tars", "--json"]).json();
    assert!(tars["what"] == "unknown" && tars["problems"][0].as_str().unwrap().contains("ella prepare"), "{tars}");
    ella(here, &["inspect", "run", "--json"]).fails(4, &["run: a run", "ella status"]);
    ella(here, &["status", "tars"]).fails(4, &["no run folder, no data set and no folder of grids", "ella status --coordinator"]);
    ella(here, &["caption", "tars", "--json"]).fails(2, &["ella caption: `endpoint` is left out"]);
    ella(here, &["caption", "tars", "--set", "model=m"]).fails(2, &["ella caption with --set: `endpoint` is left out"]);
}

#[test]
fn latents_are_those_of_the_base_models_vae() {
    let dir = world();
    let here = dir.path();
    let arguments = ["prepare", "tars", "--out", "latent", "--resolution", "64", "--latents", "models/base", "--json"];
    assert_eq!(ella(here, &arguments).ok().json()["kept"], 16);
    let manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(here.join("latent/manifest.json")).unwrap()).unwrap();
    assert_eq!((&manifest["latents"]["channels"], &manifest["latents"]["downscale"]), (&json!(8), &json!(8)));
    ella(here, &["prepare", "tars", "--out", "l2", "--resolution", "64", "--latents", "models/text"]).fails(4, &["models/text"]);
}

#[test]
fn init_base_takes_captions_of_every_kind_and_gives_the_same_bytes() {
    let dir = world();
    let here = dir.path();
    std::fs::create_dir(here.join("texts")).unwrap();
    std::fs::write(here.join("texts/a.txt"), "a red square on a blue ground").unwrap();
    std::fs::write(here.join("b.txt"), "one caption\nand another\n").unwrap();
    let made = ella(here, &["init-base", "--preset", "nano", "--captions", "texts", "b.txt", "tars", "--out", "m1", "--json"]).ok().json();
    assert_eq!(made["captions"], 1 + 2 + 16);
    assert!(here.join("m1/base/unet/config.json").is_file() && here.join("m1/text/tokenizer.json").is_file());
    ella(here, &["init-base", "--preset", "nano", "--captions", "tars", "--out", "m2"]).ok();
    let file = "text/tokenizer.json";
    // Tars and the data set made of them hold the same captions.
    assert_eq!(std::fs::read(here.join("models").join(file)).unwrap(), std::fs::read(here.join("m2").join(file)).unwrap());

    std::fs::create_dir(here.join("none")).unwrap();
    ella(here, &["init-base", "--preset", "nano", "--captions", "none", "--out", "m3", "--json"]).fails(4, &["none: no caption"]);
    ella(here, &["init-base", "--preset", "nano", "--captions", "gone.txt", "--out", "m3"]).fails(4, &["gone.txt", "cannot be read"]);
    ella(here, &["init-base", "--preset", "huge", "--out", "m3", "--json"]).fails(2, &["huge", "nano"]);
}

#[test]
fn embed_goes_on_where_it_was_and_takes_plain_texts() {
    let dir = world();
    let here = dir.path();
    let arguments = ["embed", "data", "--text", "models/text", "--padding", "none", "--max-tokens", "40", "--device", "cpu", "--json"];
    let first = ella(here, &arguments).ok().json();
    assert_eq!((&first["captions"], &first["embedded"]), (&json!(16), &json!(16)));
    let ratio = first["tokens_computed_per_token_kept"].as_f64().unwrap();
    assert!((1.0..2.0).contains(&ratio), "{first}");
    let padded = 16.0 * 40.0 / first["tokens_kept"].as_f64().unwrap();
    assert!(ratio <= padded && first["tokens_per_token_kept_if_padded"] == padded, "{first}");
    let again = ella(here, &arguments).ok().json();
    assert_eq!((&again["embedded"], &again["fingerprint"]), (&json!(0), &first["fingerprint"]));
    assert!(again["tokens_computed_per_token_kept"].is_null());
    let other = ella(here, &["embed", "data", "--text", "models/text", "--max-tokens", "8", "--json"]).ok().json();
    assert_eq!(other["truncated"], 16);
    assert_ne!(other["fingerprint"], first["fingerprint"]);

    std::fs::create_dir(here.join("texts")).unwrap();
    for (name, text) in [("a", "a red circle"), ("b", ""), ("c", "two blue squares")] {
        std::fs::write(here.join(format!("texts/{name}.txt")), text).unwrap();
    }
    let texts = ella(here, &["embed", "texts", "--text", "models/text", "--out", "texts-data", "--json"]).ok().json();
    assert_eq!((&texts["captions"], &texts["refused"]), (&json!(2), &json!({ "caption_empty": ["b"] })));

    let job = |data: &str, more: &[&str]| {
        ella(here, &[&["embed", data, "--text", "models/text", "--write-job", "an embedding.toml", "--json"], more].concat())
    };
    let told = job("data", &[]).ok().json();
    assert_eq!(told, json!({ "job": "an embedding.toml", "kind": "embed", "data": "data" }));
    let text = ella(here, &["embed", "data", "--text", "models/text", "--write-job", "an embedding.toml"]).ok().stdout;
    assert!(text.contains("ella-coordinator 'an embedding.toml'"), "{text}");
    let piped = ella(here, &["embed", "data", "--text", "models/text", "--write-job", "/dev/stdout"]).ok().stdout;
    assert_eq!(piped, std::fs::read_to_string(here.join("an embedding.toml")).unwrap(), "a pipe has the job and nothing beside it");
    job("texts", &["--out", "texts-job"]).fails(2, &["--out", "--workers"]);
    ella(here, &["embed", "texts", "--text", "models/text", "--json"]).fails(2, &["texts", "--out"]);
    ella(here, &["embed", "data", "--text", "models/text", "--out", "x"]).fails(2, &["--out"]);
    ella(here, &["embed", "nowhere", "--text", "models/text", "--json"]).fails(4, &["nowhere", "not found"]);
    ella(here, &["embed", "tars", "--text", "models/text"]).fails(4, &["tars", "manifest.json"]);
    ella(here, &["embed", "data", "--text", "models/base", "--json"]).fails(4, &["models/base/config.json", "not found"]);
    ella(here, &["embed", "data", "--text", "models/text", "--max-tokens", "0"]).fails(2, &["--max-tokens"]);
    ella(here, &["embed", "data", "--text", "models/text", "--dtype", "int8"]).fails(2, &["int8"]);
    if !std::path::Path::new("/dev/nvidiactl").exists() {
        ella(here, &["embed", "data", "--text", "models/text", "--device", "cuda"]).fails(4, &["cuda", "--device"]);
    }
}

#[test]
fn what_embed_made_has_no_originals_and_what_is_not_there_is_not_tried_again() {
    let dir = world();
    let here = dir.path();
    ella(here, &["embed", "/nope", "--text", "models/text", "--out", "o"]).fails(4, &["/nope"]);
    std::fs::create_dir(here.join("prompts")).unwrap();
    std::fs::write(here.join("prompts/a.txt"), "a red square").unwrap();
    ella(here, &["embed", "prompts", "--text", "models/text", "--out", "captions"]).ok();
    ella(here, &["verify", "captions"]).ok();
    ella(here, &["verify", "captions", "--originals"]).fails(4, &["made by `ella embed`", "no originals"]);

    // A list of keys is read again by whoever goes on: from a pipe it could not be.
    for option in ["--allow", "--deny"] {
        ella(here, &["prepare", "tars", "--out", "x", "--resolution", "64", option, "/dev/null"]).fails(4, &[option, "pipe or device"]);
    }
}

/// Ragged rows are as long as the captions that are trained on, whatever the data set's other columns have.
#[test]
fn a_plan_counts_the_tokens_of_the_columns_that_are_trained_on() {
    let dir = world();
    let here = dir.path();
    let columns = ["--caption", "short=short_caption", "--caption", "long=txt"];
    ella(here, &[&["prepare", "tars", "--out", "both", "--resolution", "64"][..], &columns].concat()).ok();
    let run = "[run]\noutput = \"r\"\n[base]\nmodel = \"models/base\"\n[text]\nmodel = \"models/text\"\npadding = \"none\"\n[data]\npath = \"both\"\n";
    std::fs::write(here.join("run.toml"), run).unwrap();
    let positions = |set: &[&str]| {
        let plan = ella(here, &[&["plan", "run.toml", "--json"][..], set].concat()).ok().json();
        plan["facts"]["positions"].as_f64().unwrap()
    };
    let of = |column: &str| positions(&["--set", &format!("data.captions=[{{column=\"{column}\",weight=1.0}}]")]);
    let (short, long, all) = (of("short"), of("long"), positions(&[]));
    assert!(long > 2.0 * short && (all - (short + long) / 2.0).abs() < 1e-9, "{short} {long} {all}");
}
