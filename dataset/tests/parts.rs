//! Lists fall into parts, which may be prepared in any order, twice, by two at once, and be cut off anywhere.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::future::poll_fn;
use std::task::Poll;

use common::{files, good_tar, jpeg, leftovers, png, prepare_in_order, prepared_rows, small, sources, store, tar_of, threads, versions};
use ella_dataset::{Duplicates, Plan, Preparation, Settings, Source, prepare};
use ella_store::Store;
use tempfile::TempDir;

/// Rows of a list: three parts.
const ROWS: usize = 4500;

fn tiny() -> Settings {
    Settings { duplicates: Duplicates::Keep, ..Settings::new(8) }
}

/// A folder of pictures, and a list that names them again and again.
async fn list(dir: &TempDir, name: &str) -> Vec<Source> {
    let folder = dir.path().join("images");
    std::fs::create_dir_all(&folder).unwrap();
    for picture in 0..7 {
        std::fs::write(folder.join(format!("{picture}.png")), png(9, 8, picture)).unwrap();
    }
    let line = |row: usize| match name.ends_with(".csv") {
        true => format!("{}.png,k{row},\"row, {row}\"\n", row % 7),
        false => format!("{{\"file_name\": \"{}.png\", \"id\": \"k{row}\", \"text\": \"row, {row}\"}}\n", row % 7),
    };
    let head = if name.ends_with(".csv") { "file_name,id,text\n" } else { "" };
    let text: String = std::iter::once(head.to_owned()).chain((0..ROWS).map(line)).collect();
    std::fs::write(folder.join(name), text).unwrap();
    let location = if name.starts_with("metadata") { folder } else { folder.join(name) };
    Source::find(location.to_str().unwrap()).await.unwrap()
}

#[tokio::test]
async fn a_list_in_parts_gives_the_samples_of_all_its_rows_in_order() {
    let mut seen = Vec::new();
    for name in ["list.jsonl", "metadata.jsonl", "metadata.csv"] {
        let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let sources = list(&dir, name).await;
        let report = prepare(&sources, &store(&out), &tiny(), &threads(2)).await.unwrap();
        assert_eq!((report.read, report.kept), (ROWS as u64, ROWS as u64), "{name}");
        assert_eq!(Plan::load(&store(&out)).await.unwrap().unwrap().parts().count(), 3, "{name}");
        let rows = prepared_rows(&out).await;
        for (number, row) in rows.iter().enumerate() {
            assert_eq!((row.key.as_str(), row.captions[0].as_str()), (format!("k{number}").as_str(), format!("row, {number}").as_str()));
        }
        // The pictures repeat every seven rows, across parts too.
        assert!(rows.iter().zip(&rows[7..]).all(|(a, b)| a.image == b.image) && rows[0].image != rows[1].image);
        seen.push(rows.into_iter().map(|row| (row.key, row.captions, row.image)).collect::<Vec<_>>());
    }
    assert!(seen[0] == seen[1] && seen[0] == seen[2]);
}

#[tokio::test]
async fn parts_done_in_any_order_and_twice_give_the_same_bytes() {
    let (dir, calm, other) = (TempDir::new().unwrap(), TempDir::new().unwrap(), TempDir::new().unwrap());
    let sources = list(&dir, "list.jsonl").await;
    prepare(&sources, &store(&calm), &tiny(), &threads(1)).await.unwrap();
    prepare_in_order(&sources, &store(&other), &tiny(), &threads(2), |parts| parts.reverse()).await.unwrap();
    assert_eq!(files(other.path()), files(calm.path()));
}

/// Tars of which two have a picture in common.
async fn tars(dir: &TempDir) -> Vec<Source> {
    let again = tar_of(&[("x.jpg", &jpeg(41, 1)), ("x.txt", b"again"), ("y.jpg", &jpeg(60, 77)), ("y.txt", b"new")]);
    let tars = [("a.tar", good_tar(0, 20)), ("b.tar", again), ("c.tar", good_tar(100, 15))];
    sources(dir.path(), &tars.each_ref().map(|(name, bytes)| (*name, bytes.as_slice()))).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_that_prepare_the_same_at_once_make_the_same_bytes() {
    let (dir, calm) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let sources = tars(&dir).await;
    let report = prepare(&sources, &store(&calm), &small(), &threads(1)).await.unwrap();
    assert_eq!(report.kept, 36);
    for _ in 0..4 {
        let out = TempDir::new().unwrap();
        let run = |count| {
            let (sources, out) = (sources.clone(), store(&out));
            tokio::spawn(async move { prepare(&sources, &out, &small(), &threads(count)).await })
        };
        let (a, b, c) = tokio::join!(run(1), run(2), run(1));
        for result in [a, b, c] {
            assert_eq!(result.unwrap().unwrap(), report);
        }
        // Whoever was last to finish has deleted what is left over.
        assert_eq!(files(out.path()), files(calm.path()));
    }
    // And in a store that is no folder.
    let remote = Store::in_memory();
    let (first, second) = (small(), small());
    let (one, two) = (threads(1), threads(1));
    let (a, b) = tokio::join!(prepare(&sources, &remote, &first, &one), prepare(&sources, &remote, &second, &two));
    assert_eq!((a.unwrap(), b.unwrap()), (report.clone(), report));
    for (name, bytes) in files(calm.path()) {
        assert_eq!(remote.get(&name).await.unwrap(), bytes, "{name}");
    }
    assert_eq!(remote.list("").await.unwrap().len(), files(calm.path()).len());
}

/// Drives a future until it was polled so many times, and drops it then.
async fn cut_off<T>(polls: u32, future: impl Future<Output = T>) -> Option<T> {
    let mut future = std::pin::pin!(future);
    let mut left = polls;
    poll_fn(|context| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        let polled = future.as_mut().poll(context).map(Some);
        if polled.is_pending() && left == 0 { Poll::Ready(None) } else { polled }
    })
    .await
}

#[test]
fn work_cut_off_anywhere_and_begun_again_makes_the_bytes_of_a_calm_run() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (dir, calm) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let sources = runtime().block_on(async {
        let sources = tars(&dir).await;
        prepare(&sources, &store(&calm), &small(), &threads(1)).await.unwrap();
        sources
    });
    let mut number = 7u32;
    for _ in 0..6 {
        let out = TempDir::new().unwrap();
        let (mut cuts, mut done) = (0, None);
        while done.is_none() {
            number = number.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let polls = 1 + (number >> 16) % 60 + cuts * 4;
            // A runtime of its own: what was cut off is over before the next begins.
            done = runtime().block_on(cut_off(polls, prepare(&sources, &store(&out), &small(), &threads(2))));
            cuts += 1;
            // What a killed writer leaves: it had begun, and not finished.
            if out.path().join("shards").is_dir() {
                std::fs::write(out.path().join(format!("shards/00000-left.arrow#{cuts}")), b"half").unwrap();
            }
            assert!(cuts < 200, "gets nowhere");
        }
        done.unwrap().unwrap();
        runtime().block_on(async {
            // The last run finished before the last half-written file was planted.
            prepare(&sources, &store(&out), &small(), &threads(1)).await.unwrap();
            assert_eq!(leftovers(&out).await, Vec::<String>::new());
        });
        assert_eq!(files(out.path()), files(calm.path()), "after {cuts} cuts");
    }
}

#[tokio::test]
async fn a_finished_data_set_prepared_again_is_not_touched() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let sources = tars(&dir).await;
    prepare(&sources, &store(&out), &small(), &threads(1)).await.unwrap();
    let before = versions(out.path());
    let preparation = Preparation::new(sources.clone(), small(), threads(1), store(&out)).unwrap();
    assert_eq!(preparation.plan().await.unwrap(), ella_dataset::ToDo::default());
    prepare(&sources, &store(&out), &small(), &threads(1)).await.unwrap();
    assert_eq!(versions(out.path()), before);
}

#[tokio::test]
async fn nothing_is_finished_before_duplicates_were_looked_for() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let sources = tars(&dir).await;
    let preparation = Preparation::new(sources, small(), threads(1), store(&out)).unwrap();
    for part in preparation.plan().await.unwrap().parts {
        preparation.part(part, Box::new(|_| {})).await.unwrap();
    }
    let error = preparation.finish().await.unwrap_err().to_string();
    assert!(error.contains("duplicates.json") && error.contains("ella prepare"), "{error}");
    preparation.resolve().await.unwrap();
    let error = preparation.finish().await.unwrap_err().to_string();
    assert!(error.contains("units/00001") && error.contains("not prepared yet"), "{error}");
}
