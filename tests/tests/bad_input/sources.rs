//! `ella prepare`: broken tars, and single samples that are no good among many.

use super::{PERMANENT, Shared, USAGE, ella_refused, files, shared};
use anyhow::{Context as _, Result};
use ella_tests::{ella, exists};
use std::io::Read as _;
use std::path::PathBuf;

/// A sample's key, its picture, its caption.
type Parts<'a> = (&'a str, Option<&'a [u8]>, Option<&'a [u8]>);

/// One of the world's tars.
fn tar(shared: &Shared) -> Result<Vec<u8>> {
    Ok(std::fs::read(shared.world.path("scenes/scenes-00000.tar"))?)
}

/// The first picture in a tar, with its name's ending.
fn picture(tar: &[u8]) -> Result<(String, Vec<u8>)> {
    for entry in tar::Archive::new(tar).entries()? {
        let mut entry = entry?;
        let ending = entry.path()?.extension().map(|e| e.to_string_lossy().into_owned()).unwrap_or_default();
        if ["png", "jpg", "webp"].contains(&ending.as_str()) {
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes)?;
            return Ok((ending, bytes));
        }
    }
    anyhow::bail!("no picture in the tar")
}

/// Writes a tar of these members into the world.
fn write_tar(shared: &Shared, name: &str, members: &[(String, &[u8])]) -> Result<String> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, *bytes)?;
    }
    std::fs::write(shared.world.path(name), builder.into_inner()?)?;
    Ok(shared.path(name))
}

#[test]
fn a_broken_tar_is_named_and_goes_on_once_it_is_whole() -> Result<()> {
    let shared = shared()?;
    let whole = tar(&shared)?;
    let mut bad_sum = whole.clone();
    let header = whole.windows(8).skip(1024).position(|w| w == b"scene-1-").context("no second header")? + 1024;
    bad_sum[header + 10] ^= 1;
    let cases: [(&str, &[u8], &str); 6] = [
        ("empty.tar", b"", "is empty"),
        ("cut.tar", &whole[..whole.len() / 2], "at byte"),
        ("cut-at-a-header.tar", &whole[..512 * 7], "is truncated"),
        ("bad-sum.tar", &bad_sum, "checksum mismatch"),
        ("text.tar", &b"this is no tar ".repeat(100), "is not a plain tar"),
        ("zeros.tar", &[0; 10_240], "holds no files"),
    ];
    for (name, bytes, rule) in cases {
        std::fs::write(shared.world.path(name), bytes)?;
        let out = shared.path(&format!("from-{name}"));
        let command = ["prepare", &shared.path(name), "--out", &out, "--resolution", "64"];
        ella_refused(&command, PERMANENT, &[name, rule])?;
        assert!(!exists(PathBuf::from(&out).join("manifest.json")), "{name}: a data set appeared");
    }
    std::fs::write(shared.world.path("cut.tar"), &whole)?;
    ella(&["prepare", &shared.path("cut.tar"), "--out", &shared.path("from-cut.tar"), "--resolution", "64"])?;
    Ok(())
}

#[test]
fn sources_that_are_not_there_are_named() -> Result<()> {
    let shared = shared()?;
    std::fs::create_dir_all(shared.world.path("no-tars"))?;
    for name in ["nowhere.tar", "no-tars"] {
        ella_refused(&["prepare", &shared.path(name), "--out", &shared.path("from-nothing")], PERMANENT, &[name, ".tar"])?;
    }
    assert!(!exists(shared.world.path("from-nothing")), "a source that is not there left something behind");
    Ok(())
}

#[test]
fn single_bad_samples_are_skipped_and_counted_by_reason() -> Result<()> {
    let shared = shared()?;
    let (ending, image) = picture(&tar(&shared)?)?;
    let mut lying = image.clone();
    // A PNG that claims to be 60,000 pixels wide and high.
    lying[16..24].copy_from_slice(&[0, 0, 0xea, 0x60, 0, 0, 0xea, 0x60]);
    let mut flipped = image.clone();
    let middle = image.len() / 2;
    flipped[middle] ^= 0xff;
    let samples: [Parts; 11] = [
        ("good", Some(&image), Some(b"a red box")),
        ("zero", Some(b""), Some(b"a caption")),
        ("garbage", Some(b"no picture at all"), Some(b"a caption")),
        ("cut", Some(&image[..middle]), Some(b"a caption")),
        ("lying", Some(&lying), Some(b"a caption")),
        ("flipped", Some(&flipped), Some(b"a caption")),
        ("no-caption", Some(&image), None),
        ("empty", Some(&image), Some(b"")),
        ("blank", Some(&image), Some(b" \n\t")),
        ("latin", Some(&image), Some(b"a caf\xe9")),
        ("no-image", None, Some(b"a caption")),
    ];
    let mut members = Vec::new();
    for (key, image, caption) in samples {
        members.extend(image.map(|bytes| (format!("{key}.{ending}"), bytes)));
        members.extend(caption.map(|bytes| (format!("{key}.txt"), bytes)));
    }
    let tar = write_tar(&shared, "mixed.tar", &members)?;
    let out = shared.path("mixed");
    let report: serde_json::Value = serde_json::from_str(&ella(&["prepare", &tar, "--out", &out, "--resolution", "64", "--json"])?)?;
    let expected = serde_json::json!({ "read": 11, "kept": 1, "refused": {
        "caption_empty": ["empty", "blank"], "caption_missing": ["no-caption"], "caption_not_utf8": ["latin"], "image_missing": ["no-image"],
        "image_undecodable": ["zero", "garbage", "cut", "lying", "flipped"],
    }});
    assert_eq!(report, expected);
    let beside: serde_json::Value = serde_json::from_slice(&std::fs::read(shared.world.path("mixed/report.json"))?)?;
    assert_eq!(beside, expected);
    Ok(())
}

#[test]
fn nothing_kept_is_no_data_set_and_says_why() -> Result<()> {
    let shared = shared()?;
    let command = ["prepare", &shared.path("scenes"), "--out", &shared.path("none-kept"), "--resolution", "64", "--min-edge", "65"];
    ella_refused(&command, PERMANENT, &["no sample was kept of 48 read", "48 min_edge"])?;
    assert!(!exists(shared.world.path("none-kept/manifest.json")));
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(shared.world.path("none-kept/report.json"))?)?;
    assert_eq!(report["refused"]["min_edge"].as_array().map(Vec::len), Some(48));
    Ok(())
}

#[test]
fn a_destination_that_holds_something_else_is_left_alone() -> Result<()> {
    let shared = shared()?;
    let out = shared.copy("data", "other-data")?;
    let before = files(&out)?;
    let at = out.display().to_string();
    let (all, one) = (shared.path("scenes"), shared.path("scenes/scenes-00000.tar"));
    ella_refused(&["prepare", &all, "--out", &at, "--resolution", "32"], PERMANENT, &["other-data/plan.json", "min_edge", "32", "64"])?;
    ella_refused(
        &["prepare", &one, "--out", &at, "--resolution", "64"],
        PERMANENT,
        &["other-data/plan.json", "sources", "found 2 sources, with \"scenes-00001.tar\""],
    )?;
    assert!(files(&out)? == before, "the other data set was changed");

    let file = shared.path("a-file");
    std::fs::write(&file, "mine")?;
    for below in ["", "/x", "/x/y"] {
        ella_refused(
            &["prepare", &all, "--out", &format!("{file}{below}"), "--resolution", "64"],
            USAGE,
            &["a-file", "file", "expected a folder"],
        )?;
    }
    assert_eq!(std::fs::read_to_string(&file)?, "mine");
    Ok(())
}
