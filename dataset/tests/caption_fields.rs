//! Fields of captions that a user names and a source does not have.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::{good_tar, jpeg, keys_and_captions, png, refused, small, sources, store, tar_of, threads};
use ella_dataset::{CaptionColumn, DataError, Report, Settings, originals, prepare};
use tempfile::TempDir;

fn named(fields: &[&str]) -> Settings {
    let column = |field: &&str| CaptionColumn { name: (*field).to_owned(), field: Some((*field).to_owned()), weight: 1.0 };
    Settings { captions: fields.iter().map(column).collect(), ..small() }
}

async fn prepared(files: &[(&str, &[u8])], fields: &[&str]) -> (TempDir, Result<Report, DataError>) {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    std::fs::write(dir.path().join("p.png"), png(40, 40, 1)).unwrap();
    let sources = sources(dir.path(), files).await;
    let report = prepare(&sources, &store(&out), &named(fields), &threads(2)).await;
    (out, report)
}

#[track_caller]
fn is_told(report: Result<Report, DataError>, source: &str, named: &str, seen: &str) {
    let error = report.unwrap_err();
    assert!(error.is_permanent());
    let DataError::CaptionField { source_name, fields, found } = &error else { panic!("{error}") };
    assert!(source_name.ends_with(source), "{error}");
    assert_eq!((fields.as_str(), found.as_str()), (named, seen), "{error}");
}

/// Rows of a JSON list, numbered, with this field.
fn rows(count: usize, field: &str) -> String {
    (0..count).map(|row| format!("{{\"file_name\": \"p.png\", \"key\": \"{field}{row}\", \"{field}\": \"a cup\"}}\n")).collect()
}

#[tokio::test]
async fn a_field_that_no_sample_of_a_source_has_is_one_error_that_names_what_there_is() {
    let json = br#"{"title": "a", "width": 4}"#;
    let tar = tar_of(&[("a.jpg", &jpeg(48, 1)), ("a.txt", b"a cup"), ("a.json", json), ("b.jpg", &jpeg(48, 2))]);
    is_told(prepared(&[("a.tar", &tar)], &["caption"]).await.1, "a.tar", "caption", "title, txt, width");
    is_told(prepared(&[("a.tar", &tar)], &["dense", "short"]).await.1, "a.tar", "dense, short", "title, txt, width");
    let csv = b"file_name,txet\np.png,a cup\n";
    is_told(prepared(&[("l.csv", csv)], &["text"]).await.1, "l.csv", "text", "file_name, txet");
    // Of two sources the one is named that lacks it.
    let files: [(&str, &[u8]); 2] = [("a.tar", &good_tar(0, 20)), ("l.csv", csv)];
    is_told(prepared(&files, &["txt"]).await.1, "l.csv", "txt", "file_name, txet");
    is_told(prepared(&[("l.jsonl", rows(3, "text").as_bytes())], &["title"]).await.1, "l.jsonl", "title", "file_name, key, text");
}

#[tokio::test]
async fn small_sources_conclude_it_together() {
    let (a, b) = (good_tar(0, 3), good_tar(3, 3));
    is_told(prepared(&[("a.tar", &a), ("b.tar", &b)], &["nofield"]).await.1, "a.tar", "nofield", "txt");
}

/// As LLaVA's sets have them, in turns of a conversation.
#[tokio::test]
async fn where_none_is_named_the_usual_ones_are_looked_for_and_what_there_is_instead_is_told() {
    let rows = "{\"file_name\": \"p.png\", \"conversations\": [{\"from\": \"gpt\", \"value\": \"a cup\"}]}\n";
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    std::fs::write(dir.path().join("p.png"), png(40, 40, 1)).unwrap();
    let found = sources(dir.path(), &[("l.jsonl", rows.as_bytes())]).await;
    let report = prepare(&found, &store(&out), &small(), &threads(1)).await;
    is_told(report, "l.jsonl", "txt, caption, text", "conversations.0.from, conversations.0.value, file_name");
}

/// As in ShareGPT4V, and in the `.json` beside a picture.
#[tokio::test]
async fn a_field_within_others_is_named_by_its_path() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let row = |text: &str| {
        let turns = format!(r#"[{{"from": "human", "value": "<image>\nWhat?"}}, {{"from": "gpt", "value": "{text}"}}]"#);
        format!(r#"{{"id": "1", "image": "p.png", "conversations": {turns}}}"#)
    };
    std::fs::write(dir.path().join("p.png"), png(40, 40, 1)).unwrap();
    let list =
        format!(r#"[{{"id": "text", "conversations": []}}, {{"id": "0", "image": "p.png", "conversations": []}}, {}]"#, row("a cup"));
    let tar = tar_of(&[("2.jpg", &jpeg(48, 2)), ("2.json", row("a mug").as_bytes())]);
    let found = sources(dir.path(), &[("l.json", list.as_bytes()), ("t.tar", &tar)]).await;
    let report = prepare(&found, &store(&out), &named(&["conversations.1.value"]), &threads(1)).await.unwrap();
    assert_eq!(refused(&report), ["caption_missing: 0", "image_missing: text"]);
    let expected = [("1", "a cup"), ("2", "a mug")].map(|(key, caption)| (key.to_owned(), vec![caption.to_owned()]));
    assert_eq!(keys_and_captions(&out).await, expected);

    // What is read again is compared with its text.
    assert!(originals(&store(&out), found, Vec::new(), &|_, _| {}).await.unwrap().is_empty());
    let found = sources(dir.path(), &[("l.json", list.replace("a cup", "a cap").as_bytes()), ("t.tar", &tar)]).await;
    let changed = originals(&store(&out), found, Vec::new(), &|_, _| {}).await.unwrap();
    assert!(changed.len() == 1 && changed[0].file.ends_with("l.json"), "{changed:?}");

    let (_, report) = prepared(&[("l.json", format!("[{}]", row("a cup")).as_bytes())], &["conversations.2.value"]).await;
    let seen = "conversations.0.from, conversations.0.value, conversations.1.from, conversations.1.value, id, image";
    is_told(report, "l.json", "conversations.2.value", seen);
}

/// Who forgot to name one need not wait for all pictures of a long list.
#[tokio::test]
async fn where_there_is_one_source_its_first_part_tells_that_there_are_no_captions() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    std::fs::write(dir.path().join("p.png"), png(40, 40, 1)).unwrap();
    let found = sources(dir.path(), &[("l.jsonl", rows(2001, "title").as_bytes())]).await;
    let preparation = ella_dataset::Preparation::new(found, small(), threads(1), store(&out)).unwrap();
    assert_eq!(preparation.plan().await.unwrap().parts.len(), 2);
    let first = preparation.part(0, Box::new(|_| {})).await;
    is_told(first.map(|record| record.report), "l.jsonl", "txt, caption, text", "file_name, key, title");
}

#[tokio::test]
async fn samples_that_lack_what_others_have_are_refused_one_by_one() {
    let tar = tar_of(&[("a.jpg", &jpeg(48, 1)), ("a.txt", b"a cup"), ("b.jpg", &jpeg(48, 2)), ("b.json", b"{\"title\": 1}")]);
    let (_, report) = prepared(&[("a.tar", &tar)], &["txt"]).await;
    assert_eq!(refused(&report.unwrap()), ["caption_missing: b"]);
    // One of several columns is enough.
    let (out, report) = prepared(&[("a.tar", &tar)], &["dense", "txt"]).await;
    report.unwrap();
    assert_eq!(keys_and_captions(&out).await, [("a".to_owned(), vec![String::new(), "a cup".to_owned()])]);
    // A small tar among others may be just a bad one.
    let bad = tar_of(&[("x.jpg", &jpeg(48, 3)), ("x.json", b"{\"title\": 1}")]);
    let (_, report) = prepared(&[("a.tar", &good_tar(0, 3)), ("b.tar", &bad)], &["txt"]).await;
    assert_eq!(refused(&report.unwrap()), ["caption_missing: x"]);
}

/// A long list falls into parts, of which one may lack what another has.
#[tokio::test]
async fn all_parts_of_a_list_are_looked_at_before_a_field_is_missed() {
    let list = rows(2000, "text") + &rows(1, "title");
    let settings = Settings { duplicates: ella_dataset::Duplicates::Keep, ..named(&["title"]) };
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    std::fs::write(dir.path().join("p.png"), png(40, 40, 1)).unwrap();
    let found = sources(dir.path(), &[("l.jsonl", list.as_bytes())]).await;
    let report = prepare(&found, &store(&out), &settings, &threads(2)).await.unwrap();
    assert_eq!((report.read, report.kept), (2001, 1));
    is_told(prepared(&[("l.jsonl", list.as_bytes())], &["dense"]).await.1, "l.jsonl", "dense", "file_name, key, text");
}
