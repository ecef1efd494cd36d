//! Which samples are kept, and which captions of theirs.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::sync::Arc;

use common::{good_tar, jpeg, keys_and_captions, png, refused, small, sources, store, tar_of_samples, threads};
use ella_dataset::{
    DataError, Duplicates, Filters, KeyList, Preparation, PrepareOptions, Report, Settings, TokenCounter, TokenRule, prepare,
};
use ella_store::Digest;
use tempfile::TempDir;

/// What came of one tar.
async fn prepared(tar: &[u8], settings: &Settings, options: &PrepareOptions) -> (Report, Vec<(String, Vec<String>)>) {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let sources = sources(dir.path(), &[("s.tar", tar)]).await;
    let settings = Settings { duplicates: Duplicates::Keep, ..settings.clone() };
    let report = prepare(&sources, &store(&out), &settings, options).await.unwrap();
    assert!(report.adds_up());
    (report, keys_and_captions(&out).await)
}

fn filters(change: impl FnOnce(&mut Filters)) -> Settings {
    let mut settings = small();
    change(&mut settings.filters);
    settings
}

#[tokio::test]
async fn a_sample_is_kept_if_one_column_has_a_caption_that_passes() {
    let picture = jpeg(40, 1);
    let tar = tar_of_samples(&[
        ("both", &picture, &[("txt", "a dense caption"), ("json", r#"{"alt": "the short one"}"#)]),
        ("dense", &picture, &[("txt", " dense only ")]),
        ("short", &picture, &[("json", r#"{"alt": "short only"}"#)]),
        ("one", &picture, &[("txt", "word"), ("json", r#"{"alt": "of two columns"}"#)]),
        ("none", &picture, &[("json", r#"{"other": "a caption"}"#)]),
        ("first", &picture, &[("txt", " "), ("json", r#"{"alt": 7}"#)]),
        ("second", &picture, &[("txt", "word"), ("json", r#"{"alt": ""}"#)]),
        ("invalid", &picture, &[("json", r#"{"alt": "#)]),
    ]);
    let mut settings = filters(|filters| filters.min_caption_words = 2);
    settings.captions = vec!["dense=txt".parse().unwrap(), "alt:0.5".parse().unwrap()];
    let (report, rows) = prepared(&tar, &settings, &threads(2)).await;
    let row = |key: &str, captions: [&str; 2]| (key.to_owned(), captions.map(str::to_owned).to_vec());
    let expected = [
        row("both", ["a dense caption", "the short one"]),
        row("dense", ["dense only", ""]),
        row("short", ["", "short only"]),
        row("one", ["", "of two columns"]),
    ];
    assert_eq!(rows, expected);
    let expected = ["caption_empty: first", "caption_invalid: invalid", "caption_missing: none", "caption_short: second"];
    assert_eq!(refused(&report), expected);
}

#[tokio::test]
async fn numbers_must_satisfy_every_condition() {
    let picture = jpeg(40, 1);
    let json = [
        ("good", r#"{"text": "a", "aesthetic": 6.5, "watermark": 0.25}"#),
        ("text", r#"{"text": "a", "aesthetic": "7", "watermark": "0"}"#),
        ("edge", r#"{"text": "a", "aesthetic": 6, "watermark": 0.25}"#),
        ("marked", r#"{"text": "a", "aesthetic": 8, "watermark": 0.5}"#),
        ("absent", r#"{"text": "a", "aesthetic": 8}"#),
        ("null", r#"{"text": "a", "aesthetic": null, "watermark": 0}"#),
        ("words", r#"{"text": "a", "aesthetic": "high", "watermark": 0}"#),
    ];
    let members: Vec<_> = json.iter().map(|(_, json)| [("json", *json)]).collect();
    let samples: Vec<common::Texts<'_>> =
        json.iter().zip(&members).map(|((key, _), members)| (*key, picture.as_slice(), members.as_slice())).collect();
    let settings = filters(|filters| filters.conditions = ["aesthetic>6", "watermark < 0.5"].map(|text| text.parse().unwrap()).to_vec());
    let (report, rows) = prepared(&tar_of_samples(&samples), &settings, &threads(1)).await;
    assert_eq!(rows.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(), ["good", "text"]);
    let expected = [
        "condition:aesthetic>6: edge",
        "condition:watermark<0.5: marked",
        "number_missing:aesthetic: null words",
        "number_missing:watermark: absent",
    ];
    assert_eq!(refused(&report), expected);
}

#[tokio::test]
async fn lists_of_keys_name_them_with_or_without_prefix() {
    let list = |text: &str| Some(Arc::new(KeyList::parse(text)));
    let options = PrepareOptions { allow: list("s/000001\r\n\n 000002\n000004\n"), deny: list("000004\n"), ..threads(1) };
    let mut settings = filters(|filters| {
        filters.allow = options.allow.as_ref().and_then(|list| list.digest());
        filters.deny = options.deny.as_ref().and_then(|list| list.digest());
    });
    settings.key_prefix = true;
    let (report, rows) = prepared(&good_tar(0, 6), &settings, &options).await;
    assert_eq!(rows.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(), ["s/000001", "s/000002"]);
    assert_eq!(refused(&report), ["denied: s/000004", "not_allowed: s/000000 s/000003 s/000005"]);

    // Lists other than those that the settings name are refused, and so is their absence.
    for options in [PrepareOptions { allow: list("000001"), ..options }, threads(1)] {
        let out = TempDir::new().unwrap();
        let error = Preparation::new(Vec::new(), settings.clone(), options, store(&out)).unwrap_err();
        assert!(matches!(error, DataError::Setting { field: "allow", .. }), "{error}");
    }
}

/// Takes a letter for a token, and two more for the ends; cannot count what has a `?`.
struct Letters;

impl TokenCounter for Letters {
    fn digest(&self) -> Digest {
        Digest::of(b"letters")
    }

    fn count(&self, caption: &str) -> Option<usize> {
        (!caption.contains('?')).then(|| caption.chars().count() + 2)
    }
}

#[tokio::test]
async fn captions_are_bounded_in_tokens() {
    let picture = jpeg(40, 1);
    let captions = ["abc", "abcd", "abcdefgh", "abcdefghi", "abcd?"];
    let members: Vec<_> = captions.iter().map(|caption| [("txt", *caption)]).collect();
    let samples: Vec<common::Texts<'_>> =
        captions.iter().zip(&members).map(|(caption, members)| (*caption, picture.as_slice(), members.as_slice())).collect();
    let options = PrepareOptions { tokens: Some(Arc::new(Letters)), ..threads(2) };
    let rule = TokenRule { tokenizer: Letters.digest(), min: 6, max: Some(10) };
    let settings = filters(|filters| filters.caption_tokens = Some(rule));
    let (report, rows) = prepared(&tar_of_samples(&samples), &settings, &options).await;
    assert_eq!(rows.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(), ["abcd", "abcdefgh"]);
    assert_eq!(refused(&report), ["caption_invalid: abcd?", "caption_long: abcdefghi", "caption_short: abc"]);
    let error = Preparation::new(Vec::new(), settings, threads(1), store(&TempDir::new().unwrap())).unwrap_err();
    assert!(matches!(error, DataError::Setting { field: "caption_tokens.tokenizer", .. }), "{error}");
}

#[tokio::test]
async fn pictures_are_bounded_in_aspect_and_area() {
    let sizes = [
        ("good", 64, 40),
        ("wide", 101, 50),
        ("tall", 50, 101),
        ("edge", 100, 50),
        ("small", 44, 44),
        ("large", 180, 170),
        ("thin", 100, 31),
    ];
    let pictures: Vec<_> = sizes.iter().map(|(_, width, height)| png(*width, *height, 1)).collect();
    let samples: Vec<common::Texts<'_>> =
        sizes.iter().zip(&pictures).map(|((key, ..), picture)| (*key, picture.as_slice(), &[("txt", "a")][..])).collect();
    let settings =
        filters(|filters| (filters.max_aspect, filters.min_area, filters.max_area) = (Some(2.0), Some(44 * 45), Some(180 * 170 - 1)));
    let (report, rows) = prepared(&tar_of_samples(&samples), &settings, &threads(1)).await;
    assert_eq!(rows.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(), ["good", "edge"]);
    assert_eq!(refused(&report), ["area: small large", "aspect: wide tall", "min_edge: thin"]);
}
