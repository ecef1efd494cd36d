//! Samples that are there twice: which is kept, and that nothing else depends on it.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::path::Path;

use common::{
    files, good_tar, jpeg, jpeg_of, keys_and_captions, leftovers, photo, prepare_in_order, prepared_rows, refused, small, sources, store,
    tar_of, threads,
};
use ella_dataset::{Duplicates, Encoding, Settings, Source, prepare};
use tempfile::TempDir;

/// A tar of these pictures, with keys from their names.
fn tar(pictures: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let texts: Vec<_> = pictures.iter().map(|(key, _)| (format!("{key}.jpg"), format!("{key}.txt"), format!("picture {key}"))).collect();
    let members =
        texts.iter().zip(pictures).flat_map(|((jpg, txt, text), (_, bytes))| [(jpg.as_str(), bytes.as_slice()), (txt, text.as_bytes())]);
    tar_of(&members.collect::<Vec<_>>())
}

/// What `duplicates.json` says: part, key, why, of.
fn found(out: &Path) -> Vec<(String, String, String, String)> {
    let found: serde_json::Value = serde_json::from_slice(&std::fs::read(out.join("duplicates.json")).unwrap()).unwrap();
    let parts = found["parts"].as_object().unwrap();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let all = parts.iter().flat_map(|(part, left)| left.as_array().unwrap().iter().map(move |left| (part, left)));
    all.map(|(part, left)| (part.clone(), text(&left["key"]), text(&left["why"]), text(&left["of"]))).collect()
}

fn expected(rows: &[[&str; 4]]) -> Vec<(String, String, String, String)> {
    rows.iter().map(|row| row.map(str::to_owned)).map(|[part, key, why, of]| (part, key, why, of)).collect()
}

async fn repeating(dir: &TempDir) -> Vec<Source> {
    let picture = |seed| jpeg(48, seed);
    let first = tar(&[("a0", picture(0)), ("a1", picture(1)), ("a2", picture(2)), ("a3", picture(1))]);
    let second = tar(&[("b0", picture(9)), ("b1", picture(2)), ("b2", picture(0)), ("b3", picture(8))]);
    let third = tar(&[("c0", picture(20)), ("c1", picture(21))]);
    sources(dir.path(), &[("a.tar", &first), ("b.tar", &second), ("c.tar", &third), ("d.tar", &tar(&[("d0", picture(9))]))]).await
}

#[tokio::test]
async fn of_pictures_of_the_same_bytes_the_first_is_kept() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let sources = repeating(&dir).await;
    let report = prepare(&sources, &store(&out), &small(), &threads(1)).await.unwrap();
    assert_eq!(refused(&report), ["duplicate_image: a3 b1 b2 d0"]);
    assert_eq!((report.read, report.kept, report.adds_up()), (11, 7, true));
    let keys: Vec<_> = keys_and_captions(&out).await.into_iter().map(|(key, _)| key).collect();
    assert_eq!(keys, ["a0", "a1", "a2", "b0", "b3", "c0", "c1"]);
    let rows = [["0", "a3", "a1"], ["1", "b1", "a2"], ["1", "b2", "a0"], ["3", "d0", "b0"]];
    assert_eq!(found(out.path()), expected(&rows.map(|[part, key, of]| [part, key, "duplicate_image", of])));
    assert_eq!(leftovers(&out).await, Vec::<String>::new());
    // A part without duplicates is prepared once: it has one record.
    let units = |part: &str| files(out.path()).iter().filter(|(name, _)| name.starts_with(&format!("units/{part}-"))).count();
    assert_eq!(["00000", "00001", "00002", "00003"].map(units), [2, 2, 1, 2]);

    let settings = Settings { duplicates: Duplicates::Keep, ..small() };
    let report = prepare(&sources, &store(&TempDir::new().unwrap()), &settings, &threads(1)).await.unwrap();
    assert_eq!((report.kept, refused(&report)), (11, vec![]));
}

#[tokio::test]
async fn which_is_kept_does_not_depend_on_threads_nor_on_the_order_of_the_work() {
    let (dir, calm) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let sources = repeating(&dir).await;
    prepare(&sources, &store(&calm), &small(), &threads(1)).await.unwrap();
    for (count, turn) in [(3, 0), (1, 1), (2, 2), (1, 3)] {
        let out = TempDir::new().unwrap();
        let order = |parts: &mut Vec<usize>| {
            parts.reverse();
            let turn = turn % parts.len().max(1);
            parts.rotate_left(turn);
        };
        prepare_in_order(&sources, &store(&out), &small(), &threads(count), order).await.unwrap();
        assert_eq!(files(out.path()), files(calm.path()));
    }
}

#[tokio::test]
async fn pictures_that_look_alike_are_left_out_where_that_is_asked_for() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let picture = |seed, quality| jpeg_of(&photo(160, 120, seed), quality);
    let smaller = image::imageops::resize(&photo(160, 120, 3), 120, 90, image::imageops::FilterType::Triangle);
    let first = tar(&[("a0", picture(1, 95)), ("a1", picture(2, 95)), ("a2", picture(3, 95))]);
    let second = tar(&[("b0", picture(2, 60)), ("b1", jpeg_of(&smaller, 90)), ("b2", picture(1, 95)), ("b3", picture(4, 95))]);
    let sources = sources(dir.path(), &[("a.tar", &first), ("b.tar", &second)]).await;
    let settings = Settings { duplicates: Duplicates::Near { bits: 8 }, ..small() };
    let report = prepare(&sources, &store(&out), &settings, &threads(2)).await.unwrap();
    assert_eq!(refused(&report), ["duplicate_image: b2", "near_duplicate: b0 b1"]);
    let rows = [["1", "b0", "near_duplicate", "a1"], ["1", "b1", "near_duplicate", "a2"], ["1", "b2", "duplicate_image", "a0"]];
    assert_eq!(found(out.path()), expected(&rows));
    assert_eq!(leftovers(&out).await, Vec::<String>::new());

    let exact = TempDir::new().unwrap();
    let report = prepare(&sources, &store(&exact), &small(), &threads(1)).await.unwrap();
    assert_eq!(refused(&report), ["duplicate_image: b2"]);
}

/// A list of `rows` rows that name few pictures, and its folder. Rows 10 and `again` have the same key.
async fn list(dir: &TempDir, rows: usize, again: usize) -> Vec<Source> {
    for picture in 0..5 {
        std::fs::write(dir.path().join(format!("{picture}.png")), common::png(8, 8, picture)).unwrap();
    }
    let key = |row: usize| if row == again { 10 } else { row };
    let line = |row| format!("{{\"file_name\": \"{}.png\", \"key\": \"k{}\", \"text\": \"row {row}\"}}\n", row % 5, key(row));
    let text: String = (0..rows).map(line).collect();
    sources(dir.path(), &[("list.jsonl", text.as_bytes())]).await
}

#[tokio::test]
async fn a_key_that_is_twice_in_a_list_is_refused_wherever_its_parts_are_cut() {
    let settings = Settings { duplicates: Duplicates::Keep, encoding: Encoding::Webp { quality: 80 }, ..Settings::new(8) };
    for again in [11, 1999, 2000, 4200] {
        let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let sources = list(&dir, 4201, again).await;
        let report = prepare(&sources, &store(&out), &settings, &threads(2)).await.unwrap();
        assert_eq!((report.read, report.kept, refused(&report)), (4201, 4200, vec!["duplicate_key: k10".to_owned()]));
        let texts: Vec<_> = prepared_rows(&out).await.into_iter().map(|row| row.captions[0].clone()).collect();
        let kept = (0..4201).filter(|row| *row != again).map(|row| format!("row {row}"));
        assert_eq!(texts, kept.collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn what_repeats_a_sample_that_was_left_out_is_not_left_out_for_it() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let mut lines: Vec<_> =
        (0..2002).map(|row| format!("{{\"file_name\": \"{row}.png\", \"key\": \"k{row}\", \"text\": \"t\"}}")).collect();
    for picture in [0, 1, 2000, 2001] {
        std::fs::write(dir.path().join(format!("{picture}.png")), common::png(8, 8, picture % 2000 + picture / 2000 * 50)).unwrap();
    }
    // Of row 2000's key there is one already; row 2001 has its picture.
    lines[2000] = lines[2000].replace("k2000", "k0");
    lines[2001] = lines[2001].replace("2001.png", "2000.png");
    let sources = sources(dir.path(), &[("list.jsonl", lines.join("\n").as_bytes())]).await;
    let report = prepare(&sources, &store(&out), &Settings::new(8), &threads(1)).await.unwrap();
    let keys: Vec<_> = keys_and_captions(&out).await.into_iter().map(|(key, _)| key).collect();
    assert_eq!(keys, ["k0", "k1", "k2001"]);
    assert_eq!(refused(&report)[0], "duplicate_key: k0");
    assert_eq!((report.read, report.adds_up()), (2002, true));
}

#[tokio::test]
async fn all_samples_of_a_source_may_be_duplicates() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let prefixed = Settings { key_prefix: true, ..small() };
    let sources = sources(dir.path(), &[("a.tar", &good_tar(0, 12)), ("b.tar", &good_tar(0, 12))]).await;
    let report = prepare(&sources, &store(&out), &prefixed, &threads(1)).await.unwrap();
    assert_eq!((report.kept, report.read, report.adds_up()), (12, 24, true));
    assert_eq!(leftovers(&out).await, Vec::<String>::new());
}
