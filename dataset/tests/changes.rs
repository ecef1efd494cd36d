//! Sources that changed between two runs, and shards that were lost.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::fs::File;
use std::path::Path;
use std::time::{Duration, SystemTime};

use common::{files, good_tar, jpeg, leftovers, png, small, sources, store, tar_of, threads, versions};
use ella_dataset::{DataError, Manifest, Preparation, Settings, Source, SourceOptions, ToDo, originals, prepare};
use tempfile::TempDir;

/// Sets the time of a file's last change, for clocks are coarse.
fn touch(path: &Path, seconds: u64) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000 + seconds)).unwrap();
}

async fn find(path: &Path) -> Source {
    Source::find(path.to_str().unwrap()).await.unwrap().remove(0)
}

/// A tar of one picture whose size does not depend on the caption.
fn one(caption: &str) -> Vec<u8> {
    tar_of(&[("a.jpg", &jpeg(48, 1)), ("a.txt", caption.as_bytes())])
}

async fn todo(sources: &[Source], out: &TempDir) -> Result<ToDo, DataError> {
    Preparation::new(sources.to_vec(), small(), threads(1), store(out)).unwrap().plan().await
}

#[tokio::test]
async fn a_source_of_another_size_is_another_source() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let before = sources(dir.path(), &[("a.tar", &good_tar(0, 5)), ("b.tar", &good_tar(10, 5))]).await;
    prepare(&before, &store(&out), &small(), &threads(1)).await.unwrap();
    let written = files(out.path());
    let after = sources(dir.path(), &[("a.tar", &good_tar(0, 5)), ("b.tar", &good_tar(10, 6))]).await;
    let error = prepare(&after, &store(&out), &small(), &threads(1)).await.unwrap_err();
    let DataError::SourceReplaced { source_name, expected, found } = &error else { panic!("{error}") };
    assert!(source_name.ends_with("b.tar"));
    assert_eq!((*expected, *found), (before[1].bytes(), after[1].bytes()));
    assert_eq!(files(out.path()), written);
}

#[tokio::test]
async fn a_source_of_the_same_size_and_other_bytes_is_found_out() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let path = dir.path().join("a.tar");
    let before = sources(dir.path(), &[("a.tar", &one("first"))]).await;
    prepare(&before, &store(&out), &small(), &threads(1)).await.unwrap();
    let written = files(out.path());
    std::fs::write(&path, one("other")).unwrap();
    touch(&path, 1);
    let after = [find(&path).await];
    assert_eq!(after[0].bytes(), before[0].bytes());
    assert_eq!(todo(&after, &out).await.unwrap(), ToDo { parts: vec![], check: vec![0] });
    let error = prepare(&after, &store(&out), &small(), &threads(1)).await.unwrap_err();
    assert!(matches!(&error, DataError::SourceReplaced { source_name, .. } if source_name.ends_with("a.tar")), "{error}");
    assert_eq!(files(out.path()), written);
}

#[tokio::test]
async fn a_source_that_was_only_touched_is_the_same() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let path = dir.path().join("a.tar");
    let before = sources(dir.path(), &[("a.tar", &good_tar(0, 5))]).await;
    let report = prepare(&before, &store(&out), &small(), &threads(1)).await.unwrap();
    let written = versions(out.path());
    touch(&path, 2);
    let after = [find(&path).await];
    assert_eq!(todo(&after, &out).await.unwrap(), ToDo { parts: vec![], check: vec![0] });
    assert_eq!(prepare(&after, &store(&out), &small(), &threads(1)).await.unwrap(), report);
    // It is read again once: its new look is noted in its record, and nothing else is written.
    let others = |all: Vec<(String, u64, SystemTime, Vec<u8>)>| all.into_iter().filter(|(name, ..)| !name.starts_with("units/"));
    assert!(others(versions(out.path())).eq(others(written)));
    assert_eq!(todo(&after, &out).await.unwrap(), ToDo::default());
    assert_eq!(prepare(&after, &store(&out), &small(), &threads(1)).await.unwrap(), report);
}

/// A list's own look tells nothing of the pictures that it names: only reading them again does.
#[tokio::test]
async fn a_picture_that_changed_behind_an_unchanged_list_is_found_by_a_check() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    std::fs::write(dir.path().join("p.png"), png(8, 8, 1)).unwrap();
    let list = sources(dir.path(), &[("l.jsonl", b"{\"file_name\": \"p.png\", \"text\": \"a\"}\n")]).await;
    let new = || Preparation::new(list.clone(), Settings::new(8), threads(1), store(&out)).unwrap();
    prepare(&list, &store(&out), &Settings::new(8), &threads(1)).await.unwrap();
    assert_eq!(new().parts().await.unwrap(), 0..1);
    new().check(0).await.unwrap();
    std::fs::write(dir.path().join("p.png"), png(8, 8, 2)).unwrap();
    assert_eq!(new().plan().await.unwrap(), ToDo::default());
    let error = new().check(0).await.unwrap_err();
    let DataError::PicturesReplaced { source_name, pictures } = &error else { panic!("{error}") };
    assert!(source_name.ends_with("l.jsonl") && pictures.ends_with("/p.png"), "{error}");
    std::fs::remove_file(dir.path().join("p.png")).unwrap();
    assert!(matches!(new().check(0).await, Err(DataError::PicturesReplaced { .. })), "gone");
}

#[tokio::test]
async fn a_list_whose_rows_changed_is_refused() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    std::fs::write(dir.path().join("p.png"), png(8, 8, 1)).unwrap();
    let row = "{\"file_name\": \"p.png\", \"text\": \"a\"}\n";
    let before = sources(dir.path(), &[("l.jsonl", row.as_bytes())]).await;
    prepare(&before, &store(&out), &Settings::new(8), &threads(1)).await.unwrap();
    let after = sources(dir.path(), &[("l.jsonl", row.repeat(2).as_bytes())]).await;
    let error = prepare(&after, &store(&out), &Settings::new(8), &threads(1)).await.unwrap_err();
    assert!(matches!(&error, DataError::Other { field, .. } if field.starts_with("sources[0].pieces")), "{error}");
}

#[tokio::test]
async fn a_lost_shard_is_made_again_with_the_same_bytes_also_of_a_part_with_duplicates() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let second = tar_of(&[("x.jpg", &jpeg(41, 1)), ("x.txt", b"again"), ("y.jpg", &jpeg(60, 77)), ("y.txt", b"new")]);
    let sources = sources(dir.path(), &[("a.tar", &good_tar(0, 20)), ("b.tar", &second)]).await;
    let report = prepare(&sources, &store(&out), &small(), &threads(1)).await.unwrap();
    assert_eq!((report.read, report.kept), (22, 21));
    let written = files(out.path());
    let shards = Manifest::load(&store(&out)).await.unwrap().shards;
    assert!(shards.len() > 2);
    for lost in [vec![0], vec![1], vec![shards.len() - 1], (0..shards.len()).collect()] {
        for shard in &lost {
            std::fs::remove_file(out.path().join(&shards[*shard].name)).unwrap();
        }
        assert_eq!(prepare(&sources, &store(&out), &small(), &threads(2)).await.unwrap(), report);
        assert_eq!(files(out.path()), written, "{lost:?}");
    }
}

/// Shards above 64 KiB have a tree beside them: it goes and comes with its shard.
#[tokio::test]
async fn trees_are_made_anew_and_deleted_with_their_shards() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let repeated = tar_of(&[("x.jpg", &jpeg(41, 1)), ("x.txt", b"again")]);
    let repeated = [&good_tar(200, 90)[..], &repeated].map(<[u8]>::to_vec);
    let sources = sources(dir.path(), &[("a.tar", &good_tar(0, 90)), ("b.tar", &joined(&repeated))]).await;
    let settings = Settings { shard_bytes: 100_000, ..small() };
    let report = prepare(&sources, &store(&out), &settings, &threads(1)).await.unwrap();
    assert_eq!((report.read, report.kept), (181, 180));
    let written = files(out.path());
    let trees: Vec<_> = written.iter().filter(|(name, _)| name.starts_with("trees/shards/")).collect();
    assert!(trees.len() >= 2, "{trees:?}");
    assert_eq!(leftovers(&out).await, Vec::<String>::new());

    // A tree of other bytes than its shard's is replaced when the shard is made again.
    let (tree, _) = trees[0];
    let shard = tree.trim_start_matches("trees/").trim_end_matches(".obao6");
    std::fs::remove_file(out.path().join(shard)).unwrap();
    std::fs::write(out.path().join(tree), b"of another file").unwrap();
    prepare(&sources, &store(&out), &settings, &threads(1)).await.unwrap();
    assert_eq!(files(out.path()), written);
}

/// One tar of several.
fn joined(tars: &[Vec<u8>]) -> Vec<u8> {
    let mut all = Vec::new();
    for tar in tars {
        all.truncate(all.len().saturating_sub(1024));
        all.extend_from_slice(tar);
    }
    all
}

#[tokio::test]
async fn a_lost_shard_of_a_source_that_changed_is_not_made_of_other_bytes() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let path = dir.path().join("a.tar");
    let before = sources(dir.path(), &[("a.tar", &one("first"))]).await;
    prepare(&before, &store(&out), &small(), &threads(1)).await.unwrap();
    let shard = Manifest::load(&store(&out)).await.unwrap().shards.remove(0).name;
    std::fs::remove_file(out.path().join(&shard)).unwrap();
    std::fs::write(&path, one("other")).unwrap();
    touch(&path, 3);
    let error = prepare(&[find(&path).await], &store(&out), &small(), &threads(1)).await.unwrap_err();
    assert!(matches!(&error, DataError::MadeOtherwise { file, .. } if file.ends_with(&shard)), "{error}");
    assert!(!out.path().join(&shard).exists());
}

/// One that is gone or of another size does not hide what became of the others.
#[tokio::test]
async fn originals_are_compared_each_whatever_became_of_the_others() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let tars: Vec<Vec<u8>> = (0..4).map(|tar| good_tar(10 * tar, 5)).collect();
    let names = ["a.tar", "b.tar", "c.tar", "d.tar"];
    let all: Vec<(&str, &[u8])> = names.into_iter().zip(tars.iter().map(Vec::as_slice)).collect();
    let before = sources(dir.path(), &all).await;
    prepare(&before, &store(&out), &small(), &threads(1)).await.unwrap();
    let locations: Vec<String> = before.iter().map(|source| source.name().to_owned()).collect();
    let changed = async || {
        let (found, gone) = Source::find_there(&locations, &SourceOptions::default()).await.unwrap();
        let changed = originals(&store(&out), found, gone, &|_, _| {}).await.unwrap();
        changed.into_iter().map(|damage| damage.file.rsplit('/').next().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(changed().await, Vec::<String>::new());
    std::fs::remove_file(dir.path().join("a.tar")).unwrap();
    std::fs::write(dir.path().join("b.tar"), good_tar(10, 6)).unwrap();
    let mut other = good_tar(30, 5);
    let caption = other.windows(9).position(|bytes| bytes == b"a picture").unwrap();
    other[caption] = b'A';
    std::fs::write(dir.path().join("d.tar"), other).unwrap();
    assert_eq!(changed().await, ["a.tar", "b.tar", "d.tar"]);
}
